"""Kernels over numbers of the examples alone: what "mean" divides by, and what each example received."""

import triton
import triton.language as tl

from .numerics import INF, over_divisor, sigmoids
from .rows import load_weight, own_labels, stored_margin


@triton.jit(do_not_specialize=["N", "V"])
def divisor_kernel(
    target_ptr,  # (N,) integers
    weight_ptr,  # (V,) or None
    sample_weight_ptr,  # (N,) or None
    divisor_ptr,  # () out, fp64
    N,
    V,
    ignore_index,
    DTYPE: tl.constexpr,  # of the rows' weights
    BLOCK: tl.constexpr,
):
    """One program adds the weights c of all examples, which "mean" divides by; 1 where all are 0."""
    sums = tl.zeros([BLOCK], tl.float64)
    counts = tl.full([BLOCK], False, tl.int1)
    for first in tl.range(0, N, BLOCK):
        row = first + tl.arange(0, BLOCK)
        target, valid = own_labels(row, row < N, target_ptr, ignore_index)
        weight = load_weight(row, target, valid, V, weight_ptr, sample_weight_ptr, DTYPE).to(tl.float64)
        sums += weight
        counts |= weight != 0.0
    tl.store(divisor_ptr, tl.where(tl.max(counts.to(tl.int32), 0) == 0, 1.0, tl.sum(sums, 0)))


@triton.jit(do_not_specialize=["N"])
def received_kernel(
    target_ptr,  # (N,) integers
    rows_ptr,  # (7, N)
    totals_ptr,  # (3,) fp64
    example_weight_ptr,  # (N,) out
    target_prob_ptr,  # (N,) out
    correct_ptr,  # (N,) out, integers of 8 bits
    N,
    ignore_index,
    BLOCK: tl.constexpr,
):
    """A program writes what BLOCK rows received: c w / D, p (nan if ignored), and whether no other class has a larger logit."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = row < N
    _, valid = own_labels(row, exists, target_ptr, ignore_index)
    margin = stored_margin(rows_ptr, row, exists, N)
    size = N.to(tl.int64)
    lead = tl.load(rows_ptr + row + 2 * size, mask=exists, other=0.0)
    log_weight = tl.load(rows_ptr + row + 3 * size, mask=exists, other=-INF)
    sign = tl.load(rows_ptr + row + 5 * size, mask=exists, other=0.0)
    log_scale, divisor = tl.load(totals_ptr).to(sign.dtype), tl.load(totals_ptr + 1)
    weight = tl.where(sign == 0.0, 0.0, over_divisor(sign, log_weight - log_scale, divisor))
    prob, _, _ = sigmoids(-margin)
    correct = valid & (margin == margin) & ((lead >= 0.0) | (margin == INF))
    tl.store(example_weight_ptr + row, weight, mask=exists)
    tl.store(target_prob_ptr + row, tl.where(valid, prob, float("nan")), mask=exists)
    tl.store(correct_ptr + row, correct.to(tl.int8), mask=exists)
