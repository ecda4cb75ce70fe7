"""Logits in any layout are read, and their gradient written, where they lie: no copy, no transposition."""

import pytest
import torch
from batches import GPU, device_of, make, run
from launches import KINDS, counted_launches, forced
from tolerance import check, expected

from fused_dm import dm_loss, edf, margin

DM = edf.DM(beta=8, lambd=0.5)
REDUCTIONS = ["sum_weight", "mean", "none"]

# Of what `make` gives as (images * positions, V), the logits (images, V, *spatial): how they lie in memory.
LAYOUTS = {
    # positions that 16 bytes hold a whole number of, more than a tile; and fewer
    "images": ((2, 11, 9, 16), lambda x: x.contiguous()),
    "small images": ((3, 40, 16), lambda x: x.contiguous()),
    # positions that no vector divides
    "odd images": ((2, 21, 7, 5), lambda x: x.contiguous()),
    "two positions": ((9, 21, 2), lambda x: x.contiguous()),
    "one position": ((9, 21, 1), lambda x: x.contiguous()),
    "channels last": ((2, 11, 6, 5), lambda x: x.contiguous(memory_format=torch.channels_last)),
    "blocks of classes": ((2, 300, 24), lambda x: x.contiguous()),
    # rows with room between them, as logits of which the last position is left out have
    "all but the last position": ((3, 50, 6), lambda x: within(x.transpose(1, 2), 1).transpose(1, 2)),
    "positions first": ((3, 50, 6), lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0)),
    "every other class": ((2, 20, 16), lambda x: within(x[:, :, None].expand(-1, -1, 2, -1), 2)[:, :, 0]),
    "classes first": ((2, 20, 16), lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)),
    # no single dimension: copied, as it would be by anyone
    "a part of an image": ((2, 11, 4, 5), lambda x: within(x, 3)),
}


def within(tensor, axis):
    """The same values in a larger tensor, two more along the axis."""
    shape = list(tensor.shape)
    shape[axis] += 2
    return tensor.new_zeros(shape).narrow(axis, 0, tensor.shape[axis]).copy_(tensor)


def laid_out(name, dtype, **options):
    shape, lay = LAYOUTS[name]
    images, classes, *spatial = shape
    rows = images * torch.Size(spatial).numel()
    logits, target = make(rows, classes, dtype, ignored=0.3, **options)
    moved = logits.reshape(images, *spatial, classes).movedim(-1, 1).to(device_of("triton"))
    return logits, target, lay(moved), target.reshape(images, *spatial).to(device_of("triton"))


def flat(output):
    return output._replace(
        loss=output.loss.flatten() if output.loss.dim() else output.loss,
        example_weight=output.example_weight.flatten(),
        target_prob=output.target_prob.flatten(),
        correct=output.correct.flatten(),
    )


def as_rows(dlogits):
    return dlogits.movedim(1, -1).reshape(-1, dlogits.shape[1])


@pytest.mark.parametrize("way", [None, *KINDS])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_every_way(layout, reduction, way):
    for dtype in (torch.float32, torch.bfloat16):
        logits, target, spatial, where = laid_out(layout, dtype)
        leaf = spatial.detach().requires_grad_()
        weight = torch.linspace(0, 2, logits.shape[0]).roll(5)
        options = {"reduction": reduction, "sample_weight": weight}
        given = {**options, "sample_weight": weight.reshape(where.shape).to(where.device)}

        def run():
            output = dm_loss(leaf, where, DM, impl="triton", return_output=True, **given)  # noqa: B023
            output.loss.sum().backward()
            return output

        if way is None:
            output = run()
        else:
            with forced(way):
                output = run()
        assert leaf.grad.shape == spatial.shape
        check(flat(output), as_rows(leaf.grad), expected(logits, target, DM, **options))


@pytest.mark.parametrize("dloss", [1.0, 2.0])
@pytest.mark.parametrize("reduction", ["sum_weight", "mean"])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "a part of an image"])
def test_every_layout_in_place(layout, reduction, dloss):
    """Nothing else of the memory in which the logits lie is touched."""
    logits, target, spatial, where = laid_out(layout, torch.float32)
    storage = spatial.as_strided((spatial.untyped_storage().nbytes() // 4,), (1,), 0)
    mine = torch.zeros_like(storage, dtype=torch.bool)
    mine.as_strided(spatial.shape, spatial.stride()).fill_(True)
    before = storage.clone()
    leaf = storage.clone().requires_grad_()
    computed = leaf * 1
    view = computed.as_strided(spatial.shape, spatial.stride())
    output = dm_loss(view, where, DM, impl="triton", inplace=True, return_output=True, reduction=reduction)
    output.loss.backward(torch.full_like(output.loss, dloss))
    truth = expected(logits, target, DM, torch.tensor(dloss), reduction=reduction)
    check(flat(output), as_rows(leaf.grad.as_strided(spatial.shape, spatial.stride())), truth)
    assert torch.equal(computed.detach()[mine], leaf.grad[mine])
    assert torch.equal(computed.detach()[~mine], before[~mine])


@pytest.mark.skipif(GPU, reason="counts what the interpreter launches")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "a part of an image"])
def test_no_copy_and_the_gradient_lies_as_the_logits_do(layout, reduction):
    """And as closely as it can without beginning otherwise in 16 bytes: images of 6 x 50 elements where there are 8 x 50."""
    _, _, spatial, where = laid_out(layout, torch.bfloat16)
    leaf = spatial.detach().requires_grad_()
    with counted_launches() as found:
        loss = dm_loss(leaf, where, DM, impl="triton", reduction=reduction)
        (dlogits,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss))
        margin(leaf, where, impl="triton")
    # torch's own operations are of order N.
    assert not [name for name, size in found.sizes if size >= leaf.numel()]
    lies = (304, 1, 50) if layout == "all but the last position" else torch.empty_like(spatial).stride()
    assert dlogits.stride() == lies


@pytest.mark.parametrize("layout", ["images", "odd images"])
def test_layouts_agree_with_rows_and_repeat_to_the_bit(layout):
    logits, target, spatial, where = laid_out(layout, torch.float32)
    values = []
    for _ in range(2):
        leaf = spatial.detach().requires_grad_()
        loss = dm_loss(leaf, where, DM, impl="triton")
        loss.backward()
        values.append((loss.detach(), leaf.grad))
    assert torch.equal(values[0][0], values[1][0])
    assert torch.equal(values[0][1], values[1][1])
    check_rows = dm_loss(logits.to(where.device), target.to(where.device), DM, impl="triton")
    torch.testing.assert_close(values[0][0], check_rows)


@pytest.mark.parametrize("reduction", ["sum_weight", "mean"])
@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((2, 16, 8), (2**31 + 8, 8, 1)),  # images far apart
        ((1, 3, 8), (0, 2**30 + 8, 1)),  # classes
        ((1, 3, 5), (0, 2**30 + 1, 1)),  # and in no units of 16 bytes
        ((1, 16, 2), (0, 1, 2**31 + 3)),  # rows
    ],
    ids=str,
)
def test_offsets_beyond_32_bits(shape, strides, reduction):
    """Memory that is not touched takes no place."""
    images, classes, positions = shape
    logits, target = make(images * positions, classes, torch.bfloat16)
    size = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    buffer = torch.empty(size, dtype=torch.bfloat16, device=device_of("triton"))
    view = buffer.as_strided(shape, strides)
    view.copy_(logits.reshape(images, positions, classes).transpose(1, 2))
    leaf = view.detach().requires_grad_()
    where = target.reshape(images, positions).to(leaf.device)
    output = dm_loss(leaf, where, DM, impl="triton", reduction=reduction, return_output=True)
    (dlogits,) = torch.autograd.grad(output.loss, leaf)
    check(flat(output), as_rows(dlogits), expected(logits, target, DM, reduction=reduction))


@pytest.mark.parametrize("classes", [1, 7, 31, 50, 1001, 4099])
@pytest.mark.parametrize("begin", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_odd_classes_unaligned_rows_and_labels(classes, begin, dtype):
    """Rows that start anywhere, labels that do too, in every dtype; the bits do not depend on where."""
    logits, target = make(5, classes, dtype, ignored=0.2)
    wide = torch.zeros(5, classes + 6, dtype=dtype, device=device_of("triton"))
    rows = wide[:, begin : begin + classes].copy_(logits)
    labels = torch.zeros(2 * 5 + 3, dtype=torch.int64, device=rows.device)[begin::2][:5].copy_(target)
    for reduction in ("sum_weight", "mean"):
        leaf = rows.detach().requires_grad_()
        output = dm_loss(leaf, labels, DM, impl="triton", reduction=reduction, return_output=True)
        (dlogits,) = torch.autograd.grad(output.loss, leaf)
        check(output, dlogits, expected(logits, target, DM, reduction=reduction))


@pytest.mark.parametrize("reduction", ["sum_weight", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("anything", [torch.nan, torch.inf, 1e38])
def test_positions_beside_those_that_count_may_hold_anything(anything, dtype, reduction):
    """An ignored position is read where its neighbours in 16 bytes are, and changes nothing."""
    logits = torch.randn(2, 7, 24).to(dtype)
    target = torch.randint(7, (2, 24))
    target[:, ::3] = -100
    clean, gradient = run("triton", logits, target, DM, reduction=reduction)
    logits.movedim(1, -1)[target == -100] = anything
    output, dlogits = run("triton", logits, target, DM, reduction=reduction)
    assert torch.equal(output.loss, clean.loss)
    assert torch.equal(dlogits, gradient)
