"""Rows that begin anywhere, read and written 16 bytes at a time but for their edges."""

import pytest
import torch
from batches import device_of, make, run
from launches import WAYS, forced
from tolerance import check, expected

from fused_dm import _launch, _triton, dm_loss, edf, margin

DM = edf.DM(beta=8, lambd=0.5)
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
REDUCTIONS = ["sum_weight", "mean"]
# As many rows as there are beginnings in bf16, and one more.
ROWS = 9
# Less than 16 bytes; 16 bytes and an element less or more; a block of the smallest size and an element less or more; several.
CLASSES = [3, 7, 8, 9, 15, 16, 17, 33, 100]


@pytest.fixture(autouse=True)
def rows_of_any_length(monkeypatch):
    """Short rows are read so too, which spares the interpreter's time."""
    monkeypatch.setattr(_launch, "SHIFTED", 0)
    _triton.forget_plans()
    yield
    _triton.forget_plans()


def lying(logits, apart=1, begin=0):
    """The same rows, `apart` elements between them, in memory that is nan elsewhere; the first begins at `begin`."""
    rows, classes = logits.shape
    stride = classes + apart
    memory = torch.full((begin + rows * stride,), torch.nan, dtype=logits.dtype, device=device_of("triton"))
    view = memory.as_strided(logits.shape, (stride, 1), begin)
    view.copy_(logits)
    return view, memory


def is_shifted(logits, out=None):
    return _triton._of(logits, None, out).layout().layout == "shifted"


@pytest.mark.parametrize("way", [None, *WAYS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_way_and_length(way, dtype, reduction):
    shifted = 0
    for classes in CLASSES:
        logits, target = make(ROWS, classes, dtype, seed=classes, ignored=0.2)
        truth = expected(logits, target, DM, torch.tensor(1.5), reduction=reduction)
        given = logits.to(device_of("triton"))
        shifted += is_shifted(given, given)
        if way is None:
            found = run("triton", given, target, DM, torch.tensor(1.5), reduction=reduction)
        else:
            with forced(way):
                found = run("triton", given, target, DM, torch.tensor(1.5), reduction=reduction)
        check(*found, truth)
    assert shifted == sum(classes * dtype.itemsize % 16 != 0 for classes in CLASSES)


@pytest.mark.parametrize("apart", [1, 7, 13])
@pytest.mark.parametrize("begin", [0, 1, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_apart(apart, begin, dtype):
    """The gradient's rows begin as theirs do, with less than 16 bytes between them."""
    for classes in (16, 17, 40):
        logits, target = make(ROWS, classes, dtype, seed=apart, ignored=0.2)
        view, _ = lying(logits, apart, begin)
        anywhere = (classes + apart) % (16 // dtype.itemsize) != 0 or classes % (16 // dtype.itemsize) != 0
        # 16-bit logits that begin at an odd element go one at a time.
        assert is_shifted(view) == (anywhere and not (dtype.itemsize == 2 and begin % 2))
        for reduction in REDUCTIONS:
            truth = expected(logits, target, DM, reduction=reduction)
            leaf = view.detach().requires_grad_()
            output = dm_loss(leaf, target.to(leaf.device), DM, impl="triton", reduction=reduction, return_output=True)
            (dlogits,) = torch.autograd.grad(output.loss, leaf)
            check(output, dlogits, truth)
            assert is_shifted(view, dlogits) == is_shifted(view)
            assert 0 <= dlogits.stride(0) - classes < 16 // dtype.itemsize
            assert (dlogits.stride(0) - view.stride(0)) * dtype.itemsize % 16 == 0
        plain = margin(logits.to(view.device), target.to(view.device), impl="triton")
        torch.testing.assert_close(margin(view, target.to(view.device), impl="triton"), plain, equal_nan=True)


@pytest.mark.parametrize("way", [None, *WAYS])
@pytest.mark.parametrize("dloss", [1.0, 2.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_in_place_nothing_else_is_touched(way, dloss, reduction):
    for classes, apart, dtype in (
        (33, 0, torch.bfloat16),
        (20, 3, torch.bfloat16),
        (17, 2, torch.float32),
        (5, 0, torch.bfloat16),
    ):
        values, target = make(ROWS, classes, dtype, seed=5, ignored=0.3)
        _, memory = lying(values, apart, 2)
        leaf = memory.requires_grad_()
        computed = leaf * 1
        view = computed.as_strided(values.shape, (classes + apart, 1), 2)
        assert is_shifted(view, view)
        where, options = (
            target.to(leaf.device),
            {"reduction": reduction, "inplace": True, "return_output": True, "impl": "triton"},
        )
        if way is None:
            output = dm_loss(view, where, DM, **options)
            output.loss.backward(torch.full_like(output.loss, dloss))
        else:
            with forced(way):
                output = dm_loss(view, where, DM, **options)
                output.loss.backward(torch.full_like(output.loss, dloss))
        truth = expected(values, target, DM, torch.tensor(dloss), reduction=reduction)
        dlogits = computed.detach().as_strided(values.shape, (classes + apart, 1), 2)
        check(output, dlogits.clone(), truth)
        dlogits.fill_(torch.nan)
        assert computed.isnan().all()


@pytest.mark.parametrize("way", [None, "tiles", "split", "small blocks", "rows in blocks"])
@pytest.mark.parametrize("reduction", [*REDUCTIONS, "none"])
@pytest.mark.parametrize("at", [0, 1, 2, 20, 35, 36])
def test_label_and_extremes_at_the_edges(way, reduction, at):
    """The label, the only finite logit, or nan, in 16 bytes that are not all the row's."""
    logits, _ = make(ROWS, 37, torch.bfloat16, seed=at)
    target = torch.full((ROWS,), at)
    logits[2] = -torch.inf
    logits[2, (at + 1) % 37] = 3.0
    logits[3] = -torch.inf
    logits[3, at] = 3.0
    logits[5, (at + 1) % 37] = torch.nan
    target[5] = -100
    options = {"reduction": reduction}
    truth = expected(logits, target, DM, **options)

    def found():
        return run("triton", logits, target, DM, **options)

    if way is None:
        check(*found(), truth)
    else:
        with forced(way):
            check(*found(), truth)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's numpy: inf - inf
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("anything", [torch.nan, torch.inf])
@pytest.mark.parametrize("options", [{}, {"softcap": 20.0}], ids=str)
def test_edges_of_a_row_that_does_not_count_may_hold_anything(anything, reduction, options):
    logits, target = make(ROWS, 37, torch.bfloat16, seed=1)
    weight = torch.ones(ROWS)
    weight[4] = 0
    options = options | {"reduction": reduction, "sample_weight": weight}
    clean, gradient = run("triton", logits, target, edf.CCE(), **options)
    logits[4, [0, 36]] = anything
    output, dlogits = run("triton", logits, target, edf.CCE(), **options)
    assert (dlogits[4] == 0).all()
    others = torch.arange(ROWS) != 4
    if not output.loss.isnan():
        assert torch.equal(output.loss, clean.loss)
        assert torch.equal(dlogits[others], gradient[others])


@pytest.mark.parametrize("way", [None, "tiles", "split", "small blocks", "rows in blocks"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", [{"softcap": 20.0}, {"logit_scale": 0.5}], ids=str)
def test_transformed_logits(way, reduction, options):
    for classes in (5, 37):
        logits, target = make(ROWS, classes, torch.bfloat16, seed=2, ignored=0.2)
        truth = expected(logits, target, DM, reduction=reduction, **options)
        if way is None:
            found = run("triton", logits, target, DM, reduction=reduction, **options)
        else:
            with forced(way):
                found = run("triton", logits, target, DM, reduction=reduction, **options)
        check(*found, truth)


def test_images_of_rows_that_begin_anywhere():
    """(images, positions, V) in memory, channels last, with a gap between images."""
    logits, target = make(12, 37, torch.bfloat16, seed=3, ignored=0.2)
    memory = torch.full((3, 5, 37), torch.nan, dtype=torch.bfloat16, device=device_of("triton"))
    memory[:, :4] = logits.reshape(3, 4, 37)
    leaf = memory[:, :4].transpose(1, 2).detach().requires_grad_()
    assert is_shifted(leaf)
    for reduction in REDUCTIONS:
        where = target.reshape(3, 4).to(leaf.device)
        output = dm_loss(leaf, where, DM, impl="triton", reduction=reduction, return_output=True)
        (dlogits,) = torch.autograd.grad(output.loss, leaf)
        # Rows of 37 without room between them, and images of 4 with as much as lets them begin as those of 5 do.
        assert is_shifted(leaf, dlogits)
        assert dlogits.stride() == (4 * 37 + 5, 1, 37)
        names = ("example_weight", "target_prob", "correct")
        flat = output._replace(**{name: getattr(output, name).flatten() for name in names})
        check(flat, dlogits.transpose(1, 2).reshape(12, 37), expected(logits, target, DM, reduction=reduction))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_offsets_beyond_32_bits(reduction):
    """Memory that is not touched takes no place."""
    logits, target = make(4, 37, torch.bfloat16)
    stride = 2**30 + 1
    memory = torch.empty(3 * stride + 37, dtype=torch.bfloat16, device=device_of("triton"))
    view = memory.as_strided((4, 37), (stride, 1))
    view.copy_(logits)
    assert is_shifted(view)
    leaf = view.detach().requires_grad_()
    output = dm_loss(leaf, target.to(leaf.device), DM, impl="triton", reduction=reduction, return_output=True)
    (dlogits,) = torch.autograd.grad(output.loss, leaf)
    check(output, dlogits, expected(logits, target, DM, reduction=reduction))


def test_what_is_chosen(monkeypatch):
    """16 bytes at a time where they divide rows, or where rows are not very short and lie as their gradient does."""
    monkeypatch.undo()

    def layout(classes, stride, out=None):
        strides = {"logits": (stride, 1)} | ({} if out is None else {"dlogits": (out, 1)})
        found = _triton._Layout((16, classes), 2, **strides)
        return found.layout, found.unit, found.sizes.columns

    assert layout(50256, 50256) == ("rows", 8, 50256)
    assert layout(50257, 50257) == ("shifted", 8, 50264)
    assert layout(50257, 50304) == ("shifted", 8, 50264)
    assert layout(50256, 50257) == ("shifted", 8, 50263)
    assert layout(50257, 50257, 50257) == ("shifted", 8, 50264)
    assert layout(50257, 50265, 50257) == ("shifted", 8, 50264)
    assert layout(50257, 50304, 50257) == ("rows", 1, 50257)
    assert layout(17, 17) == ("shifted", 8, 24)
    assert layout(15, 15) == ("rows", 1, 15)
