"""The kernels run in Triton's interpreter where there is no GPU; the same tests run on one where there is."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# The tests' tensors are small: threads cost more than they bring, above all where several test processes share two cores.
torch.set_num_threads(1)
