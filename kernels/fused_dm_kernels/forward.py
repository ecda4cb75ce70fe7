"""Kernels that read the logits once and write numbers of the rows only."""

import triton
import triton.language as tl

from .numerics import INF
from .rows import (
    load_block,
    load_label,
    margin_of,
    other_classes,
    own_rows,
    row_terms,
    scan_block,
    store_partials,
    store_rows,
)


@triton.jit
def row_statistics(
    logits_ptr,
    row_start,
    target,
    V,
    active,
    dtype,
    transform_ptr,
    CAPPED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Maximum and sum of exp(z - max) over the classes other than the label, in one pass."""
    row_max = tl.full([BLOCK_N], -INF, dtype)
    row_sum = tl.zeros([BLOCK_N], dtype)
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        logits = load_block(logits_ptr, row_start, cols, V, active, transform_ptr, CAPPED)
        row_max, row_sum, _ = scan_block(other_classes(logits, cols, target), row_max, row_sum)
    return row_max, row_sum


@triton.jit(do_not_specialize=["N"])
def margin_kernel(
    logits_ptr,  # (N, V)
    target_ptr,  # (N,) integers
    transform_ptr,  # fp64: scale and, if CAPPED, cap; or None
    rows_ptr,  # (3, N) out: max, sum, lead
    margin_ptr,  # (N,) out
    N,
    V,  # in units of UNIT
    logits_row_stride,  # in units of UNIT
    ignore_index,
    UNIT: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A program owns BLOCK_N rows and writes their margin and statistics; an ignored row has margin nan."""
    V *= UNIT
    row, exists, target, valid = own_rows(tl.program_id(0), target_ptr, N, ignore_index, BLOCK_N)
    # 64-bit from the row on: a stride alone may be 2^31 elements.
    row_start = row * logits_row_stride * UNIT
    label_logit = load_label(logits_ptr, row_start, target, V, valid, transform_ptr, CAPPED)
    dtype: tl.constexpr = label_logit.dtype
    row_max, row_sum = row_statistics(logits_ptr, row_start, target, V, valid, dtype, transform_ptr, CAPPED, BLOCK_N, BLOCK_V)
    lead, margin = margin_of(label_logit, row_max, row_sum)
    tl.store(rows_ptr + row, row_max, mask=exists)
    tl.store(rows_ptr + row + N, row_sum, mask=exists)
    tl.store(rows_ptr + row + 2 * N.to(tl.int64), lead, mask=exists)
    tl.store(margin_ptr + row, tl.where(valid, margin, float("nan")), mask=exists)


@triton.jit(do_not_specialize=["N"])
def forward_kernel(
    logits_ptr,  # (N, V)
    target_ptr,  # (N,) integers
    transform_ptr,  # fp64: scale and, if CAPPED, cap; or None
    weight_ptr,  # (N,) or None
    params_ptr,  # (1 + parameters,) fp64: eps, then the family's
    rows_ptr,  # (7, N) out
    partials_ptr,  # (3, programs) out
    N,
    V,  # in units of UNIT
    logits_row_stride,  # in units of UNIT
    ignore_index,
    LOG_WEIGHT: tl.constexpr,
    LOSS: tl.constexpr,
    UNIT: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A program owns BLOCK_N rows and writes their numbers and its share of the batch sums."""
    V *= UNIT
    tile = tl.program_id(0)
    row, exists, target, valid = own_rows(tile, target_ptr, N, ignore_index, BLOCK_N)
    row_start = row * logits_row_stride * UNIT
    label_logit = load_label(logits_ptr, row_start, target, V, valid, transform_ptr, CAPPED)
    dtype: tl.constexpr = label_logit.dtype
    row_max, row_sum = row_statistics(logits_ptr, row_start, target, V, valid, dtype, transform_ptr, CAPPED, BLOCK_N, BLOCK_V)
    lead, margin = margin_of(label_logit, row_max, row_sum)
    log_weight, sign, unit, value = row_terms(margin, valid, row, weight_ptr, params_ptr, LOG_WEIGHT, LOSS)
    store_rows(rows_ptr, row, exists, N, row_max, row_sum, lead, log_weight, unit, sign, value)
    store_partials(partials_ptr, tile, tl.num_programs(0), log_weight, sign, value, LOSS)
