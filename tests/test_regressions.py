"""What `make fuzz` once found, each with a name."""

import math

import pytest
from batches import IMPLEMENTATIONS, make, run
from tolerance import check, expected

from fused_dm import edf

DM = edf.DM(beta=8, lambd=0.5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_an_ignored_row_has_weight_0_where_the_batch_has_no_value(impl):
    """Of a batch whose sum of weights is nan, ignored rows had example_weight nan: 0 / nan."""
    logits, target = make(4, 6)
    logits[0, int(target[0]) - 1] = math.nan
    target[1] = -100
    output, _ = run(impl, logits, target, DM)
    assert output.loss.isnan()
    assert output.example_weight[1] == 0
    assert output.target_prob[1].isnan()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("classes", [2**16, 10**6])
def test_the_exponentials_of_a_long_row_add_up(impl, classes):
    """torch's softmax was off by 2e-6 for 2^16 classes and by 5e-4 for 10^7: it adds them up one after the other."""
    logits, target = make(2, classes, scale=0.5)
    check(*run(impl, logits, target, edf.CCE(), reduction="mean"), expected(logits, target, edf.CCE(), reduction="mean"))
