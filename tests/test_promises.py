"""What the package promises, a class for each promise; the longer proofs of some are in files of their own, named here.

| promise | precisely | also in |
|---|---|---|
| accuracy | elementwise within the derived bound of the fp64 reference on the same inputs | test_loss, test_margin |
| determinism | the same inputs of the same alignment give the same bits, every call, every implementation | test_loss |
| no host sync | forward and backward, and capturable in a CUDA graph | test_operators |
| torch citizenship | opcheck, compile, autocast; another backward is right or an error | test_operators, test_transforms |
| inputs intact | logits are never changed unless `inplace=True` | test_inplace |
| bad arguments | the argument, what was expected and what was given, before any launch | test_arguments |
| label out of range | IndexError on the CPU; nan on a GPU, and no access outside a tensor | test_edges |
| nan and inf in logits | -inf is fine; nan and +inf make the row's value nan | test_edges |
| empty batch, all ignored, V = 1, p = 0, p = 1 | defined | test_edges |
| size | N V beyond 2^31, V up to 1e7 | test_loss |
"""

import ast
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import DTYPES, GPU, IMPLEMENTATIONS, device_of, make, run
from tolerance import check, compare, expected

from fused_dm import dm_loss, edf

DM = edf.DM(beta=8, lambd=0.5)
KERNELS = Path(__file__).parents[1] / "kernels" / "fused_dm_kernels"
FUSED = ("cpu", "triton")


class TestAccuracy:
    @pytest.mark.parametrize("impl", IMPLEMENTATIONS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_every_element_is_within_the_bound(self, impl, dtype):
        logits, target = make(30, 200, dtype, margins=40.0, ignored=0.1)
        check(*run(impl, logits, target, DM), expected(logits, target, DM))

    @pytest.mark.parametrize("impl", FUSED)
    def test_near_certainty_at_a_large_vocabulary(self, impl):
        """V = 128256, fp32, eps = 0, 1 - p from 1e-3 to 1e-12: six digits in the label's entry and in the row's L1 norm."""
        from bench.accuracy import near_certainty

        logits, target = near_certainty(128256)
        truth = expected(logits, target, DM, eps=0.0)
        output, dlogits = run(impl, logits, target, DM, eps=0.0)
        check(output, dlogits, truth)
        got, exact = dlogits.double().cpu(), truth.dlogits
        label = (got[:, 0] - exact[:, 0]).abs() / exact[:, 0].abs()
        norm = (got.abs().sum(1) - exact.abs().sum(1)).abs() / exact.abs().sum(1)
        assert label.max() <= 1e-6
        assert norm.max() <= 1e-6


class TestDeterminism:
    @pytest.mark.parametrize("impl", IMPLEMENTATIONS)
    @pytest.mark.parametrize("reduction", ["sum_weight", "mean"])
    def test_same_bits(self, impl, reduction):
        batch = make(70, 300, torch.bfloat16)
        (first, gradient), (second, again) = (run(impl, *batch, DM, reduction=reduction) for _ in range(2))
        assert torch.equal(gradient, again)
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second, strict=True))

    def test_no_float_atomics(self):
        for path in KERNELS.glob("*.py"):
            names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
            assert not {name for name in names if name.startswith("atomic")}, path


class TestNoHostSync:
    @pytest.mark.skipif(not GPU, reason="a synchronisation can be seen only on a GPU")
    @pytest.mark.parametrize("options", [{}, {"reduction": "mean"}, {"reduction": "none"}, {"inplace": True}], ids=str)
    def test_on_a_gpu(self, options):
        logits, target = (tensor.cuda() for tensor in make(64, 1000))
        leaf = logits.requires_grad_()
        dm_loss(leaf * 1, target, DM, **options).sum().backward()
        try:
            torch.cuda.set_sync_debug_mode("error")
            dm_loss(leaf * 1, target, DM, **options).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize("name", ["_triton", "_loss", "_rows"])
    def test_nothing_is_read_back_by_the_code(self, name):
        """No `.item()`, `.cpu()`, `.tolist()`, `.nonzero()` or conversion of a tensor to a number on the way to a kernel."""
        path = Path(__file__).parents[1] / "fused_dm" / f"{name}.py"
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        names = {call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "") for call in calls}
        assert not names & {"item", "cpu", "tolist", "nonzero", "numpy", "float", "int", "bool", "synchronize"}


class TestTorchCitizenship:
    @pytest.mark.parametrize("impl", FUSED)
    def test_one_graph(self, impl):
        torch._dynamo.reset()
        logits, target = make(12, 30)
        leaf = logits.to(device_of(impl), copy=True).requires_grad_()
        compiled = torch.compile(
            lambda z, y: dm_loss(z, y, DM, impl=impl, return_output=True), fullgraph=True, backend="aot_eager"
        )
        output = compiled(leaf, target.to(leaf.device))
        output.loss.backward()
        check(output, leaf.grad, expected(logits, target, DM))
        torch._dynamo.reset()

    @pytest.mark.parametrize("impl", FUSED)
    @pytest.mark.parametrize("options", [{}, {"reduction": "mean"}, {"inplace": True}], ids=str)
    def test_a_consumed_buffer_is_named(self, impl, options):
        logits, target = make(6, 9)
        leaf = logits.to(device_of(impl)).requires_grad_()
        loss = dm_loss(leaf * 1, target.to(leaf.device), DM, impl=impl, **options)
        loss.backward(retain_graph=True)
        first, leaf.grad = leaf.grad, None
        if impl == "triton" and not options:
            loss.backward()
            assert torch.equal(first, leaf.grad)
        else:
            with pytest.raises(RuntimeError, match=r"used up by the first backward pass.*retain_graph=True"):
                loss.backward()


class TestInputsIntact:
    @pytest.mark.parametrize("impl", IMPLEMENTATIONS)
    @pytest.mark.parametrize("reduction", ["sum_weight", "mean", "sum", "none"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_nothing_given_is_changed(self, impl, reduction, dtype):
        device = device_of(impl)
        logits, target = (tensor.to(device) for tensor in make(20, 50, dtype, ignored=0.2))
        given = [logits, target, torch.rand(50, device=device), torch.rand(20, device=device)]
        before = [tensor.clone() for tensor in given]
        leaf = given[0].requires_grad_()
        loss = dm_loss(leaf, target, DM, weight=given[2], sample_weight=given[3], reduction=reduction, impl=impl)
        loss.sum().backward()
        assert all(torch.equal(now, then) for now, then in zip(given, before, strict=True))


class TestBadArguments:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"target": torch.zeros(3, dtype=torch.int64)}, ValueError, r"target: expected shape \(4,\).*got \(3,\)"),
            ({"target": torch.zeros(4)}, TypeError, r"target: expected labels of an integer dtype, got torch.float32"),
            ({"logits": torch.zeros(4, 5).int()}, TypeError, r"logits: expected dtype float16.*got torch.int32"),
            ({"weight": torch.ones(4)}, ValueError, r"weight: expected shape \(5,\), got \(4,\)"),
            ({"weight": torch.ones(5, device="meta")}, ValueError, r"weight: expected device cpu.*got meta"),
            ({"reduction": "average"}, ValueError, r"reduction: expected one of sum_weight, mean, sum, none, got 'average'"),
            ({"emphasis": "dm:beta=8,lambd=-1"}, ValueError, r"DM: expected lambd >= 0, got -1.0"),
            ({"eps": -1.0}, ValueError, r"eps: expected a finite number, at least 0, got -1.0"),
            ({"inplace": 1}, TypeError, r"inplace: expected a bool, got 1"),
        ],
    )
    def test_before_any_launch(self, change, error, message, monkeypatch):
        from fused_dm import _operators

        def launched(*_):
            raise AssertionError("an implementation was reached")

        monkeypatch.setattr(_operators, "_triton", launched)
        monkeypatch.setattr(_operators, "_cpu", None)
        call = {"logits": torch.zeros(4, 5), "target": torch.zeros(4, dtype=torch.int64), "emphasis": DM, **change}
        with pytest.raises(error, match=message):
            dm_loss(**call)


class TestLabelOutOfRange:
    def test_on_the_cpu(self):
        with pytest.raises(IndexError, match=r"target: expected labels in \[0, 5\) or ignore_index=-100, got 7 at row 1"):
            dm_loss(torch.zeros(2, 5), torch.tensor([0, 7]), DM)

    @pytest.mark.parametrize("reduction", ["sum_weight", "mean", "none"])
    def test_in_a_kernel(self, reduction):
        """Its row is nan; the interpreter's check of every lane stands for "no access outside a tensor"."""
        output, _ = run("triton", torch.zeros(2, 5), torch.tensor([0, 7]), DM, reduction=reduction)
        assert output.target_prob.isnan().tolist() == [False, True]
        assert output.loss.isnan().any()


class TestNanAndInf:
    @pytest.mark.parametrize("impl", IMPLEMENTATIONS)
    def test_minus_infinity_is_fine(self, impl):
        logits, target = make(10, 20)
        logits[:, 3] = -math.inf
        target[target == 3] = 4
        check(*run(impl, logits, target, DM), expected(logits, target, DM))

    @pytest.mark.parametrize("impl", IMPLEMENTATIONS)
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_the_row_and_the_batch(self, impl, bad):
        logits, target = make(10, 20)
        logits[4, 0] = bad
        with np.errstate(invalid="ignore"):
            rows, _ = run(impl, logits, target, DM, reduction="none")
            batch, _ = run(impl, logits, target, DM)
        assert rows.loss.isnan().nonzero().flatten().tolist() == [4]
        assert batch.loss.isnan()


class TestDefinedEdges:
    @pytest.mark.parametrize("impl", IMPLEMENTATIONS)
    @pytest.mark.parametrize("reduction", ["sum_weight", "mean", "sum", "none"])
    @pytest.mark.parametrize(
        ("logits", "target"),
        [
            (torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)),
            (torch.randn(3, 5), torch.full((3,), -100)),
            (torch.tensor([[2.0], [3.0]]), torch.tensor([0, 0])),
        ],
        ids=["empty", "all ignored", "one class"],
    )
    def test_value_and_gradient_are_zero(self, impl, reduction, logits, target):
        output, dlogits = run(impl, logits, target, DM, reduction=reduction)
        assert (output.loss == 0).all()
        assert torch.equal(dlogits, torch.zeros_like(dlogits))

    @pytest.mark.parametrize("impl", IMPLEMENTATIONS)
    @pytest.mark.parametrize("emphasis", [DM, edf.CCE(), edf.MAE()], ids=str)
    def test_certainty_and_impossibility(self, impl, emphasis):
        logits = torch.tensor([[1e4, 0.0, 0.0], [-1e4, 0.0, 0.0], [0.0, 0.0, 0.0]])
        target = torch.zeros(3, dtype=torch.int64)
        check(*run(impl, logits, target, emphasis, reduction="sum"), expected(logits, target, emphasis, reduction="sum"))

    def test_the_reported_value_is_not_clamped(self):
        for impl in IMPLEMENTATIONS:
            output, _ = run(impl, torch.tensor([[-800.0, 0.0]]), torch.tensor([0]), edf.CCE(), reduction="sum")
            assert output.loss.item() == 800.0


class TestSize:
    @pytest.mark.parametrize("impl", IMPLEMENTATIONS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_ten_million_classes(self, impl, dtype):
        # The interpreter takes a minute for so many; the offsets of a row do not change after its first blocks.
        classes = 1_000_000 if impl == "triton" and not GPU else 10_000_000
        logits, target = make(1, classes, dtype)
        check(*run(impl, logits, target, DM), expected(logits, target, DM))

    @pytest.mark.skipif(not GPU, reason="takes the memory of a GPU")
    @pytest.mark.parametrize("reduction", ["sum_weight", "mean"])
    def test_more_than_2_to_the_31_elements(self, reduction):
        rows, classes = 17000, 128256
        logits = torch.randn(rows, classes, dtype=torch.bfloat16, device="cuda")
        target = torch.randint(classes, (rows,), device="cuda")
        few = torch.tensor([0, 1, rows // 2, rows - 2, rows - 1], device="cuda")
        leaf = logits.requires_grad_()
        output = dm_loss(leaf, target, DM, reduction=reduction, return_output=True)
        output.loss.backward()
        divisor = output.sum_weight.item() if reduction == "sum_weight" else float(rows)
        truth = expected(logits.detach()[few], target[few], DM, reduction="sum", normalizer=divisor)
        for name, got in (
            ("dlogits", leaf.grad[few]),
            ("example_weight", output.example_weight[few]),
            ("target_prob", output.target_prob[few]),
        ):
            compare(name, got, getattr(truth, name), truth.allowed[name])
