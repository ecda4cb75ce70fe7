"""The single fused kernel, for a divisor known beforehand."""

import triton
import triton.language as tl

from .numerics import INF, exp
from .rows import (
    coefficient,
    finite_max,
    gradient_of,
    load_block,
    load_label,
    load_with_slope,
    margin_of,
    other_classes,
    own_rows,
    row_terms,
    scan_block,
    store_block,
    store_partials,
    store_rows,
)


@triton.jit(do_not_specialize=["N"])
def fused_kernel(
    logits_ptr,  # (N, V)
    target_ptr,  # (N,) integers
    transform_ptr,  # fp64: scale and, if CAPPED, cap; or None
    weight_ptr,  # (N,) or None
    params_ptr,  # (1 + parameters,) fp64: eps, then the family's
    normalizer_ptr,  # () fp64
    rows_ptr,  # (7, N) out
    partials_ptr,  # (3, programs) out
    dlogits_ptr,  # (N, V) out; may be the logits themselves
    N,
    V,  # in units of UNIT
    logits_row_stride,  # in units of UNIT
    dlogits_row_stride,  # in units of UNIT
    ignore_index,
    LOG_WEIGHT: tl.constexpr,
    LOSS: tl.constexpr,
    UNIT: tl.constexpr,
    CAPPED: tl.constexpr,
    ONE_BLOCK: tl.constexpr,  # V <= BLOCK_V: no loop, which leaves registers for a larger block
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A program owns BLOCK_N rows and writes their numbers, its share of the value, and dlogits for dloss = 1.

    The last block read stays in registers; the others are read again from the last to the first, the most recently
    used first. A row of at most BLOCK_V classes is read once.
    """
    V *= UNIT
    tile = tl.program_id(0)
    row, exists, target, valid = own_rows(tile, target_ptr, N, ignore_index, BLOCK_N)
    row_start = row * logits_row_stride * UNIT
    out_start = row * dlogits_row_stride * UNIT
    label_logit = load_label(logits_ptr, row_start, target, V, valid, transform_ptr, CAPPED)
    row_max = tl.full([BLOCK_N], -INF, label_logit.dtype)
    row_sum = tl.zeros([BLOCK_N], label_logit.dtype)
    exps = tl.zeros([BLOCK_N, BLOCK_V], label_logit.dtype)
    blocks = 1 if ONE_BLOCK else tl.cdiv(V, BLOCK_V)
    for block in range(0, blocks):
        cols = block * BLOCK_V + tl.arange(0, BLOCK_V)
        logits = load_block(logits_ptr, row_start, cols, V, valid, transform_ptr, CAPPED)
        row_max, row_sum, exps = scan_block(other_classes(logits, cols, target), row_max, row_sum)
    lead, margin = margin_of(label_logit, row_max, row_sum)
    log_weight, sign, unit, value = row_terms(margin, valid, row, weight_ptr, params_ptr, LOG_WEIGHT, LOSS)
    store_rows(rows_ptr, row, exists, N, row_max, row_sum, lead, log_weight, unit, sign, value)
    store_partials(partials_ptr, tile, tl.num_programs(0), log_weight, sign, value, LOSS)
    k = coefficient(1.0, log_weight, unit, row_sum, 0.0, tl.load(normalizer_ptr).to(row_sum.dtype))
    active = k != 0.0
    exps = tl.where(active[:, None], exps, 0.0)
    last = (blocks - 1) * BLOCK_V + tl.arange(0, BLOCK_V)
    # Read again for the slope, if there is one, rather than kept in registers beside the exponentials.
    gradient = gradient_of(exps, last, target, k, row_sum)
    if transform_ptr is not None:
        _, slope = load_with_slope(logits_ptr, row_start, last, V, active, transform_ptr, CAPPED)
        gradient *= slope
    store_block(dlogits_ptr, out_start, last, gradient, V, exists)
    base = tl.where(active, finite_max(row_max), 0.0)
    for done in range(1, blocks):
        again = (blocks - 1 - done) * BLOCK_V + tl.arange(0, BLOCK_V)
        logits, slope = load_with_slope(logits_ptr, row_start, again, V, active, transform_ptr, CAPPED)
        others = other_classes(logits, again, target)
        gradient = gradient_of(exp(others - base[:, None]), again, target, k, row_sum) * slope
        store_block(dlogits_ptr, out_start, again, gradient, V, exists)
