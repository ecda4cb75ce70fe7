"""EDFs as values: text, algebra, EDFs of one's own, and `check`. Their mathematics is in test_edf_catalogue.py."""

import dataclasses
import functools
import math
import pickle
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from batches import CATALOGUE, COMPOSITIONS, EMPHASES, IMPLEMENTATIONS, device_of, make, run
from hypothesis import given, settings
from hypothesis import strategies as st
from test_edf_catalogue import PARAMETERS, of_kind
from test_operators import compiled_counter
from tolerance import check, expected

from fused_dm import DMLoss, dm_loss, edf
from fused_dm.edf._measure import measure

DM = edf.DM(beta=8, lambd=0.5)
EVERY = (*EMPHASES, *CATALOGUE, *COMPOSITIONS)
P = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ---- text


@pytest.mark.parametrize("emphasis", EVERY, ids=str)
def test_text_round_trips(emphasis):
    assert edf.parse(str(emphasis)) == emphasis
    assert edf.parse(str(emphasis).replace("+", " + ").upper()) == emphasis
    assert pickle.loads(pickle.dumps(emphasis)) == emphasis
    assert hash(edf.parse(str(emphasis))) == hash(emphasis)
    assert eval(repr(emphasis), vars(edf)) == emphasis


def pairs(kind, parts):
    return st.builds(lambda a, b: kind((a, b)), parts, parts)


TREES = st.recursive(
    st.one_of(*(of_kind(kind) for kind in PARAMETERS)),
    lambda parts: st.one_of(
        pairs(edf.Sum, parts),
        pairs(edf.Product, parts),
        st.builds(edf.Scaled, st.floats(1e-300, 1e300), parts),
        st.builds(edf.Truncated, parts, st.floats(0, 0.5), st.floats(0.5, 1, exclude_min=True)),
        st.builds(edf.Floored, parts, st.floats(1e-300, 1e300)),
    ),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(TREES)
def test_text_of_any_composition_round_trips(emphasis):
    assert edf.parse(str(emphasis)) == emphasis
    assert len(emphasis.params) == sum(len(part.params) for part in leaves(emphasis)) + numbers(emphasis)


def leaves(emphasis):
    if not isinstance(emphasis, edf.Composition):
        return [emphasis]
    return [leaf for member in emphasis.members for leaf in leaves(member)]


def numbers(emphasis):
    if not isinstance(emphasis, edf.Composition):
        return 0
    return len(emphasis.numbers) + sum(numbers(member) for member in emphasis.members)


def test_text():
    assert str(edf.DM(beta=8, lambd=0.5)) == "dm:beta=8,lambd=0.5"
    assert str(edf.DM(beta=1e-30, lambd=1 / 3)) == f"dm:beta=1e-30,lambd={1 / 3}"
    assert str(edf.CCE()) == "cce"
    assert edf.parse(" DM : lambd = 1 , beta=8 ") == edf.DM(beta=8, lambd=1)
    assert edf.parse("imae:t=4") == edf.IMAE(T=4)
    assert edf.parse("gce") == edf.GCE(q=0.7)
    assert edf.parse("taylorce:t=3").t == 3
    assert str(edf.TaylorCE(3)) == "taylorce:t=3"


def test_text_of_compositions():
    assert str(0.5 * edf.CCE() + 2 * edf.MAE()) == "0.5*cce+2*mae"
    assert edf.parse("0.5 * cce + 2 * mae") == 0.5 * edf.CCE() + 2 * edf.MAE()
    assert str(0.5 * edf.CCE() * (2 * edf.MAE())) == "1*cce*mae"
    assert str((edf.CCE() + edf.MAE()) * edf.MSE()) == "(cce+mae)*mse"
    assert str(edf.DM(beta=1e30, lambd=0) + edf.CCE()) == "dm:beta=1e+30,lambd=0+cce"
    assert str(edf.GCE(q=0.7).truncate(0.2, 0.9)) == "gce:q=0.7[0.2,0.9]"
    assert str(edf.MAE().floor(0.1)) == "max(mae,0.1)"
    assert edf.parse("max(dm:beta=8,lambd=0.5,0.1)") == DM.floor(0.1)
    assert edf.parse("(cce)") == edf.CCE()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"unknown EDF ''. Known: dm, "),
        ("cce+", r"unknown EDF ''. Known: dm, "),
        ("cce mae", r"unknown EDF 'cce mae'; did you mean"),
        ("cce)", r"EDF 'cce\)': expected the end or one of \+ \* \[ at position 3, got '\)'"),
        ("(cce", r"EDF '\(cce': expected '\)' at position 4, got the end"),
        ("2cce", r"EDF '2cce': expected a number for the factor, got '2cce'"),
        ("2*", r"unknown EDF ''. Known: dm, "),
        ("-1*cce", r"Scaled: expected factor > 0, got -1.0"),
        ("cce[0.2]", r"EDF 'cce\[0.2\]': expected ',' at position 7, got '\]'"),
        ("cce[0.9,0.2]", r"Truncated: expected 0 <= low < high <= 1, got low=0.9, high=0.2"),
        ("max(cce)", r"EDF 'max\(cce\)': expected ',' at position 7, got '\)'"),
        ("max(cce,x)", r"EDF 'max\(cce,x\)': expected a number for the floor, got 'x'"),
        ("focul:gamma=2", r"unknown EDF 'focul'; did you mean 'focal'\? Known: dm, .*selfpacedlinear"),
        ("gce:q", r"expected each of \(q\) at most once, got 'q'"),
    ],
)
def test_text_that_is_wrong(text, message):
    with pytest.raises(ValueError, match=message):
        edf.parse(text)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        edf.DM(beta=8, lambd=0.5).beta = 9
    with pytest.raises(dataclasses.FrozenInstanceError):
        (2 * edf.CCE()).factor = 3


def test_special_cases():
    p = torch.linspace(0, 1, 101, dtype=torch.float64)
    for one, other in (
        (edf.Exponential(beta=3), edf.DM(beta=3, lambd=0)),
        (edf.IMAE(T=3), edf.DM(beta=3, lambd=1)),
        (edf.Uniform(), edf.DM(beta=0, lambd=1)),
        (edf.GCE(q=1), edf.MAE()),
        (edf.DFT(), edf.MAE()),
        (edf.Focal(gamma=0), edf.CCE()),
        (edf.TaylorCE(t=1), edf.MAE()),
        (edf.PHuberCE(tau=1), edf.MAE()),
        (edf.AGCE(a=0, q=0.7), edf.GCE(q=0.7)),
        (edf.AUL(a=3, q=1), edf.MAE()),
        (edf.Poly1(eps=0), edf.CCE()),
        (edf.SCE(alpha=0.1, beta=2, A=3), 0.1 * edf.CCE() + 6 * edf.MAE()),
        (edf.TruncatedGCE(q=0.7, k=0.25), edf.GCE(q=0.7).truncate(0.25)),
        (edf.Beta(alpha=2, eta=3), 0.25 * edf.MSE()),
    ):
        torch.testing.assert_close(one.weight(p), other.weight(p), rtol=1e-14, atol=1e-30)
        if one.has_loss and other.has_loss and not isinstance(one, edf.DFT):
            log_p, log_q = P.log(), torch.log1p(-P)
            torch.testing.assert_close(one.loss(log_p, log_q), other.loss(log_p, log_q), rtol=1e-12, atol=0)


# ---- algebra


def test_sums_products_and_multiples():
    a, b, log_p, log_q = edf.CCE(), edf.GCE(q=0.5), P.log(), torch.log1p(-P)
    same = {"rtol": 1e-13, "atol": 0}
    for emphasis, weight, loss in (
        (a + b, a.weight(P) + b.weight(P), a.loss(log_p, log_q) + b.loss(log_p, log_q)),
        (a * b, a.weight(P) * b.weight(P), None),
        (3 * a, 3 * a.weight(P), 3 * a.loss(log_p, log_q)),
        (a * 3, 3 * a.weight(P), 3 * a.loss(log_p, log_q)),
        (a / 4, a.weight(P) / 4, a.loss(log_p, log_q) / 4),
        (a + DM, a.weight(P) + DM.weight(P), None),
        (a.floor(0.5), a.weight(P).clamp(min=0.5), None),
        (sum([a, b, DM]), a.weight(P) + b.weight(P) + DM.weight(P), None),
    ):
        torch.testing.assert_close(emphasis.weight(P), weight, **same)
        torch.testing.assert_close(emphasis.log_weight(log_p, log_q).exp(), weight, **same)
        assert emphasis.has_loss == (loss is not None)
        reported = -weight * log_p if loss is None else loss
        torch.testing.assert_close(emphasis.loss(log_p, log_q), reported, **same)


@pytest.mark.parametrize(
    ("low", "high"), [(0.5, 0.501), (0.5, 0.5 + 1e-9), (1e-9, 2e-9), (0, 1e-12), (1 - 1e-9, 1), (0.3, 0.3 + 1e-6), (0, 1)]
)
def test_intervals_that_are_narrow_are_measured(low, high):
    width = high - low
    # An edge is known to the rounding of its margin m: to |m| eps p q, and to the rounding of p.
    allowed = 4 * (1 - math.log(max(low, 1e-12))) * torch.finfo(torch.float64).eps * high
    one = edf.Uniform().truncate(low, high)
    assert one.integral == pytest.approx(width, abs=allowed + 1e-12 * width, rel=0)
    assert one.variance == pytest.approx(width - width**2, abs=allowed + 1e-12 * width, rel=0)
    assert low - allowed <= one.mode <= high + allowed
    truth = high**2 - low**2 - 2 * (high**3 - low**3) / 3  # of w = 2 p q
    assert edf.MAE().truncate(low, high).integral == pytest.approx(truth, abs=allowed * high + 1e-12 * truth, rel=0)
    twice = one + 3 * edf.Uniform().truncate(low / 2 + 0.4, low / 2 + 0.4 + width / 4)
    assert twice.integral == pytest.approx(1.75 * width, abs=4 * allowed + 1e-15 + 1e-12 * width, rel=0)


def test_truncation_holds_the_loss_constant():
    emphasis = edf.CCE().truncate(0.2, 0.7)
    inside = (P > 0.2) & (P <= 0.7)
    torch.testing.assert_close(emphasis.weight(P), torch.where(inside, edf.CCE().weight(P), 0))
    value = emphasis.loss(P.log(), torch.log1p(-P))
    torch.testing.assert_close(value, -P.clamp(0.2, 0.7).log(), rtol=1e-14, atol=0)
    ends = torch.tensor([-torch.inf, 0.0], dtype=torch.float64)
    torch.testing.assert_close(emphasis.loss(ends, ends.flip(0)), -torch.tensor([0.2, 0.7], dtype=torch.float64).log())
    assert (emphasis.log_weight(ends.clamp(min=-1e30), ends.flip(0).clamp(min=-1e30)) == -torch.inf).all()
    assert emphasis.integral == pytest.approx(0.8**2 - 0.3**2, rel=1e-12)
    assert emphasis.mode == pytest.approx(0.2, abs=1e-9)


def test_forms_are_normal():
    a, b, c = edf.CCE(), edf.MAE(), edf.MSE()
    assert (a + b) + c == a + (b + c) == edf.Sum((a, b, c))
    assert (a * b) * c == a * (b * c) == edf.Product((a, b, c))
    assert 2 * (3 * a) == 6 * a == edf.Scaled(6, a)
    assert (2 * a) * (3 * b) == edf.Scaled(6, a * b)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: edf.CCE() + 1, TypeError, "unsupported operand"),
        (lambda: edf.CCE() * "mae", TypeError, "can't multiply|unsupported operand"),
        (lambda: edf.CCE() * True, TypeError, "unsupported operand"),
        (lambda: edf.CCE() / 0, TypeError, "unsupported operand"),
        (lambda: edf.CCE() - edf.MAE(), TypeError, "unsupported operand"),
        (lambda: -2 * edf.CCE(), ValueError, r"Scaled: expected factor > 0, got -2.0"),
        (lambda: 0 * edf.CCE(), ValueError, r"Scaled: expected factor > 0, got 0.0"),
        (lambda: edf.CCE().floor(0), ValueError, r"Floored: expected least > 0, got 0.0"),
        (lambda: edf.CCE().truncate(-0.1), ValueError, r"Truncated: expected 0 <= low < high <= 1, got low=-0.1, high=1.0"),
        (lambda: edf.Sum((edf.CCE(),)), ValueError, r"Sum: expected two parts or more, got 1"),
        (lambda: edf.Product(()), ValueError, r"Product: expected two parts or more, got 0"),
        (lambda: edf.Sum((edf.CCE(), "mae")), TypeError, r"Sum: expected an EDF such as edf.CCE\(\), got 'mae'"),
        (lambda: edf.Scaled(2, edf.EDF()), TypeError, r"Scaled: expected an EDF such as edf.CCE\(\), got EDF\(\)"),
    ],
)
def test_wrong_algebra(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["sum_weight", "mean", "none"])
@pytest.mark.parametrize("emphasis", COMPOSITIONS, ids=str)
def test_compositions(impl, reduction, emphasis):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        batch = make(17, 20, dtype, seed=1, ignored=0.2)
        truth = expected(*batch, emphasis, reduction=reduction)
        check(*run(impl, *batch, emphasis, reduction=reduction), truth)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_rows_outside_of_a_truncation_have_no_gradient(impl):
    logits, target = make(50, 9, torch.float32, seed=3)
    output, dlogits = run(impl, logits, target, edf.CCE().truncate(0.3, 0.8), reduction="mean")
    outside = (output.target_prob <= 0.3) | (output.target_prob > 0.8)
    assert 0 < outside.sum() < 50
    assert (dlogits[outside] == 0).all()
    assert (output.example_weight[outside] == 0).all()
    assert (dlogits[~outside].abs().sum(1) > 0).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "emphasis", [edf.SelfPaced(threshold=0.01), edf.TruncatedGCE(q=0.7, k=0.999), edf.DM(8, 0.5).truncate(0.999)], ids=str
)
def test_a_batch_of_which_no_example_counts(impl, emphasis):
    logits, target = make(9, 9, torch.float32, margins=2.0)
    for reduction in ("sum_weight", "mean"):
        output, dlogits = run(impl, logits, target, emphasis, reduction=reduction)
        assert (dlogits == 0).all()
        assert (output.example_weight == 0).all()
        assert output.loss.isfinite()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("impl", ["cpu", "triton"])
@pytest.mark.parametrize("emphasis", [edf.Poly1(eps=2), edf.TaylorCE(t=6), edf.JS(pi=0.5), *COMPOSITIONS], ids=str)
def test_compiles_as_one_graph(impl, emphasis):
    logits, target = make(12, 30, ignored=0.2)
    device = device_of(impl)
    leaf = logits.to(device, copy=True).requires_grad_()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(logits, target):
        return dm_loss(logits, target, emphasis, impl=impl, return_output=True)

    output = compiled(leaf, target.to(device))
    output.loss.backward()
    check(output, leaf.grad, expected(logits, target, emphasis))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_compositions_of_many_values_compile_twice(impl):
    counter = compiled_counter()
    device = device_of(impl)
    logits, target = make(12, 30)

    @torch.compile(fullgraph=True, backend=counter)
    def step(logits, target, emphasis):
        return dm_loss(logits, target, emphasis, impl=impl)

    for beta in (1.0, 2.5, 4.0, 7.0, 9.5, 11.0, 12.0, 13.0, 14.0, 15.0):
        emphasis = (beta * edf.CCE() + edf.DM(beta=beta, lambd=0.5)).truncate(0.01 * beta, 0.9)
        loss = step(logits.to(device), target.to(device), emphasis)
        assert torch.equal(loss.cpu(), run(impl, logits, target, emphasis)[0].loss.detach().cpu())
    assert counter.frame_count <= 2


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_a_schedule_of_a_composition_compiles_once(impl):
    counter = compiled_counter()
    device = device_of(impl)
    criterion = DMLoss(0.0001 * edf.CCE() + edf.DM(beta=0, lambd=0.5), impl=impl).to(device)
    step = torch.compile(criterion, fullgraph=True, backend=counter)
    logits, target = make(12, 30)
    for beta in range(1, 12):
        emphasis = beta * edf.CCE() + edf.DM(beta=beta, lambd=0.5)
        criterion.set_emphasis(emphasis)
        loss = step(logits.to(device), target.to(device))
        assert torch.equal(loss.cpu(), run(impl, logits, target, emphasis)[0].loss.detach().cpu())
    assert counter.frame_count == 1
    assert "11*cce+dm:beta=11,lambd=0.5" in repr(criterion)
    with pytest.raises(ValueError, match=r"set_emphasis: expected an EDF of the family 'sum\(scaled\(cce\),dm\)', got cce\+dm"):
        criterion.set_emphasis(edf.CCE() + DM)


@pytest.mark.usefixtures("fresh_dynamo")
def test_names_of_compositions_in_compiled_code():
    logits, target = make(12, 30)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(logits, target):
        return dm_loss(logits, target, "0.5*cce + max(dm:beta=8,lambd=0.5[0.2,0.9],1e-3)")

    emphasis = 0.5 * edf.CCE() + edf.DM(8, 0.5).truncate(0.2, 0.9).floor(1e-3)
    assert torch.equal(compiled(logits, target), dm_loss(logits, target, emphasis))


# ---- EDFs of one's own: subclasses


@dataclasses.dataclass(frozen=True)
class Tilted(edf.DM):
    """DM times p: a base whose kernel knows nothing of it."""

    def log_weight(self, log_p, log_q):
        return super().log_weight(log_p, log_q) + log_p


@dataclasses.dataclass(frozen=True)
class Doubled(edf.GCE):
    """GCE counted twice, with its loss."""

    def log_weight(self, log_p, log_q):
        return super().log_weight(log_p, log_q) + 0.6931471805599453

    def loss(self, log_p, log_q):
        return -2 * torch.expm1(self.q * log_p) / self.q


@dataclasses.dataclass(frozen=True)
class Shouting(edf.CCE):
    """Cross entropy that reports another value."""

    def loss(self, log_p, log_q):
        return 1 - log_p


@dataclasses.dataclass(frozen=True)
class Half(edf.GCE):
    """Another weight: the f of GCE does not belong to it."""

    def log_weight(self, log_p, log_q):
        return self.q * log_p


@dataclasses.dataclass(frozen=True)
class Own(edf.EDF):
    """From the base class."""

    height: float = 3.0

    def log_weight(self, log_p, log_q):
        return self.height * torch.exp(log_p)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["sum_weight", "mean"])
@pytest.mark.parametrize(
    ("emphasis", "weight", "has_loss"),
    [
        (Tilted(beta=8, lambd=0.5), DM.weight(P) * P, False),
        (Doubled(q=0.7), 2 * edf.GCE().weight(P), True),
        (Shouting(), edf.CCE().weight(P), True),
        (Half(q=0.7), P**0.7, False),
        (Own(), torch.exp(3 * P), False),
        (Own() + edf.CCE(), torch.exp(3 * P) + 2 * (1 - P), False),
    ],
    ids=["tilted", "doubled", "shouting", "half", "own", "sum"],
)
def test_a_subclass_is_what_it_says_in_every_implementation(impl, reduction, emphasis, weight, has_loss):
    torch.testing.assert_close(emphasis.weight(P), weight, rtol=1e-12, atol=0)
    assert emphasis.has_loss == has_loss
    assert not emphasis.fused
    assert emphasis.structure is None
    for dtype in (torch.float64, torch.float32):
        batch = make(17, 20, dtype, seed=1, ignored=0.2)
        check(*run(impl, *batch, emphasis, reduction=reduction), expected(*batch, emphasis, reduction=reduction))
    if isinstance(emphasis, Doubled):
        # The inherited mode is not asked for its formula.
        assert emphasis.mode == pytest.approx(0.7 / 1.7, abs=1e-6)


def test_a_subclass_reports_its_own_loss():
    logits, target = make(17, 20, torch.float64)
    one = run("triton", logits, target, Shouting(), reduction="mean")[0].loss
    other = run("triton", logits, target, edf.CCE(), reduction="mean")[0].loss
    torch.testing.assert_close(one, other + 1)


def test_a_subclass_is_measured_by_its_own_weight():
    assert Tilted(beta=8, lambd=0.5).mode == pytest.approx(P[(DM.weight(P) * P).argmax()].item(), abs=0.01)


def test_a_subclass_needs_log_weight():
    with pytest.raises(TypeError, match=r"Odd: expected log_weight\(log_p, log_q\) beside weight\(p\)"):

        class Odd(edf.DM):
            def weight(self, p):
                return p

    class Empty(edf.EDF):
        pass

    with pytest.raises(TypeError, match=r"Empty: expected the class to define log_weight"):
        Empty().log_weight(P.log(), P.log())


def test_set_emphasis_refuses_what_the_buffer_cannot_say():
    criterion = DMLoss(DM)
    with pytest.raises(ValueError, match=r"set_emphasis: .*a log_weight or loss of its own: tilted:beta=8"):
        criterion.set_emphasis(Tilted(beta=8, lambd=0.5))
    with pytest.raises(ValueError, match=r"set_emphasis: .*a log_weight or loss of its own: tilted:beta=8"):
        DMLoss(Tilted(beta=8, lambd=0.5)).set_emphasis(DM)
    criterion.set_emphasis(edf.IMAE(T=3))
    assert criterion.emphasis_params.tolist() == [1e-6, 3, 1]


# ---- EDFs of one's own: registered


@triton.jit
def ridge_on_device(log_p, log_q, params_ptr):
    beta = tl.load(params_ptr).to(log_p.dtype)
    at = tl.load(params_ptr + 1).to(log_p.dtype)
    return -beta * tl.abs(tl.exp(log_p) - at)


@edf.register(triton=ridge_on_device)
def ridge(log_p, log_q, beta, at=0.5):
    """A ridge at one probability."""
    return -beta * (log_p.exp() - at).abs()


@triton.jit
def cube_on_device(log_p, log_q, params_ptr):
    return 1.791759469228055 + log_p + 3 * log_q


@triton.jit
def cube_loss_on_device(log_p, log_q, params_ptr):
    return tl.exp(3 * log_q)


def cube_loss(log_p, log_q):
    return torch.exp(3 * log_q)


@edf.register(triton=cube_on_device, loss=cube_loss, triton_loss=cube_loss_on_device)
def cube(log_p, log_q):
    return 1.791759469228055 + log_p + 3 * log_q


@edf.register
def unfused(log_p, log_q, beta=2.0):
    return beta * log_q


@triton.jit
def wrong_on_device(log_p, log_q, params_ptr):
    return log_p + 2 * log_q


@edf.register(triton=wrong_on_device)
def wrong(log_p, log_q):
    return 2 * log_p + log_q


@edf.register(triton=cube_on_device, loss=cube_loss, triton_loss=wrong_on_device)
def wrong_loss(log_p, log_q):
    return 1.791759469228055 + log_p + 3 * log_q


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["sum_weight", "mean", "none"])
@pytest.mark.parametrize("emphasis", [ridge(beta=4), cube(), unfused(), ridge(beta=4) + cube()], ids=str)
def test_registered(impl, reduction, emphasis):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        batch = make(17, 20, dtype, seed=1, ignored=0.2)
        truth = expected(*batch, emphasis, reduction=reduction)
        check(*run(impl, *batch, emphasis, reduction=reduction), truth)


def test_registered_ones_are_values_like_any_other():
    emphasis = ridge(beta=4)
    assert str(emphasis) == "ridge:beta=4,at=0.5"
    assert edf.parse("2*ridge:beta=4+cube") == 2 * emphasis + cube()
    assert pickle.loads(pickle.dumps(emphasis)) == emphasis
    assert emphasis.params == (4.0, 0.5)
    assert emphasis.mode == pytest.approx(0.5, abs=1e-9)
    assert ridge.__doc__ == "A ridge at one probability."
    assert ridge.family.startswith("test_edf.ridge:")
    assert (ridge(1).fused, cube().fused, unfused(1).fused) == (True, True, False)
    assert (ridge(1).has_loss, cube().has_loss, unfused(1).has_loss) == (False, True, False)
    with pytest.raises(ValueError, match=r"ridge: expected beta to be a finite number, got inf"):
        ridge(beta=float("inf"))
    with pytest.raises(ValueError, match=r"unknown EDF 'ridg'; did you mean 'ridge'"):
        edf.parse("ridg")


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("impl", ["cpu", "triton"])
@pytest.mark.parametrize("kind", [ridge, unfused], ids=["fused", "not fused"])
def test_registered_ones_are_scheduled_in_one_compile(impl, kind):
    counter = compiled_counter()
    device = device_of(impl)
    criterion = DMLoss(kind(beta=1), impl=impl).to(device)
    step = torch.compile(criterion, fullgraph=True, backend=counter)
    logits, target = make(12, 30)
    for beta in range(1, 12):
        criterion.set_emphasis(kind(beta=beta))
        loss = step(logits.to(device), target.to(device))
        assert torch.equal(loss.cpu(), run(impl, logits, target, kind(beta=beta))[0].loss.detach().cpu())
    assert counter.frame_count == 1


def test_a_changed_function_is_another_family():
    def first():
        @edf.register
        def changing(log_p, log_q):
            return log_p

        return changing

    def second():
        @edf.register
        def changing(log_p, log_q):
            return log_q

        return changing

    def redefined(function, name):
        function.__qualname__ = name
        return edf.register(function, name="changing2")

    one = redefined(lambda log_p, log_q: log_p, "changing")
    two = redefined(lambda log_p, log_q: log_q + 0, "changing")
    assert one.family != two.family
    assert type(edf.parse("changing2")) is two
    assert torch.equal(one().log_weight(P, 2 * P), P)
    first()
    with pytest.raises(ValueError, match=r"register: expected a name that is not taken, got 'changing' for test_edf"):
        second()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: edf.register(3), TypeError, r"expected log_weight to be a function of \(log_p, log_q, \*parameters\), got 3"),
        (lambda: edf.register(lambda log_p: log_p), TypeError, r"expected log_weight to take \(log_p, log_q, \*parameters\)"),
        (lambda: edf.register(lambda *logs: logs[0]), TypeError, r"expected log_weight to take \(log_p, log_q"),
        (lambda: edf.register(lambda p, q: p), ValueError, r"expected name to be an identifier, got '<lambda>'"),
        (lambda: edf.register(lambda p, q: p, name="cce"), ValueError, r"expected a name that is not taken, got 'cce'"),
        (lambda: edf.register(lambda p, q: p, name="max"), ValueError, r"expected a name that is not taken, got 'max'"),
        (lambda: edf.register(lambda p, q: p, name=5), ValueError, r"expected name to be an identifier, got 5"),
        (lambda: edf.register(torch.add, name="a"), TypeError, r"expected log_weight to take \(log_p, log_q, \*parameters\)"),
        (lambda: edf.register(lambda p, q: p, name="a", triton=len), TypeError, r"triton to be a @triton.jit function"),
        (
            lambda: edf.register(lambda p, q: p, name="a", loss=lambda p, q, r: p),
            TypeError,
            r"expected loss to take the parameters of log_weight, \[\]",
        ),
        (
            lambda: edf.register(lambda p, q: p, name="a", triton=cube_on_device, loss=lambda p, q: p),
            ValueError,
            r"expected loss and triton_loss, or neither",
        ),
        (
            lambda: edf.register(lambda p, q: p, name="a", triton_loss=cube_on_device),
            ValueError,
            r"expected a triton form of the weight beside triton_loss",
        ),
    ],
)
def test_wrong_registrations(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_family_of_another_process_is_named_in_the_error():
    from fused_dm import _operators

    logits, target = make(3, 5)
    params = torch.zeros(1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"expected a family that is registered in this process, got 'other.edf:0123'"):
        _operators.triton_loss(logits, target, None, None, params, None, "other.edf:0123", -100)


def test_a_family_registered_anew_is_the_new_one(monkeypatch):
    from fused_dm.edf._custom import DEVICE_FORMS

    batch, emphasis = make(7, 10), ridge(beta=4)
    check(*run("triton", *batch, emphasis, eps=0.0), expected(*batch, emphasis, eps=0.0))
    monkeypatch.setitem(DEVICE_FORMS, emphasis.family, (wrong_on_device, None))
    truth = expected(*batch, lambda log_p, log_q: log_p + 2 * log_q, eps=0.0)
    check(*run("triton", *batch, emphasis, eps=0.0), truth)


# ---- check


@pytest.mark.parametrize("emphasis", [*CATALOGUE, *COMPOSITIONS, ridge(beta=4), cube(), unfused(), Own()], ids=str)
def test_check_finds_nothing_wrong(emphasis):
    report = edf.check(emphasis)
    assert report.compared == emphasis.fused
    assert str(emphasis) in str(report)
    assert report.words in str(report)
    derived = not isinstance(emphasis, (edf.DFT, edf.SelfPacedLinear))
    assert any("not the derivative" in note for note in report.notes) == (not derived)


def with_loss(loss):
    return edf.register(lambda log_p, log_q: math.log(2) + log_q, loss=loss, name="with_loss")()


def two_bumps(log_p, log_q):
    p = log_p.exp()
    return torch.logaddexp(-(((p - 0.25) / 0.05) ** 2), -(((p - 0.75) / 0.05) ** 2))


def test_check_in_words():
    words = edf.check(edf.CCE()).words
    assert words.startswith(
        "Hard examples count most. An example at p = 0.05 has 95 % of the largest weight, one at p = 0.5 (middling) 50 % and "
        "one at p = 0.95 (easy) 5 %. The weight is largest at p = 0."
    )
    assert words.endswith("(p = 1e-9), count most; fitted ones (1 - p = 1e-9) do not count.")
    assert edf.check(edf.Exponential(beta=-3)).words.startswith("Easy examples count most.")
    assert "keep 4.6 % of the largest weight" in edf.check(DM).words
    assert "(p = 1e-9), keep 86 % of the largest weight" in edf.check(edf.GCE(q=0.01)).words
    for low, high in ((0.6, 0.9), (0.1, 0.4)):
        narrow = edf.check(edf.CCE().truncate(low, high)).words
        assert narrow.startswith(
            "Examples at p = 0.05 (hard) and at p = 0.5 (middling) and at p = 0.95 (easy) do not count, others do. The weight "
            f"is largest at p = {low}. Hopeless examples, which wrong labels are (p = 1e-9), do not count;"
        )
    assert edf.check(edf.Uniform().truncate(0.1, 0.2) * edf.Uniform().truncate(0.3, 0.4)).words == "No example counts."
    assert edf.check(edf.Uniform()).words == "Hard, middling and easy examples count alike."
    assert edf.check(lambda log_p, log_q: 0.0001 * log_q.exp()).words == "Hard, middling and easy examples count alike."
    notes = edf.check(edf.Beta(alpha=0.5, eta=2)).notes
    assert notes == ("w is infinite at p = 0: such an example outweighs the rest of its batch.",)
    assert "log w reaches 200: in fp32 it overflows" in str(edf.check(edf.Exponential(beta=200)))


def test_check_measures_examples_by_the_largest_weight():
    """Wherever that is: the three that are named need not be near it."""
    w = [two_bumps(p.log(), torch.log1p(-p)).exp() for p in torch.tensor([0.05, 0.5, 0.95, 0.25], dtype=torch.float64)]
    hard, middling, easy = (f"{100 * value / w[3]:.3g} %" for value in w[:3])
    assert edf.check(two_bumps).words.startswith(
        f"Examples near p = 0.25 count most. Of their weight, one at p = 0.05 (hard) has {hard}, one at p = 0.5 (middling) has "
        f"{middling} and one at p = 0.95 (easy) has {easy}. The weight is largest at p = 0.25, with another peak at p = 0.75. "
    )
    assert "another peak" not in edf.check(edf.GCE(q=0.7)).words
    of_one_height = edf.check(lambda p, q: two_bumps(p, q) + torch.where(p.exp() > 0.5, 1e-15, 0.0)).words
    assert "The weight is largest at p = 0.25, with another peak at p = 0.75. " in of_one_height
    inside = edf.check(lambda log_p, log_q: -(log_p.exp() - 0.5).abs().log()).words
    assert inside == "The weight is infinite at p = 0.5: beside such an example no other counts."
    pole = edf.check(edf.Beta(alpha=0.5, eta=2)).words
    assert pole.startswith("Examples near p = 0 count most.")
    assert "(p = 1e-9), count most" in pole


@pytest.mark.parametrize("emphasis", [*CATALOGUE, *COMPOSITIONS, ridge(beta=4), cube(), unfused(), Own()], ids=str)
def test_check_has_no_note_without_a_reason(emphasis):
    """About digits, other examples or a small weight."""
    notes = edf.check(emphasis).notes
    assert not [note for note in notes if "digits" in note or "second call" in note or "computed with" in note]
    assert not [note for note in notes if "1e-8" in note]


@pytest.mark.parametrize(
    ("emphasis", "note"),
    [
        (lambda p, q: torch.log(2 * (1 - p.exp())), r"in fp32, .* log w has lost its digits at p = 1, 1 - p = .*log_q is log"),
        (lambda p, q: torch.randn_like(p), "a second call gave the same p other weights"),
        (lambda p, q: p - p[-10:].mean(), "the weight of an example depends on which others it is computed with"),
        (lambda p, q: torch.log_softmax(q, 0), "the weight of an example depends on which others it is computed with"),
        (lambda p, q: -20 - (p.exp() - 0.5) ** 2, r'the largest log w is -20: under "sum_weight" the 1e-8 that is added'),
        (edf.Beta.from_mode(0.3, 60), r"the largest log w is -35.4"),
        (lambda p, q: p.sort().values, "the weight of an example depends on which others it is computed with"),
        (lambda p, q: q * 2 if (p < -5).any() else q, "the weight of an example depends on which others"),
        (lambda p, q: q + len(q) if len(q) < 10 else q, "the weight of an example depends on which others"),
        (
            lambda p, q: -(p.exp() - 0.5).abs().log(),
            "w is infinite within \\(0, 1\\): the loss of a batch with such an example is nan",
        ),
        (
            edf.register(lambda p, q: q, loss=lambda p, q: torch.where(p < -25, p, -p), name="turns")(),
            "f rises with p at p = 1.8e-35",
        ),
        (edf.register(lambda p, q: q, loss=lambda p, q: p, name="climbs")(), "f rises with p at p = 1.8e-35"),
    ],
    ids=[
        "cancels",
        "random",
        "mean",
        "softmax",
        "small",
        "narrow",
        "sorts",
        "any",
        "length",
        "pole",
        "turns",
        "climbs",
    ],
)
def test_check_notes(emphasis, note):
    assert re.search(note, "\n".join(edf.check(emphasis).notes))


def test_check_calls_a_constant_finite():
    (note,) = edf.check(lambda log_p, log_q: 0 * log_p + 1000).notes
    assert note == "log w reaches 1e+03: in fp32 it overflows, unless what divides it is as large."


def test_functions_of_rows_alone():
    """A loss gives them (N,), and so do `check` and `plot`."""

    def one_dimensional(log_p, log_q):
        (rows,) = log_p.shape
        return log_q.new_ones(rows) * log_q

    for emphasis in (one_dimensional, edf.register(one_dimensional)()):
        assert edf.check(emphasis).words.startswith("Hard examples count most.")
        assert len(edf.plot(emphasis).axes[0].get_lines()) == 2
    assert emphasis.integral == pytest.approx(0.5)


def test_check_allows_a_network_its_rounding():
    """Sums in fp32 are rounded otherwise for another number of rows."""
    notes = edf.check(lambda log_p, log_q: log_q.float() * (1 + 1e-6 * len(log_q) / 83)).notes
    assert not [note for note in notes if "others" in note]


@pytest.mark.parametrize("loss", [lambda p, q: torch.zeros_like(p), lambda p, q: -p.detach()], ids=["constant", "detached"])
def test_check_of_an_f_without_a_derivative(loss):
    assert "the gradient is not the derivative of the reported f" in str(edf.check(with_loss(loss)))


def test_check_of_an_f_that_changes_its_arguments():
    with pytest.raises(ValueError, match="expected loss to leave log_p and log_q as they are"):
        edf.check(with_loss(lambda log_p, log_q: log_q.exp_()))


@pytest.mark.parametrize(
    ("emphasis", "error", "message"),
    [
        (wrong(), ValueError, r"wrong: the two forms disagree: at p = .* log w = .* and the Triton form"),
        (wrong_loss(), ValueError, r"wrong_loss: the two forms disagree: at p = .* has f = .* and the Triton form"),
        (lambda p, q: (p.exp() - 0.5).log(), ValueError, r"expected log w to be a number, got nan at p = 0 .*negative there"),
        (lambda p, q: 1.0, ValueError, r"expected log_weight to return a float tensor of shape \(83,\), got 1.0"),
        (lambda p, q: p.sum(), ValueError, r"expected log_weight to return a float tensor of shape \(83,\), got torch.float64"),
        (lambda p, q: p > q, ValueError, r"expected log_weight to return a float tensor .* got torch.bool"),
        (with_loss(lambda p, q: p * math.nan), ValueError, r"expected f to be a number, got nan at p = 0"),
        (with_loss(lambda p, q: -p.exp() * p), ValueError, r"got nan at p = 0 .* is it 0 times an infinite log"),
        (with_loss(lambda p, q: (-p)[:3]), ValueError, r"expected loss to return a float tensor of shape \(83,\), got"),
        (with_loss(lambda p, q: 0.0), ValueError, r"expected loss to return a float tensor of shape \(83,\), got 0.0"),
        (3, TypeError, r"check: expected an EDF or a function log_weight\(log_p, log_q\), got 3"),
        (edf.CCE, TypeError, r"check: expected an EDF or a function log_weight\(log_p, log_q\), got <class"),
        (edf.EDF(), TypeError, r"check: expected an EDF or a function"),
    ],
    ids=[
        "weight",
        "loss",
        "nan",
        "number",
        "shape",
        "dtype",
        "f nan",
        "f nan at 0",
        "f's shape",
        "f a number",
        "type",
        "class",
        "base",
    ],
)
def test_check_finds(emphasis, error, message):
    with pytest.raises(error, match=message):
        edf.check(emphasis)


def test_functions_that_their_source_does_not_tell_apart():
    """Made by one function, or on one line."""

    def power(exponent):
        def log_weight(log_p, log_q):
            return exponent * log_q

        return log_weight

    p = torch.tensor([0.25, 0.5], dtype=torch.float64)
    weak, strong = edf.register(power(1.0), name="weak_power"), edf.register(power(5.0), name="strong_power")
    flat, cube = edf.register(lambda p, q: 0 * p, name="flat_one"), edf.register(lambda p, q: 3 * p, name="cube_one")
    for kind, exact in ((weak, 1 - p), (strong, (1 - p) ** 5), (flat, torch.ones_like(p)), (cube, p**3)):
        torch.testing.assert_close(kind().weight(p), exact)
        logits = torch.stack([p.logit(), torch.zeros_like(p)], 1)
        output = dm_loss(logits, torch.zeros(2, dtype=torch.long), kind(), reduction="sum", return_output=True)
        torch.testing.assert_close(output.example_weight, exact)
    again = edf.register(power(2.0), name="weak_power")
    torch.testing.assert_close(again().weight(p), (1 - p) ** 2)
    torch.testing.assert_close(weak().weight(p), 1 - p)


@pytest.mark.parametrize(
    ("function", "name", "error", "message"),
    [
        (lambda p, q: q, "v1e", ValueError, "expected name not to end as a number does before its exponent, got 'v1e'"),
        (lambda p, q, mode=1.0: q, "bump", ValueError, r"expected parameters that no EDF has an attribute for.*\['mode'\]"),
        (lambda p, q, a=1.0, A=2.0: q, "bump", ValueError, r"no two alike, got \['a', 'A'\]"),
        (functools.partial(torch.add), "bump", TypeError, "expected log_weight to be a function"),
    ],
)
def test_what_cannot_be_registered(function, name, error, message):
    with pytest.raises(error, match=message):
        edf.register(function, name=name)


def test_a_function_that_changes_its_arguments_is_not_sound():
    with pytest.raises(ValueError, match="expected log_weight to leave log_p and log_q as they are"):
        edf.check(lambda log_p, log_q: log_p.mul_(2))


def test_a_weight_that_is_nowhere_smooth_is_measured():
    """In fp32, whose steps no bisection ends at."""
    rough = measure(lambda log_p, log_q: (5 * (log_p.float() + log_q.float()).exp()).double())
    smooth = measure(lambda log_p, log_q: 5 * (log_p + log_q).exp())
    # The weight's own error: that of its logarithm, up to 5 / 4, by two roundings and an exponential.
    assert abs(math.expm1(rough.log_integral - smooth.log_integral)) < 8 * torch.finfo(torch.float32).eps


# ---- Numbers, subclasses, pictures


def test_numbers_of_numpy_are_numbers():
    assert edf.DM(np.float32(8), np.int64(1)) == edf.DM(beta=8, lambd=1) == edf.DM(np.float64(8), Fraction(1))
    assert edf.DM.from_mode(np.float32(0.5), np.int64(50)).mode == pytest.approx(0.5)
    for wrong in (np.bool_(True), np.float32("nan"), np.float32("inf"), 10**400, Fraction(10**400), "8", None, 1j):
        with pytest.raises(ValueError, match="DM: expected beta to be a finite number"):
            edf.DM(beta=wrong, lambd=0)


class Undeclared(edf.EDF):
    """Equal to any other of its class, as it has no fields."""

    def __init__(self, power):
        object.__setattr__(self, "power", power)

    def log_weight(self, log_p, log_q):
        return self.power * log_p


@pytest.mark.parametrize(
    "use",
    [
        lambda emphasis: emphasis.integral,
        lambda emphasis: emphasis.mode,
        edf.check,
        lambda emphasis: dm_loss(torch.zeros(2, 3), torch.tensor([0, 1]), emphasis),
        DMLoss,
    ],
    ids=["integral", "mode", "check", "dm_loss", "DMLoss"],
)
def test_a_subclass_whose_attributes_are_no_fields(use):
    with pytest.raises(TypeError, match=r"Undeclared: expected a class decorated by .*\['power'\] that are no fields"):
        use(Undeclared(2))
    for composed in (Undeclared(2) + edf.CCE(), 2 * Undeclared(2), Undeclared(2).truncate(0, 0.5), Undeclared(2).floor(0.1)):
        with pytest.raises(TypeError, match="Undeclared: expected a class decorated"):
            use(composed)
    decorated = dataclasses.make_dataclass("Declared", [("power", float)], bases=(Undeclared,), frozen=True)
    assert decorated(1.0).integral == pytest.approx(0.5)
    assert decorated(9.0).integral == pytest.approx(0.1)


def test_a_subclass_may_keep_what_it_has_computed():
    class Table(edf.EDF):
        @functools.cached_property
        def table(self):
            return torch.linspace(-1, 0, 11)

        def log_weight(self, log_p, log_q):
            return self.table[(10 * log_p.exp()).long()].to(log_p)

    emphasis, (logits, target) = Table(), make(5, 7)
    assert dm_loss(logits, target, emphasis) == dm_loss(logits, target, emphasis)
    assert emphasis.mode == pytest.approx(1)


def test_the_interval_from_0_begins_with_0():
    emphasis = edf.Uniform().truncate(0, 0.5)
    assert emphasis.weight(torch.tensor([0.0, 0.25, 0.5, 0.75])).tolist() == [1, 1, 1, 0]
    logits, target = torch.tensor([[-torch.inf, 0.0], [0.0, 0.0], [5.0, 0.0]]), torch.zeros(3, dtype=torch.int64)
    for impl in IMPLEMENTATIONS:
        output, _ = run(impl, logits, target, emphasis, reduction="sum")
        assert output.example_weight.tolist() == [1, 1, 0]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda log_p, log_q: 0.0, r"expected log_weight to return a tensor of shape \(4,\), got float"),
        (lambda log_p, log_q: log_p.sum(), r"expected log_weight to return a tensor of shape \(4,\), got \(\)"),
        (lambda log_p, log_q: log_p < -1, r"expected log_weight to return a float tensor, got torch.bool"),
        (lambda log_p, log_q: log_p.long(), r"expected log_weight to return a float tensor, got torch.int64"),
        (lambda log_p, log_q: log_p * 1j, r"expected log_weight to return a float tensor, got torch.complex64"),
    ],
    ids=["number", "shape", "bool", "int", "complex"],
)
def test_what_a_function_may_not_return(impl, function, message):
    logits, target = make(4, 5)
    for emphasis in (function, function_as_subclass(function)):
        with pytest.raises(ValueError, match=message):
            run(impl, logits, target, emphasis)


def function_as_subclass(function):
    return type("OfFunction", (edf.EDF,), {"log_weight": lambda self, log_p, log_q: function(log_p, log_q)})()


def test_a_name_is_no_mathematics(tmp_path):
    def priced(log_p, log_q):
        return log_q

    priced.__name__ = "from $1^ to $2"
    edf.plot(priced, path=tmp_path / "priced.png")
    assert (tmp_path / "priced.png").stat().st_size > 1000


def test_plot_draws_what_one_has_designed(tmp_path):
    pytest.importorskip("matplotlib")
    table = torch.linspace(0, 1, 11)
    figure = edf.plot(
        "gce:q=0.7",
        DM,
        unfused(),
        two_bumps,
        lambda log_p, log_q: table[(10 * log_p.exp()).long()].log(),
        path=tmp_path / "a.svg",
    )
    assert (tmp_path / "a.svg").stat().st_size > 1000
    names = [text.get_text().replace("\n", "") for axes in figure.axes for text in axes.texts]
    for name in ("gce:q=0.7", str(DM), str(unfused()), "two_bumps", "<lambda>"):
        assert name in names
    curve = figure.axes[0].get_lines()[6]
    assert max(curve.get_ydata()) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: edf.plot(), ValueError, "plot: expected one EDF at least"),
        (lambda: edf.plot("ccee"), ValueError, "unknown EDF 'ccee'; did you mean 'cce'"),
        (lambda: edf.plot(3), TypeError, r"plot: expected EDFs, their names or functions log_weight\(log_p, log_q\), got 3"),
        (lambda: edf.plot(edf.CCE), TypeError, "plot: expected EDFs, their names or functions"),
        (lambda: edf.plot(edf.EDF()), TypeError, "plot: expected EDFs, their names or functions"),
        (lambda: edf.plot("cce", path="."), ValueError, "plot: expected path to be a file to write, got the folder '.'"),
        (lambda: edf.plot(lambda p, q: 0.0), ValueError, r"expected log_weight to return a tensor of shape \(\d+,\), got 0.0"),
        (lambda: edf.plot(lambda p, q: p[:3]), ValueError, r"expected log_weight to return a tensor .* got shape \(3,\)"),
        (lambda: edf.parse(3), TypeError, "parse: expected text such as 'dm:beta=8,lambd=0.5', got 3"),
    ],
)
def test_what_cannot_be_drawn_or_read(call, error, message):
    with pytest.raises(error, match=message):
        call()
