"""Steps with drafts on a tiny model: tokens of plain decoding, drafts of the reference."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from glimmer.deploy.demo.checkpoint import make_checkpoint
from glimmer.deploy.demo.training.acceptance import accepted
from glimmer.deploy.demo.training.model import from_checkpoint
from glimmer.kernels.sampling.speculative import kept
from glimmer.shared.config import ServeConfig
from glimmer.shared.messages import PrefillChunk, RowAdmit, StepPlan
from glimmer.shared.model_spec import load_model_spec
from glimmer.shared.sampling import SamplingParams
from glimmer.workers.inputs import StepInputs, build_inputs
from glimmer.workers.model.glm4_moe_lite import compute_logits, hidden_states
from glimmer.workers.mtp import (
    DraftLayer,
    Places,
    RowState,
    draft,
    finish_decode,
    join_inputs,
    settle,
    verify_inputs,
    verify_places,
)
from glimmer.workers.parallel import Ranks
from glimmer.workers.rows import RowTable
from glimmer.workers.sampling.sampler import sample
from glimmer.workers.weights.checkpoint import check_draft, check_weights
from glimmer.workers.weights.weights import load_weights
from safetensors.torch import load_file
from torch import Tensor

PAGE, PAGES, ROWS, STEP = 8, 12, 3, 4
PROMPTS = [[5, 9, 2, 7, 7, 31, 12], [40, 3], [8, 6, 4, 2, 90, 11, 63, 21, 22, 23, 24]]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("drafting")
    make_checkpoint(path, seed=3)
    return path


class Server:
    """Rows, as a runner would drive them; `normed` says which hidden states are fed."""

    def __init__(
        self,
        path: Path,
        normed: bool = True,
        chained: bool = False,
        wishes: Sequence[SamplingParams] = (SamplingParams(max_new_tokens=100, temperature=0),) * 3,
    ) -> None:
        config = ServeConfig(model_dir=str(path), mtp_mode="eagle_with_att", mtp_step=STEP)
        self.spec = load_model_spec(path)
        index, told = check_weights(path, self.spec), check_draft(config, self.spec)
        self.model = load_weights(
            index, self.spec, Ranks(), torch.float32, "cpu", 1, lambda *_: None, told
        )
        self.table = RowTable(ROWS, PAGES + 2, PAGE, self.spec.vocab_size, "cpu", ROWS * PAGES)
        layers = self.spec.num_layers + (STEP if chained else 1)
        self.kv = torch.zeros(ROWS * PAGES + 1, layers, PAGE, self.spec.latent_dim)
        self.normed = normed
        assert self.model.nextn is not None
        self.layer = DraftLayer(
            weights=self.model.nextn,
            first_kv_layer=self.spec.num_layers,
            num_kv_layers=STEP if chained else 1,
            is_chained=chained,
            feeds_normed=normed,
        )
        self.state = RowState(
            last_token=self.table.last_token,
            lengths=self.table.lengths,
            num_outputs=torch.zeros(ROWS + 1, dtype=torch.int64),
            drafts=torch.zeros(ROWS + 1, STEP, dtype=torch.int64),
            capacity=torch.full((ROWS + 1,), PAGES * PAGE),
            page_table=self.table.page_table,
            page_size=PAGE,
            scratch_slot=ROWS * PAGES * PAGE,
        )
        pages = [[row * PAGES + n for n in range(PAGES)] for row in range(ROWS)]
        admits = [RowAdmit(row, params, pages[row], 0, 0, []) for row, params in enumerate(wishes)]
        self.table.apply(StepPlan(0, 0, [], admits, [], [], []))
        self.outputs: list[list[int]] = [[] for _ in range(ROWS)]

    def forward(self, inputs: StepInputs, places: Places) -> tuple[Tensor, Tensor]:
        """(tokens at the sampling places, hidden states to feed)."""
        states = hidden_states(self.model, inputs, self.kv)
        logits = compute_logits(self.model, states[0][inputs.sampling_index])
        assert logits is not None
        rows, num_ids = places.owners.tolist(), self.spec.num_token_ids
        sampled = sample(logits, rows, self.table, num_ids, None, *places)
        return sampled.ids, states[0 if self.normed else 1]

    def count(self, places: Places, ids: Tensor) -> None:
        """For penalties; ids < 0 are nothing."""
        rows = places.owners.tolist()
        self.table.rules.penalties.record(rows, places.owners, ids.flatten())

    def chunk_inputs(self, chunks: list[PrefillChunk]) -> tuple[StepInputs, Tensor]:
        """For a step's chunks; and the known token after each of theirs, -1 where one is
        sampled."""
        inputs = build_inputs(StepPlan(0, 0, [], [], [], chunks, []), self.table)
        next_ids = torch.empty_like(inputs.token_ids)
        for chunk, span in zip(chunks, inputs.chunk_spans, strict=True):
            next_ids[span] = torch.tensor([*chunk.token_ids[1:], chunk.next_id])
        self.table.advance([c.row for c in chunks], [len(c.token_ids) for c in chunks])
        return inputs, next_ids

    def prefill(self, chunks: list[PrefillChunk], num_drafts: int = STEP) -> None:
        inputs, next_ids = self.chunk_inputs(chunks)
        rows = torch.tensor([c.row for c in chunks if c.sample], dtype=torch.int64)
        places = verify_places(self.state, rows, 0)
        ids, hidden = self.forward(inputs, places)
        self.count(places, ids)
        self.state.last_token[rows] = ids
        self.state.num_outputs[rows] += 1
        last = inputs.sampling_index
        next_ids[last] = ids
        for row, token in zip(rows.tolist(), ids.tolist(), strict=True):
            self.outputs[row].append(token)
        num_drafts = num_drafts if len(rows) else 0
        draft(self.state, self.layer, inputs, hidden, self.kv, next_ids, rows, last, num_drafts)

    def prefill_all(self, num_drafts: int = STEP) -> "Server":
        self.prefill([PrefillChunk(r, 0, p, True) for r, p in enumerate(PROMPTS)], num_drafts)
        return self

    def decode(self, rows: list[int], num_drafts: int) -> list[int]:
        index = torch.tensor(rows)
        places = verify_places(self.state, index, num_drafts)
        ids, hidden = self.forward(verify_inputs(self.state, index, num_drafts), places)
        sampled = ids.view(len(rows), -1)
        num_tokens = finish_decode(
            self.state, index, sampled, hidden, self.kv, self.layer, num_drafts
        )
        self.count(places, kept(sampled, num_tokens))
        counts: list[int] = num_tokens.tolist()
        for row, tokens, count in zip(rows, sampled.tolist(), counts, strict=True):
            self.outputs[row] += tokens[:count]
            self.table.num_outputs[row] = len(self.outputs[row])  # a runner knows this later
        return counts

    def history(self, row: int) -> list[int]:
        return PROMPTS[row] + self.outputs[row]


def plainly(server: Server) -> list[list[int]]:
    server.prefill_all(0)
    for _ in range(40):
        server.decode([0, 1, 2], 0)
    return server.outputs


@pytest.fixture(scope="module")
def plain(path: Path) -> list[list[int]]:
    return plainly(Server(path))


def with_drafts(server: Server, plain: list[list[int]], num_drafts: int) -> None:
    """30 tokens of each row, with drafts that are mostly right; all must be the plain ones."""
    server.prefill_all()
    generator = torch.Generator().manual_seed(num_drafts)
    seen: set[int] = set()
    while min(map(len, server.outputs)) < 30:
        for row in range(ROWS):  # mostly right drafts in place of those of a random layer
            right = plain[row][len(server.outputs[row]) :][:STEP]
            for place, token in enumerate(right):
                if torch.rand(1, generator=generator) < 0.7:
                    server.state.drafts[row, place] = token
        rows = [row for row in range(ROWS) if len(server.outputs[row]) < 30]
        seen |= set(server.decode(rows, num_drafts))
        for row in range(ROWS):
            assert server.state.lengths[row] == len(server.history(row)) - 1
    for row in range(ROWS):
        assert server.outputs[row][:30] == plain[row][:30]
    assert seen == set(range(1, num_drafts + 2))


@pytest.mark.parametrize("num_drafts", [1, 2, 4])
@pytest.mark.parametrize("chained", [False, True])
def test_tokens_are_those_of_plain_decoding_whatever_the_drafts(
    path: Path, plain: list[list[int]], num_drafts: int, chained: bool
) -> None:
    with_drafts(Server(path, chained=chained), plain, num_drafts)


@pytest.mark.parametrize("num_drafts", [1, 4])
def test_seeds_and_rules_give_the_tokens_of_plain_decoding(path: Path, num_drafts: int) -> None:
    penalties = {"repetition_penalty": 1.3, "frequency_penalty": 0.6, "presence_penalty": 0.4}
    stops = tuple(range(0, 500, 2))
    wishes = (
        SamplingParams(max_new_tokens=99, temperature=1.0, seed=4, top_p=0.9, **penalties),
        SamplingParams(max_new_tokens=99, temperature=0.7, seed=5, min_p=0.05, top_k=40),
        SamplingParams(
            max_new_tokens=99, temperature=0.0, stop_token_ids=stops, min_new_tokens=9, **penalties
        ),
    )
    plain = plainly(Server(path, wishes=wishes))
    assert plain != plainly(Server(path))
    assert not set(stops) & set(plain[2][:9])
    assert set(stops) & set(plain[2][9:])
    with_drafts(Server(path, wishes=wishes), plain, num_drafts)


@pytest.mark.parametrize("normed", [True, False])
def test_drafts_are_those_of_the_reference(path: Path, normed: bool) -> None:
    config = json.loads((path / "config.json").read_text())
    tensors: dict[str, Tensor] = {}
    for file in path.glob("*.safetensors"):
        tensors |= load_file(file)
    w, bias = from_checkpoint(tensors, config)
    w["head"][load_model_spec(path).num_token_ids :] = 0  # ids without a token are no drafts

    def check(server: Server, row: int) -> None:
        drafts = server.state.drafts[row].tolist()
        ids = torch.tensor(server.history(row) + drafts)
        at = torch.tensor([len(server.history(row)) - 2])
        assert accepted(w, bias, ids, at, not normed, config).tolist() == [[True] * STEP]
        ids[-2] = (ids[-2] + 1) % 90
        right = accepted(w, bias, ids, at, not normed, config).tolist()
        assert right == [[True, True, False, False]]

    server = Server(path, normed)
    server.prefill([PrefillChunk(2, 0, PROMPTS[2][:4], False, PROMPTS[2][4])])
    server.prefill(
        [PrefillChunk(2, 4, PROMPTS[2][4:], True)]
        + [PrefillChunk(r, 0, PROMPTS[r], True) for r in (0, 1)]
    )
    for steps in range(3):
        for row in range(ROWS):
            check(server, row)
        right = server.state.drafts.clone()
        if steps == 1:  # a run of accepted drafts, in which only row 1 guesses wrong
            probe = Server(path, normed).prefill_all(0)
            for _ in range(8):
                probe.decode([0, 1, 2], 0)
            for row in (0, 2):
                done = len(server.outputs[row])
                right[row, :2] = torch.tensor(probe.outputs[row][done : done + 2])
            server.state.drafts.copy_(right)
        counts = server.decode([0, 1, 2], STEP)
        assert steps != 1 or min(counts[0], counts[2]) >= 3


def test_chained_drafts_are_passes_over_the_whole_sequence(path: Path) -> None:
    server = Server(path, chained=True).prefill_all()
    for row, prompt in enumerate(PROMPTS):
        other = Server(path, chained=True)
        inputs, _ = other.chunk_inputs([PrefillChunk(row, 0, prompt, True)])
        _, hidden = other.forward(inputs, verify_places(other.state, torch.tensor([row]), 0))
        ids = [*prompt[1:], server.outputs[row][0]]
        for place in range(STEP):
            step = dataclasses.replace(inputs, token_ids=torch.tensor(ids))
            normed, hidden = other.layer.run(step, hidden, other.kv, place)
            guess = int(other.layer.guess(normed[-1:]))
            assert server.state.drafts[row, place] == guess
            ids = [*ids[1:], guess]


def test_a_step_of_chunks_and_drafts_is_both_steps(path: Path) -> None:
    apart, mixed = (Server(path) for _ in range(2))
    for server in (apart, mixed):
        server.prefill([PrefillChunk(row, 0, PROMPTS[row], True) for row in (0, 1)])
    chunk = PrefillChunk(2, 0, PROMPTS[2], True)
    apart.decode([0, 1], 2)
    apart.prefill([chunk], 2)

    rows, state = torch.tensor([0, 1]), mixed.state
    chunks, next_ids = mixed.chunk_inputs([chunk])
    inputs = join_inputs(chunks, verify_inputs(state, rows, 2))
    first, others = verify_places(state, torch.tensor([2]), 0), verify_places(state, rows, 2)
    before = torch.cat((torch.full((1, 2), -1), others.drafts))
    places = Places(*(torch.cat(both) for both in zip(first[:2], others[:2], strict=True)), before)
    ids, hidden = mixed.forward(inputs, places)
    sampled = ids[1:].view(2, 3)
    state.last_token[2] = ids[0]
    num_tokens = settle(state, rows, sampled)
    next_ids[-1] = ids[0]
    start = len(next_ids)
    last = torch.cat((torch.tensor([start - 1]), start + torch.tensor([0, 3]) + num_tokens - 1))
    everyone, flat = torch.tensor([2, 0, 1]), torch.cat((next_ids, sampled.flatten()))
    draft(state, mixed.layer, inputs, hidden, mixed.kv, flat, everyone, last, 2)
    assert torch.equal(state.drafts[:ROWS, :2], apart.state.drafts[:ROWS, :2])
    assert torch.equal(state.last_token, apart.state.last_token)
    assert torch.equal(state.lengths, apart.state.lengths)


def test_a_full_row_writes_to_nobodys_page(path: Path, plain: list[list[int]]) -> None:
    server = Server(path).prefill_all()
    length = len(PROMPTS[0])
    capacity = 2 * PAGE
    server.state.capacity[0] = capacity  # of which 7 tokens are taken
    server.state.page_table[0, 2:] = server.state.page_table[1, 0]  # stale: row 1's
    others = server.kv[PAGES:-1].clone()
    rest = server.kv[2:PAGES].clone()
    while len(server.outputs[0]) + length <= capacity:
        right = plain[0][len(server.outputs[0]) :][:STEP]
        server.state.drafts[0] = torch.tensor(right)
        server.decode([0], STEP)
    assert server.outputs[0] == plain[0][: len(server.outputs[0])]
    assert server.state.lengths[0] == capacity
    assert server.decode([0], STEP) == [1]  # planned before that was known; its token is nobody's
    assert server.state.lengths[0] == capacity
    assert torch.equal(server.kv[PAGES:-1], others)
    assert torch.equal(server.kv[2:PAGES], rest)


@pytest.mark.parametrize("width", [1, 3])
def test_inputs_of_verify_rows(path: Path, width: int) -> None:
    server: Any = Server(path).prefill_all()
    server.state.capacity[1] = 3
    inputs = verify_inputs(server.state, torch.tensor([1, 0]), width - 1)
    assert inputs.positions.tolist() == [*range(2, 2 + width), *range(7, 7 + width)]
    slots = [PAGES * PAGE + 2] + [server.state.scratch_slot] * (width - 1)
    assert inputs.slots.tolist() == [*slots, *range(7, 7 + width)]
    (group,) = inputs.groups
    assert (group.span, group.rows.max_query_len) == (slice(0, 2 * width), width)
    assert group.rows.lengths.tolist() == [2 + width, 7 + width]
    assert group.rows.query_starts.tolist() == [0, width, 2 * width]
    first = [server.outputs[1][0], server.outputs[0][0]]
    assert inputs.token_ids[::width].tolist() == first
    assert inputs.token_ids[1:width].tolist() == server.state.drafts[1, : width - 1].tolist()


def test_an_acceptance_can_be_forced() -> None:
    count, forced = 20_000, torch.tensor([0.7, 0.5, 0.35], dtype=torch.float64)
    zeros = torch.zeros(count, dtype=torch.int64)
    state = RowState(
        last_token=zeros.clone(),
        lengths=zeros.clone(),
        num_outputs=zeros.clone(),
        drafts=torch.full((count, 3), 5),
        capacity=zeros + 99,
        page_table=torch.zeros(count, 1, dtype=torch.int32),
        page_size=PAGE,
        scratch_slot=0,
        forced=forced,
    )
    sampled = torch.tensor([[1, 2, 3, 4]]).expand(count, -1)
    for _ in range(2):
        num_tokens = settle(state, torch.arange(count), sampled)
        shares = [(num_tokens > place).double().mean().item() for place in (1, 2, 3)]
        torch.testing.assert_close(shares, forced.tolist(), atol=0.02, rtol=0)
        assert torch.equal(state.last_token, num_tokens)
