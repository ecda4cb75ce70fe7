"""The mathematics of a row, shared by every kernel: statistics, weight, value and the gradient's coefficient.

A program owns BLOCK_N rows and walks over their classes in blocks of BLOCK_V; (BLOCK_N,) tensors hold one number a row.
The derivations are in kernels/README.md.
"""

import triton
import triton.language as tl

from .numerics import INF, exp, sigmoids, tanh_and_slope


@triton.jit
def own_rows(tile, target_ptr, N, ignore_index, BLOCK_N: tl.constexpr):
    """Row numbers (64-bit), which of them exist, their labels, and which are examples (exist and are not ignored)."""
    row = tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = row < N
    target = tl.load(target_ptr + row, mask=exists, other=0).to(tl.int64)
    return row, exists, target, exists & (target != ignore_index)


@triton.jit
def transformed(raw, transform_ptr, CAPPED: tl.constexpr):
    """Logits as the loss takes them, and their derivative by the raw ones: z; scale z; or cap tanh(scale z / cap).

    transform_ptr is None, or points to scale and, if CAPPED, cap, in fp64.
    """
    if transform_ptr is None:
        return raw, 1.0
    else:
        scale = tl.load(transform_ptr).to(raw.dtype)
        if CAPPED:
            cap = tl.load(transform_ptr + 1).to(raw.dtype)
            share, slope = tanh_and_slope(raw * scale / cap)
            return cap * share, scale * slope
        else:
            return raw * scale, scale


@triton.jit
def load_with_slope(logits_ptr, row_start, cols, V, active, transform_ptr, CAPPED: tl.constexpr):
    """Logits (BLOCK_N, BLOCK_V) of the active rows in the compute dtype, -inf outside; and their slope."""
    inside = active[:, None] & (cols < V)[None, :]
    logits = tl.load(logits_ptr + row_start[:, None] + cols[None, :], mask=inside, other=-INF)
    if logits.dtype != tl.float64:
        logits = logits.to(tl.float32)
    if transform_ptr is None:
        return logits, 1.0
    else:
        logits, slope = transformed(logits, transform_ptr, CAPPED)
        return tl.where(inside, logits, -INF), slope


@triton.jit
def load_block(logits_ptr, row_start, cols, V, active, transform_ptr, CAPPED: tl.constexpr):
    """Logits (BLOCK_N, BLOCK_V) of the active rows in the compute dtype; -inf outside."""
    logits, _ = load_with_slope(logits_ptr, row_start, cols, V, active, transform_ptr, CAPPED)
    return logits


@triton.jit
def load_label(logits_ptr, row_start, target, V, active, transform_ptr, CAPPED: tl.constexpr):
    """z_y of the active rows; nan where it is +inf or the label is not a class, so that neither can pass unseen."""
    is_class = (target >= 0) & (target < V)
    logit = tl.load(logits_ptr + row_start + target, mask=active & is_class, other=0.0)
    if logit.dtype != tl.float64:
        logit = logit.to(tl.float32)
    logit, _ = transformed(logit, transform_ptr, CAPPED)
    return tl.where((active & ~is_class) | (logit == INF), float("nan"), logit)


@triton.jit
def finite_max(row_max):
    """The running maximum as something to subtract: 0 while no finite logit has been seen."""
    return tl.where(row_max == -INF, 0.0, row_max)


@triton.jit
def other_classes(logits, cols, target):
    """The block with -inf at the label."""
    return tl.where(cols[None, :] == target[:, None], -INF, logits)


@triton.jit
def scan_block(others, row_max, row_sum):
    """Fold a block of other classes into their maximum and sum of exp(z - max); also the block's exp(z - max)."""
    new_max = tl.maximum(row_max, tl.max(others, 1))
    base = finite_max(new_max)
    exps = exp(others - base[:, None])
    return new_max, row_sum * exp(row_max - base) + tl.sum(exps, 1), exps


@triton.jit
def margin_of(label_logit, row_max, row_sum):
    """z_y - max and the margin z_y - log sum_{j != y} exp(z_j); +inf where no other class has a finite logit."""
    lead = label_logit - finite_max(row_max)
    empty = row_sum == 0.0
    log_sum = tl.where(empty, -INF, tl.log(tl.where(empty, 1.0, row_sum)))
    return lead, lead - log_sum


@triton.jit
def row_terms(margin, valid, row, weight_ptr, params_ptr, LOG_WEIGHT: tl.constexpr, LOSS: tl.constexpr):
    """log |c w|, sign of c, unit = sign q / (2 q + eps), and value = c f(p), or -log p for a family without f.

    c is the row's weight (1 where weight_ptr is None); params_ptr holds eps, then the family's parameters. An ignored
    row has -inf, 0, 0, 0.
    """
    q, log_p, log_q = sigmoids(margin)
    eps = tl.load(params_ptr).to(margin.dtype)
    floor_p = tl.maximum(log_p, -1e30)
    floor_q = tl.maximum(log_q, -1e30)
    log_weight = LOG_WEIGHT(floor_p, floor_q, params_ptr + 1)
    log_weight = tl.where(margin == margin, log_weight, margin)
    if LOSS is None:
        value = -log_p
    else:
        value = LOSS(log_p, log_q, params_ptr + 1)
    norm = 2.0 * q + eps
    unit = tl.where(eps == 0.0, 0.5, q / tl.where(norm == 0.0, 1.0, norm))
    sign = tl.where(valid, 1.0, 0.0).to(margin.dtype)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + row, mask=valid, other=0.0)
        valid = valid & (weight != 0.0)
        sign = tl.where(weight > 0.0, 1.0, tl.where(weight < 0.0, -1.0, 0.0)).to(margin.dtype)
        log_weight += tl.log(tl.where(valid, tl.abs(weight), 1.0))
        if LOSS is not None:
            value *= weight
    return tl.where(valid, log_weight, -INF), sign, tl.where(valid, sign * unit, 0.0), tl.where(valid, value, 0.0)


@triton.jit
def store_rows(rows_ptr, row, exists, N, row_max, row_sum, lead, log_weight, unit, sign, value):
    """Write a row's seven numbers into the (7, N) buffer."""
    N = N.to(tl.int64)
    tl.store(rows_ptr + row, row_max, mask=exists)
    tl.store(rows_ptr + row + N, row_sum, mask=exists)
    tl.store(rows_ptr + row + 2 * N, lead, mask=exists)
    tl.store(rows_ptr + row + 3 * N, log_weight, mask=exists)
    tl.store(rows_ptr + row + 4 * N, unit, mask=exists)
    tl.store(rows_ptr + row + 5 * N, sign, mask=exists)
    tl.store(rows_ptr + row + 6 * N, value, mask=exists)


@triton.jit
def store_partials(partials_ptr, tile, tiles, log_weight, sign, value, LOSS: tl.constexpr):
    """Write a program's share of the batch sums into the (3, tiles) buffer.

    They are the largest log |c w|, sum c w relative to it, and sum of values (relative to it too where the family has
    no f).
    """
    top = tl.max(log_weight, 0)
    weight = exp(log_weight - finite_max(top))
    if LOSS is None:
        value = tl.where(weight == 0.0, 0.0, sign * weight * value)
    tl.store(partials_ptr + tile, top)
    tl.store(partials_ptr + tile + tiles, tl.sum(sign * weight, 0))
    tl.store(partials_ptr + tile + 2 * tiles, tl.sum(value, 0))


@triton.jit
def coefficient(dloss, log_weight, unit, row_sum, log_scale, divisor):
    """k = dloss unit exp(log |c w| - log_scale) / divisor; 0 where no other class has any probability.

    A row that does not count (unit 0) has 0 whatever dloss is.
    """
    k = dloss * unit * exp(log_weight - log_scale) / divisor
    return tl.where((row_sum == 0.0) | (unit == 0.0), 0.0, k)


@triton.jit
def gradient_of(exps, cols, target, k, row_sum):
    """k exp(z_j - lse) for the other classes and -k for the label; 0 for rows with k = 0, whose exps must be finite."""
    share = k / tl.where(k == 0.0, 1.0, row_sum)
    return tl.where(cols[None, :] == target[:, None], -k[:, None], exps * share[:, None])


@triton.jit
def store_block(dlogits_ptr, row_start, cols, gradient, V, exists):
    """Write a block of the gradient, rounded once to its dtype."""
    inside = exists[:, None] & (cols < V)[None, :]
    gradient = gradient.to(dlogits_ptr.dtype.element_ty)
    tl.store(dlogits_ptr + row_start[:, None] + cols[None, :], gradient, mask=inside)
