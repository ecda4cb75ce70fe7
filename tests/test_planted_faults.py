"""The planted faults are in step with the code: each replaces one place, and leaves a file that Python can read."""

import pytest
from planted_faults import FAULTS, TESTS, broken


def test_names_are_unique():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 40


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_can_be_planted(fault):
    compile(broken(fault), fault.path, "exec")
    assert fault.right != fault.wrong


def test_the_tests_that_must_notice_exist():
    from pathlib import Path

    assert all((Path(__file__).parent / f"{test}.py").exists() for test in TESTS)
