"""What torch does to a loss besides one forward and one backward: each is right or a clear error, eager and compiled."""

import io

import pytest
import torch
from batches import device_of, make
from tolerance import compare, expected
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from fused_dm import DMLoss, dm_loss, edf, margin

DM = edf.DM(beta=8, lambd=0.5)
IMPLEMENTATIONS = ("cpu", "triton")
REDUCTIONS = ({}, {"reduction": "mean"}, {"reduction": "none"})
EMPHASES = (DM, edf.CCE(), lambda log_p, log_q: 2 * log_q)

every_way = [
    pytest.mark.parametrize("impl", IMPLEMENTATIONS),
    pytest.mark.parametrize("options", REDUCTIONS, ids=str),
    pytest.mark.parametrize("emphasis", EMPHASES, ids=["dm", "cce", "custom"]),
]


def each(test):
    for mark in every_way:
        test = mark(test)
    return test


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def leaf_of(logits, impl):
    return logits.to(device_of(impl), copy=True).requires_grad_()


def plain_gradient(impl, logits, target, emphasis, options):
    leaf = leaf_of(logits, impl)
    dm_loss(leaf * 2, target.to(leaf.device), emphasis, impl=impl, **options).sum().backward()
    return leaf.grad


@each
@pytest.mark.parametrize("inplace", [False, True], ids=["kept", "in place"])
@pytest.mark.parametrize(("compiled", "reentrant"), [(False, False), (False, True), (True, False)])
@pytest.mark.usefixtures("fresh_dynamo")
def test_activation_checkpointing(impl, options, emphasis, inplace, compiled, reentrant):
    checkpoints(impl, options, emphasis, inplace, compiled, reentrant)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", [{}, {"reduction": "mean"}], ids=str)
@pytest.mark.parametrize("inplace", [False, True], ids=["kept", "in place"])
@pytest.mark.usefixtures("fresh_dynamo")
def test_reentrant_checkpointing_of_compiled_code(impl, options, inplace):
    checkpoints(impl, options, DM, inplace, compiled=True, reentrant=True)


def checkpoints(impl, options, emphasis, inplace, compiled, reentrant):
    logits, target = make(6, 9)
    leaf, where = leaf_of(logits, impl), target.to(device_of(impl))

    def segment(z):
        return dm_loss(z * 2, where, emphasis, impl=impl, inplace=inplace, **options).sum()

    def step(z):
        return checkpoint(segment, z, use_reentrant=reentrant)

    (torch.compile(step, backend="aot_eager") if compiled else step)(leaf).backward()
    same = plain_gradient(impl, logits, target, emphasis, options)
    if impl == "cpu" and inplace and (compiled or not isinstance(emphasis, edf.EDF)):
        # The gradient is computed from the logits in the backward; otherwise it is kept from the forward and scaled.
        truth = expected(logits * 2, target, emphasis, **options)
        compare("dlogits", leaf.grad / 2, truth.dlogits, truth.allowed["dlogits"])
        plain = leaf_of(logits, impl)
        (torch.compile(segment, backend="aot_eager") if compiled else segment)(plain).backward()
        same = plain.grad
    assert torch.equal(leaf.grad, same)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", REDUCTIONS, ids=str)
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("emphasis", [DM, edf.CCE()], ids=str)
@pytest.mark.usefixtures("fresh_dynamo")
def test_export_save_and_load(impl, options, strict, emphasis):
    logits, target = make(6, 9)
    where = target.to(device_of(impl))

    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(9, 9)
            self.criterion = DMLoss(emphasis, impl=impl, **options)

        def forward(self, features, target):
            return self.criterion(self.linear(features), target)

    head = Head().to(device_of(impl))
    features = logits.to(device_of(impl))
    program = torch.export.export(head, (features, where), strict=strict)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    theirs = loaded(features, where)
    ours = head(features, where)
    assert torch.equal(theirs, ours)
    theirs.sum().backward()
    ours.sum().backward()
    gradients = {name: parameter.grad for name, parameter in head.named_parameters()}
    assert gradients
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter.grad, gradients[name])


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_export_of_a_number_of_rows_that_depends_on_data(impl):
    class Loss(torch.nn.Module):
        def forward(self, logits, target):
            keep = target != 3
            return dm_loss(logits[keep], target[keep], DM, impl=impl)

    logits, target = (tensor.to(device_of(impl)) for tensor in make(40, 9))
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        program = torch.export.export(Loss(), (logits, target))
    torch.testing.assert_close(program.module()(logits, target), Loss()(logits, target))


PARTS = {
    "rows": lambda logits, keep: logits[keep],
    "rows of a wider buffer": lambda logits, keep: logits[: keep.sum().item(), :-1],
    "images": lambda logits, keep: logits.view(40, 5, 3, 3)[keep],
    "images, classes last": lambda logits, keep: logits.view(40, 3, 3, 5)[keep].movedim(-1, 1),
}


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["sum_weight", "mean"])
@pytest.mark.parametrize("part", PARTS)
def test_a_gradient_of_a_number_of_rows_that_depends_on_data(impl, reduction, part):
    """Of more classes than those whose rows are read one element at a time."""
    logits = make(40, 45).logits.to(device_of(impl))

    def step(logits, keep):
        rows = PARTS[part](logits, keep)
        labels = (rows.detach().sum(1) > 0).long()
        return dm_loss(rows, labels, DM, impl=impl, reduction=reduction)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for seed in (1, 2):
            keep = torch.rand(40, generator=torch.Generator().manual_seed(seed)).to(logits.device) < 0.5
            keep[0] = True
            gradients = []
            for run_step in (step, compiled):
                leaf = logits.detach().requires_grad_()
                run_step(leaf, keep).backward()
                gradients.append(leaf.grad)
            torch.testing.assert_close(*gradients)


def test_the_reference_is_not_exported():
    class Loss(torch.nn.Module):
        def forward(self, logits, target):
            return dm_loss(logits, target, DM, impl="reference")

    with pytest.raises(RuntimeError, match="impl='reference': cannot be exported, its gradient would be lost"):
        torch.export.export(Loss(), make(6, 9), strict=False)


# torch says that its generic rule for batches is slow.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@each
def test_vmap_over_labels_alone(impl, options, emphasis):
    logits, _ = make(6, 9)
    leaf, targets = leaf_of(logits, impl), torch.stack([make(6, 9, seed=seed).target for seed in range(3)])
    targets = targets.to(leaf.device)
    torch.vmap(lambda target: dm_loss(leaf, target, emphasis, impl=impl, **options))(targets).sum().backward()
    plain = leaf_of(logits, impl)
    sum(dm_loss(plain, target, emphasis, impl=impl, **options).sum() for target in targets).backward()
    torch.testing.assert_close(leaf.grad, plain.grad)


# torch says that its generic rule for batches is slow.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@each
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.usefixtures("fresh_dynamo")
def test_vmap(impl, options, emphasis, compiled):
    batches = [make(6, 9, seed=seed) for seed in range(3)]
    leaf = leaf_of(torch.stack([batch.logits for batch in batches]), impl)
    targets = torch.stack([batch.target for batch in batches]).to(leaf.device)

    def one(logits, target):
        return dm_loss(logits * 2, target, emphasis, impl=impl, **options)

    def every(logits, targets):
        return torch.vmap(one)(logits, targets)

    losses = (torch.compile(every, backend="aot_eager") if compiled else every)(leaf, targets)
    losses.sum().backward()
    for loss, gradient, (logits, target) in zip(losses, leaf.grad, batches, strict=True):
        plain = leaf_of(logits, impl)
        alone = one(plain, target.to(plain.device))
        alone.sum().backward()
        # The batch may be computed by the margin operator where one call is computed by the fused kernel.
        torch.testing.assert_close(loss, alone)
        torch.testing.assert_close(gradient, plain.grad)


# torch says that its generic rule for batches is slow.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, "reference"])
@pytest.mark.parametrize("options", REDUCTIONS, ids=str)
@pytest.mark.parametrize(
    "emphases",
    [
        [edf.DM(beta=8, lambd=0.5), edf.DM(beta=1, lambd=1)],
        [edf.GCE(q=0.3), edf.GCE(q=0.9)],
        [edf.Focal(gamma=1) + edf.CCE(), edf.Focal(gamma=3) + edf.CCE()],
    ],
    ids=lambda emphases: str(emphases[0]),
)
def test_an_ensemble_of_criteria(impl, options, emphases):
    """Each member of `stack_module_state` has the EDF of its own buffer, whichever module is called with it."""
    logits, target = (tensor.to(device_of(impl)) for tensor in make(6, 9))
    criteria = [DMLoss(density, impl=impl, eps=0.1 * index, **options) for index, density in enumerate(emphases)]
    _, buffers = torch.func.stack_module_state([criterion.to(logits.device) for criterion in criteria])

    def one(buffers, logits):
        return torch.func.functional_call(criteria[0], buffers, (logits, target)).sum()

    leaf = logits.expand(len(criteria), -1, -1).clone().requires_grad_()
    losses = torch.vmap(one)(buffers, leaf)
    losses.sum().backward()
    if impl == "reference":
        torch.testing.assert_close(torch.vmap(torch.func.grad(one, argnums=1), (0, None))(buffers, logits), leaf.grad)
    for criterion, loss, gradient in zip(criteria, losses, leaf.grad, strict=True):
        plain = leaf_of(logits, impl)
        alone = criterion(plain, target).sum()
        alone.backward()
        torch.testing.assert_close(loss, alone)
        torch.testing.assert_close(gradient, plain.grad)


# torch says that its generic rule for batches is slow.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("inplace", [False, True], ids=["kept", "in place"])
def test_several_derivatives_at_once(impl, options, emphasis, dtype, inplace):
    """With `is_grads_batched=True`, as the rows of a Jacobian."""
    logits, target = make(6, 9, dtype)
    leaf = leaf_of(logits, impl)

    def loss():
        return dm_loss(leaf * 2, target.to(leaf.device), emphasis, impl=impl, inplace=inplace, **options)

    derivatives = torch.linspace(-1, 2, 3 * loss().numel(), device=leaf.device, dtype=loss().dtype).view(3, *loss().shape)
    # A CPU keeps the direction apart from what it is multiplied by.
    if inplace and not (impl == "cpu" and dtype != torch.float64 and isinstance(emphasis, edf.EDF)):
        with pytest.raises(
            RuntimeError, match=r"dm_loss\(inplace=True\): expected one derivative of the loss, got several at once"
        ):
            torch.autograd.grad(loss(), leaf, derivatives, is_grads_batched=True)
        return
    (jacobian,) = torch.autograd.grad(loss(), leaf, derivatives, is_grads_batched=True)
    for row, derivative in zip(jacobian, derivatives, strict=True):
        torch.testing.assert_close(row, torch.autograd.grad(loss(), leaf, derivative)[0])


@each
def test_vmap_refuses_to_overwrite(impl, options, emphasis):
    logits = torch.zeros(3, 6, 9, device=device_of(impl), requires_grad=True) * 1
    target = torch.zeros(6, dtype=torch.int64, device=device_of(impl))
    with pytest.raises(ValueError, match=r"inplace=True: expected logits outside torch.vmap"):
        torch.vmap(lambda z: dm_loss(z, target, emphasis, impl=impl, inplace=True, **options))(logits)


# torch's own forward-mode decompositions use torch.jit.script.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@each
def test_transforms_that_would_lose_the_gradient(impl, options, emphasis):
    logits, target = (tensor.to(device_of(impl)) for tensor in make(6, 9))

    def loss(z):
        return dm_loss(z, target, emphasis, impl=impl, **options).sum()

    def margins(z):
        return margin(z, target, impl=impl).sum()

    def dual(function):
        with forward_ad.dual_level():
            return function(forward_ad.make_dual(logits, logits))

    for function in (loss, margins):
        for transform in (
            lambda function: torch.func.grad(function)(logits),
            lambda function: torch.func.jvp(function, (logits,), (logits,)),
            lambda function: torch.func.vmap(torch.func.grad(function))(logits[None]),
            dual,
        ):
            with pytest.raises(RuntimeError, match=rf"impl='{impl}': expected plain autograd.*pass impl='reference'"):
                transform(function)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_transforms_in_compiled_code(impl):
    logits, target = (tensor.to(device_of(impl)) for tensor in make(6, 9))

    def loss(z):
        return dm_loss(z, target, DM, impl=impl)

    with pytest.raises(RuntimeError, match=rf"impl='{impl}': expected plain autograd"):
        torch.compile(lambda z: torch.func.jvp(loss, (z,), (z,)), backend="aot_eager")(logits)
    with pytest.raises(RuntimeError, match="fused_dm"):
        torch.compile(torch.func.grad(loss), backend="aot_eager")(logits)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.usefixtures("fresh_dynamo")
def test_second_backward(impl, options, emphasis, dtype, compiled):
    """Right, or an error that names retain_graph: where a buffer was used up, which depends on the path taken."""
    logits, target = make(6, 9, dtype)
    leaf, where = leaf_of(logits, impl), target.to(device_of(impl))

    def step(z):
        return dm_loss(z, where, emphasis, impl=impl, **options)

    loss = (torch.compile(step, backend="aot_eager", fullgraph=True) if compiled else step)(leaf).sum()
    loss.backward(retain_graph=True)
    first, leaf.grad = leaf.grad.clone(), None
    fused = impl == "triton" and isinstance(emphasis, edf.EDF)
    keeps = dtype == torch.float32 and (options.get("reduction") == "mean" if fused else impl == "cpu")
    if keeps and not compiled:
        with pytest.raises(RuntimeError, match=r"backward\(retain_graph=True\)"):
            loss.backward()
    else:
        loss.backward()
        assert torch.equal(first, leaf.grad)
    # Without retain_graph torch itself refuses.
    loss = step(leaf).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match=r"second time|used up"):
        loss.backward()


@each
@pytest.mark.parametrize("inplace", [False, True], ids=["kept", "in place"])
@pytest.mark.usefixtures("fresh_dynamo")
def test_double_backward_of_compiled_code(impl, options, emphasis, inplace):
    logits, target = make(6, 9)
    leaf, where = leaf_of(logits, impl), target.to(device_of(impl))

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(z):
        return dm_loss(z * 2, where, emphasis, impl=impl, inplace=inplace, **options)

    (gradient,) = torch.autograd.grad(step(leaf).sum(), leaf, create_graph=True)
    total = gradient.sum()
    # The gradient of any compiled code is a constant under torch 2.11, which says so where no more is asked for.
    with pytest.raises(RuntimeError, match=r"does not currently support double backward|does not require grad"):
        total.backward()
