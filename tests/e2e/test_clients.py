"""What users try first: the guide's two requests and the official client."""

import json
from typing import Any

import openai
import pytest
from server import RunningServer


@pytest.fixture(scope="module")
def client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def test_the_guides_generate_request(server: RunningServer) -> None:
    body = {
        "inputs": "What is AI?",
        "parameters": {"max_new_tokens": 100, "frequency_penalty": 1},
    }
    status, reply = server.post("/generate", body)
    assert status == 200
    assert isinstance(reply["generated_text"], list)
    assert 1 <= reply["count_output_tokens"] <= 100
    assert reply["finish_reason"] in ("stop", "length")


def test_the_guides_chat_request(server: RunningServer) -> None:
    body = {
        "model": "GLM-4.7-Flash",
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 100,
    }
    status, reply = server.post("/v1/chat/completions", body)
    assert status == 200
    assert reply["model"] == "GLM-4.7-Flash"
    assert reply["choices"][0]["message"]["role"] == "assistant"
    usage = reply["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_chat_streams_what_it_answers_whole(client: openai.OpenAI) -> None:
    question: dict[str, Any] = {
        "model": "m",
        "messages": [{"role": "user", "content": "Hello there"}],
        "max_tokens": 40,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**question)
    chunks = list(
        client.chat.completions.create(
            **question, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage or (
        chunks[-1].usage is not None
        and whole.usage is not None
        and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    )
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert reasons[-1] == whole.choices[0].finish_reason
    assert not any(reasons[:-1])


def test_seeds_repeat_and_samples_differ(client: openai.OpenAI) -> None:
    def texts(seed: int) -> list[str | None]:
        reply = client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "x"}], max_tokens=24, n=3, seed=seed
        )
        return [choice.message.content for choice in reply.choices]

    first = texts(7)
    assert first == texts(7)
    assert len(set(first)) == 3
    assert first != texts(8)


def test_logprobs_are_those_of_the_chosen_tokens(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="m",
        messages=[{"role": "user", "content": "x"}],
        max_tokens=5,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content
    for item in logprobs.content:
        assert item.logprob == item.top_logprobs[0].logprob <= 0
        assert len(item.top_logprobs) == 3


def test_bad_input_is_a_400_and_the_next_request_works(
    client: openai.OpenAI, server: RunningServer
) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "x"}], temperature=-1
        )
    too_long = [1] * 20_000
    status, reply = server.post("/generate", {"inputs": too_long, "parameters": {}})
    assert status == 400
    assert "20000" in json.dumps(reply)
    assert server.generate("x", max_new_tokens=1)["count_output_tokens"] == 1


def test_models_lists_the_served_one(client: openai.OpenAI, server: RunningServer) -> None:
    models = list(client.models.list())
    assert [model.id for model in models] == ["tiny"]
    assert json.loads(server.get("/get_model_name")[1])["model_name"] == "tiny"
