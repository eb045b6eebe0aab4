"""What users try first: the guide's two requests and the official client."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from server import RunningServer, wait_until


@pytest.fixture(scope="module")
def client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def claude(server: RunningServer) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


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
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


def test_completions_take_prompts_of_all_kinds_and_score_them(client: openai.OpenAI) -> None:
    ids: list[int] = [5, 6, 7]
    batch = client.completions.create(model="m", prompt=["a", "b"], n=2, max_tokens=3, seed=1)
    assert [choice.index for choice in batch.choices] == [0, 1, 2, 3]
    assert batch.usage is not None
    assert batch.usage.completion_tokens <= 12
    scored = client.completions.create(
        model="m", prompt=ids, echo=True, logprobs=2, max_tokens=0, temperature=0
    )
    logprobs = scored.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in logprobs.token_logprobs[1:])
    longer = client.completions.create(
        model="m", prompt=ids[:2], echo=True, logprobs=2, max_tokens=1, temperature=0
    )
    assert longer.choices[0].logprobs is not None
    known = longer.choices[0].logprobs.token_logprobs
    assert known is not None
    assert known[1] == pytest.approx(logprobs.token_logprobs[1], abs=1e-4)


def test_a_completion_streams_what_it_answers_whole(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": "m", "prompt": "Once", "max_tokens": 20, "temperature": 0}
    whole = client.completions.create(**ask, echo=True, logprobs=1)
    chunks = list(client.completions.create(**ask, echo=True, logprobs=1, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == whole.choices[0].text
    parts = [c.choices[0].logprobs for c in chunks if c.choices[0].logprobs]
    assert whole.choices[0].logprobs is not None
    for key in ("tokens", "token_logprobs", "text_offset"):
        streamed = [item for part in parts for item in getattr(part, key)]
        assert streamed == getattr(whole.choices[0].logprobs, key), key


def test_messages_stream_what_they_answer_whole(claude: anthropic.Anthropic) -> None:
    ask: dict[str, Any] = {
        "model": "m",
        "max_tokens": 30,
        "messages": [{"role": "user", "content": "Hello there"}],
        "extra_body": {"temperature": 0},
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "tools": [{"name": "f", "input_schema": {"type": "object"}}],
    }
    whole = claude.messages.create(**ask)
    with claude.messages.stream(**ask) as stream:
        streamed = stream.get_final_message()

    def blocks(message: Any) -> list[Any]:
        return [block.model_dump(exclude={"parsed_output"}) for block in message.content]

    assert blocks(streamed) == blocks(whole)
    assert streamed.stop_reason == whole.stop_reason
    assert streamed.usage.output_tokens == whole.usage.output_tokens > 0
    prompt = {key: ask[key] for key in ("model", "messages", "thinking", "tools")}
    counted = claude.messages.count_tokens(**prompt).input_tokens
    usage = whole.usage
    assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)
    with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\]\.content\[0\]"):
        claude.messages.create(
            **{**ask, "messages": [{"role": "user", "content": [{"type": "image"}]}]}
        )


def test_responses_stream_what_they_answer_whole(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {
        "model": "m",
        "input": [{"role": "user", "content": "Hello there"}],
        "instructions": "be brief",
        "max_output_tokens": 30,
        "temperature": 0,
    }
    whole = client.responses.create(**ask)
    events = list(client.responses.create(**ask, stream=True))
    last = events[-1]
    assert last.type in ("response.completed", "response.incomplete")
    assert last.response.output_text == whole.output_text
    assert last.response.status == whole.status
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert whole.usage is not None
    assert last.response.usage is not None
    assert last.response.usage.output_tokens == whole.usage.output_tokens
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(**ask, previous_response_id="resp_1")


def test_the_metrics_of_steps_are_real(server: RunningServer) -> None:
    server.generate([5, 6, 7], max_new_tokens=4, ignore_eos=True)
    before = server.metric("glimmer_generated_tokens_total")
    server.generate([5, 6, 7], max_new_tokens=4, ignore_eos=True)
    wait_until(
        lambda: server.metric("glimmer_generated_tokens_total") >= before + 4, 10, "a heartbeat"
    )
    kinds = [{"method": "prefill"}, {"method": "decode"}]
    name = "lightllm_batch_inference"
    counts = [server.metric(f"{name}_count_total", **kind) for kind in kinds]
    assert min(counts) >= 1
    assert sum(counts) == pytest.approx(server.metric("glimmer_steps_total"), abs=2)
    seconds = [server.metric(f"{name}_duration_bucket_sum", **kind) for kind in kinds]
    assert min(seconds) > 0
    assert server.metric("lightllm_batch_next_size_count") >= sum(counts)
