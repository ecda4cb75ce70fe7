"""Every implementation against the reference in fp64: shapes, dtypes, reductions, weights, ignored rows, extremes."""

import itertools

import numpy as np
import pytest
import torch
from batches import DTYPES, EMPHASES, IMPLEMENTATIONS, SHAPES, device_of, make, run
from tolerance import check, compare, expected
from torch.utils._python_dispatch import BaseTorchDispatchMode

from fused_dm import dm_loss, edf
from fused_dm._cpu import PIECE_ROWS

DM = edf.DM(beta=8, lambd=0.5)


def verify(impl, batch, emphasis, dloss=None, **options):
    truth = expected(*batch, emphasis, dloss, **options)
    check(*run(impl, *batch, emphasis, dloss, **options), truth)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["sum_weight", "mean"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_shapes(impl, dtype, shape, reduction):
    verify(impl, make(*shape, dtype, ignored=0.2), DM, reduction=reduction)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["sum_weight", "mean", "sum", "none"])
@pytest.mark.parametrize("emphasis", EMPHASES, ids=str)
def test_emphases(impl, emphasis, reduction):
    for dtype in DTYPES:
        batch = make(33, 50, dtype, seed=1, ignored=0.2)
        dloss = torch.linspace(-1, 2, 33) if reduction == "none" else torch.tensor(0.75)
        verify(impl, batch, emphasis, dloss, reduction=reduction)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("normalizer", [7.5, torch.tensor(7.5), torch.tensor(3), torch.tensor(7.5, dtype=torch.float64)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dloss", [1.0, 3.0])
def test_normalizer(impl, normalizer, dtype, dloss):
    batch = make(9, 300, dtype, ignored=0.2)
    verify(impl, batch, DM, torch.tensor(dloss), reduction="sum", normalizer=normalizer)


def far_below_the_range(log_p, log_q):
    """A weight of the user's, which fp32 does not hold for most p."""
    return 60 * (log_p + log_q)


# Example weights, EDF and divisor of which one or two leave the range of fp32, or nearly; what is made of them does not.
FAR = {
    "mean of tiny weights": (1e-30, {"reduction": "mean"}, (DM, edf.GCE(q=0.7), edf.Beta(alpha=12, eta=12))),
    "mean of tiny negative weights": (-1e-30, {"reduction": "mean"}, (DM, edf.GCE(q=0.7), edf.Beta(alpha=12, eta=12))),
    "tiny w(p)": (1.0, {"reduction": "sum", "normalizer": 1e-36}, (edf.Beta(alpha=61, eta=61), far_below_the_range)),
    "huge w(p)": (1.0, {"reduction": "sum", "normalizer": 1e43}, (edf.DM(beta=400, lambd=1),)),
    "huge w(p), divisor in range": (1.0, {"reduction": "sum", "normalizer": 1e29}, (edf.DM(beta=380, lambd=1),)),
    "divisor below the range": (1e-37, {"reduction": "sum", "normalizer": 1e-40}, (DM, edf.CCE())),
    "divisor above the range": (1e35, {"reduction": "sum", "normalizer": 1e39}, (DM, edf.CCE())),
}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FAR)
def test_weights_and_divisors_far_from_1(impl, dtype, case):
    by, options, emphases = FAR[case]
    batch = make(65, 40, dtype, seed=3, ignored=0.2)
    sample_weight = by * torch.linspace(0.5, 2, 65)
    for emphasis in emphases:
        for dloss in (torch.tensor(1e-9), torch.tensor(1.0)):
            # The gradient for 1 may be more than fp16 holds.
            if dtype == torch.float16 and dloss == 1 and case == "huge w(p), divisor in range":
                continue
            verify(impl, batch, emphasis, dloss, sample_weight=sample_weight, **options)
            with BaseTorchDispatchMode():
                # As traced code computes, which cannot look at a number.
                output, dlogits = run(impl, *batch, emphasis, dloss, sample_weight=sample_weight, **options)
            check(output, dlogits, expected(*batch, emphasis, dloss, sample_weight=sample_weight, **options))
            if by == 1:
                verify(impl, batch, emphasis, dloss, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dloss_that_brings_the_gradient_into_range(dtype):
    """The kernels multiply by it before they divide: weights of exp(-94) to exp(-100) times 1e38."""
    batch, dloss = make(65, 40, dtype, seed=3, margins=0.5, ignored=0.2), torch.tensor(1e38)
    truth = expected(*batch, edf.DM(beta=-400, lambd=1), dloss, reduction="sum", normalizer=1.0)
    _, dlogits = run("triton", *batch, edf.DM(beta=-400, lambd=1), dloss, reduction="sum", normalizer=1.0)
    compare("dlogits", dlogits, truth.dlogits, truth.allowed["dlogits"])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["sum_weight", "mean", "sum", "none"])
@pytest.mark.parametrize("emphasis", [DM, edf.CCE()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_weights_of_any_sign(impl, reduction, emphasis, dtype):
    batch = make(40, 12, dtype, seed=2, ignored=0.2)
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(12, generator=generator) + 0.5
    weight[::5] = 0
    sample_weight = torch.randn(40, generator=generator) + 1
    sample_weight[::7] = 0
    for options in ({"weight": weight}, {"sample_weight": sample_weight}, {"weight": weight, "sample_weight": sample_weight}):
        verify(impl, batch, emphasis, reduction=reduction, **options)


@pytest.mark.parametrize(
    ("impl", "inplace"), sorted(set(itertools.product(IMPLEMENTATIONS, [False, True])) - {("reference", True)})
)
@pytest.mark.parametrize("divisor", ["nan", "zero"])
@pytest.mark.parametrize("emphasis", [DM, lambda log_p, log_q: log_q], ids=["dm", "custom"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_do_not_count_have_no_gradient_whatever_the_divisor_is(impl, inplace, divisor, emphasis, dtype):
    """An ignored row, and those whose weight is 0: their gradient is 0 where that of all others is nan or infinite."""
    # On a CPU in several pieces.
    rows = PIECE_ROWS + 4 if impl == "cpu" else 4
    logits, target = make(rows, 3, dtype)
    device = device_of(impl)
    sample_weight = torch.zeros(rows)
    sample_weight[:2] = torch.tensor([1.0, -1.0])
    sample_weight[3] = 1.0
    target[3] = -100
    if divisor == "nan":
        logits[0] = torch.nan
    leaf = logits.to(device).requires_grad_()
    # Triton's interpreter computes with numpy.
    with np.errstate(divide="ignore", invalid="ignore"):
        dm_loss(
            leaf * 1,
            target.to(device),
            emphasis,
            sample_weight=sample_weight.to(device),
            reduction="sum_weight" if divisor == "nan" else "mean",
            inplace=inplace,
            impl=impl,
        ).backward()
    assert not leaf.grad[:2].isfinite().any()
    assert torch.equal(leaf.grad[2:], torch.zeros_like(leaf.grad[2:]))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("emphasis", [DM, edf.CCE(), lambda log_p, log_q: log_q], ids=["dm", "cce", "custom"])
@pytest.mark.parametrize("name", ["weight", "sample_weight"])
def test_a_weight_that_is_nan_shows(impl, reduction, emphasis, name):
    """In the row's gradient and weight and in the value, and nowhere else."""
    logits, target = make(12, 12)
    target = torch.arange(12)
    weights = torch.linspace(-1, 2, 12)
    weights[5] = torch.nan
    output, dlogits = run(impl, logits, target, emphasis, reduction=reduction, **{name: weights})
    assert dlogits[5].isnan().all()
    assert output.example_weight[5].isnan()
    assert (output.loss if reduction == "sum" else output.loss[5]).isnan()
    others = torch.arange(12) != 5
    truth = expected(logits, target, emphasis, reduction=reduction, **{name: weights})
    for what, got in (("dlogits", dlogits), ("example_weight", output.example_weight)):
        compare(what, got[others], getattr(truth, what)[others], truth.allowed[what][others])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["sum_weight", "mean", "sum"])
@pytest.mark.parametrize("emphasis", EMPHASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("margins", "offset", "scale"),
    [(80.0, 0.0, 2.0), (1e4, 0.0, 2.0), (8.0, 1e4, 2.0), (8.0, -1e4, 2.0), (8.0, 0.0, 30.0), (1e-3, 0.0, 1e-3)],
    ids=["margins 80", "margins 1e4", "offset 1e4", "offset -1e4", "wide span", "narrow span"],
)
def test_extremes(impl, reduction, emphasis, dtype, margins, offset, scale):
    verify(impl, make(17, 40, dtype, margins=margins, offset=offset, scale=scale), emphasis, reduction=reduction)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("beta", [1000.0, -1000.0])
def test_huge_beta_overflows_nowhere_under_sum_weight(impl, beta):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        verify(impl, make(17, 40, dtype), edf.DM(beta=beta, lambd=0.5))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.1])
@pytest.mark.parametrize("emphasis", [DM, edf.CCE()], ids=str)
def test_eps(impl, eps, emphasis):
    for dtype in DTYPES:
        verify(impl, make(17, 40, dtype, margins=30.0), emphasis, eps=eps)


TARGET_DTYPES = [
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", TARGET_DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["sum_weight", "mean"])
@pytest.mark.parametrize("validate", ["0", "1"])
def test_target_dtypes(impl, dtype, reduction, validate, monkeypatch):
    """V and ignore_index may lie outside the labels' dtype, where a comparison would wrap: 156 is -100 in uint8."""
    monkeypatch.setenv("FUSED_DM_VALIDATE", validate)
    logits, _ = make(6, 300)
    target = torch.tensor([0, 3, 100, 127, 5, 7] if dtype == torch.int8 else [0, 3, 156, 255, 5, 7])
    options = {"reduction": reduction, "weight": torch.linspace(0.5, 2, 300)}
    truth = expected(logits, target, DM, **options)
    check(*run(impl, logits, target.to(dtype), DM, **options), truth)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_ignore_index_may_be_a_class(impl):
    batch = make(30, 5)
    verify(impl, batch, DM, ignore_index=2)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["sum_weight", "mean", "sum", "none"])
@pytest.mark.parametrize("layout", ["aligned rows", "odd rows", "columns first", "every other class"])
def test_rows_and_classes_may_be_strided(impl, reduction, layout):
    logits, target = make(20, 48)
    device = device_of(impl)
    wide = torch.zeros(20, 128, device=device)
    if layout == "columns first":
        strided = logits.to(device).t().contiguous().t()
    else:
        views = {"aligned rows": wide[:, 8:56], "odd rows": wide[:, :127][:, 3:51], "every other class": wide[:, ::2][:, :48]}
        strided = views[layout]
        strided.copy_(logits)
    leaf = strided.detach().requires_grad_()
    assert leaf.stride() != logits.stride()
    output = dm_loss(leaf, target.to(device), DM, reduction=reduction, return_output=True, impl=impl)
    (dlogits,) = torch.autograd.grad(output.loss.sum(), leaf)
    check(output, dlogits, expected(logits, target, DM, reduction=reduction))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["sum_weight", "mean"])
@pytest.mark.parametrize(("count", "stride"), [(2, 2**31), (3, 2**30 + 1)], ids=["stride", "product"])
def test_rows_further_apart_than_32_bits_reach(impl, reduction, count, stride):
    """As the last positions of a batch of sequences over a large vocabulary may be: their stride, or a multiple of it."""
    # Memory that is not touched takes no place.
    buffer = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device_of(impl))
    logits, target = make(count, 16, torch.bfloat16)
    rows = buffer.as_strided((count, 16), (stride, 1))
    rows.copy_(logits)
    leaf = rows.detach().requires_grad_()
    output = dm_loss(leaf, target.to(leaf.device), DM, reduction=reduction, return_output=True, impl=impl)
    (dlogits,) = torch.autograd.grad(output.loss, leaf)
    check(output, dlogits, expected(logits, target, DM, reduction=reduction))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["sum_weight", "mean", "none"])
def test_spatial(impl, reduction):
    logits, target = make(2 * 3 * 4, 7, ignored=0.2)
    spatial = logits.reshape(2, 3, 4, 7).movedim(-1, 1)
    sample_weight = torch.rand(24) + 0.5
    truth = expected(logits, target, DM, reduction=reduction, sample_weight=sample_weight)
    output, dlogits = run(
        impl, spatial, target.reshape(2, 3, 4), DM, reduction=reduction, sample_weight=sample_weight.reshape(2, 3, 4)
    )
    assert dlogits.shape == spatial.shape
    assert output.example_weight.shape == output.target_prob.shape == output.correct.shape == (2, 3, 4)
    flat = output._replace(
        loss=output.loss.flatten() if reduction == "none" else output.loss,
        example_weight=output.example_weight.flatten(),
        target_prob=output.target_prob.flatten(),
        correct=output.correct.flatten(),
    )
    check(flat, dlogits.movedim(1, -1).reshape(24, 7), truth)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["sum_weight", "mean", "sum", "none"])
def test_single_example(impl, reduction):
    logits, target = make(1, 7)
    output, dlogits = run(impl, logits[0], target[0], DM, reduction=reduction)
    whole, gradient = run(impl, logits, target, DM, reduction=reduction)
    assert output.loss.shape == ()
    torch.testing.assert_close(output.loss, whole.loss.reshape(()), rtol=0, atol=0)
    torch.testing.assert_close(dlogits, gradient[0], rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["sum_weight", "mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeatable_to_the_bit_and_logits_untouched(impl, reduction, dtype):
    logits, target = make(20, 300, dtype, ignored=0.2)
    before = logits.clone()
    runs = [run(impl, logits, target, DM, reduction=reduction) for _ in range(2)]
    for output, dlogits in runs[1:]:
        assert torch.equal(dlogits, runs[0][1])
        for name in ("loss", "example_weight", "sum_weight"):
            assert torch.equal(getattr(output, name), getattr(runs[0][0], name))
    assert torch.equal(logits, before)
    assert runs[0][0].loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (runs[0][1][(target == -100).to(runs[0][1].device)] == 0).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_aligned_and_unaligned_rows_agree_to_the_bit(impl, dtype):
    logits, target = make(20, 48, dtype)
    wide = torch.zeros(20, 64, dtype=dtype)
    wide[:, :48] = logits
    assert torch.equal(run(impl, wide[:, :48], target, DM)[1], run(impl, logits, target, DM)[1])


@pytest.mark.parametrize("impl", ["cpu", "triton"])
@pytest.mark.parametrize("reduction", ["sum_weight", "mean", "sum", "none"])
@pytest.mark.parametrize("emphasis", EMPHASES, ids=str)
def test_margin_path_agrees_with_fused(impl, reduction, emphasis):
    batch = make(33, 50, seed=5, ignored=0.2)

    def same(log_p, log_q):
        return emphasis.log_weight(log_p, log_q)

    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        logits = batch.logits.to(dtype)
        eps = 0.0 if emphasis.has_loss else 1e-6
        truth = expected(logits, batch.target, same, reduction=reduction, eps=eps)
        check(*run(impl, logits, batch.target, same, reduction=reduction, eps=eps), truth)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_cross_entropy_is_torchs(impl):
    logits, target = make(40, 30, torch.float64, ignored=0.2)
    weight = torch.rand(30, dtype=torch.float64)
    for options in ({}, {"weight": weight}):
        leaf = logits.clone().requires_grad_()
        theirs = torch.nn.functional.cross_entropy(leaf, target, **options)
        theirs.backward()
        output, dlogits = run(impl, logits, target, edf.CCE(), reduction="mean", **options)
        torch.testing.assert_close(output.loss.cpu(), theirs, rtol=1e-13, atol=0)
        torch.testing.assert_close(dlogits.cpu(), leaf.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e8m0fnu], ids=str
)
@pytest.mark.parametrize("reduction", ["sum_weight", "mean"])
def test_weights_of_8_bits(impl, dtype, reduction):
    """They become weights of the dtype of the rows' numbers before a kernel sees them: not every GPU can load them."""
    logits, target = make(9, 20, ignored=0.2)
    weights = {"weight": torch.linspace(0.5, 2, 20).to(dtype), "sample_weight": torch.linspace(0.25, 3, 9).to(dtype)}
    truth = expected(logits, target, DM, reduction=reduction, **{name: value.double() for name, value in weights.items()})
    check(*run(impl, logits, target, DM, reduction=reduction, **weights), truth)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("emphasis", [DM, lambda log_p, log_q: log_q], ids=["dm", "custom"])
@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "mean"}, {"reduction": "sum", "normalizer": torch.tensor(-3.0).double()}, {"reduction": "none"}],
    ids=["sum_weight", "mean", "normalizer", "none"],
)
def test_what_torch_negates_when_it_reads(impl, emphasis, options):
    """Such views, of which imaginary parts of conjugates are some, hold the negative of their values."""
    logits, target = make(9, 20, torch.float64, ignored=0.2)
    device = device_of(impl)
    weights = {"weight": torch.linspace(-2, 2, 20), "sample_weight": torch.linspace(-0.25, -3, 9)}
    given = {"logits": logits, "dloss": torch.linspace(-2, 3, 9).double(), **weights, **options}
    given = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    negated = {name: torch._neg_view(-value) if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    found = []
    for values in (given, negated):
        leaf, dloss = values.pop("logits").requires_grad_(), values.pop("dloss")
        output = dm_loss(leaf, target.to(device), emphasis, impl=impl, return_output=True, **values)
        dloss = dloss if output.loss.dim() else dloss[1]
        found.append((*output, *torch.autograd.grad(output.loss, leaf, dloss)))
    for got, exact in zip(*found, strict=True):
        assert torch.equal(got.nan_to_num(), exact.nan_to_num())
