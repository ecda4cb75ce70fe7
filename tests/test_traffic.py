"""The memory traffic of each kernel in each launch shape, counted lane by lane in Triton's interpreter.

One pass over the logits is N V elements. A kernel reads or writes each element as often as stated here, and a number of
order N besides.
"""

import contextlib

import numpy as np
import pytest
import torch
from batches import GPU, make
from interpreter import counted
from launches import KINDS, WAYS, forced
from test_layouts import laid_out

from fused_dm import _launch, _triton, dm_loss, edf, margin

pytestmark = pytest.mark.skipif(
    GPU, reason="counts the interpreter's loads and stores; kernels are compiled where there is a GPU"
)

DM = edf.DM(beta=8, lambd=0.5)
# (N, V): one tile of several rows; part of a block; a block and a rest; what registers hold of 16 bits; three blocks and a rest
SHAPES = [(70, 10), (3, 1000), (2, 4097), (2, 32768), (2, 3 * 16384 + 7)]
# Whether the sizes choose the launch shape, or one is forced: small blocks only where they are not thousands, and rows alone or
# in tiles by the dozen only where they are few.
CASES = [(None, shape) for shape in SHAPES]
CASES += [(way, shape) for way in ("tiles", "alone", "split") for shape in SHAPES]
CASES += [("several tiles", (70, 10)), ("small blocks", (70, 10)), ("small blocks", (3, 1000)), ("rows in blocks", (3, 1000))]
CASES += [("rows in blocks", (2, 4097)), ("kept rows", (3, 1000))]
# Images whose positions make whole 16 bytes, and some that do not.
IMAGES = ["images", "odd images", "blocks of classes", "all but the last position", "every other class"]


def going(way):
    return forced(way) if way else contextlib.nullcontext()


def times(addresses, tensor):
    """How often each element of a tensor was touched, and how many lanes touched anything else."""
    strides = torch.tensor([s for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1])
    sizes = torch.tensor([n for n in tensor.shape if n > 1])
    span = 1 + int(((sizes - 1) * strides).sum())
    offsets = addresses - tensor.data_ptr()
    within = (offsets >= 0) & (offsets < span * tensor.element_size())
    counts = np.bincount(offsets[within] // tensor.element_size(), minlength=span)
    counts = torch.from_numpy(counts).as_strided(tensor.shape, tensor.stride())
    return counts.numpy(), int((~within).sum())


def of_order_n(lanes, rows, classes, block=4096):
    # A row has a handful of numbers, which a program loads. Few rows have several programs each, and where 16 bytes hold
    # several rows, each loads the labels of all of them.
    return lanes <= 32 * (rows + 1) * (1 + classes // block)


def read_again(way, logits):
    """Elements that the single fused kernel, or what goes in its place, reads a second time, of all rows."""
    layout, (rows, classes) = _triton._of(logits, None).layout(), logits.shape
    with going(way):
        launch = _launch.fused(layout.sizes, _launch.INTERPRETER)
    if launch.way in ("alone", "split"):
        return rows * classes
    if launch.span == launch.block_v:
        return 0
    # The first blocks stay in registers, and so do the edges of a row.
    kept = launch.kept * launch.block_v
    if layout.layout != "shifted":
        return rows * max(0, classes - kept)
    shift = np.arange(rows) * classes % layout.unit
    begin, end = -(-shift // layout.unit) * layout.unit, (shift + classes) // layout.unit * layout.unit
    return int(np.maximum(0, end - np.maximum(begin, kept)).sum())


@pytest.mark.parametrize(("way", "shape"), CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sum_weight(way, shape, dtype):
    logits, target = make(*shape, dtype)
    leaf = logits.requires_grad_()
    once = np.ones(shape, int)
    with going(way), counted() as traffic:
        loss = dm_loss(leaf, target, DM, impl="triton")
        loads, stores = traffic.take()
        read, others = times(loads, logits)
        label = np.zeros(shape, int)
        label[np.arange(shape[0]), target] = 1
        assert np.array_equal(read, once + label)
        assert of_order_n(others, *shape)
        assert of_order_n(stores.size, *shape)
        loss.backward()
        loads, stores = traffic.take()
    read, others = times(loads, logits)
    written, rest = times(stores, leaf.grad)
    assert np.array_equal(read, once)
    assert np.array_equal(written, once)
    assert of_order_n(others, *shape)
    assert rest == 0


@pytest.mark.parametrize(("way", "shape"), CASES, ids=str)
@pytest.mark.parametrize("dloss", [1.0, 2.0])
@pytest.mark.parametrize(
    "options", [{"reduction": "mean"}, {"reduction": "sum", "normalizer": 5.0}], ids=["mean", "normalizer"]
)
def test_single_fused_kernel(way, shape, dloss, options):
    dtype = torch.bfloat16 if dloss == 1 else torch.float32
    logits, target = make(*shape, dtype)
    leaf = logits.requires_grad_()
    with going(way), counted() as traffic:
        loss = dm_loss(leaf, target, DM, impl="triton", **options)
        loads, stores = traffic.take()
        read, others = times(loads, logits)
        loss.backward(torch.tensor(dloss))
        later_loads, later_stores = traffic.take()
    written, rest = times(stores, leaf.grad)
    assert read.sum() == shape[0] * (shape[1] + 1) + read_again(way, logits)
    assert read.max() <= 3
    assert np.array_equal(written, np.ones(shape, int))
    assert of_order_n(others + rest, *shape)
    # The backward does nothing for dloss = 1, and otherwise computes the gradient anew: one read, one write.
    again = 0 if dloss == 1 else 1
    assert (times(later_loads, logits)[0] == again).all()
    assert (times(later_stores, leaf.grad)[0] == again).all()


def test_long_rows_are_read_twice_at_most_and_short_ones_once():
    """What the sizes choose where rows are many: a row of 8192 classes stays in registers, in 16 bits one of 32768."""
    for classes, itemsize, share in (
        (8192, 2, 0), (8192, 4, 0), (8200, 2, 0), (32768, 2, 0), (8200, 4, 1 / 3), (50304, 2, 6 / 13), (128256, 2, 6 / 8),
    ):  # fmt: skip
        sizes = _launch.Sizes(1, 8192, classes, itemsize)
        launch = _launch.fused(sizes, _launch.H100)
        assert launch.way == "tiles"
        blocks = -(-classes // launch.block_v)
        assert blocks - (launch.kept if blocks > 1 else 1) == blocks * share


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dloss", [1.0, 2.0])
@pytest.mark.parametrize("options", [{}, {"reduction": "mean"}], ids=["sum_weight", "mean"])
@pytest.mark.parametrize("way", [None, "tiles", "split"])
def test_in_place(way, shape, dloss, options):
    """As often as without it, and the writes go where the reads came from."""
    values, target = make(*shape)
    leaf = values.requires_grad_()
    logits = leaf * 1
    with going(way), counted() as traffic:
        loss = dm_loss(logits, target, DM, impl="triton", inplace=True, **options)
        loads, stores = traffic.take()
        loss.backward(torch.tensor(dloss))
        later_loads, later_stores = traffic.take()
    read, written = times(loads, logits)[0].sum(), times(stores, logits)[0]
    later_read, later_written = times(later_loads, logits)[0], times(later_stores, logits)[0]
    if options:
        assert read == shape[0] * (shape[1] + 1) + read_again(way, logits)
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
@pytest.mark.parametrize("way", [None, "tiles", "split"])
def test_margin(way, shape):
    logits, target = make(*shape)
    leaf = logits.requires_grad_()
    with going(way), counted() as traffic:
        margins = margin(leaf, target, impl="triton")
        read, others = times(traffic.take()[0], logits)
        margins.sum().backward()
        loads, stores = traffic.take()
    assert read.sum() == shape[0] * (shape[1] + 1)
    assert of_order_n(others, *shape)
    assert (times(loads, logits)[0] == 1).all()
    assert (times(stores, leaf.grad)[0] == 1).all()


@pytest.mark.parametrize("layout", IMAGES)
@pytest.mark.parametrize("way", [None, *KINDS])
@pytest.mark.parametrize("inplace", [False, True])
def test_images(layout, way, inplace):
    """(N, V, d1, ...): as rows, and no lane touches what lies between."""
    logits, _, spatial, where = laid_out(layout, torch.bfloat16, seed=1)
    where = where.clamp(min=0)
    if inplace:
        # No reference to the elements between: the tensor with the same strides is computed.
        buffer = torch.zeros(1 + sum((n - 1) * s for n, s in zip(spatial.shape, spatial.stride(), strict=True)))
        leaf = buffer.bfloat16().requires_grad_()
        given = (leaf * 1).as_strided(spatial.shape, spatial.stride())
        with torch.no_grad():
            given.copy_(spatial)
    else:
        leaf = given = spatial.detach().requires_grad_()
    rows, classes = logits.shape
    with going(way), counted() as traffic:
        loss = dm_loss(given, where, DM, impl="triton", inplace=inplace)
        loads, stores = traffic.take()
        (dlogits,) = torch.autograd.grad(loss, leaf)
        later_loads, later_stores = traffic.take()
    read, others = times(loads, given)
    assert read.sum() == rows * (classes + 1)
    assert read.min() == 1
    assert of_order_n(others, rows, classes, block=128)
    assert of_order_n(stores.size, rows, classes, block=128)
    assert (times(later_loads, given)[0] == 1).all()
    written = given if inplace else dlogits
    assert (times(later_stores, written)[0] == 1).all()
    assert times(later_stores, written)[1] == 0


def uncounted(target, sample_weight):
    return (target == -100) | (sample_weight == 0)


@pytest.mark.parametrize("options", [{}, {"reduction": "mean"}, {"reduction": "none"}, {"inplace": True}], ids=str)
@pytest.mark.parametrize("way", [None, *WAYS])
def test_rows_that_do_not_count_are_not_read_for_their_gradient(options, way):
    """Neither ignored rows nor those with a weight of 0; ignored rows are not read at all."""
    rows = 30 if way in ("small blocks", "rows in blocks", "kept rows") else 70
    logits, target = make(rows, 200)
    target[::3] = -100
    sample_weight = torch.linspace(-1, 1, rows)
    sample_weight[::5] = 0
    nothing = uncounted(target, sample_weight)
    leaf = logits.requires_grad_()
    given = leaf * 1
    with going(way), counted() as traffic:
        loss = dm_loss(given, target, DM, impl="triton", sample_weight=sample_weight, **options)
        first, _ = times(traffic.take()[0], given)
        (dlogits,) = torch.autograd.grad(loss.sum(), leaf if options.get("inplace") else given, torch.tensor(2.0))
        loads, stores = traffic.take()
    assert (first[target == -100] == 0).all()
    # What is read once more than by the forward pass is read for the gradient.
    assert (first[nothing] <= 1 + np.eye(200, dtype=int)[target[nothing].clamp(min=0)]).all()
    assert (times(loads, given)[0][nothing] == 0).all()
    assert (times(stores, given if options.get("inplace") else dlogits)[0] == 1).all()
    assert (dlogits[nothing] == 0).all()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layout", ["images", "odd images"])
@pytest.mark.parametrize("by", ["label", "weight"])
def test_positions_that_do_not_count_are_not_read_for_their_gradient(layout, by, inplace):
    """Where 16 bytes hold several positions, they are not read if none of those counts."""
    _, _, spatial, where = laid_out(layout, torch.bfloat16, seed=2)
    where = where.clamp(min=0)
    flat = where.reshape(where.shape[0], -1)
    counts = torch.zeros_like(flat, dtype=torch.bool)
    counts[:, 3:5] = counts[1:, 21:22] = True
    weight = torch.where(counts, 1.0, 0.0) if by == "weight" else torch.ones_like(counts, dtype=torch.float32)
    if by == "label":
        flat = torch.where(counts, flat, -100)
    leaf = spatial.detach().requires_grad_()
    given = leaf * 1
    options = {"sample_weight": weight.reshape(where.shape), "inplace": inplace}
    with counted() as traffic:
        loss = dm_loss(given, flat.reshape(where.shape), DM, impl="triton", **options)
        first, _ = times(traffic.take()[0], given)
        (dlogits,) = torch.autograd.grad(loss, leaf if inplace else given)
        loads, stores = traffic.take()
    unit = 8 if layout == "images" else 1
    words = counts.reshape(counts.shape[0], -1, unit).any(2, keepdim=True).expand(-1, -1, unit).reshape(counts.shape)
    wanted = words.reshape(where.shape)[:, None].expand(spatial.shape).numpy()
    assert np.array_equal(times(loads, given)[0], wanted.astype(int))
    if by == "label":
        assert (first[~wanted] == 0).all()
    assert (times(stores, given if inplace else dlogits)[0] == 1).all()
    assert (dlogits.movedim(1, -1)[~counts.reshape(where.shape)] == 0).all()
