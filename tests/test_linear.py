"""The last layer and the loss together, against dm_loss of the whole layer's logits and the reference in fp64."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from batches import DTYPES, device_of, with_assigned
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tolerance import check_linear, compare, expected_linear
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_dm import LinearDMLoss, _linear_operators, dm_loss, edf, emphasis_report, linear_dm_loss

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


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("emphasis", [DM, edf.CCE(), lambda log_p, log_q: log_q], ids=["dm", "cce", "custom"])
@pytest.mark.parametrize("name", ["target", "sample_weight", "weight"])
def test_every_row_ignored_and_divided_by_their_number(impl, mode, emphasis, name):
    """By the label, or by a weight of 0."""
    x, w, b, target = layer(dtype=torch.float32)
    options = {"sample_weight": torch.zeros(23)} if name == "sample_weight" else {}
    options |= {"weight": torch.zeros(300)} if name == "weight" else {}
    target = torch.full((23,), -100) if name == "target" else target
    options |= {"reduction": "sum", "normalizer": torch.tensor(0)}
    output, found = run(impl, x, w, b, target, emphasis, **options, **mode)
    assert output.loss == 0
    for name, gradient in found.items():
        assert torch.equal(gradient, torch.zeros_like(gradient)), name


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("emphasis", [DM, edf.CCE(), lambda log_p, log_q: log_q], ids=["dm", "cce", "custom"])
def test_a_value_of_nan_has_a_gradient_of_nan(impl, recompute, dtype, emphasis):
    """Where no other class has any probability, too."""
    x, w = torch.zeros(2, 1, dtype=dtype), torch.zeros(3, 1, dtype=dtype)
    for row in ([torch.nan, -torch.inf, -torch.inf], [torch.inf, -torch.inf, -torch.inf], [-torch.inf] * 3):
        target, b = torch.zeros(2, dtype=torch.int64), torch.tensor(row, dtype=dtype)
        with np.errstate(invalid="ignore"):
            output, found = run(impl, x, w, b, target, emphasis, reduction="mean", recompute=recompute)
        assert output.loss.isnan()
        assert found["dbias"].isnan().all()


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize(
    ("gap", "emphasis", "options", "dloss"),
    [
        (94.0, edf.MAE(), {"reduction": "mean", "recompute": True}, 1.0),
        (-96.0, edf.CCE(), {"reduction": "mean", "recompute": True}, 1.0),
        (95.0, lambda log_p, log_q: log_p + log_q, {"reduction": "sum"}, 1.0),
        (3.0, edf.CCE(), {"reduction": "mean", "recompute": True}, 1e-42),
        (3.0, edf.CCE(), {"reduction": "sum", "normalizer": 1e42, "recompute": True}, 1.0),
    ],
    ids=["hopeless", "fitted", "custom", "a small dloss", "a large divisor"],
)
def test_derivatives_below_the_range_of_fp32_in_fp16(impl, gap, emphasis, options, dloss):
    """They are 0 in fp16, and were nan."""
    x, w = torch.ones(2, 1, dtype=torch.float16), torch.tensor([[0.0], [gap]], dtype=torch.float16)
    target = torch.zeros(2, dtype=torch.int64)
    output, found = run(impl, x, w, None, target, emphasis, torch.tensor(dloss), **options)
    assert output.loss.isfinite()
    for name, gradient in found.items():
        assert (gradient == 0).all(), name


@pytest.mark.parametrize("impl", FUSED)
def test_a_row_of_nan_leaves_the_others_their_scale_in_fp16(impl):
    """Derivatives are divided by the largest of them, so that small ones have digits in fp16."""
    x, w, b, target = layer(8, 5, 40, torch.float16, ignored=0.0)
    dloss = torch.full((8,), 1e-5)
    for spoilt in (x, x.index_fill(0, torch.tensor([7]), torch.nan)):
        _, found = run(impl, spoilt, w, b, target, DM, dloss, reduction="none")
        if spoilt is x:
            truth = found["dinput"]
    assert truth[:7].count_nonzero() > 20
    assert torch.equal(found["dinput"][:7], truth[:7])


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("name", ["input", "linear_weight", "linear_bias", "sample_weight", "weight", "normalizer"])
def test_transforms_are_refused_by_every_argument(impl, name):
    """They would lose the gradient, or mix the batches."""
    x, w, b, target = (tensor.to(device_of(impl)) for tensor in layer(6, 5, 9, torch.float32))
    given = {"input": x, "linear_weight": w, "linear_bias": b, "sample_weight": torch.ones_like(x[:, 0])}
    given |= {"weight": torch.ones_like(b), "normalizer": torch.ones_like(b[0])}

    def loss(value):
        return linear_dm_loss(target=target, emphasis=DM, reduction="sum", impl=impl, **{**given, name: value})

    value = given[name]
    refused = rf"impl='{impl}': expected plain autograd.*pass impl='reference'"
    for forward_mode in (
        lambda: torch.func.jvp(loss, (value,), (value,)),
        lambda: torch.func.jacfwd(loss)(value),
    ):
        with pytest.raises(RuntimeError, match=refused):
            forward_mode()
    with pytest.raises((RuntimeError, ValueError), match=rf"{refused}|{name}: expected a tensor that does not require grad"):
        torch.func.grad(loss)(value)
    with pytest.raises(ValueError, match=rf"{name}: expected a tensor outside torch.vmap"):
        torch.vmap(loss)(value[None])


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"softcap": 3.0}, {"reduction": "mean"}], ids=str)
@pytest.mark.parametrize("emphasis", [DM, edf.CCE()], ids=str)
def test_export_save_and_load(impl, options, emphasis):
    x, w, b, target = layer(dtype=torch.float32)
    where = device_of(impl)

    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear_weight, self.linear_bias = torch.nn.Parameter(w.clone()), torch.nn.Parameter(b.clone())
            self.criterion = LinearDMLoss(emphasis, impl=impl, **options)

        def forward(self, features, target):
            return self.criterion(features, self.linear_weight, target, linear_bias=self.linear_bias)

    buffer = io.BytesIO()
    torch.export.save(torch.export.export(Head().to(where), (x.to(where), target.to(where))), buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    loss = loaded(x.to(where), target.to(where))
    loss.backward()
    truth = expected_linear(x, w, target, emphasis, linear_bias=b, **{k: v for k, v in options.items() if k != "recompute"})
    compare("loss", loss, truth.loss, truth.allowed["loss"])
    for name, parameter in (("dweight", loaded.linear_weight), ("dbias", loaded.linear_bias)):
        compare(name, parameter.grad, getattr(truth, name), truth.allowed[name])


def verify(impl, given, emphasis, dloss=None, modes=None, **options):
    x, w, b, target = given
    truth = expected_linear(x, w, target, emphasis, dloss, linear_bias=b, **options)
    for mode in MODES.values() if modes is None else modes:
        check_linear(*run(impl, x, w, b, target, emphasis, dloss, **mode, **options), truth)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["sum_weight", "mean", "sum", "none"])
@pytest.mark.parametrize(("dtype", "bias"), [*((dtype, True) for dtype in DTYPES), (torch.float32, False)], ids=str)
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
@pytest.mark.parametrize("mode", [MODES["accumulated"], MODES["recomputed"]], ids=["accumulated", "recomputed"])
@pytest.mark.parametrize("emphasis", [DM, edf.DM(beta=1000, lambd=1)], ids=str)
def test_the_size_of_a_block_changes_rounding_alone(impl, mode, emphasis):
    """From a row a block to all rows in one, results differ by what the order of sums does, which the bound allows."""
    x, w, b, target = layer(dtype=torch.float32)
    allowed = expected_linear(x, w, target, emphasis, linear_bias=b).allowed
    whole, gradients = run(impl, x, w, b, target, emphasis, max_logits_bytes=4 * w.shape[0] * len(x), **mode)
    for rows in (1, 2, 7, 22):
        part, others = run(impl, x, w, b, target, emphasis, max_logits_bytes=4 * w.shape[0] * rows, **mode)
        for name in NAMES:
            compare(name, others[name], gradients[name].double().cpu(), allowed[name])
        compare("loss", part.loss, whole.loss.double().cpu(), allowed["loss"])


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
@settings(max_examples=6, deadline=None, derandomize=True, phases=(Phase.generate,))
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
    # Blocks of seven rows, each of which has row weights of its own.
    blocks = [mode | {"max_logits_bytes": 7 * 12 * x.element_size()} for mode in (MODES["accumulated"], MODES["recomputed"])]
    for options in ({"weight": weight}, {"sample_weight": sample_weight}, {"weight": weight, "sample_weight": sample_weight}):
        for emphasis in (DM, edf.CCE()):
            verify(impl, (x, w, b, target), emphasis, None, blocks, reduction=reduction, **options)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["sum_weight", "mean"])
@pytest.mark.parametrize("size", [1e30, 1e-30, 0.0])
def test_row_weights_far_from_1(impl, dtype, reduction, size):
    """With exp(50) they leave the range of fp32 before they are divided."""
    x, w, b, target = layer(23, 8, 12, dtype)
    sample_weight = size * torch.linspace(-0.2, 1, 23)
    blocks = [mode | {"max_logits_bytes": 7 * 12 * x.element_size()} for mode in (MODES["accumulated"], MODES["recomputed"])]
    for emphasis in (edf.DM(beta=50, lambd=0), edf.CCE()):
        verify(impl, (x, w, b, target), emphasis, None, blocks, reduction=reduction, sample_weight=sample_weight)


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


# ---- Transforms of the logits


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softcap_and_scale(impl, mode, dtype):
    given_layer = layer(rows=8, dtype=dtype)
    for transform in ({"softcap": 8.0}, {"logit_scale": 0.3}, {"softcap": torch.tensor(6.0), "logit_scale": 0.8}):
        for emphasis in (DM, 2 * edf.CCE() + DM):
            verify(impl, given_layer, emphasis, torch.tensor(0.75), [mode | {"max_logits_bytes": SMALL}], **transform)


# ---- Weights beyond any range


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ascending", [True, False], ids=["growing", "shrinking"])
def test_running_maximum(impl, dtype, ascending):
    """Weights up to exp(200) in the first block or in the last: what is accumulated follows the largest so far."""
    x, w, b, target = layer(rows=30, dtype=dtype, ignored=0)
    order = dm_loss(F.linear(x.double(), w.double(), b.double()), target, DM, return_output=True).target_prob.argsort()
    order = order.flip(0) if ascending else order
    emphasis = edf.Exponential(beta=200)
    verify(impl, (x[order], w, b, target[order]), emphasis, None, [{"max_logits_bytes": SMALL}])
    ignored_first = target[order].clone()
    ignored_first[:12] = -100
    verify(impl, (x[order], w, b, ignored_first), emphasis, None, [{"max_logits_bytes": SMALL}])


@pytest.mark.parametrize("impl", FUSED)
def test_fp16_keeps_rows_of_small_weight(impl):
    """Divided by their sum, or undivided, one end of these weights would leave fp16; its gradients are in no worse a state."""
    x, w, b, target = layer(rows=40, dtype=torch.float16)
    sample_weight = torch.logspace(-3, 2, 40)
    for reduction in ("sum_weight", "mean", "sum"):
        verify(impl, (x, w, b, target), DM, sample_weight=sample_weight, reduction=reduction)


# ---- Only what is wanted


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)])
def test_only_the_gradients_that_are_wanted(impl, recompute, wanted, monkeypatch):
    from fused_dm import _linear_blocks

    products = []
    for name in ("_times_weight", "_add_to_weight"):
        own = getattr(_linear_blocks._Products, name)
        monkeypatch.setattr(
            _linear_blocks._Products, name, lambda *args, own=own, name=name: (products.append(name), own(*args))
        )
    x, w, b, target = layer()
    _, whole = run(impl, x, w, b, target, DM, recompute=recompute)
    products.clear()
    device = device_of(impl)
    leaves = [t.to(device, copy=True).requires_grad_(want) for t, want in zip((x, w, b), wanted, strict=True)]
    linear_dm_loss(*leaves[:2], target.to(device), DM, linear_bias=leaves[2], impl=impl, recompute=recompute).backward()
    for name, leaf, want in zip(NAMES, leaves, wanted, strict=True):
        assert (leaf.grad is not None) == want
        if want:
            torch.testing.assert_close(leaf.grad, whole[name], rtol=1e-13, atol=0)
    assert set(products) == {n for n, want in zip(("_times_weight", "_add_to_weight"), wanted[:2], strict=True) if want}


@pytest.mark.parametrize("impl", FUSED)
def test_evaluation_computes_no_gradient(impl, monkeypatch):
    from fused_dm import _linear_blocks

    monkeypatch.setattr(_linear_blocks, "_Products", None)
    x, w, b, target = layer()
    leaves = [t.to(device_of(impl), copy=True).requires_grad_() for t in (x, w, b)]
    truth = expected_linear(x, w, target, DM, linear_bias=b)
    with torch.no_grad():
        output = linear_dm_loss(
            *leaves[:2], target.to(leaves[0].device), DM, linear_bias=leaves[2], impl=impl, return_output=True
        )
    check_linear(output, {}, truth)
    assert not output.loss.requires_grad


# ---- Autograd


@pytest.mark.parametrize("impl", FUSED)
def test_second_backward(impl):
    x, w, b, target = layer()
    device = device_of(impl)
    for recompute in (False, True):
        leaves = [t.to(device, copy=True).requires_grad_() for t in (x, w, b)]
        loss = linear_dm_loss(*leaves[:2], target.to(device), DM, linear_bias=leaves[2], impl=impl, recompute=recompute)
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        if recompute:
            second = torch.autograd.grad(loss, leaves, torch.tensor(2.0, dtype=loss.dtype, device=device))
            for once, twice in zip(first, second, strict=True):
                torch.testing.assert_close(2 * once, twice, rtol=1e-14, atol=0)
        else:
            with pytest.raises(RuntimeError, match=r"used up by the first backward.*retain_graph=True.*recompute=True"):
                torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("recompute", [False, True])
def test_double_backward_is_an_error(impl, recompute):
    x, w, _, target = layer()
    x, w = (t.to(device_of(impl), copy=True).requires_grad_() for t in (x, w))
    loss = linear_dm_loss(x, w, target.to(x.device), DM, impl=impl, recompute=recompute)

    def penalty():
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        (x.square().sum() + gradient.square().sum()).backward()

    with pytest.raises(RuntimeError, match=r"fused_dm|second derivative"):
        penalty()


@pytest.mark.parametrize("impl", FUSED)
def test_closed_form_is_the_derivative(impl):
    x, w, b, target = layer(4, 3, 5)
    target = target.to(device_of(impl))
    leaves = [t.to(device_of(impl), copy=True).requires_grad_() for t in (x, w, b)]
    for options in ({}, {"softcap": 2.0, "logit_scale": 0.5}):

        def loss(x, w, b, options=options):
            return linear_dm_loss(
                x, w, target, edf.GCE(), linear_bias=b, reduction="mean", impl=impl, recompute=True, **options
            )

        assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_repeatable_to_the_bit(impl, mode, dtype):
    x, w, b, target = layer(dtype=dtype)
    runs = [run(impl, x, w, b, target, DM, max_logits_bytes=SMALL, **mode) for _ in range(3)]
    for output, gradients in runs[1:]:
        assert torch.equal(output.loss, runs[0][0].loss)
        assert all(torch.equal(gradients[name], runs[0][1][name]) for name in NAMES)
    ignored = (target == -100).to(runs[0][1]["dinput"].device)
    assert (runs[0][1]["dinput"][ignored] == 0).all()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("impl", FUSED)
def test_tied_embedding(impl, recompute):
    """The weight is reached twice, through the layer and through the embedding: autograd adds both."""
    torch.manual_seed(0)
    device = device_of(impl)
    tokens = torch.randint(50, (4, 9), device=device)
    weights = torch.randn(50, 8, dtype=torch.float64, device=device)

    def gradient(loss):
        weight = weights.clone().requires_grad_()
        loss(F.embedding(tokens[:, :-1], weight).tanh(), weight, tokens[:, 1:]).backward()
        return weight.grad

    def unfused(hidden, weight, following):
        return dm_loss(F.linear(hidden, weight).flatten(0, 1), following.flatten(), DM, impl=impl)

    ours = gradient(LinearDMLoss(DM, impl=impl, recompute=recompute, max_logits_bytes=3 * 50 * 8))
    torch.testing.assert_close(ours, gradient(unfused), rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("recompute", [False, True])
def test_checkpointing(impl, recompute):
    from torch.utils.checkpoint import checkpoint

    x, w, b, target = layer()
    output, gradients = run(impl, x, w, b, target, DM, recompute=recompute)
    device = device_of(impl)
    leaves = [t.to(device, copy=True).requires_grad_() for t in (x, w, b)]

    def tail(x, w, b):
        return linear_dm_loss(x, w, target.to(device), DM, linear_bias=b, impl=impl, recompute=recompute)

    loss = checkpoint(tail, *leaves, use_reentrant=False)
    loss.backward()
    assert torch.equal(loss, output.loss)
    for name, leaf in zip(NAMES, leaves, strict=True):
        assert torch.equal(leaf.grad, gradients[name])


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(impl, recompute, dtype):
    """As a linear layer under autocast, but that the gradient of an fp32 weight is not rounded to 16 bits on its way."""
    x, w, b, target = layer(dtype=torch.float32)
    truth = expected_linear(x, w, target, DM, linear_bias=b, dtype=dtype)
    with torch.autocast(device_of(impl), dtype=dtype):
        output, gradients = run(impl, x, w, b, target, DM, recompute=recompute, max_logits_bytes=SMALL)
        # In one block, where what is rounded is not added to anything.
        _, of_one_block = run(impl, x, w, b, target, DM, recompute=recompute)
    check_linear(output, gradients, truth)
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    for name in ("dweight", "dbias"):
        assert not torch.equal(of_one_block[name].to(dtype).float(), of_one_block[name])
    with torch.autocast("cpu", dtype=dtype):
        mixed = linear_dm_loss(x.to(dtype), w, target, DM, impl="cpu")
    assert mixed.dtype == torch.float32


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("recompute", [False, True])
def test_tensors_without_numbers(impl, recompute):
    with FakeTensorMode():
        leaves = [torch.randn(shape, device=device_of(impl), requires_grad=True) for shape in ((4, 5), (7, 5))]
        target = torch.zeros(4, dtype=torch.long, device=device_of(impl))
        # A weight whose peak no other test has asked for.
        loss = linear_dm_loss(*leaves, target, edf.DM(beta=2.21875, lambd=0.5), impl=impl, recompute=recompute)
        loss.backward()
    assert loss.shape == ()
    assert [leaf.grad.shape for leaf in leaves] == [(4, 5), (7, 5)]


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize(
    "options",
    [{}, {"recompute": True, "skip_tolerance": 1e-3, "softcap": 9.0}, {"reduction": "none"}, {"drop_ignored": True}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_as_one_graph(impl, options, dtype):
    x, w, b, target = layer(dtype=dtype)
    device = device_of(impl)
    leaves = [t.to(device, copy=True).requires_grad_() for t in (x, w, b)]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x, w, b, target):
        return linear_dm_loss(
            x * 1, w, target, DM, linear_bias=b, impl=impl, return_output=True, max_logits_bytes=SMALL, **options
        )

    output = compiled(*leaves, target.to(device))
    output.loss.sum().backward()
    plain = {name: value for name, value in options.items() if name not in ("recompute", "skip_tolerance", "drop_ignored")}
    truth = expected_linear(x, w, target, DM, linear_bias=b, **plain)
    gradients = {name: leaf.grad for name, leaf in zip(NAMES, leaves, strict=True)}
    check_linear(output, gradients if "skip_tolerance" not in options else {}, truth)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("recompute", [False, True])
def test_compiles_with_inductor(recompute):
    x, w, b, target = layer(dtype=torch.float32)
    leaves = [t.clone().requires_grad_() for t in (x, w, b)]

    @torch.compile(fullgraph=True)
    def compiled(x, w, b, target):
        return linear_dm_loss(x * 1, w, target, DM, linear_bias=b, recompute=recompute, return_output=True)

    output = compiled(*leaves, target)
    output.loss.backward()
    gradients = {name: leaf.grad for name, leaf in zip(NAMES, leaves, strict=True)}
    check_linear(output, gradients, expected_linear(x, w, target, DM, linear_bias=b))


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_schedule_compiles_once():
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    x, w, b, target = layer(dtype=torch.float32)
    criterion = LinearDMLoss(edf.DM(beta=0, lambd=0.5))
    step = torch.compile(criterion, fullgraph=True, backend=counter)
    for beta in (0, 2, 5, 9, 300):
        criterion.set_emphasis(edf.DM(beta=beta, lambd=0.5))
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        loss = step(*leaves[:2], target, linear_bias=leaves[2])
        loss.backward()
        truth = expected_linear(x, w, target, criterion.emphasis, linear_bias=b)
        compare("loss", loss, truth.loss, truth.allowed["loss"])
        for name, leaf in zip(NAMES, leaves, strict=True):
            compare(name, leaf.grad, getattr(truth, name), truth.allowed[name])
    assert counter.frame_count == 1


def operators(dtype, impl):
    x, w, b, target = layer(5, 4, 20, dtype, ignored=0)
    device = device_of(impl)
    x, w, b = (t.to(device).requires_grad_() for t in (x, w, b))
    target = target.to(device)
    params = torch.tensor([1e-6, 8.0, 0.5], dtype=torch.float64, device=device)
    transform = torch.tensor([0.5, 9.0], dtype=torch.float64, device=device)
    plain = [t.detach() for t in (x, w, b)]
    for wanted in ([True] * 3, [False, True, False]):
        for relative in (False, True):
            args = (*plain, target, None, params, "dm", -100, dtype, wanted, relative, False, 2 * 20 * 8, impl, transform)
            yield _linear_operators.linear_gradients, args
    args = (*plain, target, None, params, "dm", -100, dtype, [True] * 3, True, False, None, impl, None)
    _, _, reference, *gradients = _linear_operators.linear_gradients(*args)
    yield _linear_operators.linear_scale_, (gradients[1].clone(), torch.full_like(reference, 2))
    yield _linear_operators.linear_scaled, (gradients[1], torch.full_like(reference, 2), torch.bfloat16)
    yield _linear_operators.attach_linear_gradients, (x, w, b, torch.ones_like(reference), *gradients, reference)
    for bias in (b, None):
        yield _linear_operators.linear_margin, (x, w, bias, target, -100, dtype, False, False, 2 * 20 * 8, impl, transform)
    margins, statistics = _linear_operators.linear_margin(*plain, target, -100, dtype, False, False, None, impl, None)
    args = (*plain, target, statistics, torch.ones_like(margins), -100, dtype, [True, False, True], False, None, impl, None)
    yield _linear_operators.linear_margin_gradients, args


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(impl, dtype):
    for operator, args in operators(dtype, impl):
        torch.library.opcheck(operator.definition, args)


# ---- Emphasis-sparse backward


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("tolerance", [1e-6, 1e-2, 0.3])
@pytest.mark.parametrize("emphasis", [edf.CCE(), edf.DFT()], ids=str)
def test_skipped_rows_are_the_smallest_and_bounded(impl, tolerance, emphasis):
    # Half of the rows are fitted: the margin of the best class is raised by the scale of the logits.
    x, w, b, target = layer(rows=60, confident=0.7)
    options = {"reduction": "mean", "recompute": True}
    exact, whole = run(impl, x, w, b, target, emphasis, **options)
    output, gradients = run(impl, x, w, b, target, emphasis, skip_tolerance=tolerance, **options)
    norms = exact.example_weight.abs().cpu()
    ascending, order = norms.sort(stable=True)
    fits = ascending.cumsum(0) <= tolerance * norms.sum()
    expected_rows = order[fits]
    skipped = (gradients["dinput"] == 0).all(1).cpu()
    assert torch.equal(skipped.nonzero()[:, 0], expected_rows.sort().values)
    assert norms[skipped].sum() <= tolerance * norms.sum()
    counted = target != -100
    assert output.skipped.cpu() == (skipped & counted).sum() / counted.sum()
    assert output.skipped < 1
    assert tolerance < 1e-3 or output.skipped > 0
    # The rows that are left are exact, and the loss is of all.
    torch.testing.assert_close(gradients["dinput"].cpu()[~skipped], whole["dinput"].cpu()[~skipped], rtol=1e-12, atol=0)
    assert torch.equal(output.loss, exact.loss)
    # The gradient by the weight lacks the skipped rows' alone: |dW error| <= sum of norms x largest |input|.
    off = (gradients["dweight"] - whole["dweight"]).abs().sum(0).cpu()
    assert (off <= tolerance * norms.sum() * x.abs().amax(0)).all()
    again = run(impl, x, w, b, target, emphasis, skip_tolerance=tolerance, **options)[1]
    assert all(torch.equal(again[name], gradients[name]) for name in NAMES)


def test_skipping_saves_the_products(monkeypatch):
    from fused_dm import _linear_blocks

    rows = []
    own = _linear_blocks._Products.add
    monkeypatch.setattr(
        _linear_blocks._Products,
        "add",
        lambda self, at, dlogits, *rest: (rows.append(len(dlogits)), own(self, at, dlogits, *rest)),
    )
    x, w, b, target = layer(rows=60, confident=0.7)
    output, _ = run("cpu", x, w, b, target, edf.CCE(), reduction="mean", recompute=True, skip_tolerance=0.01)
    counted = int((target != -100).sum())
    assert sum(rows) == counted - round(output.skipped.item() * counted)
    rows.clear()
    run("cpu", x, w, b, target, edf.CCE(), reduction="mean", drop_ignored=True)
    assert sum(rows) == counted


# ---- Memory


@pytest.mark.parametrize("options", [{}, {"recompute": True}], ids=["accumulated", "recomputed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_is_a_block_and_the_gradients(options, dtype):
    """Every allocation of torch's CPU allocator, as the profiler sees it, less what is freed: the most at a time."""
    from torch.profiler import profile

    rows, features, classes, height = 256, 32, 20000, 16
    x, w, _, target = layer(rows, features, classes, dtype, ignored=0)
    x, w = x.requires_grad_(), w.requires_grad_()
    # On a CPU a block of 16 bits is held together with its direction in fp32.
    size = height * classes * (4 if dtype == torch.float32 else 2 + 4)
    with profile(profile_memory=True, acc_events=True) as seen:
        linear_dm_loss(x, w, target, DM, max_logits_bytes=size, **options).backward()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    gradients = (rows + classes) * features * 4
    converted = 2 * 8192 * features * 4 + height * 8192 * 4 if dtype != torch.float32 else 0
    returned = (rows + classes) * features * x.element_size() if dtype != torch.float32 else 0
    # Everything else is of order N.
    allowed = size + gradients + returned + converted + 200 * rows * 8
    assert size < most <= allowed
    assert allowed < rows * classes * x.element_size()


@pytest.mark.parametrize(
    ("rows", "classes", "itemsize", "size", "on_cpu", "expected_rows"),
    [
        (8192, 128256, 2, None, False, 2048),  # 512 MiB hold 2093 rows, and a product's tile is 128
        (8192, 248320, 2, None, False, 1024),  # 1081
        (8192, 32000, 2, None, False, 8192),
        (5000, 128256, 2, None, False, 1792),  # three blocks of about the same height
        (100, 128256, 2, None, False, 100),
        (8192, 128256, 2, 1, False, 1),
        (8192, 128256, 2, 10 * 128256 * 2, False, 10),
        (10, 7, 4, 3 * 7 * 4, True, 3),
        (10, 7, 2, 3 * 7 * 6, True, 3),  # with a direction in fp32
        (10, 7, 8, 3 * 7 * 8, True, 3),
        (8, 7, 4, 5 * 7 * 4, True, 4),
        (0, 7, 4, None, True, 1),
    ],
)
def test_rows_of_a_block(rows, classes, itemsize, size, on_cpu, expected_rows):
    from fused_dm._linear_blocks import block_rows

    assert block_rows(rows, classes, itemsize, size, on_cpu) == expected_rows


# ---- Wrong arguments


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": [1.0]}, TypeError, "input: expected a Tensor, got list"),
        ({"input": torch.zeros(4, 3, dtype=torch.long)}, TypeError, "input: expected dtype float16.*got torch.int64"),
        ({"input": torch.zeros(())}, ValueError, "input: expected shape .*, got a 0-d tensor"),
        ({"input": torch.zeros(4, 0)}, ValueError, r"input: expected shape .*, H at least 1, got \(4, 0\)"),
        ({"linear_weight": torch.zeros(5, 4)}, ValueError, r"linear_weight: expected shape \(V, 3\).*got \(5, 4\)"),
        ({"linear_weight": torch.zeros(0, 3)}, ValueError, r"linear_weight: expected shape \(V, 3\), V at least 1"),
        (
            {"linear_weight": torch.zeros(5, 3).double()},
            TypeError,
            "linear_weight: expected dtype torch.float32, that of input",
        ),
        ({"linear_weight": torch.zeros(5, 3, device="meta")}, ValueError, "linear_weight: expected device cpu"),
        ({"linear_bias": torch.zeros(4)}, ValueError, r"linear_bias: expected shape \(5,\), got \(4,\)"),
        ({"target": torch.zeros(3, dtype=torch.long)}, ValueError, r"target: expected shape \(4,\).*got \(3,\)"),
        ({"target": torch.zeros(4)}, TypeError, "target: expected labels of an integer dtype.*probability targets"),
        ({"target": torch.full((4,), 5)}, IndexError, r"target: expected labels in \[0, 5\).*got 5"),
        ({"weight": torch.zeros(4)}, ValueError, r"weight: expected shape \(5,\), got \(4,\)"),
        ({"sample_weight": torch.zeros(5)}, ValueError, r"sample_weight: expected shape \(4,\), got \(5,\)"),
        ({"reduction": "average"}, ValueError, "reduction: expected one of"),
        ({"label_smoothing": 0.1}, ValueError, "label_smoothing: expected 0"),
        ({"recompute": 1}, TypeError, "recompute: expected a bool, got 1"),
        ({"drop_ignored": None}, TypeError, "drop_ignored: expected a bool, got None"),
        ({"max_logits_bytes": 1.5}, TypeError, "max_logits_bytes: expected an int or None, got 1.5"),
        ({"max_logits_bytes": 0}, ValueError, "max_logits_bytes: expected at least 1, got 0"),
        ({"skip_tolerance": "0"}, TypeError, "skip_tolerance: expected a number, got '0'"),
        ({"skip_tolerance": 1.0, "recompute": True}, ValueError, r"skip_tolerance: expected a number in \[0, 1\), got 1.0"),
        ({"skip_tolerance": 0.1}, ValueError, "skip_tolerance: expected recompute=True with it"),
        (
            {"skip_tolerance": 0.1, "recompute": True, "reduction": "none"},
            ValueError,
            'skip_tolerance: expected a reduction other than "none"',
        ),
        ({"skip_tolerance": 0.1, "recompute": True, "impl": "reference"}, ValueError, "skip_tolerance: expected impl"),
    ],
)
def test_wrong_arguments(change, error, message):
    arguments = {
        "input": torch.zeros(4, 3),
        "linear_weight": torch.zeros(5, 3),
        "target": torch.zeros(4, dtype=torch.long),
        "emphasis": DM,
    }
    with pytest.raises(error, match=message):
        linear_dm_loss(**arguments | change)
    if change.keys() <= {"input", "linear_weight", "linear_bias", "target", "weight", "sample_weight"}:
        return
    with pytest.raises(error, match=message):
        with_assigned(LinearDMLoss(DM), change)(arguments["input"], arguments["linear_weight"], arguments["target"])


@pytest.mark.parametrize("impl", [*FUSED, "reference"])
def test_the_parameters_are_those_of_the_buffer(impl):
    x, w, _, target = (tensor.to(device_of(impl)) for tensor in layer())
    criterion, other = (LinearDMLoss(density, eps=eps, impl=impl) for density, eps in ((DM, 0.0), ("dm:beta=1,lambd=2", 0.1)))
    other = other.to(x.device)
    loss = torch.func.functional_call(criterion, {"emphasis_params": other.emphasis_params}, (x, w, target))
    assert torch.equal(loss, other(x, w, target))
    assert not torch.equal(loss, criterion(x, w, target))


# torch says that its generic rule for batches is slow.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recompute", [False, True])
def test_several_derivatives_at_once(impl, dtype, recompute):
    leaves = [tensor.to(device_of(impl), dtype).requires_grad_() for tensor in layer()[:3]]
    target = layer()[3].to(leaves[0].device)

    def loss():
        return linear_dm_loss(*leaves[:2], target, DM, linear_bias=leaves[2], impl=impl, recompute=recompute)

    derivatives = torch.tensor([1.0, -2.0, 0.5], device=leaves[0].device)
    together = torch.autograd.grad(loss(), leaves, derivatives, is_grads_batched=True)
    for number, derivative in enumerate(derivatives):
        for several, alone in zip(together, torch.autograd.grad(loss(), leaves, derivative), strict=True):
            torch.testing.assert_close(several[number], alone)


def test_vmap_is_refused():
    with pytest.raises(ValueError, match=r"input: expected a tensor outside torch\.vmap"):
        torch.vmap(lambda x: linear_dm_loss(x, torch.zeros(5, 3), torch.zeros(4, dtype=torch.long), DM))(torch.zeros(2, 4, 3))


def test_emphasis_report_takes_its_output():
    x, w, _, target = layer(ignored=0)
    output = linear_dm_loss(x, w, target, DM, return_output=True)
    ours = emphasis_report(output, target)
    theirs = emphasis_report(dm_loss(F.linear(x, w), target, DM, return_output=True), target)
    assert str(ours) == str(theirs)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("emphasis", [DM, DM.log_weight], ids=["dm", "callable"])
def test_one_class_has_no_gradient(impl, recompute, emphasis):
    """Without eps its coefficient would be half the weight."""
    device = device_of(impl)
    x, w = torch.ones(3, 4, device=device, requires_grad=True), torch.ones(1, 4, device=device, requires_grad=True)
    target = torch.zeros(3, dtype=torch.long, device=device)
    loss = linear_dm_loss(x, w, target, emphasis, eps=0.0, recompute=recompute, impl=impl)
    loss.backward()
    assert loss == 0
    assert (x.grad == 0).all()
    assert (w.grad == 0).all()
