"""Steps with drafts on a tiny model: tokens of plain decoding, drafts of the reference."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from glimmer.deploy.demo.checkpoint import make_checkpoint
from glimmer.deploy.demo.training.acceptance import accepted
from glimmer.deploy.demo.training.model import from_checkpoint
from glimmer.shared.messages import PrefillChunk, RowAdmit, StepPlan
from glimmer.shared.model_spec import load_model_spec
from glimmer.shared.sampling import SamplingParams
from glimmer.workers.drafts import accept
from glimmer.workers.inputs import StepInputs, build_batch, decode_batch
from glimmer.workers.model.glm4_moe_lite import hidden_states
from glimmer.workers.rows import RowTable
from safetensors.torch import load_file
from torch import Tensor

PAGE, PAGES, ROWS, STEP = 8, 12, 3, 4
PROMPTS = [[5, 9, 2, 7, 7, 31, 12], [40, 3], [8, 6, 4, 2, 90, 11, 63, 21, 22, 23, 24]]
GREEDY = SamplingParams(max_new_tokens=100, temperature=0)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("drafting")
    make_checkpoint(path, seed=3)
    return path


class Server:
    """A runner whose three rows are admitted; `outputs` are their tokens so far."""

    def __init__(self, runner: Any, wishes: Sequence[SamplingParams]) -> None:
        self.runner, self.table = runner, runner.table
        pages = [[row * PAGES + n for n in range(PAGES)] for row in range(ROWS)]
        admits = [RowAdmit(row, params, pages[row], 0, 0, []) for row, params in enumerate(wishes)]
        runner.run(StepPlan(0, 0, [], admits, [], [], []))
        self.outputs: list[list[int]] = [[] for _ in range(ROWS)]

    def step(
        self, chunks: Sequence[PrefillChunk], rows: Sequence[int], num_drafts: int
    ) -> list[int]:
        """-> how many tokens each decode row got."""
        plan = StepPlan(0, 0, [], [], [], list(chunks), list(rows), num_drafts)
        result = self.runner.run(plan)
        sampled = [chunk.row for chunk in chunks if chunk.sample] + list(rows)
        for row, found in zip(sampled, result.rows, strict=True):
            self.outputs[row] += found.token_ids
        decoded = result.rows[len(result.rows) - len(rows) :]
        return [len(found.token_ids) for found in decoded]

    def prefill(self, chunks: Sequence[PrefillChunk], num_drafts: int = STEP) -> None:
        self.step(chunks, [], num_drafts)

    def prefill_all(self, num_drafts: int = STEP) -> "Server":
        self.prefill([PrefillChunk(r, 0, p, True) for r, p in enumerate(PROMPTS)], num_drafts)
        return self

    def decode(self, rows: list[int], num_drafts: int) -> list[int]:
        return self.step([], rows, num_drafts)

    def history(self, row: int) -> list[int]:
        return PROMPTS[row] + self.outputs[row]


@pytest.fixture(scope="module")
def serve(
    path: Path, config_of: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Server]:
    """-> a Server; `normed` says which hidden states are fed."""
    from glimmer.workers.startup import load_runner

    def make(
        normed: bool = True, chained: bool = False, wishes: Sequence[SamplingParams] = (GREEDY,) * 3
    ) -> Server:
        states = "after_norm" if normed else "before_norm"
        config = config_of(
            path,
            data_type="float32",
            mtp_mode="vanilla_with_att" if chained else "eagle_with_att",
            mtp_step=STEP,
            mtp_hidden_states=(states, states),
            page_size=PAGE,
            running_max_req_size=ROWS,
            max_req_total_len=PAGES * PAGE,
            max_total_token_num=ROWS * PAGES * PAGE,
        )
        directory = tmp_path_factory.mktemp("runner")
        return Server(load_runner(config, 0, 0, directory, lambda *_: None), wishes)

    return make


def plainly(server: Server) -> list[list[int]]:
    server.prefill_all(0)
    for _ in range(40):
        server.decode([0, 1, 2], 0)
    return server.outputs


@pytest.fixture(scope="module")
def plain(serve: Callable[..., Server]) -> list[list[int]]:
    return plainly(serve())


def with_drafts(server: Server, plain: list[list[int]], num_drafts: int) -> None:
    """30 tokens of each row, with drafts that are mostly right; all must be the plain ones."""
    server.prefill_all()
    generator = torch.Generator().manual_seed(num_drafts)
    seen: set[int] = set()
    while min(map(len, server.outputs)) < 30:
        for row in range(ROWS):  # mostly right drafts in place of those of a random layer
            right = plain[row][len(server.outputs[row]) :][:STEP]
            for number, token in enumerate(right):
                if torch.rand(1, generator=generator) < 0.7:
                    server.table.drafts[row, number] = token
        rows = [row for row in range(ROWS) if len(server.outputs[row]) < 30]
        seen |= set(server.decode(rows, num_drafts))
        for row in range(ROWS):
            assert server.table.lengths[row] == len(server.history(row)) - 1
    for row in range(ROWS):
        assert server.outputs[row][:30] == plain[row][:30]
    assert seen == set(range(1, num_drafts + 2))


@pytest.mark.parametrize("num_drafts", [1, 2, 4])
@pytest.mark.parametrize("chained", [False, True])
def test_tokens_are_those_of_plain_decoding_whatever_the_drafts(
    serve: Callable[..., Server], plain: list[list[int]], num_drafts: int, chained: bool
) -> None:
    with_drafts(serve(chained=chained), plain, num_drafts)


@pytest.mark.parametrize("num_drafts", [1, 4])
def test_seeds_and_rules_give_the_tokens_of_plain_decoding(
    serve: Callable[..., Server], num_drafts: int
) -> None:
    penalties = {"repetition_penalty": 1.3, "frequency_penalty": 0.6, "presence_penalty": 0.4}
    stops = tuple(range(0, 500, 2))
    wishes = (
        SamplingParams(max_new_tokens=99, temperature=1.0, seed=4, top_p=0.9, **penalties),
        SamplingParams(max_new_tokens=99, temperature=0.7, seed=5, min_p=0.05, top_k=40),
        SamplingParams(
            max_new_tokens=99, temperature=0.0, stop_token_ids=stops, min_new_tokens=9, **penalties
        ),
    )
    plain = plainly(serve(wishes=wishes))
    assert plain != plainly(serve())
    assert not set(stops) & set(plain[2][:9])
    assert set(stops) & set(plain[2][9:])
    with_drafts(serve(wishes=wishes), plain, num_drafts)


@pytest.mark.parametrize("normed", [True, False])
def test_drafts_are_those_of_the_reference(
    path: Path, serve: Callable[..., Server], normed: bool
) -> None:
    config = json.loads((path / "config.json").read_text())
    tensors: dict[str, Tensor] = {}
    for file in path.glob("*.safetensors"):
        tensors |= load_file(file)
    w, bias = from_checkpoint(tensors, config)
    w["head"][load_model_spec(path).num_token_ids :] = 0  # ids without a token are no drafts

    def check(server: Server, row: int) -> None:
        drafts = server.table.drafts[row].tolist()
        ids = torch.tensor(server.history(row) + drafts)
        at = torch.tensor([len(server.history(row)) - 2])
        assert accepted(w, bias, ids, at, not normed, config).tolist() == [[True] * STEP]
        ids[-2] = (ids[-2] + 1) % 90
        right = accepted(w, bias, ids, at, not normed, config).tolist()
        assert right == [[True, True, False, False]]

    server = serve(normed)
    server.prefill([PrefillChunk(2, 0, PROMPTS[2][:4], False, PROMPTS[2][4])])
    server.prefill(
        [PrefillChunk(2, 4, PROMPTS[2][4:], True)]
        + [PrefillChunk(r, 0, PROMPTS[r], True) for r in (0, 1)]
    )
    for steps in range(3):
        for row in range(ROWS):
            check(server, row)
        right = server.table.drafts.clone()
        if steps == 1:  # a run of accepted drafts, in which only row 1 guesses wrong
            probe = serve(normed).prefill_all(0)
            for _ in range(8):
                probe.decode([0, 1, 2], 0)
            for row in (0, 2):
                done = len(server.outputs[row])
                right[row, :2] = torch.tensor(probe.outputs[row][done : done + 2])
            server.table.drafts.copy_(right)
        counts = server.decode([0, 1, 2], STEP)
        assert steps != 1 or min(counts[0], counts[2]) >= 3


def test_chained_drafts_are_passes_over_the_whole_sequence(serve: Callable[..., Server]) -> None:
    server = serve(chained=True).prefill_all()
    for row, prompt in enumerate(PROMPTS):
        other = serve(chained=True)
        forward = other.runner.forward
        plan = StepPlan(0, 0, [], [], [], [PrefillChunk(row, 0, prompt, True)], [])
        inputs = build_batch(plan, other.table).inputs
        hidden, _ = hidden_states(forward.model, inputs, forward.kv)
        ids = [*prompt[1:], server.outputs[row][0]]
        for number in range(STEP):
            step = StepInputs(torch.tensor(ids), inputs.positions, inputs.slots, inputs.groups)
            normed, hidden = forward.drafter.run(step, hidden, forward.kv, number)
            guess = int(forward.drafter.guess(normed[-1:]))
            assert server.table.drafts[row, number] == guess
            ids = [*ids[1:], guess]


@pytest.mark.parametrize("num_drafts", [0, 2])
def test_a_step_of_chunks_and_drafts_is_both_steps(
    serve: Callable[..., Server], num_drafts: int
) -> None:
    apart, mixed = serve(), serve()
    for server in (apart, mixed):
        server.prefill([PrefillChunk(row, 0, PROMPTS[row], True) for row in (0, 1)])
    chunk = PrefillChunk(2, 0, PROMPTS[2], True)
    apart.decode([0, 1], num_drafts)
    apart.prefill([chunk], num_drafts)
    mixed.step([chunk], [0, 1], num_drafts)
    assert mixed.outputs == apart.outputs
    for name in ("drafts", "last_token", "lengths", "num_outputs"):
        assert torch.equal(getattr(mixed.table, name), getattr(apart.table, name)), name
    kv = [server.runner.forward.kv[:-1] for server in (mixed, apart)]
    torch.testing.assert_close(*kv, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize("cut", [1, 6, 10])
def test_the_draft_layer_sees_a_prompt_in_chunks_as_one(
    serve: Callable[..., Server], chained: bool, cut: int
) -> None:
    """The KV at a chunk's end depends on the token after the chunk."""
    whole, pieces = serve(chained=chained), serve(chained=chained)
    prompt = PROMPTS[2]
    whole.prefill([PrefillChunk(2, 0, prompt, True)])
    pieces.prefill([PrefillChunk(2, 0, prompt[:cut], False, prompt[cut])])
    pieces.step([PrefillChunk(2, cut, prompt[cut:], True)], [], STEP)
    assert pieces.outputs == whole.outputs
    layer = whole.runner.spec.num_layers  # the later ones of a chained layer see less at the cut
    tokens = [
        server.runner.forward.kv[2 * PAGES : 3 * PAGES, layer].flatten(0, 1)[: len(prompt)]
        for server in (pieces, whole)
    ]
    torch.testing.assert_close(*tokens, atol=1e-5, rtol=1e-5)
    assert pieces.table.drafts[2, 0] == whole.table.drafts[2, 0]
    assert chained or torch.equal(pieces.table.drafts, whole.table.drafts)


def test_a_full_row_writes_to_the_scratch_page(
    serve: Callable[..., Server], plain: list[list[int]]
) -> None:
    server = serve().prefill_all()
    kv = server.runner.forward.kv
    length = len(PROMPTS[0])
    capacity = 2 * PAGE
    server.table.capacity[0] = capacity  # of which 7 tokens are taken
    server.table.page_table[0, 2:] = server.table.page_table[1, 0]  # stale: row 1's
    others = kv[PAGES:-1].clone()
    rest = kv[2:PAGES].clone()
    while len(server.outputs[0]) + length <= capacity:
        right = plain[0][len(server.outputs[0]) :][:STEP]
        server.table.drafts[0] = torch.tensor(right)
        server.decode([0], STEP)
    assert server.outputs[0] == plain[0][: len(server.outputs[0])]
    assert server.table.lengths[0] == capacity
    assert server.decode([0], STEP) == [1]  # planned before that was known; its token is dropped
    assert server.table.lengths[0] == capacity
    assert torch.equal(kv[PAGES:-1], others)
    assert torch.equal(kv[2:PAGES], rest)


@pytest.mark.parametrize("width", [1, 3])
def test_inputs_of_decode_rows(serve: Callable[..., Server], width: int) -> None:
    server = serve().prefill_all()
    server.table.capacity[1] = 3
    batch = decode_batch(server.table, torch.tensor([1, 0]), width - 1)
    inputs = batch.inputs
    assert batch.points.rows.tolist() == [1] * width + [0] * width
    assert batch.points.positions.tolist() == [*range(1, 1 + width)] * 2
    assert inputs.positions.tolist() == [*range(2, 2 + width), *range(7, 7 + width)]
    slots = [PAGES * PAGE + 2] + [server.table.scratch_slot] * (width - 1)
    assert inputs.slots.tolist() == [*slots, *range(7, 7 + width)]
    (group,) = inputs.groups
    assert (group.span, group.rows.max_query_len) == (slice(0, 2 * width), width)
    assert group.rows.lengths.tolist() == [2 + width, 7 + width]
    assert group.rows.query_starts.tolist() == [0, width, 2 * width]
    first = [server.outputs[1][0], server.outputs[0][0]]
    assert inputs.token_ids[::width].tolist() == first
    assert inputs.token_ids[1:width].tolist() == server.table.drafts[1, : width - 1].tolist()


def test_an_acceptance_can_be_forced() -> None:
    count, forced = 20_000, torch.tensor([0.7, 0.5, 0.35], dtype=torch.float64)
    table = RowTable(count, 13, PAGE, 90, "cpu", max_drafts=3)
    table.capacity += 99
    table.drafts += 5
    sampled = torch.tensor([[1, 2, 3, 4]]).expand(count, -1)
    for _ in range(2):
        num_tokens = accept(table, torch.arange(count), sampled, forced)
        shares = [(num_tokens > number).double().mean().item() for number in (1, 2, 3)]
        torch.testing.assert_close(shares, forced.tolist(), atol=0.02, rtol=0)
        assert torch.equal(table.last_token[:count], num_tokens)
