"""One error, three spellings."""

from glimmer.frontend.wire.errors import anthropic_error, error_body


def test_openais_object_with_lightllms_message_beside_it() -> None:
    for path in ("/generate", "/v1/chat/completions", "/v1/messagesx"):
        body = error_body(path, 400, "n: too many", None, "n", "r1")
        error = {"message": "n: too many", "type": "BadRequestError", "param": "n", "code": 400}
        assert body == {"error": error, "message": "n: too many"}


def test_anthropics_object_on_its_paths() -> None:
    kinds = {
        400: "invalid_request_error",
        404: "not_found_error",
        405: "invalid_request_error",
        413: "request_too_large",
        429: "rate_limit_error",
        500: "api_error",
        503: "overloaded_error",
    }
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        for status, kind in kinds.items():
            assert error_body(path, status, "no", "X", "f", "r1") == {
                "type": "error",
                "error": {"type": kind, "message": "no"},
                "request_id": "r1",
            }


def test_the_event_of_a_broken_stream() -> None:
    assert anthropic_error(500, "x")["error"] == {"type": "api_error", "message": "x"}
    assert anthropic_error(429, "x")["error"]["type"] == "rate_limit_error"


def test_text_that_is_no_unicode_does_not_break_the_reply() -> None:
    assert error_body("/", 400, "\udcff")["message"] == "?"
