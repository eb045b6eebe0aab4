"""Request bodies, completed and checked: structs of `wire/schema.py` -> `GenerationSpec`.

Defaults come from `generation_config.json` and the flags. Known fields that are not supported are
refused, never ignored. Formulas and meanings: `shared/sampling.py`.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from ...shared.config import ServeConfig
from ...shared.errors import ModelError, NotFoundError
from ...shared.messages import Grammar
from ...shared.model_spec import ModelSpec
from ...shared.sampling import SamplingParams
from ..grammar.source import OutputFormat
from ..text.detokenize import TextOptions
from ..wire.schema import (
    UNSUPPORTED,
    GenerateBody,
    GenerateParameters,
    OpenAiBody,
    wrong,
)
from .output_format import output_format

MAX_SEQUENCES = 1024  # prompts x n of one request
_SEED_MASK = 2**63 - 1
_BAN = -100.0  # a logit bias that rules a token out
_MIN_TOP_P = 1e-9  # keeps only the most likely token


class GenerationDefaults(Struct):
    """Sampling defaults from `generation_config.json`; None where it has none."""

    do_sample: bool | None = None
    temperature: Annotated[float, Meta(ge=0)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01)] | None = None


@dataclass(frozen=True)
class ModelFacts:
    """Settings and model properties that parameters are checked against and completed from."""

    config: ServeConfig
    spec: ModelSpec
    defaults: GenerationDefaults
    added_ids: dict[str, int]  # text -> id of the tokenizer's added tokens

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """End tokens: `--eos_id`, else the checkpoint's."""
        return self.spec.eos_token_ids if self.config.eos_id is None else self.config.eos_id

    def check_model(self, name: str) -> None:
        """With `--check_model_name`: raises NotFoundError for another model's name. "default" is
        the name in requests that name no model."""
        if self.config.check_model_name and name not in (self.config.model_name, "default"):
            raise NotFoundError(f"model {name!r:.200} is not served here", "model")


@dataclass(frozen=True)
class GenerationSpec:
    """How to generate, the same for all prompts of a request. `sampling.max_new_tokens` is as
    requested: `for_sequence` makes it fit."""

    sampling: SamplingParams
    text: TextOptions
    n: int
    use_prefix_cache: bool = True
    cache_salt: str = ""
    output_format: OutputFormat | None = None
    grammar: Grammar | None = None  # compiled from `output_format` and the rules for tools

    def with_thinking_budget(self, num_tokens: int, end_id: int) -> "GenerationSpec":
        """The same, but reasoning ends by the token `end_id` after at most `num_tokens`."""
        sampling = msgspec.structs.replace(
            self.sampling, thinking_budget=num_tokens, thinking_end_id=end_id
        )
        return replace(self, sampling=sampling)

    def for_sequence(self, sample: int, num_prompt_tokens: int, max_total: int) -> SamplingParams:
        """Parameters of sample number `sample` of a prompt. `max_total` limits prompt + output in
        tokens; the prompt must leave room for one."""
        max_new = min(self.sampling.max_new_tokens, max_total - num_prompt_tokens)
        return msgspec.structs.replace(
            self.sampling,
            max_new_tokens=max_new,
            min_new_tokens=min(self.sampling.min_new_tokens, max_new),
            seed=(self.sampling.seed + sample * 0x9E3779B97F4A7C15) & _SEED_MASK,
        )


def load_defaults(model_dir: Path) -> GenerationDefaults:
    """Read `generation_config.json`, which may be absent. Raises ModelError if it is broken."""
    path = model_dir / "generation_config.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=GenerationDefaults)
    except FileNotFoundError:
        return GenerationDefaults()
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{path}: {error}") from error


def generate_spec(body: GenerateBody, facts: ModelFacts) -> GenerationSpec:
    """A LightLLM body: greedy unless do_sample. Raises RequestError."""
    if any((body.multimodal_params or {}).values()):
        raise wrong("multimodal_params", "this model reads text only")
    fields = body.parameters or GenerateParameters()
    form = output_format(fields, "parameters.") if fields.has_format else None
    if fields.best_of is not None and fields.n is not None and fields.n != fields.best_of:
        raise wrong("parameters.n", f"must equal best_of ({fields.best_of})")
    num_prompt_logprobs = _first(fields.prompt_logprobs, -1)
    if num_prompt_logprobs >= 0 and not facts.config.enable_prompt_logprobs:
        raise wrong("parameters.prompt_logprobs", "needs --enable_prompt_logprobs")
    max_new = fields.max_new_tokens or 65535
    min_new = fields.min_new_tokens or 1  # both count the end token
    if min_new > max_new:
        raise wrong("parameters.min_new_tokens", f"exceeds max_new_tokens ({max_new})")
    strings, id_sequences = _split_stops(fields.stop_sequences, facts)
    decay_start, decay_factor = fields.exponential_decay_length_penalty or (1, 1.0)
    sampling = msgspec.structs.replace(
        _sampling_params(fields, facts, (max_new, min_new - 1), (), form is not None),
        input_penalty=_first(fields.input_penalty, facts.config.input_penalty),
        decay_start=decay_start,
        decay_factor=decay_factor,
        num_logprobs=0,
        num_prompt_logprobs=num_prompt_logprobs,
    )
    text = TextOptions(
        stop_token_ids=frozenset(sampling.stop_token_ids),
        hidden_ids=frozenset() if fields.print_eos_token else frozenset(facts.eos_ids),
        stop_strings=strings,
        stop_id_sequences=id_sequences,
        keep_stop=True,
        min_new_tokens=min_new,
        skip_special_tokens=_first(fields.skip_special_tokens, facts.config.skip_special_tokens),
        add_spaces_between_special_tokens=_first(fields.add_spaces_between_special_tokens, True),
        record_tokens=True,
    )
    use_cache = not fields.disable_prompt_cache
    n = fields.n or fields.best_of or 1
    return GenerationSpec(sampling, text, n, use_cache, output_format=form)


def openai_spec(
    body: OpenAiBody, facts: ModelFacts, max_tokens: int | None, num_logprobs: int
) -> GenerationSpec:
    """A chat or completion body: sampled by default. `num_logprobs` as in SamplingParams.
    Raises RequestError."""
    facts.check_model(body.model)
    refuse(body, UNSUPPORTED)
    form = output_format(body) if body.has_format else None
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise wrong("best_of", f"must equal n ({body.n or 1})")
    max_new, min_new = max_tokens or 65536, body.min_tokens or 0
    if min_new > max_new:
        raise wrong("min_tokens", f"exceeds max_tokens ({max_new})")
    strings = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    strings = tuple(string for string in strings if string)
    stop_ids = [
        *(body.stop_token_ids or ()),
        *(facts.added_ids[string] for string in strings if string in facts.added_ids),
    ]
    sampling = _sampling_params(body, facts, (max_new, min_new), stop_ids, form is not None)
    sampling = msgspec.structs.replace(sampling, num_logprobs=num_logprobs)
    stops = frozenset(sampling.stop_token_ids)
    text = TextOptions(
        stop_token_ids=stops,
        hidden_ids=stops,
        stop_strings=strings,
        min_new_tokens=min_new,
        skip_special_tokens=_first(body.skip_special_tokens, True),
        record_tokens=num_logprobs >= 0,
    )
    salt = body.cache_salt or ""
    return GenerationSpec(sampling, text, body.n or 1, cache_salt=salt, output_format=form)


def refuse(body: Struct, unsupported: dict[str, Any]) -> None:
    """Raises RequestError for fields that are not supported, unless their value changes nothing."""
    for name, harmless in unsupported.items():
        if getattr(body, name) not in (None, harmless):
            raise wrong(name, "not supported")


def parse_prompts(prompt: str | list[str | int | list[int]]) -> list[Any]:
    """`prompt` of /v1/completions as a list of texts or of id lists. Raises RequestError."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise wrong("prompt", "must not be empty")
    if all(isinstance(p, int) for p in prompt):
        return [prompt]
    if len(prompt) > MAX_SEQUENCES:
        raise wrong("prompt", f"{len(prompt)} prompts, at most {MAX_SEQUENCES}")
    if all(isinstance(p, str) for p in prompt) or all(isinstance(p, list) for p in prompt):
        return prompt
    raise wrong("prompt", "mixes texts and token ids")


def _sampling_params(
    fields: GenerateParameters | OpenAiBody,
    facts: ModelFacts,
    limits: tuple[int, int],
    stop_ids: Sequence[int],
    has_format: bool,
) -> SamplingParams:
    """The sampling parameters that all interfaces share, defaults filled in. Checks that at least
    one token can be sampled. `limits`: most and fewest new tokens. `ignore_eos` has no effect
    together with an output format: the format decides when the text ends."""
    defaults = facts.defaults
    do_sample = _first(fields.do_sample, defaults.do_sample, fields.samples_by_default)
    temperature = _first(fields.temperature, defaults.temperature, 1.0) if do_sample else 0.0
    greedy = temperature < 1e-5
    top_k = _first(fields.top_k, defaults.top_k, 0)
    seed = fields.seed if fields.seed is not None and fields.seed >= 0 else random.getrandbits(62)
    eos_ids = () if fields.ignore_eos and not has_format else facts.eos_ids
    sampling = SamplingParams(
        max_new_tokens=limits[0],
        min_new_tokens=limits[1],
        temperature=0.0 if greedy else temperature,
        top_k=0 if greedy or top_k <= 0 else min(top_k, facts.spec.vocab_size),
        top_p=1.0 if greedy else max(_MIN_TOP_P, _first(fields.top_p, defaults.top_p, 1.0)),
        min_p=0.0 if greedy else fields.min_p or 0.0,
        presence_penalty=fields.presence_penalty or 0.0,
        frequency_penalty=fields.frequency_penalty or 0.0,
        repetition_penalty=_first(fields.repetition_penalty, defaults.repetition_penalty, 1.0),
        input_penalty=facts.config.input_penalty,
        seed=seed,
        stop_token_ids=tuple(dict.fromkeys((*eos_ids, *stop_ids))),
        logit_bias=tuple((fields.logit_bias or {}).items()),
        allowed_token_ids=tuple(dict.fromkeys(fields.allowed_token_ids or ())),
    )
    if stop_ids or fields.logit_bias or fields.allowed_token_ids:
        _check_ids(sampling, facts.spec, fields.prefix)
    return sampling


def _check_ids(sampling: SamplingParams, spec: ModelSpec, prefix: str) -> None:
    bias_ids = [token_id for token_id, _ in sampling.logit_bias]
    allowed = sampling.allowed_token_ids
    _check_range(sampling.stop_token_ids, spec.vocab_size, prefix + "stop_token_ids")
    _check_range(bias_ids, spec.vocab_size, prefix + "logit_bias")
    _check_range(allowed, spec.num_token_ids, prefix + "allowed_token_ids")
    banned = {token_id for token_id, bias in sampling.logit_bias if bias <= _BAN}
    if sampling.min_new_tokens:
        banned.update(sampling.stop_token_ids)
    choices = allowed or range(spec.num_token_ids)
    if len(banned) >= len(choices) and banned.issuperset(choices):
        names = ("allowed_token_ids", "logit_bias", "stop_token_ids")
        field = next(name for name in names if getattr(sampling, name))
        raise wrong(prefix + field, "leaves no token to choose from")


def _check_range(ids: Sequence[int], limit: int, field: str) -> None:
    if ids and max(ids) >= limit:
        raise wrong(field, f"token id {max(ids)} is outside 0..{limit - 1}")


def _split_stops(
    stops: Any, facts: ModelFacts
) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """Stop strings and stop id sequences. A string that is an added token is also matched by its
    id, because special tokens may have no text."""
    stops = [stops] if isinstance(stops, str) else stops or []
    strings = tuple(s for s in stops if isinstance(s, str) and s)
    sequences = [tuple(s) for s in stops if isinstance(s, list)]
    for ids in sequences:
        _check_range(ids, facts.spec.vocab_size, "parameters.stop_sequences")
    sequences += [(facts.added_ids[s],) for s in strings if s in facts.added_ids]
    return strings, tuple(sequences)


def _first(*values: Any) -> Any:
    """The first value that is not None."""
    return next((value for value in values if value is not None), None)
