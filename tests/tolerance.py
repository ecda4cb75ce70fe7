"""The one bound on numerical error. No number of it appears elsewhere, and no test loosens it.

Truth is the reference in fp64 on the same, already rounded inputs. A result may differ from it, element by element, by
`rtol |exact| + atol`. The relative part is first-order rounding analysis in units of u = eps(compute dtype):

- exp(z_j - max): the argument is rounded, an absolute error of u |z_j - max|, hence a relative error of `2 depth_j` u, where
  depth_j = |z_j - max| and max is over the classes other than the label. Their sum has the mean of these errors, each class
  by its share of the sum: `2 depth` u, which is small however low a masked logit is.
- the margin, z_y - max - log sum, has an absolute error of `2 reach` u, where reach = |z_y - max| + depth + log V.
- p and q have the margin's error as a relative one, as |d log p / d margin| <= 1. A function f of the margin has it times
  |d log f / d margin|, which is evaluated: for the reported value, for w, and for q / (2 q + eps).
- log w has its own rounding: the EDF's arithmetic is a handful of operations on numbers up to |log w|, allowed 4 |log w| u. A
  row's weight c adds |log c|.
- the sum of weights, to which 1e-8 belongs, has the weighted mean of its terms' errors, sum |c w| error / |S|, which grows
  where weights of different signs cancel; a sum of values likewise.
- what remains, products, quotients, hardware exp2 and the sum over a block, is allowed 8 u.

On top comes one unit in the last place of the storage dtype: half is what rounding once costs, and a gradient that is
stored rounded and scaled later, or stored by truncation as Triton's interpreter does in bf16, needs the other half.

The absolute part is the smallest normal of fp32 (products flush to zero below it) times what is multiplied afterwards where
that exceeds 1: a direction whose element is below the smallest normal has no digits, whatever the row's coefficient is, nor
has a row's value, whatever it is divided by, nor q, which eps divides. A 16-bit gradient may lose its dtype's smallest
subnormal besides, once.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_dm import reference

BASE = 8.0
LOG_FLOOR = math.log(1e-8)


class Expected(NamedTuple):
    """Exact results in fp64, and by how much each may be missed."""

    loss: Tensor
    dlogits: Tensor
    example_weight: Tensor
    target_prob: Tensor
    sum_weight: Tensor
    correct: Tensor
    allowed: dict[str, Tensor]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _slope(function: Any, margin: Tensor) -> tuple[Tensor, Tensor]:
    """A function of (log p, log q), and how fast it changes with the margin; (N,) each."""
    margin = margin.clone().requires_grad_()
    log_p, log_q = torch.nn.functional.logsigmoid(margin), torch.nn.functional.logsigmoid(-margin)
    value = function(log_p.clamp(min=-1e30), log_q.clamp(min=-1e30)) + 0 * margin.nan_to_num(0, 0, 0)
    (slope,) = torch.autograd.grad(value.sum(), margin)
    return value.detach(), slope.abs()


def depths(logits: Tensor, target: Tensor, ignore_index: int = -100) -> tuple[Tensor, Tensor, Tensor]:
    """depth_j of every element (N, V), 0 for the label, and depth and reach of every row (N,); see above."""
    z = logits.double()
    label = torch.where(target != ignore_index, target, 0).long()[:, None]
    others = z.scatter(1, label, -math.inf)
    top = others.amax(1, keepdim=True)
    top = torch.where(top.isfinite(), top, 0)
    each = torch.where(others.isfinite(), (others - top).abs(), 0)
    mean = (torch.exp(others - top).nan_to_num(0, 0, 0) * each).sum(1) / torch.exp(others - top).sum(1).clamp(min=1)
    lead = (z.gather(1, label) - top)[:, 0].abs().nan_to_num(0, 0, 0)
    return each, mean, lead + mean + math.log(z.shape[1])


def _moves(logits: Tensor, target: Tensor, error: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """How far lse and margin, (N,) each, may be off where the logits may be off by `error` (N, V)."""
    label = torch.where(target != ignore_index, target, 0).long()[:, None]
    others = torch.softmax(logits.scatter(1, label, -math.inf), 1).nan_to_num(0)
    lse = (others * torch.exp(error)).sum(1).clamp(min=1).log()
    return lse, lse + error.gather(1, label)[:, 0]


def _moved(function: Any, margin: Tensor, by: Tensor) -> Tensor:
    """The largest change of a function of (log p, log q), whose value is a logarithm, within `by` (N,) of the margins."""

    def at(margin: Tensor) -> Tensor:
        log_p, log_q = torch.nn.functional.logsigmoid(margin), torch.nn.functional.logsigmoid(-margin)
        return function(log_p.clamp(min=-1e30), log_q.clamp(min=-1e30)) + 0 * margin

    steps = torch.linspace(-1, 1, 33, dtype=torch.float64)
    return (at(margin + steps[:, None] * by) - at(margin)).abs().nan_to_num(0, 0, 0).amax(0)


def _lost(storage: torch.finfo, k: Tensor) -> Tensor:
    """What an element may lose below the range of fp32, before it is multiplied by k, and of the storage dtype."""
    lost = torch.finfo(torch.float32).tiny * torch.clamp(k, min=1)
    # Of the dtypes only fp16 has a smaller range, and it stores no gradient before its coefficient is known.
    return lost + storage.smallest_normal * storage.eps if storage.bits == 16 else lost


def expected(
    logits: Tensor,
    target: Tensor,
    emphasis: Any,
    dloss: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    logit_error: Tensor | None = None,
    **options: Any,
) -> Expected:
    """The truth for a call of dm_loss with these arguments, logits (N, V), and the bound on every result.

    `dloss` is the derivative by the loss, of its shape; 1 where it is None. `dtype` is that of the logits which the
    implementation saw, if it is another, and `logit_error` (N, V) by how much they may be off.
    """
    if options.get("softcap") is not None or options.get("logit_scale") is not None:
        return _expected_of_transformed(logits, target, emphasis, dloss, dtype, logit_error, **options)
    logits, target = logits.detach().cpu(), target.cpu()
    options = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in options.items()}
    z = logits.double().requires_grad_()
    exact = reference.dm_loss(z, target, emphasis, **options)
    dloss = torch.ones_like(exact.loss) if dloss is None else dloss.double().cpu()
    exact.loss.backward(dloss)
    dlogits, loss = z.grad, exact.loss.detach()

    dtype = logits.dtype if dtype is None else dtype
    storage, compute = torch.finfo(dtype), torch.finfo(compute_dtype(dtype))
    ignore_index = options.get("ignore_index", -100)
    valid = target != ignore_index
    margin = reference.margin(z.detach(), target, ignore_index)
    function = emphasis.log_weight if hasattr(emphasis, "log_weight") else emphasis
    has_loss = getattr(emphasis, "has_loss", False)
    eps = options.get("eps")
    eps = (0.0 if has_loss else 1e-6) if eps is None else eps
    log_weight, weight_slope = _slope(function, margin)

    def log_value(log_p: Tensor, log_q: Tensor) -> Tensor:
        return (emphasis.loss(log_p, log_q) if has_loss else -log_p).clamp(min=1e-300).log()

    _, value_slope = _slope(log_value, margin)
    unit_slope = (1 - torch.sigmoid(-margin)) * eps / (2 * torch.sigmoid(-margin) + eps) if eps else 0 * margin
    c = torch.where(valid, torch.ones_like(margin), 0)
    if options.get("weight") is not None:
        c = c * options["weight"].double()[torch.where(valid, target, 0).long()]
    if options.get("sample_weight") is not None:
        c = c * options["sample_weight"].double()
    counts = c != 0
    log_cw = torch.where(counts, log_weight + c.abs().log(), 0)
    depth_each, depth, reach = depths(logits, target, ignore_index)
    # A weight that is exactly 0 has no error.
    rounding = BASE + 4 * (
        torch.where(log_weight == -math.inf, 0, log_weight.abs()) + torch.where(counts, c.abs().log().abs(), 0)
    )

    u, label = compute.eps, torch.where(valid, target, 0).long()[:, None]
    moved = dict.fromkeys(("weight", "value", "unit", "prob"), torch.zeros_like(margin))
    lse_moved, logit_moved = torch.zeros_like(margin), torch.zeros_like(z.detach())
    if logit_error is not None:
        lse_moved, by = _moves(z.detach(), target, logit_error, ignore_index)
        logit_moved = logit_error
        moved["weight"] = _moved(function, margin, by)
        moved["value"] = _moved(log_value, margin, by)
        moved["prob"] = _moved(lambda log_p, _: log_p, margin, by)
        if eps:
            moved["unit"] = _moved(lambda _, q: q - torch.log(2 * q.exp() + eps), margin, by)

    def error(slopes: dict[str, Tensor]) -> Tensor:
        """The relative error of a row's number whose logarithm has these slopes, in units of u."""
        total = rounding + 2 * reach * sum(slope.nan_to_num(1, 1, 1) for slope in slopes.values())
        return torch.where(counts, total + torch.expm1(sum(moved[name] for name in slopes)) / u, 0)

    of_value, of_weight, of_unit = {"value": value_slope}, {"weight": weight_slope}, {"unit": unit_slope}
    row = error(of_weight)
    row_value = error(of_value) if has_loss else error(of_value | of_weight)
    # Of the classes other than the label; the label's own element has no exp(z_j - lse).
    of_class = torch.expm1((lse_moved[:, None] + logit_moved).scatter(1, label, 0)) / u
    of_class = of_class * (1 + torch.expm1(moved["weight"] + moved["unit"]))[:, None]
    row_gradient = error(of_weight | of_unit)[:, None] + torch.where(
        counts[:, None], 2 * depth[:, None] + 2 * depth_each + of_class, 0
    )

    per_row = options.get("reduction", "sum_weight") == "none"
    # The terms of the sum of weights, 1e-8 among them, relative to the largest.
    logs = torch.cat([torch.where(counts, log_cw, -math.inf), torch.tensor([LOG_FLOOR])])
    terms = torch.exp(logs - logs.max())
    errors = torch.cat([row, torch.tensor([BASE + 4 * abs(LOG_FLOOR)])])
    signs = torch.cat([c.sign(), torch.ones(1)])
    divisor = (terms * errors).sum() / (signs * terms).sum().abs()
    if options.get("reduction", "sum_weight") in ("sum", "none"):
        on_divisor = torch.zeros(())
    elif options.get("reduction") == "mean":
        on_divisor = c.abs().sum() / c.sum().abs() * BASE if counts.any() else torch.zeros(())
    else:
        on_divisor = divisor + BASE
    # The coefficient of the row: half the L1 norm of its gradient.
    k = dlogits.abs().sum(1).nan_to_num(0, 0, 0) / 2
    if eps:
        # k = q (w / (2 q + eps)), of which q may be lost.
        of_q = (exact.example_weight * dloss).abs() / (2 * torch.sigmoid(-margin) + eps)
        k = torch.maximum(k, of_q.nan_to_num(0, 0, 0))
    one = torch.finfo(torch.float32).tiny
    lost_in_row = _lost(storage, k)[:, None]
    if per_row or has_loss:
        values = {**options, "reduction": "none", "normalizer": None}
        values = reference.dm_loss(logits.double(), target, emphasis, **values).loss.detach()
        scale = 1.0 if per_row else (loss.abs() / values.sum().abs()).nan_to_num(1, 1, 1)
    else:
        # c w / D times -log p: no weight overflows.
        cross_entropy = torch.nn.functional.softplus(-margin)
        values = torch.where(exact.example_weight == 0, 0, exact.example_weight * cross_entropy)
        scale = 1.0
    value_error = values.abs() * (row_value + on_divisor) * u
    # Every row's value may be lost below the smallest normal, and is then multiplied by c and 1 / D.
    lost = torch.clamp(c.abs(), min=1) * one
    if not per_row:
        lost = torch.clamp(torch.where(counts, lost, 0).sum() * max(1.0, float(scale)), min=one)
    allowed = {
        "dlogits": (storage.eps + (row_gradient + on_divisor) * u) * dlogits.abs() + lost_in_row,
        "loss": (value_error if per_row else value_error.nan_to_num(0, 0, 0).sum() * scale) + u * loss.abs() + lost,
        "example_weight": (row + on_divisor + 1) * u * exact.example_weight.abs() + one,
        "target_prob": ((BASE + 2 * reach) * u + torch.expm1(moved["prob"])) * exact.target_prob + one,
        "sum_weight": (divisor + BASE) * u * exact.sum_weight.abs() + one,
    }
    return Expected(loss, dlogits, *exact[1:], allowed)


def _expected_of_transformed(logits, target, emphasis, dloss, dtype, logit_error, *, softcap=None, logit_scale=None, **options):
    """With z' = c tanh(x), x = s z / c: the truth for the logits z', whose gradient is multiplied by s / cosh(x)^2.

    x has the relative error 2 u, which z' has at most, as x / (cosh x sinh x) <= 1; tanh has 4 u, and the product 1 u. Where
    the raw logits have an error of their own, z' has at most s times that. The slope has 2 |x| u from x, twice that from the
    exponential of 2 |x|, and 8 u from its own operations.
    """
    dtype = logits.dtype if dtype is None else dtype
    u = torch.finfo(compute_dtype(dtype)).eps
    raw = logits.detach().double().cpu()
    scale = 1.0 if logit_scale is None else float(logit_scale)
    x = raw * scale
    off = torch.zeros_like(x) if logit_error is None else logit_error * abs(scale)
    if softcap is None:
        capped, slope, of_slope = x, torch.full_like(x, scale), torch.zeros_like(x)
    else:
        x = x / float(softcap)
        capped, slope = float(softcap) * torch.tanh(x), scale / torch.cosh(x).square()
        of_slope = (8 + 6 * x.abs()) * u + torch.expm1(2 * off / float(softcap))
    # An infinite logit is what it is, and a slope of 0 too.
    of_slope = torch.where(slope == 0, 0, of_slope)
    error = off + torch.where(capped.isfinite(), 7 * u * capped.abs(), 0)
    truth = expected(capped, target, emphasis, dloss, dtype=dtype, logit_error=error, **options)
    allowed = dict(truth.allowed)
    allowed["dlogits"] = slope * (allowed["dlogits"] + truth.dlogits.abs() * (of_slope + u))
    # What is below the range of the storage dtype or of fp32 vanishes after the slope has been applied.
    k = truth.dlogits.abs().sum(1, keepdim=True).nan_to_num(0, 0, 0) / 2
    allowed["dlogits"] += _lost(torch.finfo(dtype), k)
    return truth._replace(dlogits=truth.dlogits * slope, allowed=allowed)


class LinearExpected(NamedTuple):
    """Exact results of the last layer and the loss in fp64, and by how much each may be missed."""

    loss: Tensor
    dinput: Tensor
    dweight: Tensor
    dbias: Tensor | None
    example_weight: Tensor
    target_prob: Tensor
    sum_weight: Tensor
    correct: Tensor
    certain: Tensor  # where the bound on the logits leaves no doubt about `correct`
    allowed: dict[str, Tensor]


def expected_linear(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    emphasis: Any,
    dloss: Tensor | None = None,
    *,
    linear_bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> LinearExpected:
    """The truth for dm_loss of the logits of a layer, input (N, H), and the bound that the unfused computation keeps.

    A sum of n products in any order has the error n u times the sum of their magnitudes, and its result is rounded once to the
    storage dtype. So a logit may be off by (H + 1) u sum_h |x_h w_jh| + eps(storage) |z_j|; what that does to the rows' numbers
    is evaluated, as it is not small in 16 bits. The gradient by the logits is multiplied with weight and input with whatever
    errors it has, and those of the products' own sums, of V and N terms, come on top.
    """
    dtype = input.dtype if dtype is None else dtype
    storage, u = torch.finfo(dtype), torch.finfo(compute_dtype(dtype)).eps
    x, w = input.detach().to(dtype).double().cpu(), linear_weight.detach().to(dtype).double().cpu()
    b = torch.zeros(len(w), dtype=torch.float64) if linear_bias is None else linear_bias.detach().to(dtype).double().cpu()
    logits = x @ w.t() + b
    magnitude = x.abs() @ w.abs().t() + b.abs()
    rounded = storage.eps * logits.abs() if storage.eps > u else 0
    error = (x.shape[1] + 1) * u * magnitude + rounded
    truth = expected(logits, target, emphasis, dloss, dtype=dtype, logit_error=error, **options)
    g, off = truth.dlogits, truth.allowed["dlogits"]

    def product(exact: Tensor, off: Tensor, magnitude: Tensor, terms: int, given: torch.dtype) -> Tensor:
        return off + (terms + 2) * u * magnitude + torch.finfo(given).eps * exact.abs() + torch.finfo(given).tiny

    dinput, dweight, dbias = g @ w, g.t() @ x, g.sum(0)
    allowed = dict(truth.allowed)
    del allowed["dlogits"]
    allowed["dinput"] = product(dinput, off @ w.abs(), g.abs() @ w.abs(), len(w), input.dtype)
    allowed["dweight"] = product(dweight, off.t() @ x.abs(), g.abs().t() @ x.abs(), len(x), linear_weight.dtype)
    if linear_bias is not None:
        allowed["dbias"] = product(dbias, off.sum(0), g.abs().sum(0), len(x), linear_bias.dtype)
    lead, doubt = _lead(logits, target, error, options.get("ignore_index", -100))
    return LinearExpected(
        truth.loss,
        dinput,
        dweight,
        None if linear_bias is None else dbias,
        *truth[2:6],
        certain=lead.abs() > doubt,
        allowed=allowed,
    )


def _lead(logits: Tensor, target: Tensor, error: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The label's logit less the largest other, (N,), and by how much it may be off. A softcap keeps their order."""
    label = torch.where(target != ignore_index, target, 0).long()[:, None]
    lead = logits.gather(1, label)[:, 0] - logits.scatter(1, label, -math.inf).amax(1)
    return lead, 2 * error.amax(1)


def check_linear(output: Any, gradients: dict[str, Tensor], truth: LinearExpected) -> None:
    """Compare an output and gradients named "dinput", "dweight" and "dbias" with the truth."""
    for name in ("loss", "example_weight", "target_prob", "sum_weight"):
        compare(name, getattr(output, name), getattr(truth, name), truth.allowed[name])
    for name, gradient in gradients.items():
        compare(name, gradient, getattr(truth, name), truth.allowed[name])
    assert torch.equal(output.correct.cpu()[truth.certain], truth.correct[truth.certain])


def share_of_bound(got: Tensor, exact: Tensor, allowed: Tensor) -> Tensor:
    """The error of every element as a share of what is allowed: 0 where it is the same, inf where one is nan or infinite."""
    got = got.detach().double().cpu()
    exact = exact.detach()
    same = (got == exact) | (got.isnan() & exact.isnan())
    return torch.where(same, 0, (got - exact).abs() / allowed).nan_to_num(math.inf, math.inf)


def compare(name: str, got: Tensor, exact: Tensor, allowed: Tensor) -> None:
    """Fail unless `got` is within `allowed` of `exact` in every element; nan and infinities must agree."""
    got = got.detach().double().cpu()
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    excess = share_of_bound(got, exact, allowed).detach()
    if excess.numel() and excess.max() > 1:
        at = int(excess.argmax())
        raise AssertionError(
            f"{name}: element {at} of {tuple(got.shape)} is {got.flatten()[at].item()!r}, exact "
            f"{exact.flatten()[at].item()!r}, {excess.max().item():.3g} times the bound; "
            f"{int((excess > 1).sum())} elements of {excess.numel()} are outside"
        )


def check(output: Any, dlogits: Tensor | None, truth: Expected) -> None:
    """Compare a DMOutput and the gradient of its loss with the truth."""
    compare("loss", output.loss, truth.loss, truth.allowed["loss"])
    if dlogits is not None:
        compare("dlogits", dlogits, truth.dlogits, truth.allowed["dlogits"])
    compare("example_weight", output.example_weight, truth.example_weight, truth.allowed["example_weight"])
    compare("target_prob", output.target_prob, truth.target_prob, truth.allowed["target_prob"])
    compare("sum_weight", output.sum_weight, truth.sum_weight, truth.allowed["sum_weight"])
    assert torch.equal(output.correct.cpu(), truth.correct)


def shares(output: Any, dlogits: Tensor, truth: Expected) -> dict[str, float]:
    """The largest error of each result as a share of its bound."""
    got = {name: getattr(output, name) for name in truth.allowed if name != "dlogits"} | {"dlogits": dlogits}
    found = {name: share_of_bound(got[name], getattr(truth, name), truth.allowed[name]) for name in truth.allowed}
    return {name: share.max().item() if share.numel() else 0.0 for name, share in found.items()}
