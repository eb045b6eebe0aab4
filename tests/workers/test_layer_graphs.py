"""Passes cut at each attention, and padded, equal whole passes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from glimmer.shared.messages import PrefillChunk, RowAdmit, StepPlan
from glimmer.shared.model_spec import load_model_spec
from glimmer.shared.sampling import SamplingParams
from glimmer.workers.inputs import build_batch
from glimmer.workers.layer_graphs import LayerGraphs
from glimmer.workers.model.glm4_moe_lite import hidden_states
from glimmer.workers.parallel import Ranks
from glimmer.workers.rows import RowTable
from glimmer.workers.weights.weights import random_weights

PARAMS = SamplingParams(max_new_tokens=9)
SCRATCH = 11  # page


def test_sizes_end_with_the_largest(tiny_model: Path) -> None:
    spec = load_model_spec(tiny_model)
    model = random_weights(spec, Ranks(), torch.float32, "cpu")
    for largest in (1, 16, 100, 2048, 9000):
        graphs = LayerGraphs(model, largest)
        assert graphs.sizes == sorted(set(graphs.sizes))
        assert graphs.sizes[-1] == min(largest, 2048)
        assert not graphs.covers(1), "nothing is captured"


@torch.inference_mode()
def test_a_pass_in_pieces_is_a_pass(tiny_model: Path) -> None:
    """Fresh prompts, a chunk after a prefix, and a decode row, in several steps."""
    spec = load_model_spec(tiny_model)
    model = random_weights(spec, Ranks(), torch.float32, "cpu")
    graphs = LayerGraphs(model, 40)
    found: list[Any] = []
    for in_pieces in (False, True):
        table = RowTable(4, 3, 16, spec.vocab_size, "cpu")
        kv = torch.zeros(SCRATCH + 1, spec.num_layers, 16, spec.latent_dim)
        admits = [RowAdmit(row, PARAMS, [row * 2, row * 2 + 1], 0, 0, []) for row in range(3)]
        plans = [
            StepPlan(0, 0, [], admits, [], [PrefillChunk(0, 0, [5, 6, 7], sample=True)], []),
            StepPlan(
                0, 1, [], [], [],
                [PrefillChunk(1, 0, list(range(9)), sample=False), PrefillChunk(2, 0, [1], True)],
                [0],
            ),
            StepPlan(0, 2, [], [], [], [PrefillChunk(1, 9, list(range(20)), sample=True)], [0, 2]),
        ]  # fmt: skip
        for plan in plans:
            table.apply(plan)
            batch = build_batch(plan, table)
            inputs = batch.inputs
            if in_pieces:
                states = graphs.run(inputs, kv, SCRATCH * 16)
            else:
                states = hidden_states(model, inputs, kv)
            found.append([part.clone() for part in states])
            assert batch.packed is not None
            table.advance(batch.packed.rows, batch.packed.added)
            table.count(plan)
        found.append([kv[:SCRATCH].clone()])
    for whole, pieces in zip(found[: len(found) // 2], found[len(found) // 2 :], strict=True):
        for a, b in zip(whole, pieces, strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.gpu
def test_graphs_of_pieces_choose_the_same_tokens(
    tiny_model: Path, make_runner: Any, driver_of: Any, gap_where_parted: Any
) -> None:
    """Kernels differ with the number of tokens, which is padded: tokens may part where the two
    best were as close as rounding."""
    greedy = SamplingParams(max_new_tokens=12, num_logprobs=2)
    texts = [[(5 * i + n) % 150 for i in range(n)] for n in (1, 17, 100, 300, 3, 900, 40)]
    runner = make_runner(tiny_model, device="cuda", data_type="bfloat16", graph_max_batch_size=8)
    assert runner.forward.layer_graphs.covers(2048)
    for chunk_size in (None, 64):
        runs = [driver_of(runner.run, 64).generate(texts, greedy, chunk_size)]
        with runner.forward.without_graphs(decode=False):
            runs.append(driver_of(runner.run, 64).generate(texts, greedy, chunk_size))
        for a, b in zip(*runs, strict=True):
            gap = gap_where_parted(a, b)
            assert gap is None or gap < 0.3
