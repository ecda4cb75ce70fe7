"""Inputs at the edge of the definition: each has a value that is defined, and no gradient that is not."""

import contextlib
import math

import numpy as np
import pytest
import torch
from batches import DTYPES, EMPHASES, IMPLEMENTATIONS, device_of, make, run
from tolerance import check, expected

import fused_dm
from fused_dm import dm_loss, edf

DM = edf.DM(beta=8, lambd=0.5)
REDUCTIONS = ["sum_weight", "mean", "sum", "none"]


def interpreted_infinities(impl):
    """The interpreter computes with numpy, which warns of the inf - inf that gives a row with +inf its nan."""
    return np.errstate(invalid="ignore", over="ignore") if impl == "triton" else contextlib.nullcontext()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("emphasis", EMPHASES, ids=str)
def test_every_row_ignored(impl, reduction, emphasis):
    logits, _ = make(7, 11)
    logits[0, 0] = math.nan
    output, dlogits = run(impl, logits, torch.full((7,), -100), emphasis, reduction=reduction)
    assert (output.loss == 0).all()
    assert torch.equal(dlogits, torch.zeros_like(dlogits))
    assert (output.example_weight == 0).all()
    assert output.target_prob.isnan().all()
    assert not output.correct.any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("emphasis", EMPHASES, ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_every_row_ignored_and_divided_by_their_number(impl, emphasis, inplace):
    """A normalizer of 0, which says that no row counts: 0 and not nan."""
    logits, _ = make(7, 11)
    leaf = logits.to(device_of(impl)).requires_grad_()
    target = torch.full((7,), -100, device=leaf.device)
    options = {"reduction": "sum", "normalizer": (target != -100).sum(), "impl": impl}
    # The interpreter computes with numpy, which warns of a quotient that is not used.
    with np.errstate(divide="ignore", invalid="ignore"):
        loss = dm_loss(leaf * 1, target, emphasis, inplace=inplace and impl != "reference", **options)
        loss.backward()
    assert loss == 0
    assert torch.equal(leaf.grad, torch.zeros_like(leaf))


NOTHING_BUT_NAN = {
    "one class": [math.nan],
    "nan": [math.nan, -math.inf, -math.inf],
    "+inf": [math.inf, -math.inf, -math.inf],
    "nothing": [-math.inf, -math.inf, -math.inf],
}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("row", NOTHING_BUT_NAN.values(), ids=NOTHING_BUT_NAN)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("emphasis", [DM, edf.CCE(), lambda log_p, log_q: log_q], ids=["dm", "cce", "custom"])
@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_value_of_nan_has_a_gradient_of_nan(impl, row, reduction, emphasis, eps, inplace):
    """Also where no other class has any probability, which otherwise has no gradient: a guard that looks there sees it."""
    inplace = inplace and impl != "reference"
    target = torch.zeros(2, dtype=torch.int64, device=device_of(impl))
    for dtype in DTYPES:
        leaf = torch.tensor([row, row], dtype=dtype, device=device_of(impl)).requires_grad_()
        with interpreted_infinities(impl):
            loss = dm_loss(leaf * 1, target, emphasis, reduction=reduction, eps=eps, inplace=inplace, impl=impl)
            loss.sum().backward()
        assert loss.isnan().all()
        assert leaf.grad.isnan().all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (2, 5, 0)])
def test_empty_batch(impl, reduction, shape):
    logits = torch.zeros(shape)
    output, dlogits = run(impl, logits, torch.zeros(shape[:1] + shape[2:], dtype=torch.int64), DM, reduction=reduction)
    assert dlogits.shape == logits.shape
    assert output.loss.sum() == 0
    assert output.sum_weight.item() == pytest.approx(1e-8)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("emphasis", EMPHASES, ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_one_class_has_no_gradient(impl, reduction, emphasis, eps):
    logits, target = torch.tensor([[3.0], [-2.0]]), torch.zeros(2, dtype=torch.int64)
    output, dlogits = run(impl, logits, target, emphasis, reduction=reduction, eps=eps)
    assert torch.equal(dlogits, torch.zeros_like(dlogits))
    assert (output.target_prob == 1).all()
    assert output.correct.all()
    assert (output.loss == 0).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_an_infinite_weight_where_no_other_class_has_any_probability(impl, reduction):
    """0 times infinity: such a row has no gradient and adds nothing to the value, whatever its weight."""
    logits, target = torch.tensor([[5.0, -torch.inf, -torch.inf], [1.0, 0.0, 0.0]]), torch.tensor([0, 1])
    output, dlogits = run(impl, logits, target, lambda log_p, log_q: -2 * log_q, reduction=reduction)
    assert (dlogits[0] == 0).all()
    assert dlogits[1].isfinite().all()
    assert (dlogits[1] != 0).all()
    assert output.loss.isfinite().all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("emphasis", EMPHASES, ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_probability_zero_and_one(impl, reduction, emphasis, eps):
    """p rounds to 0 and to 1, other classes at -inf, all other classes at -inf."""
    logits = torch.tensor(
        [
            [1e4, 0.0, 1.0, 2.0],
            [-1e4, 0.0, 1.0, 2.0],
            [2.0, -math.inf, 1.0, -math.inf],
            [2.0, -math.inf, -math.inf, -math.inf],
        ]
    )
    target = torch.zeros(4, dtype=torch.int64)
    truth = expected(logits, target, emphasis, reduction=reduction, eps=eps)
    assert truth.dlogits.isfinite().all()
    check(*run(impl, logits, target, emphasis, reduction=reduction, eps=eps), truth)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("emphasis", EMPHASES, ids=str)
def test_label_at_minus_infinity(impl, emphasis):
    logits = torch.tensor([[-math.inf, 0.0, 1.0], [1.0, 0.0, 2.0]])
    target = torch.tensor([0, 0])
    truth = expected(logits, target, emphasis, reduction="none")
    assert truth.dlogits.isfinite().all()
    check(*run(impl, logits, target, emphasis, reduction="none"), truth)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_weight_of_zero_where_the_label_has_no_probability(impl, reduction):
    """0 times infinity again: -log p is infinite and counts for nothing."""
    logits, target = torch.tensor([[-torch.inf, 0.0, 0.0], [1.0, 0.0, 0.0]]), torch.tensor([0, 1])
    output, dlogits = run(impl, logits, target, lambda log_p, log_q: 2 * log_p, reduction=reduction)
    assert (dlogits[0] == 0).all()
    assert (dlogits[1] != 0).all()
    assert output.loss.isfinite().all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["sum_weight", "none"])
@pytest.mark.parametrize("at", [0, 1, 150])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("emphasis", [DM, edf.CCE(), edf.MAE(), edf.GCE()], ids=str)
def test_nan_and_infinity_make_the_value_nan(impl, emphasis, bad, at, reduction):
    logits, _ = make(3, 200)
    logits[1, at] = bad
    target = torch.zeros(3, dtype=torch.int64)
    with interpreted_infinities(impl):
        output, dlogits = run(impl, logits, target, emphasis, reduction=reduction)
    if reduction == "none":
        assert output.loss.isnan().tolist() == [False, True, False]
        assert dlogits.isfinite().all(1).tolist() == [True, False, True]
    else:
        assert output.loss.isnan()
    assert output.target_prob.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("way", ["ignored", "sample weight 0", "class weight 0"])
def test_rows_that_do_not_count_may_hold_anything(impl, reduction, way):
    logits, target = make(5, 6)
    target[:] = torch.tensor([0, 1, 2, 3, 4])
    without = logits.clone()
    logits[2] = torch.tensor([math.nan, math.inf, -math.inf, 1e30, -1e30, 0])
    options: dict = {"reduction": reduction}
    if way == "ignored":
        target[2] = -100
    elif way == "sample weight 0":
        options["sample_weight"] = torch.tensor([1.0, 2.0, 0.0, 1.0, 0.5])
    else:
        options["weight"] = torch.tensor([1.0, 2.0, 0.0, 1.0, 0.5, 1.0])
    truth = expected(without, target, DM, **options)
    with interpreted_infinities(impl):
        output, dlogits = run(impl, logits, target, DM, **options)
    assert torch.equal(dlogits[2], torch.zeros_like(dlogits[2]))
    prob = truth.target_prob.clone()
    prob[2] = output.target_prob[2]
    correct = truth.correct.clone()
    correct[2] = output.correct[2]
    check(output, dlogits, truth._replace(target_prob=prob, correct=correct))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("emphasis", [DM, edf.CCE()], ids=str)
def test_all_weights_zero(impl, reduction, emphasis):
    output, dlogits = run(impl, *make(5, 6), emphasis, reduction=reduction, sample_weight=torch.zeros(5))
    assert (output.loss == 0).all()
    assert torch.equal(dlogits, torch.zeros_like(dlogits))
    assert output.sum_weight.item() == pytest.approx(1e-8)


@pytest.mark.parametrize("label", [-1, 6, 10**9, -(2**40), 2**40])
def test_label_that_is_no_class_on_the_cpu(label):
    logits, target = make(5, 6)
    target[3] = label
    with pytest.raises(IndexError, match=rf"target: expected labels in \[0, 6\).*got {label} at row 3"):
        fused_dm.dm_loss(logits, target, DM, impl="cpu")
    with pytest.raises(IndexError, match=rf"target: expected labels in \[0, 6\).*got {label}"):
        fused_dm.margin(logits, target, impl="cpu")


@pytest.mark.parametrize("label", [-1, 6, 10**9, -(2**40), 2**40])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_label_that_is_no_class_in_a_kernel(label, reduction, monkeypatch):
    logits, target = make(5, 6)
    target[3] = label
    output, dlogits = run("triton", logits, target, DM, reduction=reduction)
    assert output.target_prob.isnan().tolist() == [False, False, False, True, False]
    if reduction == "none":
        assert output.loss.isnan().tolist() == [False, False, False, True, False]
    else:
        assert output.loss.isnan()
    assert dlogits.isnan().any(1).tolist() == [False, False, False, True, False]
    # The sum of weights is nan with it, and an ignored row has received nothing all the same.
    ignoring = target.clone()
    ignoring[1] = -100
    output, dlogits = run("triton", logits, ignoring, DM)
    assert output.example_weight.isnan().tolist() == [True, False, True, True, True]
    assert output.example_weight[1] == 0
    assert (dlogits[1] == 0).all()
    # Such a label has no class whose weight might be 0.
    for emphasis in (DM, lambda log_p, log_q: log_q):
        output, dlogits = run("triton", logits, target, emphasis, reduction=reduction, weight=torch.zeros(6))
        assert dlogits.isnan().any(1).tolist() == [False, False, False, True, False]
        assert output.target_prob.isnan().tolist() == [False, False, False, True, False]
    monkeypatch.setenv("FUSED_DM_VALIDATE", "1")
    with pytest.raises(IndexError, match=rf"target: expected labels in \[0, 6\).*got {label}"):
        run("triton", logits, target, DM)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_near_certainty_keeps_its_digits(impl):
    """1 - p from 1e-3 to 1e-12: the row's L1 norm is w / S whatever p is."""
    classes = 5000
    q = torch.logspace(-3, -12, 10, dtype=torch.float64)
    logits = torch.zeros(10, classes, dtype=torch.float64)
    logits[:, 0] = torch.log((1 - q) / q) + math.log(classes - 1)
    logits = logits.float()
    target = torch.zeros(10, dtype=torch.int64)
    truth = expected(logits, target, DM, eps=0.0)
    output, dlogits = run(impl, logits, target, DM, eps=0.0)
    check(output, dlogits, truth)
    torch.testing.assert_close(
        dlogits.double().abs().sum(1).cpu(), truth.dlogits.abs().sum(1), rtol=1e-6, atol=0, check_dtype=False
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_grad_needs_no_gradient(impl):
    logits, target = make(5, 6)
    truth = expected(logits, target, DM)
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            output = fused_dm.dm_loss(logits.to(device), target.to(device), DM, impl=impl, return_output=True)
        assert not output.loss.requires_grad
        check(output, None, truth)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("emphasis", [DM, edf.CCE(), lambda log_p, log_q: log_q], ids=["dm", "cce", "custom"])
def test_rows_that_do_not_count_ignore_their_upstream_gradient(impl, dtype, emphasis):
    logits, target = make(4, 6, dtype)
    target[1] = -100
    upstream = torch.tensor([1.0, math.inf, 1.0, math.nan])
    sample_weight = torch.tensor([1.0, 1.0, 1.0, 0.0])
    with interpreted_infinities(impl):
        _, dlogits = run(impl, logits, target, emphasis, upstream, reduction="none", sample_weight=sample_weight)
    assert (dlogits[[1, 3]] == 0).all()
    assert (dlogits[[0, 2]].abs().sum(1) > 0).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["sum_weight", "mean"])
@pytest.mark.parametrize("upstream", [math.inf, math.nan])
@pytest.mark.parametrize("inplace", [False, True])
def test_rows_that_do_not_count_ignore_one_upstream_gradient_for_all(impl, dtype, reduction, upstream, inplace):
    logits, target = make(4, 6, dtype)
    target[1] = -100
    sample_weight = torch.tensor([1.0, 1.0, 1.0, 0.0])
    leaf = logits.to(device_of(impl)).requires_grad_()
    options = {
        "sample_weight": sample_weight.to(leaf.device),
        "reduction": reduction,
        "inplace": inplace and impl != "reference",
    }
    with interpreted_infinities(impl):
        loss = fused_dm.dm_loss(leaf * 1, target.to(leaf.device), DM, impl=impl, **options)
        dlogits = torch.autograd.grad(loss, leaf, torch.full_like(loss, upstream))[0].cpu()
    assert (dlogits[[1, 3]] == 0).all()
    assert not dlogits[[0, 2]].isfinite().any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "row",
    [[math.nan, 0, 1], [0, math.nan, 1], [math.inf, 0, 0], [0, 0, math.inf], [-math.inf, -math.inf, -math.inf]],
    ids=str,
)
def test_a_row_without_a_value_is_not_correct(impl, row):
    logits = torch.tensor([row, [1.0, 2.0, 3.0]])
    with interpreted_infinities(impl):
        output, _ = run(impl, logits, torch.tensor([2, 2]), DM, reduction="none")
    assert output.loss.isnan().tolist() == [True, False]
    assert output.correct.tolist() == [False, True]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("emphasis", [edf.Uniform(), edf.TruncatedGCE(), edf.SelfPaced(threshold=2)], ids=str)
def test_nan_reaches_the_sum_of_weights_that_do_not_depend_on_it(impl, emphasis):
    """A weight that is constant, or 0 unless a comparison holds, would count the row of the nan as any other or not at all."""
    logits, target = make(4, 6)
    logits[1, 2] = torch.nan
    output, dlogits = run(impl, logits, target, emphasis)
    assert output.sum_weight.isnan()
    assert output.loss.isnan()
    assert dlogits.isnan().all()
