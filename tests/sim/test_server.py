"""Whole servers: processes die, hang and do not read, and restarts are limited."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import server_world
from limits import Violation
from server_mutants import SERVER_MUTANTS, SWEEP_MUTANTS
from server_world import WORKER_FAULTS, Plan

SEEDS = 110
# Seeds at which a mutant is found soonest. They only save time.
FAST_SEEDS = {
    "does not notice that a message to a frontend was dropped": 12,
    "does not tell a frontend that output was lost": 60,
    "does not notice that a request was dropped": 83,
    "lets anybody abort a request by its name": 10,
    "leaves streams open when the scheduler is lost": 100,
    "does not tell frontends that the scheduler is lost": 100,
    "keeps the other ranks of a group": 46,
    "never waits longer before a restart": 30,
    "never forgets old restarts": 48,
    "never gives up": 10,
    "counts restarts that helped": 34,
    "never takes a step for hung": 39,
}


def sweep(kind: str, seed: int) -> int:
    """Let the N-th event of a kind fail, for each N until there is no N-th one. Returns the last
    N."""
    number = 1
    while True:
        world = server_world.run(seed, Plan("calm", 4, 1.5, kind, number))
        if world.fired < number:
            return number - 1
        number += 1


@pytest.mark.parametrize("safety", [False, True], ids=["faults stop", "faults go on"])
def test_every_server_keeps_every_promise(safety: bool) -> None:
    faults: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    for seed in range(SEEDS):
        world = server_world.run(seed, safety=safety)
        faults.update(world.faults)
        outcomes.update(client.outcome for client in world.clients)
    assert len(faults) >= 10, faults
    assert outcomes["finished"] > 300, outcomes


@pytest.mark.parametrize("kind", ["message", "page", "spawn", *WORKER_FAULTS])
def test_any_one_failure_is_survived(kind: str) -> None:
    assert sweep(kind, 0) >= 3


@pytest.mark.parametrize("name", SERVER_MUTANTS)
def test_the_mutant_is_found_that(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    SERVER_MUTANTS[name](monkeypatch.setattr)
    for seed in (FAST_SEEDS[name], *range(SEEDS)):
        try:
            server_world.run(seed)
        except Violation:
            return
    pytest.fail(f"{SEEDS} servers did not notice it")


@pytest.mark.parametrize("name", SWEEP_MUTANTS)
def test_a_sweep_finds_the_mutant_that(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    SWEEP_MUTANTS[name](monkeypatch.setattr)
    with pytest.raises(Violation):
        sweep("message", 2)


def test_a_seed_replays_to_the_same_event_log() -> None:
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]; import server_world; "
        "print([server_world.run(seed).log_hash for seed in range(5)])"
    )
    here = Path(__file__).parent
    command = [sys.executable, "-c", code, str(here), str(here.parent)]
    logs = set()
    for hash_seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed}
        logs.add(subprocess.run(command, env=env, capture_output=True, check=True).stdout)
    assert len(logs) == 1
