"""Kernels that read the logits once and write numbers of the rows only."""

import triton
import triton.language as tl

from .numerics import INF
from .reduction import fold, store_totals
from .rows import (
    batch_sums,
    class_offsets,
    combined_lanes,
    combined_parts,
    compared_label,
    in_words,
    load_label,
    no_statistics,
    other_classes,
    own_labels,
    own_positions,
    read_block,
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
    target,
    begin,
    end,
    active,
    read,
    strides,
    dtype,
    transform_ptr,
    CAPPED: tl.constexpr,
    UNIT: tl.constexpr,
    SPATIAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
):
    """Maximum and sum of exp(z - max) over the classes from begin to end other than the label, in one pass."""
    label = compared_label(target, LANES)
    maxima, sums = no_statistics(dtype, BLOCK_N, LANES)
    for first in tl.range(begin, end, BLOCK_V, num_stages=1):
        cols = first + tl.arange(0, BLOCK_V)
        raw = read_block(logits_ptr, start, cols, end, read, strides, UNIT, SPATIAL, "")
        logits, _ = with_slope(raw, cols, end, active, read, transform_ptr, CAPPED, SPATIAL)
        maxima, sums, _ = scan_block(other_classes(logits, first, cols, label, LANES), maxima, sums, LANES, UNIT)
    return combined_lanes(maxima, sums, LANES)


@triton.jit
def own_statistics(
    logits_ptr,
    target_ptr,
    parts_ptr,
    tile,
    N,
    V,
    D,
    parts,
    strides,
    ignore_index,
    dtype,
    transform_ptr,
    CAPPED: tl.constexpr,
    UNIT: tl.constexpr,
    SPATIAL: tl.constexpr,
    PARTS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
):
    """Row numbers, whether they exist and are examples, and their label's logit, maximum and sum.

    The last two are read from the logits, or combined from those of their parts where `parts_ptr` is given.
    """
    image, position, exists = own_positions(tile, D, BLOCK_N)
    row = image * D + position
    if TILES > 1:
        exists &= row < N
    target, valid = own_labels(row, exists, target_ptr, ignore_index)
    start = row_starts(image, position, strides, UNIT, SPATIAL)
    label_offset = class_offsets(target, strides, UNIT, SPATIAL)
    label_logit = load_label(logits_ptr, start, label_offset, target, V, valid, transform_ptr, CAPPED)
    if parts_ptr is None:
        read = in_words(valid, target_ptr, row, exists, ignore_index, UNIT, SPATIAL)
        row_max, row_sum = row_statistics(
            logits_ptr,
            start,
            target,
            0,
            V,
            valid,
            read,
            strides,
            dtype,
            transform_ptr,
            CAPPED,
            UNIT,
            SPATIAL,
            BLOCK_N,
            BLOCK_V,
            LANES,
        )
    else:
        row_max, row_sum = combined_parts(parts_ptr, row, exists, N, parts, PARTS)
    return row, exists, valid, label_logit, row_max, row_sum


@triton.jit(do_not_specialize=["N", "D"])
def split_kernel(
    logits_ptr,  # (images, V, D)
    target_ptr,  # (N,) integers
    transform_ptr,  # fp64: scale and, if CAPPED, cap; or None
    parts_ptr,  # (2, parts, N) out: max, sum
    N,
    V,  # in units of UNIT unless SPATIAL
    D,  # positions of an image, in units of UNIT if SPATIAL
    SPAN,  # classes of a part, a multiple of BLOCK_V
    logits_strides,  # of image, position and class; in units of UNIT but for the adjacent dimension
    ignore_index,
    CAPPED: tl.constexpr,
    UNIT: tl.constexpr,
    SPATIAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
):
    """A program owns BLOCK_N rows by SPAN classes and writes the rows' statistics over those."""
    if SPATIAL:
        D *= UNIT
    else:
        V *= UNIT
    parts = tl.cdiv(V, SPAN)
    part = tl.program_id(0) % parts
    image, position, exists = own_positions(tl.program_id(0) // parts, D, BLOCK_N)
    row = image * D + position
    target, valid = own_labels(row, exists, target_ptr, ignore_index)
    start = row_starts(image, position, logits_strides, UNIT, SPATIAL)
    read = in_words(valid, target_ptr, row, exists, ignore_index, UNIT, SPATIAL)
    begin, end = part * SPAN, tl.minimum(part * SPAN + SPAN, V)
    dtype: tl.constexpr = parts_ptr.dtype.element_ty
    row_max, row_sum = row_statistics(
        logits_ptr,
        start,
        target,
        begin,
        end,
        valid,
        read,
        logits_strides,
        dtype,
        transform_ptr,
        CAPPED,
        UNIT,
        SPATIAL,
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
    V,  # in units of UNIT unless SPATIAL
    D,  # positions of an image, in units of UNIT if SPATIAL
    parts,
    logits_strides,  # of image, position and class; in units of UNIT but for the adjacent dimension
    ignore_index,
    CAPPED: tl.constexpr,
    UNIT: tl.constexpr,
    SPATIAL: tl.constexpr,
    PARTS: tl.constexpr,  # a power of 2, at least parts
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
):
    """A program owns BLOCK_N rows and writes their margin and statistics; an ignored row has margin nan."""
    if SPATIAL:
        D *= UNIT
    else:
        V *= UNIT
    tile = tl.program_id(0)
    dtype: tl.constexpr = rows_ptr.dtype.element_ty
    row, exists, valid, label_logit, row_max, row_sum = own_statistics(
        logits_ptr, target_ptr, parts_ptr, tile, N, V, D, parts, logits_strides, ignore_index, dtype, transform_ptr, CAPPED,
        UNIT, SPATIAL, PARTS, 1, BLOCK_N, BLOCK_V, LANES,
    )  # fmt: skip
    margin = store_statistics(rows_ptr, row, exists, N, label_logit, row_max, row_sum)
    tl.store(margin_ptr + row, tl.where(valid, margin, float("nan")), mask=exists)


@triton.jit(do_not_specialize=["N", "D"])
def forward_kernel(
    logits_ptr,  # (images, V, D)
    target_ptr,  # (N,) integers
    transform_ptr,  # fp64: scale and, if CAPPED, cap; or None
    weight_ptr,  # (N,) or None
    params_ptr,  # (1 + parameters,) fp64: eps, then the family's
    rows_ptr,  # (7, N) out
    partials_ptr,  # (3, programs) out
    N,
    V,  # in units of UNIT unless SPATIAL
    D,  # positions of an image, in units of UNIT if SPATIAL
    logits_strides,  # of image, position and class; in units of UNIT but for the adjacent dimension
    ignore_index,
    LOG_WEIGHT: tl.constexpr,
    LOSS: tl.constexpr,
    CAPPED: tl.constexpr,
    UNIT: tl.constexpr,
    SPATIAL: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
):
    """A program owns TILES times BLOCK_N rows and writes their numbers and its share of the batch sums.

    First it finds the statistics of one tile after another, then does the arithmetic of all its rows at once, a row for each
    thread: what a reduction leaves behind every thread of the row has, and would do the arithmetic of the row again.
    """
    if SPATIAL:
        D *= UNIT
    else:
        V *= UNIT
    program = tl.program_id(0)
    dtype: tl.constexpr = rows_ptr.dtype.element_ty
    eps = tl.load(params_ptr)
    for i in tl.range(0, TILES, num_stages=1):
        row, exists, _, label_logit, row_max, row_sum = own_statistics(
            logits_ptr, target_ptr, None, program * TILES + i, N, V, D, 1, logits_strides, ignore_index, dtype, transform_ptr,
            CAPPED, UNIT, SPATIAL, 1, TILES, BLOCK_N, BLOCK_V, LANES,
        )  # fmt: skip
        store_statistics(rows_ptr, row, exists, N, label_logit, row_max, row_sum)
    row, exists = rows_of_tiles(program, N, D, TILES, BLOCK_N)
    _, valid = own_labels(row, exists, target_ptr, ignore_index)
    tl.debug_barrier()
    margin = stored_margin(rows_ptr, row, exists, N)
    log_weight, sign, unit, value = row_terms(margin, valid, row, weight_ptr, eps, params_ptr, LOG_WEIGHT, LOSS)
    store_terms(rows_ptr, row, exists, N, log_weight, unit, sign, value)
    store_partials(partials_ptr, program, tl.num_programs(0), log_weight, sign, value, LOSS)


@triton.jit(do_not_specialize=["N", "D"])
def batch_kernel(
    logits_ptr,  # (images, V, D)
    target_ptr,  # (N,) integers
    transform_ptr,  # fp64: scale and, if CAPPED, cap; or None
    weight_ptr,  # (N,) or None
    params_ptr,  # (1 + parameters,) fp64: eps, then the family's
    parts_ptr,  # (2, parts, N) of the split kernel, or None
    normalizer_ptr,  # () fp64, or None: the sum of weights
    rows_ptr,  # (7, N) out
    loss_ptr,  # () out
    totals_ptr,  # (3,) out, fp64: log_scale, divisor, sum of weights
    N,
    V,  # in units of UNIT unless SPATIAL
    D,  # positions of an image, in units of UNIT if SPATIAL
    tiles,
    parts,
    logits_strides,  # of image, position and class; in units of UNIT but for the adjacent dimension
    ignore_index,
    LOG_WEIGHT: tl.constexpr,
    LOSS: tl.constexpr,
    CAPPED: tl.constexpr,
    UNIT: tl.constexpr,
    SPATIAL: tl.constexpr,
    PARTS: tl.constexpr,  # a power of 2, at least parts
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
):
    """One program owns the batch, tile after tile: it writes the rows' numbers, the loss and the totals.

    For small batches, and for few rows whose statistics other programs have found in parts.
    """
    if SPATIAL:
        D *= UNIT
    else:
        V *= UNIT
    dtype: tl.constexpr = rows_ptr.dtype.element_ty
    eps = tl.load(params_ptr)
    top = tl.full([], -INF, tl.float64)
    weights = tl.zeros([], tl.float64)
    values = tl.zeros([], tl.float64)
    for tile in tl.range(0, tiles, num_stages=1):
        row, exists, valid, label_logit, row_max, row_sum = own_statistics(
            logits_ptr, target_ptr, parts_ptr, tile, N, V, D, parts, logits_strides, ignore_index, dtype, transform_ptr, CAPPED,
            UNIT, SPATIAL, PARTS, 1, BLOCK_N, BLOCK_V, LANES,
        )  # fmt: skip
        margin = store_statistics(rows_ptr, row, exists, N, label_logit, row_max, row_sum)
        if BLOCK_N >= 8:
            tl.debug_barrier()
            margin = stored_margin(rows_ptr, row, exists, N)
        log_weight, sign, unit, value = row_terms(margin, valid, row, weight_ptr, eps, params_ptr, LOG_WEIGHT, LOSS)
        store_terms(rows_ptr, row, exists, N, log_weight, unit, sign, value)
        more_top, more_weights, more_values = batch_sums(log_weight, sign, value, LOSS)
        top, weights, values = fold(top, weights, values, more_top, more_weights, more_values, LOSS)
    store_totals(top, weights, values, normalizer_ptr, loss_ptr, totals_ptr, dtype, LOSS)
