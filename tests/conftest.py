"""The kernels run in Triton's interpreter where there is no GPU, made strict; the same tests run on one where there is."""

import os

import pytest
import torch

# Their keys know an operator by its name, so that a graph compiled before a change of the operator would be run after it.
os.environ["TORCHINDUCTOR_FX_GRAPH_CACHE"] = os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import interpreter

    interpreter.install()
else:
    # Inductor would start a process a core in each of the test processes.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# The tests' tensors are small: threads cost more than they bring, above all where several test processes share two cores.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def give_back_memory():
    """Several test processes share a GPU, and torch would keep what a large test took from the others."""
    yield
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > 1 << 30:
        torch.cuda.empty_cache()
