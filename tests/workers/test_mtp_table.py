"""Drafts change no token: prompts x draft lengths x modes x chunk sizes x prefix cache x preemption
x ranks, forced calls and JSON schemas among them, as one table.

`pytest tests/workers/test_mtp_table.py --mtp-prompts 200 --mtp-model DIR -s -m ""` is the whole of
it. The default is a few prompts and one case of each kind, on a checkpoint of noise whose draft
layer is often right.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine import SETTLED, Engine
from glimmer.deploy.demo.training.dialogues import dialogue
from glimmer.frontend.text.tokenizer import Tokenizer
from glimmer.scheduler.core import Scheduler
from glimmer.shared.config import ServeConfig
from glimmer.shared.messages import Ready, Submit
from glimmer.shared.model_spec import load_model_spec
from glimmer.shared.sampling import SamplingParams
from grammars import calls_grammar, schema_grammar
from models import make_guessable
from transformers import AutoTokenizer

LONGEST = 300  # tokens of a prompt: the last ones
MODES = ("eagle_with_att", "vanilla_with_att")
STEPS = (1, 2, 4, 7)
CHUNKS: dict[str, dict[str, Any]] = {
    f"chunks {chunk}, cache {cache}": {
        "chunked_prefill_size": chunk,
        "disable_dynamic_prompt_cache": cache == "off",
    }
    for chunk in (7, 64, 2048)
    for cache in ("on", "off")
}
SMALL = {"chunked_prefill_size": 64, "page_size": 4, "max_total_token_num": 1600}
CASES = {**CHUNKS, "preemption": {**SMALL, "batch_max_tokens": 1024, "max_req_total_len": 1024}}
FEW = list(zip(STEPS, MODES * 2, [*CASES][::2], strict=True))  # one of each
ALL = [(step, mode, case) for step in STEPS for mode in MODES for case in CASES]
SCHEMAS = (
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
        "required": ["name", "age"],
    },
    {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 3, "maxItems": 9},
)
TOOL = {
    "name": "get_weather",
    "parameters": {
        "properties": {"city": {"type": "string", "maxLength": 16}, "unit": {"enum": ["c", "f"]}},
        "required": ["city", "unit"],
    },
}


class Table:
    """The requests, and what they get without drafts."""

    def __init__(self, path: Path, count: int, directory: Path) -> None:
        self.path, self.directory = path, directory
        spec = load_model_spec(path)
        tags = Tokenizer(path, spec.vocab_size).vocabulary.added_ids
        formats = [None, calls_grammar(TOOL, tags), None, *map(schema_grammar, SCHEMAS)]
        tokenizer = AutoTokenizer.from_pretrained(path)
        self.submits = []
        for number in range(count):
            one = dialogue(f"drafts-{number // 2}", True)  # in pairs, for the prefix cache
            grammar = formats[number % len(formats)]
            text = tokenizer.apply_chat_template(
                one.messages[: one.first_reply],
                tools=one.tools or None,
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=one.thinking and grammar is None,
            )
            params: dict[str, Any] = {"max_new_tokens": 8 + number * 7 % 60}
            params["stop_token_ids"] = spec.eos_token_ids
            if number % 7 == 6:
                params |= {"frequency_penalty": 0.3, "min_new_tokens": 5}
            if number % 9 == 8:
                params |= {"temperature": 1.0, "top_p": 0.9, "seed": number}
            ids = tokenizer.encode(text, add_special_tokens=False)[-LONGEST:]
            self.submits.append(Submit(number, 0, ids, SamplingParams(**params), grammar=grammar))
        self.plain = self.engine().run(self.submits)

    def engine(self, **changes: Any) -> Engine:
        return Engine(self.path, self.directory, **{"max_req_total_len": 1024, **changes})


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Table:
    path = pytestconfig.getoption("--mtp-model")
    if path is None:
        path = tmp_path_factory.mktemp("guessable")
        make_guessable(path)
    count = pytestconfig.getoption("--mtp-prompts")
    return Table(Path(path), count, tmp_path_factory.mktemp("table"))


def tell(table: Table, engine: Engine, what: str) -> None:
    steps, outputs = engine.core.heartbeat(), sum(map(len, table.plain.values()))
    per_step = 1 + sum(steps.drafts_accepted) / max(1, steps.decoded_rows)
    print(
        f"\n{what:55} {len(table.plain)} prompts, {outputs} tokens equal, {per_step:.2f} per step, "
        f"{engine.preemptions} preemptions, {engine.cached_tokens} from the cache",
        end="",
    )


@pytest.mark.parametrize(
    ("step", "mode", "case"),
    [pytest.param(*one, marks=[] if one in FEW else pytest.mark.slow) for one in ALL],
)
def test_tokens_are_those_without_drafts(table: Table, step: int, mode: str, case: str) -> None:
    engine = table.engine(mtp_mode=mode, mtp_step=step, mtp_fixed_step=True, **CASES[case])
    if "cache on" not in case:
        engine.hints = table.plain  # in the other cases the draft layer's own guesses
    assert engine.run(table.submits) == table.plain
    assert engine.accepted_tokens > 0
    assert engine.preemptions or case != "preemption" or len(table.plain) < 20
    tell(table, engine, f"{mode}, {step} drafts, {case}")


class GroupEngine(Engine):
    """The same with worker processes."""

    def __init__(self, group: Any, config: ServeConfig) -> None:
        self.runner = group
        self.core = Scheduler(config)
        self.core.step(0, group.wait_for(Ready, config.tp))
        self._reset()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("step", [pytest.param(s, marks=pytest.mark.slow) for s in (1, 2, 7)] + [4])
def test_ranks_in_processes_give_the_same(
    table: Table, start_group: Callable[..., Any], step: int, mode: str
) -> None:
    values = {**SETTLED, "max_req_total_len": 1024, "tp": 2, "chunked_prefill_size": 64}
    values |= {"mtp_mode": mode, "mtp_step": step, "mtp_fixed_step": True}
    group = start_group(table.path, **values)
    engine = GroupEngine(group, ServeConfig(model_dir=str(table.path), **values))
    assert engine.run(table.submits) == table.plain
    assert engine.accepted_tokens > 0
    tell(table, engine, f"{mode}, {step} drafts, TP 2")
