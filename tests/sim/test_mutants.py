"""The simulation finds bugs: each mutant of the production code is noticed within a few seeds."""

import pytest
import world
from limit_mutants import LIMIT_MUTANTS
from mutants import MUTANTS

MAX_SEEDS = 150
# Seeds at which each mutant is found soonest. They only save time: if the worlds change, the mutant
# must be found with one of the first MAX_SEEDS.
FAST_SEEDS = {
    "forgets an abort in the waiting queue": 5,
    "accepts results of an old epoch": 10,
    "drops the token in flight at preemption": 3,
    "takes the last prompt token from the cache": 4,
    "caches a page whose KV is not planned": 33,
    "shares pages that are not written yet": 5,
    "loses a token when workers die": 3,
    "resumes with a wrong output count": 4,
    "leaks the row of an abort in prefill": 3,
    "preempts the oldest": 3,
    "does not count chunks in the budget": 3,
    "never ends a wait in the queue": 51,
    "shares prefixes between salts": 10,
    "waits for a prefix that no request computes any more": 80,
    "resumes a row without what its grammar has seen": 4,
    "ignores the error of a grammar": 4,
    "ends all requests of a step with one whose grammar failed": 4,
    "keeps a page of a request whose grammar failed": 4,
    "sends prompt logprobs again after a resume": 3,
    "counts dropped drafts as accepted": 2,
    "does not count drafts in the budget": 10,
    "remembers drafts in flight when workers die": 3,
    "keeps the prefix cache over epochs": 3,
    "keeps cached pages that a failed step should have written": 5,
    "does not flush the cache when it is asked to": 6,
    "flushes cached pages that are in use": 6,
    "reads the result of a plan that builds on a failed step": 3,
    "goes on with rows that were admitted beside a failed step": 3,
    "lets any number of requests overtake": 19,
    "forgets those that start in the same step": 3,
    "ignores the limit of waiting tokens": 29,
    "does not count the prompt that comes": 29,
    "ignores how many requests of a user wait": 60,
    "ignores how many tokens of a user wait": 20,
    "takes the whole queue for that of a user": 20,
    "serves users in order of arrival": 2,
    "serves one user until nobody of it waits": 2,
    "lets a user save up a claim": 2,
    "does not count the outputs of a user": 73,
    "keeps a page at a flush": 6,
    "preempts one request too many": 28,
    "preempts the same request for ever": 3,
    "starts the queue from its end": 2,
}


ALL_MUTANTS = {**MUTANTS, **LIMIT_MUTANTS}


@pytest.mark.parametrize("name", ALL_MUTANTS)
def test_the_mutant_is_found_that(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ALL_MUTANTS[name](monkeypatch.setattr)
    for seed in (FAST_SEEDS.get(name, 0), *range(MAX_SEEDS)):
        try:
            world.run(seed)
        except world.Violation:
            return
    pytest.fail(f"{MAX_SEEDS} worlds did not notice that the scheduler {name}")
