"""Greedy tokens are those of transformers, whatever the scheduler does: chunk sizes, batches,
prefix cache, preemption, tensor parallelism.

`pytest tests/e2e/test_exactness.py --parity-prompts 20 -s -m ""` prints the whole table.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import Engine
from glimmer.deploy.demo.checkpoint import make_checkpoint
from glimmer.shared.model_spec import load_model_spec
from glimmer.shared.sampling import SamplingParams
from glimmer.workers.model.glm4_moe_lite import compute_logits
from server import running_server
from transformers import Glm4MoeLiteForCausalLM
from transformers.utils import logging

VARIANTS: dict[str, dict[str, Any]] = {
    "4 heads, 8 experts top 2": {"num_hidden_layers": 2},
    "20 heads, 12 experts top 3, ranks 48/32": {
        "num_attention_heads": 20,
        "num_key_value_heads": 20,
        "n_routed_experts": 12,
        "num_experts_per_tok": 3,
        "q_lora_rank": 48,
        "kv_lora_rank": 32,
        "num_hidden_layers": 3,
    },
    "8 heads, 16 experts in groups, 2 shared": {
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "v_head_dim": 16,
        "num_hidden_layers": 3,
    },
}
# transformers 5.20 or so renames the argument of `greedy`; both names must do.
pytestmark = pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")
FIRST, SECOND, THIRD = VARIANTS
# Chunk sizes have nothing to do with shapes: each size meets one variant, whole prompts meet all.
CHUNKS = [(FIRST, 1), (SECOND, 7), (THIRD, 64), *((variant, 2048) for variant in VARIANTS)]
OUTPUT = 12
GREEDY = SamplingParams(max_new_tokens=OUTPUT)


@dataclass
class Case:
    """A checkpoint, prompts, and the tokens that transformers answers."""

    path: Path
    model: Any
    num_token_ids: int
    prompts: list[list[int]]
    expected: list[list[int]]


@pytest.fixture(scope="module")
def case_of(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Callable[[str], Case]:
    """Name of a variant -> its Case, made once."""
    count = pytestconfig.getoption("--parity-prompts")
    made: dict[str, Case] = {}

    def make(variant: str) -> Case:
        if variant not in made:
            path = tmp_path_factory.mktemp("parity")
            seed = list(VARIANTS).index(variant)
            make_checkpoint(path, seed, **VARIANTS[variant])
            torch.set_num_threads(1)
            logging.disable_progress_bar()
            logging.set_verbosity_error()
            model = Glm4MoeLiteForCausalLM.from_pretrained(
                path, dtype=torch.float32, attn_implementation="eager"
            ).eval()
            limit = load_model_spec(path).num_token_ids
            prompts = random_prompts(count, seed, limit)
            expected = [greedy(model, prompt, limit) for prompt in prompts]
            made[variant] = Case(path, model, limit, prompts, expected)
        return made[variant]

    return make


def random_prompts(count: int, seed: int, num_token_ids: int) -> list[list[int]]:
    """Lengths from 1 to 300; every third begins like an earlier one."""
    rng = random.Random(seed)
    lengths = [1, 300, 64, 65, 130, 2][:count]
    lengths += [rng.randrange(1, 300) for _ in range(count - len(lengths))]
    prompts: list[list[int]] = []
    for number, length in enumerate(lengths):
        head = prompts[number // 2][: length - 1] if number % 3 == 2 else []
        prompts.append(head + [rng.randrange(num_token_ids) for _ in range(length - len(head))])
    return prompts


@torch.no_grad()
def greedy(
    model: Any, prompt: list[int], num_token_ids: int, num_output: int = OUTPUT
) -> list[int]:
    """The plain loop: one token at a time with transformers' own cache. Rows of the head that
    have no token are left out, as the sampler does."""
    ids, cache, output = torch.tensor([prompt]), None, []
    for _ in range(num_output):
        reply = model(ids, past_key_values=cache, use_cache=True)
        cache = reply.past_key_values
        ids = reply.logits[:, -1:, :num_token_ids].argmax(-1)
        output.append(int(ids))
    return output


@pytest.mark.parametrize(("variant", "chunk"), CHUNKS)
def test_tokens_do_not_depend_on_chunks_batches_or_the_prefix_cache(
    case_of: Callable[[str], Case], tmp_path: Path, variant: str, chunk: int
) -> None:
    case = case_of(variant)
    engine = Engine(case.path, tmp_path, chunked_prefill_size=chunk)
    assert engine.generate(case.prompts, GREEDY, use_prefix_cache=False) == case.expected
    assert engine.cached_tokens == 0
    assert engine.generate(case.prompts, GREEDY) == case.expected, "filling the cache"
    assert engine.generate(case.prompts, GREEDY) == case.expected, "from the cache"
    assert engine.cached_tokens > 64
    alone = [engine.generate([p], GREEDY, use_prefix_cache=False)[0] for p in case.prompts]
    assert alone == case.expected
    print(f"\n{variant:40} chunk {chunk:4}: {len(alone)} prompts equal, batched, cached and alone")


@pytest.mark.parametrize(
    ("variant", "cache"), [(FIRST, True), (FIRST, False), (SECOND, True), (THIRD, False)]
)
def test_tokens_do_not_depend_on_preemption(
    case_of: Callable[[str], Case], tmp_path: Path, variant: str, cache: bool
) -> None:
    case = case_of(variant)
    prompts = [prompt[:60] for prompt in case.prompts]
    expected = [greedy(case.model, prompt, case.num_token_ids, 40) for prompt in prompts]
    room = 4 * sum(-(-len(prompt) // 4) + 1 for prompt in prompts) + 8  # not for all outputs
    engine = Engine(
        case.path, tmp_path, chunked_prefill_size=64, page_size=4, max_total_token_num=room
    )
    short = SamplingParams(max_new_tokens=1)  # teaches the scheduler to expect short outputs
    engine.generate([[1]] * 150, short, use_prefix_cache=False)
    long = SamplingParams(max_new_tokens=40)
    assert engine.generate(prompts, long, use_prefix_cache=cache) == expected
    assert engine.preemptions > 0, "nothing was preempted: the test is too easy"
    print(f"\n{variant:40} cache {cache}: equal after {engine.preemptions} preemptions")


@pytest.mark.parametrize("tp", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_tokens_do_not_depend_on_the_number_of_ranks(
    case_of: Callable[[str], Case], tmp_path: Path, tp: int
) -> None:
    case = case_of(SECOND)
    flags = ("--tp", str(tp), "--data_type", "float32", "--max_total_token_num", "16384")
    with running_server(case.path, tmp_path, *flags) as server:
        for prompt, expected in zip(case.prompts, case.expected, strict=True):
            found = server.token_ids(prompt, max_new_tokens=OUTPUT, ignore_eos=True)
            assert found == expected
    print(f"\n{SECOND:40} TP {tp}: {len(case.prompts)} prompts equal")


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(
    case_of: Callable[[str], Case],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variant: str,
) -> None:
    case = case_of(variant)
    engine = Engine(case.path, tmp_path, chunked_prefill_size=64)
    seen: list[torch.Tensor] = []

    def watched(*args: Any) -> Any:
        logits = compute_logits(*args)
        assert logits is not None
        seen.append(logits.clone())
        return logits

    monkeypatch.setattr("glimmer.workers.forward.compute_logits", watched)
    largest = highest = 0.0
    for prompt, expected in zip(case.prompts, case.expected, strict=True):
        seen.clear()
        engine.generate([prompt], GREEDY)
        found = torch.cat(seen)[:OUTPUT]
        with torch.no_grad():
            wanted = case.model(torch.tensor([prompt + expected])).logits[0]
        wanted = wanted[len(prompt) - 1 : len(prompt) - 1 + OUTPUT]
        largest = max(largest, (found - wanted).abs().max().item())
        highest = max(highest, wanted.abs().max().item())
    print(f"\n{variant:40} largest logit difference {largest:.1e}, logits up to {highest:.1f}")
    assert largest < 2e-4
