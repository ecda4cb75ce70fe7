"""Making the kernels launch in a way that the sizes would not have chosen, and counting what was launched."""

import contextlib
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fused_dm import _launch, _operators, _triton

# Views and allocations: no launch.
FREE = {
    "alias",
    "as_strided",
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "expand",
    "new_empty",
    "select",
    "slice",
    "squeeze",
    "t",
    "transpose",
    "unbind",
    "unsqueeze",
    "view",
    "_unsafe_view",
    "_reshape_alias",
}


def _one_block_each(way, sizes, device):
    launch = _launch.tiles(sizes, device)
    return launch._replace(way=way, span=launch.block_v)


def _small_blocks(sizes, device, way="tiles"):
    """Blocks so small that every row of the tests has several, each loaded before the one in front of it is worked on."""
    launch = _launch.tiles(sizes, device)
    block_v = 16
    span = -(-sizes.columns // block_v) * block_v
    return launch._replace(way=way, block_v=block_v, span=span, stream=True, lanes=1, stages=2)


def _row_in_blocks(sizes, device, way="tiles"):
    """A row alone in up to four blocks, its statistics in two lanes."""
    launch = _launch.tiles(sizes, device)
    if sizes.spatial:
        return launch._replace(way=way)
    block_v = max(16, 1 << (-(-sizes.columns // 4) - 1).bit_length())
    span = -(-sizes.columns // block_v) * block_v
    lanes = 2 if span > block_v else 1
    return launch._replace(way=way, block_n=1, block_v=block_v, span=span, stream=True, lanes=lanes)


def _keeping(launch, most):
    """Up to so many blocks of a row that is alone stay in registers."""
    return launch._replace(kept=min(most, launch.span // launch.block_v) if launch.lanes > 1 else 0)


# How each function of _launch answers, by the launch shape that is to be tried.
WAYS = {
    "tiles": {
        "forward": lambda sizes, device, capped=False: _launch.tiles(sizes, device),
        "margin": lambda sizes, device, capped=False: _launch.tiles(sizes, device),
        "fused": lambda sizes, device, capped=False: _launch.tiles(sizes, device),
    },
    "several tiles": {
        "forward": lambda sizes, device, capped=False: _launch.tiles(sizes, device)._replace(repeat=4),
        "totals": lambda programs: {"BLOCK": 2, "ONE_BLOCK": programs <= 2, "num_warps": 4},
        "divisor": lambda rows: {"BLOCK": 2, "num_warps": 4},
    },
    "alone": {
        "forward": lambda sizes, device, capped=False: _launch.tiles(sizes, device)._replace(way="alone"),
        "fused": lambda sizes, device, capped=False: _launch.tiles(sizes, device)._replace(way="alone"),
    },
    "split": {
        "forward": lambda sizes, device, capped=False: _one_block_each("split", sizes, device),
        "margin": lambda sizes, device, capped=False: _one_block_each("split", sizes, device),
        "fused": lambda sizes, device, capped=False: _one_block_each("split", sizes, device),
        "gradient": lambda sizes, device, whole_rows=False: _one_block_each("spans", sizes, device),
    },
    "small blocks": {
        "forward": lambda sizes, device, capped=False: _small_blocks(sizes, device),
        "fused": lambda sizes, device, capped=False: _small_blocks(sizes, device),
        "gradient": lambda sizes, device, whole_rows=False: _small_blocks(sizes, device, "spans"),
    },
    "rows in blocks": {
        "forward": lambda sizes, device, capped=False: _row_in_blocks(sizes, device),
        "margin": lambda sizes, device, capped=False: _row_in_blocks(sizes, device),
        "fused": lambda sizes, device, capped=False: _keeping(_row_in_blocks(sizes, device), 2),
        "gradient": lambda sizes, device, whole_rows=False: _row_in_blocks(sizes, device, "spans"),
    },
    "kept rows": {"fused": lambda sizes, device, capped=False: _keeping(_row_in_blocks(sizes, device), 4)},
}

# Those that differ in what is launched, and not within a kernel.
KINDS = ["tiles", "alone", "split", "small blocks"]


@contextlib.contextmanager
def forced(way):
    """Every launch within goes this way, whatever its sizes."""
    kept = {name: getattr(_launch, name) for name in WAYS[way]}
    for name, function in WAYS[way].items():
        setattr(_launch, name, function)
    _triton.forget_plans()
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(_launch, name, function)
        _triton.forget_plans()


class _Ops(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []
        self.sizes = []  # of what each operation makes, views and allocations left out

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, name = function._schema.name.split("::")
        # Within an operator of ours nothing is seen. The implementations are seen below; those that attach a gradient launch
        # nothing where they are called directly, as without a mode they are (tests/test_operators.py).
        if namespace != "fused_dm" and name not in FREE:
            self.names.append(name)
        result = function(*args, **(kwargs or {}))
        if namespace != "fused_dm" and name not in FREE and isinstance(result, torch.Tensor):
            self.sizes.append((name, result.numel()))
        return result


class Counted:
    """Names of the kernels, and of torch's operations that launch one, in no order."""

    def __init__(self):
        self.kernels = {}
        self.torch = []
        self.sizes = []

    @property
    def total(self):
        return sum(self.kernels.values()) + len(self.torch)


@contextlib.contextmanager
def counted_launches():
    """Count what is launched within: Triton's kernels in the interpreter, and torch's operations, those in operators too."""
    from interpreter import bounds
    from triton.runtime.interpreter import GridExecutor

    ops, found, launching, execute = _Ops(), Counted(), _operators._triton, GridExecutor.__call__

    def seen(function):
        def call(*args, **kwargs):
            with ops:
                return function(*args, **kwargs)

        return call

    def unseen(*args, **kwargs):
        # The interpreter copies the arguments, by operations of torch.
        with _disable_current_modes():
            return execute(*args, **kwargs)

    names = ("divisor", "margin", "loss_and_rows", "gradient", "multiply_", "received")
    _operators._triton = lambda: SimpleNamespace(**{name: seen(getattr(_triton, name)) for name in names})
    GridExecutor.__call__ = unseen
    before = dict(bounds.kernels)
    try:
        with ops:
            yield found
    finally:
        _operators._triton, GridExecutor.__call__ = launching, execute
        found.kernels = {k: n - before.get(k, 0) for k, n in bounds.kernels.items() if n > before.get(k, 0)}
        found.torch, found.sizes = ops.names, ops.sizes
