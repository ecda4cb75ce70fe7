"""Every launch shape on every shape of batch, what decides between them, and how many launches a training step takes."""

import contextlib
import math
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import DTYPES, GPU, SHAPES, device_of, make, run
from launches import KINDS, WAYS, counted_launches, forced
from tolerance import check, expected, share_of_bound

from fused_dm import _api, _launch, _rows, _triton, _validation, dm_loss, edf, margin
from fused_dm._launch import H100, MI300X, Device, Sizes

DM = edf.DM(beta=8, lambd=0.5)
REDUCTIONS = ["sum_weight", "mean"]
interpreted = pytest.mark.skipif(GPU, reason="counts what the interpreter launches")


def custom(log_p, log_q):
    return 8 * torch.exp(0.5 * log_p + log_q)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_every_way_on_every_shape(way, reduction, shape):
    if way in ("small blocks", "rows in blocks", "kept rows") and (shape[1] > 2000 or shape[0] > 20):
        pytest.skip("hundreds of blocks say no more than tens")
    dtype = torch.float32 if shape[1] % 2 else torch.bfloat16
    logits, target = make(*shape, dtype, ignored=0.2)
    truth = expected(logits, target, DM, torch.tensor(1.5), reduction=reduction)
    with forced(way):
        check(*run("triton", logits, target, DM, torch.tensor(1.5), reduction=reduction), truth)


@pytest.mark.parametrize("way", KINDS)
@pytest.mark.parametrize("emphasis", [DM, edf.CCE(), custom], ids=["dm", "cce", "custom"])
@pytest.mark.parametrize("reduction", ["sum_weight", "mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_every_way_with_every_option(way, emphasis, reduction, dtype):
    rows = 20 if way == "rows in blocks" else 150
    logits, target = make(rows, 60, dtype, seed=3, ignored=0.2)
    generator = torch.Generator().manual_seed(3)
    options = {"reduction": reduction, "sample_weight": torch.randn(rows, generator=generator) + 1}
    options["sample_weight"][::7] = 0
    options["weight"] = torch.linspace(0, 2, 60).roll(7)
    if reduction == "sum":
        options["normalizer"] = 3.0
    truth = expected(logits, target, emphasis, **options)
    with forced(way):
        check(*run("triton", logits, target, emphasis, **options), truth)


@pytest.mark.parametrize("way", ["tiles", "small blocks", "rows in blocks", "kept rows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [64, 59])
def test_the_gradient_for_a_known_divisor(way, dtype, classes):
    """In every dtype, also those whose training step has it from another kernel; whatever rows hold that do not count."""
    logits, target = make(9, classes, dtype, seed=5)
    sample_weight = torch.tensor([1.0, 0.0, 2.0, -0.5, 0.0, 1.0, 1.0, 0.0, 1.0])
    counts = (sample_weight != 0) & (target != -100)
    target[2], counts[2] = -100, False
    truth = expected(logits, target, DM, reduction="sum", normalizer=3.0, sample_weight=sample_weight)
    for row, garbage in ((1, math.nan), (2, math.inf), (4, math.inf), (7, -math.inf)):
        logits[row] = garbage
    device, compute = device_of("triton"), _rows.compute_dtype(dtype)
    params = torch.tensor([1e-6, 8.0, 0.5], dtype=torch.float64, device=device)
    divisor = torch.tensor(3.0, dtype=torch.float64, device=device)
    logits, target, weight = (tensor.to(device) for tensor in (logits, target, sample_weight.to(compute)))
    dlogits = torch.full_like(logits, math.nan)
    with forced(way), np.errstate(invalid="ignore", over="ignore"):
        _triton.loss_and_rows(logits, target, None, weight, params, divisor, "dm", -100, dlogits)
    dlogits = dlogits.cpu()
    assert (dlogits[~counts] == 0).all()
    assert share_of_bound(dlogits[counts], truth.dlogits[counts], truth.allowed["dlogits"][counts]).max() <= 1


@pytest.mark.parametrize("way", [None, *WAYS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("classes", [64, 59])
def test_logits_that_begin_anywhere(way, dtype, classes):
    """Two 16-bit logits are 32 bits of memory only if they begin at a multiple of 4 bytes."""
    logits, target = make(8, classes, dtype, ignored=0.2)
    options = {"reduction": "sum", "normalizer": 3.0}
    truth = expected(logits, target, DM, **options)
    target = target.to(device_of("triton"))
    for begin in range(4):
        memory = torch.zeros(begin + 8 * classes, dtype=dtype, device=target.device)
        given = memory[begin:].view(8, classes)
        given.copy_(logits)
        assert given.data_ptr() % 16 == 2 * begin
        leaf = given.detach().requires_grad_()
        with forced(way) if way else contextlib.nullcontext():
            output = dm_loss(leaf, target, DM, impl="triton", return_output=True, **options)
            output.loss.backward()
        check(output, leaf.grad, truth)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("reduction", ["sum_weight", "mean", "none"])
def test_nan_and_extremes_go_every_way(way, reduction):
    """A nan in one row, and no other class in another: neither is lost, and neither spreads further than it must."""
    logits, target = make(5, 60, seed=4, offset=1e4)
    logits[1, 50] = torch.nan
    logits[3] = -torch.inf
    logits[3, target[3]] = 0.0
    with forced(way):
        output, dlogits = run("triton", logits, target, DM, reduction=reduction)
    assert output.target_prob.isnan().tolist() == [False, True, False, False, False]
    assert dlogits[1].isnan().any()
    assert (dlogits[3] == 0).all() or reduction == "sum_weight"
    if reduction == "none":
        assert output.loss.isnan().tolist() == [False, True, False, False, False]
    else:
        assert output.loss.isnan()
    if reduction != "sum_weight":
        assert not dlogits[[0, 2, 4]].isnan().any()


@pytest.mark.parametrize("emphasis", [DM, edf.CCE()], ids=str)
def test_partial_sums_of_more_programs_than_are_added_at_once(emphasis):
    """Rows alone, four a program, and sums of two programs a round: four programs, two rounds."""
    logits, target = make(15, 4100, torch.float32, seed=5)
    truth = expected(logits, target, emphasis)
    with forced("several tiles"):
        check(*run("triton", logits, target, emphasis), truth)


@pytest.mark.parametrize("way", KINDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_way_repeats_to_the_bit(way, reduction):
    logits, target = make(7, 300, torch.bfloat16, ignored=0.2)
    with forced(way):
        runs = [run("triton", logits, target, DM, reduction=reduction) for _ in range(2)]
    assert torch.equal(runs[0][1], runs[1][1])
    assert torch.equal(runs[0][0].loss, runs[1][0].loss)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dloss", [1.0, 2.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_way_in_place(way, dloss, reduction):
    values, target = make(7, 300, ignored=0.2)
    truth = expected(values, target, DM, torch.tensor(dloss), reduction=reduction)
    leaf = values.to(device_of("triton")).requires_grad_()
    with forced(way):
        logits = leaf * 1
        output = dm_loss(
            logits, target.to(leaf.device), DM, reduction=reduction, inplace=True, return_output=True, impl="triton"
        )
        output.loss.backward(torch.full_like(output.loss, dloss))
    check(output, leaf.grad, truth)


@pytest.mark.parametrize("way", KINDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", [{"softcap": 20.0}, {"logit_scale": 0.5}], ids=str)
def test_every_way_with_transformed_logits(way, reduction, options):
    """Positions whose neighbours alone count are read with them, and have no slope."""
    logits, target = make(24, 60, seed=6, ignored=0.4)
    truth = expected(logits, target, DM, reduction=reduction, **options)
    logits[target == -100] = torch.nan
    spatial = logits.reshape(3, 8, 60).transpose(1, 2).contiguous().to(device_of("triton"))
    where = target.reshape(3, 8).to(spatial.device)
    rows, spots = logits.to(spatial.device).requires_grad_(), spatial.requires_grad_()
    with forced(way):
        plain = dm_loss(rows, target.to(rows.device), DM, impl="triton", return_output=True, reduction=reduction, **options)
        plain.loss.backward()
        output = dm_loss(spots, where, DM, impl="triton", return_output=True, reduction=reduction, **options)
        output.loss.backward()
    check(plain, rows.grad, truth)
    names = ("example_weight", "target_prob", "correct")
    flat = output._replace(**{name: getattr(output, name).flatten() for name in names})
    check(flat, spots.grad.transpose(1, 2).reshape(24, 60), truth)


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_parts_of_a_row_combine_as_the_whole(parts, dtype):
    """The torch form of the combination that the split kernels do on the device, over ranks or spans."""
    logits = make(6, 64, dtype, scale=20.0).logits
    logits[0, :32] = -torch.inf
    logits[1] = -torch.inf
    found = [_rows.part_statistics(part) for part in logits.tensor_split(parts, 1)]
    row_max, row_sum = _rows.combine_statistics(torch.stack([m for m, _ in found]), torch.stack([s for _, s in found]))
    exact = logits.double().logsumexp(1)
    assert torch.equal(row_max, logits.amax(1))
    assert row_sum[1] == 0
    span = 64 * torch.finfo(dtype).eps * (1 + logits[2:].double().abs().amax())
    lse = row_max[2:].double() + row_sum[2:].double().log()
    assert ((lse - exact[2:]).abs() <= span).all()


@interpreted
@pytest.mark.parametrize("shape", [(1, 3 * 4096 + 7), (7, 9000), (130, 5000)], ids=str)
def test_device_and_torch_combine_alike(shape):
    logits, target = make(*shape)
    _, statistics = _triton.margin(logits, target, -100)
    others = logits.scatter(1, target[:, None], -torch.inf)
    row_max, row_sum = _rows.combine_statistics(
        *map(torch.stack, zip(*[_rows.part_statistics(part) for part in others.split(4096, 1)], strict=True))
    )
    assert torch.equal(statistics[0], row_max)
    torch.testing.assert_close(statistics[1], row_sum)


# ---- The choice


@pytest.mark.parametrize("device", [H100, MI300X], ids=["H100", "MI300X"])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_no_program_has_more_threads_than_there_are(device, itemsize):
    choices = [_launch.forward, _launch.margin, _launch.fused, _launch.gradient]
    for classes in (10, 100, 1000, 4096, 5000, 32000, 65536, 128256, 10**7):
        for rows in (1, 16, 8192):
            for spatial, shift in ((False, 0), (True, 0), (False, 16 // itemsize - 1)):
                sizes = Sizes(1, rows, classes, itemsize, spatial, shift=shift)
                launches = [choose(sizes, device) for choose in choices] + [_launch.fused(sizes, device, capped=True)]
                assert max(launch.num_warps for launch in launches) * device.warp <= 1024


def test_few_rows_are_split_so_that_every_multiprocessor_has_work():
    for rows, classes in ((1, 10**7), (16, 10**7), (64, 10**6), (131, 128256), (16, 5000)):
        sizes = Sizes(1, rows, classes, 2)
        launch = _launch.forward(sizes, H100)
        assert launch.way == "split"
        assert launch.span % launch.block_v == 0
        programs = launch.tiles(sizes) * launch.spans(sizes)
        blocks = rows * -(-classes // launch.block_v)
        assert min(blocks, 132) <= programs <= 2 * _launch.RESIDENT * 132
        assert launch.spans(sizes) * launch.span >= classes > (launch.spans(sizes) - 1) * launch.span


def test_enough_rows_are_not_split():
    for rows in (132, 133, 8192):
        assert _launch.forward(Sizes(1, rows, 128256, 2), H100).way == "tiles"
    assert _launch.forward(Sizes(1, 131, 128256, 2), H100).way == "split"
    # The device counts: a small one has work for all of it in fewer rows.
    assert _launch.forward(Sizes(1, 40, 128256, 2), Device(20, 4 << 20)).way == "tiles"
    assert _launch.forward(Sizes(1, 40, 128256, 2), Device(108, 40 << 20)).way == "split"


def test_rows_of_one_block_are_not_split():
    assert _launch.forward(Sizes(1, 8, 4096, 2), H100).way == "tiles"
    assert _launch.forward(Sizes(1, 8, 4097, 2), H100).way == "split"


def test_a_small_batch_is_one_programs():
    assert _launch.forward(Sizes(1, 0, 10, 4), H100).way == "alone"
    assert _launch.forward(Sizes(1, 512, 10, 4), H100).way == "alone"
    assert _launch.forward(Sizes(1, 513, 10, 4), H100).way == "tiles"
    assert _launch.forward(Sizes(1, 257, 10, 4, aligned=False), H100).way == "tiles"
    assert _launch.forward(Sizes(1, 4, 4096, 4), H100).way == "alone"
    assert _launch.forward(Sizes(1, 5, 4096, 4), H100).way == "tiles"
    # Long rows too, as long as they are few blocks.
    assert _launch.forward(Sizes(1, 1, 16384, 2), H100).way == "alone"
    assert _launch.forward(Sizes(1, 1, 16385, 2), H100).way == "split"
    assert _launch.forward(Sizes(1, 2, 8192, 2), H100).way == "alone"


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("classes", [1, 2, 16, 17, 1000, 2048, 2049, 4096, 4097, 32768, 32769, 10**7])
@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize("aligned", [False, True])
def test_every_tile_covers_its_row_within_the_registers(itemsize, classes, spatial, aligned):
    for images, positions in ((1, 1), (1, 8192), (8, 4096), (3, 5)):
        sizes = Sizes(images, positions, classes, itemsize, spatial, aligned)
        gradients = [_launch.gradient(sizes, H100, whole_rows) for whole_rows in (False, True)]
        for launch in (_launch.forward(sizes, H100), _launch.margin(sizes, H100), *gradients):
            # No more than 32 elements a thread, and but for a gradient of 16 warps no more than 4096.
            assert launch.block_n * launch.block_v <= 32 * 32 * launch.num_warps
            assert launch.block_n * launch.block_v <= 4096 or launch in gradients
            if not aligned and not spatial:
                assert launch.block_n == 1 or launch.block_n * launch.block_v <= 1024
            assert launch.spans(sizes) * launch.span >= classes
        fused = _launch.fused(sizes, H100)
        assert fused.block_n * fused.block_v * itemsize <= max(65536, 4096 * itemsize)
        assert fused.span % fused.block_v == 0
        if fused.way == "tiles":
            assert fused.span >= classes
        for value in (fused.block_n, fused.block_v, fused.num_warps):
            assert value & (value - 1) == 0


def test_a_row_of_one_block_stays_in_registers():
    for itemsize in (2, 4):
        inside = _launch.fused(Sizes(1, 8192, 8192, itemsize), H100)
        beyond = _launch.fused(Sizes(1, 8192, 8192 + 8, itemsize), H100)
        assert inside.span == inside.block_v == 8192
        assert (inside.lanes, inside.kept) == (1, 0)
        assert beyond.span > beyond.block_v
        assert beyond.lanes == 32 * beyond.num_warps


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("device", [H100, MI300X, Device(108, 40 << 20, limits=True), Device(160, 0)])
def test_blocks_that_stay_in_registers_fit(itemsize, device):
    """No more than half of a multiprocessor's registers are for them, and each program has its share of all."""
    for classes in (8200, 16384, 32000, 32768, 32776, 50304, 65536, 65544, 128256, 10**6):
        sizes = Sizes(1, 8192, classes, itemsize)
        launch = _launch.fused(sizes, device)
        assert 1 <= launch.kept <= launch.span // launch.block_v
        assert launch.num_warps * device.warp <= _launch.MOST_THREADS
        for capped in (False, True):
            launch = _launch.fused(sizes, device, capped)
            assert launch.lanes * (16 // itemsize) <= launch.block_v
        launch = _launch.fused(sizes, device)
        threads = 32 * launch.num_warps
        programs = _launch.REGISTERS // (threads * launch.registers) if launch.registers else 1
        assert programs >= 1
        assert programs * launch.kept * launch.block_v * itemsize <= 4 * _launch.REGISTERS // 2
        assert bool(launch.registers) == (device.limits and itemsize < 8)
    # A row of 32000 is read once on an H100, and but for a block elsewhere.
    assert itemsize != 2 or _launch.fused(Sizes(1, 8192, 32000, 2), device).kept == (8 if device == H100 else 7)


def test_three_blocks_of_a_long_row_are_on_their_way():
    for itemsize, classes, block_v in (
        (2, 24576, 2048), (2, 24577, 8192), (2, 32000, 8192), (2, 49152, 8192), (2, 49153, 16384), (2, 10**7, 16384),
        (4, 12288, 2048), (4, 12289, 4096), (4, 24577, 8192), (8, 24577, 4096),
    ):  # fmt: skip
        launch = _launch.gradient(Sizes(1, 8192, classes, itemsize), H100)
        assert (launch.block_v, launch.num_warps) == (block_v, 4 if block_v == 2048 else 16)
        # One that is expected to return at once is small.
        assert _launch.gradient(Sizes(1, 8192, classes, itemsize), H100, whole_rows=True).num_warps == 1


def test_rows_share_a_program_only_where_there_are_enough():
    """Two programs for every place of the device at least, and a row for a thread at most."""
    for rows, classes in ((4096, 1000), (32768, 2048), (2**20, 10), (2**20, 1000), (8192, 32000)):
        sizes = Sizes(1, rows, classes, 2)
        launch = _launch.forward(sizes, H100)
        assert launch.repeat * launch.block_n <= 128
        assert launch.repeat == 1 or launch.programs(sizes) >= 2 * _launch.RESIDENT * 132
        assert launch.programs(sizes) * launch.repeat >= launch.tiles(sizes)
    assert _launch.forward(Sizes(1, 32768, 2048, 2), H100).repeat == 8


def test_under_a_softcap_one_block_stays_in_registers():
    launch = _launch.fused(Sizes(1, 8192, 32000, 2), H100, capped=True)
    assert (launch.block_v, launch.num_warps, launch.span, launch.kept) == (2048, 8, 32768, 1)
    assert _launch.fused(Sizes(1, 8192, 1000, 2), H100, capped=True) == _launch.fused(Sizes(1, 8192, 1000, 2), H100)


def test_the_fused_kernel_is_given_up_where_it_would_idle():
    """Two passes over 16 rows of 1e7 classes on 16 of 132 multiprocessors take longer than three passes on all."""
    assert _launch.fused(Sizes(1, 16, 10**7, 2), H100).way == "split"
    assert _launch.fused(Sizes(1, 132, 10**7, 2), H100).way == "tiles"
    # So little that another launch takes longer than what it saves.
    assert _launch.fused(Sizes(1, 16, 5000, 2), H100).way == "tiles"


def test_the_gradient_is_cut_until_it_fills_the_device():
    few = Sizes(1, 16, 10**7, 2)
    launch = _launch.gradient(few, H100)
    assert launch.tiles(few) * launch.spans(few) >= 8 * 132
    many = Sizes(1, 8192, 128256, 2)
    assert _launch.gradient(many, H100).spans(many) == 1
    assert _launch.gradient(few, H100, whole_rows=True).spans(few) == 1
    assert _launch.gradient(many, H100).stream
    assert not _launch.gradient(Sizes(1, 1024, 1000, 2), H100).stream


# ---- Launches


def step(shape, dtype=torch.float32, weighted=False, **options):
    logits, target = make(*shape, dtype)
    if weighted:
        options |= {"weight": torch.linspace(0, 2, shape[1]), "sample_weight": torch.linspace(-1, 2, shape[0])}
    leaf = logits.requires_grad_()
    upstream = torch.ones((), dtype=torch.float32)
    # The first call makes the EDF's parameters.
    dm_loss(leaf[:1], target[:1], DM, impl="triton")
    with counted_launches() as found:
        found_loss = dm_loss(leaf, target, DM, impl="triton", **options)
        (found_loss.loss if options.get("return_output") else found_loss).backward(upstream)
    return found


STEPS = {
    "small": ((128, 100), {}, ["batch", "gradient"]),
    "one program's most": ((512, 12), {}, ["batch", "gradient"]),
    "few classes": ((2000, 10), {}, ["forward", "totals", "gradient"]),
    "a block": ((5, 4096), {}, ["forward", "totals", "gradient"]),
    "few rows": ((3, 20000), {}, ["split", "batch", "gradient"]),
    "sum": ((540, 200), {"reduction": "sum"}, ["forward", "totals", "gradient"]),
    "weighted": ((540, 200), {"weighted": True}, ["forward", "totals", "gradient"]),
    "small, weighted": ((128, 100), {"weighted": True}, ["batch", "gradient"]),
    "with what each received": ((540, 200), {"return_output": True}, ["forward", "totals", "received", "gradient"]),
    "mean": ((540, 200), {"reduction": "mean"}, ["divisor", "fused", "totals", "gradient"]),
    "weighted mean": ((540, 200), {"reduction": "mean", "weighted": True}, ["divisor", "fused", "totals", "gradient"]),
    "known": ((540, 200), {"reduction": "sum", "normalizer": torch.tensor(3.0)}, ["fused", "totals", "gradient"]),
    "known, few rows": (
        (3, 20000),
        {"reduction": "sum", "normalizer": torch.tensor(3.0)},
        ["split", "batch", "gradient", "gradient"],
    ),
}


@interpreted
@pytest.mark.parametrize("case", STEPS)
def test_launches_of_a_training_step(case):
    shape, options, kernels = STEPS[case]
    found = step(shape, **options)
    assert found.kernels == {f"{name}_kernel": kernels.count(name) for name in kernels}
    # A known divisor is made fp64, and the sum of weights that is handed out copied. All else are kernels, with weights too.
    made = ["_to_copy"] if "normalizer" in options else ["ones"] if options.get("reduction") == "sum" else []
    made += ["clone"] if "return_output" in options else []
    assert sorted(found.torch) == made
    if not options.keys() - {"weighted"}:
        assert found.total <= 3


WEIGHTS = {
    "none": lambda rows, classes: (None, None),
    "of classes": lambda rows, classes: (torch.linspace(0, 2, classes), None),
    "of examples": lambda rows, classes: (None, torch.linspace(-1, 3, 2 * rows)[::2]),
    "both": lambda rows, classes: (torch.linspace(0, 2, classes).half(), torch.linspace(-1, 3, rows).double()),
    "that cancel": lambda rows, classes: (None, 1.0 - 2.0 * (torch.arange(rows) // 2 % 2)),
    "zero": lambda rows, classes: (None, torch.zeros(rows)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("rows", [0, 1, 300, 9000])
@pytest.mark.parametrize("many", [False, True])
def test_the_divisor_of_mean(rows, weights, dtype, many, monkeypatch):
    """Of the rows' weights rounded to the dtype of their numbers, added in fp64: by a kernel or, for many, by torch."""
    if many:
        monkeypatch.setattr(_launch, "ROWS_ALONE", 0)
    target = torch.arange(rows) % 7
    target[::3] = -100
    weight, sample_weight = WEIGHTS[weights](rows, 7)
    valid = target != -100
    exact = torch.ones(rows, dtype=torch.float64)
    if weight is not None:
        exact = exact * weight.to(dtype)[target.clamp(min=0)].double()
    if sample_weight is not None:
        exact = (exact.to(dtype) * sample_weight.to(dtype)).double()
    exact = exact[valid]
    given = [None if tensor is None else tensor.to(device_of("triton")) for tensor in (target, weight, sample_weight)]
    found = _triton.divisor(*given, 7, -100, dtype).cpu()
    assert found.dtype == torch.float64
    if (exact == 0).all():
        assert found == 1
    else:
        # Each addition rounds what it adds up to, whatever the order.
        assert (found - exact.sum()).abs() <= rows * 2.0**-53 * exact.abs().sum()
    assert _triton.divisor(torch.full_like(given[0], -100), *given[1:], 7, -100, dtype) == 1


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_way_in_a_cuda_graph(way, reduction):
    logits, target = (tensor.cuda() for tensor in make(64, 1000))
    static = logits.clone().requires_grad_()

    def step():
        static.grad = None
        dm_loss(static, target, DM, reduction=reduction).backward()

    with forced(way):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        other = make(64, 1000, seed=1).logits.cuda()
        with torch.no_grad():
            static.copy_(other)
        graph.replay()
        assert torch.equal(static.grad, run("triton", other, target, DM, reduction=reduction)[1])


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
def test_a_cuda_graph_keeps_what_it_reads():
    """The EDF's parameters and the softcap, however many others were used since."""
    logits, target = (tensor.cuda() for tensor in make(64, 1000))
    leaf, emphasis = logits.clone().requires_grad_(), edf.DM(beta=7.375, lambd=0.5)

    def step():
        leaf.grad = None
        dm_loss(leaf, target, emphasis, softcap=29.5).backward()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    before = leaf.grad.clone()
    others = [_api._params((float(number),), logits.device) for number in range(2 * _api.SETTINGS)]
    del others
    leaf.grad.zero_()
    graph.replay()
    assert torch.equal(leaf.grad, before)


def test_settings_that_are_kept(monkeypatch):
    """The last ones, and what a graph has recorded."""
    cpu = torch.device("cpu")

    def use_others():
        for number in range(_api.SETTINGS):
            _api._params((number + 0.625,), cpu)

    passing = weakref.ref(_api._params((0.3125,), cpu))
    monkeypatch.setattr(_validation, "is_captured", lambda device: True)
    recorded = weakref.ref(_api._params((0.4375,), cpu))
    monkeypatch.undo()
    use_others()
    assert passing() is None
    assert recorded() is not None
    used = _api._params((0.625,), cpu)
    _api._params((0.1875,), cpu)
    # One more than there is room for: it took the place of what had not been used for longest.
    assert _api._params((0.625,), cpu) is used
    assert len(_api._PARAMS) == _api.SETTINGS


@interpreted
def test_margin_is_one_launch_or_two():
    for shape, kernels in (((540, 200), {"margin_kernel": 1}), ((3, 9000), {"split_kernel": 1, "margin_kernel": 1})):
        logits, target = make(*shape)
        with counted_launches() as found:
            margin(logits, target, impl="triton")
        assert found.kernels == kernels


def test_a_kept_plan_launches_what_triton_would():
    tests = Path(__file__).parent
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    places = [str(tests.parent), str(tests.parent / "kernels"), str(tests), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, places))
    command = [sys.executable, "-W", "error", str(tests / "relaunch.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
