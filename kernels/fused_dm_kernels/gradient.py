"""Kernels that write the gradient from numbers of the rows, and one that multiplies a written gradient."""

import triton
import triton.language as tl

from .rows import (
    class_offsets,
    coefficient,
    compared_label,
    finite_max,
    gradient_block,
    in_words,
    in_words_again,
    own_labels,
    own_positions,
    read_block,
    row_starts,
    store_block,
    with_slope,
)


@triton.jit(do_not_specialize=["N", "D"])
def gradient_kernel(
    logits_ptr,  # (images, V, D)
    target_ptr,  # (N,) integers
    rows_ptr,  # (7, N), or (3, N) without totals
    transform_ptr,  # fp64: scale and, if CAPPED, cap; or None
    totals_ptr,  # (3,) fp64, or None: dloss is then the derivative by the margin
    dloss_ptr,  # () or (N,), or None: 1
    dlogits_ptr,  # (images, V, D) out; may be the logits themselves
    N,
    V,  # in units of UNIT unless SPATIAL
    D,  # positions of an image, in units of UNIT if SPATIAL
    SPAN,  # classes that a program covers, a multiple of BLOCK_V
    logits_strides,  # of image, position and class; in units of UNIT but for the adjacent dimension
    dlogits_strides,  # likewise
    dloss_stride,
    ignore_index,
    SKIP_ONE: tl.constexpr,
    STREAM: tl.constexpr,
    CAPPED: tl.constexpr,
    UNIT: tl.constexpr,
    SPATIAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program owns BLOCK_N rows by SPAN classes of dlogits; with SKIP_ONE it writes nothing where dloss is 1.

    The first program has the last rows: the pass before this one read them last, and they may still be in L2. With STREAM
    the logits and their gradient are more than that holds, and are not kept there.
    """
    if SPATIAL:
        D *= UNIT
    else:
        V *= UNIT
    DROP: tl.constexpr = "evict_first" if STREAM else ""
    spans = tl.cdiv(V, SPAN)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    begin = (program % spans) * SPAN
    end = tl.minimum(begin + SPAN, V)
    image, position, exists = own_positions(program // spans, D, BLOCK_N)
    row = image * D + position
    target, valid = own_labels(row, exists, target_ptr, ignore_index)
    start = row_starts(image, position, logits_strides, UNIT, SPATIAL)
    out_start = row_starts(image, position, dlogits_strides, UNIT, SPATIAL)
    row_max = tl.load(rows_ptr + row, mask=exists, other=0.0)
    row_sum = tl.load(rows_ptr + row + N, mask=exists, other=0.0)
    if dloss_ptr is None:
        dloss = tl.full([BLOCK_N], 1.0, row_sum.dtype)
    else:
        dloss = tl.load(dloss_ptr + row * dloss_stride, mask=exists, other=0.0).to(row_sum.dtype)
    if SKIP_ONE:
        end = tl.where(tl.load(dloss_ptr) == 1.0, begin, end)
    if totals_ptr is None:
        k = tl.where(valid & (row_sum != 0.0), -dloss, 0.0)
        read = in_words(valid, target_ptr, row, exists, ignore_index, UNIT, SPATIAL)
    else:
        log_weight = tl.load(rows_ptr + row + 3 * N.to(tl.int64), mask=exists, other=0.0)
        units_ptr = rows_ptr + 4 * N.to(tl.int64)
        unit = tl.load(units_ptr + row, mask=exists, other=0.0)
        log_scale = tl.load(totals_ptr).to(row_sum.dtype)
        divisor = tl.load(totals_ptr + 1).to(row_sum.dtype)
        k = coefficient(dloss, log_weight, unit, row_sum, log_scale, divisor)
        # Their bits: the compiler follows what is the same for all rows of 16 bytes through comparisons of integers only.
        bits: tl.constexpr = tl.pointer_type(tl.int64 if unit.dtype == tl.float64 else tl.int32)
        read = in_words(unit != 0.0, units_ptr.to(bits, bitcast=True), row, exists, 0, UNIT, SPATIAL)
    active = valid & (k != 0.0)
    read = in_words_again(read, active, UNIT, SPATIAL)
    base = finite_max(row_max)
    label = compared_label(target, LANES)
    # Two stages are registers, read one block ahead; three are the compiler's, through shared memory.
    if STAGES == 2:
        cols = begin + tl.arange(0, BLOCK_V)
        ahead = read_block(logits_ptr, start, cols, end, read, logits_strides, UNIT, SPATIAL, DROP)
    for first in tl.range(begin, end, BLOCK_V, num_stages=STAGES if STAGES > 2 else 1):
        cols = first + tl.arange(0, BLOCK_V)
        if STAGES == 2:
            raw = ahead
            ahead = read_block(logits_ptr, start, cols + BLOCK_V, end, read, logits_strides, UNIT, SPATIAL, DROP)
        else:
            raw = read_block(logits_ptr, start, cols, end, read, logits_strides, UNIT, SPATIAL, DROP)
        logits, slope = with_slope(raw, cols, end, active, read, transform_ptr, CAPPED, SPATIAL)
        gradient = gradient_block(logits, base, first, cols, label, k, row_sum, LANES) * slope
        store_block(dlogits_ptr, out_start, cols, gradient, end, exists, dlogits_strides, UNIT, SPATIAL, DROP)


@triton.jit(do_not_specialize=["D"])
def multiply_kernel(
    dlogits_ptr,  # (images, V, D) in and out
    dloss_ptr,  # ()
    V,  # in units of UNIT unless SPATIAL
    D,  # positions of an image, in units of UNIT if SPATIAL
    SPAN,  # classes that a program covers, a multiple of BLOCK_V
    dlogits_strides,  # of image, position and class; in units of UNIT but for the adjacent dimension
    UNIT: tl.constexpr,
    SPATIAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A program owns BLOCK_N rows by SPAN classes of dlogits and multiplies them by dloss; it does nothing where that is 1."""
    if SPATIAL:
        D *= UNIT
    else:
        V *= UNIT
    spans = tl.cdiv(V, SPAN)
    begin = (tl.program_id(0) % spans) * SPAN
    image, position, exists = own_positions(tl.program_id(0) // spans, D, BLOCK_N)
    start = row_starts(image, position, dlogits_strides, UNIT, SPATIAL)
    dloss = tl.load(dloss_ptr)
    end = tl.where(dloss == 1.0, begin, tl.minimum(begin + SPAN, V))
    for first in range(begin, end, BLOCK_V):
        cols = first + tl.arange(0, BLOCK_V)
        inside = exists[:, None] & (cols < V)[None, :]
        at = dlogits_ptr + start[:, None] + class_offsets(cols, dlogits_strides, UNIT, SPATIAL)[None, :]
        gradient = tl.load(at, mask=inside, other=0.0).to(dloss.dtype)
        # 0 stays 0 whatever dloss is: the row may not count.
        gradient = tl.where(gradient == 0.0, 0.0, gradient * dloss)
        tl.store(at, gradient.to(dlogits_ptr.dtype.element_ty), mask=inside)
