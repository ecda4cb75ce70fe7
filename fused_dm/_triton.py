"""Launching the Triton kernels: buffers, grid and block sizes."""

import contextlib

import fused_dm_kernels as kernels
import torch
import triton
from torch import Tensor

from ._rows import compute_dtype
from .edf._custom import DEVICE_FORMS


def _device(tensor: Tensor) -> contextlib.AbstractContextManager:
    if tensor.device.type == "cpu":
        return contextlib.nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)


def _rows_contiguous(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def _unit(logits: Tensor) -> int:
    """Elements in 16 bytes if every row starts at a multiple of them, so that the compiler may load 128 bits; else 1."""
    unit = 16 // logits.element_size()
    return unit if logits.shape[1] % unit == 0 and logits.stride(0) % unit == 0 else 1


def tile(classes: int, itemsize: int, keep: bool, capped: bool = False) -> dict[str, int]:
    """BLOCK_N, BLOCK_V and num_warps: several rows a program for few classes, one row in blocks for many.

    `keep` is for the fused kernel, which keeps a block in registers. A row of up to 64 KiB is then read once; longer rows take
    wide programs, so that few rows are in flight and the second read finds them in L2. More in registers spills, and for a
    softcap, whose slope comes on top, more than a quarter of that does, or half of a tile of several rows.
    """
    itemsize *= 4 if capped and keep else 1
    width = triton.next_power_of_2(max(16, classes))
    if keep and width > 4096:
        registers = 65536 // itemsize
        block_v = width if width <= registers else min(16384, registers)
        return {"BLOCK_N": 1, "BLOCK_V": block_v, "num_warps": max(8, min(16, block_v * itemsize // 2048))}
    block_v = min(width, 4096)
    elements = 2048 if capped else 4096
    return {
        "BLOCK_N": max(1, min(128, elements // block_v)),
        "BLOCK_V": block_v,
        "num_warps": 8 if block_v >= 2048 else 4,
    }


def _sizes(logits: Tensor) -> dict[str, int]:
    unit = _unit(logits)
    return {
        "N": logits.shape[0],
        "V": logits.shape[1] // unit,
        "logits_row_stride": logits.stride(0) // unit,
        "UNIT": unit,
        "enable_fp_fusion": True,
    }


def _capped(transform: Tensor | None) -> bool:
    return transform is not None and transform.shape[0] == 2


def _transform(transform: Tensor | None) -> dict:
    """Scale and cap of the logits, see _operators.py, as the kernels take them."""
    return {"transform_ptr": transform, "CAPPED": _capped(transform)}


def _family(family: str) -> dict:
    log_weight, loss = kernels.FAMILIES.get(family) or DEVICE_FORMS.get(family, (None, None))
    if log_weight is None:
        raise ValueError(f"emphasis: expected a family that is registered in this process, got {family!r}")
    return {"LOG_WEIGHT": log_weight, "LOSS": loss}


def _spans(logits: Tensor, whole_rows: bool, capped: bool = False) -> tuple[tuple[int], dict[str, int]]:
    """Grid and tile of a launch that needs no reduction, and so may cut rows where there are too few to fill a GPU."""
    rows, classes = logits.shape
    config = tile(classes, logits.element_size(), keep=False, capped=capped)
    blocks = triton.cdiv(classes, config["BLOCK_V"])
    tiles = triton.cdiv(rows, config["BLOCK_N"])
    blocks_a_program = blocks if whole_rows else triton.cdiv(blocks, max(1, triton.cdiv(2048, tiles)))
    span = blocks_a_program * config["BLOCK_V"]
    return (tiles * triton.cdiv(classes, span),), {"SPAN": span, **config}


def margin(logits: Tensor, target: Tensor, ignore_index: int, transform: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Margins (N,) and row statistics (3, N): max, sum, lead."""
    logits, rows = _rows_contiguous(logits), logits.shape[0]
    dtype = compute_dtype(logits.dtype)
    statistics = logits.new_empty((3, rows), dtype=dtype)
    margins = logits.new_empty(rows, dtype=dtype)
    if rows:
        config = tile(logits.shape[1], logits.element_size(), keep=False, capped=_capped(transform))
        with _device(logits):
            kernels.margin_kernel[(triton.cdiv(rows, config["BLOCK_N"]),)](
                logits_ptr=logits,
                target_ptr=target.contiguous(),
                rows_ptr=statistics,
                margin_ptr=margins,
                ignore_index=ignore_index,
                **_transform(transform),
                **_sizes(logits),
                **config,
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
    """Loss (), rows (7, N) and totals (3,), with dlogits (N, V) for dloss = 1 written to `out` if given: two launches."""
    logits, rows = _rows_contiguous(logits), logits.shape[0]
    dtype = compute_dtype(logits.dtype)
    config = tile(logits.shape[1], logits.element_size(), keep=out is not None, capped=_capped(transform))
    programs = triton.cdiv(rows, config["BLOCK_N"])
    buffer = logits.new_empty((7, rows), dtype=dtype)
    partials = logits.new_empty((3, programs), dtype=dtype)
    loss = logits.new_empty((), dtype=dtype)
    totals = logits.new_empty(3, dtype=torch.float64)
    arguments = {
        "logits_ptr": logits,
        "target_ptr": target.contiguous(),
        "weight_ptr": weight,
        "params_ptr": params,
        "rows_ptr": buffer,
        "partials_ptr": partials,
        "ignore_index": ignore_index,
        **_transform(transform),
        **_sizes(logits),
        **_family(family),
        **config,
    }
    with _device(logits):
        if programs and out is not None:
            kernels.fused_kernel[(programs,)](
                normalizer_ptr=normalizer,
                dlogits_ptr=out,
                dlogits_row_stride=out.stride(0) // arguments["UNIT"],
                ONE_BLOCK=logits.shape[1] <= config["BLOCK_V"],
                **arguments,
            )
        elif programs:
            kernels.forward_kernel[(programs,)](**arguments)
        kernels.totals_kernel[(1,)](
            partials_ptr=partials,
            normalizer_ptr=normalizer,
            loss_ptr=loss,
            totals_ptr=totals,
            P=programs,
            LOSS=_family(family)["LOSS"],
            BLOCK=1024,
            num_warps=8,
            enable_fp_fusion=True,
        )
    return loss, buffer, totals


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
    logits = _rows_contiguous(logits)
    dlogits = logits.new_empty(logits.shape) if out is None else out
    if logits.numel():
        grid, config = _spans(logits, whole_rows=skip_one, capped=_capped(transform))
        dloss = dloss.contiguous()
        sizes = _sizes(logits)
        with _device(logits):
            kernels.gradient_kernel[grid](
                logits_ptr=logits,
                target_ptr=target.contiguous(),
                rows_ptr=rows,
                totals_ptr=totals,
                dloss_ptr=dloss,
                dlogits_ptr=dlogits,
                dlogits_row_stride=dlogits.stride(0) // sizes["UNIT"],
                dloss_stride=1 if dloss.dim() else 0,
                ignore_index=ignore_index,
                SKIP_ONE=skip_one,
                **_transform(transform),
                **sizes,
                **config,
            )
    return dlogits


def multiply_(dlogits: Tensor, dloss: Tensor) -> None:
    """Multiply dlogits (N, V) by dloss (), in place: one launch, whose programs return at once where dloss is 1."""
    if dlogits.numel():
        grid, config = _spans(dlogits, whole_rows=True)
        sizes = _sizes(dlogits)
        sizes["dlogits_row_stride"] = sizes.pop("logits_row_stride")
        with _device(dlogits):
            kernels.multiply_kernel[grid](dlogits_ptr=dlogits, dloss_ptr=dloss, **sizes, **config)
