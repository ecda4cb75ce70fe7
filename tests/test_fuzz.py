"""The short form of `make fuzz`: the same cases each time. The long form and its figures are in bench/results/fuzz.md."""

from fuzz import CASES, OPTIONS, run_case
from hypothesis import given, settings


@settings(max_examples=80, derandomize=True, **OPTIONS)
@given(CASES)
def test_drawn_calls(case):
    run_case(case)
