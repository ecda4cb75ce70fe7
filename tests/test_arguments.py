"""Every wrong argument: the error's type, and a message that names the argument, what was expected and what was given."""

import os
import subprocess
import sys

import pytest
import torch
from batches import device_of, make, with_assigned
from tolerance import compare, expected

from fused_dm import DMLoss, LinearDMLoss, dm_loss, edf, margin

LOGITS = torch.zeros(4, 5)
TARGET = torch.zeros(4, dtype=torch.int64)
DM = edf.DM(beta=8, lambd=0.5)


@pytest.mark.parametrize(
    ("logits", "target", "error", "message"),
    [
        ([[0.0]], TARGET, TypeError, r"logits: expected a Tensor, got list"),
        (LOGITS, [0], TypeError, r"target: expected a Tensor, got list"),
        (LOGITS.long(), TARGET, TypeError, r"logits: expected dtype float16.*got torch.int64"),
        (LOGITS.to(torch.complex64), TARGET, TypeError, r"logits: expected dtype float16.*got torch.complex64"),
        (LOGITS, TARGET.float(), TypeError, r"target: expected labels of an integer dtype.*probability targets"),
        (LOGITS, LOGITS, TypeError, r"target: expected labels of an integer dtype.*probability targets"),
        (LOGITS, TARGET.bool(), TypeError, r"target: expected an integer dtype, got torch.bool"),
        (LOGITS.to_sparse(), TARGET, TypeError, r"logits: expected a dense tensor, got torch.sparse_coo"),
        (
            torch.nested.nested_tensor([LOGITS[0], LOGITS[0]], layout=torch.jagged),
            TARGET,
            TypeError,
            r"logits: expected a dense tensor, got a nested one",
        ),
        (
            LOGITS,
            torch.nested.nested_tensor([TARGET], layout=torch.jagged),
            TypeError,
            r"target: expected a dense tensor, got a nested one",
        ),
        (torch.tensor(1.0), TARGET, ValueError, r"logits: expected shape \(V\).*got a 0-d tensor"),
        (LOGITS, TARGET[:3], ValueError, r"target: expected shape \(4,\) for logits of shape \(4, 5\), got \(3,\)"),
        (LOGITS[0], TARGET, ValueError, r"target: expected shape \(\) for logits of shape \(5,\), got \(4,\)"),
        (torch.zeros(4, 5, 2), TARGET, ValueError, r"target: expected shape \(4, 2\).*got \(4,\)$"),
        (
            torch.zeros(2, 3, 5),
            torch.zeros(2, 3, dtype=torch.int64),
            ValueError,
            r"target: expected shape \(2, 5\).*got \(2, 3\); classes come second: pass logits.flatten\(0, -2\)",
        ),
        (torch.zeros(4, 0), TARGET, ValueError, r"logits: expected at least one class, got shape \(4, 0\)"),
        (LOGITS, TARGET.to("meta"), ValueError, r"target: expected device cpu, that of logits, got meta"),
    ],
)
def test_logits_and_target(logits, target, error, message):
    for call in (lambda: dm_loss(logits, target, DM), lambda: DMLoss(DM)(logits, target), lambda: margin(logits, target)):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weight": [1.0]}, TypeError, r"weight: expected a Tensor, got list"),
        ({"weight": torch.ones(4)}, ValueError, r"weight: expected shape \(5,\), got \(4,\)"),
        ({"weight": torch.ones(5, dtype=torch.int64)}, TypeError, r"weight: expected a float dtype, got torch.int64"),
        ({"weight": torch.ones(5, requires_grad=True)}, ValueError, r"weight: expected a tensor that does not require grad"),
        ({"weight": torch.ones(5, device="meta")}, ValueError, r"weight: expected device cpu.*got meta"),
        ({"sample_weight": 1.0}, TypeError, r"sample_weight: expected a Tensor, got float"),
        ({"sample_weight": torch.ones(5)}, ValueError, r"sample_weight: expected shape \(4,\), got \(5,\)"),
        ({"sample_weight": torch.ones(4, requires_grad=True)}, ValueError, r"sample_weight: expected a tensor that does not"),
        ({"ignore_index": 1.5}, TypeError, r"ignore_index: expected an int, got 1.5"),
        ({"ignore_index": True}, TypeError, r"ignore_index: expected an int, got True"),
        ({"ignore_index": 2**63}, ValueError, r"ignore_index: expected a 64-bit integer, got 9223372036854775808"),
        ({"reduction": "avg"}, ValueError, r"reduction: expected one of sum_weight, mean, sum, none, got 'avg'"),
        ({"reduction": "mean", "normalizer": 2.0}, ValueError, r'normalizer: expected reduction="sum" with it.*\'mean\''),
        ({"normalizer": 2.0}, ValueError, r'normalizer: expected reduction="sum" with it.*\'sum_weight\''),
        ({"reduction": "sum", "normalizer": 0.0}, ValueError, r"normalizer: expected a finite number above 0, got 0.0"),
        (
            {"reduction": "sum", "normalizer": float("nan")},
            ValueError,
            r"normalizer: expected a finite number above 0, got nan",
        ),
        ({"reduction": "sum", "normalizer": "2"}, TypeError, r"normalizer: expected a number or a 0-d tensor, got '2'"),
        (
            {"reduction": "sum", "normalizer": torch.ones(1)},
            ValueError,
            r"normalizer: expected a number or a 0-d tensor.*\(1,\)",
        ),
        (
            {"reduction": "sum", "normalizer": torch.ones((), requires_grad=True)},
            ValueError,
            r"normalizer: expected a tensor that does not require grad",
        ),
        (
            {"reduction": "sum", "normalizer": torch.tensor(True)},
            TypeError,
            r"normalizer: expected a real dtype, got torch.bool",
        ),
        (
            {"reduction": "sum", "normalizer": torch.ones((), device="meta")},
            ValueError,
            r"normalizer: expected device cpu, that of logits, got meta",
        ),
        (
            {"reduction": "sum", "normalizer": 10**400},
            ValueError,
            r"normalizer: expected a finite number above 0, got 10000",
        ),
        ({"eps": 10**400}, ValueError, r"eps: expected a finite number, at least 0, got 10000"),
        ({"softcap": 10**400}, ValueError, r"softcap: expected a finite number above 0, got 10000"),
        ({"logit_scale": 0}, ValueError, r"logit_scale: expected a finite number above 0, got 0"),
        ({"weight": torch.ones(5).to_sparse()}, TypeError, r"weight: expected a dense tensor, got torch.sparse_coo"),
        ({"eps": -1.0}, ValueError, r"eps: expected a finite number, at least 0, got -1.0"),
        ({"eps": float("inf")}, ValueError, r"eps: expected a finite number, at least 0, got inf"),
        ({"eps": "small"}, TypeError, r"eps: expected a number or None, got 'small'"),
        ({"label_smoothing": torch.zeros(2)}, ValueError, r"label_smoothing: expected 0, got tensor"),
        ({"label_smoothing": 0.1}, ValueError, r"label_smoothing: expected 0, got 0.1; smoothed labels change the direction"),
        ({"impl": "cuda"}, ValueError, r"impl: expected None or one of triton, cpu, reference, got 'cuda'"),
    ],
)
def test_options(options, error, message):
    with pytest.raises(error, match=message):
        dm_loss(LOGITS, TARGET, DM, **options)
    with pytest.raises(error, match=message):
        DMLoss(DM, **options)(LOGITS, TARGET)
    # Torch itself looks at what a buffer gets.
    with pytest.raises(error, match=f"{message}|cannot assign '(list|float)'"):
        with_assigned(DMLoss(DM), options)(LOGITS, TARGET)


def test_what_is_unusual_is_shown():
    shown = "dm:beta=8,lambd=0.5, reduction='sum_weight', ignore_index=-100, eps=1e-06"
    assert repr(DMLoss(DM)) == f"DMLoss({shown})"
    assert repr(DMLoss(DM, softcap=30.0, inplace=True)) == f"DMLoss({shown}, softcap=30.0, inplace=True)"
    linear = LinearDMLoss(DM, logit_scale=torch.tensor(2.0), recompute=True, max_logits_bytes=1024)
    assert repr(linear) == f"LinearDMLoss({shown}, logit_scale=tensor(2.), recompute=True, max_logits_bytes=1024)"


@pytest.mark.parametrize("impl", ["cpu", "triton", "reference"])
def test_an_assigned_eps_is_computed(impl):
    logits, target = make(6, 9)
    criterion = DMLoss(DM, impl=impl).to(device_of(impl))
    before = criterion.emphasis_params
    for eps, number in ((0.3, 0.3), (None, 1e-6)):
        criterion.eps = eps
        assert criterion.eps == number
        assert f"eps={number}" in repr(criterion)
        leaf = logits.to(device_of(impl), copy=True).requires_grad_()
        criterion(leaf, target.to(leaf.device)).backward()
        truth = expected(logits, target, DM, eps=number)
        compare("dlogits", leaf.grad, truth.dlogits, truth.allowed["dlogits"])
    assert criterion.emphasis_params is before
    criterion.set_emphasis("dm:beta=2,lambd=1")
    assert criterion.emphasis_params.tolist() == [1e-6, 2, 1]


@pytest.mark.parametrize(
    ("emphasis", "error", "message"),
    [
        (None, TypeError, r"emphasis: expected an EDF such as .*, got None"),
        (8.0, TypeError, r"emphasis: expected an EDF such as .*, got 8.0"),
        (edf.DM, TypeError, r"emphasis: expected an EDF such as .*, got <class"),
        (edf.EDF(), TypeError, r"emphasis: expected an EDF such as .*, got the base class EDF"),
        (
            "dn:beta=8",
            ValueError,
            r"emphasis: unknown EDF 'dn'; did you mean 'dm'\? Known: dm, exponential, normal, beta, .*, selfpacedlinear",
        ),
        ("nothing like it", ValueError, r"unknown EDF 'nothing like it'. Known: dm, "),
        ("dm", ValueError, r"EDF 'dm': expected a value for beta, lambd"),
        ("dm:beta=8", ValueError, r"EDF 'dm:beta=8': expected a value for lambd"),
        ("dm:beta=8,gamma=1", ValueError, r"expected each of \(beta, lambd\) at most once, got 'gamma=1'"),
        ("dm:beta=8,beta=9,lambd=1", ValueError, r"expected each of \(beta, lambd\) at most once, got 'beta=9'"),
        ("dm:beta=eight,lambd=1", ValueError, r"expected a number for beta, got 'eight'"),
        ("dm:beta=inf,lambd=1", ValueError, r"DM: expected beta to be a finite number, got inf"),
        ("dm:beta=1,lambd=-1", ValueError, r"DM: expected lambd >= 0, got -1.0"),
        ("gce:q=0", ValueError, r"GCE: expected 0 < q <= 1, got 0.0"),
        ("gce:q=1.5", ValueError, r"GCE: expected 0 < q <= 1, got 1.5"),
    ],
)
def test_emphasis(emphasis, error, message):
    for call in (lambda: dm_loss(LOGITS, TARGET, emphasis), lambda: DMLoss(emphasis)):
        with pytest.raises(error, match=message):
            call()


def test_parameters_of_an_edf():
    with pytest.raises(ValueError, match=r"DM: expected beta to be a finite number, got '8'"):
        edf.DM(beta="8", lambd=1)
    with pytest.raises(ValueError, match=r"IMAE: expected T to be a finite number, got True"):
        edf.IMAE(T=True)


def test_a_subclass_without_a_weight():
    class Mine(edf.EDF):
        pass

    with pytest.raises(TypeError, match=r"Mine: expected the class to define log_weight\(log_p, log_q\)"):
        dm_loss(LOGITS, TARGET, Mine())


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_whole_numbers_are_numbers(impl):
    logits, target = make(6, 9)
    losses = [
        dm_loss(logits, target, DM, reduction="sum", normalizer=number, softcap=number, impl=impl) for number in (10**20, 1e20)
    ]
    assert torch.equal(*losses)


def test_custom_emphasis_of_the_wrong_shape():
    with pytest.raises(ValueError, match=r"emphasis: expected log_weight to return a tensor of shape \(4,\), got \(\)"):
        dm_loss(LOGITS, TARGET, lambda log_p, log_q: log_p.sum())
    with pytest.raises(ValueError, match=r"emphasis: expected log_weight to return a tensor of shape \(4,\), got float"):
        dm_loss(LOGITS, TARGET, lambda log_p, log_q: 0.0)
    with pytest.raises(ValueError, match=r"emphasis: expected log_weight to return a float tensor, got torch.complex64"):
        dm_loss(LOGITS, TARGET, lambda log_p, log_q: torch.complex(log_p, log_q))


def test_set_emphasis():
    criterion = DMLoss("dm:beta=2,lambd=0.5")
    with pytest.raises(ValueError, match=r"set_emphasis: expected an EDF of the family 'dm', got gce:q=0.7"):
        criterion.set_emphasis("gce")
    with pytest.raises(ValueError, match=r"set_emphasis: expected a built-in EDF.*got a callable"):
        criterion.set_emphasis(lambda log_p, log_q: log_p)


def test_kernels_are_refused_on_the_cpu_without_the_interpreter():
    code = (
        "import torch, fused_dm\n"
        "assert fused_dm.available_impls() == ('cpu', 'reference') or torch.cuda.is_available()\n"
        "fused_dm.dm_loss(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), 'cce', impl='triton')\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([".", "kernels"])}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert "ValueError: impl='triton': expected logits on a GPU, got the CPU" in done.stderr


def test_implementations_of_this_machine():
    import fused_dm

    assert fused_dm.available_impls() == ("triton", "cpu", "reference")
