"""Log-probabilities of prompts line up with their tokens, chunk by chunk."""

import pytest
import torch
from glimmer.shared.messages import PrefillChunk, RowAdmit, StepPlan
from glimmer.shared.sampling import SamplingParams
from glimmer.workers.rows import RowTable
from glimmer.workers.sampling.logprobs import prompt_logprobs
from torch import Tensor

IDS = [3, 1, 4, 1, 5, 9, 2, 6]


def table(num_top: int, cached: int = 0) -> RowTable:
    made = RowTable(2, 4, 8, 12, "cpu")
    params = SamplingParams(max_new_tokens=1, num_prompt_logprobs=num_top)
    made.apply(StepPlan(0, 0, [], [RowAdmit(0, params, [0], cached, 0, [])], [], [], []))
    return made


def logits_of(states: Tensor) -> Tensor:
    return states  # a state is its own logits


STATES = torch.randn(len(IDS), 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("cut", [1, 3, 7])
def test_chunks_make_no_difference(cut: int) -> None:
    whole = prompt_logprobs(table(2), PrefillChunk(0, 0, IDS, True), STATES, logits_of)
    assert [entry.token_id for entry in whole] == IDS[1:]
    expected = STATES.log_softmax(-1)
    assert whole[0].logprob == pytest.approx(expected[0, IDS[1]].item())
    rows = table(2)
    first = PrefillChunk(0, 0, IDS[:cut], False, IDS[cut])
    found = prompt_logprobs(rows, first, STATES[:cut], logits_of)
    found += prompt_logprobs(rows, PrefillChunk(0, cut, IDS[cut:], True), STATES[cut:], logits_of)
    assert found == whole


def test_after_a_cached_prefix_the_first_is_unknown() -> None:
    found = prompt_logprobs(table(0, 8), PrefillChunk(0, 8, [7, 8], True), STATES[:2], logits_of)
    assert [(entry.token_id, entry.rank > 0) for entry in found] == [(7, False), (8, True)]


def test_rows_that_did_not_ask_get_none() -> None:
    assert prompt_logprobs(table(-1), PrefillChunk(0, 0, IDS, True), STATES, logits_of) == []
