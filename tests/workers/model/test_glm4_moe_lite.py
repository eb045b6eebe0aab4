"""One forward pass over many rows is many passes over one. Agreement with transformers itself is
held by `tests/workers/test_parity.py`."""

from pathlib import Path

import torch
from glimmer.shared.messages import PrefillChunk, RowAdmit, StepPlan
from glimmer.shared.model_spec import load_model_spec
from glimmer.shared.sampling import SamplingParams
from glimmer.workers.inputs import build_batch
from glimmer.workers.model.glm4_moe_lite import compute_logits, hidden_states
from glimmer.workers.parallel import Ranks
from glimmer.workers.rows import RowTable
from glimmer.workers.weights.weights import random_weights

PROMPTS = [[5, 6, 7, 8, 9], [1], [2, 3, 4, 2, 3, 4, 2, 3, 4]]


def states_of(path: Path, rows: list[int]) -> list[torch.Tensor]:
    """Of the prompts with these numbers, run in one step."""
    spec = load_model_spec(path)
    model = random_weights(spec, Ranks(), torch.float32, "cpu")
    table = RowTable(3, 4, 4, spec.vocab_size, "cpu")
    params = SamplingParams(max_new_tokens=1)
    admits = [RowAdmit(r, params, [r, 3 + r, 6 + r, 9 + r], 0, 0, []) for r in rows]
    table.apply(StepPlan(0, 0, [], admits, [], [], []))
    chunks = [PrefillChunk(row, 0, PROMPTS[row], sample=True) for row in rows]
    batch = build_batch(StepPlan(0, 0, [], [], [], chunks, []), table)
    inputs = batch.inputs
    assert batch.packed is not None
    kv = torch.zeros(12, spec.num_layers, 4, spec.latent_dim)
    hidden, _ = hidden_states(model, inputs, kv)
    written = {int(s) for s in (kv[:, -1].abs().sum(-1).flatten() > 0).nonzero()}
    assert written == set(inputs.slots.tolist())
    logits = compute_logits(model, hidden)
    assert logits is not None
    assert (logits.shape, logits.dtype) == ((len(hidden), spec.vocab_size), torch.float32)
    return [hidden[span] for span in batch.packed.chunk_spans]


def test_rows_do_not_see_each_other(tiny_model: Path) -> None:
    together = states_of(tiny_model, [0, 1, 2])
    for row in range(3):
        alone = states_of(tiny_model, [row])[0]
        torch.testing.assert_close(together[row], alone, atol=2e-5, rtol=1e-4)
    swapped = states_of(tiny_model, [2, 0])
    torch.testing.assert_close(swapped[0], together[2], atol=2e-5, rtol=1e-4)
