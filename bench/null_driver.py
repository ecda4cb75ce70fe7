"""A Triton driver that compiles for a GPU and launches nothing, so that what a launch takes the host is seen without a GPU."""

from collections.abc import Callable
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import Benchmarker, GPUDriver
from triton.runtime import driver


class _Utils:
    """Numbers for handles of modules and functions, which nobody calls."""

    def __init__(self) -> None:
        self.loaded = 0

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills, the most threads."""
        self.loaded += 1
        return self.loaded, self.loaded, 32, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}

    def unload_module(self, module: int) -> None:
        pass


class NullDriver(GPUDriver):
    """For tensors on the CPU, whose pointers go nowhere. `launched` is called with the arguments of every launch."""

    def __init__(self, launched: Callable[..., None]) -> None:
        # Not that of GPUDriver, which looks for a GPU.
        self.utils = _Utils()
        self.launcher_cls = lambda source, metadata: launched
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0
        self.set_current_device = lambda device: None
        self.get_device_capability = lambda device: (9, 0)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Benchmarker:
        raise RuntimeError("expected a GPU to time kernels on, got a driver that launches nothing")

    @classmethod
    def is_active(cls) -> bool:
        return True


def install(launched: Callable[..., Any]) -> None:
    """Have every Triton launch of this process go to `launched`."""
    driver.set_active(NullDriver(launched))
