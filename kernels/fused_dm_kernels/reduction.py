"""The second pass of the sum of weights."""

import triton
import triton.language as tl

from .numerics import INF, exp
from .rows import finite_max

LOG_FLOOR = tl.constexpr(-18.420680743952367)


@triton.jit
def rescaled(value, scale):
    """value scale; an infinite value remains so where the scale is 0."""
    return tl.where(tl.abs(value) == INF, value, value * scale)


@triton.jit
def fold(top, weights, values, more_top, more_weights, more_values, LOSS: tl.constexpr):
    """The batch sums of two sets of rows as those of one, in fp64."""
    more_top = more_top.to(tl.float64)
    # A nan is dropped here, and not by the sums.
    joint = tl.maximum(top, more_top)
    base = tl.where(joint == -INF, 0.0, joint)
    scale, more_scale = tl.exp(top - base), tl.exp(more_top - base)
    weights = weights * scale + more_weights.to(tl.float64) * more_scale
    if LOSS is None:
        values = rescaled(values, scale) + rescaled(more_values.to(tl.float64), more_scale)
    else:
        values += more_values.to(tl.float64)
    return joint, weights, values


@triton.jit
def store_totals(top, weights, values, normalizer_ptr, loss_ptr, totals_ptr, dtype, LOSS: tl.constexpr):
    """Write the loss and the totals of the batch sums.

    The divisor D is held as divisor * exp(log_scale), so that no weight overflows.
    """
    # As the rows' numbers are rounded, so that log w - log_scale is 0 for the largest of them.
    floor = tl.full([], LOG_FLOOR, dtype).to(tl.float64)
    joint = tl.maximum(top, floor)
    scale = tl.exp(top - joint)
    relative_sum = weights * scale + tl.exp(floor - joint)
    if LOSS is None:
        values = rescaled(values, scale)
    if normalizer_ptr is None:
        log_scale = joint
        divisor = relative_sum
    else:
        log_scale = tl.zeros([], tl.float64)
        divisor = tl.load(normalizer_ptr)
    if LOSS is None:
        # A weight that overflows times a -log p of 0 is 0.
        values = tl.where(values == 0.0, 0.0, values * tl.exp(joint - log_scale))
    else:
        values *= tl.exp(-log_scale)
    # 0 divided by 0, as where no row counts and their number divides, is 0.
    loss = values / tl.where((values == 0.0) & (divisor == 0.0), 1.0, divisor)
    tl.store(loss_ptr, loss.to(loss_ptr.dtype.element_ty))
    tl.store(totals_ptr, log_scale)
    tl.store(totals_ptr + 1, divisor)
    tl.store(totals_ptr + 2, relative_sum * tl.exp(joint))


@triton.jit
def largest(partials_ptr, at, P):
    """The largest log weights of programs, as they are loaded, so that a nan is dropped no sooner than by `scales`."""
    return tl.load(partials_ptr + at, mask=at < P, other=-INF)


@triton.jit
def scaled_sums(tops, base, partials_ptr, at, P, LOSS: tl.constexpr):
    """Sums of weights and of values of programs relative to exp(base), in fp64."""
    scale = exp(tops - base).to(tl.float64)
    weights = tl.load(partials_ptr + at + P, mask=at < P, other=0.0).to(tl.float64)
    values = tl.load(partials_ptr + at + 2 * P, mask=at < P, other=0.0).to(tl.float64)
    if LOSS is None:
        values = rescaled(values, scale)
    return scale * weights, values


@triton.jit
def totals_kernel(
    partials_ptr,  # (3, P)
    normalizer_ptr,  # () fp64, or None: the sum of weights
    loss_ptr,  # () out
    totals_ptr,  # (3,) out, fp64: log_scale, divisor, sum of weights
    P,
    LOSS: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,  # P <= BLOCK: everything is loaded at once
):
    """One program adds all partial sums in an order that depends on P alone, in fp64."""
    lane = tl.arange(0, BLOCK)
    dtype: tl.constexpr = partials_ptr.dtype.element_ty
    if ONE_BLOCK:
        tops = largest(partials_ptr, lane, P)
        top = tl.max(tops, 0)
        weights, values = scaled_sums(tops, finite_max(top), partials_ptr, lane, P, LOSS)
    else:
        tops = tl.full([BLOCK], -INF, dtype)
        for start in range(0, P, BLOCK):
            tops = tl.maximum(tops, largest(partials_ptr, start + lane, P))
        top = tl.max(tops, 0)
        weights = tl.zeros([BLOCK], tl.float64)
        values = tl.zeros([BLOCK], tl.float64)
        for start in range(0, P, BLOCK):
            at = start + lane
            more, more_values = scaled_sums(largest(partials_ptr, at, P), finite_max(top), partials_ptr, at, P, LOSS)
            weights += more
            values += more_values
    top = top.to(tl.float64)
    store_totals(top, tl.sum(weights, 0), tl.sum(values, 0), normalizer_ptr, loss_ptr, totals_ptr, dtype, LOSS)
