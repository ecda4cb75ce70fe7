"""Kernels that write the gradient from numbers of the rows, and one that multiplies a written gradient."""

import triton
import triton.language as tl

from .numerics import exp
from .rows import coefficient, finite_max, gradient_of, load_with_slope, other_classes, own_rows, store_block


@triton.jit(do_not_specialize=["N"])
def gradient_kernel(
    logits_ptr,  # (N, V)
    target_ptr,  # (N,) integers
    rows_ptr,  # (7, N), or (3, N) without totals
    transform_ptr,  # fp64: scale and, if CAPPED, cap; or None
    totals_ptr,  # (3,) fp64, or None: dloss is then the derivative by the margin
    dloss_ptr,  # () or (N,)
    dlogits_ptr,  # (N, V) out; may be the logits themselves
    N,
    V,  # in units of UNIT
    SPAN,  # columns a program covers, a multiple of BLOCK_V
    logits_row_stride,  # in units of UNIT
    dlogits_row_stride,  # in units of UNIT
    dloss_stride,
    ignore_index,
    SKIP_ONE: tl.constexpr,
    CAPPED: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A program owns BLOCK_N rows by SPAN columns of dlogits; with SKIP_ONE it writes nothing where dloss is 1."""
    V *= UNIT
    spans = tl.cdiv(V, SPAN)
    tile = tl.program_id(0) // spans
    begin = (tl.program_id(0) % spans) * SPAN
    end = tl.minimum(begin + SPAN, V)
    row, exists, target, valid = own_rows(tile, target_ptr, N, ignore_index, BLOCK_N)
    row_start = row * logits_row_stride * UNIT
    out_start = row * dlogits_row_stride * UNIT
    row_max = tl.load(rows_ptr + row, mask=exists, other=0.0)
    row_sum = tl.load(rows_ptr + row + N, mask=exists, other=0.0)
    dloss = tl.load(dloss_ptr + row * dloss_stride, mask=exists, other=0.0).to(row_sum.dtype)
    if SKIP_ONE:
        end = tl.where(tl.load(dloss_ptr) == 1.0, begin, end)
    if totals_ptr is None:
        k = tl.where(valid & (row_sum != 0.0), -dloss, 0.0)
    else:
        log_weight = tl.load(rows_ptr + row + 3 * N.to(tl.int64), mask=exists, other=0.0)
        unit = tl.load(rows_ptr + row + 4 * N.to(tl.int64), mask=exists, other=0.0)
        log_scale = tl.load(totals_ptr).to(row_sum.dtype)
        divisor = tl.load(totals_ptr + 1).to(row_sum.dtype)
        k = coefficient(dloss, log_weight, unit, row_sum, log_scale, divisor)
    active = valid & (k != 0.0)
    base = tl.where(active, finite_max(row_max), 0.0)
    for start in range(begin, end, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        logits, slope = load_with_slope(logits_ptr, row_start, cols, V, active, transform_ptr, CAPPED)
        exps = exp(other_classes(logits, cols, target) - base[:, None])
        gradient = gradient_of(exps, cols, target, k, row_sum) * slope
        store_block(dlogits_ptr, out_start, cols, gradient, V, exists)


@triton.jit(do_not_specialize=["N"])
def multiply_kernel(
    dlogits_ptr,  # (N, V) in and out
    dloss_ptr,  # ()
    N,
    V,  # in units of UNIT
    SPAN,  # columns a program covers, a multiple of BLOCK_V
    dlogits_row_stride,  # in units of UNIT
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A program owns BLOCK_N rows by SPAN columns of dlogits and multiplies them by dloss; it does nothing where that is 1."""
    V *= UNIT
    spans = tl.cdiv(V, SPAN)
    begin = (tl.program_id(0) % spans) * SPAN
    row = (tl.program_id(0) // spans).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = row < N
    row_start = row * dlogits_row_stride * UNIT
    dloss = tl.load(dloss_ptr)
    end = tl.where(dloss == 1.0, begin, tl.minimum(begin + SPAN, V))
    for start in range(begin, end, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        inside = exists[:, None] & (cols < V)[None, :]
        at = dlogits_ptr + row_start[:, None] + cols[None, :]
        gradient = tl.load(at, mask=inside, other=0.0).to(dloss.dtype)
        # 0 stays 0 whatever dloss is: the row may not count.
        gradient = tl.where(gradient == 0.0, 0.0, gradient * dloss)
        tl.store(at, gradient.to(dlogits_ptr.dtype.element_ty), mask=inside)
