"""Schedules of an EDF's parameters: the values at each step, resuming, one compile, graphs, and what is refused."""

import copy
import dataclasses
import math
import pickle

import pytest
import torch
from batches import GPU, device_of, make, run
from tolerance import check, expected
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from fused_dm import DMLoss, dm_loss, edf
from fused_dm.schedules import Cosine, Linear, Schedule, Step

IMPLEMENTATIONS = ("cpu", "triton")


def criterion_at(beta=0.0, lambd=0.5, **options):
    return DMLoss(edf.DM(beta=beta, lambd=lambd), **options)


def values(schedule, criterion, steps):
    """beta after 0, 1, ... `steps` steps, as the criterion's EDF and its buffer have it."""
    found = []
    for step in range(steps + 1):
        assert schedule.last_step == step
        assert criterion.emphasis == schedule.emphasis_at(step)
        assert criterion.emphasis_params.tolist() == [criterion.eps, *criterion.emphasis.params]
        found.append(criterion.emphasis.beta)
        schedule.step()
    return found


def test_linear():
    criterion = criterion_at(beta=1)
    assert values(Linear(criterion, steps=10, beta=8), criterion, 12) == [
        *(1 + 7 * (step / 10) for step in range(10)),
        8.0,
        8.0,
        8.0,
    ]


def test_cosine():
    criterion = criterion_at()
    found = values(Cosine(criterion, steps=8, beta=8), criterion, 9)
    assert found == pytest.approx([4 * (1 - math.cos(math.pi * min(step, 8) / 8)) for step in range(10)], abs=1e-14)
    assert found[8] == found[9] == 8.0


def test_step():
    criterion = criterion_at()
    schedule = Step(criterion, milestones=[2, 5], beta=[4, 8], lambd=[1, 2])
    assert values(schedule, criterion, 6) == [0, 0, 4, 4, 4, 8, 8]
    assert criterion.emphasis.lambd == 2


def test_a_schedule_of_your_own():
    class Quadratic(Schedule):
        @staticmethod
        def fraction(time):
            return time**2

    criterion = criterion_at()
    schedule = Quadratic(criterion, milestones=[2, 4], values={"beta": [0, 8, 0]})
    assert values(schedule, criterion, 5) == [0, 2, 8, 6, 0, 0]


def test_several_parameters_with_starts_of_their_own():
    criterion = criterion_at(beta=3, lambd=0.5)
    schedule = Linear(criterion, steps=4, beta=(0, 8), lambd=1)
    assert criterion.emphasis == edf.DM(beta=0, lambd=0.5)
    schedule.step()
    assert criterion.emphasis == edf.DM(beta=2, lambd=0.625)


@pytest.mark.parametrize(
    ("emphasis", "parameter", "end"),
    [(edf.Exponential(beta=0), "beta", 2), (edf.IMAE(T=0), "T", 8), (edf.GCE(q=1), "q", 0.5)],
    ids=str,
)
def test_parameters_have_the_names_of_the_edf(emphasis, parameter, end):
    criterion = DMLoss(emphasis)
    schedule = Linear(criterion, steps=2, **{parameter: end})
    for _ in range(2):
        schedule.step()
    assert criterion.emphasis == type(emphasis)(**{parameter: end})
    assert criterion.emphasis_params.tolist() == [criterion.eps, *criterion.emphasis.params]


@pytest.mark.parametrize("kind", edf.CATALOGUE, ids=lambda kind: kind.__name__)
def test_every_edf_of_the_catalogue(kind):
    fields = dataclasses.fields(kind)
    values = {field.name: 2.0 if field.default is dataclasses.MISSING else field.default for field in fields}
    for name, value in values.items():
        criterion = DMLoss(kind(**values))
        end = value + 1 if isinstance(value, int) else value + 0.01
        Linear(criterion, steps=1, **{name: end}).step()
        assert criterion.emphasis == kind(**{**values, name: end})
        assert criterion.emphasis_params.tolist() == [criterion.eps, *criterion.emphasis.params]


def test_a_registered_edf():
    @edf.register
    def scheduled_bell(log_p, log_q, beta=0.0):
        return beta * (log_p + log_q).exp()

    criterion = DMLoss(scheduled_bell())
    Linear(criterion, steps=2, beta=8).step()
    assert str(criterion.emphasis) == "scheduled_bell:beta=4"
    assert criterion.emphasis_params.tolist() == [1e-6, 4.0]


def test_a_ramp_over_values_that_the_edf_does_not_take():
    criterion = DMLoss(edf.TaylorCE(t=2))
    with pytest.raises(ValueError, match=r"Linear: not possible at step 1 of 4: TaylorCE: expected t to be an integer"):
        Linear(criterion, steps=4, t=4)
    Linear(criterion, steps=4, t=6).step()
    assert criterion.emphasis == edf.TaylorCE(t=3)


def test_parts_of_compositions():
    criterion = DMLoss("0.5*cce+gce:q=0.9", reduction="mean")
    schedule = Linear(criterion, steps=2, **{"parts.0.factor": 1, "parts.1.q": 0.5})
    for _ in range(2):
        schedule.step()
    assert criterion.emphasis == edf.parse("1*cce+gce:q=0.5")
    assert criterion.emphasis_params.tolist() == [0, *criterion.emphasis.params]
    assert set(criterion.state_dict()) == {"schedule._extra_state"}
    resumed = DMLoss("0.7*cce+gce:q=0.8", reduction="mean")
    Linear(resumed, steps=2, **{"parts.1.q": 0.5, "parts.0.factor": 1})
    schedule.last_step = 1
    resumed.load_state_dict(criterion.state_dict())
    assert resumed.emphasis == edf.parse("0.75*cce+gce:q=0.7")
    criterion.set_emphasis("0.1*cce+gce:q=0.1")
    criterion.load_state_dict(resumed.state_dict())
    assert criterion.emphasis == edf.parse("0.75*cce+gce:q=0.7")
    truncated = DMLoss("mae[0.2,0.9]")
    Linear(truncated, steps=2, low=(0, 0.5))
    assert truncated.emphasis == edf.MAE().truncate(0, 0.9)
    with pytest.raises(ValueError, match=r"known: parts\.0\.factor, parts\.1\.q"):
        Linear(criterion, steps=2, q=0.5)


def test_what_is_shown_is_the_present():
    criterion = criterion_at()
    schedule = Linear(criterion, steps=4, beta=8)
    schedule.step()
    assert "dm:beta=2,lambd=0.5" in repr(criterion)
    assert "(schedule): Linear(beta: 0 -> 8, step 1 of 4)" in repr(criterion)


def test_two_schedules_of_one_criterion():
    criterion = criterion_at()
    beta = Linear(criterion, steps=4, beta=8)
    lambd = Step(criterion, milestones=[1], lambd=[1])
    for schedule in (beta, lambd, beta):
        schedule.step()
    assert criterion.emphasis == edf.DM(beta=4, lambd=1)
    assert set(criterion.state_dict()) == {"schedule._extra_state", "schedule2._extra_state"}
    resumed = criterion_at()
    Linear(resumed, steps=4, beta=8)
    Step(resumed, milestones=[1], lambd=[1])
    resumed.load_state_dict(criterion.state_dict())
    assert resumed.emphasis == criterion.emphasis
    with pytest.raises(ValueError, match="beta has a schedule already"):
        Cosine(criterion, steps=4, beta=8)
    del criterion.schedule
    Cosine(criterion, steps=4, beta=0)
    assert criterion.emphasis == edf.DM(beta=4, lambd=1)


def test_a_parameter_that_is_not_scheduled_may_be_set():
    criterion = criterion_at()
    schedule = Linear(criterion, steps=4, beta=8)
    criterion.set_emphasis(edf.DM(beta=7, lambd=2))
    schedule.step()
    assert criterion.emphasis == edf.DM(beta=2, lambd=2)


def model_with_criterion(beta=0.0, steps=10):
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), criterion_at(beta=beta, weight=torch.ones(5)))
    return model, Linear(model[1], steps=steps, beta=8)


def test_resuming_from_a_model_that_holds_the_criterion(tmp_path):
    model, schedule = model_with_criterion()
    for _ in range(4):
        schedule.step()
    torch.save(model.state_dict(), tmp_path / "checkpoint.pt")
    # The present value at the restart is another one: the start is that of the first run.
    again, resumed = model_with_criterion(beta=3)
    again.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    assert resumed.last_step == 4
    for _ in range(7):
        assert again[1].emphasis == model[1].emphasis
        assert torch.equal(again[1].emphasis_params, model[1].emphasis_params)
        schedule.step()
        resumed.step()


# As is meant: of a single process.
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")
def test_resuming_from_a_distributed_checkpoint(tmp_path):
    model, schedule = model_with_criterion()
    for _ in range(4):
        schedule.step()
    state = get_model_state_dict(model)
    assert set(state) == set(model.state_dict())
    distributed_checkpoint.save({"model": state}, checkpoint_id=tmp_path, no_dist=True)
    again, resumed = model_with_criterion(beta=3)
    loaded = {"model": get_model_state_dict(again)}
    distributed_checkpoint.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    set_model_state_dict(again, loaded["model"])
    assert resumed.last_step == 4
    assert again[1].emphasis == model[1].emphasis
    assert torch.equal(again[0].weight, model[0].weight)


def test_resuming_from_the_schedule_alone():
    _, schedule = model_with_criterion()
    for _ in range(4):
        schedule.step()
    state = schedule.state_dict()
    assert {key: (value.dtype, value.device.type) for key, value in state.items()} == {"_extra_state": (torch.float64, "cpu")}
    again, resumed = model_with_criterion()
    resumed.load_state_dict(state)
    assert again[1].emphasis == edf.DM(beta=8 * (4 / 10), lambd=0.5)


def test_state_survives_a_cast_of_the_model():
    model, schedule = model_with_criterion(beta=0.7)
    model.to(torch.bfloat16)
    schedule.step()
    assert schedule.state_dict()["_extra_state"][-1].item() == 0.7
    assert model[1].emphasis_params[1].item() == 0.7 + (8 - 0.7) * 0.1


def test_states_that_do_not_fit():
    criterion = criterion_at()
    schedule = Linear(criterion, steps=4, lambd=2)
    schedule.step()
    before = criterion.emphasis
    with pytest.raises(RuntimeError, match=r"Missing key.*schedule._extra_state"):
        criterion.load_state_dict(criterion_at().state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*schedule._extra_state"):
        criterion_at().load_state_dict(criterion.state_dict())
    other, both = criterion_at(), criterion_at()
    Linear(other, steps=4, beta=2)
    Linear(both, steps=4, beta=2, lambd=2)
    states = [other.state_dict()["schedule._extra_state"], both.state_dict()["schedule._extra_state"]]
    for state in (*states, torch.tensor(1.0), torch.empty(0), torch.zeros(2), {"last_step": 1}):
        with pytest.raises(
            RuntimeError, match=r"schedule: Linear: expected the state of a schedule of lambd, got another one's"
        ):
            criterion.load_state_dict({"schedule._extra_state": state})
    wrong = criterion.state_dict()["schedule._extra_state"].clone()
    wrong[0], wrong[-1] = 0, -3
    with pytest.raises(RuntimeError, match=r"schedule: DM: expected lambd >= 0, got -3"):
        criterion.load_state_dict({"schedule._extra_state": wrong})
    assert criterion.emphasis == before
    assert schedule.last_step == 1
    assert schedule.values_at(0) == {"lambd": 0.5}
    criterion.load_state_dict({}, strict=False)
    assert schedule.last_step == 1


def test_a_step_before_the_first():
    with pytest.raises(ValueError, match=r"Linear: expected a step of at least 0, got -1"):
        Linear(criterion_at(), steps=4, beta=8).values_at(-1)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_has_a_schedule_of_its_own(duplicate):
    criterion = criterion_at()
    Linear(criterion, steps=4, beta=8)
    other = duplicate(criterion)
    other.schedule.step()
    assert other.emphasis == edf.DM(beta=2, lambd=0.5)
    assert criterion.emphasis == edf.DM(beta=0, lambd=0.5)


@pytest.mark.parametrize(
    ("make_schedule", "error", "message"),
    [
        (lambda c: Linear(c, steps=4, gamma=2), ValueError, r"no parameter 'gamma'; known: beta, lambd"),
        (lambda c: Linear(c, steps=4), ValueError, r"Linear: expected a parameter to schedule, one of: beta, lambd"),
        (lambda c: Linear(c, steps=4, lambd=-1), ValueError, r"step 2 of 4: DM: expected lambd >= 0, got -0\.25"),
        (lambda c: Linear(c, steps=4, beta=math.inf), ValueError, r"expected beta to be a finite number"),
        (lambda c: Linear(c, steps=4, beta=10**400), ValueError, r"expected beta to be a number that fp32 can hold, got 1000"),
        (lambda c: Step(c, 5, beta=[1]), TypeError, r"Step: expected a list of milestones, got 5"),
        (lambda c: Linear(c, steps=4, beta="8"), TypeError, r"Linear: expected beta to be a number, got '8'"),
        (lambda c: Linear(c, steps=4, beta=True), TypeError, r"expected beta to be a number"),
        (lambda c: Linear(c, steps=0, beta=8), ValueError, r"expected steps of at least 1, got 0"),
        (lambda c: Linear(c, steps=2.5, beta=8), TypeError, r"expected steps to be whole numbers of steps, got 2\.5"),
        (lambda c: Step(c, milestones=[3, 3], beta=[1, 2]), ValueError, r"expected increasing milestones, got \[3, 3\]"),
        (lambda c: Step(c, milestones=[], beta=[]), ValueError, r"expected increasing milestones"),
        (
            lambda c: Step(c, milestones=[3], beta=[1, 2]),
            ValueError,
            r"expected 1 values of beta, one for each milestone, got 2",
        ),
        (lambda c: Step(c, milestones=[3], beta=8), TypeError, r"expected a list of values of beta"),
        (lambda c: Linear(torch.nn.CrossEntropyLoss(), steps=4, beta=8), TypeError, r"expected criterion to be a DMLoss"),
        (lambda c: Linear(DMLoss(lambda p, q: q), steps=4, beta=8), ValueError, r"a callable has no parameters"),
        (lambda c: Linear(DMLoss("cce"), steps=4, beta=8), ValueError, r"cce has no parameter 'beta'"),
    ],
)
def test_refusals(make_schedule, error, message):
    criterion = criterion_at()
    with pytest.raises(error, match=message):
        make_schedule(criterion)
    assert criterion.emphasis == edf.DM(beta=0, lambd=0.5)
    assert list(criterion.children()) == []


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("of_compiled", [False, True], ids=["of the module", "of the compiled module"])
@pytest.mark.parametrize("emphasis", ["dm:beta=0,lambd=0.5", "dm:beta=0,lambd=0.5*cce"])
def test_a_training_run_compiles_once(impl, of_compiled, emphasis):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    device = device_of(impl)
    criterion = DMLoss(emphasis, impl=impl).to(device)
    compiled = torch.compile(criterion, fullgraph=True, backend=counter)
    beta, lambd = ("parts.0.beta", "parts.0.lambd") if "*" in emphasis else ("beta", "lambd")
    schedule = Linear(compiled if of_compiled else criterion, steps=10, **{beta: 8, lambd: 1})
    logits, target = make(12, 30)
    for _ in range(12):
        leaf = logits.to(device, copy=True).requires_grad_()
        loss = compiled(leaf, target.to(device))
        loss.backward()
        output, dlogits = run(impl, logits, target, criterion.emphasis)
        assert torch.equal(loss, output.loss)
        assert torch.equal(leaf.grad, dlogits)
        check(output, dlogits, expected(logits, target, criterion.emphasis))
        schedule.step()
    assert criterion.emphasis.params == (8, 1)
    assert counter.frame_count == 1
    assert criterion.schedule is schedule


def test_a_step_changes_the_buffer_in_place():
    criterion = criterion_at()
    buffer = criterion.emphasis_params
    schedule = Linear(criterion, steps=4, beta=8)
    schedule.step()
    assert criterion.emphasis_params is buffer
    assert buffer.tolist() == [1e-6, 2.0, 0.5]


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("reduction", ["sum_weight", "mean"])
def test_a_replayed_graph_sees_the_schedule(reduction):
    logits, target = (tensor.cuda() for tensor in make(64, 1000))
    criterion = criterion_at(reduction=reduction).cuda()
    schedule = Linear(criterion, steps=4, beta=8)
    static = logits.clone().requires_grad_()

    def step():
        static.grad = None
        criterion(static, target).backward()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(5):
        graph.replay()
        assert torch.equal(static.grad, run("triton", logits, target, criterion.emphasis, reduction=reduction)[1])
        schedule.step()


@pytest.mark.skipif(not GPU, reason="synchronisation is that of a GPU")
def test_a_step_does_not_wait_for_the_gpu():
    criterion = criterion_at().cuda()
    schedule = Linear(criterion, steps=4, beta=8)
    try:
        torch.cuda.set_sync_debug_mode("error")
        schedule.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_training_with_a_schedule():
    torch.manual_seed(0)
    logits = torch.randn(32, 10, requires_grad=True)
    target = torch.randint(10, (32,))
    criterion = criterion_at()
    schedule = Linear(criterion, steps=20, beta=8)
    optimizer = torch.optim.SGD([logits], lr=10.0)
    first = dm_loss(logits, target, "cce", reduction="mean").item()
    for _ in range(40):
        optimizer.zero_grad()
        criterion(logits, target).backward()
        optimizer.step()
        schedule.step()
    assert dm_loss(logits, target, "cce", reduction="mean").item() < first / 2


def test_an_edf_that_is_assigned_is_computed():
    logits, target = make(6, 9)
    criterion = DMLoss(edf.DM(beta=8, lambd=0.5))
    criterion.emphasis = edf.DM(beta=1, lambd=2)
    assert torch.equal(criterion(logits, target), dm_loss(logits, target, edf.DM(beta=1, lambd=2)))
    with pytest.raises(ValueError, match="expected an EDF of the family"):
        criterion.emphasis = edf.Focal()
    assert criterion.emphasis == edf.DM(beta=1, lambd=2)


def test_a_schedule_of_a_parameter_that_is_gone():
    """`imae` is a name of the same family, whose parameter is another."""
    criterion = DMLoss("dm:beta=8,lambd=0.5")
    schedule = Linear(criterion, steps=4, beta=2)
    criterion.set_emphasis(edf.IMAE())
    with pytest.raises(ValueError, match=r"Linear: imae:T=8, the criterion's EDF by now, has no parameter \['beta'\]"):
        schedule.step()


def test_a_schedule_without_its_way():
    with pytest.raises(TypeError, match=r"Schedule: expected the class to define fraction\(time\)"):
        Schedule(DMLoss("dm:beta=0,lambd=0"), [10], {"beta": [0, 8]})
