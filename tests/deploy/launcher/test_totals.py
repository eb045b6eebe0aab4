"""The sums of what HTTP processes count never go backwards, whoever dies."""

from glimmer.deploy.launcher.totals import Totals
from glimmer.shared.messages import Counts


def test_sums_keep_what_dead_processes_counted() -> None:
    totals = Totals()
    totals.add(Counts("frontend", 0, 100, [5.0, 1.0], 1))
    totals.add(Counts("frontend", 1, 101, [2.0, 0.0], 1))
    assert totals.values == [7.0, 1.0]
    totals.add(Counts("frontend", 0, 100, [6.0, 1.0], 2))
    assert totals.values == [8.0, 1.0]
    totals.add(Counts("frontend", 0, 200, [1.0, 0.0], 1))  # a new process begins at zero
    assert totals.values == [9.0, 1.0]
    totals.add(Counts("frontend", 0, 200, [1.5, 0.5], 2))
    assert totals.values == [9.5, 1.5]


def test_the_last_serial_of_each_process_is_kept() -> None:
    totals = Totals()
    assert totals.serial(0) == 0
    totals.add(Counts("frontend", 0, 100, [1.0], 7))
    totals.add(Counts("frontend", 1, 101, [1.0], 3))
    assert (totals.serial(0), totals.serial(1)) == (7, 3)
