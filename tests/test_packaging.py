"""What is built holds what it should, and works where the source tree is not; `make package` goes further."""

import importlib.util
import inspect
import os
import subprocess
import sys
import typing
from pathlib import Path

import distributions
import pytest
import torch
from batches import device_of

import fused_dm

ROOT = Path(__file__).parents[1]

PROGRAM = """
import sys, torch, fused_dm, fused_dm_kernels
for module in (fused_dm, fused_dm_kernels):
    assert module.__file__.startswith(sys.argv[1]), module.__file__
logits = torch.randn(8, 5, requires_grad=True)
target = torch.arange(8) % 5
fused_dm.dm_loss(logits, target, "dm:beta=8,lambd=0.5").backward()
device = "cuda" if torch.cuda.is_available() else "cpu"
fused_dm.dm_loss(logits.to(device), target.to(device), "dm:beta=8,lambd=0.5", impl="triton").backward()
print(fused_dm.__version__, logits.grad.abs().sum().item() > 0)
"""


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(importlib.util.find_spec("hatchling") is None, reason="the build backend is not installed here")
def test_wheel_works_elsewhere(tmp_path):
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(wheels), str(ROOT))
    (sdist,), (wheel,) = wheels.glob("*.tar.gz"), wheels.glob("*.whl")
    distributions.check_sdist(sdist)
    distributions.check_wheel(wheel)
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel))
    assert (site / "fused_dm" / "py.typed").exists()
    environment = {**os.environ, "PYTHONPATH": str(site)}
    out = run(sys.executable, "-W", "error", "-c", PROGRAM, str(site), cwd=tmp_path, env=environment)
    assert run(str(site / "bin" / "fused-dm"), "env", cwd=tmp_path, env=environment).startswith("fused_dm: ")
    assert out.split() == [fused_dm.__version__, "True"]


def test_import_needs_no_triton(tmp_path):
    """Without triton the CPU implementation and the reference work, and the kernels are refused by name."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as util\n"
        "find_spec = util.find_spec\n"
        "util.find_spec = lambda name, package=None: None if name == 'triton' else find_spec(name, package)\n"
    )
    program = (
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import torch, fused_dm\n"
        "assert fused_dm.available_impls() == ('cpu', 'reference')\n"
        "logits, target = torch.zeros(2, 3, requires_grad=True), torch.zeros(2, dtype=torch.int64)\n"
        "for impl in (None, 'cpu', 'reference'):\n"
        "    fused_dm.dm_loss(logits, target, 'cce', impl=impl).backward()\n"
        "try:\n"
        "    fused_dm.dm_loss(logits, target, 'cce', impl='triton')\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    paths = os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": paths, "TRITON_INTERPRET": "1"}
    out = run(sys.executable, "-c", program, cwd=tmp_path, env=environment)
    assert out.strip() == "impl='triton': triton is not installed; install it, or pass impl='reference'"


def test_page_commands_are_found():
    found = distributions.commands()
    assert "fused-dm edfs" in found
    assert any(command.startswith("fused-dm plot ") for command in found)
    assert len(distributions.python_blocks()) > 4


def test_types_of_dm_loss_know_every_argument():
    """mypy reads the overloads alone: a parameter that they lack does not exist for it."""
    whole = inspect.signature(fused_dm.dm_loss).parameters
    overloads = typing.get_overloads(fused_dm.dm_loss)
    assert len(overloads) == 3
    for overload in overloads:
        parameters = inspect.signature(overload).parameters
        assert list(parameters) == list(whole)
        for name in set(whole) - {"return_output"}:
            assert parameters[name] == whole[name], name


def test_a_call_searches_for_no_module(monkeypatch):
    """torch 2.11 cannot trace the search, and fullgraph compilation would fail there."""
    logits, target = torch.randn(4, 5, device=device_of("triton")), torch.arange(4, device=device_of("triton"))
    expected = fused_dm.dm_loss(logits, target, "cce", impl="triton")

    def search(name, package=None):
        raise AssertionError(f"searched for {name}")

    monkeypatch.setattr(importlib.util, "find_spec", search)
    assert torch.equal(fused_dm.dm_loss(logits, target, "cce", impl="triton"), expected)
