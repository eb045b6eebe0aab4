"""The simulation finds bugs: each mutant of the production code is noticed within a few seeds."""

import pytest
import world
from mutants import MUTANTS

MAX_SEEDS = 150
# Seeds at which each mutant is found soonest. They only save time: if the worlds change, the mutant
# must be found with one of the first MAX_SEEDS.
FAST_SEEDS = {
    "skips a reference when dropping pages": 1,
    "frees a page twice": 26,
    "forgets an abort in the waiting queue": 17,
    "accepts results of an old epoch": 8,
    "drops the token in flight at preemption": 44,
    "sends the token of the extra step": 23,
    "takes the last prompt token from the cache": 46,
    "caches a page whose KV is not planned": 21,
    "shares pages that are not written yet": 17,
    "evicts pages in use": 6,
    "loses a token when workers die": 16,
    "resumes with a wrong output count": 58,
    "leaks the row of an abort in prefill": 46,
    "preempts the oldest": 44,
    "does not count chunks in the budget": 44,
    "never ends a wait in the queue": 57,
    "shares prefixes between salts": 21,
    "waits for a prefix that no request computes any more": 24,
    "resumes a row without what its grammar has seen": 58,
    "counts prompt tokens as outputs for penalties": 3,
    "sends prompt logprobs again after a resume": 34,
    "sends what follows a stop token in its step": 10,
    "counts dropped drafts as accepted": 56,
    "believes that rejected drafts have KV": 55,
    "counts one token for each step": 59,
    "allocates pages beyond the longest length for drafts": 59,
    "does not count drafts in the budget": 51,
    "remembers drafts in flight when workers die": 16,
    "keeps the prefix cache over epochs": 16,
    "keeps cached pages that a failed step should have written": 39,
    "does not flush the cache when it is asked to": 59,
    "flushes cached pages that are in use": 56,
    "reads the result of a plan that builds on a failed step": 39,
    "goes on with rows that were admitted beside a failed step": 59,
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_mutant_is_found_that(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[name](monkeypatch.setattr)
    for seed in (FAST_SEEDS.get(name, 0), *range(MAX_SEEDS)):
        try:
            world.run(seed)
        except world.Violation:
            return
    pytest.fail(f"{MAX_SEEDS} worlds did not notice that the scheduler {name}")
