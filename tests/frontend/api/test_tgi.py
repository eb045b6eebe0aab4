"""`--use_tgi_api`: TGI's names in, TGI's shapes out."""

from typing import Any

import pytest
from glimmer.frontend.api.tgi import TgiBody, translate
from glimmer.frontend.wire.body import decode_body, encode_json

SHORT: dict[str, Any] = {"inputs": [1, 2, 3], "parameters": {"max_new_tokens": 2}}


@pytest.fixture
async def tgi(start: Any) -> Any:
    return await start(use_tgi_api=True)


async def test_a_plain_reply(tgi: Any) -> None:
    status, reply = await tgi.post("/generate", SHORT)
    assert status == 200
    assert reply["generated_text"] == "the "
    assert [list(entry) for entry in reply["logprobs"]] == [["275"], ["220"]]
    assert reply.keys() == {"generated_text", "logprobs"}


async def test_details(tgi: Any) -> None:
    parameters = {"max_new_tokens": 2, "details": True}
    _, reply = await tgi.post("/generate", {"inputs": [1, 2, 3], "parameters": parameters})
    details = reply["details"]
    assert (details["generated_tokens"], details["finish_reason"]) == (2, "length")
    assert details["prompt_tokens"] == 3
    assert [token["text"] for token in details["tokens"]] == ["the", " "]
    assert details["beam_sequences"] == [
        {
            "generated_text": "the ",
            "finish_reason": "length",
            "generated_tokens": 2,
            "logprob": -0.5,
        }
    ]


async def test_the_best_of_several_is_the_likeliest(tgi: Any) -> None:
    engine, chosen = tgi.engine, iter((-3.0, -1.0, -2.0))
    plain = engine.logprob
    seen: dict[int, float] = {}

    def tokens(submit: Any, ids: list[int], original: Any = engine.tokens) -> None:
        value = seen.setdefault(submit.request_id, next(chosen, -9.0))
        engine.logprob = lambda i, n: plain(i, n).__class__(i, value, 1, [])
        original(submit, ids)

    engine.tokens = tokens
    parameters = {"max_new_tokens": 1, "details": True, "do_sample": True}
    body = {"inputs": [1], "num_beam": 3, "parameters": parameters}
    _, reply = await tgi.post("/generate", body)
    beams = reply["details"]["beam_sequences"]
    assert sorted(beam["logprob"] for beam in beams) == [-3.0, -2.0, -1.0]
    assert reply["details"]["tokens"][0]["logprob"] == -1.0


async def test_a_list_of_one(start: Any) -> None:
    server = await start(use_tgi_api=True, return_list=True)
    _, reply = await server.post("/", SHORT)
    assert [one["generated_text"] for one in reply] == ["the "]


@pytest.mark.parametrize("path", ["/generate_stream", "/"])
async def test_the_last_event_has_the_whole_text(tgi: Any, path: str) -> None:
    body = {**SHORT, "stream": True, "parameters": {"max_new_tokens": 3, "details": True}}
    events = await tgi.events(path, body)
    assert [event["token"]["text"] for event in events] == ["the", " ", "answer"]
    assert [event["generated_text"] for event in events] == [None, None, "the answer"]
    assert [event["details"] for event in events[:2]] == [None, None]
    details = {"generated_tokens": 3, "finish_reason": "length", "prompt_tokens": 3}
    assert events[2]["details"] == details
    events = await tgi.events(path, {**SHORT, "stream": True})
    assert (events[-1]["generated_text"], events[-1]["details"]) == ("the ", None)


def test_names_are_translated_and_unknown_ones_dropped() -> None:
    parameters = {
        "stop": ["a"],
        "details": True,
        "best_of": 100,
        "n": "many",
        "seed": 5,
        "typical_p": 0.9,
        "truncate": 3,
        "watermark": True,
        "temperature": 0.5,
    }
    body = {"inputs": "x", "num_beam": 2, "parameters": parameters}
    translated = translate(decode_body(encode_json(body), TgiBody))
    given = translated.parameters
    assert given is not None
    assert (given.stop_sequences, given.return_details, given.best_of) == (["a"], True, 2)
    assert (given.seed, given.temperature) == (5, 0.5)
    own = {"stop": ["a"], "stop_sequences": ["b"], "details": True, "return_details": False}
    given = translate(
        decode_body(encode_json({"inputs": "x", "parameters": own}), TgiBody)
    ).parameters
    assert given is not None
    assert (given.stop_sequences, given.return_details, given.best_of) == (["b"], False, 1)


async def test_bad_input_is_named_as_tgi_names_it(tgi: Any) -> None:
    for body, field in [
        ({"inputs": 5}, "inputs"),
        ({"inputs": "x", "num_beam": 9}, "num_beam"),
        ({"inputs": "x", "parameters": {"details": 3}}, "parameters.details"),
        ({"inputs": "x", "parameters": {"stop": ["x"] * 1000}}, "parameters.stop"),
    ]:
        status, reply = await tgi.post("/generate", body)
        assert (status, reply["error"]["param"]) == (400, field), body
    status, reply = await tgi.post("/generate_stream", {"inputs": "x", "num_beam": 2})
    assert (status, reply["error"]["param"]) == (400, "num_beam")
