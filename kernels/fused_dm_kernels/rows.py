"""The mathematics of a row, shared by every kernel: statistics, weight, value and the gradient's coefficient.

A program owns BLOCK_N rows and walks over their columns in blocks of BLOCK_V; (BLOCK_N,) tensors hold one number a row, and
`cols` are (1, BLOCK_V).
The logits are (images, V, D) at strides of any size: row `image * D + position`. Plain (N, V) logits are one image.

Rows and classes are addressed by LAYOUT, so that 16 bytes, UNIT elements, are one access:
"rows"       a row's classes are adjacent, and it begins at a multiple of UNIT elements (which may be 1);
"shifted"    likewise, but rows begin anywhere. A row's columns count from the 16 bytes in which it begins: class c is column
             c + shift. Its edges, in 16 bytes that are not all its own, are read and written one element at a time;
"positions"  the positions are adjacent, and they and the classes' strides are multiples of UNIT elements.
The derivations are in kernels/README.md.
"""

import triton
import triton.language as tl

from .numerics import INF, exp, over_divisor, sigmoids, tanh_and_slope

# Of the least normal fp64: a weight below it is 0 beside an infinite -log p.
LOG_LEAST = tl.constexpr(-708.3964185322641)


@triton.jit
def in_elements(V, D, UNIT: tl.constexpr, LAYOUT: tl.constexpr):
    """V, D and the most columns of a row, from sizes of which the adjacent dimension's is in units, unless rows are shifted."""
    if LAYOUT == "positions":
        return V, D * UNIT, V
    elif LAYOUT == "shifted":
        return V, D, V + UNIT - 1
    else:
        return V * UNIT, D, V * UNIT


@triton.jit
def own_positions(tile, D, BLOCK_N: tl.constexpr):
    """The image of a tile, its positions there, and which of them exist. 64-bit, so that every offset made of them is."""
    tiles = tl.cdiv(D, BLOCK_N)
    image = (tile // tiles).to(tl.int64)
    position = (tile % tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    return image, position, position < D


@triton.jit
def rows_of_tiles(program, N, D, TILES: tl.constexpr, BLOCK_N: tl.constexpr):
    """The rows of TILES tiles in a row, and which of them exist."""
    number = tl.arange(0, TILES * BLOCK_N)
    tile = program * TILES + number // BLOCK_N
    tiles = tl.cdiv(D, BLOCK_N)
    position = (tile % tiles).to(tl.int64) * BLOCK_N + number % BLOCK_N
    row = (tile // tiles).to(tl.int64) * D + position
    return row, (position < D) & (row < N)


@triton.jit
def own_labels(row, exists, target_ptr, ignore_index):
    """The rows' labels, and which of them are examples: they exist and are not ignored."""
    target = tl.load(target_ptr + row, mask=exists, other=0).to(tl.int64)
    return target, exists & (target != ignore_index)


@triton.jit
def load_weight(row, target, valid, V, weight_ptr, sample_weight_ptr, dtype):
    """c of each row, its class's weight times its own, and 0 if it is no example; `valid` where every example has 1.

    A label that is no class has 1 for its class's weight, so that the row is not dropped but nan.
    """
    if weight_ptr is None and sample_weight_ptr is None:
        return valid
    else:
        weight = tl.full(row.shape, 1.0, dtype)
        if weight_ptr is not None:
            is_class = (target >= 0) & (target < V)
            weight = tl.load(weight_ptr + target, mask=valid & is_class, other=1.0).to(dtype)
        if sample_weight_ptr is not None:
            weight *= tl.load(sample_weight_ptr + row, mask=valid, other=0.0).to(dtype)
        return tl.where(valid, weight, 0.0)


@triton.jit
def row_starts(image, position, strides, UNIT: tl.constexpr, LAYOUT: tl.constexpr):
    """Offsets of the rows' first columns. `strides` are those of image, position and class."""
    if LAYOUT == "positions":
        return image * strides[0] * UNIT + position * strides[1]
    elif LAYOUT == "shifted":
        return (image * strides[0] + position * strides[1]) // UNIT * UNIT
    else:
        return (image * strides[0] + position * strides[1]) * UNIT


@triton.jit
def row_shifts(image, position, strides, UNIT: tl.constexpr, LAYOUT: tl.constexpr):
    """The columns of the rows' first classes."""
    if LAYOUT == "shifted":
        return ((image * strides[0] + position * strides[1]) % UNIT).to(tl.int32)
    else:
        return tl.zeros(position.shape, tl.int32)


@triton.jit
def class_offsets(cols, strides, UNIT: tl.constexpr, LAYOUT: tl.constexpr):
    """Offsets of columns from the start of their row."""
    if LAYOUT == "positions":
        return cols.to(tl.int64) * strides[2] * UNIT
    else:
        return cols


@triton.jit
def in_words(counts, numbers_ptr, row, exists, NOTHING, UNIT: tl.constexpr, LAYOUT: tl.constexpr):
    """The rows to read for those that count.

    They are the same, unless neighbouring rows lie side by side in 16 bytes, which are read whole if one of their rows
    counts: if its integer at `numbers_ptr` is not `NOTHING`. Since all rows of 16 bytes load the same integers, the compiler
    knows that the mask does not divide them, and loads 128 bits.
    """
    if LAYOUT == "positions" and UNIT > 1:
        wanted = tl.full(exists.shape, False, tl.int1)
        first = row // UNIT * UNIT
        for i in tl.static_range(UNIT):
            wanted |= tl.load(numbers_ptr + first + i, mask=exists, other=NOTHING) != NOTHING
        return wanted & exists
    else:
        return counts


@triton.jit
def in_words_again(read, active, UNIT: tl.constexpr, LAYOUT: tl.constexpr):
    """Of the rows of `in_words`, those to read for the active ones: all or none of them where 16 bytes hold several rows."""
    if LAYOUT == "positions" and UNIT > 1:
        return read & (tl.max(active.to(tl.int32), 0) > 0)
    else:
        return active


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
def block_of(rows, shift, cols, V, UNIT: tl.constexpr, LAYOUT: tl.constexpr):
    """Which elements (BLOCK_N, BLOCK_V) of a block are read or written for some of its rows: the classes, without the edges."""
    if LAYOUT == "shifted":
        begin, end = (shift + UNIT - 1) // UNIT * UNIT, (shift + V) // UNIT * UNIT
        return rows[:, None] & (cols >= begin[:, None]) & (cols < end[:, None])
    else:
        return rows[:, None] & (cols < V)


@triton.jit
def edge_columns(shift, V, UNIT: tl.constexpr):
    """Columns (BLOCK_N, 2, UNIT) of the 16 bytes in which shifted rows begin, and of those in which they end.

    In three dimensions, so that the compiler does not lay them out as it does a block, with UNIT of them for a thread.
    """
    lane = tl.arange(0, UNIT)[None, None, :]
    return tl.where(tl.arange(0, 2)[None, :, None] == 0, lane, (shift + V)[:, None, None] // UNIT * UNIT + lane)


@triton.jit
def edges_of(cols, rows, shift, V, begin, end, UNIT: tl.constexpr):
    """Which of `edge_columns`, from begin to end, are edges of some of the rows: classes that `block_of` leaves out."""
    first, past = shift[:, None, None], (shift + V)[:, None, None]
    # The 16 bytes of a short row may be both the first and the last; a row that begins with them has no head.
    wanted = tl.where(tl.arange(0, 2)[None, :, None] == 0, first > 0, (first == 0) | (past >= UNIT))
    return rows[:, None, None] & wanted & (cols >= first) & (cols < past) & (cols >= begin) & (cols < end)


@triton.jit
def read_block(
    logits_ptr,
    start,
    cols,
    inside,
    strides,
    UNIT: tl.constexpr,
    LAYOUT: tl.constexpr,
    EVICT: tl.constexpr,
):
    """Logits as they are of the columns inside, -inf elsewhere."""
    offset = class_offsets(cols, strides, UNIT, LAYOUT)
    return tl.load(logits_ptr + start[:, None] + offset, mask=inside, other=-INF, eviction_policy=EVICT)


@triton.jit
def read_packed(
    logits_ptr,
    start,
    first,
    rows,
    shift,
    V,
    strides,
    UNIT: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_V: tl.constexpr,
    EVICT: tl.constexpr,
):
    """What `read_block` reads of a block from column `first` on; two 16-bit elements in an integer where that goes."""
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    if UNIT > 1 and dtype.primitive_bitwidth == 16 and LAYOUT != "positions":
        # All in multiples of UNIT / 2, for the compiler to see that 16 bytes are one access.
        pairs = first // UNIT * (UNIT // 2) + tl.arange(0, BLOCK_V // 2)[None, :]
        inside = rows[:, None] & (pairs < (shift + V)[:, None] // UNIT * (UNIT // 2))
        if LAYOUT == "shifted":
            inside &= pairs >= (shift + UNIT - 1)[:, None] // UNIT * (UNIT // 2)
        pairs_ptr = logits_ptr.to(tl.pointer_type(tl.int32)) + (start // UNIT * (UNIT // 2))[:, None]
        # -inf twice, 0xFF80FF80 or 0xFC00FC00, as a number with a sign.
        nothing = -0x7F0080 if dtype == tl.bfloat16 else -0x3FF0400
        return tl.load(pairs_ptr + pairs, mask=inside, other=nothing, eviction_policy=EVICT)
    else:
        cols = first + tl.arange(0, BLOCK_V)[None, :]
        inside = block_of(rows, shift, cols, V, UNIT, LAYOUT)
        return read_block(logits_ptr, start, cols, inside, strides, UNIT, LAYOUT, EVICT)


@triton.jit
def of_active(packed, active, dtype: tl.constexpr):
    """What `read_packed` read of a row alone if it is active, else -inf: a row that does not count may hold anything."""
    if packed.dtype == tl.int32:
        nothing = -0x7F0080 if dtype == tl.bfloat16 else -0x3FF0400
    else:
        nothing = -INF
    # A number: a tensor would bring its own layout.
    return tl.where(tl.max(active.to(tl.int32), 0) != 0, packed, nothing).to(packed.dtype)


@triton.jit
def unpacked(packed, dtype: tl.constexpr):
    """The elements of `read_packed` in order."""
    if packed.dtype == tl.int32:
        if dtype == tl.bfloat16:
            low = (packed << 16).to(tl.float32, bitcast=True)
            high = (packed & -0x10000).to(tl.float32, bitcast=True)
        else:
            low = packed.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
            high = (packed >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        return tl.reshape(tl.join(low, high), [packed.shape[0], 2 * packed.shape[1]])
    else:
        return packed


@triton.jit
def with_slope(raw, inside, active, transform_ptr, CAPPED: tl.constexpr, LAYOUT: tl.constexpr):
    """What `read_block` read as the loss takes it, and its slope. Under a transform -inf and 0 but inside, in active rows."""
    logits = raw if raw.dtype == tl.float64 else raw.to(tl.float32)
    if transform_ptr is None:
        if LAYOUT == "positions":
            logits = tl.where(active[:, None], logits, -INF)
        return logits, 1.0
    else:
        # A row that was read for its neighbours' sake may hold anything.
        logits, slope = transformed(logits, transform_ptr, CAPPED)
        return tl.where(inside, logits, -INF), tl.where(inside, slope, 0.0)


@triton.jit
def read_edges(logits_ptr, start, shift, V, begin, end, rows, transform_ptr, CAPPED: tl.constexpr, UNIT: tl.constexpr):
    """The edges of some rows, from column begin to end, as the loss takes them, and their slope; -inf and 0 elsewhere."""
    cols = edge_columns(shift, V, UNIT)
    inside = edges_of(cols, rows, shift, V, begin, end, UNIT)
    logits = tl.load(logits_ptr + start[:, None, None] + cols, mask=inside, other=-INF)
    if logits.dtype != tl.float64:
        logits = logits.to(tl.float32)
    logits, slope = transformed(logits, transform_ptr, CAPPED)
    return tl.where(inside, logits, -INF), tl.where(inside, slope, 0.0)


@triton.jit
def load_label(logits_ptr, start, offset, target, V, active, transform_ptr, CAPPED: tl.constexpr):
    """z_y of the active rows; nan where it is +inf or the label is not a class, so that neither can pass unseen."""
    is_class = (target >= 0) & (target < V)
    logit = tl.load(logits_ptr + start + offset, mask=active & is_class, other=0.0)
    if logit.dtype != tl.float64:
        logit = logit.to(tl.float32)
    logit, _ = transformed(logit, transform_ptr, CAPPED)
    return tl.where((active & ~is_class) | (logit == INF), float("nan"), logit)


@triton.jit
def finite_max(row_max):
    """The running maximum as something to subtract: 0 while no finite logit has been seen."""
    return tl.where(row_max == -INF, 0.0, row_max)


@triton.jit
def compared_label(target, shift, LANES: tl.constexpr):
    """The labels' columns, as they are compared: a number for a row in blocks, else (BLOCK_N, 1). No class needs 64 bits."""
    label = target.to(tl.int32) + shift
    if LANES > 1:
        return tl.max(label, 0)
    else:
        return label[:, None]


@triton.jit
def has_label(first, label, BLOCK_V: tl.constexpr):
    """Whether the label of a row alone is among the BLOCK_V classes from `first` on."""
    return (label >= first) & (label < first + BLOCK_V)


@triton.jit
def other_classes(logits, first, cols, label, LANES: tl.constexpr):
    """The block with -inf at the label; a row in blocks is compared in the block that has it, and in no other."""
    if LANES > 1:
        if has_label(first, label, logits.shape[1]):
            logits = tl.where(cols == label, -INF, logits)
        return logits
    else:
        return tl.where(cols == label, -INF, logits)


@triton.jit
def no_statistics(dtype, BLOCK_N: tl.constexpr, LANES: tl.constexpr):
    """Maxima and sums of nothing, for `scan_block`."""
    if LANES > 1:
        return tl.full([BLOCK_N, LANES], -INF, dtype), tl.zeros([BLOCK_N, LANES], dtype)
    else:
        return tl.full([BLOCK_N], -INF, dtype), tl.zeros([BLOCK_N], dtype)


@triton.jit
def scan_block(others, maxima, sums, LANES: tl.constexpr, UNIT: tl.constexpr):
    """Fold a block of other classes into their maxima and sums of exp(z - max); also the block's exp(z - max).

    A row's statistics are one number each, or kept in LANES parts (BLOCK_N, LANES), each of every LANES-th group of UNIT
    classes: with one for each thread nothing passes between threads until `combined_lanes`. The exponentials are then
    (BLOCK_N, groups, LANES, UNIT).
    """
    if LANES > 1:
        groups: tl.constexpr = others.shape[1] // (LANES * UNIT)
        parts = tl.reshape(others, [others.shape[0], groups, LANES, UNIT])
        new_maxima = tl.maximum(maxima, tl.max(tl.max(parts, 3), 1))
        base = finite_max(new_maxima)
        exps = exp(parts - base[:, None, :, None])
        return new_maxima, sums * exp(maxima - base) + tl.sum(tl.sum(exps, 3), 1), exps
    else:
        new_maxima = tl.maximum(maxima, tl.max(others, 1))
        base = finite_max(new_maxima)
        exps = exp(others - base[:, None])
        return new_maxima, sums * exp(maxima - base) + tl.sum(exps, 1), exps


@triton.jit
def combined_lanes(maxima, sums, LANES: tl.constexpr):
    """Maximum and sum of each row from those of its lanes."""
    if LANES > 1:
        return combine(maxima, sums, 1)
    else:
        return maxima, sums


@triton.jit
def other_edges(edges, shift, target, V, UNIT: tl.constexpr):
    """What `read_edges` gave with -inf at the label."""
    return tl.where(edge_columns(shift, V, UNIT) == (target.to(tl.int32) + shift)[:, None, None], -INF, edges)


@triton.jit
def combined_with_edges(maxima, sums, edges, shift, target, V, LANES: tl.constexpr, UNIT: tl.constexpr):
    """Maximum and sum of each row from those of its lanes, of which the first takes the edges."""
    others = other_edges(edges, shift, target, V, UNIT)
    edge_max = tl.max(tl.max(others, 2), 1)
    edge_sum = tl.sum(tl.sum(exp(others - finite_max(edge_max)[:, None, None]), 2), 1)
    if LANES > 1:
        edge_max, edge_sum = edge_max[:, None], edge_sum[:, None]
        first = tl.arange(0, LANES)[None, :] == 0
        new_maxima = tl.maximum(maxima, tl.where(first, edge_max, -INF))
        base = finite_max(new_maxima)
        sums = sums * exp(maxima - base) + tl.where(first, edge_sum * exp(edge_max - base), 0.0)
        return combine(new_maxima, sums, 1)
    else:
        new_maxima = tl.maximum(maxima, edge_max)
        base = finite_max(new_maxima)
        return new_maxima, sums * exp(maxima - base) + edge_sum * exp(edge_max - base)


@triton.jit
def exps_of_rows(exps, maxima, row_max, LAYOUT: tl.constexpr):
    """The exponentials of `scan_block` of whole rows (BLOCK_N, BLOCK_V), relative to the rows' maxima, edges among them."""
    if LAYOUT == "shifted":
        return exps * tl.where(maxima == -INF, 0.0, exp(maxima - finite_max(row_max)))[:, None]
    else:
        return exps


@triton.jit
def combine(maxima, sums, AXIS: tl.constexpr):
    """Maximum and sum of exp(z - max) of rows, from those of their parts along AXIS; -inf and 0 without a finite logit."""
    row_max = tl.max(maxima, AXIS)
    return row_max, tl.sum(sums * exp(maxima - tl.expand_dims(finite_max(row_max), AXIS)), AXIS)


@triton.jit
def combined_parts(parts_ptr, row, exists, N, parts, PARTS: tl.constexpr):
    """Maximum and sum of the rows from the (2, parts, N) buffer of the split kernel; PARTS is a power of 2, at least parts."""
    part = tl.arange(0, PARTS)
    at = part.to(tl.int64)[None, :] * N + row[:, None]
    inside = exists[:, None] & (part < parts)[None, :]
    maxima = tl.load(parts_ptr + at, mask=inside, other=-INF)
    sums = tl.load(parts_ptr + at + N.to(tl.int64) * parts, mask=inside, other=0.0)
    return combine(maxima, sums, 1)


@triton.jit
def margin_of(lead, row_sum):
    """The margin z_y - log sum_{j != y} exp(z_j) from z_y - max; +inf where no other class has a finite logit."""
    empty = row_sum == 0.0
    log_sum = tl.where(empty, -INF, tl.log(tl.where(empty, 1.0, row_sum)))
    return lead - log_sum


@triton.jit
def store_statistics(rows_ptr, row, exists, N, label_logit, row_max, row_sum):
    """Write the rows' max, sum and lead, z_y - max, into the first three rows of a buffer; the margin."""
    N = N.to(tl.int64)
    lead = label_logit - finite_max(row_max)
    tl.store(rows_ptr + row, row_max, mask=exists)
    tl.store(rows_ptr + row + N, row_sum, mask=exists)
    tl.store(rows_ptr + row + 2 * N, lead, mask=exists)
    return margin_of(lead, row_sum)


@triton.jit
def stored_margin(rows_ptr, row, exists, N):
    """The margin from what `store_statistics` wrote, by this program and before a barrier."""
    N = N.to(tl.int64)
    row_sum = tl.load(rows_ptr + row + N, mask=exists, other=1.0)
    lead = tl.load(rows_ptr + row + 2 * N, mask=exists, other=0.0)
    return margin_of(lead, row_sum)


@triton.jit
def store_terms(rows_ptr, row, exists, N, log_weight, unit, sign, value):
    """Write what `row_terms` returns into the other four rows of the buffer."""
    N = N.to(tl.int64)
    tl.store(rows_ptr + row + 3 * N, log_weight, mask=exists)
    tl.store(rows_ptr + row + 4 * N, unit, mask=exists)
    tl.store(rows_ptr + row + 5 * N, sign, mask=exists)
    tl.store(rows_ptr + row + 6 * N, value, mask=exists)


@triton.jit
def stored_terms(rows_ptr, row, exists, N):
    """log |c w| and the unit from what `store_terms` wrote, by this program and before a barrier."""
    N = N.to(tl.int64)
    log_weight = tl.load(rows_ptr + row + 3 * N, mask=exists, other=0.0)
    unit = tl.load(rows_ptr + row + 4 * N, mask=exists, other=0.0)
    return log_weight, unit


@triton.jit
def row_terms(margin, weight, valid, eps, params_ptr, LOG_WEIGHT: tl.constexpr, LOSS: tl.constexpr):
    """log |c w|, sign of c, unit = sign q / (2 q + eps), and value = c f(p), or -log p for a family without f.

    An infinite -log p is 0 where w is 0.

    c is the row's weight as `load_weight` has it; params_ptr holds eps, then the family's parameters. eps is loaded
    before the logits, so that the parameters beside it are near by now. An ignored row has -inf, 0, 0, 0.
    """
    q, log_p, log_q = sigmoids(margin)
    eps = eps.to(margin.dtype)
    floor_p = tl.maximum(log_p, -1e30)
    floor_q = tl.maximum(log_q, -1e30)
    log_weight = LOG_WEIGHT(floor_p, floor_q, params_ptr + 1)
    log_weight = tl.where(margin == margin, log_weight, margin)
    if LOSS is None:
        value = tl.where((log_p == -INF) & (log_weight < LOG_LEAST), 0.0, -log_p)
    else:
        value = LOSS(log_p, log_q, params_ptr + 1)
    norm = 2.0 * q + eps
    # nan for a margin of nan, whatever eps is.
    unit = tl.where(eps == 0.0, 0.5 + q * 0.0, q / tl.where(norm == 0.0, 1.0, norm))
    if weight.dtype == tl.int1:
        sign = tl.where(valid, 1.0, 0.0).to(margin.dtype)
    else:
        valid = valid & (weight != 0.0)
        # That of 0 and of nan is the weight itself.
        sign = tl.where(weight > 0.0, 1.0, tl.where(weight < 0.0, -1.0, weight)).to(margin.dtype)
        log_weight += tl.log(tl.where(valid, tl.abs(weight), 1.0))
        if LOSS is not None:
            value *= weight
    return tl.where(valid, log_weight, -INF), sign, tl.where(valid, sign * unit, 0.0), tl.where(valid, value, 0.0)


@triton.jit
def batch_sums(log_weight, sign, value, LOSS: tl.constexpr):
    """A tile's share of the batch sums: the largest log |c w|, sum c w relative to it, and the sum of values.

    The values are relative to it too where the family has no f.
    """
    top = tl.max(log_weight, 0)
    weight = exp(log_weight - finite_max(top))
    if LOSS is None:
        # An infinite value is that of a weight which is not 0, however small it is beside the others; nan is left what it is.
        value = sign * tl.where(value == INF, weight + 1.0, weight) * value
    return top, tl.sum(sign * weight, 0), tl.sum(value, 0)


@triton.jit
def store_partials(partials_ptr, tile, tiles, log_weight, sign, value, LOSS: tl.constexpr):
    """Write a program's share of the batch sums into the (3, tiles) buffer."""
    top, weights, values = batch_sums(log_weight, sign, value, LOSS)
    tl.store(partials_ptr + tile, top)
    tl.store(partials_ptr + tile + tiles, weights)
    tl.store(partials_ptr + tile + 2 * tiles, values)


@triton.jit
def coefficient(dloss, log_weight, unit, row_sum, log_scale, divisor):
    """k = dloss unit exp(log |c w| - log_scale) / divisor, which is fp64; 0 where no other class has any probability.

    A row that does not count (unit 0) has 0 whatever dloss is. One whose margin is nan has nan.
    """
    # The number 0 says so while it is compiled; what is loaded is 0 for a known divisor, and otherwise the largest log |c w|.
    if log_scale == 0.0:
        k = over_divisor(dloss * unit, log_weight, divisor)
    else:
        k = dloss * unit * exp(log_weight - log_scale) / divisor.to(unit.dtype)
    # 0, or nan.
    return tl.where((row_sum == 0.0) | (unit == 0.0), unit * 0.0, k)


@triton.jit
def gradient_of(exps, cols, label, k, row_sum):
    """k exp(z_j - lse) for the other classes and -k for the label; 0 for rows with k = 0, whose exps must be finite."""
    share = k / tl.where(k == 0.0, 1.0, row_sum)
    return tl.where(cols == label, -k[:, None], exps * share[:, None])


@triton.jit
def gradient_block(logits, base, first, cols, label, k, row_sum, LANES: tl.constexpr):
    """`gradient_of` the exponentials of a block; the label is looked for as by `other_classes`."""
    if LANES > 1:
        # Numbers: tensors would bring their own layout to the block.
        base, k, row_sum = tl.sum(base, 0), tl.sum(k, 0), tl.sum(row_sum, 0)
        share = k / tl.where(k == 0.0, 1.0, row_sum)
        if has_label(first, label, logits.shape[1]):
            others = tl.where(cols == label, -INF, logits)
            gradient = tl.where(cols == label, -k, exp(others - base) * share)
        else:
            gradient = exp(logits - base) * share
        return gradient
    else:
        others = tl.where(cols == label, -INF, logits)
        return gradient_of(exp(others - base[:, None]), cols, label, k, row_sum)


@triton.jit
def store_block(
    dlogits_ptr,
    start,
    cols,
    gradient,
    inside,
    strides,
    UNIT: tl.constexpr,
    LAYOUT: tl.constexpr,
    EVICT: tl.constexpr,
):
    """Write the gradient inside, rounded once to its dtype."""
    offset = class_offsets(cols, strides, UNIT, LAYOUT)
    gradient = gradient.to(dlogits_ptr.dtype.element_ty)
    tl.store(dlogits_ptr + start[:, None] + offset, gradient, mask=inside, eviction_policy=EVICT)


@triton.jit
def store_edges(
    dlogits_ptr, start, shift, target, V, begin, end, exists, edges, slope, base, k, row_sum, UNIT: tl.constexpr
):  # fmt: skip
    """Write the gradient of the edges of the rows that exist, from column begin to end, of what `read_edges` gave."""
    others = other_edges(edges, shift, target, V, UNIT)
    share = k / tl.where(k == 0.0, 1.0, row_sum)
    gradient = exp(others - base[:, None, None]) * share[:, None, None]
    cols = edge_columns(shift, V, UNIT)
    gradient = tl.where(cols == (target.to(tl.int32) + shift)[:, None, None], -k[:, None, None], gradient) * slope
    # A row that does not count may hold anything.
    gradient = tl.where(k[:, None, None] == 0.0, 0.0, gradient).to(dlogits_ptr.dtype.element_ty)
    inside = edges_of(cols, exists, shift, V, begin, end, UNIT)
    tl.store(dlogits_ptr + start[:, None, None] + cols, gradient, mask=inside)
