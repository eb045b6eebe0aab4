"""The completions route: four kinds of prompts, echo, logprobs, batches, streams."""

import re
from typing import Any

import pytest

PATH = "/v1/completions"


async def test_one_prompt(server: Any) -> None:
    status, reply = await server.post(PATH, {"model": "m", "prompt": "the", "max_tokens": 3})
    assert status == 200
    assert re.fullmatch(r"cmpl-[0-9a-f]{8}", reply.pop("id"))
    del reply["created"]
    assert reply == {
        "object": "text_completion",
        "model": "m",
        "choices": [
            {"text": "the answer", "index": 0, "logprobs": None, "finish_reason": "length"}
        ],
        "usage": {
            "prompt_tokens": 1,
            "completion_tokens": 3,
            "total_tokens": 4,
            "prompt_tokens_details": {"cached_tokens": 1, "audio_tokens": 0},
        },
    }


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("the answer", [[275, 220, 519]]),
        (["the", "answer"], [[275], [519]]),
        ([275, 220, 519], [[275, 220, 519]]),
        ([[275], [519, 220]], [[275], [519, 220]]),
        ("<|user|>", [[531]]),
    ],
)
async def test_prompts_of_all_kinds(server: Any, prompt: Any, ids: list[list[int]]) -> None:
    _, reply = await server.post(PATH, {"prompt": prompt, "max_tokens": 1})
    assert [submit.prompt_ids for submit in server.engine.submits] == ids
    assert [choice["index"] for choice in reply["choices"]] == list(range(len(ids)))
    assert reply["id"].startswith("cmpl-batch-" if len(ids) > 1 else "cmpl-")
    assert reply["usage"]["prompt_tokens"] == sum(map(len, ids))


async def test_batches_times_n_are_in_prompt_order(server: Any) -> None:
    body = {"prompt": ["the", "answer"], "n": 2, "max_tokens": 1, "echo": True}
    _, reply = await server.post(PATH, body)
    texts = [choice["text"] for choice in reply["choices"]]
    assert texts == ["thethe", "thethe", "answerthe", "answerthe"]
    prompts = [submit.prompt_ids for submit in server.engine.submits]
    assert prompts == [[275], [275], [519], [519]]


async def test_the_stream_byte_for_byte(server: Any) -> None:
    server.engine.tokens_per_message = 100
    body = {"model": "m", "prompt": [275], "stream": True, "max_tokens": 3, "echo": True}
    data = (await server.stream(PATH, body)).decode()
    reply_id, created = re.findall(r'"id":"(\S+?)","object":"\S+?","created":(\d+)', data)[0]

    def chunk(text: str, reason: str) -> str:
        return (
            f'data: {{"id":"{reply_id}","object":"text_completion","created":{created},'
            f'"model":"m","choices":[{{"index":0,"text":"{text}","logprobs":null,'
            f'"finish_reason":{reason}}}]}}\n\n'
        )

    expected = chunk("the", "null") + chunk("the answer", "null") + chunk("", '"length"')
    assert data == expected + "data: [DONE]\n\n"


async def test_logprobs(server: Any) -> None:
    _, reply = await server.post(PATH, {"prompt": "x", "logprobs": 2, "stop": "question"})
    logprobs = reply["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["the", " ", "answer", " ", "to", " ", "the", " "]
    assert logprobs["text_offset"] == [0, 3, 4, 10, 11, 13, 14, 17]
    assert logprobs["token_logprobs"] == [-0.5] * 8
    assert logprobs["top_logprobs"][0] == {"the": -0.5, '"': -2.0}
    assert reply["choices"][0]["text"] == "the answer to the "
    events = await server.events(PATH, {"prompt": "x", "logprobs": 0, "stream": True})
    streamed = [e["choices"][0]["logprobs"] for e in events[:-1]]
    offsets = [n for entry in streamed if entry for n in entry["text_offset"]]
    assert offsets == [0, 3, 4, 10, 11, 13, 14, 17, 18]


async def test_the_usage_chunk_comes_before_done(server: Any) -> None:
    options = {"include_usage": True}
    body = {"prompt": "x", "stream": True, "stream_options": options, "max_tokens": 2}
    events = await server.events(PATH, body)
    assert events[-1] == "[DONE]"
    assert (events[-2]["choices"], events[-2]["usage"]["completion_tokens"]) == ([], 2)
    assert all(event["usage"] is None for event in events[:-2])


BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["a", [1]]}, "prompt"),
    ({"prompt": [584]}, "prompt"),
    ({"prompt": [[1], [-1]]}, "prompt"),
    ({"prompt": [1] * 512}, "prompt"),
    ({"prompt": ["a", "b"], "stream": True}, "prompt"),
    ({"prompt": ["a"] * 200, "n": 8}, "n"),
    ({"suffix": "x"}, "suffix"),
    ({"echo": True, "logprobs": 1}, "echo"),
    ({"best_of": 2}, "best_of"),
    ({"logprobs": 21}, "logprobs"),
    ({"guided_regex": "x"}, "guided_regex"),
]


async def test_bad_input_is_a_400_that_names_the_field_and_the_next_request_works(
    server: Any,
) -> None:
    for fields, field in BAD:
        status, reply = await server.post(PATH, {"prompt": "x", **fields})
        assert status == 400, fields
        assert reply["error"]["param"] == field, reply
    assert server.engine.submits == []
    assert (await server.post(PATH, {"prompt": "x"}))[0] == 200
