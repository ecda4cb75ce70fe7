"""Checks of the arguments, before anything is computed. They read shapes, dtypes and devices, never the data."""

import importlib.util
import itertools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import edf

REDUCTIONS = ("sum_weight", "mean", "sum", "none")
IMPLEMENTATIONS = ("triton", "cpu", "reference")
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER_DTYPES = (
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)
TRITON_DEVICES = ("cuda", "xpu")
# math.isfinite would break a compiled graph where the number changes, and passes integers that no float holds.
_LARGEST = torch.finfo(torch.float64).max
# Looked up once, here: torch 2.11 cannot trace the search for a module.
_TRITON = importlib.util.find_spec("triton") is not None


def has_triton() -> bool:
    return _TRITON


def interprets() -> bool:
    """Whether Triton kernels run in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def check_ignore_index(ignore_index: int) -> None:
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an int, got {ignore_index!r}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index: expected a 64-bit integer, got {ignore_index}")


def check_impl(impl: str | None) -> None:
    if impl is not None and impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: expected None or one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")


def _check_dense(name: str, value: Tensor) -> None:
    if value.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got a nested one")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got {value.layout}")


def check_logits_and_target(logits: Tensor, target: Tensor, ignore_index: int) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits: expected a Tensor, got {type(logits).__name__}")
    if not isinstance(target, Tensor):
        raise TypeError(f"target: expected a Tensor, got {type(target).__name__}")
    if logits.dtype not in FLOAT_DTYPES:
        raise TypeError(f"logits: expected dtype float16, bfloat16, float32 or float64, got {logits.dtype}")
    if target.dtype.is_floating_point:
        raise TypeError(
            f"target: expected labels of an integer dtype, got {target.dtype}; probability targets change the direction of "
            "the gradient and cannot be written as an emphasis w(p)"
        )
    if target.dtype not in INTEGER_DTYPES:
        raise TypeError(f"target: expected an integer dtype, got {target.dtype}")
    _check_dense("logits", logits)
    _check_dense("target", target)
    if logits.dim() < 1:
        raise ValueError("logits: expected shape (V), (N, V) or (N, V, d1, ..., dk), got a 0-d tensor")
    shape = tuple(logits.shape)
    expected = shape[:1] + shape[2:] if len(shape) > 1 else ()
    if tuple(target.shape) != expected:
        classes_last = len(shape) > 2 and tuple(target.shape) == shape[:-1]
        hint = "; classes come second: pass logits.flatten(0, -2) and target.flatten()" if classes_last else ""
        raise ValueError(f"target: expected shape {expected} for logits of shape {shape}, got {tuple(target.shape)}{hint}")
    if shape[min(1, len(shape) - 1)] == 0:
        raise ValueError(f"logits: expected at least one class, got shape {shape}")
    if target.device != logits.device:
        raise ValueError(f"target: expected device {logits.device}, that of logits, got {target.device}")
    check_ignore_index(ignore_index)


def check_linear(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, ignore_index: int, autocast: bool
) -> None:
    """The arguments of a linear layer and the labels of its output."""
    layer = {"input": input, "linear_weight": linear_weight}
    if linear_bias is not None:
        layer["linear_bias"] = linear_bias
    for name, value in {**layer, "target": target}.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
        _check_dense(name, value)
        if value.device != input.device:
            raise ValueError(f"{name}: expected device {input.device}, that of input, got {value.device}")
        _refuse_batches(name, value)
    for name, value in layer.items():
        if value.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name}: expected dtype float16, bfloat16, float32 or float64, got {value.dtype}")
        if value.dtype != input.dtype and (not autocast or torch.float64 in (value.dtype, input.dtype)):
            raise TypeError(f"{name}: expected dtype {input.dtype}, that of input, got {value.dtype}")
    if input.dim() < 1:
        raise ValueError("input: expected shape (..., H), got a 0-d tensor")
    if input.shape[-1] == 0:
        raise ValueError(f"input: expected shape (..., H), H at least 1, got {tuple(input.shape)}")
    features = input.shape[-1]
    if linear_weight.dim() != 2 or linear_weight.shape[1] != features or linear_weight.shape[0] == 0:
        raise ValueError(
            f"linear_weight: expected shape (V, {features}), V at least 1, for input of shape {tuple(input.shape)}, got "
            f"{tuple(linear_weight.shape)}"
        )
    if linear_bias is not None and tuple(linear_bias.shape) != (linear_weight.shape[0],):
        raise ValueError(f"linear_bias: expected shape ({linear_weight.shape[0]},), got {tuple(linear_bias.shape)}")
    if target.dtype.is_floating_point:
        raise TypeError(
            f"target: expected labels of an integer dtype, got {target.dtype}; probability targets change the direction of "
            "the gradient and cannot be written as an emphasis w(p)"
        )
    if target.dtype not in INTEGER_DTYPES:
        raise TypeError(f"target: expected an integer dtype, got {target.dtype}")
    if target.shape != input.shape[:-1]:
        expected = tuple(input.shape[:-1])
        raise ValueError(
            f"target: expected shape {expected} for input of shape {tuple(input.shape)}, got {tuple(target.shape)}"
        )
    check_ignore_index(ignore_index)


def _refuse_batches(name: str, value: Any) -> None:
    if isinstance(value, Tensor) and is_batched(value):
        raise ValueError(f"{name}: expected a tensor outside torch.vmap; give input all batches, in dimensions before the last")


def check_linear_options(
    recompute: bool, skip_tolerance: float, drop_ignored: bool, max_logits_bytes: int | None, reduction: str
) -> None:
    for name, flag in (("recompute", recompute), ("drop_ignored", drop_ignored)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: expected a bool, got {flag!r}")
    if isinstance(skip_tolerance, bool) or not isinstance(skip_tolerance, (int, float)):
        raise TypeError(f"skip_tolerance: expected a number, got {skip_tolerance!r}")
    if not 0 <= skip_tolerance < 1:
        raise ValueError(f"skip_tolerance: expected a number in [0, 1), got {skip_tolerance!r}")
    if skip_tolerance and not recompute:
        raise ValueError(
            "skip_tolerance: expected recompute=True with it, got recompute=False, where the products are computed before the "
            "batch's norms are known"
        )
    if skip_tolerance and reduction == "none":
        raise ValueError(
            'skip_tolerance: expected a reduction other than "none" with it, whose gradients depend on what the rows are '
            "multiplied by"
        )
    if max_logits_bytes is not None:
        if isinstance(max_logits_bytes, bool) or not isinstance(max_logits_bytes, int):
            raise TypeError(f"max_logits_bytes: expected an int or None, got {max_logits_bytes!r}")
        if max_logits_bytes < 1:
            raise ValueError(f"max_logits_bytes: expected at least 1, got {max_logits_bytes}")


def check_tensor_or_none(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")


def check_weights(logits: Tensor, target: Tensor, weight: Tensor | None, sample_weight: Tensor | None) -> None:
    _check_weights("logits", logits, logits.shape[min(1, logits.dim() - 1)], target, weight, sample_weight)


def check_linear_weights(
    input: Tensor, linear_weight: Tensor, target: Tensor, weight: Tensor | None, sample_weight: Tensor | None
) -> None:
    _check_weights("input", input, linear_weight.shape[0], target, weight, sample_weight)
    _refuse_batches("weight", weight)
    _refuse_batches("sample_weight", sample_weight)


def check_linear_scalar(name: str, value: Any, input: Tensor) -> None:
    check_scalar_device(name, value, "input", input)
    _refuse_batches(name, value)


def _check_weights(
    given: str, tensor: Tensor, classes: int, target: Tensor, weight: Tensor | None, sample_weight: Tensor | None
) -> None:
    for name, value, shape in (
        ("weight", weight, (classes,)),
        ("sample_weight", sample_weight, tuple(target.shape)),
    ):
        check_tensor_or_none(name, value)
        if value is None:
            continue
        _check_dense(name, value)
        if not value.dtype.is_floating_point:
            raise TypeError(f"{name}: expected a float dtype, got {value.dtype}")
        if tuple(value.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(value.shape)}")
        if value.device != tensor.device:
            raise ValueError(f"{name}: expected device {tensor.device}, that of {given}, got {value.device}")
        if value.requires_grad:
            raise ValueError(f"{name}: expected a tensor that does not require grad; weights are constants to autograd")


def check_options(reduction: str, normalizer: float | Tensor | None, eps: float | None, label_smoothing: float) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if normalizer is not None:
        if reduction != "sum":
            raise ValueError(f'normalizer: expected reduction="sum" with it, got reduction={reduction!r}')
        if isinstance(normalizer, Tensor):
            if normalizer.dim() != 0:
                raise ValueError(f"normalizer: expected a number or a 0-d tensor, got shape {tuple(normalizer.shape)}")
            if normalizer.dtype.is_complex or normalizer.dtype == torch.bool:
                raise TypeError(f"normalizer: expected a real dtype, got {normalizer.dtype}")
            if normalizer.requires_grad:
                raise ValueError("normalizer: expected a tensor that does not require grad; it is a constant to autograd")
        elif isinstance(normalizer, bool) or not isinstance(normalizer, (int, float)):
            raise TypeError(f"normalizer: expected a number or a 0-d tensor, got {normalizer!r}")
        elif not 0 < normalizer <= _LARGEST:
            raise ValueError(f"normalizer: expected a finite number above 0, got {normalizer!r}")
    check_eps(eps)
    if isinstance(label_smoothing, Tensor) or label_smoothing != 0:
        raise ValueError(
            f"label_smoothing: expected 0, got {label_smoothing!r}; smoothed labels change the direction of the gradient "
            "and cannot be written as an emphasis w(p)"
        )


def check_eps(eps: float | None) -> None:
    if eps is not None:
        if isinstance(eps, bool) or not isinstance(eps, (int, float)):
            raise TypeError(f"eps: expected a number or None, got {eps!r}")
        if not 0 <= eps <= _LARGEST:
            raise ValueError(f"eps: expected a finite number, at least 0, got {eps!r}")


def check_transform(softcap: float | Tensor | None, logit_scale: float | Tensor | None) -> None:
    for name, value in (("softcap", softcap), ("logit_scale", logit_scale)):
        if value is None:
            continue
        if isinstance(value, Tensor):
            if value.dim() != 0:
                raise ValueError(f"{name}: expected a number or a 0-d tensor, got shape {tuple(value.shape)}")
            if value.dtype.is_complex or value.dtype == torch.bool:
                raise TypeError(f"{name}: expected a real dtype, got {value.dtype}")
            if value.requires_grad:
                raise ValueError(f"{name}: expected a tensor that does not require grad; it is a constant to autograd")
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a number, a 0-d tensor or None, got {value!r}")
        elif not 0 < value <= _LARGEST:
            raise ValueError(f"{name}: expected a finite number above 0, got {value!r}")


def check_scalar_device(name: str, value: float | Tensor | None, given: str, tensor: Tensor) -> None:
    if isinstance(value, Tensor) and value.device != tensor.device:
        raise ValueError(f"{name}: expected device {tensor.device}, that of {given}, got {value.device}")


def is_captured(device: torch.device) -> bool:
    """Whether a CUDA graph records what this thread launches on the device."""
    return device.type == "cuda" and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()


def is_batched(tensor: Tensor) -> bool:
    """Whether torch.vmap runs and the tensor is one of its batches; whether that requires grad is not told."""
    return torch._C._functorch.is_batchedtensor(tensor)


def is_contiguous(tensor: Tensor) -> bool:
    """Whether the tensor is contiguous; in compiled code without a question about its first size, which may depend on data."""
    if not torch.compiler.is_compiling():
        return tensor.is_contiguous()
    inner = 1
    for size, stride in zip(reversed(tensor.shape[1:]), reversed(tensor.stride()[1:]), strict=True):
        if size != 1 and stride != inner:
            return False
        inner *= size
    return tensor.stride(0) == inner


def _is_tracked_by_a_transform(tensor: Tensor) -> bool:
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_gradtrackingtensor(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return False


def check_transforms(impl: str, *given: Tensor | float | None) -> None:
    """Refuse the transforms that would lose the gradient: torch.func's do not see an operator's, forward mode gets zeros."""
    if impl == "reference":
        if torch.compiler.is_exporting():
            raise RuntimeError("impl='reference': cannot be exported, its gradient would be lost; use impl 'triton' or 'cpu'")
        return
    transformed = forward_ad._current_level >= 0
    if not torch.compiler.is_compiling():  # there the tracer itself names the operator that torch.func.grad cannot take
        tensors = [value for value in given if isinstance(value, Tensor)]
        transformed = transformed and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)
        transformed = transformed or any(_is_tracked_by_a_transform(tensor) for tensor in tensors)
    if transformed:
        raise RuntimeError(
            f"impl={impl!r}: expected plain autograd, got a torch.func transform (grad, jvp, ...) or forward-mode "
            "differentiation; pass impl='reference' for those"
        )


def check_inplace(inplace: bool, logits: Tensor, impl: str) -> None:
    """Whether these logits, whose gradient is wanted, can be overwritten by it."""
    if not isinstance(inplace, bool):
        raise TypeError(f"inplace: expected a bool, got {inplace!r}")
    if inplace and is_batched(logits):
        raise ValueError("inplace=True: expected logits outside torch.vmap")
    if not (inplace and torch.is_grad_enabled() and logits.requires_grad):
        return
    # Everything that can be wrong is noticed before the first logit is overwritten.
    if impl == "reference":
        raise ValueError("inplace=True: expected impl 'triton' or 'cpu', got 'reference', which overwrites nothing")
    if logits.is_leaf:
        raise ValueError("inplace=True: expected logits that were computed, got a leaf tensor, whose data would be lost")
    if not torch.compiler.is_compiling() and logits._base is not None and logits._base.is_leaf:
        raise ValueError(
            "inplace=True: expected logits that were computed, got a view of a leaf tensor, whose data would be lost"
        )
    if impl == "triton":
        if not torch.compiler.is_compiling() and logits.is_neg():
            raise ValueError("inplace=True: expected logits as they are in memory, got a view that torch negates, see is_neg()")
        _check_overwritable_in_place(logits)
        return
    rows = logits if logits.dim() < 3 else logits.movedim(1, -1)
    if rows.shape[-1] > 1 and rows.stride(-1) != 1:
        raise ValueError(f"inplace=True: expected logits whose classes are adjacent in memory, got strides {logits.stride()}")
    if logits.dim() > 2 and not is_contiguous(rows):
        raise ValueError(
            "inplace=True: expected spatial logits in the channels-last layout, (N, d1, ..., dk, V) in memory, got strides "
            f"{logits.stride()} for shape {tuple(logits.shape)}"
        )
    if logits.dim() == 2 and logits.shape[0] > 1 and logits.stride(0) < logits.shape[1]:
        raise ValueError(
            f"inplace=True: expected rows that do not overlap, got strides {logits.stride()} for shape {tuple(logits.shape)}"
        )


def _check_overwritable_in_place(logits: Tensor) -> None:
    """For kernels, which write at any strides that the rows of an image have in common."""
    spatial = [(size, stride) for size, stride in zip(logits.shape[2:], logits.stride()[2:], strict=True) if size != 1]
    if any(outer != size * inner for (_, outer), (size, inner) in itertools.pairwise(spatial)):
        raise ValueError(
            "inplace=True: expected spatial dimensions that are one in memory, d1 * ... * dk positions equally far apart, got "
            f"strides {logits.stride()} for shape {tuple(logits.shape)}"
        )
    reach = 0
    for stride, size in sorted((stride, size) for size, stride in zip(logits.shape, logits.stride(), strict=True) if size > 1):
        if stride <= reach:
            raise ValueError(
                f"inplace=True: expected rows that do not overlap, got strides {logits.stride()} for shape "
                f"{tuple(logits.shape)}"
            )
        reach += stride * (size - 1)


def check_emphasis(emphasis: Any) -> edf.EDF | Callable[[Tensor, Tensor], Tensor]:
    """The EDF that `emphasis` is or names, or the callable itself."""
    if isinstance(emphasis, str):
        try:
            return edf.parse(emphasis)
        except ValueError as error:
            raise ValueError(f"emphasis: {error}") from None
    if isinstance(emphasis, edf.EDF):
        if type(emphasis) is edf.EDF:
            raise TypeError("emphasis: expected an EDF such as edf.DM(beta=8, lambd=0.5), got the base class EDF")
        if not torch.compiler.is_compiling():
            emphasis.check_fields()
        return emphasis
    if callable(emphasis) and not isinstance(emphasis, type):
        return emphasis
    raise TypeError(
        "emphasis: expected an EDF such as edf.DM(beta=8, lambd=0.5), its name such as 'dm:beta=8,lambd=0.5', or a callable "
        f"log_weight(log_p, log_q), got {emphasis!r}"
    )


def choose_impl(impl: str | None, logits: Tensor) -> str:
    """The implementation for these logits; a forced one is checked and never replaced."""
    check_impl(impl)
    device = logits.device.type
    if impl is None:
        impl = "triton" if device in TRITON_DEVICES else "cpu" if device == "cpu" else "reference"
    if impl == "cpu" and device != "cpu":
        raise ValueError(f"impl='cpu': expected logits on the CPU, got {logits.device}")
    if impl == "triton":
        if device not in (*TRITON_DEVICES, "cpu"):
            raise ValueError(f"impl='triton': expected logits on a GPU, got {logits.device}")
        if not has_triton():
            raise RuntimeError("impl='triton': triton is not installed; install it, or pass impl='reference'")
        if device == "cpu" and not interprets():
            raise ValueError(
                "impl='triton': expected logits on a GPU, got the CPU; to run the kernels in Triton's interpreter, set "
                "TRITON_INTERPRET=1 before triton is first imported"
            )
    return impl


def check_labels(target: Tensor, classes: int, ignore_index: int) -> None:
    """Read the labels and raise IndexError for one that is no class: done where FUSED_DM_VALIDATE=1, at the cost of a sync."""
    wrong = (target != ignore_index) & ((target < 0) | (target >= classes))
    if wrong.any():
        found = int(target[wrong][0])
        raise IndexError(f"target: expected labels in [0, {classes}) or ignore_index={ignore_index}, got {found}")


def validates_labels(first: bool = False) -> bool:
    """Whether to read the labels before anything is computed; `first` where afterwards would be too late."""
    return (first or os.environ.get("FUSED_DM_VALIDATE", "0") == "1") and not torch.compiler.is_compiling()
