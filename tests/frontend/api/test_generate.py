"""LightLLM's routes: shapes, one event per token, stop text that stays."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

IDS = Callable[[str], list[int]]
GUIDE = {"inputs": "What is AI?", "parameters": {"max_new_tokens": 100, "frequency_penalty": 1}}
SHORT = {"inputs": [1, 2, 3], "parameters": {"max_new_tokens": 2}}
USAGE = '"input_usage":{"input_text_tokens":3,"input_audio_tokens":0,"input_image_tokens":0}'


async def test_the_guides_request(server: Any) -> None:
    status, reply = await server.post("/generate", GUIDE)
    assert status == 200
    sampling = server.engine.submits[0].sampling
    assert (sampling.temperature, sampling.frequency_penalty, sampling.max_new_tokens) == (
        0,
        1,
        100,
    )
    assert reply == {
        "generated_text": ["the answer to the question"],
        "count_output_tokens": 10,  # the end token counts, its text is left out
        "finish_reason": "stop",
        "prompt_tokens": 6,
        "logprobs": reply["logprobs"],
        "input_usage": {
            "input_text_tokens": 6,
            "input_audio_tokens": 0,
            "input_image_tokens": 0,
        },
    }
    assert reply["logprobs"][0] == {"275": {"logprob": -0.5, "rank": 1, "decoded_token": "the"}}
    assert len(reply["logprobs"]) == 10


async def test_several_samples_are_lists_in_order(server: Any) -> None:
    parameters = {"best_of": 3, "n": 3, "max_new_tokens": 2, "return_details": True}
    _, reply = await server.post("/generate", {"inputs": "x", "parameters": parameters})
    assert reply["generated_text"] == ["the "] * 3
    assert reply["count_output_tokens"] == [2, 2, 2]
    assert reply["finish_reason"] == ["length"] * 3
    assert [len(tokens) for tokens in reply["tokens"]] == [2, 2, 2]
    assert [len(entries) for entries in reply["logprobs"]] == [2, 2, 2]
    assert len({submit.sampling.seed for submit in server.engine.submits}) == 3


async def test_details_of_each_token(server: Any) -> None:
    parameters = {"max_new_tokens": 2, "return_details": True}
    _, reply = await server.post("/generate", {"inputs": [1, 2, 3, 4], "parameters": parameters})
    assert reply["tokens"][1] == {
        "id": 220,
        "logprob": -0.5,
        "cumlogprob": -0.5,
        "special": False,
        "count_output_tokens": 2,
        "prompt_cache_len": 3,
        "mtp_accepted_token_num": 0,
        "prompt_tokens": 4,
        "text": " ",
        "logprobs": {"220": {"logprob": -0.5, "rank": 1, "decoded_token": " "}},
    }


async def test_the_stream_byte_for_byte(server: Any) -> None:
    def event(token: str, finished: str) -> str:
        return (
            f'data:{{"token":{{{token}}},"generated_text":null,{finished},"details":null,{USAGE}}}'
            "\n\n"
        )

    data = await server.stream("/generate_stream", SHORT)
    first = (
        '"id":275,"text":"the","logprob":-0.5,"special":false,"count_output_tokens":1,'
        '"prompt_tokens":3,"logprobs":{"275":{"logprob":-0.5,"rank":1,"decoded_token":"the"}}'
    )
    second = (
        '"id":220,"text":" ","logprob":-0.5,"special":false,"count_output_tokens":2,'
        '"prompt_tokens":3,"logprobs":{"220":{"logprob":-0.5,"rank":1,"decoded_token":" "}}'
    )
    assert data.decode() == event(first, '"finished":false,"finish_reason":null') + event(
        second, '"finished":true,"finish_reason":"length"'
    )


@pytest.mark.parametrize("per_message", [1, 3, 100])
async def test_one_event_per_token_however_many_arrive_together(
    server: Any, per_message: int
) -> None:
    server.engine.tokens_per_message = per_message
    events = await server.events("/generate_stream", GUIDE)
    assert [e["token"]["count_output_tokens"] for e in events] == list(range(1, 11))
    assert [e["finished"] for e in events] == [False] * 9 + [True]
    assert [e["finish_reason"] for e in events] == [None] * 9 + ["stop"]
    assert "".join(e["token"]["text"] for e in events) == "the answer to the question"
    assert events[-1]["token"]["special"]
    assert events[-1]["token"]["text"] == ""
    assert all("prompt_logprobs" not in e for e in events)


async def test_the_last_token_is_marked_although_the_engines_word_comes_later(
    server: Any,
) -> None:
    server.engine.manual = True
    waiting = asyncio.create_task(server.stream("/generate_stream", SHORT))
    submit = (await server.engine.submitted())[0]
    server.engine.tokens(submit, [275])
    server.engine.tokens(submit, [220])
    generation = next(iter(server.frontend.client._generations.values()))
    await server.settle(lambda: not generation._pending and generation._waiter is not None)
    server.engine.finish(submit, "length", 2)
    events = (await waiting).decode().split("\n\n")
    assert [json.loads(e[5:])["finished"] for e in events if e] == [False, True]


async def test_half_characters_are_empty_text_until_complete(server: Any, text_ids: IDS) -> None:
    server.engine.output_ids = text_ids("é👍")
    events = await server.events("/generate_stream", {"inputs": "x"})
    texts = [e["token"]["text"] for e in events]
    assert "".join(texts) == "é👍"
    assert texts.count("") == len(texts) - 2


@pytest.mark.parametrize("stop", ["er to", ["zzz", "er to"]])
async def test_stop_text_stays_and_the_rest_is_aborted(server: Any, stop: Any) -> None:
    body = {"inputs": "x", "parameters": {"stop_sequences": stop, "return_details": True}}
    _, reply = await server.post("/generate", body)
    assert reply["generated_text"] == ["the answer to"]
    assert (reply["finish_reason"], reply["count_output_tokens"]) == ("stop", 5)
    assert len(reply["tokens"]) == 5
    assert server.engine.aborted_ids in ([server.engine.submits[0].request_id], [])
    events = await server.events("/generate_stream", body)
    assert len(events) == 5
    assert (events[-1]["finished"], events[-1]["finish_reason"]) == (True, "stop")


async def test_stop_id_sequences(server: Any) -> None:
    body = {"inputs": "x", "parameters": {"stop_sequences": [[220, 519], [999]]}}
    assert (await server.post("/generate", body))[0] == 400  # 999 is no token
    body["parameters"]["stop_sequences"] = [[220, 519]]
    _, reply = await server.post("/generate", body)
    assert (reply["generated_text"], reply["finish_reason"]) == (["the answer"], "stop")
    body["parameters"]["stop_sequences"] = [[519]]
    assert (await server.post("/generate", body))[1]["generated_text"] == ["the answer"]


async def test_end_tokens_are_printed_on_request(server: Any) -> None:
    body = {"inputs": "x", "parameters": {"print_eos_token": True}}
    _, reply = await server.post("/generate", body)
    assert reply["generated_text"] == ["the answer to the question <|endoftext|>"]
    body["parameters"]["add_spaces_between_special_tokens"] = False
    _, reply = await server.post("/generate", body)
    assert reply["generated_text"] == ["the answer to the question<|endoftext|>"]


async def test_special_tokens_are_skipped_on_request(server: Any, text_ids: IDS) -> None:
    server.engine.output_ids = text_ids("a<|system|></think>b")
    parameters: dict[str, Any] = {"add_spaces_between_special_tokens": False}
    body = {"inputs": "x", "parameters": parameters}
    assert (await server.post("/generate", body))[1]["generated_text"] == ["a<|system|></think>b"]
    parameters["skip_special_tokens"] = True
    assert (await server.post("/generate", body))[1]["generated_text"] == ["a</think>b"]


async def test_prompt_logprobs(start: Any) -> None:
    server = await start(enable_prompt_logprobs=True)
    body = {"inputs": [275, 220, 519], "parameters": {"prompt_logprobs": 2, "max_new_tokens": 1}}
    _, reply = await server.post("/generate", body)
    assert reply["prompt_token_ids"] == [275, 220, 519]
    assert reply["prompt_logprobs"][0] is None
    assert len(reply["prompt_logprobs"]) == 3
    assert reply["prompt_logprobs"][2]["519"] == {
        "logprob": -0.5,
        "rank": 1,
        "decoded_token": "answer",
    }
    assert len(reply["prompt_logprobs"][2]) == 2
    events = await server.events("/generate_stream", body)
    assert events[-1]["prompt_logprobs"] == reply["prompt_logprobs"]
    assert events[-1]["prompt_token_ids"] == [275, 220, 519]


async def test_the_root_route_is_either(server: Any) -> None:
    _, whole = await server.post("/", SHORT)
    assert whole["generated_text"] == ["the "]
    data = await server.stream("/", {**SHORT, "stream": True})
    assert data == await server.stream("/generate_stream", SHORT)
    assert (await server.post("/", {**SHORT, "stream": False}))[1]["prompt_tokens"] == 3


async def test_prompts_as_text_and_as_ids_are_the_same(server: Any, text_ids: IDS) -> None:
    await server.post("/generate", {"inputs": "<|user|>What is AI?"})
    await server.post("/generate", {"inputs": text_ids("<|user|>What is AI?")})
    first, second = server.engine.submits
    assert first.prompt_ids == second.prompt_ids == [531, *text_ids("What is AI?")]


async def test_cache_switch_reaches_the_engine(server: Any) -> None:
    await server.post("/generate", {"inputs": "x", "parameters": {"disable_prompt_cache": True}})
    await server.post("/generate", {"inputs": "x", "parameters": None})
    assert [s.use_prefix_cache for s in server.engine.submits] == [False, True]


@pytest.mark.parametrize("length", [511, 512, 513])
async def test_a_prompt_must_leave_room_for_one_token(server: Any, length: int) -> None:
    for path in ("/generate", "/generate_stream"):
        status, reply = await server.post(path, {"inputs": [1] * length})
        assert status == (200 if length == 511 else 400)
        if status == 400:
            assert reply["error"]["param"] == "inputs"
            assert f"{length} tokens" in reply["message"]
            assert "512" in reply["message"]
    if length == 511:
        assert server.engine.submits[0].sampling.max_new_tokens == 1


BAD: list[tuple[Any, str]] = [
    ({}, "inputs"),
    ({"inputs": ""}, "inputs"),
    ({"inputs": []}, "inputs"),
    ({"inputs": [1, 584]}, "inputs"),
    ({"inputs": [-1]}, "inputs"),
    ({"inputs": [2**63]}, "inputs"),
    ({"inputs": "x" * 5000}, "inputs"),
    (
        {"inputs": "x", "parameters": {"stop_sequences": ["x"] * 10_000}},
        "parameters.stop_sequences",
    ),
    ({"inputs": "x", "parameters": {"guided_json": "{"}}, "parameters.guided_json"),
    ({"inputs": "x", "parameters": {"n": 2, "best_of": 1}}, "parameters.n"),
    ({"inputs": "x", "parameters": {"temperature": -1}}, "parameters.temperature"),
    ({"inputs": "x", "multimodal_params": {"images": [1]}}, "multimodal_params"),
]


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/"])
async def test_bad_input_is_a_400_that_names_the_field_and_the_next_request_works(
    server: Any, path: str
) -> None:
    for body, field in BAD:
        status, reply = await server.post(path, body)
        assert status == 400, body
        error = reply["error"]
        assert error["param"] == field
        assert (error["type"], error["code"] in (400, "context_length_exceeded")) == (
            "BadRequestError",
            True,
        )
        assert reply["message"] == error["message"]
        assert field in error["message"]
    assert server.engine.submits == []
    assert (await server.post(path, {"inputs": "x"}))[0] == 200


async def test_streams_have_one_sample(server: Any) -> None:
    body = {"inputs": "x", "parameters": {"best_of": 2}}
    status, reply = await server.post("/generate_stream", body)
    assert (status, reply["error"]["param"]) == (400, "parameters.best_of")
    assert server.engine.submits == []
