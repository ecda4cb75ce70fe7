"""Everything of order N, in torch: from the margins of the rows to weights, value and the gradient's coefficients."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Of what is added to the sum of weights.
LOG_FLOOR = math.log(1e-8)
# Of the least weight that is not 0 beside an infinite -log p: the least normal fp64, whatever the dtype and the other rows are.
LOG_LEAST = math.log(torch.finfo(torch.float64).tiny)


class RowTerms(NamedTuple):
    """Numbers of the rows, (N,) each. An ignored row, and one whose weight is 0, has -inf, 0, 0 and 0."""

    log_weight: Tensor  # log |c w(p)|
    sign: Tensor  # sign of c
    unit: Tensor  # sign(c) q / (2 q + eps); 0 where no other class has any probability
    value: Tensor  # c f(p), or -log p where the EDF has no closed form f; 0 for -log p = inf and a weight of 0


class Totals(NamedTuple):
    """What the batch divides by, held as `divisor * exp(log_scale)` so that no weight overflows; 0-d tensors."""

    log_scale: Tensor
    divisor: Tensor  # fp64
    sum_weight: Tensor  # fp64: 1e-8 + sum c w


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics, value and coefficients for logits of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rounded_in_range(number: Tensor, dtype: torch.dtype) -> Tensor:
    """`number` in fp64, rounded to `dtype` wherever that has its digits."""
    rounded, size = number.to(dtype), number.abs()
    held = (size >= torch.finfo(dtype).tiny) & (size <= torch.finfo(dtype).max)
    return torch.where(held, rounded.double(), number.double())


def part_statistics(part: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum and sum of exp(z - max), (N,) each, over the classes of a part (N, V'); -inf and 0 without a finite logit."""
    row_max = part.amax(1)
    return row_max, torch.exp(part - torch.where(row_max == -math.inf, 0, row_max)[:, None]).sum(1)


def rescaled(row_sum: Tensor, row_max: Tensor, joint: Tensor) -> Tensor:
    """Sums of exp(z - row_max) as sums of exp(z - joint), for a joint maximum that is at least row_max."""
    return row_sum * torch.exp(row_max - torch.where(joint == -math.inf, 0, joint))


def combine_statistics(maxima: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum and sum of rows, (N,) each, from those of their parts, (parts, N): what `combine` of the kernels does.

    Over ranks that hold parts of the classes, the two reductions are an all-reduce each.
    """
    joint = maxima.amax(0)
    return joint, rescaled(sums, maxima, joint).sum(0)


def row_weight(
    weight: Tensor | None, sample_weight: Tensor | None, target: Tensor, valid: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """c = weight[target] * sample_weight of each row, (N,); None where every row has 1. 0 for ignored rows.

    A `valid` of None tells that every row has a label that is a class.
    """
    if weight is None and sample_weight is None:
        return None
    if valid is None:
        given = [] if weight is None else [weight.to(dtype)[target]]
        given += [] if sample_weight is None else [sample_weight.to(dtype)]
        return given[0] if len(given) == 1 else given[0] * given[1]
    combined = valid.to(dtype)
    if weight is not None:
        is_class = valid & (target >= 0) & (target < weight.shape[0])
        of_class = weight.to(dtype)[torch.where(is_class, target, torch.zeros_like(target))]
        # A label that is no class is not dropped with class 0.
        combined = torch.where(is_class, of_class, combined)
    if sample_weight is not None:
        combined = torch.where(valid, combined * sample_weight.to(dtype), torch.zeros_like(combined))
    return torch.where(valid, combined, torch.zeros_like(combined))


def mean_divisor(weight: Tensor | None, valid: Tensor) -> Tensor:
    """The sum of c over the rows that are not ignored, 0-d fp64; 1 where there is no row to divide."""
    if weight is None:
        return valid.sum().clamp(min=1).double()
    total = weight.double()
    return torch.where((total != 0).any(), total.sum(), torch.ones_like(total.sum()))


def row_terms(
    margin: Tensor,
    valid: Tensor,
    weight: Tensor | None,
    eps: Tensor,
    log_weight: Callable[[Tensor, Tensor], Tensor],
    loss: Callable[[Tensor, Tensor], Tensor] | None,
) -> RowTerms:
    """The numbers of each row from its margin, for any `log_weight(log_p, log_q)`."""
    # The larger of the two logarithms; the other is further off by the margin.
    larger = margin.abs().neg_().exp_().log1p_().neg_()
    log_p, log_q = margin.clamp(max=0).add_(larger), larger.sub_(margin.clamp(min=0))
    log_w = log_weight(log_p.clamp(min=-1e30), log_q.clamp(min=-1e30))
    q = torch.exp(log_q)
    # Last, as a function of the user's may change what it is given.
    value = torch.where((log_p == -math.inf) & (log_w < LOG_LEAST), 0.0, -log_p) if loss is None else loss(log_p, log_q)
    # Where q and eps are both 0, the quotient is nan.
    unit = torch.where(eps == 0, 0.5, q / torch.add(eps, q, alpha=2))
    log_w = torch.where(margin.isnan(), margin, log_w)
    sign = valid.to(margin.dtype)
    if weight is not None:
        valid = valid & (weight != 0)
        # The sign of nan would be 0.
        sign = torch.where(valid, torch.where(weight.isnan(), weight, weight.sign()), 0.0)
        log_w = log_w + torch.where(valid, weight, 1.0).abs().log()
        unit = unit * sign
        if loss is not None:
            value = value * weight
    return RowTerms(
        torch.where(valid, log_w, -math.inf),
        sign,
        torch.where(valid & (margin != math.inf), unit, 0.0),
        torch.where(valid, value, 0.0),
    )


def row_values(terms: RowTerms, relative: Tensor, has_loss: bool) -> Tensor:
    """c r(p) exp(-scale) of each row, (N,), for `relative` = |c w| exp(-scale); c f(p) for an EDF with a loss of its own.

    0 where -log p is 0, whatever the weight is, and inf where it is inf, however small the weight is beside the others.
    """
    if has_loss:
        return terms.value
    # Another 1 leaves nan what it is.
    relative = torch.where(terms.value == math.inf, relative + 1, relative)
    return torch.where(terms.value == 0, 0.0, terms.sign * relative * terms.value)


def rescaled_values(values: Tensor, share: Tensor) -> Tensor:
    """Sums of `row_values` times the share that brings them to another scale; an infinite one remains so where that is 0."""
    return torch.where(values.isinf(), values, values * share)


def quotient(total: Tensor, divisor: Tensor) -> Tensor:
    """The value of a batch, 0-d fp64. 0 divided by 0 is 0, as where no row counts and their number divides."""
    return total / torch.where((total == 0) & (divisor == 0), 1.0, divisor)


def largest_log_weight(log_weight: Tensor) -> Tensor:
    """The largest log |c w| of these rows or log 1e-8, whichever is larger; 0-d."""
    # Not torch.cat: in a graph of several losses inductor hands its memory on while what was put there is still to be read.
    return torch.nn.functional.pad(log_weight, (0, 1), value=LOG_FLOOR).amax()


def batch_totals(top: Tensor, relative: Tensor, normalizer: Tensor | None) -> Totals:
    """The divisor of the batch: `normalizer`, or 1e-8 + sum c w where that is None.

    `top` is the largest log weight of all rows, and `relative` the sum of their weights divided by exp(top).
    """
    relative = relative + torch.exp(top.new_full((), LOG_FLOOR).double() - top.double())
    sum_weight = relative * torch.exp(top.double())
    if normalizer is None:
        return Totals(top, relative, sum_weight)
    return Totals(torch.zeros_like(top), normalizer, sum_weight)


def coefficients(terms: RowTerms, relative: Tensor) -> Tensor:
    """k D exp(-scale) of each row, (N,), for `relative` = |c w| exp(-scale): the gradient is k exp(z_j - lse) for the other
    classes and -k for the label.
    """
    return torch.where(terms.unit == 0, 0.0, terms.unit * relative)


def example_weights(log_weight: Tensor, sign: Tensor, totals: Totals) -> Tensor:
    """c w / D of each row, (N,): the L1 norm of its gradient at eps = 0; 0 for ignored rows."""
    # In fp64, where no weight leaves the range before it is divided.
    scaled = torch.exp((log_weight - totals.log_scale.to(sign.dtype)).double()) / totals.divisor
    return torch.where(sign == 0, 0.0, sign * scaled).to(sign.dtype)
