"""What a bug report needs to say about the machine: `environment_report`."""

import importlib.metadata
import os
import platform
import sys

import torch

from ._api import available_impls
from ._walk import walks

_PACKAGES = ("torch", "triton", "numpy")
_SWITCHES = ("TRITON_INTERPRET", "FUSED_DM_VALIDATE")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> dict[str, str]:
    if not torch.cuda.is_available():
        return {"GPU": "none that torch sees"}
    found = {}
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        found[f"GPU {index}"] = f"{device.name}, {memory:.0f} GiB, capability {device.major}.{device.minor}"
    return found


def environment() -> dict[str, str]:
    """The lines of the report by name."""
    from . import __version__

    lines = {"fused_dm": __version__, "python": f"{sys.version.split()[0]} on {platform.platform()}"}
    lines |= {package: _version(package) for package in _PACKAGES}
    built = torch.version.cuda or torch.version.hip
    lines["torch built for"] = f"{'CUDA' if torch.version.cuda else 'ROCm'} {built}" if built else "CPU"
    lines |= _gpus()
    lines["CPU threads"] = str(torch.get_num_threads())
    lines["CPU blocks"] = f"run by {walks().run_by}"
    lines["implementations"] = ", ".join(available_impls())
    return lines | {name: os.environ[name] for name in _SWITCHES if name in os.environ}


def environment_report() -> str:
    """The versions and devices that a bug report needs, one a line: what `fused-dm env` prints.

    Returns:
        Lines of "name: value".

    Example:
        >>> import fused_dm
        >>> fused_dm.environment_report().splitlines()[0] == f"fused_dm: {fused_dm.__version__}"
        True
    """
    return "\n".join(f"{name}: {value}" for name, value in environment().items())
