"""The CPU implementation's blocks and threads: they change nothing but the time."""

import ctypes
import math
import mmap
import multiprocessing
import sys
import threading

import pytest
import torch
from batches import DTYPES, GPU, Batch, make, run
from tolerance import check, compare, expected

import fused_dm
from fused_dm import _cpu, _walk, dm_loss, edf, margin

DM = edf.DM(beta=8, lambd=0.5)


class NoDeviceForm:
    """In the place of a kernel's function, which a CPU does not need."""

    fn = staticmethod(lambda log_p, log_q, params_ptr: None)
    arg_names = ("log_p", "log_q", "params_ptr")


@edf.register(triton=NoDeviceForm)
def changes_its_arguments(log_p, log_q):
    return log_p.mul_(10).add_(log_q)


@edf.register(triton=NoDeviceForm)
def steps_of_integers(log_p, log_q):
    return torch.where(log_p > -1, 3, 1)


@edf.register(triton=NoDeviceForm)
def steps_in_fp32(log_p, log_q):
    return torch.where(log_p > -1, 3.0, 1.0)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(_cpu, "BLOCK_ELEMENTS", 2000)
    monkeypatch.setattr(_cpu, "WIDE_BLOCK_ELEMENTS", 3000)
    monkeypatch.setattr(_cpu, "PIECE_ROWS", 64)
    monkeypatch.setattr(_cpu, "STEP_ROWS", 24)


# (B, V, d1, ...), each with its reason, for blocks of 2000 elements.
SPATIAL = {
    "planes are cut, with a rest": (3, 21, 10, 23),
    "several planes a block, with a rest": (7, 5, 8, 20),
    "few positions, transposed within blocks": (9, 300, 3),
    "a row longer than a block": (2, 2100, 17),
    "one position": (4, 50, 1),
    "no positions": (4, 50, 0),
    "one class": (3, 1, 40),
}


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.movedim(1, -1).reshape(-1, tensor.shape[1])


@pytest.mark.usefixtures("small_blocks")
class TestSpatial:
    @pytest.mark.parametrize("shape", SPATIAL.values(), ids=SPATIAL)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"softcap": 3.0}], ids=str)
    def test_equals_the_reference_of_its_rows(self, shape, dtype, options):
        rows = make(torch.Size(shape).numel() // shape[1], shape[1], dtype, ignored=0.2)
        where = (shape[0], *shape[2:])
        logits = rows.logits.view(*where, shape[1]).movedim(-1, 1).contiguous()
        output, dlogits = run("cpu", logits, rows.target.view(where), DM, **options)
        assert dlogits.shape == logits.shape
        flat = [value if value.dim() == 0 else value.reshape(-1) for value in output]
        check(type(output)(*flat), as_rows(dlogits), expected(*rows, DM, **options))

    def test_ignored_positions_that_hold_nan(self):
        logits = torch.randn(2, 5, 700)
        target = torch.randint(5, (2, 700))
        target[1, 3] = -100
        logits[1, :, 3] = torch.nan
        _, dlogits = run("cpu", logits, target, DM)
        assert (dlogits[1, :, 3] == 0).all()
        assert dlogits.isfinite().all()

    def test_strided_planes(self):
        wide = torch.randn(4, 9, 12, 30)
        target = torch.randint(9, (4, 12, 15))
        _, strided = run("cpu", wide[..., ::2], target, DM)
        _, packed = run("cpu", wide[..., ::2].contiguous(), target, DM)
        assert torch.equal(strided, packed)

    def test_the_gradient_lies_in_memory_as_the_logits_do(self):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            logits = torch.randn(2, 5, 6, 7).to(memory_format=memory_format).requires_grad_()
            (dlogits,) = torch.autograd.grad(dm_loss(logits, torch.randint(5, (2, 6, 7)), DM), logits)
            assert dlogits.is_contiguous(memory_format=memory_format)

    @pytest.mark.parametrize("shape", [(40, 37, 50), (400, 300, 3)])
    def test_nothing_of_the_logits_size_is_transposed(self, shape, monkeypatch):
        """All memory that the pass allocates, beside the gradient, is of the order of rows and blocks."""
        from torch.utils._python_dispatch import TorchDispatchMode

        sizes = []

        class Sizes(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                out = function(*args, **(kwargs or {}))
                if isinstance(out, torch.Tensor):
                    sizes.append((out.untyped_storage().data_ptr(), out.untyped_storage().nbytes(), str(function)))
                return out

        logits, target = torch.randn(shape), torch.randint(shape[1], (shape[0], shape[2]))
        with Sizes():
            *_, dlogits = _cpu.undivided_direction(logits, target.reshape(-1), -100, leads=False)
            _cpu.scale_rows_(dlogits, torch.ones(target.numel()))
        own = {logits.untyped_storage().data_ptr(), dlogits.untyped_storage().data_ptr()}
        large = [size for size in sizes if size[0] not in own and size[1] > max(4 * 2000, 8 * target.numel())]
        assert logits.nbytes > 8 * max(4 * 2000, 8 * target.numel())
        assert not large


@pytest.mark.usefixtures("small_blocks", "two_threads")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("special", [2.0, 0.0, torch.inf, torch.nan])
@pytest.mark.parametrize("small_bytes", [_cpu.SMALL_BYTES, 0], ids=["at once", "in blocks"])
def test_long_rows_of_16_bits_are_scaled_in_fp32(dtype, special, small_bytes, monkeypatch):
    """They go through torch's batch norm, which rounds once, as a product in fp32 that is rounded does."""
    monkeypatch.setattr(_cpu, "SMALL_BYTES", small_bytes)
    taken = []
    monkeypatch.setattr(_cpu, "_scale_16_bits_", lambda *args, scale=_cpu._scale_16_bits_: taken.append(scale(*args)))
    rows, factor = torch.randn(37, _cpu.LONG + 3).to(dtype), torch.randn(37)
    rows[5, :5] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan])
    factor[4:7] = special
    exact = (rows.float() * factor[:, None]).to(dtype)
    exact[factor == 0] = 0
    _cpu.scale_rows_(rows, factor)
    torch.testing.assert_close(rows, exact, rtol=0, atol=0, equal_nan=True)
    assert len(taken) == (1 if math.isfinite(special) else 0)


def test_a_weight_that_overflows_times_a_value_of_0_is_0():
    logits, target = torch.tensor([[1000.0, 0.0], [0.0, 5.0]]), torch.tensor([0, 0])
    options = {"reduction": "sum", "normalizer": 2.0}
    emphasis = edf.Normal(psi=1, beta=200)
    truth = expected(logits, target, emphasis, **options)
    assert truth.loss.isfinite()
    with torch.no_grad():
        loss = dm_loss(logits, target, emphasis, **options)
    assert (loss - truth.loss).abs() <= truth.allowed["loss"]


@pytest.mark.parametrize("beta", [2799.0, 2824.0, 2836.0])
def test_a_sum_of_weights_near_the_end_of_fp64(beta):
    logits, target = torch.tensor([[2.0, 1.0, 1.0]] * 2).log(), torch.tensor([0, 0])
    output, _ = run("cpu", logits, target, edf.DM(beta=beta, lambd=1))
    exact = expected(logits, target, edf.DM(beta=beta, lambd=1))
    assert exact.sum_weight.isfinite()
    assert (output.sum_weight - exact.sum_weight).abs() <= exact.allowed["sum_weight"]


@pytest.mark.parametrize("sign", [1, -1])
def test_a_weight_that_overflows_beside_a_finite_value(sign):
    """c w(p) is 3.6e38 at p = 0.4, which fp32 has not, but c f(p) and c w(p) / D are in its range."""
    logits, target = torch.tensor([[0.4, 0.6], [0.5, 0.5]]).log(), torch.tensor([0, 0])
    options = {"reduction": "sum", "normalizer": 1e30, "sample_weight": torch.tensor([3e38 * sign, 1.0])}
    truth = expected(logits, target, edf.CCE(), **options)
    assert truth.loss.isfinite()
    assert truth.dlogits.isfinite().all()
    check(*run("cpu", logits, target, edf.CCE(), **options), truth)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("planes", [1, 3])
@pytest.mark.parametrize("special", [2.0, 0.0, torch.inf])
def test_wide_planes_of_16_bits_are_scaled_in_fp32(dtype, planes, special):
    positions = _cpu.LONG + 3
    matrix, factor = torch.randn(planes, 7, positions).to(dtype), torch.randn(planes * positions)
    factor[4:7] = special
    exact = (matrix.float() * factor.view(planes, 1, positions)).to(dtype)
    exact.masked_fill_(factor.view(planes, 1, positions) == 0, 0)
    _cpu.scale_rows_(matrix, factor)
    torch.testing.assert_close(matrix, exact, rtol=0, atol=0)


class TestMaxima:
    """Blocks of rows whose maxima need not be subtracted, and others."""

    CLASSES = 80

    @pytest.fixture(autouse=True)
    def blocks_of_50_rows(self, monkeypatch):
        monkeypatch.setattr(_cpu, "BLOCK_ELEMENTS", 50 * self.CLASSES)

    def batch(self, dtype, offsets):
        """Two blocks at each offset, in turn; a row of the second block is far below its neighbours."""
        logits, target = make(50 * len(offsets) * 2, self.CLASSES, torch.float64)
        logits += torch.tensor(offsets, dtype=torch.float64).repeat_interleave(50).repeat(2)[:, None]
        logits[61] -= 200
        return Batch(logits.to(dtype), target)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(
        "options",
        [{}, {"reduction": "none"}, {"softcap": 100.0}, {"logit_scale": 1.5}, {"ignore_index": 3}],
        ids=str,
    )
    def test_whichever_way_a_block_goes(self, dtype, options):
        batch = self.batch(dtype, (-300.0, -5.0, -1.0, 0.0, 8.0, 20.0, 60.0, 95.0))
        if "ignore_index" in options:
            assert (batch.target == 3).any()
        for emphasis in (DM, edf.CCE(), DM.log_weight):
            check(*run("cpu", *batch, emphasis, **options), expected(*batch, emphasis, **options))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("leads", [False, True])
    @pytest.mark.parametrize("offset", [5.0, 20.0, -3.0, -20.0])
    def test_the_norm_tells_which_way(self, dtype, offset, leads):
        logits, target = self.batch(dtype, (offset,))
        others = logits.double().scatter(1, target[:, None], -torch.inf)
        norm = _cpu.undivided_direction(logits, target, -100, leads)[2].double()
        assert others.exp().sum(1)[:50].aminmax().min > _cpu.LEAST_SUM or offset == -20
        shifted = (torch.arange(100) >= 50) | (abs(offset) == 20)
        sums = torch.where(shifted, (others - others.amax(1, keepdim=True)).exp().sum(1), others.exp().sum(1))
        torch.testing.assert_close(norm, sums, rtol=1e-5, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("upstream", [1.0, 1e4])
    @pytest.mark.parametrize("sum_", [1.01, 0.99])
    def test_sums_about_the_least(self, dtype, upstream, sum_):
        """Exponentials that have lost digits below the range of fp32 are divided by a sum far below 1."""
        others = torch.linspace(-100, -70, self.CLASSES - 2, dtype=torch.float64)
        largest = torch.tensor([_cpu.LEAST_SUM * sum_], dtype=torch.float64).log()
        logits = torch.cat([largest, others, largest]).repeat(50, 1).to(dtype)
        target = torch.full((50,), self.CLASSES - 1)
        norm = _cpu.undivided_direction(logits, target, -100, leads=False)[2]
        assert (norm == 1).all() == (logits[0, 0].exp() < _cpu.LEAST_SUM)
        options = {"reduction": "sum", "normalizer": 1.0}
        upstream = torch.tensor(upstream)
        check(
            *run("cpu", logits, target, edf.CCE(), upstream, **options),
            expected(logits, target, edf.CCE(), upstream, **options),
        )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(("shape", "again"), [((100, 80), False), ((4, 80, 25), False), ((100, 80), True)])
    @pytest.mark.parametrize("upstream", [1.0, -1e-3])
    @pytest.mark.parametrize("offset", [8.0, 14.0, 20.0])
    def test_a_tiny_coefficient_over_a_large_sum(self, dtype, shape, again, upstream, offset):
        """Their quotient has no digits in fp32, and times a large exponential it would be in range again."""
        batch = self.batch(dtype, (offset,))
        batch.logits[61] += 200
        sample_weight = torch.logspace(-37, 3, 100)
        sample_weight[7], sample_weight[61], sample_weight[8] = 0, 1, -1e-32
        options = {"reduction": "sum", "normalizer": 1.0}
        truth = expected(*batch, DM.log_weight, torch.tensor(upstream), sample_weight=sample_weight, **options)
        where = (shape[0], *shape[2:])
        leaf = batch.logits.view(*where, self.CLASSES).movedim(-1, 1).contiguous().requires_grad_()
        # In place, functions that may raise compute the gradient in the backward pass.
        loss = dm_loss(
            leaf * 1,
            batch.target.view(where),
            DM.log_weight if again else DM,
            sample_weight=sample_weight.view(where),
            inplace=again,
            **options,
        )
        (dlogits,) = torch.autograd.grad(loss, leaf, torch.tensor(upstream))
        compare("dlogits", as_rows(dlogits) if len(shape) == 3 else dlogits, truth.dlogits, truth.allowed["dlogits"])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("offsets", [(0.0, 30.0), (-3.0,), (-3.0, -7.0, 12.0, 13.0, -5.5)])
    @pytest.mark.parametrize("transform", [{}, {"softcap": 50.0}], ids=str)
    def test_same_bits_whatever_is_asked_for(self, dtype, offsets, transform):
        batch = self.batch(dtype, offsets)
        leaf = batch[0].requires_grad_()
        loss = dm_loss(leaf, batch[1], DM, **transform)
        (dlogits,) = torch.autograd.grad(loss, leaf)
        for options in ({"return_output": True}, {"inplace": True}):
            other = dm_loss(leaf * 1, batch[1], DM, **options, **transform)
            value = other.loss if "return_output" in options else other
            assert torch.equal(value, loss)
            assert torch.equal(torch.autograd.grad(value, leaf)[0], dlogits)
        with torch.no_grad():
            assert torch.equal(dm_loss(leaf, batch[1], DM, **transform), loss)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("upstream", [1e-30, 1e-33, 1e-36, 1e-37])
    @pytest.mark.parametrize(("classes", "logit"), [(16, 16.0), (63, 16.0), (63, 12.5), (5000, 8.0), (5000, 8.2)])
    def test_a_tiny_gradient_of_the_label(self, dtype, upstream, classes, logit):
        """It is the product of the coefficient divided by a large sum, which has few digits, and the sum."""
        logits, target = torch.full((4, classes), logit), torch.zeros(4, dtype=torch.long)
        logits[:, 1] -= 1
        given = (logits.to(dtype), target, edf.CCE(), torch.tensor(upstream))
        options = {"reduction": "sum", "normalizer": 1.0}
        check(*run("cpu", *given, **options), expected(*given, **options))

    @pytest.mark.usefixtures("two_threads")
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("offsets", [(-4.0, -3.0, -5.5, 0.0), (20.0, -3.0, 0.0, -5.5)])
    def test_same_bits_whichever_block_comes_first(self, dtype, offsets):
        """A row that looks as if its block would fail, one that did, and a thread that begins elsewhere decide nothing."""
        logits, target = self.batch(dtype, offsets)
        norm = _cpu.undivided_direction(logits, target, -100, leads=False)[2]
        order = torch.arange(len(logits)).view(-1, 50).flip(0).flatten()
        backwards = _cpu.undivided_direction(logits[order], target[order], -100, leads=False)[2]
        assert torch.equal(backwards, norm[order])
        alone = [_cpu.undivided_direction(logits[at], target[at], -100, leads=False)[2] for at in order.sort()[0].split(50)]
        assert torch.equal(torch.cat(alone), norm)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("by", [-200.0, -8.0, 18.0, 80.0, 400.0])
    def test_one_row_decides(self, dtype, by):
        """The others are such that none of their block's maxima need be subtracted."""
        logits, target = make(100, self.CLASSES, torch.float64)
        logits[61] += by
        logits = logits.to(dtype)
        others = logits.double().scatter(1, target[:, None], -torch.inf)
        assert (others[61].exp().sum() < _cpu.LEAST_SUM) == (by < 0)
        norm = _cpu.undivided_direction(logits, target, -100, leads=False)[2]
        sums = torch.where(torch.arange(100) >= 50, (others - others.amax(1, keepdim=True)).exp().sum(1), others.exp().sum(1))
        torch.testing.assert_close(norm.double(), sums, rtol=1e-5, atol=0)
        for emphasis in (edf.CCE(), DM):
            check(*run("cpu", logits, target, emphasis), expected(logits, target, emphasis))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_labels_far_from_the_others(self, dtype):
        logits, target = make(100, self.CLASSES, torch.float64)
        far = torch.tensor([-150.0, -60.0, -41.0, -39.0, 39.0, 41.0, 60.0, 150.0]).double().repeat(13)[:100]
        logits = logits.scatter(1, target[:, None], far[:, None]).to(dtype)
        for emphasis in (edf.CCE(), DM):
            check(*run("cpu", logits, target, emphasis), expected(logits, target, emphasis))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_asked_for_beside_the_computation_changes_nothing(threads, dtype, monkeypatch):
    batch = make(150, 40, dtype)
    _, known = run("cpu", *batch, DM)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    asked = []
    monkeypatch.setattr(_cpu, "HUGE_BYTES", 0)
    monkeypatch.setattr(_cpu, "_is_there", lambda page: False)
    monkeypatch.setattr(_cpu, "_advise", lambda *request: asked.append(request))
    _, dlogits = run("cpu", *batch, DM)
    torch.set_num_threads(before)
    assert torch.equal(dlogits, known)
    if sys.platform == "linux":
        # Whole pages of the gradient, each once.
        start, length = asked[0][:2]
        assert [request[2] for request in asked] == [mmap.MADV_HUGEPAGE] + [_cpu.MADV_POPULATE_WRITE] * (len(asked) - 1)
        assert start % mmap.PAGESIZE == length % mmap.PAGESIZE == 0
        assert sum(request[1] for request in asked[1:]) == length <= dlogits.nbytes


@pytest.mark.usefixtures("small_blocks")
def test_weights_of_parts_of_the_rows_far_apart():
    """The scale of the sum of weights is that of all parts: relative to that of the first, the last would be infinite."""
    batch = make(150, 40)
    sample_weight = torch.where(torch.arange(150) < 140, 1e-20, 1e38)
    check(*run("cpu", *batch, DM, sample_weight=sample_weight), expected(*batch, DM, sample_weight=sample_weight))


@pytest.mark.usefixtures("small_blocks")
class TestParts:
    """What is relative to the largest weight of some of the rows, and then to that of all."""

    def test_an_infinite_value_among_rows_that_weigh_nothing(self):
        """Its weight is exp(-400) beside the others of its part, and exp(-1100) beside the rest: inf times 0 was nan."""
        logits = torch.zeros(150, 2)
        logits[:100, 0] = -400
        logits[5, 0] = -torch.inf
        target = torch.zeros(150, dtype=torch.int64)
        emphasis = edf.DM(beta=3000, lambd=1)
        check(*run("cpu", logits, target, emphasis), expected(logits, target, emphasis))

    def test_a_small_share_of_the_weights_and_a_large_upstream_gradient(self):
        """A divisor over the share of a part was infinite in fp32, and the gradient 0, where it is 1e-35 again in the end."""
        logits, target = make(150, 40)
        sample_weight = torch.where(torch.arange(150) < 100, 1, 1e34)
        upstream = torch.tensor(1e5)
        output, dlogits = run("cpu", logits, target, edf.Uniform(), upstream, sample_weight=sample_weight)
        check(output, dlogits, expected(logits, target, edf.Uniform(), upstream, sample_weight=sample_weight))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("reduction", ["sum_weight", "mean", "sum"])
    @pytest.mark.parametrize("emphasis", [DM, edf.DM(beta=300, lambd=1), edf.GCE(q=0.7), edf.Focal(gamma=2)], ids=str)
    def test_rows_that_are_not_finite_send_all_the_long_way(self, dtype, reduction, emphasis):
        """Parts of which one has the largest weight; the first have hardly any beside it."""
        logits, target = make(350, 40, dtype, ignored=0.1)
        logits[:250].scatter_add_(1, target[:250].clamp(min=0)[:, None], torch.full((250, 1), -3.0, dtype=dtype))
        for row in (7, 320):
            logits[row] = -torch.inf
            logits[row, 4], target[row] = 1.0, 4
        check(
            *run("cpu", logits, target, emphasis, reduction=reduction), expected(logits, target, emphasis, reduction=reduction)
        )

    def test_the_same_parts_for_any_number_of_threads(self):
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        one = _cpu.pieces(1000)
        torch.set_num_threads(3)
        several = _cpu.pieces(1000)
        torch.set_num_threads(before)
        assert len(one) > 3
        assert one == several


@pytest.mark.usefixtures("small_blocks", "two_threads")
class TestRowsThatDoNotCount:
    """Beside them, rows of finite numbers go the short way."""

    @pytest.fixture(autouse=True)
    def short_way(self, monkeypatch):
        """What the short way has taken; every test says which it goes."""
        taken: list[bool] = []
        counted = _cpu.counted

        def noted(*args):
            found = counted(*args)
            taken.append(found is not None)
            return found

        monkeypatch.setattr(_cpu, "counted", noted)
        return taken

    def batch(self, dtype=torch.float32, labels_logit=0.0):
        """The first rows, more than a step of them, do not count, nor do some others."""
        logits, target = make(200, 40, torch.float64, margins=3.0)
        target[:50], target[60::7] = -100, -100
        logits.scatter_add_(1, target.clamp(min=0)[:, None], torch.full((200, 1), labels_logit, dtype=torch.float64))
        return Batch(logits.to(dtype), target)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    @pytest.mark.parametrize("reduction", ["sum_weight", "mean", "sum"])
    @pytest.mark.parametrize("emphasis", [DM, edf.GCE(q=0.7), edf.Focal(gamma=2)], ids=str)
    def test_ignored_and_weighted(self, dtype, reduction, emphasis, short_way):
        batch = self.batch(dtype)
        generator = torch.Generator().manual_seed(1)
        class_weight, sample_weight = (torch.rand(size, generator=generator) + 0.1 for size in (40, 200))
        class_weight[3], sample_weight[55], sample_weight[150:160] = 0, 0, -0.2
        for given in ({}, {"weight": class_weight}, {"weight": class_weight, "sample_weight": sample_weight}):
            options = {"reduction": reduction, "normalizer": 7.0 if reduction == "sum" else None, **given}
            check(*run("cpu", *batch, emphasis, **options), expected(*batch, emphasis, **options))
        assert short_way == [True] * 3

    @pytest.mark.parametrize("how", ["ignored", "sample_weight", "weight", "negative"])
    def test_they_would_weigh_most(self, how, short_way):
        """Those that count have p near 0 or 1, where w is exp(-100) of that elsewhere and less."""
        emphasis, (logits, target) = edf.DM(beta=400, lambd=1), self.batch()
        dead = target == -100
        target = target.clamp(min=0)
        logits[~dead] = logits[~dead].scatter_add(1, target[~dead, None], torch.full((int((~dead).sum()), 1), 12.0))
        sample_weight = torch.where(dead, 0.0, -1.5 if how == "negative" else 1.5)
        options = {"sample_weight": sample_weight}
        if how == "ignored":
            target, options = torch.where(dead, -100, target), {}
        elif how == "weight":
            weight = torch.ones(40)
            weight[:3], target[dead] = 0, 1
            target, options = torch.where(~dead & (target < 3), 7, target), {"weight": weight}
        check(*run("cpu", logits, target, emphasis, **options), expected(logits, target, emphasis, **options))
        assert short_way == [True]

    @pytest.mark.parametrize("weights", [1e-40, 1e-9, 3e7, 1e38])
    def test_weights_far_from_1(self, weights, short_way):
        batch, options = self.batch(), {"sample_weight": torch.linspace(0.1, 1, 200) * weights}
        check(*run("cpu", *batch, DM, **options), expected(*batch, DM, **options))
        assert short_way == [True]

    @pytest.mark.parametrize(
        ("margins", "emphasis", "weights", "options"),
        [
            ([0, 1], edf.DM(beta=316, lambd=1), [1e6, 1], {"reduction": "sum", "normalizer": 1e10}),
            ([0, -20], edf.DM(beta=404, lambd=1), [1e-38, 1e6], {}),
            ([0, -20], edf.DM(beta=440, lambd=1), [1e-45, 1e6], {}),
            ([0, -20], edf.DM(beta=400, lambd=1), [1e-30, 1], {}),
            ([0, -20], edf.DM(beta=400, lambd=1), [0, 1], {}),
            ([0, 0, -20], edf.DM(beta=400, lambd=1), [0, 1e-30, -1], {}),
            ([-102, -101.5], edf.MAE(), [1e6, 1e6], {"reduction": "sum"}),
            ([-102, -101.5], edf.CCE(), [1e6, -1e6], {"reduction": "sum"}),
        ],
    )
    def test_a_weight_and_an_emphasis_that_are_out_of_range_without_the_other(self, margins, emphasis, weights, options):
        logits = torch.tensor([[float(margin), 0.0] for margin in margins])
        target, upstream = torch.zeros(len(margins), dtype=torch.int64), torch.tensor(1e30 if margins[0] < -100 else 1.0)
        options = {**options, "sample_weight": torch.tensor(weights, dtype=torch.float64).float()}
        truth = expected(logits, target, emphasis, upstream, **options)
        check(*run("cpu", logits, target, emphasis, upstream, **options), truth)

    @pytest.mark.parametrize("emphasis", [edf.SCE(1e38, 1, 1), edf.SCE(0.1, 1e20, 1e19)], ids=str)
    @pytest.mark.parametrize("ignored", [True, False])
    def test_an_infinite_value_beside_them(self, emphasis, ignored):
        logits, target, options = torch.tensor([[-50.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 0]), {}
        if ignored:
            target[1] = -100
        else:
            options = {"sample_weight": torch.tensor([1.0, 0.0])}
        loss = dm_loss(logits, target, emphasis, **options)
        assert loss == torch.inf

    def test_nan_and_infinity_among_those_that_count_go_the_long_way(self, short_way):
        for special in (torch.nan, torch.inf, -torch.inf):
            batch = self.batch()
            batch.logits[59, batch.target[59]] = special
            check(*run("cpu", *batch, DM), expected(*batch, DM))
        assert short_way == [False] * 3

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"logit_scale": 2.0}], ids=str)
    def test_their_nan_and_infinity_go_nowhere(self, dtype, options, short_way):
        known = run("cpu", *self.batch(dtype), DM, **options)
        # Class 0 is the one that stands for the label of an ignored row.
        for row, where in enumerate([0, slice(0, 40), 7, slice(1, 40)]):
            for special in (torch.nan, torch.inf, -torch.inf):
                batch = self.batch(dtype)
                batch.logits[row, where] = special
                output, dlogits = run("cpu", *batch, DM, **options)
                assert torch.equal(output.loss, known[0].loss)
                assert torch.equal(dlogits, known[1])
        assert short_way == [True] * 13

    def test_no_row_counts(self, short_way):
        logits, labels = self.batch()
        for target, options in ((torch.full((200,), -100), {}), (labels.clamp(min=0), {"sample_weight": torch.zeros(200)})):
            output, dlogits = run("cpu", logits, target, DM, **options)
            check(output, dlogits, expected(logits, target, DM, **options))
            assert not dlogits.any()
        assert short_way == [False] * 2

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_same_bits_for_any_number_of_threads(self, dtype, short_way):
        batch, sample_weight, found = self.batch(dtype), torch.linspace(0.1, 2, 200), []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            output, dlogits = run("cpu", *batch, DM, sample_weight=sample_weight)
            found.append((*output[:4], dlogits))
        for other in found[1:]:
            for value, known in zip(other, found[0], strict=True):
                torch.testing.assert_close(value, known, rtol=0, atol=0, equal_nan=True)
        assert short_way == [True] * 3


@pytest.mark.parametrize("rows", [(1 << 16) + 1, 70001, 3 << 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("emphasis", [DM, edf.Focal(gamma=2)], ids=str)
def test_same_bits_for_any_number_of_threads_and_many_rows(rows, dtype, emphasis, two_threads):
    """Torch rounds a number otherwise in a whole vector than in what is left over, and a sum by who adds what."""
    logits, target = torch.randn(rows, 4, dtype=dtype), torch.randint(4, (rows,))
    target[::5] = -100
    sample_weight = torch.rand(rows, dtype=dtype) - 0.4
    for options in ({}, {"reduction": "mean", "sample_weight": sample_weight}):
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            output, dlogits = run("cpu", logits, target, emphasis, **options)
            found.append((*output, dlogits))
        for other in found[1:]:
            for value, known in zip(other, found[0], strict=True):
                torch.testing.assert_close(value, known, rtol=0, atol=0, equal_nan=True)


class TestRegisteredEDFs:
    """A function of the user's with a fused form is no part of the catalogue."""

    def batch(self, dtype=torch.float32):
        logits, target = make(50, 20, dtype)
        target[::7] = -100
        return logits, target

    def test_it_may_change_what_it_is_given(self):
        for batch in (self.batch(), make(50, 20)):
            output, dlogits = run("cpu", *batch, changes_its_arguments())
            check(output, dlogits, expected(*batch, lambda log_p, log_q: 10 * log_p + log_q))

    @pytest.mark.parametrize("dtype", [torch.int64, torch.float32], ids=str)
    def test_its_result_may_have_another_dtype(self, dtype):
        batch = self.batch(torch.float64)
        output, dlogits = run("cpu", *batch, steps_of_integers() if dtype == torch.int64 else steps_in_fp32())
        check(output, dlogits, expected(*batch, lambda log_p, log_q: torch.where(log_p > -1, 3.0, 1.0).to(log_p.dtype)))


def test_every_thread_has_a_part_and_the_last_parts_are_small():
    for blocks in (1, 2, 3, 7, 32, 33, 500):
        for threads in (1, 2, 3, 8):
            parts = _cpu._parts(blocks, threads)
            assert [0, *(end for _, end in parts)] == [*(begin for begin, _ in parts), blocks]
            assert len(parts) >= min(blocks, threads)
            sizes = [end - begin for begin, end in parts]
            assert sizes == sorted(sizes, reverse=True)
            assert sizes[-1] <= _cpu.PART_BLOCKS


@pytest.mark.usefixtures("small_blocks", "two_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [1, 2])
def test_a_slope_that_overflows_in_a_row_that_does_not_count(dtype, classes):
    scale = {torch.float32: 1e39, torch.bfloat16: 3.4e38}[dtype]
    logits = torch.tensor([[0.1, 0.0], [1e-3, 0.0]])[:, :classes].to(dtype)
    _, dlogits = run("cpu", logits, torch.tensor([-100, 0]), edf.CCE(), logit_scale=scale)
    assert (dlogits[0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e30, 1e37])
def test_a_small_coefficient_and_a_large_upstream_gradient(dtype, size):
    """A coefficient of 1e-37 that was divided by the sum of a row had no digits left for the upstream gradient."""
    logits, target, upstream = torch.zeros(4, 5000, dtype=dtype), torch.arange(4), torch.tensor(size)
    options = {"reduction": "sum", "normalizer": size}
    check(*run("cpu", logits, target, edf.CCE(), upstream, **options), expected(logits, target, edf.CCE(), upstream, **options))


def test_a_large_scale_of_the_logits():
    """The label's entry, minus the sum of its row, times the scale was infinite."""
    logits, target = torch.zeros(4, 5000), torch.arange(4)
    options = {"reduction": "sum", "normalizer": 1e30, "logit_scale": 1e36}
    check(*run("cpu", logits, target, edf.CCE(), **options), expected(logits, target, edf.CCE(), **options))


@pytest.mark.parametrize("reduction", ["sum_weight", "none"])
@pytest.mark.parametrize("eps", [1e-46, 1e-300])
def test_eps_that_fp32_has_not(eps, reduction):
    """It is 0 there, and q / (2 q + eps) was 0 / 0 for a label far above the rest."""
    logits = torch.tensor([[200.0, 0.0], [0.0, 1.0]])
    target = torch.tensor([0, 0])
    _, dlogits = run("cpu", logits, target, DM, eps=eps, reduction=reduction)
    assert dlogits.isfinite().all()


def _thread_states() -> int:
    """How many threads Python knows."""
    api = ctypes.pythonapi
    for function in (api.PyInterpreterState_Head, api.PyInterpreterState_ThreadHead, api.PyThreadState_Next):
        function.restype = ctypes.c_void_p
    api.PyInterpreterState_ThreadHead.argtypes = api.PyThreadState_Next.argtypes = [ctypes.c_void_p]
    state, count = api.PyInterpreterState_ThreadHead(api.PyInterpreterState_Head()), 0
    while state:
        state, count = api.PyThreadState_Next(state), count + 1
    return count


@pytest.mark.usefixtures("small_blocks")
def test_threads_leave_nothing_behind():
    """Regions of fewer threads than the last end some of them."""
    before, logits, target = torch.get_num_threads(), *make(150, 90)
    torch.set_num_threads(4)
    run("cpu", logits, target, DM)
    known = _thread_states()
    for _ in range(5):
        run("cpu", logits, target, DM)
    torch.set_num_threads(before)
    assert _thread_states() <= known


@pytest.mark.skipif(sys.platform != "linux", reason="the calls are Linux's")
def test_a_large_gradient_has_its_memory():
    new, populate = _cpu._new_gradient(torch.empty(2048, 1024))
    if populate:
        populate()
    pages = range(-(-new.data_ptr() // mmap.PAGESIZE), (new.data_ptr() + new.nbytes) // mmap.PAGESIZE, 50)
    if _cpu._libc().madvise(
        ctypes.c_void_p(pages[0] * mmap.PAGESIZE), ctypes.c_size_t(mmap.PAGESIZE), _cpu.MADV_POPULATE_WRITE
    ):
        pytest.skip("this kernel takes no such request")
    assert all(_cpu._is_there(page * mmap.PAGESIZE) for page in pages)
    # What nobody has touched is not there.
    untouched = mmap.mmap(-1, 1 << 22)
    address = ctypes.addressof(ctypes.c_char.from_buffer(untouched))
    assert not _cpu._is_there(address + (1 << 21))


@pytest.mark.usefixtures("small_blocks", "two_threads")
class TestThreads:
    @pytest.mark.parametrize("shape", [(101, 90), (370, 90), (3, 5000)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_same_bits_for_any_number(self, shape, dtype):
        logits = torch.randn(shape).to(dtype)
        target = torch.randint(shape[1], (shape[0], *shape[2:]))
        several = run("cpu", logits, target, DM)
        torch.set_num_threads(1)
        one = run("cpu", logits, target, DM)
        assert torch.equal(one[1], several[1])
        assert all(torch.equal(a, b) for a, b in zip(one[0], several[0], strict=True))

    def test_same_bits_every_time(self):
        logits, target = torch.randn(6, 17, 230), torch.randint(17, (6, 230))
        first, again = (run("cpu", logits, target, DM)[1] for _ in range(2))
        assert torch.equal(first, again)

    def test_they_work(self, monkeypatch):
        """Both threads take blocks: the first of each waits for the other's."""
        met = threading.Barrier(2, timeout=30)
        taken = set()
        scratch = _cpu._Blocks.scratch

        def meet(self, dtype):
            taken.add(threading.get_ident())
            met.wait()
            return scratch(self, dtype)

        monkeypatch.setattr(_cpu._Blocks, "scratch", meet)
        _cpu.margin(torch.randn(200, 100), torch.zeros(200, dtype=torch.int64), -100)
        assert len(taken) == 2

    def test_the_number_of_threads_is_left_alone(self):
        run("cpu", *make(101, 90), DM)
        assert torch.get_num_threads() == 2
        seen = []
        other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        other.start()
        other.join()
        assert seen == [2]

    def test_a_failure_in_any_thread_is_raised(self, monkeypatch):
        def fail(self, dtype):
            raise MemoryError("no scratch")

        monkeypatch.setattr(_cpu._Blocks, "scratch", fail)
        with pytest.raises(MemoryError, match="no scratch"):
            dm_loss(*make(101, 90), DM)
        assert torch.get_num_threads() == 2

    @pytest.mark.parametrize("emphasis", [DM, lambda log_p, log_q: 2 * log_q], ids=["built in", "custom"])
    def test_a_tracer_sees_everything(self, emphasis):
        """What a mode records of the computation on rows does not depend on the threads, and replays to the same values."""
        from torch.fx.experimental.proxy_tensor import make_fx

        logits, target = make(200, 30)
        traced = make_fx(lambda z: dm_loss(z, target, emphasis))(logits)
        other = make(200, 30, seed=1).logits
        assert traced(other).item() == dm_loss(other, target, emphasis).item()

    def test_inference_mode(self):
        batch = make(101, 90)
        with torch.inference_mode():
            inside = dm_loss(*batch, DM)
        assert inside.item() == dm_loss(*batch, DM).item()

    def test_called_from_several_threads_at_once(self):
        batches = [make(101, 90, seed=seed) for seed in range(4)]
        alone = [run("cpu", *batch, DM)[1] for batch in batches]
        together: dict[int, torch.Tensor] = {}
        callers = [threading.Thread(target=lambda i=i: together.update({i: run("cpu", *batches[i], DM)[1]})) for i in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert all(torch.equal(alone[i], together[i]) for i in range(4))

    @pytest.mark.parametrize("shape", [(16, 5003), (4, 7, 40, 40)], ids=["rows", "planes"])
    def test_memory_outlives_the_calls_that_look_at_it(self, shape):
        """Many steps in 16 bits, in a process of its own: torch 2.11 crashes where it looks at memory that is free."""
        steps = multiprocessing.get_context("spawn").Process(target=_in_16_bits, args=(shape,))
        steps.start()
        steps.join()
        assert steps.exitcode == 0

    @pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this platform")
    @pytest.mark.skipif(GPU, reason="autograd refuses a fork where a GPU has been used")
    def test_after_a_fork(self):
        """A forked child has none of the threads, and OpenMP would wait for them: it works alone."""
        # From a process of its own: autograd refuses a child of one whose other tests have started threads of its engine.
        parent = multiprocessing.get_context("spawn").Process(target=_with_a_child)
        parent.start()
        parent.join(120)
        assert parent.exitcode == 0


def _in_16_bits(shape: tuple[int, ...]) -> None:
    torch.set_num_threads(1)
    for _ in range(200):
        logits = torch.randn(shape, dtype=torch.bfloat16, requires_grad=True)
        dm_loss(logits, torch.randint(shape[1], (shape[0], *shape[2:])), DM).backward()


def _with_a_child() -> None:
    torch.set_num_threads(2)
    _cpu.BLOCK_ELEMENTS = 2000
    # Rows enough for torch to share what is done for each among threads.
    batch = make(50000, 9)
    _, dlogits = run("cpu", *batch, DM)
    # Whose own backward passes on what it gets.
    overwritten = batch.logits.clone().requires_grad_().clone()
    others = [batch.logits.to(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float64)]
    narrow, dmargins = batch.target.int(), {dtype: torch.ones(50000, dtype=dtype) for dtype in (torch.float32, torch.float64)}
    given = (batch, dlogits, others, overwritten, narrow, dmargins)
    child = multiprocessing.get_context("fork").Process(target=_in_the_child, args=given)
    child.start()
    child.join(60)
    if child.is_alive():
        child.kill()
        child.join()
    sys.exit(child.exitcode != 0)


def _in_the_child(
    batch: tuple[torch.Tensor, torch.Tensor],
    alone: torch.Tensor,
    others: list[torch.Tensor],
    overwritten: torch.Tensor,
    narrow: torch.Tensor,
    dmargins: dict[torch.dtype, torch.Tensor],
) -> None:
    # Nothing but the loss: torch's own calls would wait.
    logits, target = batch
    logits.requires_grad_()
    dm_loss(logits, target, DM).backward()
    assert (logits.grad.numpy() == alone.numpy()).all()
    for logits in others:
        dm_loss(logits.requires_grad_(), target, DM).backward()
    dm_loss(overwritten, target, DM.log_weight, inplace=True).backward()
    for logits in (batch[0], *others):
        # Without a gradient from before, to which torch would add.
        logits.grad = None
        dm_loss(logits, narrow, DM).backward()
        logits.grad = None
        margins = margin(logits, narrow)
        margins.backward(dmargins[margins.dtype])


@pytest.mark.usefixtures("small_blocks", "two_threads")
class TestCompiled:
    """TorchScript and Python run the same walks."""

    def test_this_torch_compiles_them(self):
        assert _walk.walks().run_by == "TorchScript"

    @pytest.mark.parametrize("shape", [(101, 90), (3, 5000), (3, 21, 10, 23), (9, 300, 3)])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("options", [{}, {"logit_scale": 2.0}, {"softcap": 3.0}, {"reduction": "none"}], ids=str)
    def test_same_bits_without(self, shape, dtype, options, monkeypatch):
        logits = torch.randn(shape).to(dtype)
        target = torch.randint(shape[1], (shape[0], *shape[2:]))
        labelled = target.view(-1)[1].clone()
        compiled = [run("cpu", logits, target, DM, **options)]
        target.view(-1)[1] = -100
        compiled.append(run("cpu", logits, target, DM, **options))
        monkeypatch.setattr(_cpu, "walks", lambda: _walk.PLAIN)
        python = [run("cpu", logits, target, DM, **options)]
        target.view(-1)[1] = labelled
        python.insert(0, run("cpu", logits, target, DM, **options))
        torch.testing.assert_close(compiled, python, rtol=0, atol=0, equal_nan=True)

    @pytest.mark.parametrize("error", [OSError("could not get source code"), RuntimeError("Unknown builtin op")], ids=repr)
    def test_where_they_cannot_be(self, error, monkeypatch):
        def fail(source):
            raise error

        _walk.walks.cache_clear()
        with monkeypatch.context() as patched:
            patched.setattr(torch.jit, "CompilationUnit", fail)
            found = _walk.walks()
            assert found.walk is _walk.walk
            assert str(error) in fused_dm.environment_report()
        _walk.walks.cache_clear()
        assert "CPU blocks: run by TorchScript" in fused_dm.environment_report()
