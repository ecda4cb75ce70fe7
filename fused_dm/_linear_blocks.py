"""The last layer and the loss over blocks of rows: one buffer of logits, the loss's pass over it in place, and the products.

A block is computed as the unfused layer would compute its rows, is overwritten by its gradient, and is multiplied with the
layer's weight and input before the next one takes its place. Products of 16-bit matrices are accumulated and kept in fp32.
"""

import math
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import _cpu
from ._rows import RowTerms, compute_dtype, row_terms
from .edf._forms import FAMILIES

GPU_BYTES = 512 << 20
# A matrix product of fewer rows reads the layer's weight for too little work.
CPU_ROWS = 96
# Rows of a block on a GPU are a multiple of this where they are more: the tile of a matrix product.
GPU_TILE = 128
# In fp16 the largest coefficient is about half of this, so that the numbers above 4e-9 of it keep all their digits.
HEADROOM = 1 << 14
# Classes whose weights are converted to fp32 at a time, on a CPU.
CONVERTED = 8192


class Layer(NamedTuple):
    """The last layer, in the dtype of its logits."""

    input: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)


class How(NamedTuple):
    """How blocks of logits are made and read."""

    ignore_index: int
    transform: Tensor | None  # of the logits, see _operators.py
    max_bytes: int | None  # of a block
    impl: str


class Weighting(NamedTuple):
    """What turns margins into the gradient's coefficients, before they are divided."""

    row_weight: Tensor | None  # (N,)
    params: Tensor  # (1 + parameters,) fp64
    family: str
    relative: bool  # to the largest weight so far, for weights that may overflow


class Wanted(NamedTuple):
    """Whose gradient is computed."""

    input: bool
    weight: bool
    bias: bool


def _triton():
    from . import _triton

    return _triton


def layer_of(input: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Layer:
    return Layer(input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def _cache_bytes() -> int:
    """Four times the second-level caches of the threads, or of 1 MiB each where their size is unknown."""
    name = "SC_LEVEL2_CACHE_SIZE"
    size = os.sysconf(name) if name in getattr(os, "sysconf_names", ()) else 0
    return 4 * torch.get_num_threads() * (size if size > 0 else 1 << 20)


def block_rows(rows: int, classes: int, itemsize: int, max_bytes: int | None, on_cpu: bool) -> int:
    """Rows of a block: as many as `max_bytes` hold, at least one, and about as many in each block.

    On a CPU `max_bytes` holds the direction in fp32 of a block of 16-bit logits as well as the block.
    """
    row_bytes = max(1, classes * itemsize)
    if max_bytes is not None:
        own_direction = classes * 4 if on_cpu and itemsize < 4 else 0
        most = max(1, max_bytes // (row_bytes + own_direction))
    elif on_cpu:
        most = max(CPU_ROWS, _cache_bytes() // row_bytes)
    else:
        most = max(1, GPU_BYTES // row_bytes)
    if not on_cpu and most >= GPU_TILE:
        most -= most % GPU_TILE
    blocks = max(1, -(-rows // most))
    even = -(-rows // blocks)
    if not on_cpu and even > GPU_TILE:
        even = min(most, -(-even // GPU_TILE) * GPU_TILE)
    return max(1, even)


def _blocks(layer: Layer, max_bytes: int | None, gradient: bool) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Slices of the rows with their logits and a place for the gradient of them, each in the place of the last.

    That place is the logits', but for a `gradient` in another dtype: the CPU implementation keeps it in fp32 for the products.
    """
    rows, classes = layer.input.shape[0], layer.weight.shape[0]
    on_cpu = layer.input.device.type == "cpu"
    height = min(rows, block_rows(rows, classes, layer.input.element_size(), max_bytes, on_cpu))
    buffer = layer.input.new_empty((height, classes))
    own = gradient and buffer.dtype != compute_dtype(buffer.dtype)
    place = torch.empty_like(buffer, dtype=compute_dtype(buffer.dtype)) if own else buffer
    for start in range(0, rows, max(1, height)):
        at = slice(start, min(start + height, rows))
        block = buffer[: at.stop - start]
        if layer.bias is None:
            torch.mm(layer.input[at], layer.weight.t(), out=block)
        else:
            torch.addmm(layer.bias, layer.input[at], layer.weight.t(), out=block)
        yield at, block, place[: at.stop - start]


class _Products:
    """The gradients of input, weight and bias, in the compute dtype, from the gradients of blocks of logits."""

    def __init__(self, layer: Layer, wanted: Wanted) -> None:
        self.layer, self.wanted = layer, wanted
        self.dtype = compute_dtype(layer.input.dtype)
        classes = layer.weight.shape[0]

        def buffer(shape: tuple[int, ...], needed: bool) -> Tensor:
            # The first block overwrites what is there. Without a block there is nothing but zeros.
            new = layer.input.new_empty if layer.input.shape[0] else layer.input.new_zeros
            return new(shape if needed else (0,), dtype=self.dtype)

        self.input = buffer(tuple(layer.input.shape), wanted.input)
        self.weight = buffer(tuple(layer.weight.shape), wanted.weight)
        self.bias = buffer((classes,), wanted.bias)

    def add(self, rows: slice, dlogits: Tensor, coefficient: Tensor | None = None) -> None:
        """Take a block's gradient, whose rows are still to be multiplied by `coefficient` if that is given.

        It meets the input, which is smaller. A row of 0 counts for nothing, whatever its input is.
        """
        first = rows.start == 0
        if self.wanted.input:
            self._times_weight(dlogits, self.input[rows])
            if coefficient is not None:
                self.input[rows] *= coefficient[:, None]
        if self.wanted.weight:
            given = self.layer.input[rows]
            if coefficient is not None:
                given = torch.where((coefficient == 0)[:, None], 0, given.to(self.dtype) * coefficient[:, None])
            self._add_to_weight(dlogits, given, first)
        if self.wanted.bias:
            if coefficient is not None:
                # With `out`, which autocast leaves alone.
                torch.addmv(self.bias, dlogits.t(), coefficient, beta=0 if first else 1, out=self.bias)
            elif first:
                torch.sum(dlogits, 0, dtype=self.dtype, out=self.bias)
            else:
                self.bias += dlogits.sum(0, dtype=self.dtype)

    def _times_weight(self, dlogits: Tensor, out: Tensor) -> None:
        weight = self.layer.weight
        if dlogits.dtype == weight.dtype == out.dtype:
            torch.mm(dlogits, weight, out=out)
        elif dlogits.device.type == "cuda":
            torch.mm(dlogits, weight, out_dtype=out.dtype, out=out)
        else:
            for start in range(0, weight.shape[0], CONVERTED):
                classes = slice(start, start + CONVERTED)
                given, factor = dlogits[:, classes].to(out.dtype), weight[classes].to(out.dtype)
                torch.addmm(out, given, factor, beta=0 if start == 0 else 1, out=out)

    def _add_to_weight(self, dlogits: Tensor, given: Tensor, first: bool) -> None:
        out, beta = self.weight, 0 if first else 1
        if dlogits.dtype == given.dtype == out.dtype:
            torch.addmm(out, dlogits.t(), given, beta=beta, out=out)
        elif dlogits.device.type == "cuda":
            torch.addmm(out, dlogits.t(), given, out_dtype=out.dtype, beta=beta, out=out)
        else:
            given = given.to(out.dtype)
            for start in range(0, out.shape[0], CONVERTED):
                classes = slice(start, start + CONVERTED)
                part = out[classes]
                torch.addmm(part, dlogits[:, classes].t().to(out.dtype), given, beta=beta, out=part)

    def shrink(self, factor: Tensor, impl: str) -> None:
        """Multiply what weight and bias have so far by `factor`, 0-d; nothing is done where that is 1."""
        if impl == "triton":
            if self.wanted.weight:
                _triton().multiply_(self.weight, factor)
            if self.wanted.bias:
                _triton().multiply_(self.bias[None], factor)
        elif factor != 1:
            if self.wanted.weight:
                self.weight *= factor
            if self.wanted.bias:
                self.bias *= factor


def _new_top(top: Tensor, log_weight: Tensor) -> Tensor:
    largest = torch.finfo(log_weight.dtype).max
    return torch.maximum(top, log_weight.nan_to_num(nan=-torch.inf, posinf=largest, neginf=-torch.inf).amax())


def _shrinkage(old: Tensor, new: Tensor) -> Tensor:
    """What weights relative to exp(old) are to be multiplied by to be relative to exp(new)."""
    return torch.where(new == -torch.inf, torch.ones_like(new), torch.exp(old - new))


def _finite(top: Tensor) -> Tensor:
    return torch.where(top == -torch.inf, torch.zeros_like(top), top)


def _cpu_terms(margin: Tensor, valid: Tensor, weighting: Weighting, rows: slice) -> RowTerms:
    eps, *params = weighting.params.unbind()
    family = FAMILIES[weighting.family]

    def log_weight(log_p: Tensor, log_q: Tensor) -> Tensor:
        return family.log_weight(log_p, log_q, *params)

    row_weight = None if weighting.row_weight is None else weighting.row_weight[rows]
    return row_terms(margin, valid, row_weight, eps, log_weight, None)


class Gradients(NamedTuple):
    """Margins and leads (N,), and gradients that are still to be multiplied by dloss exp(reference) / D."""

    margin: Tensor
    lead: Tensor
    reference: Tensor
    input: Tensor
    weight: Tensor
    bias: Tensor


def gradients(
    layer: Layer,
    target: Tensor,
    weighting: Weighting,
    wanted: Wanted,
    how: How,
) -> Gradients:
    """One walk over the rows: statistics and unnormalised gradients, three products a block."""
    ignore_index, transform, impl = how.ignore_index, how.transform, how.impl
    products = _Products(layer, wanted)
    rows = layer.input.shape[0]
    margin = layer.input.new_empty(rows, dtype=products.dtype)
    lead = torch.empty_like(margin)
    top = margin.new_full((), -torch.inf)
    tops: list[tuple[slice, Tensor]] = []
    one = torch.ones((), dtype=torch.float64, device=margin.device)

    def raise_top(log_weight: Tensor, first: bool) -> Tensor:
        new = _new_top(top, log_weight)
        if not first:
            products.shrink(_shrinkage(top, new), impl)
        return new

    headroom = math.log(HEADROOM) if layer.input.dtype == torch.float16 else 0.0
    for at, block, direct in _blocks(layer, how.max_bytes, gradient=impl == "cpu"):
        labels = target[at]
        if impl == "triton":
            out = None if weighting.relative else block
            row_weight = None if weighting.row_weight is None else weighting.row_weight[at]
            launch = _triton()
            # The loss of the block alone, which is not used, is inf if weights overflow that nothing divides.
            divisor = None if weighting.relative else one
            _, numbers, _ = launch.loss_and_rows(
                block, labels, None, row_weight, weighting.params, divisor, weighting.family, ignore_index, out, transform
            )
            _, row_sum, lead[at], log_weight, *_ = numbers.unbind()
            margin[at] = lead[at] - row_sum.log()
            if weighting.relative:
                top = raise_top(log_weight, at.start == 0)
                totals = torch.stack([_finite(top).double() - headroom, one, one])
                given = one.to(margin.dtype)
                launch.gradient(block, labels, numbers, totals, given, ignore_index, out=block, transform=transform)
            products.add(at, block)
        else:
            margin[at], lead[at] = _cpu.direction(block, labels, ignore_index, out=direct, transform=transform)
            terms = _cpu_terms(margin[at], labels != ignore_index, weighting, at)
            if weighting.relative:
                top = raise_top(terms.log_weight, at.start == 0)
            k = terms.unit * torch.exp(terms.log_weight - (_finite(top) - headroom))
            k = torch.where(terms.unit == 0, torch.zeros_like(k), k)
            _clear(direct, k)
            products.add(at, direct, k)
        tops.append((at, top))
    if wanted.input and weighting.relative:
        for at, then in tops:
            products.input[at] *= _shrinkage(then, top)
    return Gradients(margin, lead, _finite(top) - headroom, products.input, products.weight, products.bias)


def _clear(direction: Tensor, coefficient: Tensor) -> None:
    """Zero the rows that count for nothing, which may hold nan."""
    nothing = (coefficient == 0).nonzero()[:, 0]
    if nothing.numel():
        direction.index_fill_(0, nothing, 0.0)


def margins(layer: Layer, target: Tensor, how: How) -> tuple[Tensor, Tensor]:
    """Margins (N,) and row statistics (3, N): max or 0, a sum that is 0 where no other class has any probability, lead."""
    implementation = _triton() if how.impl == "triton" else _cpu
    rows = layer.input.shape[0]
    margin = layer.input.new_empty(rows, dtype=compute_dtype(layer.input.dtype))
    statistics = margin.new_empty((3, rows))
    for at, block, _ in _blocks(layer, how.max_bytes, gradient=False):
        margin[at], statistics[:, at] = implementation.margin(block, target[at], how.ignore_index, how.transform)
    return margin, statistics


def margin_gradients(
    layer: Layer,
    target: Tensor,
    statistics: Tensor,
    dmargin: Tensor,
    wanted: Wanted,
    how: How,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients for a derivative by the margins, from logits that are computed again."""
    ignore_index, transform, impl = how.ignore_index, how.transform, how.impl
    products = _Products(layer, wanted)
    for at, block, direct in _blocks(layer, how.max_bytes, gradient=impl == "cpu"):
        labels = target[at]
        if impl == "triton":
            numbers = statistics[:, at].contiguous()
            _triton().gradient(block, labels, numbers, None, dmargin[at], ignore_index, out=block, transform=transform)
            products.add(at, block)
        else:
            _cpu.direction(block, labels, ignore_index, out=direct, transform=transform)
            # Where no other class has any probability there is no gradient, unless the derivative is nan.
            counts = (labels != ignore_index) & ((statistics[1, at] != 0) | dmargin[at].isnan())
            k = torch.where(counts, -dmargin[at], torch.zeros_like(dmargin[at]))
            _clear(direct, k)
            products.add(at, direct, k)
    return products.input, products.weight, products.bias


def scaled(buffer: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """buffer times factor, 0-d or None for 1, rounded once to `dtype`; in place where that is the buffer's."""
    if buffer.dtype == dtype:
        return buffer if factor is None else buffer.mul_(factor)
    if factor is None:
        return buffer.to(dtype)
    out = torch.empty_like(buffer, dtype=dtype)
    # On a CPU torch would convert by way of a second buffer of the whole size.
    height = buffer.shape[0] if buffer.device.type != "cpu" else 4096
    for part, rounded in zip(buffer.split(max(1, height)), out.split(max(1, height)), strict=True):
        torch.mul(part, factor, out=rounded)
    return out
