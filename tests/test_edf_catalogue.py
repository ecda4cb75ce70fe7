"""The mathematics of every EDF: its forms against each other, against the published formulas, and its loss's derivative."""

import math
import sys
import types
import unittest

import mpmath  # comes with torch, by way of sympy
import numpy as np
import pytest
import torch
from batches import CATALOGUE, EMPHASES, IMPLEMENTATIONS, device_of, make, run
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import PARAMETERS, between, from_breaks, of_kind
from tolerance import check, compare, expected

import fused_dm
from fused_dm import dm_loss, edf, reference

EVERY = (*EMPHASES, *CATALOGUE)
WITH_LOSS = tuple(emphasis for emphasis in EVERY if emphasis.has_loss)
# Their reported value holds a factor constant by definition.
DETACHED = (edf.DFT, edf.SelfPacedLinear)
REPEATABLE = settings(max_examples=10, deadline=None, derandomize=True)


def rows_with(margins, classes, seed, dtype=torch.float64):
    """Logits whose rows have these margins, up to rounding, and labels."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(margins), classes, generator=generator, dtype=torch.float64) * 3
    target = torch.randint(classes, (len(margins),), generator=generator)
    lse = logits.scatter(1, target[:, None], -math.inf).logsumexp(1)
    logits.scatter_(1, target[:, None], (lse + margins)[:, None])
    return logits.to(dtype), target


def interpreted_infinities():
    """The interpreter computes with numpy, which warns of the infinities that are meant: S, or -log p."""
    return np.errstate(over="ignore", invalid="ignore")


def test_every_edf_is_tested():
    assert set(PARAMETERS) == set(edf.CATALOGUE)
    assert {type(emphasis) for emphasis in EVERY} == set(edf.CATALOGUE)


# ---- the published formulas, in 60 digits


def published(emphasis):
    """w and f as functions of p and q, numbers of mpmath; f is None where there is none."""
    v = {name: mpmath.mpf(value) for name, value in vars(emphasis).items()}
    exp, log = mpmath.exp, mpmath.log
    rest = 1 - v.get("pi", 0)
    z = -rest * log(rest) if rest < 1 else 1

    def step(condition, value):
        return value if condition else mpmath.mpf(0)

    def power(t, q):
        return sum(q**i / i for i in range(1, int(t) + 1))

    def m(p):
        return v["pi"] + rest * p

    table = {
        edf.DM: (lambda p, q: exp(v["beta"] * p ** v["lambd"] * q), None),
        edf.Exponential: (lambda p, q: exp(v["beta"] * q), None),
        edf.Normal: (lambda p, q: exp(-v["beta"] * p * (p - 2 * v["psi"])), None),
        edf.Beta: (lambda p, q: p ** (v["alpha"] - 1) * q ** (v["eta"] - 1), None),
        edf.Uniform: (lambda p, q: mpmath.mpf(1), None),
        edf.IMAE: (lambda p, q: exp(v["T"] * p * q), None),
        edf.CCE: (lambda p, q: 2 * q, lambda p, q: -log(p)),
        edf.MAE: (lambda p, q: 2 * p * q, lambda p, q: q),
        edf.MSE: (lambda p, q: 4 * p * q**2, lambda p, q: q**2),
        edf.GCE: (lambda p, q: 2 * p ** v["q"] * q, lambda p, q: (1 - p ** v["q"]) / v["q"]),
        edf.TruncatedGCE: (
            lambda p, q: step(p > v["k"], 2 * p ** v["q"] * q),
            lambda p, q: (1 - max(p, v["k"]) ** v["q"]) / v["q"],
        ),
        edf.DFT: (lambda p, q: 2 * p * q, lambda p, q: -p * log(p)),
        edf.Focal: (
            lambda p, q: 2 * q ** v["gamma"] * (q - v["gamma"] * p * log(p)),
            lambda p, q: -(q ** v["gamma"]) * log(p),
        ),
        edf.SCE: (
            lambda p, q: 2 * q * (v["alpha"] + v["beta"] * v["A"] * p),
            lambda p, q: -v["alpha"] * log(p) + v["beta"] * v["A"] * q,
        ),
        edf.TaylorCE: (lambda p, q: 2 * q * (1 - q ** v["t"]), lambda p, q: power(v["t"], q)),
        edf.Poly1: (lambda p, q: 2 * q * (1 + v["eps"] * p), lambda p, q: -log(p) + v["eps"] * q),
        edf.PHuberCE: (
            lambda p, q: 2 * q * min(1, v["tau"] * p),
            lambda p, q: -log(p) if p > 1 / v["tau"] else -v["tau"] * p + log(v["tau"]) + 1,
        ),
        edf.AUL: (
            lambda p, q: 2 * p * q * (v["a"] - p) ** (v["q"] - 1),
            lambda p, q: ((v["a"] - p) ** v["q"] - (v["a"] - 1) ** v["q"]) / v["q"],
        ),
        edf.AGCE: (
            lambda p, q: 2 * p * q * (v["a"] + p) ** (v["q"] - 1),
            lambda p, q: ((v["a"] + 1) ** v["q"] - (v["a"] + p) ** v["q"]) / v["q"],
        ),
        edf.AEL: (lambda p, q: 2 / v["a"] * p * q * exp(-p / v["a"]), lambda p, q: exp(-p / v["a"])),
        edf.JS: (
            lambda p, q: 2 * rest / z * p * q * log(1 + v["pi"] / (rest * p)),
            lambda p, q: (-m(p) * log(m(p)) + rest * (p * log(p) - q * log(rest))) / z,
        ),
        edf.SelfPaced: (
            lambda p, q: step(-log(p) < v["threshold"], 2 * q),
            lambda p, q: min(-log(p), v["threshold"]),
        ),
        edf.SelfPacedLinear: (
            lambda p, q: 2 * q * max(0, 1 + log(p) / v["threshold"]),
            lambda p, q: -max(0, 1 + log(p) / v["threshold"]) * log(p),
        ),
    }
    return table[type(emphasis)]


@pytest.mark.parametrize("emphasis", EVERY, ids=str)
def test_torch_form_is_the_published_formula(emphasis):
    """From p = 1e-300 to q = 1e-300: what the reference computes in fp64, and so the truth of every other test."""
    with mpmath.workdps(700):
        weight, loss = published(emphasis)
        decades = [-300, -100, -30, -12, -6, -3, -1]
        ps = [mpmath.mpf(10) ** d for d in decades] + [mpmath.mpf(i) / 16 for i in range(3, 14)]
        ps += [1 - mpmath.mpf(10) ** d for d in decades]
        log_p = torch.tensor([float(mpmath.log(p)) for p in ps], dtype=torch.float64)
        log_q = torch.tensor([float(mpmath.log(1 - p)) for p in ps], dtype=torch.float64)
        log_w = [mpmath.log(w) if (w := weight(p, 1 - p)) else mpmath.mpf("-inf") for p in ps]
        exact = torch.tensor([float(value) for value in log_w], dtype=torch.float64)
        got = emphasis.log_weight(log_p, log_q)
        # log p is rounded: relative to 1 + |log w|, times its factor in log w.
        allowed = 1e-13 * (1 + exact.abs())
        assert ((got == exact) | ((got - exact).abs() <= allowed)).all(), (got - exact) / allowed
        if loss is not None:
            exact = torch.tensor([float(loss(p, 1 - p)) for p in ps], dtype=torch.float64)
            got = emphasis.loss(log_p, log_q)
            allowed = 1e-12 * exact.abs()
            assert ((got == exact) | ((got - exact).abs() <= allowed)).all(), (got - exact) / allowed


@pytest.mark.parametrize("emphasis", EVERY, ids=str)
def test_torch_form_leaves_its_arguments_alone_and_returns_another_tensor(emphasis):
    """The implementations use their memory again."""
    given = torch.tensor([-3.0, -0.5, -0.01]), torch.tensor([-0.05, -0.9, -4.6])
    for function in filter(None, emphasis.forms):
        for params in (emphasis.params, torch.tensor(emphasis.params, dtype=torch.float64).unbind()):
            log_p, log_q = (tensor.clone() for tensor in given)
            found = function(log_p, log_q, *params)
            assert torch.equal(log_p, given[0])
            assert torch.equal(log_q, given[1])
            assert found.untyped_storage().data_ptr() not in (
                log_p.untyped_storage().data_ptr(),
                log_q.untyped_storage().data_ptr(),
            )


@pytest.mark.parametrize("emphasis", EVERY, ids=str)
def test_weight_and_log_weight_agree(emphasis):
    p = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    torch.testing.assert_close(emphasis.log_weight(p.log(), torch.log1p(-p)).exp(), emphasis.weight(p), rtol=1e-12, atol=0)


@pytest.mark.parametrize("emphasis", EVERY, ids=str)
def test_reported_value_at_the_ends(emphasis):
    log_p = torch.tensor([-torch.inf, 0.0], dtype=torch.float64)
    value = emphasis.loss(log_p, log_p.flip(0))
    assert not value.isnan().any()
    assert value[1] == (math.exp(-1 / emphasis.a) if isinstance(emphasis, edf.AEL) else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("beta", "value"), [(-1000, 0.0), (-700, math.inf)])
def test_reported_value_at_probability_zero(dtype, beta, value):
    """A weight of exp(-700) is not 0, though fp32 does not hold it."""
    ends = torch.tensor([-torch.inf, 0.0], dtype=dtype)
    assert edf.DM(beta=beta, lambd=0).loss(ends, ends.flip(0)).tolist() == [value, 0]


# ---- the gradient is the derivative of the loss


@pytest.mark.parametrize("kind", [kind for kind in edf.CATALOGUE if kind not in DETACHED], ids=lambda kind: kind.__name__)
def test_numerical_gradient_of_the_loss(kind):
    """Central differences of order 4, whose own rounding is 18 eps |f| / (12 step) = 3e-13 |f|."""

    @REPEATABLE
    @given(emphasis=of_kind(kind), classes=st.integers(2, 4), seed=st.integers(0, 2**31))
    def verify(emphasis, classes, seed):
        margins = torch.tensor([-6, -3, -1, 0.5, 2, 5], dtype=torch.float64)
        margins = margins[from_breaks(emphasis, margins) > 0.01]
        logits, target = rows_with(margins, classes, seed)
        step = 1e-3
        moves = step * torch.eye(classes, dtype=torch.float64)
        shifted = torch.stack([logits[:, None, :] + factor * moves for factor in (-2, -1, 1, 2)])  # (4, N, V, V)
        labels = target[None, :, None].expand(4, -1, classes).reshape(-1)
        for impl in IMPLEMENTATIONS:
            device = device_of(impl)
            f = dm_loss(shifted.reshape(-1, classes).to(device), labels.to(device), emphasis, reduction="none", impl=impl)
            f = f.cpu().reshape(4, *logits.shape)
            numerical = (f[0] - 8 * f[1] + 8 * f[2] - f[3]) / (12 * step)
            output, dlogits = run(impl, logits, target, emphasis, reduction="none")
            norm = output.example_weight.cpu()[:, None]
            rounding = 1e-12 * f.abs().amax(0)
            assert ((numerical - dlogits.cpu()).abs() <= 1e-6 * norm + rounding).all(), emphasis

    if kind in {type(emphasis) for emphasis in WITH_LOSS}:
        verify()
    else:
        assert not any(emphasis.has_loss for emphasis in EVERY if type(emphasis) is kind)


def gradient_of(loss, logits):
    leaf = logits.clone().requires_grad_()
    loss(leaf).sum().backward()
    return leaf.grad


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("emphasis", "eager"),
    [
        (edf.DFT(), lambda p: -p.detach() * p.log()),
        (edf.MAE(), lambda p: -p.detach() * p.log()),
        (edf.GCE(q=0.7), lambda p: (1 - p**0.7) / 0.7),
        (edf.Focal(gamma=2), lambda p: -((1 - p) ** 2) * p.log()),
        (edf.CCE() * edf.Beta(alpha=1, eta=3), lambda p: -((1 - p) ** 2).detach() * p.log()),
        (edf.SelfPacedLinear(threshold=2), lambda p: -(1 + p.log() / 2).clamp(min=0).detach() * p.log()),
        (0.1 * edf.CCE() + 4 * edf.MAE(), lambda p: -0.1 * p.log() + 4 * (1 - p)),
    ],
    ids=lambda value: str(value) if isinstance(value, edf.EDF) else "",
)
def test_gradient_of_the_eager_loss(impl, emphasis, eager):
    """Autograd of the loss as it would be written; the detached ones among them."""
    logits, target = make(20, 7, torch.float64, margins=5.0)
    theirs = gradient_of(lambda z: eager(z.softmax(1).gather(1, target[:, None])), logits)
    output, dlogits = run(impl, logits, target, emphasis, reduction="none", eps=0.0)
    torch.testing.assert_close(dlogits.cpu(), theirs, rtol=1e-11, atol=1e-15)
    if emphasis.has_loss:
        value = eager(logits.softmax(1).gather(1, target[:, None]))[:, 0]
        if not isinstance(emphasis, edf.MAE):
            torch.testing.assert_close(output.loss.detach().cpu(), value, rtol=1e-11, atol=1e-15)


# ---- the L1 norm of a row's gradient is w(p), in every implementation


@pytest.mark.parametrize("kind", edf.CATALOGUE, ids=lambda kind: kind.__name__)
def test_norm_of_the_gradient_is_the_weight(kind):
    """At eps = 0, from p = 1e-12 to 1 - 1e-12: relative 1e-6 in fp64, within the bound in fp32."""

    @REPEATABLE
    @given(emphasis=of_kind(kind), classes=st.integers(2, 6), seed=st.integers(0, 2**31), data=st.data())
    def verify(emphasis, classes, seed, data):
        furthest = math.log(1e12 - 1)
        margins = [-furthest, furthest, *(data.draw(between(-furthest, furthest)) for _ in range(6))]
        for dtype in (torch.float64, torch.float32):
            logits, target = rows_with(torch.tensor(margins, dtype=torch.float64), classes, seed, dtype)
            margin = reference.margin(logits.double(), target)
            assume((from_breaks(emphasis, margin) > 1e-3).all())
            log_p, log_q = (torch.nn.functional.logsigmoid(sign * margin) for sign in (1, -1))
            weight = emphasis.log_weight(log_p, log_q).exp()
            truth = expected(logits, target, emphasis, torch.ones(len(margins)), reduction="none", eps=0.0)
            for impl in IMPLEMENTATIONS:
                output, dlogits = run(impl, logits, target, emphasis, reduction="none", eps=0.0)
                norm = dlogits.double().abs().sum(1).cpu()
                if dtype == torch.float64:
                    assert ((norm - weight).abs() <= 1e-6 * weight).all(), (emphasis, impl)
                else:
                    compare(f"norm of {emphasis} by {impl}", norm, weight, truth.allowed["dlogits"].sum(1))
                check(output, dlogits, truth)

    verify()


# ---- within the bound, and at the edges


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("emphasis", CATALOGUE, ids=str)
def test_every_reduction(impl, emphasis):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        batch = make(17, 20, dtype, seed=1, ignored=0.2)
        for reduction in ("sum_weight", "mean", "none") if dtype == torch.float32 else ("sum_weight",):
            dloss = torch.linspace(-1, 2, 17) if reduction == "none" else torch.tensor(0.75)
            truth = expected(*batch, emphasis, dloss, reduction=reduction)
            check(*run(impl, *batch, emphasis, dloss, reduction=reduction), truth)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("emphasis", CATALOGUE, ids=str)
@pytest.mark.parametrize(("margins", "scale"), [(80.0, 2.0), (1e4, 2.0), (8.0, 30.0)], ids=["80", "1e4", "wide span"])
def test_extremes(impl, emphasis, margins, scale):
    for dtype in (torch.float64, torch.float32):
        batch = make(17, 20, dtype, margins=margins, scale=scale)
        truth = expected(*batch, emphasis)
        assert truth.loss.isfinite()
        with interpreted_infinities():
            check(*run(impl, *batch, emphasis), truth)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("emphasis", CATALOGUE, ids=str)
def test_a_row_of_nan_is_nan_alone(impl, emphasis):
    logits, target = make(3, 20)
    logits[1, 7] = math.nan
    target[1] = 3
    with interpreted_infinities():
        output, dlogits = run(impl, logits, target, emphasis, reduction="none")
        mean = run(impl, logits, target, emphasis, reduction="mean")[0].loss
    assert output.loss.isnan().tolist() == [False, True, False]
    assert dlogits.isfinite().all(1).tolist() == [True, False, True]
    assert mean.isnan()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["sum_weight", "mean", "none"])
@pytest.mark.parametrize("emphasis", CATALOGUE, ids=str)
def test_one_class_has_no_gradient(impl, reduction, emphasis):
    logits, target = torch.tensor([[3.0], [-2.0]]), torch.zeros(2, dtype=torch.int64)
    with interpreted_infinities():
        output, dlogits = run(impl, logits, target, emphasis, reduction=reduction)
    assert torch.equal(dlogits, torch.zeros_like(dlogits))
    if not isinstance(emphasis, edf.AEL):
        assert (output.loss == 0).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("emphasis", CATALOGUE, ids=str)
def test_probability_zero(impl, emphasis):
    """A label at -inf: the value may be infinite, the gradient not, unless the weight is."""
    logits = torch.tensor([[-math.inf, 0.0, 1.0], [1.0, 0.0, 2.0]])
    target = torch.tensor([0, 0])
    truth = expected(logits, target, emphasis, reduction="none")
    if not (isinstance(emphasis, edf.Beta) and emphasis.alpha < 1):
        assert truth.dlogits.isfinite().all()
        with interpreted_infinities():
            check(*run(impl, logits, target, emphasis, reduction="none"), truth)


# ---- measures


def test_integrals_and_variances():
    """The reference numbers of the method, to the digits that are given."""
    for beta, lambd, integral in ((2, 0, 3.1945), (8, 0.5, 11.4082), (8, 1, 4.4197), (8, 2, 2.1064)):
        assert round(edf.DM(beta=beta, lambd=lambd).integral, 4) == integral
    assert round(edf.DM(beta=8, lambd=0.5).variance, 2) == 50.41
    assert round(edf.DM(beta=8, lambd=1).variance, 3) == 4.546


@pytest.mark.parametrize("emphasis", [emphasis for emphasis in EVERY if not isinstance(emphasis, edf.Beta)], ids=str)
def test_measures_are_those_of_a_fine_grid(emphasis):
    p = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    weight = emphasis.weight(p)
    assert emphasis.integral == pytest.approx(weight.mean().item(), rel=1e-5)
    assert emphasis.variance == pytest.approx(weight.var(correction=0).item(), rel=1e-4, abs=1e-12)
    near = p.new_tensor([emphasis.mode]).clamp(1e-9, 1 - 1e-9) + torch.tensor([-1e-9, 0, 1e-9], dtype=torch.float64)
    assert emphasis.weight(near).max() >= weight.max() * (1 - 1e-6)
    assert emphasis.peak_ratio >= (weight.max() / weight.min()).item() * (1 - 1e-6)


def test_measures_of_beta_are_known():
    beta = edf.Beta(alpha=2.5, eta=4)
    b = math.gamma(2.5) * math.gamma(4) / math.gamma(6.5)
    assert beta.integral == pytest.approx(b, rel=1e-12)
    assert beta.variance == pytest.approx(math.gamma(4) * math.gamma(7) / math.gamma(11) - b**2, rel=1e-10)
    assert beta.mode == pytest.approx(1.5 / 4.5)
    # Integrable, but not its square.
    arcsine = edf.Beta(alpha=0.5, eta=0.5)
    assert arcsine.integral == pytest.approx(math.pi, rel=1e-10)
    assert arcsine.variance == math.inf
    assert edf.Beta(alpha=0.51, eta=1).variance == pytest.approx(50 - 1 / 0.51**2, rel=1e-8)
    assert (arcsine * edf.Beta(alpha=0.5, eta=1)).integral == math.inf
    assert edf.Beta(alpha=0.01, eta=1).integral == pytest.approx(100, rel=1e-9)


def test_measures_of_large_parameters():
    sharp = edf.DM(beta=1e6, lambd=1)
    assert sharp.integral == math.inf
    assert sharp.log_integral == pytest.approx(250_000 + 0.5 * math.log(math.pi / 1e6), rel=1e-9)
    assert sharp.peak_ratio == math.inf
    assert edf.Exponential(beta=3).peak_ratio == pytest.approx(math.exp(3), rel=1e-12)
    assert edf.Uniform().variance == 0
    assert edf.Uniform().peak_ratio == 1
    assert edf.CCE().peak_ratio == math.inf


# ---- from what a user thinks in


@REPEATABLE
@given(mode=between(0, 0.95), ratio=between(1, 1e6))
def test_dm_and_normal_from_mode_and_ratio(mode, ratio):
    for kind in (edf.DM, edf.Normal):
        emphasis = kind.from_mode(mode, ratio)
        assert emphasis.peak_ratio == pytest.approx(ratio, rel=1e-9)
        if ratio > 1.001:
            assert emphasis.mode == pytest.approx(mode, abs=1e-12)
            measured = edf._density._measures(emphasis).mode
            assert measured == pytest.approx(mode, abs=1e-4)


@REPEATABLE
@given(mode=between(0, 1), concentration=between(2.01, 100), ratio=between(1e-3, 1e3))
def test_beta_and_exponential_from_what_they_mean(mode, concentration, ratio):
    beta = edf.Beta.from_mode(mode, concentration)
    assert beta.mode == pytest.approx(mode, abs=1e-12)
    assert beta.alpha + beta.eta == pytest.approx(concentration)
    ends = edf.Exponential.from_ratio(ratio).weight(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert (ends[0] / ends[1]).item() == pytest.approx(ratio)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: edf.DM.from_mode(1.0, 10), r"DM.from_mode: expected 0 <= mode < 1, got mode=1.0"),
        (lambda: edf.DM.from_mode(0.5, 0.5), r"DM.from_mode: expected a finite ratio >= 1, got ratio=0.5"),
        (lambda: edf.Normal.from_mode(2, 10), r"Normal.from_mode: expected 0 <= mode <= 1, got mode=2"),
        (lambda: edf.Normal.from_mode(0.5, math.inf), r"Normal.from_mode: expected a finite ratio >= 1, got ratio=inf"),
        (lambda: edf.Exponential.from_ratio(0), r"Exponential.from_ratio: expected a finite ratio > 0, got ratio=0"),
        (lambda: edf.Beta.from_mode(0.5, 1), r"Beta.from_mode: expected a finite concentration alpha \+ eta >= 2, got"),
        (lambda: edf.Beta.from_mode("x", 3), r"Beta.from_mode: expected 0 <= mode <= 1, got mode='x'"),
        (lambda: edf.Beta(0, 1), r"Beta: expected alpha > 0, got 0.0"),
        (lambda: edf.Beta(1, -1), r"Beta: expected eta > 0, got -1.0"),
        (lambda: edf.Normal(math.nan, 1), r"Normal: expected psi to be a finite number, got nan"),
        (lambda: edf.TruncatedGCE(0.7, 1), r"TruncatedGCE: expected 0 < k < 1, got 1.0"),
        (lambda: edf.TruncatedGCE(2, 0.5), r"TruncatedGCE: expected 0 < q <= 1, got 2.0"),
        (lambda: edf.Focal(-1), r"Focal: expected gamma >= 0, got -1.0"),
        (lambda: edf.SCE(-1, 1, 1), r"SCE: expected alpha >= 0, got -1.0"),
        (lambda: edf.SCE(1, -1, 1), r"SCE: expected beta >= 0, got -1.0"),
        (lambda: edf.SCE(0, 0, 1), r"SCE: expected alpha or beta above 0, got 0.0"),
        (lambda: edf.SCE(1, 1, -4), r"SCE: expected A > 0, got -4.0"),
        (lambda: edf.TaylorCE(2.5), r"TaylorCE: expected t to be an integer from 1 to 64, got 2.5"),
        (lambda: edf.TaylorCE(0), r"TaylorCE: expected t to be an integer from 1 to 64, got 0.0"),
        (lambda: edf.TaylorCE(65), r"TaylorCE: expected t to be an integer from 1 to 64, got 65.0"),
        (lambda: edf.Poly1(-1.5), r"Poly1: expected eps >= -1, got -1.5"),
        (lambda: edf.PHuberCE(0.5), r"PHuberCE: expected tau >= 1, got 0.5"),
        (lambda: edf.AUL(0.5, 1), r"AUL: expected a >= 1, got 0.5"),
        (lambda: edf.AUL(1, 0), r"AUL: expected q > 0, got 0.0"),
        (lambda: edf.AGCE(-1, 1), r"AGCE: expected a >= 0, got -1.0"),
        (lambda: edf.AGCE(1, 0), r"AGCE: expected q > 0, got 0.0"),
        (lambda: edf.AEL(0), r"AEL: expected a > 0, got 0.0"),
        (lambda: edf.JS(1), r"JS: expected 0 < pi < 1, got 1.0"),
        (lambda: edf.JS(1e-46), r"JS: expected pi to be at least 1e-20, as f has no digits in fp32 below, got 1e-46"),
        (lambda: edf.GCE(1e-44), r"GCE: expected q to be at least 1e-20, as f has no digits in fp32 below, got 1e-44"),
        (
            lambda: edf.TruncatedGCE(1e-44, 0.5),
            r"TruncatedGCE: expected q to be at least 1e-20, as f has no digits in fp32 below, got 1e-44",
        ),
        (lambda: edf.AUL(2, 1e-44), r"AUL: expected q to be at least 1e-20, as f has no digits in fp32 below, got 1e-44"),
        (lambda: edf.AGCE(2, 1e-44), r"AGCE: expected q to be at least 1e-20, as f has no digits in fp32 below, got 1e-44"),
        (lambda: edf.AGCE(1e10, 4), r"AGCE: expected \(a \+ 1\)\^q to be at most exp\(80\), for the range of fp32, got 4.0"),
        (lambda: edf.AUL(1e20, 2), r"AUL: expected a\^q to be at most exp\(80\), for the range of fp32, got 2.0"),
        (lambda: edf.Normal(1e20, 1e20), r"Normal: expected beta \(1 \+ 2 psi\) to be a number that fp32 can hold, got 1e\+20"),
        (lambda: edf.AGCE(1e-250, 0.05), r"AGCE: expected a to be 0 or a normal number of fp32, got 1e-250"),
        (lambda: edf.AEL(1e-250), r"AEL: expected a to be a normal number of fp32, got 1e-250"),
        (lambda: edf.TruncatedGCE(0.5, 1e-250), r"TruncatedGCE: expected k to be a normal number of fp32, got 1e-250"),
        (lambda: edf.SCE(1e-44, 1, 1), r"SCE: expected alpha to be 0 or a normal number of fp32, got 1e-44"),
        (lambda: edf.SCE(1, 1e-30, 1e-30), r"SCE: expected A beta to be 0 or a normal number of fp32, got 1e-30"),
        (lambda: edf.SelfPaced(1e-250), r"SelfPaced: expected threshold to be a normal number of fp32, got 1e-250"),
        (lambda: edf.SelfPacedLinear(1e-250), r"SelfPacedLinear: expected threshold to be a normal number of fp32, got 1e-250"),
        (lambda: edf.DM(0, 1e39), r"DM: expected lambd to be a number that fp32 can hold, got 1e\+39"),
        (lambda: edf.DM(10**400, 1), r"DM: expected beta to be a finite number, got 1000"),
        (lambda: edf.DM.from_mode(0.5, 10**400), r"DM.from_mode: expected a finite ratio >= 1, got ratio=1000"),
        (lambda: edf.SelfPaced(0), r"SelfPaced: expected threshold > 0, got 0.0"),
        (lambda: edf.SelfPacedLinear(-1), r"SelfPacedLinear: expected threshold > 0, got -1.0"),
    ],
)
def test_wrong_parameters(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- the log domain


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("emphasis", [edf.Normal(0.5, -1e4), edf.Normal(0, 1e4), edf.Normal(1, -60)], ids=str)
def test_a_sharp_normal_keeps_its_digits_at_both_ends(impl, emphasis):
    logits, target = rows_with(torch.linspace(-14, 14, 57, dtype=torch.float64), 5, 0, torch.float32)
    truth = expected(logits, target, emphasis, reduction="none")
    output, dlogits = run(impl, logits, target, emphasis, reduction="none")
    check(output, dlogits, truth)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("emphasis", [edf.DM(beta=1000, lambd=0.5), edf.Exponential(beta=1000)], ids=str)
def test_huge_weights_are_a_softmax_over_the_batch(impl, dtype, emphasis):
    logits, target = rows_with(torch.linspace(-4, 4, 40, dtype=torch.float64), 7, 0, dtype)
    margin = reference.margin(logits.double(), target)
    log_p, log_q = (torch.nn.functional.logsigmoid(sign * margin) for sign in (1, -1))
    log_weight = emphasis.log_weight(log_p, log_q)
    assert log_weight.max() > 380
    truth = expected(logits, target, emphasis)
    with interpreted_infinities():
        output, dlogits = run(impl, logits, target, emphasis)
    check(output, dlogits, truth)
    assert output.loss.isfinite()
    assert dlogits.isfinite().all()
    compare("example_weight", output.example_weight, log_weight.softmax(0), truth.allowed["example_weight"])
    # The order of the examples whose weights the dtype can hold.
    visible = log_weight.softmax(0) > 1e-30
    assert visible.sum() > 3
    assert torch.equal(output.example_weight.cpu()[visible].argsort(), log_weight[visible].argsort())


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 88), (torch.float64, 709)], ids=str)
@pytest.mark.parametrize(
    ("options", "divisor"),
    [
        ({"reduction": "mean"}, 3.0),
        ({"reduction": "sum"}, 1.0),
        ({"reduction": "none"}, 1.0),
        ({"reduction": "sum", "normalizer": 2.0**40}, 2.0**40),
        ({"reduction": "sum", "normalizer": 2.0**-40}, 2.0**-40),
    ],
    ids=str,
)
def test_the_other_reductions_overflow_where_the_docstring_says(options, divisor, dtype, limit):
    promise = "overflows where log (c w / D) is above 88 (for fp64 logits, where that or log (c w) is above 709)"
    assert promise in " ".join(fused_dm.dm_loss.__doc__.split())
    # p = 1/2, so that log w is beta / 2.
    scale = math.log(divisor) if dtype == torch.float32 else min(math.log(divisor), 0.0)
    for log_weight, finite in ((limit + scale - 1, True), (limit + scale + 1.5, False)):
        logits, target = rows_with(torch.zeros(3, dtype=torch.float64), 7, 0, dtype)
        logits.requires_grad_()
        loss = dm_loss(logits, target, edf.Exponential(beta=2 * log_weight), **options)
        loss.sum().backward()
        assert loss.isfinite().all() == finite
        assert logits.grad.isfinite().all() == finite


# ---- cross entropy is torch's


def torch_samples(dtype, monkeypatch):
    # torch's table of operators needs it for the base class of tests alone.
    monkeypatch.setitem(sys.modules, "expecttest", types.SimpleNamespace(TestCase=unittest.TestCase))
    from torch.testing._internal.common_methods_invocations import op_db

    (info,) = (operator for operator in op_db if operator.name == "nn.functional.cross_entropy")
    return list(info.sample_inputs("cpu", dtype, requires_grad=False))


# torch's table of operators warns of torch's own deprecations when it is imported.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_cross_entropy_passes_torchs_own_samples(impl, monkeypatch):
    compared = refused = 0
    for sample in torch_samples(torch.float64, monkeypatch):
        logits, target, options = sample.input, sample.args[0], {"reduction": "mean", **sample.kwargs}
        with pytest.raises(ValueError, match="smoothed labels change the direction"):
            dm_loss(logits, target, edf.CCE(), impl=impl, **{**options, "label_smoothing": 0.1})
        if target.dtype.is_floating_point:
            with pytest.raises(TypeError, match="probability targets change the direction"):
                dm_loss(logits, target, edf.CCE(), impl=impl, **options)
            refused += 1
            continue
        output, dlogits = run(impl, logits, target, edf.CCE(), **options)
        if (target == options.get("ignore_index", -100)).all():
            assert (output.loss == 0).all()
            assert (dlogits == 0).all()
            continue
        leaf = logits.clone().requires_grad_()
        theirs = torch.nn.functional.cross_entropy(leaf, target, **options)
        theirs.sum().backward()
        torch.testing.assert_close(output.loss.detach().cpu(), theirs.detach(), rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(dlogits.cpu(), leaf.grad, rtol=1e-12, atol=1e-15)
        compared += 1
    assert compared >= 10
    assert refused >= 10
