"""`softcap` and `logit_scale`: applied where logits are loaded, with the gradient of tanh where 1 - tanh^2 has no digits."""

import pytest
import torch
from batches import DTYPES, IMPLEMENTATIONS, device_of, make, run
from tolerance import check, compare, expected

import fused_dm
from fused_dm import DMLoss, dm_loss, edf

FUSED = ("cpu", "triton")
DM = edf.DM(beta=8, lambd=0.5)
TRANSFORMS = {
    "softcap": {"softcap": 30.0},
    "scale": {"logit_scale": 0.25},
    "both": {"softcap": 7.5, "logit_scale": 1.5},
    "tensors": {"softcap": torch.tensor(5), "logit_scale": torch.tensor(0.7)},
}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["sum_weight", "mean", "sum", "none"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("emphasis", [DM, edf.GCE(), lambda log_p, log_q: 2 * log_q], ids=["dm", "gce", "custom"])
def test_within_the_bound(impl, reduction, transform, emphasis):
    for dtype in DTYPES:
        logits, target = make(9, 300, dtype, ignored=0.2)
        dloss = torch.linspace(-1, 2, 9) if reduction == "none" else torch.tensor(0.75)
        truth = expected(logits, target, emphasis, dloss, reduction=reduction, **transform)
        check(*run(impl, logits, target, emphasis, dloss, reduction=reduction, **transform), truth)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["sum_weight", "mean"])
@pytest.mark.parametrize("shape", [(2, 4097), (2, 32768), (2, 3 * 16384 + 7), (65, 10), (5, 1), (0, 10)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shapes(impl, reduction, shape, dtype):
    logits, target = make(*shape, dtype)
    for transform in TRANSFORMS.values():
        truth = expected(logits, target, DM, reduction=reduction, **transform)
        check(*run(impl, logits, target, DM, reduction=reduction, **transform), truth)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["sum_weight", "mean"])
def test_is_the_gradient_of_the_eager_code(impl, reduction):
    logits, target = make(9, 300, torch.float64)
    for transform in TRANSFORMS.values():
        leaf = logits.clone().requires_grad_()
        capped = leaf * transform.get("logit_scale", 1.0)
        if "softcap" in transform:
            capped = transform["softcap"] * torch.tanh(capped / transform["softcap"])
        loss = dm_loss(capped, target, DM, reduction=reduction)
        loss.backward()
        output, dlogits = run(impl, logits, target, DM, reduction=reduction, **transform)
        torch.testing.assert_close(output.loss.cpu(), loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(dlogits.cpu(), leaf.grad, rtol=1e-9, atol=1e-18)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", [{}, {"reduction": "mean"}, {"reduction": "none"}], ids=str)
def test_slope_of_saturated_logits(impl, options):
    """1 - tanh(8)^2 = 4.5e-7 has two digits left in fp32, and 1 - tanh(12)^2 none."""
    logits, target = make(4, 50, scale=12.0)
    transform = {"softcap": 4.0}
    assert (logits / 4).abs().max() > 8
    truth = expected(logits, target, DM, **options, **transform)
    output, dlogits = run(impl, logits, target, DM, **options, **transform)
    check(output, dlogits, truth)
    x = (logits / 4).double()
    wrong = truth.dlogits * x.cosh().square() * (1 - torch.tanh(logits / 4).double().square())
    with pytest.raises(AssertionError, match="times the bound"):
        compare("dlogits", wrong, truth.dlogits, truth.allowed["dlogits"])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_small_logits_under_a_large_softcap(impl):
    """1 - exp(-2 x) has lost the digits of a small x, and the softcap multiplies what is left of them."""
    logits, target = make(4, 50, scale=0.1, margins=1.0)
    truth = expected(logits, target, DM, softcap=1e4)
    check(*run(impl, logits, target, DM, softcap=1e4), truth)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("options", [{}, {"reduction": "mean"}, {"reduction": "none"}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place(impl, options, dtype):
    logits, target = make(9, 300, dtype, ignored=0.2)
    for transform in TRANSFORMS.values():
        for dloss in (1.0, 0.3):
            leaf = logits.to(device_of(impl), copy=True).requires_grad_()
            output = dm_loss(
                leaf * 1,
                target.to(leaf.device),
                DM,
                impl=impl,
                inplace=True,
                return_output=True,
                **options,
                **{name: v.to(leaf.device) if isinstance(v, torch.Tensor) else v for name, v in transform.items()},
            )
            upstream = torch.full_like(output.loss, dloss)
            output.loss.backward(upstream)
            check(output, leaf.grad, expected(logits, target, DM, upstream.cpu(), **options, **transform))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's numpy: inf - inf
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_an_ignored_row_may_hold_anything(impl, transform):
    """And so may one whose weight is 0."""
    logits, target = make(4, 8)
    logits[1, 2:], logits[2, 3], target[1:3] = torch.nan, torch.inf, -100
    output, dlogits = run(impl, logits, target, DM, reduction="sum", **transform)
    assert output.loss.isfinite()
    assert (dlogits[1:3] == 0).all()
    assert (dlogits[::3] != 0).all()
    target[1:3], weight = 0, torch.tensor([1.0, 0.0, 0.0, 1.0])
    _, by_weight = run(impl, logits, target, DM, reduction="sum", sample_weight=weight, **transform)
    assert torch.equal(by_weight, dlogits)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's numpy: inf - inf
@pytest.mark.parametrize("impl", FUSED)
def test_infinite_logits(impl):
    """As in the eager code: a softcap makes them finite, a scale does not."""
    logits, target = make(3, 8)
    logits[0, 1], logits[1, 2], target[2] = -torch.inf, torch.inf, 5
    for transform in ({"softcap": 3.0}, {"logit_scale": 0.5}):
        theirs = fused_dm.reference.dm_loss(logits.double(), target, DM, reduction="none", **transform)
        output, dlogits = run(impl, logits, target, DM, reduction="none", **transform)
        assert torch.equal(output.loss.isnan(), theirs.loss.isnan().to(output.loss.device))
        assert (dlogits[0, 1] == 0).all()
    output, _ = run(impl, logits, target, DM, reduction="none", softcap=3.0)
    assert output.loss.isfinite().all()


@pytest.mark.parametrize("impl", FUSED)
def test_module_and_compiled(impl):
    torch._dynamo.reset()
    logits, target = make(12, 30)
    device = device_of(impl)
    criterion = DMLoss(DM, softcap=5.0, logit_scale=0.5, impl=impl)
    leaf = logits.to(device, copy=True).requires_grad_()
    loss = torch.compile(criterion, fullgraph=True, backend="aot_eager")(leaf, target.to(device))
    loss.backward()
    output, dlogits = run(impl, logits, target, DM, softcap=5.0, logit_scale=0.5)
    assert torch.equal(loss, output.loss)
    assert torch.equal(leaf.grad, dlogits)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["softcap", "logit_scale"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0.0, ValueError, "expected a finite number above 0, got 0.0"),
        (-2, ValueError, "expected a finite number above 0, got -2"),
        (float("inf"), ValueError, "expected a finite number above 0, got inf"),
        (True, TypeError, "expected a number, a 0-d tensor or None, got True"),
        ("30", TypeError, "expected a number, a 0-d tensor or None, got '30'"),
        (torch.ones(2), ValueError, r"expected a number or a 0-d tensor, got shape \(2,\)"),
        (torch.tensor(True), TypeError, "expected a real dtype, got torch.bool"),
        (torch.ones((), requires_grad=True), ValueError, "expected a tensor that does not require grad"),
        (torch.ones((), device="meta"), ValueError, "expected device cpu, that of (logits|input), got meta"),
    ],
)
def test_wrong_values(name, value, error, message):
    logits, target = make(3, 8)
    with pytest.raises(error, match=f"{name}: {message}"):
        dm_loss(logits, target, DM, **{name: value})
    with pytest.raises(error, match=f"{name}: {message}"):
        fused_dm.linear_dm_loss(logits, torch.ones(5, 8), target % 5, DM, **{name: value})
