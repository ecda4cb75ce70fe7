"""The interpreter that the kernels are tested in: as strict as it says, and fast without another number."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from batches import GPU, make, run
from launches import KINDS, forced

from fused_dm import edf

pytestmark = pytest.mark.skipif(GPU, reason="kernels are compiled where there is a GPU")


@triton.jit
def copy_kernel(from_ptr, to_ptr, size, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(to_ptr + at, tl.load(from_ptr + at, mask=at < size), mask=at < size)


@triton.jit
def add_kernel(left_ptr, right_ptr, to_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    left, right = tl.load(left_ptr + at), tl.load(right_ptr + at)
    # The same operation on the same operand twice, and then on two.
    tl.store(to_ptr + at, (left + left) - (left + right))


def test_a_lane_outside_its_tensor_is_noticed():
    source, to = torch.arange(10.0), torch.zeros(10)
    copy_kernel[(1,)](source, to, 10, BLOCK=16)
    assert torch.equal(source, to)
    with pytest.raises(Exception, match="load of from_ptr outside it: 1 lanes, the first at element 10"):
        copy_kernel[(1,)](source, to, 11, BLOCK=16)
    with pytest.raises(Exception, match="store of to_ptr outside it: 2 lanes, the first at element 8"):
        copy_kernel[(1,)](source, to[:8], 10, BLOCK=16)


def test_the_gaps_between_rows_are_outside():
    memory = torch.arange(40.0).view(4, 10)
    with pytest.raises(Exception, match="load of from_ptr outside it: 3 lanes, the first at element 7"):
        copy_kernel[(1,)](memory[:, :7], torch.zeros(16), 16, BLOCK=16)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32], ids=str)
def test_integers_must_not_overflow(dtype):
    left, right, to = (torch.full((16,), value, dtype=dtype) for value in (2**30, 2**29, 0))
    add_kernel[(1,)](left - 1, right, to, BLOCK=16)
    assert torch.equal(to, left - 1 - right)
    if dtype == torch.int32:
        with pytest.raises(Exception, match="add of two int32: 2147483648 to 2147483648"):
            add_kernel[(1,)](left, right, to, BLOCK=16)
    else:
        add_kernel[(1,)](left, right, to, BLOCK=16)
        assert torch.equal(to, left - right)


def digest():
    """Of everything that kernels of every kind return for some batches."""
    found = hashlib.sha256()
    for number, way in enumerate(KINDS):
        for dtype in (torch.bfloat16, torch.float64):
            logits, target = make(5, 37, dtype, seed=number, ignored=0.2)
            options = {"sample_weight": torch.linspace(-1, 2, 5), "weight": torch.linspace(0, 2, 37), "softcap": 20.0}
            options["reduction"] = "mean" if number % 2 else "sum_weight"
            with forced(way):
                output, dlogits = run("triton", logits, target, edf.DM(beta=8, lambd=0.5), **options)
            for tensor in (output.loss, output.example_weight, output.target_prob, dlogits):
                found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def test_the_fast_interpreter_gives_the_numbers_of_tritons():
    """In a process of its own, where operations go through all of Triton's checks and conversions each time."""
    tests = Path(__file__).parent
    places = [str(tests), str(tests.parent), str(tests.parent / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, places))}
    program = "import lean, interpreter; lean.install = lambda: None; interpreter.install(); "
    program += "import test_interpreter; print(test_interpreter.digest())"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == digest()
