"""The single fused kernel for rows of several blocks, which reads the next row while it writes this one's gradient."""

import triton
import triton.language as tl

from .rows import (
    block_of,
    coefficient,
    combined_lanes,
    compared_label,
    finite_max,
    gradient_block,
    load_label,
    no_statistics,
    other_classes,
    own_labels,
    read_block,
    row_starts,
    row_terms,
    scan_block,
    store_block,
    store_partials,
    store_statistics,
    store_terms,
    with_slope,
)


@triton.jit
def row_of(number, N, D, target_ptr, ignore_index, strides, UNIT: tl.constexpr):
    """A row's image and position, where it starts, its label, whether it exists, and whether it is an example; (1,) each."""
    row = number.to(tl.int64) + tl.zeros([1], tl.int64)
    image, position = row // D, row % D
    exists = row < N
    target, valid = own_labels(row, exists, target_ptr, ignore_index)
    return row, image, position, row_starts(image, position, strides, UNIT, "rows"), target, exists, valid


@triton.jit(do_not_specialize=["N", "D"])
def pipelined_kernel(
    logits_ptr,  # (images, V, D)
    target_ptr,  # (N,) integers
    transform_ptr,  # fp64: scale and, if CAPPED, cap; or None
    weight_ptr,  # (N,) or None
    params_ptr,  # (1 + parameters,) fp64: eps, then the family's
    normalizer_ptr,  # () fp64
    rows_ptr,  # (7, N) out
    partials_ptr,  # (3, N) out
    dlogits_ptr,  # (images, V, D) out; may be the logits themselves
    N,
    V,  # in units of UNIT
    D,  # positions of an image
    logits_strides,  # of image, position and class; in units of UNIT but for the class
    dlogits_strides,  # likewise
    ignore_index,
    LOG_WEIGHT: tl.constexpr,
    LOSS: tl.constexpr,
    CAPPED: tl.constexpr,
    UNIT: tl.constexpr,
    LAYOUT: tl.constexpr,  # "rows"
    BLOCK_N: tl.constexpr,  # 1
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
):
    """A program owns every so many-th row and writes its numbers, its share of the value, and dlogits for dloss = 1.

    A block of the row that is written, from its last to its first, is read from L2 beside a block of the next row, from memory:
    so memory is read and written at once, and what a program has in L2 is never much more than one row. Both are read a
    block ahead.
    """
    V *= UNIT
    step = tl.num_programs(0)
    blocks = tl.cdiv(V, BLOCK_V)
    cols = tl.arange(0, BLOCK_V)[None, :]
    no_shift = tl.zeros([1], tl.int32)
    eps = tl.load(params_ptr)
    divisor = tl.load(normalizer_ptr)
    dtype: tl.constexpr = rows_ptr.dtype.element_ty
    row, image, position, start, target, exists, valid = row_of(
        tl.program_id(0), N, D, target_ptr, ignore_index, logits_strides, UNIT
    )
    inside = block_of(valid, no_shift, cols, V, UNIT, LAYOUT)
    ahead = read_block(logits_ptr, start, cols, inside, logits_strides, UNIT, LAYOUT, "evict_last")
    # The row before the first has no gradient.
    written, active = exists & False, exists & False
    old_start, old_out, old_label = start, start, compared_label(target, no_shift, LANES)
    k, base, old_sum = tl.zeros([1], dtype), tl.zeros([1], dtype), tl.full([1], 1.0, dtype)
    for number in tl.range(tl.program_id(0), N + step, step, num_stages=1):
        next_row, next_image, next_position, next_start, next_target, next_exists, next_valid = row_of(
            number + step, N, D, target_ptr, ignore_index, logits_strides, UNIT
        )
        label_logit = load_label(logits_ptr, start, target, target, V, valid, transform_ptr, CAPPED)
        label = compared_label(target, no_shift, LANES)
        maxima, sums = no_statistics(dtype, 1, LANES)
        last = (blocks - 1) * BLOCK_V
        old_inside = block_of(active, no_shift, last + cols, V, UNIT, LAYOUT)
        old_ahead = read_block(logits_ptr, old_start, last + cols, old_inside, logits_strides, UNIT, LAYOUT, "evict_first")
        for block in tl.range(0, blocks, num_stages=1):
            raw, old = ahead, old_ahead
            first, old_first = block * BLOCK_V, last - block * BLOCK_V
            ends = block == blocks - 1
            later_start, later = tl.where(ends, next_start, start), tl.where(ends, 0, first + BLOCK_V) + cols
            inside = block_of(tl.where(ends, next_valid, valid), no_shift, later, V, UNIT, LAYOUT)
            ahead = read_block(logits_ptr, later_start, later, inside, logits_strides, UNIT, LAYOUT, "evict_last")
            earlier = old_first - BLOCK_V + cols
            inside = block_of(active & ~ends, no_shift, earlier, V, UNIT, LAYOUT)
            old_ahead = read_block(logits_ptr, old_start, earlier, inside, logits_strides, UNIT, LAYOUT, "evict_first")
            inside = block_of(active, no_shift, old_first + cols, V, UNIT, LAYOUT)
            logits, slope = with_slope(old, inside, active, transform_ptr, CAPPED, LAYOUT)
            gradient = gradient_block(logits, base, old_first, old_first + cols, old_label, k, old_sum, LANES) * slope
            inside = block_of(written, no_shift, old_first + cols, V, UNIT, LAYOUT)
            store_block(dlogits_ptr, old_out, old_first + cols, gradient, inside, dlogits_strides, UNIT, LAYOUT, "evict_first")
            inside = block_of(valid, no_shift, first + cols, V, UNIT, LAYOUT)
            logits, _ = with_slope(raw, inside, valid, transform_ptr, CAPPED, LAYOUT)
            maxima, sums, _ = scan_block(other_classes(logits, first, first + cols, label, LANES), maxima, sums, LANES, UNIT)
        row_max, row_sum = combined_lanes(maxima, sums, LANES)
        margin = store_statistics(rows_ptr, row, exists, N, label_logit, row_max, row_sum)
        log_weight, sign, unit, value = row_terms(margin, valid, row, weight_ptr, eps, params_ptr, LOG_WEIGHT, LOSS)
        store_terms(rows_ptr, row, exists, N, log_weight, unit, sign, value)
        if number < N:
            store_partials(partials_ptr, number, N, log_weight, sign, value, LOSS)
        k = coefficient(1.0, log_weight, unit, row_sum, 0.0, divisor.to(dtype))
        active, written = k != 0.0, exists
        base, old_sum, old_label = finite_max(row_max), row_sum, label
        old_start = start
        old_out = row_starts(image, position, dlogits_strides, UNIT, LAYOUT)
        row, image, position, start = next_row, next_image, next_position, next_start
        target, exists, valid = next_target, next_exists, next_valid
