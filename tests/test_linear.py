"""The last layer and the loss together, against dm_loss of the whole layer's logits and the reference in fp64."""

import pytest
import torch
import torch.nn.functional as F
from batches import DTYPES, device_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import check_linear, compare, expected_linear

from fused_dm import LinearDMLoss, dm_loss, edf, linear_dm_loss

DM = edf.DM(beta=8, lambd=0.5)
FUSED = ("cpu", "triton")
IMPLEMENTATIONS = (*FUSED, "reference")
# Their weights reach exp(250) and exp(-200), and exp(200).
EXTREME = (edf.DM(beta=1000, lambd=1), edf.Exponential(beta=200))
NAMES = ("dinput", "dweight", "dbias")
# As much as three rows of 300 logits in fp64: many blocks, the last one smaller.
SMALL = 3 * 300 * 8


def layer(rows=23, features=16, classes=300, dtype=torch.float64, *, ignored=0.2, seed=0, confident=0.5):
    """Input (N, H), weight (V, H), bias (V,) and labels whose probabilities spread over (0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    w = torch.randn(classes, features, generator=generator, dtype=torch.float64)
    b = torch.randn(classes, generator=generator, dtype=torch.float64)
    target = torch.randint(classes, (rows,), generator=generator)
    best = (x @ w.t() + b).argmax(1)
    target = torch.where(torch.rand(rows, generator=generator) < confident, best, target)
    target = torch.where(torch.rand(rows, generator=generator) < ignored, -100, target)
    return x.to(dtype), w.to(dtype), b.to(dtype), target


def run(impl, x, w, b, target, emphasis, dloss=None, **options):
    """Output and gradients of an implementation, on the device that suits it."""
    device = device_of(impl)
    leaves = [None if t is None else t.detach().to(device, copy=True).requires_grad_() for t in (x, w, b)]
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    output = linear_dm_loss(
        *leaves[:2], target.to(device), emphasis, linear_bias=leaves[2], impl=impl, return_output=True, **options
    )
    output.loss.backward(torch.ones_like(output.loss) if dloss is None else dloss.to(output.loss))
    return output, {name: leaf.grad for name, leaf in zip(NAMES, leaves, strict=True) if leaf is not None}


MODES = {
    "accumulated": {},
    "recomputed": {"recompute": True},
    "accumulated, without ignored rows": {"drop_ignored": True},
    "recomputed, without ignored rows": {"recompute": True, "drop_ignored": True},
}


def verify(impl, given, emphasis, dloss=None, modes=None, **options):
    x, w, b, target = given
    truth = expected_linear(x, w, target, emphasis, dloss, linear_bias=b, **options)
    for mode in MODES.values() if modes is None else modes:
        check_linear(*run(impl, x, w, b, target, emphasis, dloss, **mode, **options), truth)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["sum_weight", "mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_within_the_bound_of_the_unfused_computation(impl, reduction, dtype, bias):
    x, w, b, target = layer(dtype=dtype)
    dloss = torch.linspace(-1, 2, len(x)) if reduction == "none" else torch.tensor(0.75)
    blocks = [mode | {"max_logits_bytes": size} for mode in MODES.values() for size in (None, SMALL)]
    verify(impl, (x, w, b if bias else None, target), DM, dloss, blocks, reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_bound_is_that_of_the_unfused_computation(dtype):
    """What the fused one is held to, dm_loss of a linear layer's output keeps, and not by much."""
    x, w, b, target = layer(rows=64, dtype=dtype)
    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    output = dm_loss(F.linear(*leaves), target, DM, return_output=True)
    output.loss.backward()
    gradients = {name: leaf.grad for name, leaf in zip(NAMES, leaves, strict=True)}
    truth = expected_linear(x, w, target, DM, linear_bias=b)
    check_linear(output, gradients, truth)
    for name, gradient in gradients.items():
        with pytest.raises(AssertionError, match="times the bound"):
            compare(name, gradient * 2, getattr(truth, name), truth.allowed[name])
        with pytest.raises(AssertionError, match="times the bound"):
            compare(name, gradient * 0, getattr(truth, name), truth.allowed[name])


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("reduction", ["sum_weight", "mean", "sum", "none"])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize(
    "emphasis", [DM, edf.GCE(), edf.CCE(), 2 * edf.CCE() + DM, lambda p, q: q], ids=["dm", "gce", "cce", "sum", "custom"]
)
def test_equals_dm_loss_of_the_layers_logits_in_fp64(impl, reduction, mode, emphasis):
    x, w, b, target = layer()
    dloss = torch.linspace(-1, 2, len(x), dtype=torch.float64) if reduction == "none" else torch.tensor(0.75)
    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    theirs = dm_loss(F.linear(*leaves), target, emphasis, reduction=reduction, return_output=True, impl="cpu")
    theirs.loss.backward(dloss.to(theirs.loss))
    ours, gradients = run(impl, x, w, b, target, emphasis, dloss, reduction=reduction, max_logits_bytes=SMALL, **mode)
    for name in ("loss", "example_weight", "target_prob", "sum_weight", "correct"):
        torch.testing.assert_close(getattr(ours, name).cpu(), getattr(theirs, name), rtol=1e-10, atol=0, equal_nan=True)
    for name, leaf in zip(NAMES, leaves, strict=True):
        largest = leaf.grad.abs().max()
        assert (gradients[name].cpu() - leaf.grad).abs().max() <= 1e-10 * largest


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    rows=st.integers(0, 40),
    features=st.integers(1, 20),
    classes=st.integers(1, 70),
    block=st.integers(1, 40),
    seed=st.integers(0, 9),
    reduction=st.sampled_from(["sum_weight", "mean", "sum", "none"]),
    emphasis=st.sampled_from([DM, edf.GCE(), *EXTREME]),
)
@settings(max_examples=6, deadline=None, derandomize=True)
def test_any_shape_and_block(impl, mode, dtype, rows, features, classes, block, seed, reduction, emphasis):
    given_layer = layer(rows, features, classes, dtype, seed=seed)
    if emphasis in EXTREME:
        reduction = "sum_weight"  # the others overflow where log w is above 88
    size = block * classes * given_layer[0].element_size()
    verify(impl, given_layer, emphasis, None, [mode | {"max_logits_bytes": size}], reduction=reduction)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["sum_weight", "mean", "sum", "none"])
def test_weights_of_any_sign(impl, dtype, reduction):
    x, w, b, target = layer(40, 8, 12, dtype)
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(12, generator=generator) + 0.5
    weight[::5] = 0
    sample_weight = torch.randn(40, generator=generator) + 1
    sample_weight[::7] = 0
    for options in ({"weight": weight}, {"sample_weight": sample_weight}, {"weight": weight, "sample_weight": sample_weight}):
        for emphasis in (DM, edf.CCE()):
            verify(impl, (x, w, b, target), emphasis, reduction=reduction, **options)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_normalizer_and_every_row_ignored(impl, mode):
    given_layer = layer()
    verify(impl, given_layer, DM, torch.tensor(3.0), [mode], reduction="sum", normalizer=7.5)
    x, w, b, target = given_layer
    output, gradients = run(impl, x, w, b, torch.full_like(target, -100), DM, **mode)
    assert output.loss == 0
    assert all((gradient == 0).all() for gradient in gradients.values())


def test_leading_dimensions_and_a_single_row():
    x, w, _, target = layer(24, ignored=0)
    flat, _ = run("cpu", x, w, None, target, DM)
    shaped, gradients = run("cpu", x.reshape(2, 3, 4, 16), w, None, target.reshape(2, 3, 4), DM)
    assert gradients["dinput"].shape == (2, 3, 4, 16)
    assert shaped.example_weight.shape == shaped.target_prob.shape == shaped.correct.shape == (2, 3, 4)
    assert torch.equal(shaped.loss, flat.loss)
    rows = linear_dm_loss(x[0], w, target[0], DM, reduction="none")
    assert rows.shape == ()


@pytest.mark.parametrize("impl", FUSED)
def test_module_is_the_function(impl):
    x, w, b, target = layer()
    output, gradients = run(impl, x, w, b, target, DM)
    device = device_of(impl)
    criterion = LinearDMLoss("dm:beta=2,lambd=0.5", impl=impl, max_logits_bytes=SMALL).to(device)
    criterion.set_emphasis(DM)
    leaves = [t.to(device, copy=True).requires_grad_() for t in (x, w, b)]
    loss = criterion(*leaves[:2], target.to(device), linear_bias=leaves[2])
    loss.backward()
    torch.testing.assert_close(loss, output.loss)
    for name, leaf in zip(NAMES, leaves, strict=True):
        torch.testing.assert_close(leaf.grad, gradients[name])
