"""Request bodies as typed structs, in which every number, text and list is bounded.

`body.py` decodes them. Every rejection is a RequestError that names the field and its limit.
Unknown fields are ignored, as other servers of these interfaces do. `api/field_docs.py` has the
meaning of every field.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta, Struct

from ...shared.errors import RequestError
from .surrogates import decode_json

_BIG = 2**31 - 1
_MAX_SEED = 2**63 - 1
_MANY_NODES = 20_000

Count = Annotated[int, Meta(ge=1, le=_BIG)]
Budget = Annotated[int, Meta(ge=-1, le=_BIG)]
TokenId = Annotated[int, Meta(ge=0, le=_BIG)]
Samples = Annotated[int, Meta(ge=1, le=8)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
LightllmPenalty = Annotated[float, Meta(ge=0, le=100)]
StopString = Annotated[str, Meta(max_length=1024)]
StopIds = Annotated[list[TokenId], Meta(min_length=1, max_length=256)]
StopStrings = StopString | Annotated[list[StopString], Meta(max_length=64)]
StopSequences = StopString | Annotated[list[StopString | StopIds], Meta(max_length=64)]
Ids = Annotated[list[TokenId], Meta(max_length=1024)]
AllowedIds = Annotated[list[TokenId], Meta(max_length=1 << 20)]  # a whole vocabulary
Bias = Annotated[dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=1024)]
Temperature = Annotated[float, Meta(ge=0, le=2)]  # OpenAI's range; LightLLM's is wider
TopP = Annotated[float, Meta(ge=0, le=1)]  # 0: only the most likely token
Messages = Annotated[list[dict[str, Any]], Meta(max_length=10_000)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Tools = Annotated[list[dict[str, Any]], Meta(max_length=1024)]
Json = dict[str, Any]

FORMAT_FIELDS = (
    *("guided_json", "guided_grammar", "guided_regex", "guided_choice"),
    *("structured_outputs", "regular_constraint", "response_format"),
    *("json_schema", "regex", "ebnf"),
)
UNSUPPORTED: dict[str, Any] = {  # fields of other servers -> the value that changes nothing
    "bad_words": [],
    "include_stop_str_in_output": False,
    "logits_processors": [],
    "truncate_prompt_tokens": None,
    "use_beam_search": False,
}
UNSUPPORTED_CHAT: dict[str, Any] = {
    "add_generation_prompt": True,
    "continue_final_message": False,
    "echo": False,
    "prompt_logprobs": None,
    "chat_template": None,
}


class SamplingFields(Struct):
    """Sampling parameters that all interfaces spell the same way. None: not set."""

    prefix: ClassVar[str] = ""  # of the fields' names in errors
    samples_by_default: ClassVar[bool] = True  # else greedy unless do_sample is set

    do_sample: bool | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: TopP | None = None
    top_k: Annotated[int, Meta(ge=-1, le=_BIG)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    n: Samples | None = None
    best_of: Samples | None = None
    seed: Annotated[int, Meta(ge=-1, le=_MAX_SEED)] | None = None
    ignore_eos: bool | None = None
    logit_bias: Bias | None = None
    allowed_token_ids: AllowedIds | None = None
    skip_special_tokens: bool | None = None
    guided_json: Any = None
    guided_grammar: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    structured_outputs: Any = None
    regular_constraint: Any = None
    json_schema: Any = None
    regex: Any = None
    ebnf: Any = None

    @property
    def has_format(self) -> bool:
        """Whether a field constrains the text of the reply."""
        return any(getattr(self, name, None) is not None for name in FORMAT_FIELDS)


class GenerateParameters(SamplingFields):
    """`parameters` of /generate."""

    prefix = "parameters."
    samples_by_default = False

    presence_penalty: LightllmPenalty | None = None
    frequency_penalty: LightllmPenalty | None = None
    repetition_penalty: Annotated[float, Meta(ge=1, le=100)] | None = None
    input_penalty: bool | None = None
    exponential_decay_length_penalty: (
        tuple[Annotated[int, Meta(ge=0, le=_BIG)], Annotated[float, Meta(ge=1, le=100)]] | None
    ) = None
    max_new_tokens: Count | None = None
    min_new_tokens: Count | None = None
    stop_sequences: StopSequences | None = None
    add_special_tokens: bool | None = None
    add_spaces_between_special_tokens: bool | None = None
    print_eos_token: bool | None = None
    prompt_logprobs: Annotated[int, Meta(ge=-1, le=1024)] | None = None
    disable_prompt_cache: bool | None = None
    return_details: bool | None = None


class GenerateBody(Struct):
    """Body of /generate, /generate_stream and /."""

    inputs: str | list[int]
    parameters: GenerateParameters | None = None
    multimodal_params: dict[str, Any] | None = None
    stream: bool | None = None  # only on /


class StreamOptions(Struct):
    """`stream_options` of the OpenAI routes."""

    include_usage: bool | None = None


class OpenAiBody(SamplingFields):
    """Fields that chat and completion requests share, with the extensions of other servers."""

    model: Annotated[str, Meta(max_length=256)] = "default"
    temperature: Temperature | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    max_tokens: Count | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=_BIG)] | None = None
    stop: StopStrings | None = None
    stop_token_ids: Ids | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None
    cache_salt: Annotated[str, Meta(max_length=256)] | None = None
    user: str | None = None  # this and the next have no effect here
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    bad_words: Any = None  # this and the next are not supported: `UNSUPPORTED`
    include_stop_str_in_output: Any = None
    logits_processors: Any = None
    truncate_prompt_tokens: Any = None
    use_beam_search: Any = None


class Thinking(Struct):
    """`thinking` of the chat route, as the model's own service spells it."""

    type: Literal["enabled", "disabled", "adaptive", "auto", "between_tools"]
    clear_thinking: bool | None = None  # of earlier turns; default: --preserve_thinking
    budget_tokens: Budget | None = None  # as `thinking_token_budget`


class ChatBody(OpenAiBody, kw_only=True):
    """Body of /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: Tools | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    function_call: Any = None
    functions: Any = None
    chat_template: Any = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Effort | None = None
    enable_thinking: bool | None = None
    thinking: Thinking | None = None
    thinking_token_budget: Budget | None = None  # of reasoning; -1: no limit
    separate_reasoning: bool | None = None
    include_reasoning: bool | None = None
    reasoning_field: Literal["both", "reasoning_content", "reasoning"] | None = None
    stream_reasoning: bool | None = None  # no effect: reasoning always streams
    role_settings: Any = None  # passed to the template
    character_settings: Any = None
    modalities: list[Literal["text"]] | None = None
    audio: None = None
    add_generation_prompt: Any = None  # this and the next: `UNSUPPORTED_CHAT`
    continue_final_message: Any = None
    echo: Any = None
    prompt_logprobs: Any = None


class CompletionBody(OpenAiBody, kw_only=True):
    """Body of /v1/completions."""

    prompt: str | list[str | int | list[int]]
    max_tokens: Annotated[int, Meta(ge=0, le=_BIG)] | None = None  # 0 with echo
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    prompt_logprobs: Annotated[int, Meta(ge=-1, le=1024)] | None = None
    echo: bool | None = None
    suffix: str | None = None


class TokensBody(Struct):
    """Body of /tokens."""

    text: str
    parameters: GenerateParameters | None = None


def wrong(field: str, problem: str) -> RequestError:
    """The error for a mistake of the client in `field`."""
    return RequestError(f"{field}: {problem}", field=field)


def decode_text(text: str, where: str, kind: Any) -> Any:
    """JSON inside a string of the body, as `kind`. Raises RequestError naming `where`."""
    if len(text) > _MANY_NODES and sum(map(text.count, "{[:")) > _MANY_NODES:
        raise wrong(where, f"has more than {_MANY_NODES} objects, arrays and members")
    try:
        return decode_json(text.encode(), kind)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise wrong(where, f"is not JSON: {error}") from None


@contextlib.contextmanager
def spelled(names: Mapping[str, str]) -> Iterator[None]:
    """Renames the field in a RequestError for a route whose fields have other names. `names` maps
    patterns of our names to the client's; the first match counts."""
    try:
        yield
    except RequestError as error:
        for ours, theirs in names.items():
            if error.field and (match := re.match(rf"{ours}(?=$|[.\[])", error.field)):
                spelling = match.expand(theirs)
                error.args = (str(error).replace(match[0], spelling, 1),)
                error.field = spelling + error.field[match.end() :]
                break
        raise
