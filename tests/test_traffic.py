"""The memory traffic of each kernel, counted lane by lane in Triton's interpreter.

One pass over the logits is N V elements. A kernel reads or writes each element as often as stated here, and a number of
order N besides.
"""

import numpy as np
import pytest
import torch
from batches import GPU, make
from interpreter import counted

from fused_dm import dm_loss, edf, margin

pytestmark = pytest.mark.skipif(
    GPU, reason="counts the interpreter's loads and stores; kernels are compiled where there is a GPU"
)

DM = edf.DM(beta=8, lambd=0.5)
# (N, V): one tile of several rows; part of a block; a block and a rest; what registers hold of 16 bits; three blocks and a rest
SHAPES = [(70, 10), (3, 1000), (2, 4097), (2, 32768), (2, 3 * 16384 + 7)]


def times(addresses, tensor):
    """How often each element of a contiguous tensor was touched, and how many lanes touched anything else."""
    offsets = addresses - tensor.data_ptr()
    within = (offsets >= 0) & (offsets < tensor.numel() * tensor.element_size())
    counts = np.bincount(offsets[within] // tensor.element_size(), minlength=tensor.numel())
    return counts.reshape(tensor.shape), int((~within).sum())


def of_order_n(lanes, shape):
    # A row has a handful of numbers, which a program loads. Few rows have several programs each in the gradient's launch.
    rows, classes = shape
    return lanes <= 16 * (rows + 1) * (1 + classes // 4096)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sum_weight(shape, dtype):
    logits, target = make(*shape, dtype)
    leaf = logits.requires_grad_()
    once = np.ones(shape, int)
    with counted() as traffic:
        loss = dm_loss(leaf, target, DM, impl="triton")
        loads, stores = traffic.take()
        read, others = times(loads, logits)
        label = np.zeros(shape, int)
        label[np.arange(shape[0]), target] = 1
        assert np.array_equal(read, once + label)
        assert of_order_n(others, shape)
        assert of_order_n(stores.size, shape)
        loss.backward()
        loads, stores = traffic.take()
    read, others = times(loads, logits)
    written, rest = times(stores, leaf.grad)
    assert np.array_equal(read, once)
    assert np.array_equal(written, once)
    assert of_order_n(others, shape)
    assert rest == 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dloss", [1.0, 2.0])
@pytest.mark.parametrize(
    "options", [{"reduction": "mean"}, {"reduction": "sum", "normalizer": 5.0}], ids=["mean", "normalizer"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_single_fused_kernel(shape, dloss, options, dtype):
    from fused_dm import _triton

    logits, target = make(*shape, dtype)
    leaf = logits.requires_grad_()
    with counted() as traffic:
        loss = dm_loss(leaf, target, DM, impl="triton", **options)
        loads, stores = traffic.take()
        read, others = times(loads, logits)
        loss.backward(torch.tensor(dloss))
        later_loads, later_stores = traffic.take()
    written, rest = times(stores, leaf.grad)
    # The last block stays in registers, so a row of one block is read once.
    block = _triton.tile(shape[1], logits.element_size(), keep=True)["BLOCK_V"]
    in_registers = shape[1] if shape[1] <= block else shape[1] % block or block
    assert read.sum() == shape[0] * (2 * shape[1] - in_registers + 1)
    assert read.sum() <= 2 * shape[0] * shape[1] + shape[0]
    assert np.array_equal(written, np.ones(shape, int))
    assert of_order_n(others + rest, shape)
    # The backward does nothing for dloss = 1, and otherwise computes the gradient anew: one read, one write.
    again = 0 if dloss == 1 else 1
    assert (times(later_loads, logits)[0] == again).all()
    assert (times(later_stores, leaf.grad)[0] == again).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dloss", [1.0, 2.0])
@pytest.mark.parametrize("options", [{}, {"reduction": "mean"}], ids=["sum_weight", "mean"])
def test_in_place(shape, dloss, options):
    """As often as without it, and the writes go where the reads came from."""
    from fused_dm import _triton

    values, target = make(*shape)
    leaf = values.requires_grad_()
    logits = leaf * 1
    with counted() as traffic:
        loss = dm_loss(logits, target, DM, impl="triton", inplace=True, **options)
        loads, stores = traffic.take()
        loss.backward(torch.tensor(dloss))
        later_loads, later_stores = traffic.take()
    read, written = times(loads, logits)[0].sum(), times(stores, logits)[0]
    later_read, later_written = times(later_loads, logits)[0], times(later_stores, logits)[0]
    if options:
        block = _triton.tile(shape[1], logits.element_size(), keep=True)["BLOCK_V"]
        in_registers = shape[1] if shape[1] <= block else shape[1] % block or block
        assert read == shape[0] * (2 * shape[1] - in_registers + 1)
        assert (written == 1).all()
        # A gradient that is overwritten cannot be computed anew: it is multiplied.
        again = 0 if dloss == 1 else 1
    else:
        assert read == shape[0] * (shape[1] + 1)
        assert (written == 0).all()
        again = 1
    assert (later_read == again).all()
    assert (later_written == again).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_margin(shape):
    logits, target = make(*shape)
    leaf = logits.requires_grad_()
    with counted() as traffic:
        margins = margin(leaf, target, impl="triton")
        read, others = times(traffic.take()[0], logits)
        margins.sum().backward()
        loads, stores = traffic.take()
    assert read.sum() == shape[0] * (shape[1] + 1)
    assert of_order_n(others, shape)
    assert (times(loads, logits)[0] == 1).all()
    assert (times(stores, leaf.grad)[0] == 1).all()


@pytest.mark.parametrize("reduction", ["sum_weight", "mean"])
def test_rows_that_do_not_count_are_not_read_for_their_gradient(reduction):
    logits, target = make(70, 10)
    target[::3] = -100
    leaf = logits.requires_grad_()
    with counted() as traffic:
        loss = dm_loss(leaf, target, DM, impl="triton", reduction=reduction)
        first, _ = times(traffic.take()[0], logits)
        loss.backward(torch.tensor(2.0))
        loads, stores = traffic.take()
    assert (first[::3] == 0).all()
    assert (times(loads, logits)[0][::3] == 0).all()
    assert (times(stores, leaf.grad)[0] == 1).all()
