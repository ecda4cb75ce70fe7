"""Triton's interpreter, made stricter than it comes: every lane stays inside its tensor, and casts round as a GPU does.

`install` is called once, before the tests. From then on each load and store of each kernel in each test is checked: a lane
that is not masked must fall on an element of the tensor whose pointer the address was made from, the gaps between the rows
of a strided tensor excluded. The origin of an address is known because the pointers carry the number of their argument in
the 16 bits that user-space addresses leave free.

The interpreter cuts fp32 off when it casts to bf16, where every GPU rounds to nearest even, misreads subnormal bf16, and gives
the maximum of a number and nan as nan, where a GPU gives the number unless it is asked; that is mended too. lean.py makes it
faster, and integers that overflow an error; tests/test_interpreter.py tests both files.
"""

import contextlib
import inspect

import lean
import numpy as np
import torch

TAG = np.uint64(48)
ADDRESS = np.uint64((1 << 48) - 1)


class OutsideTensor(AssertionError):
    """A lane that is not masked and falls outside the tensor that its pointer was made from."""


class Bounds:
    """The tensors of the present launch, and what the lanes of all launches did."""

    def __init__(self) -> None:
        self.kernel = ""
        self.names: list[str] = []
        self.tensors: list[torch.Tensor] = []
        self.lanes = {"load": 0, "store": 0}
        self.kernels: dict[str, int] = {}
        self.observer = None

    def begin(self, kernel: str, names: list[str]) -> None:
        self.kernel, self.names, self.tensors = kernel, names, []
        self.kernels[kernel] = self.kernels.get(kernel, 0) + 1

    def pointer(self, tensor: torch.Tensor) -> np.ndarray:
        self.tensors.append(tensor)
        return np.array([tensor.data_ptr()], np.uint64) | np.uint64(len(self.tensors) - 1) << TAG

    def check(self, access: str, pointers: np.ndarray, mask: np.ndarray, size: int) -> np.ndarray:
        """The addresses of all lanes, of so many bytes each, after checking those that are not masked."""
        addresses = pointers & ADDRESS
        active = np.broadcast_to(mask, pointers.shape).astype(bool)
        if active.any():
            tags = (pointers >> TAG)[active]
            lanes = addresses[active].astype(np.int64)
            number = int(tags[0])
            name = self.names[number] if number < len(self.names) else f"argument {number}"
            if (tags != tags[0]).any():
                raise OutsideTensor(f"{self.kernel}: one {access} of several tensors, {name} among them")
            tensor = self.tensors[number]
            if (lanes % size).any():
                raise OutsideTensor(
                    f"{self.kernel}: {access} of {size} bytes of {name} at an address that is not a multiple of it"
                )
            # A lane may be several elements of a smaller type.
            lanes = (lanes[:, None] + np.arange(0, size, min(size, tensor.element_size()))).ravel()
            inside = elements(lanes, tensor)
            if not inside.all():
                at = (lanes[~inside][0] - tensor.data_ptr()) // tensor.element_size()
                raise OutsideTensor(
                    f"{self.kernel}: {access} of {name} outside it: {int((~inside).sum())} lanes, the first at element {at} "
                    f"of shape {tuple(tensor.shape)} with strides {tensor.stride()}"
                )
            self.lanes[access] += lanes.size
            if self.observer is not None:
                self.observer(access, lanes)
        return addresses


def elements(addresses: np.ndarray, tensor: torch.Tensor) -> np.ndarray:
    """Which addresses are those of an element of the tensor."""
    offsets = addresses - tensor.data_ptr()
    at, rest = np.divmod(offsets, tensor.element_size())
    if tensor.is_contiguous():
        inside = (at >= 0) & (at < tensor.numel())
    elif tensor.dim() == 2 and tensor.stride(1) == 1 and tensor.stride(0) >= tensor.shape[1]:
        row, column = np.divmod(at, tensor.stride(0))
        inside = (row >= 0) & (row < tensor.shape[0]) & (column < tensor.shape[1])
    else:
        own = sum(
            (np.arange(size).reshape([-1 if i == axis else 1 for i in range(tensor.dim())]) * tensor.stride(axis))
            for axis, size in enumerate(tensor.shape)
        )
        inside = np.isin(at, own)
    return inside & (rest == 0)


def nearest_even(data: np.ndarray) -> np.ndarray:
    """fp32 as the bits of bf16, rounded as hardware rounds."""
    rounded = torch.from_numpy(np.ascontiguousarray(data, np.float32)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16)


def widened(data: np.ndarray) -> np.ndarray:
    """The bits of bf16 as fp32: its upper half."""
    return (data.astype(np.uint32) << np.uint32(16)).view(np.float32)


bounds = Bounds()


def install() -> None:
    """Make the interpreter of this process strict."""
    import triton.language as tl
    from triton.runtime import interpreter

    lean.install()
    kind = type(interpreter.interpreter_builder)
    load, store, cast = kind.create_masked_load, kind.create_masked_store, kind.cast_impl
    convert, launch = interpreter._implicit_cvt, interpreter.GridExecutor.__call__

    def size_of(pointers):
        return max(8, pointers.get_element_ty().primitive_bitwidth) // 8

    def checked_load(self, ptrs, mask, *rest):
        addresses = bounds.check("load", ptrs.data, mask.data, size_of(ptrs))
        return load(self, interpreter.TensorHandle(addresses, ptrs.dtype), mask, *rest)

    def checked_store(self, ptrs, value, mask, *rest):
        addresses = bounds.check("store", ptrs.data, mask.data, size_of(ptrs))
        return store(self, interpreter.TensorHandle(addresses, ptrs.dtype), value, mask, *rest)

    def rounded_cast(self, source, to):
        if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            return interpreter.TensorHandle(nearest_even(source.data), to.scalar)
        if source.dtype.scalar == tl.bfloat16 and to.scalar == tl.float32:
            return interpreter.TensorHandle(widened(source.data), to.scalar)
        return cast(self, source, to)

    def tagged(argument):
        value = convert(argument)
        if hasattr(argument, "data_ptr"):
            value.handle.data = bounds.pointer(argument)
        return value

    def named_launch(self, *arguments, **options):
        parameters = inspect.getfullargspec(self.fn).args
        given = {name: value for name, value in options.items() if name in parameters}
        named = inspect.getcallargs(self.fn, *arguments, **given)
        tensors = [name for name, value in named.items() if name not in self.constexprs and hasattr(value, "data_ptr")]
        bounds.begin(self.fn.__name__, tensors)
        return launch(self, *arguments, **options)

    # As np.nanmax, but that nan alone is nothing to warn of.
    reductions, silent = interpreter.ReduceOps.min_max, {np.nanmax: np.fmax.reduce, np.nanmin: np.fmin.reduce}

    def min_max(self, input, val_reduce_op, idx_reduce_op=None):
        return reductions(self, input, silent.get(val_reduce_op, val_reduce_op), idx_reduce_op)

    kind.create_masked_load, kind.create_masked_store = checked_load, checked_store
    kind.cast_impl = kind.create_fp_trunc = kind.create_fp_ext = rounded_cast
    kind.create_maxnumf = lambda self, left, right: self.binary_op(left, right, np.fmax)
    kind.create_minnumf = lambda self, left, right: self.binary_op(left, right, np.fmin)
    interpreter.ReduceOps.min_max = min_max
    interpreter._implicit_cvt = tagged
    interpreter.GridExecutor.__call__ = named_launch


class Traffic:
    """The addresses of every lane that was loaded or stored."""

    def __init__(self) -> None:
        self.lanes: dict[str, list[np.ndarray]] = {"load": [], "store": []}

    def take(self) -> tuple[np.ndarray, np.ndarray]:
        """Forget what has been counted, and return it: loads and stores."""
        taken, self.lanes = self.lanes, {"load": [], "store": []}
        none = np.zeros(0, np.int64)
        return np.concatenate([none, *taken["load"]]), np.concatenate([none, *taken["store"]])


@contextlib.contextmanager
def counted():
    """Count the lanes of every launch."""
    traffic = Traffic()
    bounds.observer = lambda access, lanes: traffic.lanes[access].append(lanes)
    try:
        yield traffic
    finally:
        bounds.observer = None
