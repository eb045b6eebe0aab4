"""Counters and histograms in a list, and what Prometheus reads of them."""

import pytest
from glimmer.frontend.engine.tally import Tally, cumulative
from prometheus_client.core import Metric

LABELS = {"model_name": "tiny"}


def make() -> Tally:
    tally = Tally()
    tally.counter("requests", "requests", "kind", ("good", "bad"))
    tally.histogram("seconds", "time", (0.1, 1.0))
    return tally


def samples(tally: Tally, values: list[float] | None = None) -> dict[str, float]:
    found: dict[str, float] = {}
    families: list[Metric] = list(tally.collect(values or tally.values, LABELS))
    for sample in (sample for family in families for sample in family.samples):
        assert sample.labels["model_name"] == "tiny"
        rest = [value for name, value in sample.labels.items() if name != "model_name"]
        found[" ".join([sample.name, *rest])] = sample.value
    return found


def test_values_are_counted_by_key_and_by_bucket() -> None:
    tally = make()
    tally.count("requests", key="good")
    tally.count("requests", 2, key="bad")
    for value in (0.1, 0.5, 7.0):
        tally.observe("seconds", value)
    assert samples(tally) == {
        "requests_total good": 1,
        "requests_total bad": 2,
        "seconds_bucket 0.1": 1,
        "seconds_bucket 1.0": 2,
        "seconds_bucket +Inf": 3,
        "seconds_count": 3,
        "seconds_sum": 7.6,
    }


def test_a_key_that_was_not_defined_is_refused() -> None:
    tally = make()
    with pytest.raises(KeyError):
        tally.count("requests", key="whatever a client sent")
    assert sum(tally.values) == 0


def test_lists_of_two_processes_add_up() -> None:
    first, second = make(), make()
    first.observe("seconds", 0.5)
    second.observe("seconds", 2.0)
    total = [a + b for a, b in zip(first.values, second.values, strict=True)]
    found = samples(first, total)
    assert (found["seconds_count"], found["seconds_sum"]) == (2, 2.5)


def test_a_followed_counter_is_read_and_may_be_hidden() -> None:
    tally, cuts = make(), [0]
    tally.follow("cuts", "connections cut", lambda: cuts[0])
    tally.follow("secret", "", lambda: 5)
    cuts[0] = 3
    tally.refresh()
    found = samples(tally)
    assert found["cuts_total"] == 3
    assert not any("secret" in name for name in found)
    assert tally.value(tally.values, "secret") == 5


def test_no_counts_are_zeros() -> None:
    assert cumulative((1, 2), []) == [("1.0", 0), ("2.0", 0), ("+Inf", 0)]
