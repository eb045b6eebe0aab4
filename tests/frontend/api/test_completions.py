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


async def test_echo_and_logprobs_tell_about_the_prompt_too(server: Any) -> None:
    body = {"prompt": "the answer é", "echo": True, "logprobs": 1, "max_tokens": 2}
    _, reply = await server.post(PATH, body)
    [choice] = reply["choices"]
    assert choice["text"] == "the answer éthe "
    logprobs = choice["logprobs"]
    prompt = server.engine.submits[0].prompt_ids
    assert server.engine.submits[0].sampling.num_prompt_logprobs == 1
    assert len(logprobs["tokens"]) == len(prompt) + 2
    assert logprobs["tokens"][:3] == ["the", " ", "answer"]
    assert logprobs["tokens"][-2:] == ["the", " "]
    assert logprobs["text_offset"][:3] == [0, 3, 4]
    assert logprobs["text_offset"][-2:] == [12, 15]
    assert logprobs["token_logprobs"] == [None] + [-0.5] * (len(prompt) + 1)
    assert logprobs["top_logprobs"][:2] == [None, {" ": -0.5}]
    events = await server.events(PATH, {**body, "stream": True})
    chunks = [event["choices"][0] for event in events[:-1]]
    assert "".join(chunk["text"] for chunk in chunks) == choice["text"]
    for key in logprobs:
        streamed = [item for chunk in chunks for item in (chunk["logprobs"] or {key: []})[key]]
        assert streamed == logprobs[key], key


@pytest.mark.parametrize("stream", [False, True])
async def test_a_text_is_scored_without_adding_to_it(server: Any, stream: bool) -> None:
    body = {"prompt": [275, 220], "echo": True, "logprobs": 0, "max_tokens": 0}
    if stream:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        *events, last, _ = await server.events(PATH, {**body, **options})
        choices = [event["choices"][0] for event in events]
        assert [choice["finish_reason"] for choice in choices] == [None, "length"]
        usage = last["usage"]
    else:
        _, reply = await server.post(PATH, body)
        choices, usage = reply["choices"], reply["usage"]
        assert choices[0]["finish_reason"] == "length"
    assert "".join(choice["text"] for choice in choices) == "the "
    assert choices[0]["logprobs"]["token_logprobs"] == [None, -0.5]
    assert (usage["completion_tokens"], usage["prompt_tokens"]) == (0, 2)


async def test_prompt_logprobs_of_each_prompt(server: Any) -> None:
    body = {"prompt": [[275, 220], [519]], "prompt_logprobs": 2, "max_tokens": 1}
    _, reply = await server.post(PATH, body)
    first, second = reply["choices"]
    assert first["prompt_token_ids"] == [275, 220]
    assert first["prompt_logprobs"][0] is None
    entry = first["prompt_logprobs"][1]["220"]
    assert entry == {"logprob": -0.5, "rank": 1, "decoded_token": " "}
    assert len(first["prompt_logprobs"][1]) == 2
    assert (second["prompt_token_ids"], second["prompt_logprobs"]) == ([519], [None])
    assert first["logprobs"] is None


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
    ({"prompt": ["a"] * 200, "n": 8}, "n"),
    ({"suffix": "x"}, "suffix"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"prompt_logprobs": 1025}, "prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"min_p": 1.5}, "min_p"),
    ({"stop": ["x"] * 1000}, "stop"),
    ({"best_of": 2}, "best_of"),
    ({"logprobs": 21}, "logprobs"),
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
