"""What `make fuzz` once found, each with a name."""

import math

import numpy as np
import pytest
import torch
from batches import GPU, IMPLEMENTATIONS, device_of, make, run
from tolerance import check, compare, expected

from fused_dm import dm_loss, edf, reference

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


def test_a_subnormal_gradient_that_is_multiplied_where_it_lies():
    """The interpreter, not the kernel, took a subnormal of bf16 for another number: 2e-38 for 3e-39."""
    logits = torch.tensor([[0.0, 0.0, -88.75]], dtype=torch.bfloat16)
    leaf = logits.to(device_of("triton")).requires_grad_()
    target = torch.tensor([0], device=leaf.device)
    loss = dm_loss(leaf * 1, target, edf.Uniform(), reduction="mean", inplace=True, impl="triton")
    (dlogits,) = torch.autograd.grad(loss, leaf, torch.tensor(-2.0, device=leaf.device))
    truth = expected(logits, target, edf.Uniform(), torch.tensor(-2.0), reduction="mean")
    compare("dlogits", dlogits, truth.dlogits, truth.allowed["dlogits"])
    subnormal = dlogits[0, 2].item() / truth.dlogits[0, 2].item()
    assert GPU or abs(subnormal - 1) < torch.finfo(torch.bfloat16).eps * 8


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_value_that_is_lost_below_the_smallest_normal_before_it_is_divided(impl):
    """Of a batch of hopeless examples the value is 1e-34, made of terms of 1e-42 over a sum of weights of 1e-8."""
    logits, target = make(8, 8, scale=0.0, margins=1e4, seed=29154)
    check(*run(impl, logits, target, edf.DFT()), expected(logits, target, edf.DFT()))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows", [1, 200])
def test_a_weight_that_vanishes_beside_1e_8_times_an_infinite_value(impl, rows):
    """w = exp(-1000) of a label at -inf: the kernels, which sum relative to the largest weight, had inf * 0 = nan."""
    logits = torch.tensor([[-math.inf, 0.0]]).repeat(rows, 1)
    target = torch.zeros(rows, dtype=torch.int64)
    with np.errstate(over="ignore", invalid="ignore"):
        output, dlogits = run(impl, logits, target, edf.DM(beta=-1000, lambd=0))
    check(output, dlogits, expected(logits, target, edf.DM(beta=-1000, lambd=0)))
    assert output.loss == 0
    logits[0, 1] = math.nan
    with np.errstate(over="ignore", invalid="ignore"):
        assert run(impl, logits, target, edf.DM(beta=-1000, lambd=0), reduction="mean")[0].loss.isnan()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["sum_weight", "mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [2, 200])
@pytest.mark.parametrize(("beta", "infinite"), [(-1000, False), (-700, True), (-10, True)])
def test_whether_an_infinite_value_counts_is_a_matter_of_its_own_weight(impl, reduction, dtype, rows, beta, infinite):
    """Kernels compared w = exp(beta) of a label at -inf with the weights of its tile, torch with those of the batch."""
    logits, target = torch.zeros(rows, 2, dtype=dtype), torch.zeros(rows, dtype=torch.int64)
    logits[0, 0] = -math.inf
    emphasis = edf.DM(beta=beta, lambd=0)
    with np.errstate(over="ignore", invalid="ignore"):
        output, dlogits = run(impl, logits, target, emphasis, reduction=reduction)
    assert output.loss.isinf().any() == infinite
    check(output, dlogits, expected(logits, target, emphasis, reduction=reduction))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["sum_weight", "mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_infinite_value_among_rows_of_far_smaller_weight(impl, reduction, dtype):
    """Rows of a tile that weigh exp(-700), beside others of exp(69): relative to those, their sum of values was 0."""
    logits, target = torch.full((200, 2), 50.0, dtype=dtype), torch.zeros(200, dtype=torch.int64)
    logits[:100, 0], logits[:, 1] = -50.0, 0.0
    logits[7, 0] = -math.inf
    options = {"reduction": reduction, "sample_weight": torch.where(torch.arange(200) < 100, 1, 1e30)}
    emphasis = edf.DM(beta=-700, lambd=0)
    with np.errstate(over="ignore", invalid="ignore"):
        output, dlogits = run(impl, logits, target, emphasis, **options)
    assert output.loss == math.inf
    check(output, dlogits, expected(logits, target, emphasis, **options))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_q_that_is_lost_below_the_smallest_normal_before_eps_divides_it(impl):
    """q = 2e-42 has no digits in fp32, and q / (2 q + eps) = 2e-36 has no more."""
    logits, target = make(2, 3, scale=0.0, margins=160.0, seed=376222)
    check(*run(impl, logits, target, edf.Uniform()), expected(logits, target, edf.Uniform()))


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_a_slope_that_is_lost_below_the_smallest_normal_before_a_large_weight_multiplies_it(impl):
    """Under a softcap of 1 a logit of 100 has a slope of 1e-25 and a gradient below 1e-38 before its row's weight of 1e6."""
    logits, target = make(4, 4, torch.bfloat16, margins=80.0, offset=100.0, seed=376223)
    options = {"softcap": 1.0, "logit_scale": 0.3, "sample_weight": torch.tensor([1e6, 1e3, 1.0, 1e-6]), "reduction": "sum"}
    # Which label is the largest is not compared: in fp32 all of them are at the cap.
    _, dlogits = run(impl, logits, target, edf.Uniform(), **options)
    truth = expected(logits, target, edf.Uniform(), **options)
    assert ((dlogits.double().cpu() - truth.dlogits).abs() <= truth.allowed["dlogits"]).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("emphasis", [edf.AGCE(a=0.0, q=0.0625), edf.AUL(a=1 + 1e-15, q=0.01)], ids=["agce", "aul"])
def test_a_power_that_takes_back_most_of_log_p(impl, emphasis):
    """log w = log p + (q - 1) log(a + p) is a small difference of large numbers where a is small and p too."""
    logits, target = make(200, 2, scale=0.0, margins=80.0, seed=3)
    check(*run(impl, logits, target, emphasis, reduction="mean"), expected(logits, target, emphasis, reduction="mean"))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "emphasis", [edf.TruncatedGCE(q=1.0, k=0.9895412604780098), edf.TruncatedGCE(q=0.7, k=0.3), edf.PHuberCE(tau=1.0123456789)]
)
def test_the_log_of_a_parameter_near_1(impl, emphasis):
    """f = (1 - k^q) / q was off by 3e-6 for k = 0.99: the kernels took the log of k in fp32, where 1 - k has no more digits."""
    logits, target = make(50, 2, scale=0.0, margins=4.0, seed=4)
    check(*run(impl, logits, target, emphasis, reduction="mean"), expected(logits, target, emphasis, reduction="mean"))
    tops = logits.scatter_add(1, target[:, None], torch.full((50, 1), 6.0))
    check(*run(impl, tops, target, emphasis, reduction="mean"), expected(tops, target, emphasis, reduction="mean"))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("beta", [400.0, 4000.0])
def test_weights_that_cancel_and_beside_which_the_floor_vanishes(impl, dtype, beta):
    """Value and divisor are 0: the value was nan on a CPU."""
    logits, target = torch.tensor([[0.0, 0.0, -1.0]] * 2, dtype=dtype), torch.tensor([0, 0])
    options = {"sample_weight": torch.tensor([1.0, -1.0])}
    with np.errstate(all="ignore"):  # of the interpreter
        output, dlogits = run(impl, logits, target, edf.DM(beta=beta, lambd=1), **options)
    truth = reference.dm_loss(logits, target, edf.DM(beta=beta, lambd=1), **options)
    assert output.loss == truth.loss == 0
    assert (dlogits.isinf() | (dlogits.abs() > 1e30)).all()
