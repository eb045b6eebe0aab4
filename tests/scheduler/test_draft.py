"""The fastest draft length is found, kept, and changed when another one becomes faster."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
from fakes import FakeEngine
from glimmer.scheduler.draft import DraftPolicy
from glimmer.shared.config import ServeConfig
from glimmer.shared.messages import PrefillChunk, StepPlan

MS = 1_000_000
Cost = Callable[[int], float]


def plan(num_rows: int, num_drafts: int, num_chunks: int = 0) -> StepPlan:
    chunks = [PrefillChunk(row, 0, [1], False, 1) for row in range(num_chunks)]
    return StepPlan(0, 0, [], [], [], chunks, list(range(num_rows)), num_drafts)


class Server:
    """Steps of `num_rows` rows that take about `cost(num_drafts)` ms."""

    def __init__(self, policy: DraftPolicy, seed: int = 0) -> None:
        self.policy = policy
        self.rng = random.Random(seed)
        self.lengths: list[int] = []
        self.tokens = 0
        self.time_ns = 0

    def run(self, steps: int, num_rows: int, acceptance: Sequence[float], cost: Cost) -> None:
        for _ in range(steps):
            length = self.policy.choose(num_rows, 16384)
            counts = [0] * (length + 1)
            for _ in range(num_rows):
                accepted = 0
                while accepted < length and self.rng.random() < acceptance[accepted]:
                    accepted += 1
                counts[accepted] += 1
                self.tokens += 1 + accepted
            taken_ns = int(cost(length) * MS * self.rng.uniform(0.97, 1.03))
            self.time_ns += taken_ns
            self.policy.observe(plan(num_rows, length), counts, taken_ns)
            self.lengths.append(length)

    def most_used(self, last: int) -> tuple[int, float]:
        length, count = Counter(self.lengths[-last:]).most_common(1)[0]
        return length, count / last


def policy(step: int = 4, fixed: bool = False) -> DraftPolicy:
    return DraftPolicy(ServeConfig(mtp_step=step, mtp_fixed_step=fixed))


def best(acceptance: Sequence[float], cost: Cost) -> int:
    tokens, chance, scores = 1.0, 1.0, [1 / cost(0)]
    for place, share in enumerate(acceptance):
        chance *= share
        tokens += chance
        scores.append(tokens / cost(place + 1))
    return max(range(len(scores)), key=scores.__getitem__)


@pytest.mark.parametrize(
    ("acceptance", "per_draft"),
    [
        ((0.95, 0.95, 0.95, 0.95), 0.05),
        ((0.7, 0.7, 0.3, 0.2), 0.15),
        ((0.7, 0.1, 0.1, 0.1), 0.2),
        ((0.3, 0.1, 0.1, 0.1), 0.6),
    ],
)
def test_the_length_that_pays_most_is_used(acceptance: tuple[float, ...], per_draft: float) -> None:
    server = Server(policy())

    def cost(length: int) -> float:
        return 10 * (1 + per_draft * length)

    server.run(3000, 16, acceptance, cost)
    length, share = server.most_used(2000)
    assert length == best(acceptance, cost)
    assert share > 0.95


@pytest.mark.parametrize("num_rows", [1, 4, 200])
def test_drafts_that_never_pay_cost_less_than_two_percent(num_rows: int) -> None:
    server = Server(policy(7))
    server.run(8_000, num_rows, [0.3] + [0.1] * 6, lambda length: 10 * (1 + 0.5 * length))
    assert server.tokens / (server.time_ns / MS) > 0.98 * num_rows / 10


def test_each_number_of_rows_has_its_own_length() -> None:
    server = Server(policy())
    for _ in range(20):
        server.run(100, 2, [0.6] * 4, lambda length: 10 + 8 * length)
        server.run(100, 64, [0.6] * 4, lambda length: 20 + 2 * length)
    assert server.most_used(100)[0] >= 3
    server.run(100, 2, [0.6] * 4, lambda length: 10 + 8 * length)
    assert server.most_used(100)[0] == 0


def test_a_change_of_the_text_is_noticed() -> None:
    server = Server(policy())
    server.run(2000, 8, [0.9] * 4, lambda length: 10 + length)
    assert server.most_used(500)[0] == 4
    server.run(2000, 8, [0.1] * 4, lambda length: 10 + 2 * length)
    assert server.most_used(500)[0] == 0
    server.run(30_000, 8, [0.9] * 4, lambda length: 10 + length)
    assert server.most_used(500)[0] == 4


def test_one_slow_step_changes_nothing() -> None:
    server = Server(policy())
    server.run(1000, 8, [0.8] * 4, lambda length: 10 + length)
    server.run(1, 8, [0.8] * 4, lambda length: 1000)
    before = server.most_used(500)[0]
    server.run(20, 8, [0.8] * 4, lambda length: 10 + length)
    assert server.most_used(15)[0] == before


@pytest.mark.parametrize("seed", range(8))
def test_answers_that_wait_for_chunks_to_be_launched_change_nothing(seed: int) -> None:
    """One step in three has a chunk, and the answer of the one before is late by half a step."""
    server = Server(policy(3), seed)
    is_mixed = [server.rng.random() < 1 / 3 for _ in range(501)]
    for now, then in pairwise(is_mixed):
        length = server.policy.choose(32, 8448)
        server.lengths.append(length)
        counts = [9, 7, 5, 11][: length + 1]
        counts[-1] += 32 - sum(counts)
        taken = (20, 23.5, 25, 26.5)[length] * server.rng.uniform(0.99, 1.01)
        taken += 15 * now + 12 * (then - now)
        sent = plan(32, length, num_chunks=int(now))
        server.policy.observe(sent, counts, int(taken * MS))
    assert server.most_used(400) == (3, pytest.approx(1, abs=0.05))


@pytest.mark.parametrize(("per_draft", "wanted"), [(2, 3), (20, 0)])
def test_a_new_number_of_rows_begins_with_what_is_known_of_another(
    per_draft: int, wanted: int
) -> None:
    server = Server(policy(3))
    server.run(1000, 32, [0.7] * 3, lambda length: 20 + per_draft * length)
    server.run(12, 20, [0.7] * 3, lambda length: 18 + per_draft * length)
    assert server.lengths[-12:].count(wanted) >= 8


def test_what_was_only_assumed_elsewhere_is_looked_at_as_if_it_were_new() -> None:
    """Rows come faster than steps can be timed, so several classes know nothing but assumptions."""
    server = Server(policy(3))
    for num_rows in (1, 2, 4, 8):
        server.policy.choose(num_rows, 8448)
    server.run(40, 16, [0.7] * 3, lambda length: 20 + 10 * length)
    assert {1, 2, 3} <= set(server.lengths)


def test_a_fixed_length_and_no_drafts_need_no_measurements() -> None:
    assert [policy(3, fixed=True).choose(rows, 4096) for rows in (1, 8, 200)] == [3, 3, 3]
    assert policy(0).choose(8, 4096) == 0


def test_drafts_take_at_most_half_of_a_steps_tokens() -> None:
    fixed = policy(7, fixed=True)
    assert [fixed.choose(rows, 64) for rows in (1, 4, 8, 16, 31, 64)] == [7, 7, 3, 1, 0, 0]


def test_steps_with_drafts_are_no_larger_than_what_workers_prepare_for() -> None:
    fixed = policy(7, fixed=True)
    assert [fixed.choose(rows, 9000) for rows in (128, 129, 256, 512, 513)] == [7, 6, 3, 1, 0]


def test_drafts_that_were_never_made_are_not_counted() -> None:
    drafts = policy(4, fixed=True)
    drafts.observe(plan(0, 2, num_chunks=1), [0, 0, 0], MS)
    drafts.observe(plan(10, 4), [4, 3, 3, 0, 0], MS)
    assert drafts.offered == [10, 10, 0, 0]
    assert drafts.accepted == [6, 3, 0, 0]


def test_the_same_history_gives_the_same_choices() -> None:
    servers = [Server(policy(7), seed=3) for _ in range(2)]
    for server in servers:
        server.run(2000, 5, [0.6] * 7, lambda length: 10 + 2 * length)
    assert servers[0].lengths == servers[1].lengths


def test_plans_and_heartbeat_show_the_length() -> None:
    engine = FakeEngine(64, mtp_step=3, mtp_fixed_step=True, batch_max_tokens=200)
    submits = [engine.submission([n], 30) for n in range(3)]
    engine.tell(*submits)
    engine.finish()
    assert {plan.num_drafts for plan in engine.plans} == {3}
    beat = engine.core.heartbeat()
    assert beat.draft_length == 3
    assert beat.decoded_rows < beat.generated_tokens
    assert 0 < beat.drafts_accepted[2] <= beat.drafts_accepted[0] <= beat.drafts_offered[0]
    for submit in submits:
        assert engine.tokens[submit.request_id] == engine.right_answer(submit)
