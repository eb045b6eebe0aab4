"""What a body asks for becomes final sampling parameters."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from glimmer.frontend.engine.params import (
    GenerationDefaults,
    GenerationSpec,
    ModelFacts,
    generate_spec,
    load_defaults,
    openai_spec,
    parse_prompts,
)
from glimmer.frontend.text.tokenizer import Tokenizer
from glimmer.frontend.wire.schema import GenerateBody, GenerateParameters, OpenAiBody
from glimmer.shared.config import ServeConfig
from glimmer.shared.errors import ModelError, NotFoundError, RequestError
from glimmer.shared.model_spec import load_model_spec

EOS = (524, 531, 533)
OUTSIDE = [584, 2**31 - 1]


@pytest.fixture(scope="module")
def facts(tiny_model: Path, tokenizer: Tokenizer) -> ModelFacts:
    spec = load_model_spec(tiny_model)
    assert spec.eos_token_ids == EOS
    config = ServeConfig(enable_prompt_logprobs=True)
    return ModelFacts(config, spec, GenerationDefaults(), tokenizer.vocabulary.added_ids)


def lightllm(facts: ModelFacts, **parameters: Any) -> GenerationSpec:
    return generate_spec(GenerateBody("x", GenerateParameters(**parameters)), facts)


def openai(
    facts: ModelFacts, max_tokens: int | None = None, logprobs: int = -1, **fields: Any
) -> GenerationSpec:
    return openai_spec(OpenAiBody(**fields), facts, max_tokens, logprobs)


def test_generate_is_greedy_by_default_whatever_else_is_sent(facts: ModelFacts) -> None:
    sampling = lightllm(facts, temperature=0.7, top_p=0.5, top_k=9, min_p=0.1).sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0, 1, 0, 0)
    assert lightllm(facts, do_sample=True, temperature=1e-6).sampling.temperature == 0
    assert generate_spec(GenerateBody("x"), facts).sampling.temperature == 0


def test_generate_defaults(facts: ModelFacts) -> None:
    spec = generate_spec(GenerateBody("x"), facts)
    assert spec.sampling.max_new_tokens == 65535
    assert spec.sampling.min_new_tokens == 0
    assert spec.sampling.stop_token_ids == EOS
    assert spec.sampling.num_logprobs == 0
    assert spec.text.keep_stop
    assert spec.text.add_spaces_between_special_tokens
    assert not spec.text.skip_special_tokens
    assert spec.text.hidden_ids == frozenset(EOS)
    assert (spec.n, spec.use_prefix_cache) == (1, True)


def test_generate_takes_every_parameter(facts: ModelFacts) -> None:
    spec = lightllm(
        facts,
        do_sample=True,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        presence_penalty=0.1,
        frequency_penalty=1,
        repetition_penalty=1.2,
        input_penalty=True,
        exponential_decay_length_penalty=(5, 1.5),
        max_new_tokens=100,
        min_new_tokens=4,
        ignore_eos=True,
        stop_sequences=["END", "<think>", [7, 8], [9]],
        best_of=3,
        n=3,
        seed=42,
        skip_special_tokens=True,
        add_spaces_between_special_tokens=False,
        print_eos_token=True,
        logit_bias={5: -100.0, 6: 2.5},
        allowed_token_ids=[1, 2, 2],
        prompt_logprobs=2,
        disable_prompt_cache=True,
    )
    s = spec.sampling
    assert (s.temperature, s.top_p, s.top_k, s.min_p) == (0.5, 0.9, 40, 0.05)
    assert (s.presence_penalty, s.frequency_penalty, s.repetition_penalty) == (0.1, 1, 1.2)
    assert (s.input_penalty, s.decay_start, s.decay_factor) == (True, 5, 1.5)
    assert (s.max_new_tokens, s.min_new_tokens, s.seed) == (100, 3, 42)
    assert s.stop_token_ids == ()
    assert s.logit_bias == ((5, -100.0), (6, 2.5))
    assert s.allowed_token_ids == (1, 2)
    assert s.num_prompt_logprobs == 2
    assert spec.text.stop_strings == ("END", "<think>")
    assert spec.text.stop_id_sequences == ((7, 8), (9,), (facts.added_ids["<think>"],))
    assert spec.text.hidden_ids == frozenset()
    assert spec.text.skip_special_tokens
    assert not spec.text.add_spaces_between_special_tokens
    assert (spec.n, spec.use_prefix_cache) == (3, False)


def test_openai_samples_by_default(facts: ModelFacts) -> None:
    spec = openai(facts)
    assert (spec.sampling.temperature, spec.sampling.top_p, spec.sampling.top_k) == (1, 1, 0)
    assert spec.sampling.min_new_tokens == 0
    assert spec.text.skip_special_tokens
    assert not spec.text.keep_stop
    assert openai(facts, temperature=0).sampling.temperature == 0
    assert openai(facts, do_sample=False).sampling.temperature == 0


def test_openai_takes_every_parameter(facts: ModelFacts) -> None:
    spec = openai(
        facts,
        7,
        5,
        temperature=0.5,
        top_p=0.9,
        top_k=-1,
        min_p=0.2,
        presence_penalty=-2,
        frequency_penalty=2,
        repetition_penalty=0.9,
        min_tokens=3,
        n=2,
        best_of=2,
        stop=["a", "", "<|user|>", "<think>"],
        stop_token_ids=[9],
        logit_bias={1: 5.0},
        seed=1,
        cache_salt="s",
    )
    s = spec.sampling
    assert (s.presence_penalty, s.frequency_penalty, s.repetition_penalty) == (-2, 2, 0.9)
    assert (s.temperature, s.top_p, s.top_k, s.min_p) == (0.5, 0.9, 0, 0.2)
    assert (s.max_new_tokens, s.min_new_tokens, s.num_logprobs) == (7, 3, 5)
    think = facts.added_ids["<think>"]
    assert s.stop_token_ids == (*EOS, 9, think)
    assert spec.text.hidden_ids == {*EOS, 9, think}
    assert spec.text.stop_strings == ("a", "<|user|>", "<think>")
    assert (spec.n, spec.cache_salt) == (2, "s")


def test_generation_config_fills_what_is_absent(facts: ModelFacts) -> None:
    defaults = GenerationDefaults(True, 0.6, 0.8, 20, 1.1)
    own = replace(facts, defaults=defaults)
    for spec in (openai(own), lightllm(own)):
        s = spec.sampling
        assert (s.temperature, s.top_p, s.top_k, s.repetition_penalty) == (0.6, 0.8, 20, 1.1)
    assert openai(own, temperature=1.0, top_p=1.0).sampling.temperature == 1.0


def test_eos_can_be_configured(facts: ModelFacts) -> None:
    own = replace(facts, config=ServeConfig(eos_id=(3,)))
    assert openai(own).sampling.stop_token_ids == (3,)
    assert openai(replace(facts, config=ServeConfig(eos_id=()))).sampling.stop_token_ids == ()


def test_output_is_clipped_to_what_fits(facts: ModelFacts) -> None:
    spec = lightllm(facts, max_new_tokens=50, min_new_tokens=40)
    assert spec.for_sequence(0, 100, 512).max_new_tokens == 50
    clipped = spec.for_sequence(0, 500, 512)
    assert (clipped.max_new_tokens, clipped.min_new_tokens) == (12, 12)
    assert spec.for_sequence(0, 511, 512).max_new_tokens == 1


def test_min_new_tokens_counts_the_end_token_and_min_tokens_does_not(facts: ModelFacts) -> None:
    assert lightllm(facts, min_new_tokens=5).sampling.min_new_tokens == 4
    assert lightllm(facts, min_new_tokens=1, allowed_token_ids=list(EOS)).sampling is not None
    assert openai(facts, min_tokens=5).sampling.min_new_tokens == 5


def test_end_tokens_are_ordinary_when_they_are_ignored(facts: ModelFacts) -> None:
    assert openai(facts).text.hidden_ids == frozenset(EOS)
    assert openai(facts, ignore_eos=True).text.hidden_ids == frozenset()
    spec = openai(facts, ignore_eos=True, stop_token_ids=[9])
    assert spec.text.hidden_ids == frozenset({9})


def test_the_refusal_names_what_left_no_token(facts: ModelFacts) -> None:
    every = list(range(facts.spec.num_token_ids))
    for field, wishes in (
        ("stop_token_ids", {"stop_token_ids": every, "min_tokens": 1}),
        ("logit_bias", {"logit_bias": dict.fromkeys(every, -100.0)}),
        ("allowed_token_ids", {"allowed_token_ids": [5], "logit_bias": {5: -100.0}}),
    ):
        with pytest.raises(RequestError) as caught:
            openai(facts, **wishes)
        assert caught.value.field == field


def test_each_sample_has_its_own_seed_and_the_first_has_the_given_one(facts: ModelFacts) -> None:
    spec = openai(facts, seed=2**63 - 1, n=8)
    seeds = [spec.for_sequence(i, 1, 99).seed for i in range(8)]
    assert seeds[0] == 2**63 - 1
    assert len(set(seeds)) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert len({openai(facts).sampling.seed for _ in range(20)}) == 20
    assert openai(facts, seed=-1).sampling.seed >= 0


@pytest.mark.parametrize("wrong", OUTSIDE)
def test_ids_outside_the_vocabulary_are_refused(facts: ModelFacts, wrong: int) -> None:
    for fields in ({"logit_bias": {wrong: 1.0}}, {"allowed_token_ids": [wrong]}):
        name = next(iter(fields))
        refuses(f"parameters.{name}", lambda f=fields: lightllm(facts, **f))
        refuses(name, lambda f=fields: openai(facts, **f))
    refuses("parameters.stop_sequences", lambda: lightllm(facts, stop_sequences=[[1, wrong]]))
    refuses("stop_token_ids", lambda: openai(facts, stop_token_ids=[wrong]))
    refuses("allowed_token_ids", lambda: openai(facts, allowed_token_ids=[560]))  # a padding row


def test_requests_that_leave_no_token_are_refused(facts: ModelFacts) -> None:
    refuses(
        "allowed_token_ids",
        lambda: openai(facts, allowed_token_ids=[5, 6], logit_bias={5: -100.0, 6: -200.0}),
    )
    refuses(
        "parameters.allowed_token_ids",
        lambda: lightllm(facts, allowed_token_ids=[EOS[0]], min_new_tokens=2),
    )
    refuses("logit_bias", lambda: openai(facts, logit_bias=dict.fromkeys(range(560), -100.0)))
    assert openai(facts, logit_bias=dict.fromkeys(range(559), -100.0))


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"n": 2, "best_of": 3}, "best_of"),
        ({"best_of": 2}, "best_of"),
        ({"min_tokens": 99}, "min_tokens"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex"),
    ],
)
def test_openai_refuses_by_name(facts: ModelFacts, fields: dict[str, Any], field: str) -> None:
    refuses(field, lambda: openai(facts, 50, **fields))


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"n": 2, "best_of": 1}, "parameters.n"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "parameters.min_new_tokens"),
        ({"guided_json": "{"}, "parameters.guided_json"),
        ({"guided_json": "{}", "guided_grammar": "json"}, "parameters.guided_grammar"),
        ({"guided_json": "{}", "allowed_token_ids": [1]}, "parameters.allowed_token_ids"),
    ],
)
def test_generate_refuses_by_name(facts: ModelFacts, fields: dict[str, Any], field: str) -> None:
    refuses(field, lambda: lightllm(facts, **fields))


def test_an_output_format_is_kept_and_needs_end_tokens(facts: ModelFacts) -> None:
    assert lightllm(facts, regular_constraint="", guided_json="").output_format is None
    spec = lightllm(facts, regular_constraint="a+", ignore_eos=True)
    assert spec.output_format is not None
    assert spec.output_format.field == "parameters.regular_constraint"
    assert spec.sampling.stop_token_ids == EOS
    spec = openai(facts, guided_choice=["a"], ignore_eos=True)
    assert spec.output_format is not None
    assert spec.sampling.stop_token_ids == EOS


def test_pictures_and_unasked_for_prompt_logprobs_are_refused(facts: ModelFacts) -> None:
    body = GenerateBody("x", multimodal_params={"images": [{"type": "url"}]})
    refuses("multimodal_params", lambda: generate_spec(body, facts))
    assert generate_spec(GenerateBody("x", multimodal_params={"images": []}), facts)
    own = replace(facts, config=ServeConfig())
    refuses("parameters.prompt_logprobs", lambda: lightllm(own, prompt_logprobs=0))
    assert lightllm(own, prompt_logprobs=-1).sampling.num_prompt_logprobs == -1


def test_prompts_of_all_four_kinds() -> None:
    assert parse_prompts("a") == ["a"]
    assert parse_prompts(["a", "b"]) == ["a", "b"]
    assert parse_prompts([1, 2]) == [[1, 2]]
    assert parse_prompts([[1], [2, 3]]) == [[1], [2, 3]]
    for wrong in ([], ["a", 1], ["a", [1]], ["a"] * 1025):
        refuses("prompt", lambda w=wrong: parse_prompts(w))


def test_generation_config_is_checked(tmp_path: Path) -> None:
    assert load_defaults(tmp_path) == GenerationDefaults()
    file = tmp_path / "generation_config.json"
    file.write_text('{"temperature": 0.7, "eos_token_id": [1], "top_k": null}')
    assert load_defaults(tmp_path) == GenerationDefaults(temperature=0.7)
    for broken in ("{", '{"top_p": "x"}', "[]"):
        file.write_text(broken)
        with pytest.raises(ModelError, match="generation_config"):
            load_defaults(tmp_path)


def refuses(field: str, make: Any) -> None:
    with pytest.raises(RequestError) as failure:
        make()
    assert failure.value.field == field


def test_a_top_p_of_0_leaves_one_token(facts: ModelFacts) -> None:
    sampling = openai_spec(OpenAiBody(top_p=0), facts, None, -1).sampling
    assert 0 < sampling.top_p < 1e-6
    assert sampling.temperature == 1


def test_names_of_other_models_are_refused_when_asked(facts: ModelFacts) -> None:
    openai_spec(OpenAiBody(model="anything"), facts, None, -1)
    strict = replace(facts, config=ServeConfig(model_name="mine", check_model_name=True))
    openai_spec(OpenAiBody(model="mine"), strict, None, -1)
    openai_spec(OpenAiBody(), strict, None, -1)
    with pytest.raises(NotFoundError) as caught:
        openai_spec(OpenAiBody(model="anything"), strict, None, -1)
    assert (caught.value.status, caught.value.field) == (404, "model")
