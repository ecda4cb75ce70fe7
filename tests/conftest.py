"""The kernels run in Triton's interpreter where there is no GPU, made strict; the same tests run on one where there is."""

import os

import torch

# Their keys know an operator by its name, so that a graph compiled before a change of the operator would be run after it.
os.environ["TORCHINDUCTOR_FX_GRAPH_CACHE"] = os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import interpreter

    interpreter.install()
# The tests' tensors are small: threads cost more than they bring, above all where several test processes share two cores.
torch.set_num_threads(1)
