"""The single fused kernel, for a divisor known beforehand: of rows that are one block, and of rows in several."""

import triton
import triton.language as tl

from .rows import (
    block_of,
    class_offsets,
    coefficient,
    combined_lanes,
    combined_with_edges,
    compared_label,
    exps_of_rows,
    finite_max,
    gradient_block,
    gradient_of,
    in_elements,
    in_words,
    in_words_again,
    load_label,
    load_weight,
    no_statistics,
    of_active,
    other_classes,
    own_labels,
    own_positions,
    read_block,
    read_edges,
    read_packed,
    row_shifts,
    row_starts,
    row_terms,
    scan_block,
    store_block,
    store_edges,
    store_partials,
    store_statistics,
    store_terms,
    stored_margin,
    stored_terms,
    unpacked,
    with_slope,
)


@triton.jit
def store_numbers(
    rows_ptr,
    partials_ptr,
    row,
    exists,
    weight,
    valid,
    N,
    label_logit,
    row_max,
    row_sum,
    params_ptr,
    eps,
    divisor,
    LOG_WEIGHT: tl.constexpr,
    LOSS: tl.constexpr,
):
    """Write the numbers of the program's rows and its share of the batch sums; k of each row for dloss = 1."""
    BLOCK_N: tl.constexpr = row.shape[0]
    margin = store_statistics(rows_ptr, row, exists, N, label_logit, row_max, row_sum)
    if BLOCK_N >= 8:
        # What a reduction leaves behind every thread of the row has; so it is a row for each thread.
        tl.debug_barrier()
        margin = stored_margin(rows_ptr, row, exists, N)
    log_weight, sign, unit, value = row_terms(margin, weight, valid, eps, params_ptr, LOG_WEIGHT, LOSS)
    store_partials(partials_ptr, tl.program_id(0), tl.num_programs(0), log_weight, sign, value, LOSS)
    store_terms(rows_ptr, row, exists, N, log_weight, unit, sign, value)
    if BLOCK_N >= 8:
        tl.debug_barrier()
        log_weight, unit = stored_terms(rows_ptr, row, exists, N)
    return coefficient(1.0, log_weight, unit, row_sum, 0.0, divisor)


@triton.jit
def own_rows(
    logits_ptr,
    target_ptr,
    transform_ptr,
    V,
    D,
    logits_strides,
    dlogits_strides,
    ignore_index,
    CAPPED: tl.constexpr,
    UNIT: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Of the program's rows: numbers, which exist, labels, which are examples and which are read; where their logits and their
    gradient start, and how far they are shifted; z_y.
    """
    image, position, exists = own_positions(tl.program_id(0), D, BLOCK_N)
    row = image * D + position
    target, valid = own_labels(row, exists, target_ptr, ignore_index)
    read = in_words(valid, target_ptr, row, exists, ignore_index, UNIT, LAYOUT)
    start = row_starts(image, position, logits_strides, UNIT, LAYOUT)
    out_start = row_starts(image, position, dlogits_strides, UNIT, LAYOUT)
    shift = row_shifts(image, position, logits_strides, UNIT, LAYOUT)
    label_offset = class_offsets(target + shift, logits_strides, UNIT, LAYOUT)
    label_logit = load_label(logits_ptr, start, label_offset, target, V, valid, transform_ptr, CAPPED)
    return row, exists, target, valid, read, start, out_start, shift, label_logit


@triton.jit(do_not_specialize=["N", "D"])
def fused_kernel(
    logits_ptr,  # (images, V, D)
    target_ptr,  # (N,) integers
    transform_ptr,  # fp64: scale and, if CAPPED, cap; or None
    weight_ptr,  # (V,) or None
    sample_weight_ptr,  # (N,) or None
    params_ptr,  # (1 + parameters,) fp64: eps, then the family's
    normalizer_ptr,  # () fp64
    rows_ptr,  # (7, N) out
    partials_ptr,  # (3, programs) out
    dlogits_ptr,  # (images, V, D) out; may be the logits themselves
    N,
    V,  # as in_elements takes it
    D,  # positions of an image, likewise
    logits_strides,  # of image, position and class, as row_starts takes them
    dlogits_strides,  # likewise
    ignore_index,
    LOG_WEIGHT: tl.constexpr,
    LOSS: tl.constexpr,
    CAPPED: tl.constexpr,
    UNIT: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,  # at least as many as columns
):
    """A program reads BLOCK_N rows once and writes their numbers, its share of the value, and dlogits for dloss = 1."""
    V, D, columns = in_elements(V, D, UNIT, LAYOUT)
    compute: tl.constexpr = rows_ptr.dtype.element_ty
    eps = tl.load(params_ptr).to(compute)
    divisor = tl.load(normalizer_ptr)
    row, exists, target, valid, read, start, out_start, shift, label_logit = own_rows(
        logits_ptr, target_ptr, transform_ptr, V, D, logits_strides, dlogits_strides, ignore_index,
        CAPPED, UNIT, LAYOUT, BLOCK_N,
    )  # fmt: skip
    weight = load_weight(row, target, valid, V, weight_ptr, sample_weight_ptr, compute)
    label = compared_label(target, shift, 1)
    if LAYOUT == "shifted":
        edges, edge_slope = read_edges(logits_ptr, start, shift, V, 0, columns, valid, transform_ptr, CAPPED, UNIT)
    cols = tl.arange(0, BLOCK_V)[None, :]
    inside = block_of(read, shift, cols, V, UNIT, LAYOUT)
    raw = read_block(logits_ptr, start, cols, inside, logits_strides, UNIT, LAYOUT, "")
    inside = block_of(read & valid, shift, cols, V, UNIT, LAYOUT)
    logits, _ = with_slope(raw, inside, valid, transform_ptr, CAPPED, LAYOUT)
    maxima, sums = no_statistics(label_logit.dtype, BLOCK_N, 1)
    maxima, sums, exps = scan_block(other_classes(logits, 0, cols, label, 1), maxima, sums, 1, UNIT)
    if LAYOUT == "shifted":
        row_max, row_sum = combined_with_edges(maxima, sums, edges, shift, target, V, 1, UNIT)
    else:
        row_max, row_sum = maxima, sums
    k = store_numbers(
        rows_ptr, partials_ptr, row, exists, weight, valid, N, label_logit, row_max, row_sum,
        params_ptr, eps, divisor, LOG_WEIGHT, LOSS,
    )  # fmt: skip
    active = k != 0.0
    exps = tl.where(active[:, None], exps_of_rows(exps, maxima, row_max, LAYOUT), 0.0)
    gradient = gradient_of(exps, cols, label, k, row_sum)
    if LAYOUT == "shifted":
        base = finite_max(row_max)
        store_edges(dlogits_ptr, out_start, shift, target, V, 0, columns, exists, edges, edge_slope, base, k, row_sum, UNIT)
    if transform_ptr is not None:
        # Read again for the slope rather than kept in registers beside the exponentials.
        read = in_words_again(read, active, UNIT, LAYOUT)
        inside = block_of(read, shift, cols, V, UNIT, LAYOUT)
        raw = read_block(logits_ptr, start, cols, inside, logits_strides, UNIT, LAYOUT, "")
        inside = block_of(read & active, shift, cols, V, UNIT, LAYOUT)
        _, slope = with_slope(raw, inside, active, transform_ptr, CAPPED, LAYOUT)
        gradient *= slope
    written = block_of(exists, shift, cols, V, UNIT, LAYOUT)
    store_block(dlogits_ptr, out_start, cols, gradient, written, dlogits_strides, UNIT, LAYOUT, "")


@triton.jit
def scan_packed(
    packed,
    first,
    rows,
    valid,
    shift,
    V,
    label,
    maxima,
    sums,
    transform_ptr,
    dtype: tl.constexpr,
    CAPPED: tl.constexpr,
    UNIT: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
):
    """Fold the block that `read_packed` read from column `first` on into maxima and sums."""
    cols = first + tl.arange(0, BLOCK_V)[None, :]
    inside = block_of(rows & valid, shift, cols, V, UNIT, LAYOUT)
    logits, _ = with_slope(unpacked(packed, dtype), inside, valid, transform_ptr, CAPPED, LAYOUT)
    maxima, sums, _ = scan_block(other_classes(logits, first, cols, label, LANES), maxima, sums, LANES, UNIT)
    return maxima, sums


@triton.jit
def store_packed(
    dlogits_ptr,
    out_start,
    packed,
    first,
    rows,
    exists,
    active,
    shift,
    V,
    label,
    base,
    k,
    row_sum,
    strides,
    transform_ptr,
    dtype: tl.constexpr,
    CAPPED: tl.constexpr,
    UNIT: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
):
    """Write the gradient of the block that `read_packed` read from column `first` on."""
    cols = first + tl.arange(0, BLOCK_V)[None, :]
    inside = block_of(rows & active, shift, cols, V, UNIT, LAYOUT)
    logits, slope = with_slope(unpacked(packed, dtype), inside, active, transform_ptr, CAPPED, LAYOUT)
    gradient = gradient_block(logits, base, first, cols, label, k, row_sum, LANES) * slope
    written = block_of(exists, shift, cols, V, UNIT, LAYOUT)
    store_block(dlogits_ptr, out_start, cols, gradient, written, strides, UNIT, LAYOUT, "evict_first")


@triton.jit(do_not_specialize=["N", "D"])
def fused_blocks_kernel(
    logits_ptr,  # (images, V, D)
    target_ptr,  # (N,) integers
    transform_ptr,  # fp64: scale and, if CAPPED, cap; or None
    weight_ptr,  # (V,) or None
    sample_weight_ptr,  # (N,) or None
    params_ptr,  # (1 + parameters,) fp64: eps, then the family's
    normalizer_ptr,  # () fp64
    rows_ptr,  # (7, N) out
    partials_ptr,  # (3, programs) out
    dlogits_ptr,  # (images, V, D) out; may be the logits themselves
    N,
    V,  # as in_elements takes it
    D,  # positions of an image, likewise
    logits_strides,  # of image, position and class, as row_starts takes them
    dlogits_strides,  # likewise
    ignore_index,
    LOG_WEIGHT: tl.constexpr,
    LOSS: tl.constexpr,
    CAPPED: tl.constexpr,
    UNIT: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
    KEPT: tl.constexpr,  # blocks at the beginning of a row that stay in registers, at most all; 0 for one lane
):
    """What `fused_kernel` does, for rows of several blocks, of which all but the first KEPT are read twice.

    They are read again from the last to the first, the most recently used first, and stay in L2 until then; what has been read
    for the last time, and the gradient, leave it first. Each is read one block ahead.
    """
    V, D, columns = in_elements(V, D, UNIT, LAYOUT)
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    compute: tl.constexpr = rows_ptr.dtype.element_ty
    eps = tl.load(params_ptr).to(compute)
    divisor = tl.load(normalizer_ptr)
    row, exists, target, valid, read, start, out_start, shift, label_logit = own_rows(
        logits_ptr, target_ptr, transform_ptr, V, D, logits_strides, dlogits_strides, ignore_index,
        CAPPED, UNIT, LAYOUT, BLOCK_N,
    )  # fmt: skip
    label = compared_label(target, shift, LANES)
    if LAYOUT == "shifted":
        edges, edge_slope = read_edges(logits_ptr, start, shift, V, 0, columns, valid, transform_ptr, CAPPED, UNIT)
    kept = ()
    for number in tl.static_range(KEPT):
        one = read_packed(
            logits_ptr, start, number * BLOCK_V, read, shift, V, logits_strides, UNIT, LAYOUT, BLOCK_V, "evict_first"
        )
        kept += (one,)
    ahead = read_packed(logits_ptr, start, KEPT * BLOCK_V, read, shift, V, logits_strides, UNIT, LAYOUT, BLOCK_V, "evict_last")
    maxima, sums = no_statistics(label_logit.dtype, BLOCK_N, LANES)
    for number in tl.static_range(KEPT):
        maxima, sums = scan_packed(
            kept[number], number * BLOCK_V, read, valid, shift, V, label, maxima, sums, transform_ptr,
            dtype, CAPPED, UNIT, LAYOUT, BLOCK_V, LANES,
        )  # fmt: skip
    blocks = tl.cdiv(columns, BLOCK_V)
    for block in tl.range(KEPT, blocks, num_stages=1):
        packed = ahead
        later = (block + 1) * BLOCK_V
        ahead = read_packed(logits_ptr, start, later, read, shift, V, logits_strides, UNIT, LAYOUT, BLOCK_V, "evict_last")
        maxima, sums = scan_packed(
            packed, block * BLOCK_V, read, valid, shift, V, label, maxima, sums, transform_ptr,
            dtype, CAPPED, UNIT, LAYOUT, BLOCK_V, LANES,
        )  # fmt: skip
    if LAYOUT == "shifted":
        row_max, row_sum = combined_with_edges(maxima, sums, edges, shift, target, V, LANES, UNIT)
    else:
        row_max, row_sum = combined_lanes(maxima, sums, LANES)
    # Not before the loops, where it would take a register from what is kept.
    weight = load_weight(row, target, valid, V, weight_ptr, sample_weight_ptr, compute)
    k = store_numbers(
        rows_ptr, partials_ptr, row, exists, weight, valid, N, label_logit, row_max, row_sum,
        params_ptr, eps, divisor, LOG_WEIGHT, LOSS,
    )  # fmt: skip
    active = k != 0.0
    read = in_words_again(read, active, UNIT, LAYOUT)
    base = finite_max(row_max)
    if LAYOUT == "shifted":
        store_edges(dlogits_ptr, out_start, shift, target, V, 0, columns, exists, edges, edge_slope, base, k, row_sum, UNIT)
    last = (blocks - 1) * BLOCK_V
    again = read & (blocks > KEPT)
    ahead = read_packed(logits_ptr, start, last, again, shift, V, logits_strides, UNIT, LAYOUT, BLOCK_V, "evict_first")
    for number in tl.static_range(KEPT):
        counted = of_active(kept[number], active, dtype)
        store_packed(
            dlogits_ptr, out_start, counted, number * BLOCK_V, read, exists, active, shift, V, label, base, k, row_sum,
            dlogits_strides, transform_ptr, dtype, CAPPED, UNIT, LAYOUT, BLOCK_V, LANES,
        )  # fmt: skip
    for done in tl.range(KEPT, blocks, num_stages=1):
        block = blocks - 1 + KEPT - done
        packed = ahead
        earlier = (block - 1) * BLOCK_V
        again = read & (block > KEPT)
        ahead = read_packed(logits_ptr, start, earlier, again, shift, V, logits_strides, UNIT, LAYOUT, BLOCK_V, "evict_first")
        store_packed(
            dlogits_ptr, out_start, packed, block * BLOCK_V, read, exists, active, shift, V, label, base, k, row_sum,
            dlogits_strides, transform_ptr, dtype, CAPPED, UNIT, LAYOUT, BLOCK_V, LANES,
        )  # fmt: skip
