"""The planted faults fit the code. Whether tests find them is for `planted_faults.py`, which takes
half an hour."""

from pathlib import Path

from planted_faults import load_faults

ROOT = Path(__file__).parent.parent


def test_each_fault_has_its_place_and_its_tests() -> None:
    faults = load_faults().values()
    assert len(faults) >= 40
    for fault in faults:
        assert (ROOT / fault.file).read_text().count(fault.old) == 1, fault.name
        assert fault.old != fault.new
        assert fault.tests
        assert all((ROOT / test).exists() for test in fault.tests), fault.name
