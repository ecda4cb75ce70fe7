"""The second pass of the sum of weights."""

import triton
import triton.language as tl

from .numerics import INF

LOG_FLOOR = tl.constexpr(-18.420680743952367)


@triton.jit
def totals_kernel(
    partials_ptr,  # (3, P)
    normalizer_ptr,  # () fp64, or None: the sum of weights
    loss_ptr,  # () out
    totals_ptr,  # (3,) out, fp64: log_scale, divisor, sum of weights
    P,
    LOSS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program adds all partial sums in an order that depends on P alone, in fp64.

    The divisor D is held as divisor * exp(log_scale), so that no weight overflows.
    """
    lane = tl.arange(0, BLOCK)
    tops = tl.full([BLOCK], -INF, partials_ptr.dtype.element_ty)
    for start in range(0, P, BLOCK):
        at = start + lane
        tops = tl.maximum(tops, tl.load(partials_ptr + at, mask=at < P, other=-INF), propagate_nan=tl.PropagateNan.ALL)
    floor = tl.full([], LOG_FLOOR, partials_ptr.dtype.element_ty)
    top = tl.maximum(tl.max(tops, 0), floor).to(tl.float64)
    weights = tl.zeros([BLOCK], tl.float64)
    values = tl.zeros([BLOCK], tl.float64)
    for start in range(0, P, BLOCK):
        at = start + lane
        inside = at < P
        scale = tl.exp(tl.load(partials_ptr + at, mask=inside, other=-INF).to(tl.float64) - top)
        weights += scale * tl.load(partials_ptr + at + P, mask=inside, other=0.0).to(tl.float64)
        value = tl.load(partials_ptr + at + 2 * P, mask=inside, other=0.0).to(tl.float64)
        if LOSS is None:
            # A weight of 0 times any -log p is 0.
            value = tl.where((scale == 0.0) & (value == value), 0.0, value * scale)
        values += value
    relative_sum = tl.sum(weights, 0) + tl.exp(floor.to(tl.float64) - top)
    value = tl.sum(values, 0)
    if normalizer_ptr is None:
        log_scale = top
        divisor = relative_sum
    else:
        log_scale = top * 0.0
        divisor = tl.load(normalizer_ptr)
    if LOSS is None:
        # A weight that overflows times a -log p of 0 is 0.
        value = tl.where(value == 0.0, 0.0, value * tl.exp(top - log_scale))
    else:
        value *= tl.exp(-log_scale)
    tl.store(loss_ptr, (value / divisor).to(loss_ptr.dtype.element_ty))
    tl.store(totals_ptr, log_scale)
    tl.store(totals_ptr + 1, divisor)
    tl.store(totals_ptr + 2, relative_sum * tl.exp(top))
