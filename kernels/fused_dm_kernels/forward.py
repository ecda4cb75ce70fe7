"""Kernels that read the logits once and write numbers of the rows only."""

import triton
import triton.language as tl

from .numerics import INF
from .reduction import fold, store_totals
from .rows import (
    batch_sums,
    block_of,
    class_offsets,
    combined_lanes,
    combined_parts,
    combined_with_edges,
    compared_label,
    in_elements,
    in_words,
    load_label,
    load_weight,
    no_statistics,
    other_classes,
    own_labels,
    own_positions,
    read_block,
    read_edges,
    row_shifts,
    row_starts,
    row_terms,
    rows_of_tiles,
    scan_block,
    store_partials,
    store_statistics,
    store_terms,
    stored_margin,
    with_slope,
)


@triton.jit
def row_statistics(
    logits_ptr,
    start,
    shift,
    target,
    V,
    begin,
    end,
    active,
    read,
    strides,
    dtype,
    transform_ptr,
    CAPPED: tl.constexpr,
    UNIT: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
):
    """Maximum and sum of exp(z - max) over the columns from begin to end other than the label's, in one pass."""
    label = compared_label(target, shift, LANES)
    maxima, sums = no_statistics(dtype, BLOCK_N, LANES)
    past = V if LAYOUT == "shifted" else end
    if LAYOUT == "shifted":
        edges = read_edges(logits_ptr, start, shift, V, begin, end, active, transform_ptr, CAPPED, UNIT)[0]
    for first in tl.range(begin, end, BLOCK_V, num_stages=1):
        cols = first + tl.arange(0, BLOCK_V)[None, :]
        inside = block_of(read, shift, cols, past, UNIT, LAYOUT)
        raw = read_block(logits_ptr, start, cols, inside, strides, UNIT, LAYOUT, "")
        inside = block_of(read & active, shift, cols, past, UNIT, LAYOUT)
        logits, _ = with_slope(raw, inside, active, transform_ptr, CAPPED, LAYOUT)
        maxima, sums, _ = scan_block(other_classes(logits, first, cols, label, LANES), maxima, sums, LANES, UNIT)
    if LAYOUT == "shifted":
        row_max, row_sum = combined_with_edges(maxima, sums, edges, shift, target, V, LANES, UNIT)
    else:
        row_max, row_sum = combined_lanes(maxima, sums, LANES)
    return row_max, row_sum


@triton.jit
def own_statistics(
    logits_ptr,
    target_ptr,
    parts_ptr,
    tile,
    N,
    V,
    D,
    columns,
    parts,
    strides,
    ignore_index,
    dtype,
    transform_ptr,
    CAPPED: tl.constexpr,
    UNIT: tl.constexpr,
    LAYOUT: tl.constexpr,
    PARTS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
):
    """Row numbers, whether they exist, labels, whether they are examples, and their label's logit, maximum and sum.

    The last two are read from the logits, or combined from those of their parts where `parts_ptr` is given.
    """
    image, position, exists = own_positions(tile, D, BLOCK_N)
    row = image * D + position
    if TILES > 1:
        exists &= row < N
    target, valid = own_labels(row, exists, target_ptr, ignore_index)
    start = row_starts(image, position, strides, UNIT, LAYOUT)
    shift = row_shifts(image, position, strides, UNIT, LAYOUT)
    label_offset = class_offsets(target + shift, strides, UNIT, LAYOUT)
    label_logit = load_label(logits_ptr, start, label_offset, target, V, valid, transform_ptr, CAPPED)
    if parts_ptr is None:
        read = in_words(valid, target_ptr, row, exists, ignore_index, UNIT, LAYOUT)
        row_max, row_sum = row_statistics(
            logits_ptr,
            start,
            shift,
            target,
            V,
            0,
            columns,
            valid,
            read,
            strides,
            dtype,
            transform_ptr,
            CAPPED,
            UNIT,
            LAYOUT,
            BLOCK_N,
            BLOCK_V,
            LANES,
        )
    else:
        row_max, row_sum = combined_parts(parts_ptr, row, exists, N, parts, PARTS)
    return row, exists, target, valid, label_logit, row_max, row_sum


@triton.jit(do_not_specialize=["N", "D"])
def split_kernel(
    logits_ptr,  # (images, V, D)
    target_ptr,  # (N,) integers
    transform_ptr,  # fp64: scale and, if CAPPED, cap; or None
    parts_ptr,  # (2, parts, N) out: max, sum
    N,
    V,  # as in_elements takes it
    D,  # positions of an image, likewise
    SPAN,  # columns of a part, a multiple of BLOCK_V
    logits_strides,  # of image, position and class, as row_starts takes them
    ignore_index,
    CAPPED: tl.constexpr,
    UNIT: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
):
    """A program owns BLOCK_N rows by SPAN columns and writes the rows' statistics over those."""
    V, D, columns = in_elements(V, D, UNIT, LAYOUT)
    parts = tl.cdiv(columns, SPAN)
    part = tl.program_id(0) % parts
    image, position, exists = own_positions(tl.program_id(0) // parts, D, BLOCK_N)
    row = image * D + position
    target, valid = own_labels(row, exists, target_ptr, ignore_index)
    start = row_starts(image, position, logits_strides, UNIT, LAYOUT)
    shift = row_shifts(image, position, logits_strides, UNIT, LAYOUT)
    read = in_words(valid, target_ptr, row, exists, ignore_index, UNIT, LAYOUT)
    begin, end = part * SPAN, tl.minimum(part * SPAN + SPAN, columns)
    dtype: tl.constexpr = parts_ptr.dtype.element_ty
    row_max, row_sum = row_statistics(
        logits_ptr,
        start,
        shift,
        target,
        V,
        begin,
        end,
        valid,
        read,
        logits_strides,
        dtype,
        transform_ptr,
        CAPPED,
        UNIT,
        LAYOUT,
        BLOCK_N,
        BLOCK_V,
        LANES,
    )
    N = N.to(tl.int64)
    tl.store(parts_ptr + part * N + row, row_max, mask=exists)
    tl.store(parts_ptr + (parts + part) * N + row, row_sum, mask=exists)


@triton.jit(do_not_specialize=["N", "D"])
def margin_kernel(
    logits_ptr,  # (images, V, D)
    target_ptr,  # (N,) integers
    transform_ptr,  # fp64: scale and, if CAPPED, cap; or None
    parts_ptr,  # (2, parts, N) of the split kernel, or None
    rows_ptr,  # (3, N) out: max, sum, lead
    margin_ptr,  # (N,) out
    N,
    V,  # as in_elements takes it
    D,  # positions of an image, likewise
    parts,
    logits_strides,  # of image, position and class, as row_starts takes them
    ignore_index,
    CAPPED: tl.constexpr,
    UNIT: tl.constexpr,
    LAYOUT: tl.constexpr,
    PARTS: tl.constexpr,  # a power of 2, at least parts
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
):
    """A program owns BLOCK_N rows and writes their margin and statistics; an ignored row has margin nan."""
    V, D, columns = in_elements(V, D, UNIT, LAYOUT)
    tile = tl.program_id(0)
    dtype: tl.constexpr = rows_ptr.dtype.element_ty
    row, exists, _, valid, label_logit, row_max, row_sum = own_statistics(
        logits_ptr, target_ptr, parts_ptr, tile, N, V, D, columns, parts, logits_strides, ignore_index, dtype,
        transform_ptr, CAPPED, UNIT, LAYOUT, PARTS, 1, BLOCK_N, BLOCK_V, LANES,
    )  # fmt: skip
    margin = store_statistics(rows_ptr, row, exists, N, label_logit, row_max, row_sum)
    tl.store(margin_ptr + row, tl.where(valid, margin, float("nan")), mask=exists)


@triton.jit(do_not_specialize=["N", "D"])
def forward_kernel(
    logits_ptr,  # (images, V, D)
    target_ptr,  # (N,) integers
    transform_ptr,  # fp64: scale and, if CAPPED, cap; or None
    weight_ptr,  # (V,) or None
    sample_weight_ptr,  # (N,) or None
    params_ptr,  # (1 + parameters,) fp64: eps, then the family's
    rows_ptr,  # (7, N) out
    partials_ptr,  # (3, programs) out
    N,
    V,  # as in_elements takes it
    D,  # positions of an image, likewise
    logits_strides,  # of image, position and class, as row_starts takes them
    ignore_index,
    LOG_WEIGHT: tl.constexpr,
    LOSS: tl.constexpr,
    CAPPED: tl.constexpr,
    UNIT: tl.constexpr,
    LAYOUT: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
):
    """A program owns TILES times BLOCK_N rows and writes their numbers and its share of the batch sums.

    First it finds the statistics of one tile after another, then does the arithmetic of all its rows at once, a row for each
    thread: what a reduction leaves behind every thread of the row has, and would do the arithmetic of the row again.
    """
    V, D, columns = in_elements(V, D, UNIT, LAYOUT)
    program = tl.program_id(0)
    dtype: tl.constexpr = rows_ptr.dtype.element_ty
    eps = tl.load(params_ptr)
    for i in tl.range(0, TILES, num_stages=1):
        row, exists, _, _, label_logit, row_max, row_sum = own_statistics(
            logits_ptr, target_ptr, None, program * TILES + i, N, V, D, columns, 1, logits_strides, ignore_index, dtype,
            transform_ptr, CAPPED, UNIT, LAYOUT, 1, TILES, BLOCK_N, BLOCK_V, LANES,
        )  # fmt: skip
        store_statistics(rows_ptr, row, exists, N, label_logit, row_max, row_sum)
    row, exists = rows_of_tiles(program, N, D, TILES, BLOCK_N)
    target, valid = own_labels(row, exists, target_ptr, ignore_index)
    weight = load_weight(row, target, valid, V, weight_ptr, sample_weight_ptr, dtype)
    tl.debug_barrier()
    margin = stored_margin(rows_ptr, row, exists, N)
    log_weight, sign, unit, value = row_terms(margin, weight, valid, eps, params_ptr, LOG_WEIGHT, LOSS)
    store_terms(rows_ptr, row, exists, N, log_weight, unit, sign, value)
    store_partials(partials_ptr, program, tl.num_programs(0), log_weight, sign, value, LOSS)


@triton.jit(do_not_specialize=["N", "D"])
def batch_kernel(
    logits_ptr,  # (images, V, D)
    target_ptr,  # (N,) integers
    transform_ptr,  # fp64: scale and, if CAPPED, cap; or None
    weight_ptr,  # (V,) or None
    sample_weight_ptr,  # (N,) or None
    params_ptr,  # (1 + parameters,) fp64: eps, then the family's
    parts_ptr,  # (2, parts, N) of the split kernel, or None
    normalizer_ptr,  # () fp64, or None: the sum of weights
    rows_ptr,  # (7, N) out
    loss_ptr,  # () out
    totals_ptr,  # (3,) out, fp64: log_scale, divisor, sum of weights
    N,
    V,  # as in_elements takes it
    D,  # positions of an image, likewise
    tiles,
    parts,
    logits_strides,  # of image, position and class, as row_starts takes them
    ignore_index,
    LOG_WEIGHT: tl.constexpr,
    LOSS: tl.constexpr,
    CAPPED: tl.constexpr,
    UNIT: tl.constexpr,
    LAYOUT: tl.constexpr,
    PARTS: tl.constexpr,  # a power of 2, at least parts
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
):
    """One program owns the batch, tile after tile: it writes the rows' numbers, the loss and the totals.

    For small batches, and for few rows whose statistics other programs have found in parts.
    """
    V, D, columns = in_elements(V, D, UNIT, LAYOUT)
    dtype: tl.constexpr = rows_ptr.dtype.element_ty
    eps = tl.load(params_ptr)
    top = tl.full([], -INF, tl.float64)
    weights = tl.zeros([], tl.float64)
    values = tl.zeros([], tl.float64)
    for tile in tl.range(0, tiles, num_stages=1):
        row, exists, target, valid, label_logit, row_max, row_sum = own_statistics(
            logits_ptr, target_ptr, parts_ptr, tile, N, V, D, columns, parts, logits_strides, ignore_index, dtype,
            transform_ptr, CAPPED, UNIT, LAYOUT, PARTS, 1, BLOCK_N, BLOCK_V, LANES,
        )  # fmt: skip
        weight = load_weight(row, target, valid, V, weight_ptr, sample_weight_ptr, dtype)
        margin = store_statistics(rows_ptr, row, exists, N, label_logit, row_max, row_sum)
        if BLOCK_N >= 8:
            tl.debug_barrier()
            margin = stored_margin(rows_ptr, row, exists, N)
        log_weight, sign, unit, value = row_terms(margin, weight, valid, eps, params_ptr, LOG_WEIGHT, LOSS)
        store_terms(rows_ptr, row, exists, N, log_weight, unit, sign, value)
        more_top, more_weights, more_values = batch_sums(log_weight, sign, value, LOSS)
        top, weights, values = fold(top, weights, values, more_top, more_weights, more_values, LOSS)
    store_totals(top, weights, values, normalizer_ptr, loss_ptr, totals_ptr, dtype, LOSS)
