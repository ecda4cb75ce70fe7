"""Break the implementation in one place at a time and see which test notices: `make faults`.

Each fault replaces one line in a copy of the project; the tests run on the copy until one fails, first the one that noticed it
last. A fault that no test notices is printed as such, and the exit status is 1. Slow: not a part of `make test`.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = "kernels/fused_dm_kernels"
RESULTS = "bench/results/planted_faults.md"


class Fault(NamedTuple):
    """In `path`, the only occurrence of `right` becomes `wrong`."""

    name: str
    path: str
    right: str
    wrong: str


FAULTS = [
    # Kernels: masks, tails, offsets
    Fault("tail of a row not masked in the load", f"{KERNELS}/rows.py", "return rows[:, None] & (cols < V)", "return rows[:, None] & (cols < V + 1)"),
    Fault("last class dropped", f"{KERNELS}/rows.py", "return rows[:, None] & (cols < V)", "return rows[:, None] & (cols < V - 1)"),
    Fault("last class not written", f"{KERNELS}/rows.py", "tl.store(dlogits_ptr + start[:, None] + offset, gradient, mask=inside,", "tl.store(dlogits_ptr + start[:, None] + offset, gradient, mask=inside & (cols < tl.max(cols, 1)[:, None]),"),
    Fault("last block not scanned", f"{KERNELS}/forward.py", "for first in tl.range(begin, end, BLOCK_V, num_stages=1):", "for first in tl.range(begin, end - BLOCK_V + 1, BLOCK_V, num_stages=1):"),
    Fault("gradient's last block dropped", f"{KERNELS}/gradient.py", "for first in tl.range(begin, end, BLOCK_V, num_stages=STAGES", "for first in tl.range(begin, end - BLOCK_V + 1, BLOCK_V, num_stages=STAGES"),
    Fault("gradient's spans start at 0", f"{KERNELS}/gradient.py", "begin = (program % spans) * SPAN", "begin = (program % spans) * 0"),
    Fault("fused: the last block not scanned", f"{KERNELS}/fused.py", "for block in tl.range(KEPT, blocks, num_stages=1):", "for block in tl.range(KEPT, blocks - 1, num_stages=1):"),
    Fault("fused: no gradient of the first block that is read again", f"{KERNELS}/fused.py", "for done in tl.range(KEPT, blocks, num_stages=1):", "for done in tl.range(KEPT, blocks - 1, num_stages=1):"),
    Fault("fused: the wrong block read again", f"{KERNELS}/fused.py", "        earlier = (block - 1) * BLOCK_V\n", "        earlier = block * BLOCK_V\n"),
    Fault("fused: read ahead the wrong way", f"{KERNELS}/fused.py", "        later = (block + 1) * BLOCK_V\n", "        later = (block - 1) * BLOCK_V\n"),
    Fault("fused: a block that is kept read again too", f"{KERNELS}/fused.py", "    again = read & (blocks > KEPT)\n", "    again = read\n"),
    Fault("fused: the last block that is kept read again", f"{KERNELS}/fused.py", "        again = read & (block > KEPT)\n", "        again = read & (block >= KEPT)\n"),
    Fault("fused: kept blocks not scanned", f"{KERNELS}/fused.py", "            kept[number], number * BLOCK_V, read, valid, shift, V, label, maxima, sums, transform_ptr,", "            kept[0], number * BLOCK_V, read, valid, shift, V, label, maxima, sums, transform_ptr,"),
    Fault("fused: a kept block written in the place of another", f"{KERNELS}/fused.py", "dlogits_ptr, out_start, counted, number * BLOCK_V, read,", "dlogits_ptr, out_start, counted, 0, read,"),
    Fault("fused: kept blocks of rows that do not count", f"{KERNELS}/fused.py", "        counted = of_active(kept[number], active, dtype)\n", "        counted = kept[number]\n"),
    Fault("fused: pairs of 16-bit logits in the wrong order", f"{KERNELS}/rows.py", "tl.join(low, high)", "tl.join(high, low)"),
    Fault("fused: the upper of two logits with the lower one below it", f"{KERNELS}/rows.py", "high = (packed & -0x10000).to(tl.float32, bitcast=True)", "high = packed.to(tl.float32, bitcast=True)"),
    Fault("fused: pairs read to the end of the last 16 bytes", f"{KERNELS}/rows.py", "(pairs < (shift + V)[:, None] // UNIT * (UNIT // 2))", "(pairs < (shift + V + UNIT - 1)[:, None] // UNIT * (UNIT // 2))"),
    Fault("shifted: pairs read from the beginning of the first 16 bytes", f"{KERNELS}/rows.py", "            inside &= pairs >= (shift + UNIT - 1)[:, None] // UNIT * (UNIT // 2)\n", "            inside &= pairs >= 0\n"),
    Fault("fused: nothing is 0 in pairs that are not read", f"{KERNELS}/rows.py", "        nothing = -0x7F0080 if dtype == tl.bfloat16 else -0x3FF0400\n        return tl.load", "        nothing = 0\n        return tl.load"),
    Fault("fused: fp16 pairs without -inf", f"{KERNELS}/rows.py", "        nothing = -0x7F0080 if dtype == tl.bfloat16 else -0x3FF0400\n        return tl.load", "        nothing = -0x7F0080\n        return tl.load"),
    Fault("fused: the gradient of dloss = 1 kept for any dloss", f"{KERNELS}/gradient.py", "    if SKIP_ONE and tl.load(dloss_ptr) == 1.0:", "    if SKIP_ONE:"),
    Fault("in place: nothing multiplied", f"{KERNELS}/gradient.py", "    if dloss == 1.0:", "    if dloss == dloss:"),
    Fault("label of a row in blocks not in its gradient", f"{KERNELS}/rows.py", "            gradient = tl.where(cols == label, -k, exp(others - base) * share)\n", "            gradient = exp(others - base) * share\n"),
    Fault("shifted: label's logit taken without the shift by the fused kernel", f"{KERNELS}/fused.py", "label_offset = class_offsets(target + shift,", "label_offset = class_offsets(target,"),
    Fault("fused: two logits at an odd element read as one", "fused_dm/_triton.py", "odd = logits.dtype.itemsize == 2 and logits.data_ptr() % 4 != 0", "odd = logits.dtype.itemsize == 2 and logits.data_ptr() % 2 != 0"),
    Fault("fused: threads without a part of a block", "fused_dm/_launch.py", "    most = min(MOST_THREADS, choice.block_v * sizes.itemsize // 16) // device.warp\n", "    most = MOST_THREADS // device.warp\n"),
    Fault("operators: a value returned that is a view", "fused_dm/_operator.py", "if returned is None or args[returned]._is_view():", "if returned is None:"),
    Fault("operators: the value copied", "fused_dm/_operator.py", "                output = args[returned]\n                ctx.mark_dirty(output)\n", "                output = function(*args)\n"),
    Fault("row stride taken for V", f"{KERNELS}/rows.py", "return (image * strides[0] + position * strides[1]) * UNIT", "return (image * strides[0] + position * 48) * UNIT"),
    Fault("row stride not in units", f"{KERNELS}/rows.py", "return (image * strides[0] + position * strides[1]) * UNIT", "return image * strides[0] * UNIT + position * strides[1]"),
    Fault("row offsets of 32 bits", f"{KERNELS}/rows.py", "return (image * strides[0] + position * strides[1]) * UNIT", "return (image * strides[0] + position.to(tl.int32) * strides[1]) * UNIT"),
    Fault("one row too many", f"{KERNELS}/rows.py", "return image, position, position < D", "return image, position, position < D - 1"),
    Fault("rows a program", f"{KERNELS}/rows.py", "position = (tile % tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)", "position = (tile % tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N) // 2 * 2"),
    Fault("image stride ignored", f"{KERNELS}/rows.py", "return image * strides[0] * UNIT + position * strides[1]", "return image * 0 * UNIT + position * strides[1]"),
    Fault("class stride not in units", f"{KERNELS}/rows.py", "return cols.to(tl.int64) * strides[2] * UNIT", "return cols.to(tl.int64) * strides[2]"),
    Fault("class offsets of 32 bits", f"{KERNELS}/rows.py", "return cols.to(tl.int64) * strides[2] * UNIT", "return cols.to(tl.int32) * strides[2] * UNIT"),
    Fault("only the first position of 16 bytes counts", f"{KERNELS}/rows.py", "for i in tl.static_range(UNIT):", "for i in tl.static_range(1):"),
    Fault("a neighbour's logits in a row that does not count", f"{KERNELS}/rows.py", "            logits = tl.where(active[:, None], logits, -INF)\n", "            logits = logits\n"),
    Fault("parts of a row added unscaled", f"{KERNELS}/rows.py", "tl.sum(sums * exp(maxima - tl.expand_dims(finite_max(row_max), AXIS)), AXIS)", "tl.sum(sums, AXIS)"),
    Fault("last part of a row dropped", f"{KERNELS}/rows.py", "(part < parts)[None, :]", "(part < parts - 1)[None, :]"),
    Fault("parts overlap", f"{KERNELS}/forward.py", "begin, end = part * SPAN, tl.minimum(part * SPAN + SPAN, columns)", "begin, end = part * SPAN, columns"),
    Fault("last tile of a small batch dropped", f"{KERNELS}/forward.py", "in tl.range(0, tiles, num_stages=1)", "in tl.range(0, tiles - 1, num_stages=1)"),
    Fault("tiles of a small batch added unscaled", f"{KERNELS}/reduction.py", "scale, more_scale = tl.exp(top - base), tl.exp(more_top - base)", "scale, more_scale = tl.exp(top - top), tl.exp(more_top - more_top)"),
    Fault("gradient of the rows in the other order", f"{KERNELS}/gradient.py", "program = tl.num_programs(0) - 1 - tl.program_id(0)", "program = tl.program_id(0) * 0"),
    # Kernels: rows that begin anywhere
    Fault("shifted: 16 bytes that another row begins in", f"{KERNELS}/rows.py", "begin, end = (shift + UNIT - 1) // UNIT * UNIT, (shift", "begin, end = shift // UNIT * UNIT, (shift"),
    Fault("shifted: 16 bytes that another row ends in", f"{KERNELS}/rows.py", "(shift + V) // UNIT * UNIT\n        return", "(shift + V + UNIT - 1) // UNIT * UNIT\n        return"),
    Fault("shifted: the last whole 16 bytes dropped", f"{KERNELS}/rows.py", "(shift + V) // UNIT * UNIT\n        return", "(shift + V - 1) // UNIT * UNIT\n        return"),
    Fault("shifted: no edge at the beginning", f"{KERNELS}/rows.py", "first > 0, (first == 0) | (past >= UNIT)", "first < 0, (first == 0) | (past >= UNIT)"),
    Fault("shifted: a short row's edges twice", f"{KERNELS}/rows.py", "first > 0, (first == 0) | (past >= UNIT)", "first > 0, past > 0"),
    Fault("shifted: no edge of a short row that begins with 16 bytes", f"{KERNELS}/rows.py", "first > 0, (first == 0) | (past >= UNIT)", "first > 0, past >= UNIT"),
    Fault("shifted: edges one element late", f"{KERNELS}/rows.py", "wanted & (cols >= first) & (cols < past)", "wanted & (cols > first) & (cols < past)"),
    Fault("shifted: edges one element early", f"{KERNELS}/rows.py", "wanted & (cols >= first) & (cols < past)", "wanted & (cols >= first) & (cols < past - 1)"),
    Fault("shifted: edges in every part of a row", f"{KERNELS}/rows.py", "(cols < past) & (cols >= begin) & (cols < end)", "(cols < past)"),
    Fault("shifted: maximum of the edges ignored", f"{KERNELS}/rows.py", "new_maxima = tl.maximum(maxima, edge_max)", "new_maxima = maxima"),
    Fault("shifted: maximum of the edges ignored in lanes", f"{KERNELS}/rows.py", "tl.maximum(maxima, tl.where(first, edge_max, -INF))", "maxima"),
    Fault("shifted: sum of the edges ignored", f"{KERNELS}/rows.py", "return new_maxima, sums * exp(maxima - base) + edge_sum * exp(edge_max - base)", "return new_maxima, sums * exp(maxima - base)"),
    Fault("shifted: sum of the edges in every lane", f"{KERNELS}/rows.py", "+ tl.where(first, edge_sum * exp(edge_max - base), 0.0)", "+ edge_sum * exp(edge_max - base)"),
    Fault("shifted: sum not brought to the maximum of the edges", f"{KERNELS}/rows.py", "return new_maxima, sums * exp(maxima - base) + edge_sum", "return new_maxima, sums + edge_sum"),
    Fault("shifted: sum of a lane not brought to the maximum of the edges", f"{KERNELS}/rows.py", "sums = sums * exp(maxima - base) + tl.where(first,", "sums = sums + tl.where(first,"),
    Fault("shifted: label at an edge not left out", f"{KERNELS}/rows.py", "== (target.to(tl.int32) + shift)[:, None, None], -INF, edges)", "== (target.to(tl.int32) + shift)[:, None, None], edges, edges)"),
    Fault("shifted: label at an edge not in the gradient", f"{KERNELS}/rows.py", "[:, None, None], -k[:, None, None], gradient) * slope", "[:, None, None], gradient, gradient) * slope"),
    Fault("shifted: label taken without the shift", f"{KERNELS}/rows.py", "label = target.to(tl.int32) + shift\n", "label = target.to(tl.int32)\n"),
    Fault("shifted: label's logit taken without the shift", f"{KERNELS}/forward.py", "label_offset = class_offsets(target + shift,", "label_offset = class_offsets(target,"),
    Fault("shifted: exponentials relative to the maximum without edges", f"{KERNELS}/rows.py", "return exps * tl.where(maxima == -INF, 0.0, exp(maxima - finite_max(row_max)))[:, None]", "return exps"),
    Fault("shifted: nan at an edge of a row that does not count", f"{KERNELS}/rows.py", "gradient = tl.where(k[:, None, None] == 0.0, 0.0, gradient).to(", "gradient = gradient.to("),
    Fault("shifted: slope left out at the edges", f"{KERNELS}/rows.py", "-k[:, None, None], gradient) * slope", "-k[:, None, None], gradient)"),
    Fault("shifted: the last columns of a row missing", f"{KERNELS}/rows.py", "return V, D, V + UNIT - 1", "return V, D, V"),
    Fault("shifted: every row begins where the first does", f"{KERNELS}/rows.py", "position * strides[1]) % UNIT).to(tl.int32)", "position * 0) % UNIT).to(tl.int32)"),
    Fault("shifted: row offsets of 32 bits", f"{KERNELS}/rows.py", "return (image * strides[0] + position * strides[1]) // UNIT * UNIT", "return (image * strides[0] + position.to(tl.int32) * strides[1]) // UNIT * UNIT"),
    Fault("shifted: in place, edges not multiplied", f"{KERNELS}/gradient.py", "edges = edges_of(edge_cols, exists, shift, V, begin, end, UNIT)", "edges = edges_of(edge_cols, exists & (shift < 0), shift, V, begin, end, UNIT)"),
    Fault("shifted: a gradient that lies otherwise", "fused_dm/_triton.py", "not aligned and alike and", "not aligned and"),
    # Kernels: statistics
    Fault("inclusive logsumexp", f"{KERNELS}/rows.py", "    else:\n        return tl.where(cols == label, -INF, logits)", "    else:\n        return logits"),
    Fault("label one off in the gradient", f"{KERNELS}/rows.py", "return tl.where(cols == label, -k[:, None], exps * share[:, None])", "return tl.where(cols == label + 1, -k[:, None], exps * share[:, None])"),
    Fault("maximum not carried", f"{KERNELS}/rows.py", "new_maxima = tl.maximum(maxima, tl.max(others, 1))", "new_maxima = tl.max(others, 1)"),
    Fault("sum not rescaled", f"{KERNELS}/rows.py", "sums * exp(maxima - base) + tl.sum(exps, 1)", "sums + tl.sum(exps, 1)"),
    Fault("sum rounded to 16 bits", f"{KERNELS}/rows.py", "+ tl.sum(exps, 1), exps", "+ tl.sum(exps, 1).to(tl.float16).to(exps.dtype), exps"),
    Fault("log1p cut to three terms", f"{KERNELS}/numerics.py", "TERMS: tl.constexpr = 17 if u.dtype == tl.float64 else 6", "TERMS: tl.constexpr = 17 if u.dtype == tl.float64 else 3"),
    Fault("log1p as log(1 + u)", f"{KERNELS}/numerics.py", "    return 2.0 * s * series", "    return tl.log(1.0 + u)"),
    Fault("q as 1 - p", f"{KERNELS}/numerics.py", "q = tl.where(margin > 0, u * larger, larger)", "q = 1.0 - tl.where(margin > 0, larger, u * larger)"),
    # Kernels: weights, value, coefficient
    Fault("label +inf passes", f"{KERNELS}/rows.py", "(active & ~is_class) | (logit == INF)", "(active & ~is_class)"),
    Fault("weights: of the next class", f"{KERNELS}/rows.py", "tl.load(weight_ptr + target,", "tl.load(weight_ptr + (target + 1) % V,"),
    Fault("labels: no class has a weight of 0", f"{KERNELS}/rows.py", "mask=valid & is_class, other=1.0)", "mask=valid & is_class, other=0.0)"),
    Fault("rows: label that is no class has the weight of class 0", "fused_dm/_rows.py", "combined = torch.where(is_class, of_class, combined)", "combined = torch.where(valid, of_class, combined)"),
    Fault("weights: of examples instead of classes", f"{KERNELS}/rows.py", "weight *= tl.load(sample_weight_ptr", "weight = tl.load(sample_weight_ptr"),
    Fault("weights: an ignored row's", f"{KERNELS}/rows.py", "return tl.where(valid, weight, 0.0)", "return weight"),
    Fault("mean: no examples where the weights cancel", f"{KERNELS}/examples.py", "tl.where(tl.max(counts.to(tl.int32), 0) == 0, 1.0, tl.sum(sums, 0))", "tl.where(tl.sum(sums, 0) == 0, 1.0, tl.sum(sums, 0))"),
    Fault("mean: the first block of rows alone", f"{KERNELS}/examples.py", "for first in tl.range(0, N, BLOCK):", "for first in tl.range(0, tl.minimum(N, BLOCK), BLOCK):"),
    Fault("mean: weights not rounded as the rows' are", f"{KERNELS}/examples.py", "weight_ptr, sample_weight_ptr, DTYPE).to(tl.float64)", "weight_ptr, sample_weight_ptr, tl.float64).to(tl.float64)"),
    Fault("received: an ignored row's probability", f"{KERNELS}/examples.py", 'tl.where(valid, prob, float("nan"))', "prob"),
    Fault("received: not divided", f"{KERNELS}/examples.py", "over_divisor(sign, log_weight - log_scale, divisor)", "sign * exp(log_weight - log_scale)"),
    Fault("received: nan where the weight overflows in a row of none", f"{KERNELS}/examples.py", "tl.where(sign == 0.0, 0.0, over", "tl.where(sign != sign, 0.0, over"),
    Fault("received: q for p", f"{KERNELS}/examples.py", "sigmoids(-margin)", "sigmoids(margin)"),
    Fault("received: a tie is not correct", f"{KERNELS}/examples.py", "(lead >= 0.0)", "(lead > 0.0)"),
    Fault("received: a class alone is not correct", f"{KERNELS}/examples.py", "((lead >= 0.0) | (margin == INF))", "(lead >= 0.0)"),
    Fault("received: nan is correct", f"{KERNELS}/examples.py", "valid & (margin == margin) & (", "valid & ("),
    Fault("received: an ignored row is correct", f"{KERNELS}/examples.py", "correct = valid & (margin == margin)", "correct = (margin == margin)"),
    Fault("weights: read without the sign of a view", "fused_dm/_triton.py", "return tensor.resolve_neg() if tensor.is_neg() else tensor", "return tensor"),
    Fault("weights: 8 bits as they are", "fused_dm/_triton.py", "tensor.to(dtype) if tensor.dtype.itemsize == 1 else tensor", "tensor"),
    Fault("in place: logits that torch negates", "fused_dm/_validation.py", "if not torch.compiler.is_compiling() and logits.is_neg():", "if False:"),
    Fault("gradient begins as a row without room does", "fused_dm/_operators.py", "strides[dim] = room + (logits.stride(dim) - room) % unit", "strides[dim] = room + 0 * unit"),
    Fault("gradient of positions first as if images came first", "fused_dm/_operators.py", "logits.stride(0) < logits.stride(2)", "logits.stride(0) < 0"),
    Fault("label that is no class passes", f"{KERNELS}/rows.py", "tl.where((active & ~is_class) | (logit == INF), float(\"nan\"), logit)", "tl.where(logit == INF, float(\"nan\"), logit)"),
    Fault("nan of a row lost in its weight", f"{KERNELS}/rows.py", "log_weight = tl.where(margin == margin, log_weight, margin)", "log_weight = log_weight"),
    Fault("row weight applied twice", f"{KERNELS}/rows.py", "log_weight += tl.log(", "log_weight += 2 * tl.log("),
    Fault("sign of a weight lost", f"{KERNELS}/rows.py", "tl.where(weight < 0.0, -1.0, weight)", "tl.where(weight < 0.0, 1.0, weight)"),
    Fault("weights: nan is no sign in a kernel", f"{KERNELS}/rows.py", "tl.where(weight < 0.0, -1.0, weight)", "tl.where(weight < 0.0, -1.0, 0.0)"),
    Fault("weights: nan is no sign in torch", "fused_dm/_rows.py", "torch.where(weight.isnan(), weight, weight.sign())", "weight.sign()"),
    Fault("EDF: Normal from p alone", "fused_dm/edf/_forms.py", "(2 * psi - 1) + torch.exp(log_q)", "2 * psi - torch.exp(log_p)"),
    Fault("EDF: Normal from p alone in the kernels", f"{KERNELS}/densities.py", "(2.0 * psi - 1.0) + exp(log_q)", "2.0 * psi - exp(log_p)"),
    Fault("value not weighted", f"{KERNELS}/rows.py", "            value *= weight\n", "            value *= 1.0\n"),
    Fault("ignored rows in the sum of weights", f"{KERNELS}/rows.py", "return tl.where(valid, log_weight, -INF), sign,", "return log_weight, tl.where(valid, sign, 1.0),"),
    Fault("eps = 0 as a quotient", f"{KERNELS}/rows.py", "unit = tl.where(eps == 0.0, 0.5 + q * 0.0, q / tl.where(norm == 0.0, 1.0, norm))", "unit = q / tl.where(norm == 0.0, 1.0, norm)"),
    Fault("eps ignored", f"{KERNELS}/rows.py", "norm = 2.0 * q + eps", "norm = 2.0 * q"),
    Fault("gradient not divided by the sum of exponentials", f"{KERNELS}/rows.py", "share = k / tl.where(k == 0.0, 1.0, row_sum)\n    return", "share = k\n    return"),
    Fault("dloss ignored", f"{KERNELS}/rows.py", "k = dloss * unit *", "k = 1.0 * unit *"),
    Fault("dloss ignored where the divisor is known", f"{KERNELS}/rows.py", "k = over_divisor(dloss * unit,", "k = over_divisor(1.0 * unit,"),
    Fault("dloss of row 0 for every row", f"{KERNELS}/gradient.py", "dloss_ptr + row * dloss_stride", "dloss_ptr + row * 0"),
    Fault("divisor ignored", f"{KERNELS}/rows.py", "exp(log_weight - log_scale) / divisor.to(unit.dtype)", "exp(log_weight - log_scale)"),
    Fault("range: of the weight alone", f"{KERNELS}/numerics.py", "whole = tl.minimum(tl.maximum(tl.floor(power + 0.5), -1e4), 1e4)", "whole = power * 0.0"),
    Fault("range: of the divisor alone", f"{KERNELS}/numerics.py", "mantissa, exponent = mantissa_and_exponent(divisor)", "mantissa, exponent = divisor, 0"),
    Fault("range: of the powers of 2 alone", f"{KERNELS}/numerics.py", "half = rest >> 1", "half = rest * 0"),
    Fault("range: a divisor without its exponent", f"{KERNELS}/numerics.py", "rest = whole.to(tl.int32) - exponent", "rest = whole.to(tl.int32)"),
    Fault("range: a divisor without its sign", f"{KERNELS}/numerics.py", "(bits & ~(0x7FF << 52))", "(bits & ((1 << 52) - 1))"),
    Fault("range: no weight is out of it beside a known divisor", f"{KERNELS}/rows.py", "    if log_scale == 0.0:\n", "    if log_scale != log_scale:\n"),
    Fault("all zeros", f"{KERNELS}/rows.py", "gradient = gradient.to(dlogits_ptr.dtype.element_ty)", "gradient = (gradient * 0).to(dlogits_ptr.dtype.element_ty)"),
    Fault("1e-8 missing in the sum of weights", f"{KERNELS}/reduction.py", "relative_sum = weights * scale + tl.exp(floor - joint)", "relative_sum = weights * scale"),
    Fault("last block of partial sums dropped", f"{KERNELS}/reduction.py", "return tl.load(partials_ptr + at, mask=at < P, other=-INF)", "return tl.load(partials_ptr + at, mask=at < P - 1, other=-INF)"),
    Fault("label of a row in blocks not left out", f"{KERNELS}/rows.py", "            logits = tl.where(cols == label, -INF, logits)\n", "            logits = logits\n"),
    Fault("label looked for in the block after it", f"{KERNELS}/rows.py", "return (label >= first) & (label < first + BLOCK_V)", "return (label >= first - BLOCK_V) & (label < first)"),
    Fault("block read ahead is the one before it", f"{KERNELS}/gradient.py", "start, cols + BLOCK_V, later,", "start, cols, later,"),
    Fault("maximum of a lane not carried", f"{KERNELS}/rows.py", "new_maxima = tl.maximum(maxima, tl.max(tl.max(parts, 3), 1))", "new_maxima = tl.max(tl.max(parts, 3), 1)"),
    Fault("sum of a lane not rescaled", f"{KERNELS}/rows.py", "sums * exp(maxima - base) + tl.sum(tl.sum(exps, 3), 1)", "sums + tl.sum(tl.sum(exps, 3), 1)"),
    Fault("arithmetic for the rows of the first tile only", f"{KERNELS}/rows.py", "tile = program * TILES + number // BLOCK_N", "tile = program * TILES + number // BLOCK_N * 0"),
    Fault("rows after the last of a program's tiles", f"{KERNELS}/rows.py", "return row, (position < D) & (row < N)", "return row, position < D"),
    Fault("weights of programs added unscaled", f"{KERNELS}/reduction.py", "scale = exp(tops - base).to(tl.float64)", "scale = exp(tops - tops).to(tl.float64)"),
    Fault("second round of partial sums lost", f"{KERNELS}/reduction.py", "            weights += more\n", "            weights = more\n"),
    Fault("partial sums of a program unscaled", f"{KERNELS}/rows.py", "weight = exp(log_weight - finite_max(top))", "weight = exp(log_weight)"),
    Fault("beta and lambd swapped", f"{KERNELS}/densities.py", "return beta * exp(lambd * log_p + log_q)", "return lambd * exp(beta * log_p + log_q)"),
    Fault("parameters in fp32", "fused_dm/_api.py", "        params = torch.tensor(values, dtype=torch.float64, device=device)", "        params = torch.tensor(values, dtype=torch.float32, device=device).double()"),
    # CPU
    Fault("CPU: label not masked", "fused_dm/_walk.py", "    block.scatter_(1, label, row_sum.fill_(-80.0))\n    torch.sum", "    row_sum.fill_(-80.0)\n    torch.sum"),
    Fault("CPU: label not masked from the maximum", "fused_dm/_walk.py", "    if not has_max:\n        block.scatter_(1, label, row_shift.fill_(-math.inf))\n", "    if not has_max:\n"),
    Fault("CPU: label not masked from the maximum that tells", "fused_dm/_walk.py", "    if has_max:\n        block.scatter_(1, label, row_shift.fill_(-math.inf))\n", "    if has_max:\n"),
    Fault("CPU: the largest label unchecked", "fused_dm/_cpu.py", "if lowest >= 0 and highest < classes:\n        return", "if lowest >= 0:\n        return"),
    Fault("CPU: the smallest label unchecked", "fused_dm/_cpu.py", "if lowest >= 0 and highest < classes:\n        return", "if highest < classes:\n        return"),
    Fault("CPU: last part of the rows dropped", "fused_dm/_cpu.py", "for first in range(0, max(rows, 1), PIECE_ROWS)]", "for first in range(0, max(rows, 1) - PIECE_ROWS + 1, PIECE_ROWS)] or [slice(0, rows)]"),
    Fault("CPU: last rows dropped", "fused_dm/_cpu.py", "return -(-self.planes // self.height) *", "return max(1, self.planes // self.height) *"),
    Fault("CPU: the label's 1 left in the sum", "fused_dm/_walk.py", "out=row_sum).sub_(1)", "out=row_sum)"),
    Fault("linear: row sum inverted", "fused_dm/_walk.py", "total.clamp(min=0.5).reciprocal_()", "total.clamp(min=0.5)"),
    Fault("CPU: label's gradient missing", "fused_dm/_walk.py", "block.scatter_(1, at, -total)", "block"),
    Fault("CPU: label's gradient of fp16 with the wrong sign", "fused_dm/_walk.py", ".scatter_(1, at, factors)", ".scatter_(1, at, -factors)"),
    Fault("CPU: factor rounded to the storage", "fused_dm/_walk.py", "copy_(block).mul_(factors)", "copy_(block).mul_(factors.to(block.dtype))"),
    Fault("CPU: rows with a factor of 0 keep their nan", "fused_dm/_cpu.py", "        matrix.index_fill_(0, zero.nonzero()[:, 0], 0.0)", "        pass"),
    Fault("CPU: positions with a factor of 0 keep their nan", "fused_dm/_cpu.py", "        matrix.masked_fill_(zero.view(matrix.shape[0], 1, matrix.shape[2]), 0.0)", "        pass"),
    Fault("CPU: scaled by the first row's factor", "fused_dm/_walk.py", "            block.mul_(factors)\n", "            block.mul_(factors[:1])\n"),
    Fault("CPU: positions before planes", "fused_dm/_cpu.py", "            values.view(rows) for", "            values.view(rows[2], 1, rows[0]).movedim(0, 2) for"),
    Fault("CPU: planes and positions of a block exchanged", "fused_dm/_walk.py", "    across = (logits.size(2) + width - 1) // width\n", "    across = (logits.size(0) + height - 1) // height\n"),
    Fault("CPU: last positions of a plane dropped", "fused_dm/_cpu.py", "* -(-self.positions // self.width)", "* max(1, self.positions // self.width)"),
    Fault("CPU: last part of the blocks dropped", "fused_dm/_cpu.py", "extra + len(parts), start, inference=True)", "extra + max(1, len(parts) - 1), start, inference=True)"),
    Fault("CPU: a part ends in the next", "fused_dm/_cpu.py", "parts.append((begin, end))", "parts.append((begin, min(blocks, end + 1)))"),
    Fault("CPU: a failure in a thread forgotten", "fused_dm/_cpu.py", "    if failures:\n", "    if False:\n"),
    Fault("CPU: threads in a forked child", "fused_dm/_cpu.py", "    _forked = True\n", "    _forked = False\n"),
    Fault("CPU: one thread of several", "fused_dm/_cpu.py", "runtime.parallel(_Body(take), None, threads, 0)", "runtime.parallel(_Body(take), None, 1, 0)"),
    Fault("CPU: labels unchecked", "fused_dm/_cpu.py", "    if lowest >= 0 and highest < classes:\n        return", "    if True:\n        return"),
    Fault("CPU: gradient not divided by its norm", "fused_dm/_operators.py", "_cpu.scale_rows_(matrix, coefficient / norm,", "_cpu.scale_rows_(matrix, coefficient,"),
    Fault("CPU: rows of nan taken for finite", "fused_dm/_cpu.py", "(norm is not None and math.isfinite(norm.sum()))", "norm is not None"),
    Fault("CPU: norms of transformed logits taken for sums", "fused_dm/_loss.py", "direction, coefficient, norm, transform is None)", "direction, coefficient, norm, True)"),
    Fault("CPU: norm of a row without another class", "fused_dm/_cpu.py", "norms.clamp_(min=0.5).sum()", "norms.sum()"),
    Fault("CPU: norm of a row of nan that does not count", "fused_dm/_cpu.py", "        norms.nan_to_num_(nan=math.inf)\n", "        pass\n"),
    Fault("CPU: norm of a row of nan finite", "fused_dm/_cpu.py", "norms.nan_to_num_(nan=math.inf)", "norms.nan_to_num_(nan=1.0)"),
    Fault("CPU: margins of the first rows alone", "fused_dm/_walk.py", "        margins = margin.narrow(0, first, count)\n", "        margins = margin.narrow(0, 0, count)\n"),
    Fault("CPU: 16 bits scaled by the first factors", "fused_dm/_walk.py", "factor.narrow(0, first, count)\n        mean", "factor.narrow(0, 0, count)\n        mean"),
    Fault("CPU: 16 bits, last rows not scaled", "fused_dm/_walk.py", "count = min(height, rows.size(0) - first)", "count = min(height, rows.size(0) - first - 1)"),
    Fault("CPU: 16 bits and an infinite factor", "fused_dm/_cpu.py", " and math.isfinite(least) and math.isfinite(most):", ":"),
    Fault("CPU: finite rows taken for granted", "fused_dm/_cpu.py", "walk.valid is None and are_moderate(walk.margin):", "walk.valid is None:"),
    Fault("CPU: ignored rows with a margin", "fused_dm/_cpu.py", "transform is None and walk.valid is None and are_moderate", "transform is None and are_moderate"),
    Fault("CPU: planes of 16 bits scaled by the first factors", "fused_dm/_walk.py", "factor.narrow(0, number * positions, positions)", "factor.narrow(0, 0, positions)"),
    Fault("CPU: the first part left out for what is done beside", "fused_dm/_cpu.py", "*parts[number - extra]", "*parts[number]"),
    Fault("CPU: a large sum times a large slope", "fused_dm/_cpu.py", "undivided=transform is None, beside", "undivided=True, beside"),
    Fault("CPU: maxima: small ones not subtracted", "fused_dm/_walk.py", "    return float(least) >= least_sum and float(most) <= largest_sum\n", "    return float(most) <= largest_sum\n"),
    Fault("CPU: maxima: large ones not subtracted", "fused_dm/_walk.py", "    return float(least) >= least_sum and float(most) <= largest_sum\n", "    return float(least) >= least_sum and float(most) < math.inf\n"),
    Fault("CPU: maxima: a block that has failed not read again", "fused_dm/_walk.py", "            trial.fill_(False)\n        read_again_(block, given, overwrites, transform)\n", "            trial.fill_(False)\n"),
    Fault("CPU: maxima: a block that was subtracted for nothing not read again", "fused_dm/_walk.py", "            return\n        read_again_(block, given, overwrites, transform)\n", "            return\n"),
    Fault("CPU: maxima: subtracted for nothing", "fused_dm/_walk.py", "        if float(row_shift.exp().mul_(row_sum).amin()) < 0.99 * least_sum:\n            return\n", "        return\n"),
    Fault("CPU: maxima: a block that has failed without its transform", "fused_dm/_walk.py", "    if transform is not None and not overwrites:\n", "    if False:\n"),
    Fault("CPU: maxima: a block that has failed transformed twice in place", "fused_dm/_walk.py", "    if transform is not None and not overwrites:\n", "    if transform is not None:\n"),
    Fault("CPU: maxima: logits that are overwritten not kept", "fused_dm/_walk.py", "        given.copy_(block)\n", "        pass\n"),
    Fault("CPU: maxima: logits that are overwritten taken for others", "fused_dm/_cpu.py", "overwrites = direct and out is not None and out.data_ptr() == self.logits.data_ptr()", "overwrites = False"),
    Fault("CPU: leads of the wrong rows", "fused_dm/_walk.py", "            leads = block_of(lead, plane, planes, position, positions)\n", "            leads = block_of(lead, 0, planes, 0, positions)\n"),
    Fault("CPU: maxima: not tried where they are known", "fused_dm/_walk.py", "        tries = tries and float(least)", "        tries = False and float(least)"),
    Fault("CPU: maxima: too large ones not subtracted", "fused_dm/_cpu.py", "LARGEST_SUM = 2.0**24", "LARGEST_SUM = 2.0**40"),
    Fault("CPU: maxima: always subtracted", "fused_dm/_cpu.py", "LARGEST_SUM = 2.0**24", "LARGEST_SUM = 1e-30"),
    Fault("CPU: sum_weight near the end of fp64", "fused_dm/_cpu.py", "        return math.exp(number)\n", "        return math.exp(number) if number < 700 else math.inf\n"),
    Fault("CPU: maxima: noted though they were not subtracted", "fused_dm/_walk.py", "            row_shift.zero_()\n            return\n", "            return\n"),
    Fault("CPU: maxima: labels far from the others", "fused_dm/_walk.py", "lead.clamp(-40.0, 40.0)", "lead.clone()"),
    Fault("CPU: maxima: the label left out of the logarithm of the sum", "fused_dm/_walk.py", "by.neg_().exp_().mul_(row_sum.narrow(0, first, count)).log_()", "row_sum.narrow(0, first, count).log()"),
    Fault("CPU: maxima: left out of the margin", "fused_dm/_walk.py", "label_logit.narrow(0, first, count) - row_shift.narrow(0, first, count)", "label_logit.narrow(0, first, count) - 0"),
    Fault("CPU: divided by the norm before a large dloss", "fused_dm/_operators.py", "            coefficient = coefficient * by\n", "            coefficient, norm = coefficient / norm * by, torch.ones_like(norm)\n"),
    Fault("CPU: dloss taken for 1", "fused_dm/_operators.py", "        elif by != 1:", "        elif by != by:"),
    # Order N
    Fault("rows: ignored rows counted by mean", "fused_dm/_rows.py", "return valid.sum().clamp(min=1).double()", "return torch.ones_like(valid).sum().clamp(min=1).double()"),
    Fault("rows: mean divides by the number of weights", "fused_dm/_rows.py", "total.sum(), torch.ones_like", "(total != 0).double().sum(), torch.ones_like"),
    Fault("rows: class weight of the wrong class", "fused_dm/_rows.py", "[torch.where(is_class, target, torch.zeros_like(target))]", "[torch.where(is_class, target - 1, torch.zeros_like(target))]"),
    Fault("rows: sample weight replaces class weight", "fused_dm/_rows.py", "combined * sample_weight.to(dtype)", "sample_weight.to(dtype)"),
    Fault("rows: 1e-8 missing", "fused_dm/_rows.py", "relative = relative + torch.exp(top.new_full((), LOG_FLOOR).double() - top.double())", "relative = relative + 0"),
    Fault("rows: eps ignored", "fused_dm/_rows.py", "torch.add(eps, q, alpha=2)", "(2 * q)"),
    Fault("rows: eps ignored where it is known", "fused_dm/_loss.py", "_cpu.rounded(eps, margin.dtype)", "0.0"),
    Fault("rows: 0 / 0 where eps is 0", "fused_dm/_walk.py", "        if eps == 0.0:\n", "        if eps < 0.0:\n"),
    Fault("rows: eps that fp32 has not where it is known", "fused_dm/_cpu.py", "ctypes.c_float(number).value", "number"),
    Fault("rows: weight in linear scale", "fused_dm/_loss.py", "        if normalizer is not None:\n            relative", "        if True:\n            relative"),
    Fault("rows: a divisor below 1 taken for a plain one", "fused_dm/_loss.py", "(eager and _cpu.is_between(normalizer, *PLAIN_DIVISOR))", "eager"),
    Fault("rows: a large weight beside a plain divisor", "fused_dm/_loss.py", "wide = normalizer is not None and not (plain and _cpu.is_below(top, FINITE_EXP))", "wide = normalizer is not None and not plain"),
    Fault("rows: divided where fp32 has not the range", "fused_dm/_loss.py", "(undivided / rounded_in_range(divisor, dtype)).to(dtype)", "undivided.to(dtype) / divisor.to(dtype)"),
    Fault("rows: example_weight where fp32 has not the range", "fused_dm/_rows.py", "log_scale.to(sign.dtype)).double()) / totals.divisor", "log_scale.to(sign.dtype))) / totals.divisor.to(sign.dtype)"),
    Fault("rows: other digits where nothing is out of range", "fused_dm/_rows.py", "return torch.where(held, rounded.double(), number.double())", "return number.double()"),
    Fault("rows: a nan among the margins overlooked", "fused_dm/_cpu.py", "if all(each(of, parts)) else None", "if each(of, parts) else None"),
    Fault("rows: row weights overlooked", "fused_dm/_loss.py", "            log_weights = log_weights + counted.log_size[rows]\n", "            pass\n"),
    Fault("rows: signs of row weights overlooked", "fused_dm/_walk.py", "out=coefficient.narrow(0, first, count)).exp_()\n        if signs is not None:\n            weight.mul_(signs)\n", "out=coefficient.narrow(0, first, count)).exp_()\n"),
    Fault("rows: the weight of rows that do not count", "fused_dm/_cpu.py", "torch.where(dead_rows, size[some], size[rows], out=sizes[rows])", "torch.where(dead_rows, size[some] * 0 + 1e30, size[rows], out=sizes[rows])"),
    Fault("rows: nan of an infinite value times 0", "fused_dm/_loss.py", "    if not (math.isfinite(total) and ", "    if not ("),
    Fault("rows: a divisor that is next to 0 taken for an ordinary one", "fused_dm/_loss.py", " and ORDINARY[0] <= abs(divisor) <= ORDINARY[1]):\n        return None", "):\n        return None"),
    Fault("rows: the 1e-8 of ordinary rows", "fused_dm/_loss.py", "    weights += math.exp(LOG_FLOOR - top)\n", ""),
    Fault("rows: sum_weight of ordinary rows relative to the largest", "fused_dm/_loss.py", "weights * _cpu.exp(top))", "weights)"),
    Fault("rows: value of a loss of ordinary rows without the scale of its divisor", "fused_dm/_loss.py", "        total *= math.exp(-top)\n", "        pass\n"),
    Fault("rows: log_scale of ordinary rows for a known divisor", "fused_dm/_loss.py", "numbers = (top if relative else 0.0,", "numbers = (top,"),
    Fault("rows: an EDF of the user's taken for one that leaves its arguments alone", "fused_dm/_loss.py", "eager and emphasis.family in CATALOGUE", "eager and emphasis.family"),
    Fault("rows: row weights overlooked beside a known divisor", "fused_dm/_walk.py", "            torch.exp(log_w, out=weight)\n            if signs is not None:\n                weight.mul_(signs)\n", "            torch.exp(log_w, out=weight)\n"),
    Fault("rows: row weights overlooked in the value of a loss", "fused_dm/_walk.py", "            values = row_weight.narrow(0, first, count) * values\n", "            pass\n"),
    Fault("rows: the margin of rows that do not count", "fused_dm/_cpu.py", "torch.where(dead_rows, margin[some], margin[rows], out=found)", "torch.where(dead_rows, margin[some] * 0, margin[rows], out=found)"),
    Fault("rows: the margin of one that does not count", "fused_dm/_cpu.py", "rows.byte().argmin()", "rows.byte().argmax()"),
    Fault("rows: a first step in which no row counts", "fused_dm/_cpu.py", "for rows in (dead[:STEP_ROWS], dead):", "for rows in (dead[:STEP_ROWS],):"),
    Fault("rows: ignored rows among those of weights", "fused_dm/_loss.py", "valid = None if all_valid else _valid(problem)", "valid = None"),
    Fault("rows: weights of the first part alone", "fused_dm/_loss.py", "torch.stack(weights).sum()", "weights[0]"),
    Fault("rows: values of the first part alone", "fused_dm/_loss.py", "total = _folded(values, torch.sum)", "total = values[0]"),
    Fault("rows: the largest weight of the first part", "fused_dm/_loss.py", "torch.stack([part.top for part in parts]).amax()", "parts[0].top"),
    Fault("rows: coefficients relative to the largest weight of their part", "fused_dm/_loss.py", "(share / totals.divisor).to(margin.dtype)", "(1 / totals.divisor).to(margin.dtype)"),
    Fault("rows: values relative to the largest weight of their part", "fused_dm/_loss.py", "rescaled_values(part.values, share)", "part.values"),
    Fault("rows: an infinite value in a part of no weight", "fused_dm/_rows.py", "torch.where(values.isinf(), values, values * share)", "values * share"),
    Fault("rows: parts that depend on the number of threads", "fused_dm/_cpu.py", "for first in range(0, max(rows, 1), PIECE_ROWS)]", "for first in range(0, max(rows, 1), PIECE_ROWS // _threads())]"),
    Fault("rows: eps that fp32 has not", "fused_dm/_loss.py", "    eps = eps.to(margin.dtype)\n", ""),
    Fault("rows: known divisor with relative weights", "fused_dm/_loss.py", "relative = torch.exp(terms.log_weight)", "relative = relative * 1"),
    Fault("rows: known divisor with relative weights in ordinary rows", "fused_dm/_walk.py", "            torch.exp(log_w, out=weight)\n            if signs is not None:\n                weight.mul_(signs)\n", "            pass\n"),
    Fault("rows: an infinite weight taken for an ordinary one", "fused_dm/_loss.py", "(math.inf if relative else FINITE_EXP)", "math.inf"),
    Fault("rows: the last step of ordinary rows dropped", "fused_dm/_cpu.py", "steps = -(-rows // STEP_ROWS)", "steps = max(1, rows // STEP_ROWS)"),
    Fault("rows: value of ordinary rows without their weight", "fused_dm/_walk.py", "            values = weight * values\n", "            values = values * 1\n"),
    Fault("rows: value of a loss without the scale of its divisor", "fused_dm/_loss.py", "total = total * torch.exp(-totals.log_scale.double())", "total = total * 1"),
    Fault("rows: 0 times an infinite weight", "fused_dm/_rows.py", "return torch.where(terms.unit == 0, 0.0, terms.unit * relative)", "return terms.unit * relative"),
    Fault("rows: gradient without another class", "fused_dm/_rows.py", "torch.where(valid & (margin != math.inf), unit, 0.0)", "torch.where(valid, unit, 0.0)"),
    Fault("rows: value of weight 0 at p = 0", "fused_dm/_rows.py", "return torch.where(terms.value == 0, 0.0, terms.sign * relative * terms.value)", "return terms.sign * relative * terms.value"),
    Fault("rows: an infinite value of weight 0", "fused_dm/_rows.py", "torch.where((log_p == -math.inf) & (log_w < LOG_LEAST), 0.0, -log_p)", "-log_p"),
    Fault("rows: an infinite value beside larger weights", "fused_dm/_rows.py", "torch.where(terms.value == math.inf, relative + 1, relative)", "relative"),
    Fault("kernel: an infinite value of weight 0", f"{KERNELS}/rows.py", "tl.where((log_p == -INF) & (log_weight < LOG_LEAST), 0.0, -log_p)", "-log_p"),
    Fault("kernel: an infinite value beside larger weights", f"{KERNELS}/rows.py", "tl.where(value == INF, weight + 1.0, weight)", "weight"),
    Fault("kernel: an infinite value in a tile of no weight", f"{KERNELS}/reduction.py", "tl.where(tl.abs(value) == INF, value, value * scale)", "value * scale"),
    Fault("EDF: an infinite value of weight 0", "fused_dm/edf/_density.py", "torch.where(log_weight < LOG_LEAST, 0.0, -log_p), value)", "-log_p, value)"),
    Fault("EDF: an infinite value of a weight that fp32 has not", "fused_dm/edf/_density.py", "torch.where(log_p == -math.inf, torch.where(log_weight < LOG_LEAST, 0.0, -log_p), value)", "torch.where(torch.exp(log_weight) == 0, 0.0, value)"),
    Fault("rows: example_weight without its sign", "fused_dm/_rows.py", "sign * scaled).to(", "sign.abs() * scaled).to("),
    # Operators and the public functions
    Fault("operators: margin's gradient with the wrong sign", "fused_dm/_loss.py", "attach_to_margin(margin, loss, -coefficient)", "attach_to_margin(margin, loss, coefficient)"),
    Fault("operators: a second derivative is silently 0", "fused_dm/_operators.py", "    if torch.is_grad_enabled():", "    if False:"),
    Fault("module: an assigned EDF shown and not computed", "fused_dm/_api.py", "        self.set_emphasis(emphasis)\n", "        self._emphasis = emphasis\n"),
    Fault("operators: scratch memory on another device", "fused_dm/_cpu.py", "torch.empty(shape, dtype=dtype, device=\"cpu\")", "torch.empty(shape, dtype=dtype)"),
    Fault("settings: freed though a graph reads them", "fused_dm/_api.py", "        _CAPTURED[values, device] = params\n", "        pass\n"),
    Fault("settings: the first ones go, used or not", "fused_dm/_api.py", "params = _PARAMS.pop((values, device), None)", "params = _PARAMS.get((values, device))"),
    Fault("labels compared in their own dtype", "fused_dm/_api.py", "        return target.reshape(-1).long()\n", "        return target.reshape(-1)\n"),
    Fault("operators: a second backward on a used buffer", "fused_dm/_operators.py", "    ctx.consumed = True", "    ctx.consumed = False"),
    Fault("operators: 0 times an infinite dloss", "fused_dm/_operators.py", "        if not math.isfinite(by):\n", "        if math.isnan(by):\n"),
    Fault("operators: dvalue of a custom EDF ignored", "fused_dm/_operators.py", "return _times(coefficient, dvalue), None, None", "return coefficient, None, None"),
    Fault("module: the schedule does not arrive", "fused_dm/_api.py", "            slot.fill_(value)", "            pass"),
    Fault("module: parameters cast with the module", "fused_dm/_api.py", "            self.emphasis_params = torch.tensor((self.eps, *values), dtype=torch.float64, device=device)\n", "            pass\n"),
    Fault("spatial: classes not moved last", "fused_dm/_api.py", "    return rows.reshape(-1, logits.shape[1])", "    return logits.reshape(-1, logits.shape[1])"),
    # The logits overwritten by their gradient
    Fault("in place: gradient written with the logits' row stride", f"{KERNELS}/gradient.py", "out_start = row_starts(image, position, dlogits_strides, UNIT, LAYOUT)", "out_start = row_starts(image, position, logits_strides, UNIT, LAYOUT)"),
    Fault("in place: fused gradient written with the logits' row stride", f"{KERNELS}/fused.py", "out_start = row_starts(image, position, dlogits_strides, UNIT, LAYOUT)", "out_start = row_starts(image, position, logits_strides, UNIT, LAYOUT)"),
    Fault("in place: dloss not multiplied", f"{KERNELS}/gradient.py", "tl.where(gradient == 0.0, 0.0, gradient * dloss)", "tl.where(gradient == 0.0, 0.0, gradient * 1.0)"),
    Fault("in place: the first rows multiplied for all", f"{KERNELS}/gradient.py", "own_positions(tl.program_id(0) // spans, D, BLOCK_N)", "own_positions(tl.program_id(0) * 0, D, BLOCK_N)"),
    Fault("in place: a row of 0 becomes nan for an infinite dloss", f"{KERNELS}/gradient.py", "gradient = tl.where(gradient == 0.0, 0.0, gradient * dloss)", "gradient = gradient * dloss"),
    Fault("in place, CPU: the label read after it was overwritten", "fused_dm/_walk.py", "        if plain_(block, label, row_sum, least_sum, largest_sum):\n", "        if plain_(block, label, row_sum, least_sum, largest_sum):\n            torch.gather(block, 1, label, out=label_logit)\n"),
    Fault("in place: a later use goes unnoticed", "fused_dm/_operators.py", "    _Overwritten.apply(logits)\n", "    pass\n"),
    Fault("in place: leaf tensors accepted", "fused_dm/_validation.py", "    if logits.is_leaf:", "    if False:"),
    Fault("in place: overlapping rows accepted", "fused_dm/_validation.py", "logits.shape[0] > 1 and logits.stride(0) < logits.shape[1]:", "logits.shape[0] > 1 and False:"),
    Fault("in place: without a gradient too", "fused_dm/_api.py", "inplace = inplace and needs_gradient(logits)", "inplace = bool(inplace)"),
    Fault("in place: an operator does not declare what it writes", "fused_dm/_operators.py", "operator(\"fused_dm::triton_multiply_\", mutates_args=[\"dlogits\"])", "operator(\"fused_dm::triton_multiply_\")"),
    # Operators' descriptions, and what autograd may do with them
    Fault("operators: fake statistics of the wrong shape", "fused_dm/_operators.py", "logits.new_empty(rows, dtype=dtype), logits.new_empty((3, rows), dtype=dtype)", "logits.new_empty(rows, dtype=dtype), logits.new_empty((rows, 3), dtype=dtype)"),
    Fault("operators: transforms that lose the gradient accepted", "fused_dm/_validation.py", "    if transformed:", "    if False:"),
    Fault("operators: no gradient wanted, but written", "fused_dm/_loss.py", "return torch.is_grad_enabled() and (logits.requires_grad or", "return torch.is_grad_enabled() and (True or"),
    Fault("operators: fp16 gradients written before their scale is known", "fused_dm/_loss.py", "IN_FORWARD = (torch.float32, torch.bfloat16)", "IN_FORWARD = (torch.float32, torch.bfloat16, torch.float16)"),
    Fault("operators: batches of vmap share a buffer", "fused_dm/_loss.py", "shares = any(tensor is not None and _validation.is_batched(tensor) for tensor in (*given, problem.emphasis.params))", "shares = False"),
    Fault("operators: batches of labels share a buffer", "fused_dm/_loss.py", "for tensor in (*given, problem.emphasis.params))", "for tensor in given[:1])"),
    Fault("operators: a direct call does not tell what it overwrites", "fused_dm/_operator.py", "            increment_version(args[number])\n", "            pass\n"),
    Fault("plans: a family that is registered anew", "fused_dm/_triton.py", "_batch_plan(_of(logits, transform, out), _forms(family), ignore_index)", "_batch_plan(_of(logits, transform, out), globals().setdefault(family, _forms(family)), ignore_index)"),
    Fault("CPU: a forked child waits in the backward pass", "fused_dm/_operators.py", "return _cpu.calm() if tensor.device", "return nullcontext() if tensor.device"),
    Fault("CPU: a forked child waits in the gradient", "fused_dm/_cpu.py", "@calm()\ndef margin_gradient", "def margin_gradient"),
    Fault("CPU: rows that do not count, divided by nan", "fused_dm/_loss.py", "return coefficient if _is_ordinary(divisor) else coefficient.masked_fill_(undivided == 0, 0.0)", "return coefficient"),
    Fault("CPU: rows that do not count in pieces, divided by nan", "fused_dm/_loss.py", "            out.masked_fill_(part == 0, 0.0)\n", "            pass\n"),
    Fault("CPU: a forked child waits for its labels", "fused_dm/_api.py", "    with _calm(impl):\n        return target", "    if True:\n        return target"),
    Fault("CPU: a forked child waits for margins", "fused_dm/_api.py", "    with _calm(impl):\n        if _validation.validates_labels():\n            _validation.check_labels(labels, rows", "    if True:\n        if _validation.validates_labels():\n            _validation.check_labels(labels, rows"),
    Fault("linear: derivatives below the range of fp32 divided by 0", "fused_dm/_linear_operators.py", ".clamp(min=LEAST_UNIT)", ""),
    Fault("linear: transforms of the weight are not seen", "fused_dm/_linear.py", "given = (input, linear_weight, linear_bias, weight,", "given = (input, weight,"),
    Fault("linear: a normalizer of 0 divides gradients of 0", "fused_dm/_linear.py", "        if problem.normalizer is not None:\n", "        if False:\n"),
    Fault("linear: what nobody asked for is computed", "fused_dm/_linear.py", "    if not problem.return_output:\n        return loss, None, skipped\n", ""),
    Fault("linear: a nan without another class has no gradient", "fused_dm/_linear_blocks.py", "((statistics[1, at] != 0) | dmargin[at].isnan())", "(statistics[1, at] != 0)"),
    Fault("CPU: a nan without another class has no gradient", "fused_dm/_cpu.py", "(walk.row_sum == 0) & ~dmargin.isnan()", "(walk.row_sum == 0)"),
    Fault("a nan without another class has no gradient", f"{KERNELS}/rows.py", "(unit == 0.0), unit * 0.0, k)", "(unit == 0.0), 0.0, k)"),
    Fault("a nan at eps = 0 without another class has no gradient", f"{KERNELS}/rows.py", "0.5 + q * 0.0, q /", "0.5, q /"),
    Fault("margin: a nan without another class has no gradient", f"{KERNELS}/gradient.py", "((row_sum != 0.0) | (dloss != dloss))", "(row_sum != 0.0)"),
    Fault("the value of no row divided by 0", f"{KERNELS}/reduction.py", "tl.where((values == 0.0) & (divisor == 0.0), 1.0, divisor)", "divisor"),
    Fault("CPU: the value of no row divided by 0", "fused_dm/_rows.py", "torch.where((total == 0) & (divisor == 0), 1.0, divisor)", "divisor"),
    Fault("EDF: an interval from 0 without 0", "fused_dm/edf/_density.py", "(p >= 0) if self.low == 0 else (p > self.low)", "p > self.low"),
    Fault("EDF: attributes that are no fields", "fused_dm/edf/_density.py", "        if unknown := set(vars(self))", "        if unknown := set()"),
    Fault("check: shares of the largest of three", "fused_dm/edf/_check.py", "top = max(log_weight(*_logs(margin)).max().item(), *logs)", "top = max(logs)"),
    Fault("check: fp32 unseen", "fused_dm/edf/_check.py", "    if not wrong.any():\n        return ()\n    at = int(wrong", "    if True:\n        return ()\n    at = int(wrong"),
    Fault("check: a rising f unseen", "fused_dm/edf/_check.py", "    if rises.any():\n", "    if False:\n"),
    Fault("CPU: a forked child waits for threads", "fused_dm/_operators.py", "    with _cpu.calm():\n        by", "    if True:\n        by"),
    Fault("operators: called directly with a batch of gradients", "fused_dm/_operator.py", "type(tensor) in _PLAIN and not torch._C._functorch.is_legacy_batchedtensor(tensor)", "type(tensor) in _PLAIN"),
    Fault("rows: looked at though they are of a subclass", "fused_dm/_loss.py", "is_eager() and is_plain(margin)", "is_eager()"),
    Fault("operators: called directly although a mode looks", "fused_dm/_operator.py", "if _get_current_dispatch_mode() is not None or ", "if "),
    # Launches that are planned once, and rows that are read while others are written
    Fault("plans: another alignment's compilation", "fused_dm/_triton.py", "t is None or (t.dtype, t.data_ptr() % 16 == 0)", "t is None or (t.dtype, True)"),
    Fault("plans: one for all strides", "fused_dm/_triton.py", "return _Logits(logits.device, logits.dtype, logits.shape, logits.stride(), out_stride, capped, odd)", "return _Logits(logits.device, logits.dtype, logits.shape, torch.empty(logits.shape).stride(), out_stride, capped, odd)"),
    Fault("plans: a tensor in another's place", "fused_dm/_triton.py", "            arguments[self._at[name]] = tensor\n", "            arguments[self._at[name] - 1] = tensor\n"),
    # EDFs
    Fault("EDF: focal weight without its own 1", f"{KERNELS}/densities.py", "return LN2 + (gamma + 1.0) * log_q", "return LN2 + gamma * log_q"),
    Fault("EDF: focal weight of a certain example", f"{KERNELS}/densities.py", "exp(tl.where(certain, 0.0, log_q))\n    share = tl.where(certain, 1.0, share)\n", "exp(log_q)\n"),
    Fault("EDF: Beta's alpha - 1 rounded", f"{KERNELS}/densities.py", "alpha_1 = (tl.load(params_ptr) - 1.0).to(log_p.dtype)", "alpha_1 = (tl.load(params_ptr) - 1.0).to(tl.float16).to(log_p.dtype)"),
    Fault("EDF: AUL with p for q", f"{KERNELS}/densities.py", "param(params_ptr, 1, log_p) * log_sum(log_over, log_q)", "param(params_ptr, 1, log_p) * log_sum(log_over, log_p)"),
    Fault("EDF: AUL divided by p's term", f"{KERNELS}/densities.py", " - softplus(log_over - log_q)", " - softplus(log_over - log_p)"),
    Fault("EDF: AGCE with the divisor upside down", f"{KERNELS}/densities.py", " - softplus(log_a - log_p)", " - softplus(log_p - log_a)"),
    Fault("EDF: truncation the wrong way round", f"{KERNELS}/densities.py", "inside = log_p > log_param(params_ptr, 1, log_p)", "inside = log_p < log_param(params_ptr, 1, log_p)"),
    Fault("EDF: log of a threshold in fp32", f"{KERNELS}/densities.py", "return tl.where(near, tl.where(over < 0.0, -log1p, log1p), tl.log(value))", "return tl.log(value)"),
    Fault("EDF: Taylor sum one term short", f"{KERNELS}/densities.py", "for i in range(2, tl.load(params_ptr).to(tl.int32) + 1):", "for i in range(2, tl.load(params_ptr).to(tl.int32)):"),
    Fault("EDF, torch: the same GCE loss without its division", "fused_dm/edf/_forms.py", "return -torch.expm1(q * log_p) / q", "return -torch.expm1(q * log_p)"),
    Fault("EDF, torch: MSE weight of another loss", "fused_dm/edf/_forms.py", "return 2 * _LN2 + log_p + 2 * log_q", "return 2 * _LN2 + 2 * log_p + log_q"),
    Fault("EDF: a registered name that is not told apart", "fused_dm/edf/_custom.py", "_hash(name.lower(), ", "_hash('', "),
    Fault("EDF: functions of one source not told apart", "fused_dm/edf/_custom.py", "            contents.append(repr(cell.cell_contents))\n", "            pass\n"),
    Fault("EDF: the largest of a sum alone", "fused_dm/edf/_density.py", "return functools.reduce(torch.logaddexp, self._log_weights(log_p, log_q, params))", "return functools.reduce(torch.maximum, self._log_weights(log_p, log_q, params))"),
    Fault("EDF: members of a composition read one another's parameters", "fused_dm/edf/_density.py", "            at += count\n        return values", "            at += 0\n        return values"),
    Fault("EDF: a factor lost", "fused_dm/edf/_density.py", "return log(params[0]) + self.part.forms.log_weight(", "return 0 * log(params[0]) + self.part.forms.log_weight("),
    Fault("in place: overwritten before a function of the user's may raise", "fused_dm/_loss.py", " and not (problem.inplace and problem.emphasis.family is None)", ""),
    Fault("in place: several derivatives in one memory", "fused_dm/_operators.py", "    if is_batch(dvalue):\n        raise RuntimeError(", "    if False:\n        raise RuntimeError("),
    Fault("operators: several derivatives use up the direction", "fused_dm/_operators.py", "        return scaled_rows(*ctx.saved_tensors, dvalue, ctx.shows), None, None, None, None, None\n", "        pass\n"),
    Fault("operators: several derivatives of the gradient for 1", "fused_dm/_operators.py", "        logits, _, target, rows, totals, transform = ctx.saved_tensors\n        dlogits = triton_gradient(", "        logits, dlogits, target, rows, totals, transform = ctx.saved_tensors\n        _ = triton_gradient("),
    Fault("operators: an image's size asked of data", "fused_dm/_validation.py", "    if not torch.compiler.is_compiling():\n        return tensor.is_contiguous()\n", "    if tensor.dim():\n        return tensor.is_contiguous()\n"),
    Fault("operators: the reference has parameters of its own", "fused_dm/_api.py", "            _bound(emphasis, params),\n", "            _bound(emphasis, None),\n"),
    Fault("operators: the reference of a layer has parameters of its own", "fused_dm/_linear.py", "            _bound(emphasis, params),\n", "            _bound(emphasis, None),\n"),
    Fault("operators: vmap of the reference has no backward", "fused_dm/reference.py", "ctx.save_for_forward(logits, gradient)", "ctx.save_for_forward(gradient)"),
    Fault("module: settings assigned later go unchecked", "fused_dm/_api.py", "        self._check(normalizer)\n        return _compute(", "        return _compute("),
    Fault("module: an assigned eps shown and not computed", "fused_dm/_api.py", "        self.emphasis_params[0].fill_(self._eps)\n", "        pass\n"),
    Fault("EDF: jumps not looked for", "fused_dm/edf/_density.py", "return measure(emphasis.log_weight, emphasis._jumps())", "return measure(emphasis.log_weight)"),
    Fault("EDF: jumps of the parts not looked for", "fused_dm/edf/_density.py", "return tuple(jump for member in self.members for jump in member._jumps())", "return ()"),
    Fault("EDF: log(1 - high) of a rounded difference", "fused_dm/edf/_forms.py", "    return math.log1p(-value) if value < 1 else -math.inf", "    return math.log(1 - value) if value < 1 else -math.inf"),
    Fault("linear: several derivatives in one buffer", "fused_dm/_linear_operators.py", "elif buffer.dtype == dtype and not several:", "elif buffer.dtype == dtype:"),
    Fault("schedule: the state of another one's parameters", "fused_dm/schedules.py", "if checksum != self._checksum or len(starts)", "if len(starts)"),
    Fault("schedule: starts in the order of the call", "fused_dm/schedules.py", "starts = [self._values[parameter][0] for parameter in sorted(self._values)]", "starts = [values[0] for values in self._values.values()]"),
    Fault("schedule: one step late", "fused_dm/schedules.py", "self._criterion[0].set_emphasis(self.emphasis_at(self.last_step))", "self._criterion[0].set_emphasis(self.emphasis_at(max(0, self.last_step - 1)))"),
    # Transforms of the logits
    Fault("transform: slope left out of the gradient", f"{KERNELS}/gradient.py", "gradient_block(logits, base, first, cols, label, k, row_sum, LANES) * slope", "gradient_block(logits, base, first, cols, label, k, row_sum, LANES)"),
    Fault("transform: slope left out of the last block", f"{KERNELS}/fused.py", "        gradient *= slope\n", "        gradient *= 1.0\n"),
    Fault("transform: label as it is", f"{KERNELS}/rows.py", "    logit, _ = transformed(logit, transform_ptr, CAPPED)\n", ""),
    Fault("transform: lanes outside finite under a softcap", f"{KERNELS}/rows.py", "        return tl.where(inside, logits, -INF), tl.where(inside, slope, 0.0)", "        return logits, slope"),
    Fault("transform: edges outside finite under a softcap", f"{KERNELS}/rows.py", "transform_ptr, CAPPED)\n    return tl.where(inside, logits, -INF), tl.where(inside, slope, 0.0)", "transform_ptr, CAPPED)\n    return logits, slope"),
    Fault("transform: slope as 1 - tanh^2", f"{KERNELS}/numerics.py", "4.0 * e * share * share", "1.0 - size * size"),
    Fault("transform: tanh cancels near 0", f"{KERNELS}/numerics.py", "size = -expm1_negative(y) * share", "size = (1.0 - e) * share"),
    Fault("CPU: slope without the scale", "fused_dm/_walk.py", ".square_().mul_(transform[0])", ".square_()"),
    # The last layer and the loss together
    Fault("linear: the first block is added to what was there", "fused_dm/_linear_blocks.py", "out, beta = self.weight, 0 if first else 1", "out, beta = self.weight, 1"),
    Fault("linear: every block overwrites the weight's gradient", "fused_dm/_linear_blocks.py", "out, beta = self.weight, 0 if first else 1", "out, beta = self.weight, 0"),
    Fault("linear: what is accumulated does not follow the maximum", "fused_dm/_linear_blocks.py", "            products.shrink(_shrinkage(top, new), impl)\n", "            pass\n"),
    Fault("linear: input's gradient does not follow the maximum", "fused_dm/_linear_blocks.py", "products.input[at] *= _shrinkage(then, top)", "products.input[at] *= 1"),
    Fault("linear: the last rows are dropped", "fused_dm/_linear_blocks.py", "for start in range(0, rows, max(1, height)):", "for start in range(0, rows - height + 1, max(1, height)):"),
    Fault("linear: bias left out", "fused_dm/_linear_blocks.py", "torch.addmm(layer.bias, layer.input[at], layer.weight.t(), out=block)", "torch.mm(layer.input[at], layer.weight.t(), out=block)"),
    Fault("linear: row weights of the first block for all", "fused_dm/_linear_blocks.py", "row_weight = None if weighting.row_weight is None else weighting.row_weight[rows]", "row_weight = None if weighting.row_weight is None else weighting.row_weight[: len(margin)]"),
    Fault("linear: divisor forgotten", "fused_dm/_linear.py", "totals.log_scale).double()) / totals.divisor\n", "totals.log_scale).double())\n"),
    Fault("linear: reference forgotten", "fused_dm/_linear.py", "factor = unit * torch.exp((reference_log - totals.log_scale)", "factor = unit * torch.exp((-totals.log_scale)"),
    Fault("linear: row weights that leave the range", "fused_dm/_linear.py", "if weight is None or not weight.numel():", "if True:"),
    Fault("linear: the unit of the row weights forgotten", "fused_dm/_linear.py", "factor = unit * torch.exp(", "factor = torch.exp("),
    Fault("linear: the bias's gradient rounded by autocast", "fused_dm/_linear_blocks.py", "torch.addmv(self.bias, dlogits.t(), coefficient, beta=0 if first else 1, out=self.bias)", "self.bias.copy_(coefficient @ dlogits + (0 if first else self.bias))"),
    Fault("linear: the first block added to the bias", "fused_dm/_linear_blocks.py", "coefficient, beta=0 if first else 1, out", "coefficient, beta=1, out"),
    Fault("linear: dloss ignored", "fused_dm/_linear_operators.py", "    factor = factor * dvalue\n", ""),
    Fault("linear: a second backward on used buffers", "fused_dm/_linear_operators.py", "    ctx.consumed = True", "    ctx.consumed = False"),
    Fault("linear: skipping more than the tolerance", "fused_dm/_linear.py", "<= int(tolerance * SHARES)", "<= 2 * int(tolerance * SHARES)"),
    Fault("linear: the largest rows are skipped", "fused_dm/_linear.py", "torch.sort(share, stable=True)", "torch.sort(share, stable=True, descending=True)"),
    Fault("linear: input's gradient in the order of the rows kept", "fused_dm/_linear_operators.py", "return dinput if kept is None else _spread_rows(dinput, kept, rows), dweight, dbias", "return dinput if kept is None else torch.cat([dinput, dinput.new_zeros((rows - len(dinput), *dinput.shape[1:]))]), dweight, dbias"),
    Fault("linear: accumulated in 16 bits", "fused_dm/_linear_blocks.py", "        self.dtype = compute_dtype(layer.input.dtype)\n", "        self.dtype = layer.input.dtype\n"),
    Fault("linear: fp16 without its unit", "fused_dm/_linear_operators.py", "        dmargin = dmargin / unit\n", ""),
]  # fmt: skip

# Quickest first; the slow ones about compilers, packaging and training notice nothing here.
TESTS = [
    "test_edges",
    "test_margin",
    "test_traffic",
    "test_layouts",
    "test_shifted",
    "test_launch",
    "test_regressions",
    "test_reference",
    "test_cpu",
    "test_loss",
    "test_arguments",
    "test_inplace",
    "test_edf",
    "test_edf_catalogue",
    "test_schedules",
    "test_operators",
    "test_transforms",
    "test_softcap",
    "test_linear",
    "test_promises",
]
# Where to look first, by the beginning of a fault's name: it saves time and nothing else.
FIRST = {
    "CPU: rows": ["test_loss"],
    "CPU: the value": ["test_edges"],
    "CPU: a nan": ["test_edges"],
    "a nan": ["test_edges"],
    "margin: a nan": ["test_edges"],
    "the value": ["test_edges"],
    "check": ["test_edf"],
    "EDF: an interval": ["test_edf"],
    "EDF: attributes": ["test_edf"],
    "in place: several": ["test_transforms"],
    "in place": ["test_inplace", "test_operators"],
    "plans: a family": ["test_edf"],
    "plans": ["test_launch", "test_layouts"],
    "fused": ["test_launch", "test_traffic", "test_shifted"],
    "operators: several": ["test_transforms"],
    "operators: an image": ["test_transforms"],
    "operators: the reference": ["test_transforms", "test_linear"],
    "operators: vmap": ["test_transforms"],
    "linear: several": ["test_linear"],
    "EDF: jumps": ["test_edf"],
    "weights: nan": ["test_loss"],
    "EDF: log(1": ["test_edf"],
    "EDF: log of a threshold": ["test_regressions"],
    "EDF": ["test_edf_catalogue", "test_edf"],
    "schedule": ["test_schedules"],
    "module": ["test_arguments", "test_schedules", "test_operators"],
    "operators": ["test_operators", "test_transforms"],
    "CPU": ["test_cpu"],
    "mean": ["test_launch"],
    "received": ["test_loss", "test_edges"],
    "weights": ["test_launch", "test_loss"],
    "gradient begins": ["test_shifted"],
    "gradient of positions": ["test_layouts"],
    "rows: looked at": ["test_operators"],
    "range": ["test_loss"],
    "rows": ["test_loss", "test_cpu", "test_edges"],
    "transform": ["test_softcap", "test_shifted"],
    "shifted": ["test_shifted", "test_layouts"],
    "settings": ["test_launch"],
    "linear": ["test_linear"],
}
# Seconds after which a file's tests are taken not to end: ten times what the longest takes.
LONGEST = 3600


def plant(fault: Fault, folder: Path) -> None:
    for part in ("fused_dm", "kernels", "tests", "bench", "pyproject.toml"):
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / part)
    (folder / fault.path).write_text(broken(fault))


def broken(fault: Fault) -> str:
    """The text of the file with the fault."""
    text = (ROOT / fault.path).read_text()
    if text.count(fault.right) != 1:
        raise ValueError(f"{fault.name}: expected one occurrence in {fault.path}, got {text.count(fault.right)}")
    return text.replace(fault.right, fault.wrong)


def noticed() -> dict[str, str]:
    """By the names of the faults the tests that noticed them last."""
    return dict(re.findall(r"^\| (.+?) \| `(.+)` \|$", (ROOT / RESULTS).read_text(), re.MULTILINE))


def catcher(fault: Fault, last: str | None = None) -> str | None:
    """The first test that fails with the fault in place, of which `last` is tried first."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plant(fault, folder)
        environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider"]
        first = [test for start, tests in FIRST.items() if fault.name.startswith(start) for test in tests]
        # File by file, as collecting them all takes longer than most faults survive.
        files = [f"{test}.py" for test in dict.fromkeys(first + TESTS)]
        for test in [last, *files] if last else files:
            try:
                done = subprocess.run(
                    [*command, f"tests/{test}"],
                    cwd=folder,
                    env=environment,
                    capture_output=True,
                    text=True,
                    check=False,
                    timeout=LONGEST,
                )
            except subprocess.TimeoutExpired:
                return f"{test}, which had not ended after {LONGEST // 60} minutes"
            if test == last and done.returncode != pytest.ExitCode.TESTS_FAILED:
                continue  # It may have another name now.
            if done.returncode != 0:
                failed = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(.+?)(?: - |$)", done.stdout, re.MULTILINE)
                return failed[1] if failed else done.stdout[-300:] + done.stderr[-300:]
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="faults whose name contains this")
    parser.add_argument("--skip", type=int, default=0, help="leave out so many at the beginning, which an earlier run had")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, help="write the table to this file")
    arguments = parser.parse_args()
    faults = [fault for fault in FAULTS if arguments.only in fault.name][arguments.skip :]
    lines = ["| fault | noticed by |", "|---|---|"]
    missed, last = 0, noticed()
    with ThreadPoolExecutor(arguments.processes) as pool:
        tests = pool.map(catcher, faults, [last.get(fault.name) for fault in faults])
        for fault, test in zip(faults, tests, strict=True):
            missed += test is None
            lines.append(f"| {fault.name} | {f'`{test}`' if test else 'NOT NOTICED'} |")
            print(lines[-1], flush=True)
    summary = f"{len(faults)} faults, {len(faults) - missed} noticed, {missed} not noticed"
    print(summary)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text("\n".join(["# Planted faults", "", f"`make faults`: {summary}.", "", *lines]) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
