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

The absolute part is the smallest normal of fp32 (products flush to zero below it) or the smallest subnormal of the storage
dtype, times the row's coefficient where that exceeds 1: a direction whose element is below the smallest normal has no
digits, whatever it is multiplied by.
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


def expected(logits: Tensor, target: Tensor, emphasis: Any, dloss: Tensor | None = None, **options: Any) -> Expected:
    """The truth for a call of dm_loss with these arguments, logits (N, V), and the bound on every result.

    `dloss` is the derivative by the loss, of its shape; 1 where it is None.
    """
    logits, target = logits.detach().cpu(), target.cpu()
    options = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in options.items()}
    z = logits.double().requires_grad_()
    exact = reference.dm_loss(z, target, emphasis, **options)
    dloss = torch.ones_like(exact.loss) if dloss is None else dloss.double().cpu()
    exact.loss.backward(dloss)
    dlogits, loss = z.grad, exact.loss.detach()

    storage, compute = torch.finfo(logits.dtype), torch.finfo(compute_dtype(logits.dtype))
    ignore_index = options.get("ignore_index", -100)
    valid = target != ignore_index
    margin = reference.margin(logits.double(), target, ignore_index)
    function = emphasis.log_weight if hasattr(emphasis, "log_weight") else emphasis
    has_loss = getattr(emphasis, "has_loss", False)
    eps = options.get("eps")
    eps = (0.0 if has_loss else 1e-6) if eps is None else eps
    log_weight, weight_slope = _slope(function, margin)
    _, value_slope = _slope(lambda p, q: (emphasis.loss(p, q) if has_loss else -p).clamp(min=1e-300).log(), margin)
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

    def error(*slopes: Tensor) -> Tensor:
        """The relative error of a row's number whose logarithm has these slopes, in units of u."""
        total = rounding + 2 * reach * sum(slope.nan_to_num(1, 1, 1) for slope in slopes)
        return torch.where(counts, total, 0)

    row = error(weight_slope)
    row_value = error(value_slope) if has_loss else error(value_slope, weight_slope)
    row_gradient = error(weight_slope, unit_slope)[:, None] + torch.where(
        counts[:, None], 2 * depth[:, None] + 2 * depth_each, 0
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
    u = compute.eps
    # The coefficient of the row: half the L1 norm of its gradient.
    k = dlogits.abs().sum(1).nan_to_num(0, 0, 0) / 2
    tiny = max(torch.finfo(torch.float32).tiny, storage.smallest_normal * storage.eps)
    values = reference.dm_loss(logits.double(), target, emphasis, **{**options, "reduction": "none", "normalizer": None}).loss
    scale = 1.0 if per_row else (loss.abs() / values.sum().abs()).nan_to_num(1, 1, 1)
    one = torch.finfo(torch.float32).tiny
    value_error = values.abs() * (row_value + on_divisor) * u
    allowed = {
        "dlogits": (storage.eps + (row_gradient + on_divisor) * u) * dlogits.abs() + tiny * torch.clamp(k, min=1)[:, None],
        "loss": (value_error if per_row else value_error.nan_to_num(0, 0, 0).sum() * scale) + u * loss.abs() + one,
        "example_weight": (row + on_divisor + 1) * u * exact.example_weight.abs() + one,
        "target_prob": (BASE + 2 * reach) * u * exact.target_prob + one,
        "sum_weight": (divisor + BASE) * u * exact.sum_weight.abs() + one,
    }
    return Expected(loss, dlogits, *exact[1:], allowed)


def compare(name: str, got: Tensor, exact: Tensor, allowed: Tensor) -> None:
    """Fail unless `got` is within `allowed` of `exact` in every element; nan and infinities must agree."""
    got = got.detach().double().cpu()
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    same = (got == exact) | (got.isnan() & exact.isnan())
    excess = torch.where(same, 0, (got - exact).abs() / allowed).nan_to_num(math.inf, math.inf)
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
