"""The operators as torch sees them: opcheck, compilation, autocast, a second backward, a schedule without recompiling."""

import contextlib

import pytest
import torch
from batches import DTYPES, GPU, device_of, make, run
from tolerance import check, compare, expected, expected_linear
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from fused_dm import DMLoss, _operators, dm_loss, edf, linear_dm_loss, margin

DM = edf.DM(beta=8, lambd=0.5)

PARAMS = torch.tensor([1e-6, 8.0, 0.5], dtype=torch.float64)
IMPLEMENTATIONS = ("cpu", "triton")
# Dynamo cannot trace into a kernel in the interpreter, and need not: the operator is opaque to it.


def custom(log_p, log_q):
    return 2 * log_q


def arguments(dtype, impl, rows=4, strided=False):
    # No ignored row: opcheck takes the nan of its margin for a difference.
    logits, target = make(rows, 20, dtype)
    if strided:
        wide = torch.zeros(rows, 32, dtype=dtype)
        wide[:, :20] = logits
        logits = wide[:, :20]
    device = device_of(impl)
    return logits.to(device).requires_grad_(), target.to(device), PARAMS.to(device)


def operators(dtype, impl, **shape):
    """(operator, arguments) for every operator of an implementation."""
    logits, target, params = arguments(dtype, impl, **shape)
    plain, rows = logits.detach(), logits.shape[0]
    margins, statistics = _operators.margin(plain, target, -100, impl)
    yield _operators.margin, (logits, target, -100, impl)
    yield _operators.margin_gradient, (plain, target, statistics, torch.ones_like(margins), -100, impl)
    yield _operators.margin_gradient_, (plain.clone(), target, statistics, torch.ones_like(margins), -100, impl)
    coefficient = margins.new_ones(rows)
    if impl == "cpu":
        value = margins.new_ones(()).requires_grad_(False)
        yield _operators.attach_to_margin, (margins.clone().requires_grad_(), value, coefficient)
        yield _operators.cpu_direction, (plain, target, -100, True)
        yield _operators.cpu_direction_, (plain.clone(), target, -100, False)
        direction = _operators.cpu_direction(plain, target, -100, False)[3]
        yield _operators.scale_rows_, (direction.clone(), coefficient, coefficient.clone(), torch.ones(()), True)
        yield _operators.attach_direction, (logits, value, direction, coefficient, coefficient.clone(), True)
        return
    normalizer = torch.full((), 3.0, dtype=torch.float64, device=plain.device)
    weight = torch.ones(rows, dtype=margins.dtype, device=plain.device)
    of_class = torch.ones(20, dtype=margins.dtype, device=plain.device)
    yield _operators.triton_divisor, (target, of_class, weight, 20, -100, margins.dtype)
    yield _operators.triton_loss, (logits, target, of_class, weight, params, None, "dm", -100)
    yield _operators.triton_loss, (logits, target, None, None, params, normalizer, "dm", -100)
    loss, buffer, totals = _operators.triton_loss(plain, target, None, None, params, None, "dm", -100)
    yield _operators.triton_received, (target, buffer, totals, -100)
    yield _operators.triton_gradient, (plain, target, buffer, totals, torch.ones_like(loss), -100)
    yield _operators.triton_gradient_, (plain.clone(), target, buffer, totals, torch.ones_like(loss), -100)
    yield _operators.attach_rows, (logits, loss, target, buffer, totals, -100, False)
    yield _operators.triton_fused, (plain, target, None, None, params, normalizer, "dm", -100)
    dlogits = _operators.triton_fused(plain, target, None, None, params, normalizer, "dm", -100)[3]
    yield _operators.triton_fused_, (plain.clone(), target, None, None, params, normalizer, "dm", -100)
    yield _operators.triton_multiply_, (dlogits.clone(), torch.full_like(loss, 2))
    yield _operators.attach_overwritten, (logits, loss, dlogits.clone())
    yield _operators.triton_rescale_, (dlogits.clone(), plain, target, buffer, totals, torch.full_like(loss, 2), -100)
    yield _operators.attach_gradient, (logits, loss, dlogits, target, buffer, totals, -100)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [{}, {"strided": True}, {"rows": 0}], ids=["plain", "strided", "no rows"])
def test_opcheck(impl, dtype, shape):
    # The operators that consume a buffer in their backward are right only once; opcheck runs some backwards more often on
    # the same arguments, but always from a forward of its own.
    for operator, args in operators(dtype, impl, **shape):
        torch.library.opcheck(operator.definition, args)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_what_an_operator_overwrites_has_another_version(impl):
    for operator, args in operators(torch.float32, impl):
        schema = operator.definition._opoverload._schema
        written = [number for number, argument in enumerate(schema.arguments) if argument.is_write]
        if operator.returned is not None:
            written.append(operator.returned)
        before = [arg._version if isinstance(arg, torch.Tensor) else 0 for arg in args]
        operator(*args)
        after = [arg._version if isinstance(arg, torch.Tensor) else 0 for arg in args]
        assert [number for number in range(len(args)) if before[number] != after[number]] == written


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_loss_is_attached_without_a_copy_and_may_be_overwritten(impl, reduction, inplace):
    logits, target = (tensor.to(device_of(impl)) for tensor in make(20, 30))
    leaf = logits.requires_grad_()
    # Or torch 2.11 warns that the events of a cycle are dropped at its end.
    with profile(acc_events=True) as profiled:
        loss = dm_loss(leaf * 1, target, DM, reduction=reduction, impl=impl, inplace=inplace)
    assert "aten::clone" not in {event.name for event in profiled.events()}
    loss /= 4
    loss.sum().backward()
    expected = run(impl, logits.detach(), target, DM, reduction=reduction)[1]
    assert torch.allclose(4 * leaf.grad, expected, rtol=1e-6, atol=0)


class _Seen(TorchDispatchMode):
    """A mode that looks at every torch call."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", [{}, {"reduction": "mean"}, {"reduction": "none"}, {"inplace": True}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operators_called_directly_and_by_the_dispatcher_agree(impl, options, dtype):
    logits, target = make(6, 20, dtype, ignored=0.2)
    found, seen = [], _Seen()
    for mode in (contextlib.nullcontext(), seen):
        leaf = logits.to(device_of(impl), copy=True).requires_grad_()
        with mode:
            loss = dm_loss(leaf * 1, target.to(leaf.device), DM, impl=impl, **options)
            loss.backward(torch.full_like(loss, 3))
        found.append((loss, leaf.grad))
    assert any(name.startswith("fused_dm::") for name in seen.names)
    for direct, dispatched in zip(*found, strict=True):
        assert torch.equal(direct, dispatched)


@pytest.mark.parametrize("reduction", ["sum_weight", "mean", "none"])
def test_a_tensor_that_holds_others_gives_what_each_of_them_gives(reduction):
    from torch.testing._internal.two_tensor import TwoTensor

    (first, target), (second, _) = make(8, 5), make(8, 5, seed=1)
    expected_losses = [dm_loss(logits, target, edf.CCE(), reduction=reduction) for logits in (first, second)]
    loss = dm_loss(TwoTensor(first, second), target, edf.CCE(), reduction=reduction)
    assert torch.equal(loss.a, expected_losses[0])
    assert torch.equal(loss.b, expected_losses[1])


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("of", ["margin", "loss"])
def test_batched_gradients_are_those_one_by_one(impl, of):
    logits, target = make(4, 5, torch.float64)
    leaf = logits.to(device_of(impl)).requires_grad_()
    labels = target.to(leaf.device)
    values = margin(leaf, labels, impl=impl) if of == "margin" else dm_loss(leaf, labels, DM, reduction="none", impl=impl)
    each = torch.eye(4, dtype=torch.float64, device=leaf.device)
    (batched,) = torch.autograd.grad(values, leaf, each, is_grads_batched=True, retain_graph=True)
    singly = [torch.autograd.grad(values, leaf, one, retain_graph=True)[0] for one in each]
    assert torch.equal(batched, torch.stack(singly))


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_counter():
    from torch._dynamo.testing import CompileCounterWithBackend

    return CompileCounterWithBackend("aot_eager")


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["sum_weight", "mean", "sum", "none"])
@pytest.mark.parametrize("emphasis", [DM, edf.GCE(), custom], ids=["dm", "gce", "custom"])
def test_compiles_as_one_graph(impl, reduction, emphasis):
    compiles_as_one_graph(impl, reduction, emphasis, torch.float32)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("reduction", "emphasis"), [("sum_weight", DM), ("mean", DM), ("none", custom)], ids=["dm", "mean", "custom"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_compiles_as_one_graph_in_16_bits(impl, reduction, emphasis, dtype):
    compiles_as_one_graph(impl, reduction, emphasis, dtype)


def compiles_as_one_graph(impl, reduction, emphasis, dtype):
    logits, target = make(12, 30, dtype, ignored=0.2)
    device = device_of(impl)
    leaf = logits.to(device, copy=True).requires_grad_()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(logits, target):
        return dm_loss(logits, target, emphasis, reduction=reduction, impl=impl, return_output=True)

    output = compiled(leaf, target.to(device))
    output.loss.sum().backward()
    check(output, leaf.grad, expected(logits, target, emphasis, reduction=reduction))


# torch's own inductor uses torch.jit.script_method.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["sum_weight", "mean"])
def test_compiles_with_inductor(impl, reduction):
    logits, target = make(12, 30)
    device = device_of(impl)
    leaf = logits.to(device, copy=True).requires_grad_()

    @torch.compile(fullgraph=True)
    def compiled(logits, target):
        # An intermediate of the graph, which its backward reads again; halving is exact, and so is its inverse.
        return dm_loss(logits * 0.5, target, DM, reduction=reduction, impl=impl, return_output=True)

    output = compiled(leaf, target.to(device))
    output.loss.backward()
    check(output, leaf.grad * 2, expected(logits * 0.5, target, DM, reduction=reduction))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_schedule_of_beta_compiles_once(impl):
    device = device_of(impl)
    counter = compiled_counter()
    criterion = DMLoss(edf.DM(beta=0, lambd=0.5), impl=impl).to(device)
    step = torch.compile(criterion, fullgraph=True, backend=counter)
    logits, target = make(12, 30)
    for beta in range(12):
        emphasis = edf.DM(beta=beta, lambd=0.5)
        criterion.set_emphasis(emphasis)
        leaf = logits.to(device, copy=True).requires_grad_()
        loss = step(leaf, target.to(device))
        loss.backward()
        truth = expected(logits, target, emphasis)
        output, dlogits = run(impl, logits, target, emphasis)
        assert torch.equal(loss, output.loss)
        assert torch.equal(leaf.grad, dlogits)
        check(output, dlogits, truth)
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_frozen_edfs_of_many_values_compile_twice(impl):
    device = device_of(impl)
    counter = compiled_counter()

    @torch.compile(fullgraph=True, backend=counter)
    def step(logits, target, emphasis):
        return dm_loss(logits, target, emphasis, impl=impl)

    logits, target = make(12, 30)
    for beta in (1.0, 2.5, 4.0, 7.0, 9.5, 11.0, 12.0, 13.0, 14.0, 15.0):
        emphasis = edf.DM(beta=beta, lambd=0.5)
        loss = step(logits.to(device), target.to(device), emphasis)
        assert torch.equal(loss.cpu(), run(impl, logits, target, emphasis)[0].loss.detach().cpu())
    assert counter.frame_count <= 2


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_batch_size_is_dynamic(impl):
    device = device_of(impl)
    counter = compiled_counter()

    @torch.compile(fullgraph=True, backend=counter)
    def step(logits, target):
        return dm_loss(logits, target, DM, impl=impl)

    for rows in (3, 5, 8, 13):
        logits, target = make(rows, 30)
        leaf, labels = logits.to(device, copy=True).requires_grad_(), target.to(device)
        for tensor in (leaf, labels):
            torch._dynamo.mark_dynamic(tensor, 0)
        loss = step(leaf, labels)
        loss.backward()
        truth = expected(logits, target, DM)
        output, dlogits = run(impl, logits, target, DM)
        assert torch.equal(loss, output.loss)
        assert torch.equal(leaf.grad, dlogits)
        check(output, dlogits, truth)
    assert counter.frame_count == 1


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_autocast_leaves_the_statistics_alone(impl):
    device = device_of(impl)
    torch.manual_seed(0)
    features = torch.randn(16, 8, device=device)
    head = torch.nn.Linear(8, 50).to(device)
    target = torch.randint(50, (16,), device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        logits = head(features)
        assert logits.dtype == torch.bfloat16
        logits.retain_grad()
        output = dm_loss(logits, target, DM, impl=impl, return_output=True)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    check(output, logits.grad, expected(logits, target, DM))
    assert head.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["sum_weight", "mean", "sum", "none"])
def test_second_backward_is_right_or_a_clear_error(impl, reduction):
    logits, target = make(6, 9)
    leaf = logits.to(device_of(impl)).requires_grad_()
    loss = dm_loss(leaf, target.to(leaf.device), DM, reduction=reduction, impl=impl).sum()
    loss.backward(retain_graph=True)
    first, leaf.grad = leaf.grad.clone(), None
    # fp64 keeps nothing in the forward pass: see test_gradient_of_a_closed_form_is_its_derivative.
    consumes = impl == "cpu" or reduction == "mean"
    if consumes:
        with pytest.raises(RuntimeError, match="buffer was used up by the first backward pass"):
            loss.backward()
    else:
        loss.backward()
        assert torch.equal(first, leaf.grad)


@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, "reference"])
@pytest.mark.parametrize("reduction", ["sum_weight", "mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_double_backward_is_an_error(impl, reduction, dtype):
    leaf = make(6, 9, dtype).logits.to(device_of(impl)).requires_grad_()
    target = torch.arange(6, device=leaf.device)

    def penalty():
        loss = dm_loss(leaf, target, DM, reduction=reduction, impl=impl)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf, create_graph=True)
        # The other term has a derivative: without an error, that of the penalty would be missing and unmissed.
        (leaf.square().sum() + gradient.square().sum()).backward()

    with pytest.raises(RuntimeError, match=r"fused_dm|second derivative"):
        penalty()


@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("emphasis", [edf.CCE(), edf.MAE(), edf.GCE(q=0.7)], ids=str)
def test_gradient_of_a_closed_form_is_its_derivative(impl, reduction, emphasis):
    logits, target = make(4, 5, torch.float64, margins=3.0, ignored=0.2)
    target = target.to(device_of(impl))

    def loss(z):
        return dm_loss(z, target, emphasis, reduction=reduction, impl=impl)

    assert torch.autograd.gradcheck(loss, logits.to(device_of(impl)).requires_grad_(), nondet_tol=0.0)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_module_is_the_function(impl):
    logits, target = make(12, 30)
    device = device_of(impl)
    weight = torch.rand(30)
    criterion = DMLoss("dm:beta=8,lambd=0.5", weight=weight, reduction="sum", impl=impl).to(device)
    sample_weight = torch.rand(12)
    leaf = logits.to(device, copy=True).requires_grad_()
    loss = criterion(leaf, target.to(device), sample_weight=sample_weight.to(device), normalizer=3.0)
    loss.backward()
    output, dlogits = run(impl, logits, target, DM, weight=weight, sample_weight=sample_weight, normalizer=3.0, reduction="sum")
    assert torch.equal(loss, output.loss)
    assert torch.equal(leaf.grad, dlogits)
    assert criterion.ignore_index == -100
    assert "dm:beta=8,lambd=0.5" in repr(criterion)


def test_parameters_stay_fp64_when_the_module_is_cast():
    criterion = DMLoss(edf.GCE(q=0.6), weight=torch.rand(3)).to(torch.bfloat16)
    assert criterion.weight.dtype == torch.bfloat16
    assert criterion.emphasis_params.tolist() == [0.0, 0.6]
    assert criterion.half().double().emphasis_params.tolist() == [0.0, 0.6]


def test_module_made_on_meta():
    with torch.device("meta"):
        criterion = DMLoss("dm:beta=8,lambd=0.5")
    assert criterion.to_empty(device="cpu").emphasis_params.tolist() == [1e-6, 8.0, 0.5]
    # Now from a device of numbers, which are left to chance.
    assert criterion.to_empty(device="cpu").emphasis_params.tolist() == [1e-6, 8.0, 0.5]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["sum_weight", "mean", "none"])
@pytest.mark.parametrize("emphasis", [DM, edf.GCE(q=0.51)], ids=str)
def test_default_device_does_not_matter(impl, reduction, emphasis):
    logits, target = make(6, 9)
    output, dlogits = run(impl, logits, target, emphasis, reduction=reduction)
    device = device_of(impl)
    leaf, labels = logits.to(device, copy=True).requires_grad_(), target.to(device)
    with torch.device("meta"):
        loss = dm_loss(leaf, labels, emphasis, reduction=reduction, impl=impl)
        loss.sum().backward()
    assert torch.equal(loss, output.loss)
    assert torch.equal(leaf.grad, dlogits)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_default_device_does_not_matter_in_any_layout(impl, dtype):
    device = device_of(impl)
    logits, target = (tensor.to(device) for tensor in make(40, 5, dtype))
    images = logits.reshape(2, 20, 5).movedim(2, 1).contiguous()
    layer = torch.linspace(-1, 1, 35, dtype=dtype, device=device).reshape(5, 7).requires_grad_()
    hidden = torch.linspace(-2, 1, 280, dtype=dtype, device=device).reshape(40, 7).requires_grad_()

    def results():
        found = []
        for given, labels in ((logits, target), (images, target.view(2, 20))):
            leaf = given.clone().requires_grad_()
            dm_loss(leaf, labels, DM, impl=impl).backward()
            found += [leaf.grad, dm_loss(given, labels, DM, impl=impl), margin(given, labels, impl=impl)]
        loss = linear_dm_loss(hidden, layer, target, DM, impl=impl, max_logits_bytes=200)
        found += [loss, *torch.autograd.grad(loss, (hidden, layer))]
        with torch.no_grad():
            return [*found, linear_dm_loss(hidden, layer, target, DM, impl=impl)]

    expected_results = results()
    with torch.device("meta"):
        found = results()
    assert all(torch.equal(*pair) for pair in zip(found, expected_results, strict=True))


@pytest.mark.usefixtures("fresh_dynamo")
def test_several_losses_in_one_graph_with_inductor():
    """Inductor gives the memory of a torch.cat to something else while it is to be read, where a graph has three losses."""
    logits, target = make(16, 9)
    hidden, layer, last = (
        torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in ((16, 4), (9, 4), (16, 9))
    )

    truths = [
        expected_linear(hidden, layer, target, DM),
        expected(logits, target, edf.CCE() + edf.MAE(), reduction="mean"),
        expected(last, target, edf.GCE()),
    ]

    @torch.compile
    def losses(hidden, layer, logits, last):
        first = linear_dm_loss(hidden, layer, target, DM)
        return first + dm_loss(logits, target, edf.CCE() + edf.MAE(), reduction="mean") + dm_loss(last, target, edf.GCE())

    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, layer, logits, last)]
    loss = losses(*leaves)
    loss.backward()
    exact = [truths[0].dinput, truths[0].dweight, truths[1].dlogits, truths[2].dlogits]
    allowed = [truths[0].allowed["dinput"], truths[0].allowed["dweight"], *(truth.allowed["dlogits"] for truth in truths[1:])]
    for leaf, *bounds in zip(leaves, exact, allowed, strict=True):
        compare("gradient", leaf.grad, *bounds)
    compare("loss", loss, sum(truth.loss for truth in truths), sum(truth.allowed["loss"] for truth in truths))


def test_a_transform_leaves_nothing_behind():
    logits, target = make(6, 9)
    emphasis = edf.GCE(q=0.123)
    torch.func.functionalize(lambda z: dm_loss(z, target, emphasis))(logits)
    check(*run("cpu", logits, target, emphasis), expected(logits, target, emphasis))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_names_normalizers_and_edfs_in_compiled_code(impl):
    device = device_of(impl)
    logits, target = (tensor.to(device) for tensor in make(12, 30))
    counter = compiled_counter()

    @torch.compile(fullgraph=True, backend=counter)
    def by_number(normalizer, beta):
        options = {"reduction": "sum", "normalizer": normalizer, "impl": impl}
        return dm_loss(logits, target, "gce:q=0.6", **options) + dm_loss(
            logits, target, edf.DM(beta=beta, lambd=0.5), **options
        )

    for normalizer, beta in ((64.0, 1.0), (60.5, 2.5), (59.0, 3.0), (33.5, 7.5)):
        options = {"reduction": "sum", "normalizer": normalizer, "impl": impl}
        eager = dm_loss(logits, target, edf.GCE(q=0.6), **options)
        eager = eager + dm_loss(logits, target, edf.DM(beta=beta, lambd=0.5), **options)
        assert torch.equal(by_number(normalizer, beta), eager)
    assert counter.frame_count <= 3


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("reduction", ["sum_weight", "mean", "none"])
def test_cuda_graph(reduction):
    logits, target = (tensor.cuda() for tensor in make(64, 1000))
    criterion = DMLoss(DM, reduction=reduction).cuda()
    static = logits.clone().requires_grad_()

    def step():
        static.grad = None
        criterion(static, target).sum().backward()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for beta in (1.0, 12.0):
        emphasis = edf.DM(beta=beta, lambd=0.5)
        criterion.set_emphasis(emphasis)
        graph.replay()
        assert torch.equal(static.grad, run("triton", logits, target, emphasis, reduction=reduction)[1])
