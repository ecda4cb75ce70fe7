"""Kernels that write the gradient from numbers of the rows, and one that multiplies a written gradient."""

import triton
import triton.language as tl

from .rows import (
    block_of,
    class_offsets,
    coefficient,
    compared_label,
    edge_columns,
    edges_of,
    finite_max,
    gradient_block,
    in_elements,
    in_words,
    in_words_again,
    own_labels,
    own_positions,
    read_block,
    read_edges,
    row_shifts,
    row_starts,
    store_block,
    store_edges,
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
    V,  # as in_elements takes it
    D,  # positions of an image, likewise
    SPAN,  # columns that a program covers, a multiple of BLOCK_V
    logits_strides,  # of image, position and class, as row_starts takes them
    dlogits_strides,  # likewise
    dloss_stride,
    ignore_index,
    SKIP_ONE: tl.constexpr,
    STREAM: tl.constexpr,
    CAPPED: tl.constexpr,
    UNIT: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program owns BLOCK_N rows by SPAN columns of dlogits; with SKIP_ONE it writes nothing where dloss is 1.

    The first program has the last rows: the pass before this one read them last, and they may still be in L2. With STREAM
    the logits and their gradient are more than that holds, and are not kept there.
    """
    if SKIP_ONE and tl.load(dloss_ptr) == 1.0:
        return
    V, D, columns = in_elements(V, D, UNIT, LAYOUT)
    DROP: tl.constexpr = "evict_first" if STREAM else ""
    spans = tl.cdiv(columns, SPAN)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    begin = (program % spans) * SPAN
    end = tl.minimum(begin + SPAN, columns)
    image, position, exists = own_positions(program // spans, D, BLOCK_N)
    row = image * D + position
    target, valid = own_labels(row, exists, target_ptr, ignore_index)
    start = row_starts(image, position, logits_strides, UNIT, LAYOUT)
    shift = row_shifts(image, position, logits_strides, UNIT, LAYOUT)
    out_start = row_starts(image, position, dlogits_strides, UNIT, LAYOUT)
    row_max = tl.load(rows_ptr + row, mask=exists, other=0.0)
    row_sum = tl.load(rows_ptr + row + N, mask=exists, other=0.0)
    if dloss_ptr is None:
        dloss = tl.full([BLOCK_N], 1.0, row_sum.dtype)
    else:
        dloss = tl.load(dloss_ptr + row * dloss_stride, mask=exists, other=0.0).to(row_sum.dtype)
    if totals_ptr is None:
        # No other class: no gradient, unless the derivative is nan.
        k = tl.where(valid & ((row_sum != 0.0) | (dloss != dloss)), -dloss, 0.0)
        read = in_words(valid, target_ptr, row, exists, ignore_index, UNIT, LAYOUT)
    else:
        log_weight = tl.load(rows_ptr + row + 3 * N.to(tl.int64), mask=exists, other=0.0)
        units_ptr = rows_ptr + 4 * N.to(tl.int64)
        unit = tl.load(units_ptr + row, mask=exists, other=0.0)
        log_scale = tl.load(totals_ptr).to(row_sum.dtype)
        divisor = tl.load(totals_ptr + 1)
        k = coefficient(dloss, log_weight, unit, row_sum, log_scale, divisor)
        # Their bits: the compiler follows what is the same for all rows of 16 bytes through comparisons of integers only.
        bits: tl.constexpr = tl.pointer_type(tl.int64 if unit.dtype == tl.float64 else tl.int32)
        read = in_words(unit != 0.0, units_ptr.to(bits, bitcast=True), row, exists, 0, UNIT, LAYOUT)
    active = valid & (k != 0.0)
    read = in_words_again(read, active, UNIT, LAYOUT)
    base = finite_max(row_max)
    label = compared_label(target, shift, LANES)
    if LAYOUT == "shifted":
        edges, edge_slope = read_edges(logits_ptr, start, shift, V, begin, end, active, transform_ptr, CAPPED, UNIT)
        store_edges(dlogits_ptr, out_start, shift, target, V, begin, end, exists, edges, edge_slope, base, k, row_sum, UNIT)
    past = V if LAYOUT == "shifted" else end
    # Two stages are registers, read one block ahead; three are the compiler's, through shared memory.
    if STAGES == 2:
        cols = begin + tl.arange(0, BLOCK_V)[None, :]
        inside = block_of(read, shift, cols, past, UNIT, LAYOUT)
        ahead = read_block(logits_ptr, start, cols, inside, logits_strides, UNIT, LAYOUT, DROP)
    for first in tl.range(begin, end, BLOCK_V, num_stages=STAGES if STAGES > 2 else 1):
        cols = first + tl.arange(0, BLOCK_V)[None, :]
        inside = block_of(read, shift, cols, past, UNIT, LAYOUT)
        if STAGES == 2:
            raw = ahead
            later = block_of(read & (first + BLOCK_V < end), shift, cols + BLOCK_V, past, UNIT, LAYOUT)
            ahead = read_block(logits_ptr, start, cols + BLOCK_V, later, logits_strides, UNIT, LAYOUT, DROP)
        else:
            raw = read_block(logits_ptr, start, cols, inside, logits_strides, UNIT, LAYOUT, DROP)
        inside = block_of(read & active, shift, cols, past, UNIT, LAYOUT)
        logits, slope = with_slope(raw, inside, active, transform_ptr, CAPPED, LAYOUT)
        gradient = gradient_block(logits, base, first, cols, label, k, row_sum, LANES) * slope
        written = block_of(exists, shift, cols, past, UNIT, LAYOUT)
        store_block(dlogits_ptr, out_start, cols, gradient, written, dlogits_strides, UNIT, LAYOUT, DROP)


@triton.jit
def multiply_at(pointers, inside, dloss):
    """Multiply what lies there by dloss; 0 stays 0 whatever dloss is, as the row may not count."""
    gradient = tl.load(pointers, mask=inside, other=0.0).to(dloss.dtype)
    gradient = tl.where(gradient == 0.0, 0.0, gradient * dloss)
    tl.store(pointers, gradient.to(pointers.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["D"])
def multiply_kernel(
    dlogits_ptr,  # (images, V, D) in and out
    dloss_ptr,  # ()
    V,  # as in_elements takes it
    D,  # positions of an image, likewise
    SPAN,  # columns that a program covers, a multiple of BLOCK_V
    dlogits_strides,  # of image, position and class, as row_starts takes them
    UNIT: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A program owns BLOCK_N rows by SPAN columns of dlogits and multiplies them by dloss; it does nothing where that is 1."""
    dloss = tl.load(dloss_ptr)
    if dloss == 1.0:
        return
    V, D, columns = in_elements(V, D, UNIT, LAYOUT)
    spans = tl.cdiv(columns, SPAN)
    begin = (tl.program_id(0) % spans) * SPAN
    end = tl.minimum(begin + SPAN, columns)
    image, position, exists = own_positions(tl.program_id(0) // spans, D, BLOCK_N)
    start = row_starts(image, position, dlogits_strides, UNIT, LAYOUT)
    shift = row_shifts(image, position, dlogits_strides, UNIT, LAYOUT)
    if LAYOUT == "shifted":
        edge_cols = edge_columns(shift, V, UNIT)
        edges = edges_of(edge_cols, exists, shift, V, begin, end, UNIT)
        multiply_at(dlogits_ptr + start[:, None, None] + edge_cols, edges, dloss)
    for first in range(begin, end, BLOCK_V):
        cols = first + tl.arange(0, BLOCK_V)[None, :]
        inside = block_of(exists, shift, cols, V, UNIT, LAYOUT)
        offset = class_offsets(cols, dlogits_strides, UNIT, LAYOUT)
        multiply_at(dlogits_ptr + start[:, None] + offset, inside, dloss)
