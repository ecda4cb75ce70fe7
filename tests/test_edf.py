"""EDFs as values, and their two torch forms against each other."""

import dataclasses
import pickle

import pytest
import torch
from batches import EMPHASES

from fused_dm import edf


@pytest.mark.parametrize("emphasis", EMPHASES, ids=str)
def test_text_round_trips(emphasis):
    assert edf.parse(str(emphasis)) == emphasis
    assert pickle.loads(pickle.dumps(emphasis)) == emphasis
    assert hash(edf.parse(str(emphasis))) == hash(emphasis)


def test_text():
    assert str(edf.DM(beta=8, lambd=0.5)) == "dm:beta=8,lambd=0.5"
    assert str(edf.DM(beta=1e-30, lambd=1 / 3)) == f"dm:beta=1e-30,lambd={1 / 3}"
    assert str(edf.CCE()) == "cce"
    assert edf.parse(" DM : lambd = 1 , beta=8 ") == edf.DM(beta=8, lambd=1)
    assert edf.parse("imae:t=4") == edf.IMAE(T=4)
    assert edf.parse("gce") == edf.GCE(q=0.7)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        edf.DM(beta=8, lambd=0.5).beta = 9


@pytest.mark.parametrize("emphasis", EMPHASES, ids=str)
def test_weight_and_log_weight_agree(emphasis):
    p = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    torch.testing.assert_close(emphasis.log_weight(p.log(), (1 - p).log()).exp(), emphasis.weight(p), rtol=1e-13, atol=0)


@pytest.mark.parametrize("emphasis", [emphasis for emphasis in EMPHASES if emphasis.has_loss], ids=str)
def test_weight_is_twice_p_q_times_the_slope_of_the_loss(emphasis):
    p = torch.linspace(0.01, 0.99, 99, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(emphasis.loss(p.log(), (1 - p).log()).sum(), p)
    with torch.no_grad():
        torch.testing.assert_close(2 * p * (1 - p) * slope.abs(), emphasis.weight(p), rtol=1e-12, atol=0)


def test_special_cases():
    p = torch.linspace(0, 1, 101, dtype=torch.float64)
    same = {"rtol": 1e-14, "atol": 0}
    torch.testing.assert_close(edf.Exponential(beta=3).weight(p), edf.DM(beta=3, lambd=0).weight(p), **same)
    torch.testing.assert_close(edf.IMAE(T=3).weight(p), edf.DM(beta=3, lambd=1).weight(p), **same)
    torch.testing.assert_close(edf.Uniform().weight(p), edf.DM(beta=0, lambd=1).weight(p), **same)
    torch.testing.assert_close(edf.GCE(q=1).weight(p), edf.MAE().weight(p), **same)


@pytest.mark.parametrize("emphasis", EMPHASES, ids=str)
def test_reported_value_at_the_ends(emphasis):
    log_p = torch.tensor([-torch.inf, 0.0], dtype=torch.float64)
    value = emphasis.loss(log_p, log_p.flip(0))
    assert not value.isnan().any()
    assert value[1] == 0
