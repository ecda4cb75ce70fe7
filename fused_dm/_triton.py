"""Launching the Triton kernels: buffers, strides and arguments. Grids and block sizes are chosen in `_launch`.

What a call launches follows from the sizes, strides and dtypes of its tensors. It is planned once for each of those, and the
plan kept: the choice, and Triton's look at every argument of a kernel, take the host longer than the launch.
"""

import contextlib
import functools
from typing import Any, NamedTuple

import fused_dm_kernels as kernels
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel

from . import _launch
from ._launch import Device, Launch, Sizes
from ._rows import compute_dtype, mean_divisor, row_weight
from .edf._custom import DEVICE_FORMS

# Plans of each kind that are kept.
PLANS = 1024


def _device(tensor: Tensor) -> contextlib.AbstractContextManager:
    if tensor.device.type == "cpu":
        return contextlib.nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)


@functools.cache
def _properties(device: torch.device) -> Device:
    if device.type == "cpu":
        return _launch.INTERPRETER
    found = torch.get_device_module(device).get_device_properties(device)
    # XPU has neither name.
    multiprocessors = found.multi_processor_count if hasattr(found, "multi_processor_count") else found.max_compute_units
    arch = 10 * found.major + found.minor if device.type == "cuda" and torch.version.hip is None else None
    return Device(
        multiprocessors,
        getattr(found, "L2_cache_size", 0),
        getattr(found, "warp_size", 32),
        limits=arch is not None and arch < _launch.ARCH_UNLIMITED,
        fewer=0 if arch == 90 else 1,
    )


class _Kernel:
    """A kernel with its grid and all arguments but the tensors.

    Triton's own launch finds out each time which compilation the arguments ask for. Of what that depends on only the tensors'
    dtypes and whether they begin at a multiple of 16 bytes can change here, so each compilation is looked up by those.
    """

    def __init__(self, kernel: Any, programs: int, **fixed: Any) -> None:
        self._kernel, self._grid, self._fixed = kernel, (programs, 1, 1), fixed
        self._arguments = [fixed.get(name) for name in kernel.arg_names]
        self._at = {name: number for number, name in enumerate(kernel.arg_names)}
        self._compiled: dict[tuple, CompiledKernel] = {}

    def __call__(self, **tensors: Tensor | None) -> None:
        key = tuple(t is None or (t.dtype, t.data_ptr() % 16 == 0) for t in tensors.values())
        compiled = self._compiled.get(key)
        if compiled is None:
            launched = self._kernel[self._grid](**tensors, **self._fixed)
            # Other backends look at more of a tensor, and the interpreter compiles nothing.
            if isinstance(launched, CompiledKernel) and launched.metadata.target.backend == "cuda":
                self._compiled[key] = launched
            return
        arguments = self._arguments.copy()
        for name, tensor in tensors.items():
            arguments[self._at[name]] = tensor
        compiled[self._grid](*arguments)


def _strides(stride: tuple[int, ...]) -> tuple[int, int, int]:
    """Of image, position and class, from those of (N, V) or (images, V, D)."""
    if len(stride) == 2:
        return 0, stride[0], stride[1]
    return stride[0], stride[2], stride[1]


class _Layout:
    """Where the elements of the logits, and of other tensors of their shape, lie: sizes, strides and units for a launch.

    `odd` logits are of 16 bits and begin at an odd one, so that no two of them are 32 bits of memory.
    """

    def __init__(self, shape: tuple[int, ...], itemsize: int, odd: bool = False, **tensors: tuple[int, ...]) -> None:
        images, classes, positions = shape if len(shape) == 3 else (1, shape[1], shape[0])
        strides = {name: _strides(stride) for name, stride in tensors.items()}
        if positions == 1 or all(image == positions * position for image, position, _ in strides.values()):
            # The rows of all images are equally far apart: one image.
            if positions == 1:
                strides = {name: (0, image, of_class) for name, (image, _, of_class) in strides.items()}
            images, positions = 1, images * positions
        spatial = classes > 1 and any(of_class != 1 for _, _, of_class in strides.values())
        unit = 16 // itemsize
        if spatial:
            far = [stride for image, _, of_class in strides.values() for stride in (image, of_class)]
            aligned = positions % unit == 0 and all(position == 1 for _, position, _ in strides.values())
        else:
            far = [stride for image, position, _ in strides.values() for stride in (image, position)]
            aligned = classes % unit == 0
        # Elements in 16 bytes if every row, or every class of an image, starts at a multiple of them, so that the compiler may
        # load 128 bits, or if rows start anywhere but equally in all tensors; else 1.
        aligned = aligned and all(stride % unit == 0 for stride in far) and not (odd and not spatial)
        alike = len({(image % unit, position % unit) for image, position, _ in strides.values()}) == 1
        shifted = not spatial and not aligned and alike and not odd and _launch.shifted(classes)
        self.unit = unit if aligned or shifted else 1
        self.layout = "positions" if spatial else "shifted" if shifted else "rows"
        self.sizes = Sizes(images, positions, classes, itemsize, spatial, self.unit > 1, unit - 1 if shifted else 0)
        self.strides = {f"{name}_strides": self._in_units(of) for name, of in strides.items()}

    def _in_units(self, strides: tuple[int, int, int]) -> tuple[int, int, int]:
        image, position, of_class = strides
        if self.layout == "shifted":
            return image, position, 1
        if self.layout == "positions":
            return image // self.unit, position, of_class // self.unit
        return image // self.unit, position // self.unit, 1

    def arguments(self, launch: Launch) -> dict[str, Any]:
        """Of every kernel over the logits; the strides apart."""
        return {
            "V": self.sizes.classes // self.unit if self.layout == "rows" else self.sizes.classes,
            "D": self.sizes.positions // self.unit if self.layout == "positions" else self.sizes.positions,
            **self.strides,
            "UNIT": self.unit,
            "LAYOUT": self.layout,
            "BLOCK_N": launch.block_n,
            "BLOCK_V": launch.block_v,
            "num_warps": launch.num_warps,
            **({"maxnreg": launch.registers} if launch.registers else {}),
            "enable_fp_fusion": True,
        }


# ---- Plans


class _Logits(NamedTuple):
    """What a plan depends on of the logits, of a tensor of their shape if it has other strides, and of how they are taken."""

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    out_stride: tuple[int, ...] | None
    capped: bool
    odd: bool

    def layout(self) -> _Layout:
        strides = {} if self.out_stride is None else {"dlogits": self.out_stride}
        return _Layout(self.shape, self.dtype.itemsize, self.odd, logits=self.stride, **strides)


def _of(logits: Tensor, transform: Tensor | None, out: Tensor | None = None) -> _Logits:
    capped = transform is not None and transform.shape[0] == 2
    out_stride = None if out is None else out.stride()
    odd = logits.dtype.itemsize == 2 and logits.data_ptr() % 4 != 0
    return _Logits(logits.device, logits.dtype, logits.shape, logits.stride(), out_stride, capped, odd)


class _Split(NamedTuple):
    """A launch that finds the rows' statistics in parts, and what the next one combines them by."""

    kernel: _Kernel
    shape: tuple[int, int, int]  # of the parts' buffer
    combining: Launch
    parts: dict[str, int]


class _Margin(NamedTuple):
    split: _Split | None
    kernel: _Kernel


class _Batch(NamedTuple):
    """One launch for the whole batch, after a split one or not, or one of several programs and then their totals."""

    split: _Split | None
    kernel: _Kernel
    partials: int  # sums that the totals are made of
    totals: _Kernel | None


NO_PARTS = {"parts": 1, "PARTS": 1}


def _split(layout: _Layout, launch: Launch, ignore_index: int, capped: bool) -> _Split:
    sizes, spans = layout.sizes, launch.spans(layout.sizes)
    kernel = _Kernel(
        kernels.split_kernel,
        launch.tiles(sizes) * spans,
        N=sizes.rows,
        SPAN=launch.span,
        ignore_index=ignore_index,
        CAPPED=capped,
        **layout.arguments(launch),
        LANES=launch.lanes,
    )
    parts = {"parts": spans, "PARTS": triton.next_power_of_2(spans)}
    return _Split(kernel, (2, spans, sizes.rows), _launch.combining(sizes, spans), parts)


@functools.lru_cache(PLANS)
def _margin_plan(logits: _Logits, ignore_index: int) -> _Margin:
    layout, split = logits.layout(), None
    launch = _launch.margin(layout.sizes, _properties(logits.device), logits.capped)
    if launch.way == "split":
        split = _split(layout, launch, ignore_index, logits.capped)
        launch = split.combining
    kernel = _Kernel(
        kernels.margin_kernel,
        launch.tiles(layout.sizes),
        N=layout.sizes.rows,
        ignore_index=ignore_index,
        LANES=launch.lanes,
        CAPPED=logits.capped,
        **(split.parts if split else NO_PARTS),
        **layout.arguments(launch),
    )
    return _Margin(split, kernel)


def _forms(family: str) -> tuple[Any, Any]:
    """The functions on the device of log w and, or None, of f. A plan depends on them: they may be registered anew."""
    log_weight, loss = kernels.FAMILIES.get(family) or DEVICE_FORMS.get(family, (None, None))
    if log_weight is None:
        raise ValueError(f"emphasis: expected a family that is registered in this process, got {family!r}")
    return log_weight, loss


@functools.lru_cache(PLANS)
def _batch_plan(logits: _Logits, forms: tuple[Any, Any], ignore_index: int) -> _Batch:
    """Of the loss; with the gradient written too where there is a tensor for it, and the launch is not split."""
    log_weight, loss = forms
    fused, device = logits.out_stride is not None, _properties(logits.device)
    layout = logits.layout()
    sizes = layout.sizes
    launch = (_launch.fused if fused else _launch.forward)(sizes, device, logits.capped)
    family_forms = {"LOG_WEIGHT": log_weight, "LOSS": loss}
    fixed = {"N": sizes.rows, "ignore_index": ignore_index, "CAPPED": logits.capped, **family_forms}
    if launch.way in ("alone", "split"):
        layout, split = logits._replace(out_stride=None).layout(), None
        if launch.way == "split":
            split = _split(layout, launch, ignore_index, logits.capped)
            launch = split.combining
        parts = split.parts if split else NO_PARTS
        fixed |= {"tiles": launch.tiles(layout.sizes), "LANES": launch.lanes, **parts, **layout.arguments(launch)}
        return _Batch(split, _Kernel(kernels.batch_kernel, 1, **fixed), 0, None)
    programs = partials = launch.programs(sizes)
    fixed |= layout.arguments(launch)
    if not fused:
        kernel = _Kernel(kernels.forward_kernel, programs, **fixed, LANES=launch.lanes, TILES=launch.repeat)
    elif launch.span == launch.block_v:
        kernel = _Kernel(kernels.fused_kernel, programs, **fixed)
    else:
        kernel = _Kernel(kernels.fused_blocks_kernel, programs, **fixed, LANES=launch.lanes, KEPT=launch.kept)
    adding = _launch.totals(partials)
    totals = _Kernel(kernels.totals_kernel, 1, P=partials, LOSS=loss, **adding, enable_fp_fusion=True)
    return _Batch(None, kernel, partials, totals)


@functools.lru_cache(PLANS)
def _gradient_plan(logits: _Logits, dloss_stride: int, ignore_index: int, skip_one: bool) -> _Kernel:
    layout = logits.layout()
    launch = _launch.gradient(layout.sizes, _properties(logits.device), whole_rows=skip_one)
    return _Kernel(
        kernels.gradient_kernel,
        launch.tiles(layout.sizes) * launch.spans(layout.sizes),
        N=layout.sizes.rows,
        SPAN=launch.span,
        dloss_stride=dloss_stride,
        ignore_index=ignore_index,
        SKIP_ONE=skip_one,
        STREAM=launch.stream,
        LANES=launch.lanes,
        STAGES=launch.stages,
        CAPPED=logits.capped,
        **layout.arguments(launch),
    )


@functools.lru_cache(PLANS)
def _multiply_plan(dlogits: _Logits) -> _Kernel:
    layout = _Layout(dlogits.shape, dlogits.dtype.itemsize, dlogits=dlogits.stride)
    launch = _launch.gradient(layout.sizes, _properties(dlogits.device), whole_rows=True)
    programs = launch.tiles(layout.sizes) * launch.spans(layout.sizes)
    return _Kernel(kernels.multiply_kernel, programs, SPAN=launch.span, **layout.arguments(launch))


@functools.lru_cache(PLANS)
def _divisor_plan(device: torch.device, rows: int, classes: int, ignore_index: int, dtype: torch.dtype) -> _Kernel:
    fixed = {"N": rows, "V": classes, "ignore_index": ignore_index, "DTYPE": getattr(tl, str(dtype).removeprefix("torch."))}
    return _Kernel(kernels.divisor_kernel, 1, **fixed, **_launch.divisor(rows))


@functools.lru_cache(PLANS)
def _received_plan(device: torch.device, rows: int, ignore_index: int) -> _Kernel:
    programs = triton.cdiv(rows, _launch.RECEIVED)
    fixed = {"N": rows, "ignore_index": ignore_index, "BLOCK": _launch.RECEIVED}
    return _Kernel(kernels.received_kernel, programs, **fixed, num_warps=8, enable_fp_fusion=True)


def forget_plans() -> None:
    """Plan anew, for those who change what `_launch` answers."""
    for plan in (_margin_plan, _batch_plan, _gradient_plan, _multiply_plan, _divisor_plan, _received_plan):
        plan.cache_clear()


# ---- Launches


def _read(tensor: Tensor) -> Tensor:
    """What its memory holds is what it is: it is no view that torch negates when it reads."""
    return tensor.resolve_neg() if tensor.is_neg() else tensor


def _weights(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Weights as the kernels load them: of 8 bits not every GPU can."""
    if tensor is None:
        return None
    return _read(tensor.to(dtype) if tensor.dtype.itemsize == 1 else tensor).contiguous()


def _parts(split: _Split | None, logits: Tensor, target: Tensor, transform: Tensor | None) -> Tensor | None:
    """The rows' statistics in parts, by one launch; None where they are not found so."""
    if split is None:
        return None
    parts = logits.new_empty(split.shape, dtype=compute_dtype(logits.dtype))
    split.kernel(logits_ptr=logits, target_ptr=target, parts_ptr=parts, transform_ptr=transform)
    return parts


def margin(logits: Tensor, target: Tensor, ignore_index: int, transform: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Margins (N,) and row statistics (3, N), max, sum, lead, of logits (N, V) or (images, V, D): one launch, or two."""
    dtype, rows = compute_dtype(logits.dtype), target.shape[0]
    statistics = logits.new_empty((3, rows), dtype=dtype)
    margins = logits.new_empty(rows, dtype=dtype)
    if rows:
        logits = _read(logits)
        plan, target = _margin_plan(_of(logits, transform), ignore_index), target.contiguous()
        with _device(logits):
            plan.kernel(
                logits_ptr=logits,
                target_ptr=target,
                transform_ptr=transform,
                parts_ptr=_parts(plan.split, logits, target, transform),
                rows_ptr=statistics,
                margin_ptr=margins,
            )
    return margins, statistics


def loss_and_rows(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    params: Tensor,
    normalizer: Tensor | None,
    family: str,
    ignore_index: int,
    out: Tensor | None = None,
    transform: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (), rows (7, N) and totals (3,), with dlogits for dloss = 1 written to `out` if given, which may be the logits.

    The logits are (N, V) or (images, V, D). One launch or two, and where few rows have many classes one more for `out`.
    """
    logits = logits if out is logits else _read(logits)
    plan = _batch_plan(_of(logits, transform, out), _forms(family), ignore_index)
    dtype, target = compute_dtype(logits.dtype), target.contiguous()
    rows = logits.new_empty((7, target.shape[0]), dtype=dtype)
    loss = logits.new_empty((), dtype=dtype)
    totals = logits.new_empty(3, dtype=torch.float64)
    given = {
        "logits_ptr": logits,
        "target_ptr": target,
        "transform_ptr": transform,
        "weight_ptr": _weights(weight, dtype),
        "sample_weight_ptr": _weights(sample_weight, dtype),
        "params_ptr": params,
        "rows_ptr": rows,
    }
    normalizer = None if normalizer is None else _read(normalizer)
    result = {"normalizer_ptr": normalizer, "loss_ptr": loss, "totals_ptr": totals}
    with _device(logits):
        if plan.totals is None:
            plan.kernel(**given, **result, parts_ptr=_parts(plan.split, logits, target, transform))
            if out is not None:
                _gradient(logits, target, rows, totals, None, ignore_index, out, transform)
            return loss, rows, totals
        partials = logits.new_empty((3, plan.partials), dtype=dtype)
        if out is None:
            plan.kernel(**given, partials_ptr=partials)
        elif plan.partials:
            plan.kernel(**given, normalizer_ptr=normalizer, partials_ptr=partials, dlogits_ptr=out)
        plan.totals(partials_ptr=partials, **result)
    return loss, rows, totals


def _gradient(
    logits: Tensor,
    target: Tensor,
    rows: Tensor,
    totals: Tensor | None,
    dloss: Tensor | None,
    ignore_index: int,
    out: Tensor,
    transform: Tensor | None,
    skip_one: bool = False,
) -> None:
    dloss_stride = 1 if dloss is not None and dloss.dim() else 0
    _gradient_plan(_of(logits, transform, out), dloss_stride, ignore_index, skip_one)(
        logits_ptr=logits,
        target_ptr=target,
        rows_ptr=rows,
        transform_ptr=transform,
        totals_ptr=totals,
        dloss_ptr=dloss,
        dlogits_ptr=out,
    )


def gradient(
    logits: Tensor,
    target: Tensor,
    rows: Tensor,
    totals: Tensor | None,
    dloss: Tensor,
    ignore_index: int,
    out: Tensor,
    skip_one: bool = False,
    transform: Tensor | None = None,
) -> None:
    """Write dlogits from the rows' numbers to `out`, which may be the logits themselves: one launch.

    Without `totals`, `dloss` is the derivative by the margins. With `skip_one`, `out` holds the gradient for dloss = 1 and is
    written only if dloss is something else.
    """
    if logits.numel():
        with _device(logits):
            logits = logits if out is logits else _read(logits)
            given = (logits, target.contiguous(), rows, totals, _read(dloss).contiguous())
            _gradient(*given, ignore_index, out, transform, skip_one)


def multiply_(dlogits: Tensor, dloss: Tensor) -> None:
    """Multiply dlogits by dloss (), in place: one launch, whose programs return at once where dloss is 1."""
    if dlogits.numel():
        with _device(dlogits):
            _multiply_plan(_of(dlogits, None))(dlogits_ptr=dlogits, dloss_ptr=_read(dloss))


def divisor(
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    classes: int,
    ignore_index: int,
    dtype: torch.dtype,
) -> Tensor:
    """What "mean" divides by: the sum in fp64 of the rows' weights, rounded to `dtype`; one launch, or torch for many rows."""
    if target.shape[0] > _launch.ROWS_ALONE:
        valid = target != ignore_index
        return mean_divisor(row_weight(weight, sample_weight, target, valid, dtype), valid)
    found = target.new_empty((), dtype=torch.float64)
    plan = _divisor_plan(target.device, target.shape[0], classes, ignore_index, dtype)
    with _device(target):
        plan(
            target_ptr=target.contiguous(),
            weight_ptr=_weights(weight, dtype),
            sample_weight_ptr=_weights(sample_weight, dtype),
            divisor_ptr=found,
        )
    return found


def received(target: Tensor, rows: Tensor, totals: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What each row received, (N,), and the sum of weights, from the numbers of `loss_and_rows`, one launch."""
    example_weight, target_prob = torch.empty_like(rows[0]), torch.empty_like(rows[0])
    correct = torch.empty_like(target, dtype=torch.uint8)
    if target.shape[0]:
        with _device(rows):
            _received_plan(rows.device, target.shape[0], ignore_index)(
                target_ptr=target.contiguous(),
                rows_ptr=rows,
                totals_ptr=totals,
                example_weight_ptr=example_weight,
                target_prob_ptr=target_prob,
                correct_ptr=correct,
            )
    return example_weight, target_prob, totals[2].clone(), correct.view(torch.bool)
