"""Launching the Triton kernels: buffers, strides and arguments. Grids and block sizes are chosen in `_launch`."""

import contextlib
import functools
from typing import Any

import fused_dm_kernels as kernels
import torch
import triton
from torch import Tensor

from . import _launch
from ._launch import Device, Launch, Sizes
from ._rows import compute_dtype
from .edf._custom import DEVICE_FORMS


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
    return Device(multiprocessors, getattr(found, "L2_cache_size", 0), getattr(found, "warp_size", 32))


def _strides(tensor: Tensor) -> tuple[int, int, int]:
    """Of image, position and class, of (N, V) or (images, V, D)."""
    if tensor.dim() == 2:
        return 0, tensor.stride(0), tensor.stride(1)
    return tensor.stride(0), tensor.stride(2), tensor.stride(1)


class _Layout:
    """Where the elements of the logits, and of other tensors of their shape, lie: sizes, strides and units for a launch."""

    def __init__(self, **tensors: Tensor) -> None:
        logits = next(iter(tensors.values()))
        images, classes, positions = logits.shape if logits.dim() == 3 else (1, logits.shape[1], logits.shape[0])
        strides = {name: _strides(tensor) for name, tensor in tensors.items()}
        if positions == 1 or all(image == positions * position for image, position, _ in strides.values()):
            # The rows of all images are equally far apart: one image.
            if positions == 1:
                strides = {name: (0, image, of_class) for name, (image, _, of_class) in strides.items()}
            images, positions = 1, images * positions
        spatial = classes > 1 and any(of_class != 1 for _, _, of_class in strides.values())
        unit = 16 // logits.element_size()
        if spatial:
            far = [stride for image, _, of_class in strides.values() for stride in (image, of_class)]
            aligned = positions % unit == 0 and all(position == 1 for _, position, _ in strides.values())
        else:
            far = [stride for image, position, _ in strides.values() for stride in (image, position)]
            aligned = classes % unit == 0
        # Elements in 16 bytes if every row, or every class of an image, starts at a multiple of them, so that the compiler may
        # load 128 bits; else 1.
        self.unit = unit if aligned and all(stride % unit == 0 for stride in far) else 1
        self.sizes = Sizes(images, positions, classes, logits.element_size(), spatial, self.unit > 1)
        self.strides = {f"{name}_strides": self._in_units(of) for name, of in strides.items()}

    def _in_units(self, strides: tuple[int, int, int]) -> tuple[int, int, int]:
        image, position, of_class = strides
        if self.sizes.spatial:
            return image // self.unit, position, of_class // self.unit
        return image // self.unit, position // self.unit, 1

    def arguments(self, launch: Launch) -> dict[str, Any]:
        """Of every kernel over the logits; the strides apart."""
        by_class, by_position = (1, self.unit) if self.sizes.spatial else (self.unit, 1)
        return {
            "V": self.sizes.classes // by_class,
            "D": self.sizes.positions // by_position,
            **self.strides,
            "UNIT": self.unit,
            "SPATIAL": self.sizes.spatial,
            "BLOCK_N": launch.block_n,
            "BLOCK_V": launch.block_v,
            "num_warps": launch.num_warps,
            "enable_fp_fusion": True,
        }


def _transform(transform: Tensor | None) -> dict[str, Any]:
    """Scale and cap of the logits, see `fused_dm._api`, as the kernels take them."""
    return {"transform_ptr": transform, "CAPPED": transform is not None and transform.shape[0] == 2}


def _family(family: str) -> dict:
    log_weight, loss = kernels.FAMILIES.get(family) or DEVICE_FORMS.get(family, (None, None))
    if log_weight is None:
        raise ValueError(f"emphasis: expected a family that is registered in this process, got {family!r}")
    return {"LOG_WEIGHT": log_weight, "LOSS": loss}


def _split(
    layout: _Layout, launch: Launch, logits: Tensor, target: Tensor, ignore_index: int, transform: Tensor | None
) -> dict[str, Any]:
    """One launch that finds the rows' statistics in parts; returns what the next launch combines them by."""
    sizes, spans = layout.sizes, launch.spans(layout.sizes)
    parts = logits.new_empty((2, spans, sizes.rows), dtype=compute_dtype(logits.dtype))
    kernels.split_kernel[(launch.tiles(sizes) * spans,)](
        logits_ptr=logits,
        target_ptr=target,
        parts_ptr=parts,
        N=sizes.rows,
        SPAN=launch.span,
        ignore_index=ignore_index,
        **_transform(transform),
        **layout.arguments(launch),
        LANES=launch.lanes,
    )
    return {"parts_ptr": parts, "parts": spans, "PARTS": triton.next_power_of_2(spans)}


NO_PARTS: dict[str, Any] = {"parts_ptr": None, "parts": 1, "PARTS": 1}


def margin(logits: Tensor, target: Tensor, ignore_index: int, transform: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Margins (N,) and row statistics (3, N), max, sum, lead, of logits (N, V) or (images, V, D): one launch, or two."""
    dtype, rows = compute_dtype(logits.dtype), target.shape[0]
    statistics = logits.new_empty((3, rows), dtype=dtype)
    margins = logits.new_empty(rows, dtype=dtype)
    if rows:
        layout, target = _Layout(logits=logits), target.contiguous()
        launch, parts = _launch.margin(layout.sizes, _properties(logits.device)), NO_PARTS
        with _device(logits):
            if launch.way == "split":
                parts = _split(layout, launch, logits, target, ignore_index, transform)
                launch = _launch.combining(layout.sizes, parts["parts"])
            kernels.margin_kernel[(launch.tiles(layout.sizes),)](
                logits_ptr=logits,
                target_ptr=target,
                rows_ptr=statistics,
                margin_ptr=margins,
                N=rows,
                ignore_index=ignore_index,
                LANES=launch.lanes,
                **_transform(transform),
                **parts,
                **layout.arguments(launch),
            )
    return margins, statistics


def loss_and_rows(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
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
    dtype, rows = compute_dtype(logits.dtype), target.shape[0]
    target = target.contiguous()
    layout = _Layout(logits=logits)
    whole = layout if out is None else _Layout(logits=logits, dlogits=out)
    device = _properties(logits.device)
    launch = (
        _launch.forward(layout.sizes, device)
        if out is None
        else _launch.fused(whole.sizes, device, _transform(transform)["CAPPED"])
    )
    buffer = logits.new_empty((7, rows), dtype=dtype)
    loss = logits.new_empty((), dtype=dtype)
    totals = logits.new_empty(3, dtype=torch.float64)
    given = {
        "logits_ptr": logits,
        "target_ptr": target,
        "weight_ptr": weight,
        "params_ptr": params,
        "rows_ptr": buffer,
        "N": rows,
        "ignore_index": ignore_index,
        **_transform(transform),
        **_family(family),
    }
    result = {"normalizer_ptr": normalizer, "loss_ptr": loss, "totals_ptr": totals}
    with _device(logits):
        if launch.way in ("alone", "split"):
            parts = NO_PARTS
            if launch.way == "split":
                parts = _split(layout, launch, logits, target, ignore_index, transform)
                launch = _launch.combining(layout.sizes, parts["parts"])
            tiles = launch.tiles(layout.sizes)
            lanes = {"LANES": launch.lanes}
            kernels.batch_kernel[(1,)](**given, **result, tiles=tiles, **parts, **lanes, **layout.arguments(launch))
            if out is not None:
                _gradient(logits, target, buffer, totals, None, ignore_index, out, whole, False, transform)
            return loss, buffer, totals
        programs = launch.programs(whole.sizes)
        partials = logits.new_empty((3, programs), dtype=dtype)
        if out is None:
            kernels.forward_kernel[(programs,)](
                **given, partials_ptr=partials, TILES=launch.repeat, LANES=launch.lanes, **layout.arguments(launch)
            )
        elif programs:
            one_block = launch.span == launch.block_v
            kernels.fused_kernel[(programs,)](
                **given,
                normalizer_ptr=normalizer,
                partials_ptr=partials,
                dlogits_ptr=out,
                ONE_BLOCK=one_block,
                LANES=launch.lanes,
                STAGES=launch.stages,
                **whole.arguments(launch),
            )
        kernels.totals_kernel[(1,)](
            partials_ptr=partials,
            **result,
            P=programs,
            LOSS=given["LOSS"],
            **_launch.totals(programs),
            enable_fp_fusion=True,
        )
    return loss, buffer, totals


def _gradient(
    logits: Tensor,
    target: Tensor,
    rows: Tensor,
    totals: Tensor | None,
    dloss: Tensor | None,
    ignore_index: int,
    out: Tensor,
    layout: _Layout,
    skip_one: bool,
    transform: Tensor | None,
) -> None:
    launch = _launch.gradient(layout.sizes, _properties(logits.device), whole_rows=skip_one)
    kernels.gradient_kernel[(launch.tiles(layout.sizes) * launch.spans(layout.sizes),)](
        logits_ptr=logits,
        target_ptr=target,
        rows_ptr=rows,
        totals_ptr=totals,
        dloss_ptr=dloss,
        dlogits_ptr=out,
        N=layout.sizes.rows,
        SPAN=launch.span,
        dloss_stride=1 if dloss is not None and dloss.dim() else 0,
        ignore_index=ignore_index,
        SKIP_ONE=skip_one,
        STREAM=launch.stream,
        LANES=launch.lanes,
        STAGES=launch.stages,
        **_transform(transform),
        **layout.arguments(launch),
    )


def gradient(
    logits: Tensor,
    target: Tensor,
    rows: Tensor,
    totals: Tensor | None,
    dloss: Tensor,
    ignore_index: int,
    out: Tensor | None = None,
    skip_one: bool = False,
    transform: Tensor | None = None,
) -> Tensor:
    """dlogits from the rows' numbers: one launch, into `out` where that is given; it may be the logits themselves.

    Without `totals`, `dloss` is the derivative by the margins. With `skip_one`, `out` holds the gradient for dloss = 1 and is
    written only if dloss is something else.
    """
    dlogits = torch.empty_like(logits) if out is None else out
    if logits.numel():
        layout = _Layout(logits=logits, dlogits=dlogits)
        with _device(logits):
            _gradient(
                logits,
                target.contiguous(),
                rows,
                totals,
                dloss.contiguous(),
                ignore_index,
                dlogits,
                layout,
                skip_one,
                transform,
            )
    return dlogits


def multiply_(dlogits: Tensor, dloss: Tensor) -> None:
    """Multiply dlogits by dloss (), in place: one launch, whose programs return at once where dloss is 1."""
    if dlogits.numel():
        layout = _Layout(dlogits=dlogits)
        launch = _launch.gradient(layout.sizes, _properties(dlogits.device), whole_rows=True)
        with _device(dlogits):
            kernels.multiply_kernel[(launch.tiles(layout.sizes) * launch.spans(layout.sizes),)](
                dlogits_ptr=dlogits, dloss_ptr=dloss, SPAN=launch.span, **layout.arguments(launch)
            )
