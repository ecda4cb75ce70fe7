"""`inplace=True`: the same numbers, in the logits' own memory, and every misuse of it that can be noticed."""

import re

import pytest
import torch
from batches import DTYPES, device_of, make
from tolerance import check, expected

from fused_dm import DMLoss, dm_loss, edf

DM = edf.DM(beta=8, lambd=0.5)
IMPLEMENTATIONS = ("cpu", "triton")
REDUCTIONS = ({}, {"reduction": "mean"}, {"reduction": "none"}, {"reduction": "sum", "normalizer": 3.0})
EMPHASES = (DM, edf.CCE(), lambda log_p, log_q: 2 * log_q)


def leaf_of(logits, impl):
    return logits.to(device_of(impl), copy=True).requires_grad_()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", REDUCTIONS, ids=str)
@pytest.mark.parametrize("emphasis", EMPHASES, ids=["dm", "cce", "custom"])
def test_same_numbers_in_the_logits_memory(impl, dtype, options, emphasis):
    logits, target = make(9, 300, dtype, ignored=0.2)
    sample_weight = torch.linspace(-0.5, 2, 9)
    for dloss in (1.0, 0.3):
        leaf = leaf_of(logits, impl)
        own = leaf.clone()
        output = dm_loss(
            own,
            target.to(leaf.device),
            emphasis,
            sample_weight=sample_weight.to(leaf.device),
            impl=impl,
            inplace=True,
            return_output=True,
            **options,
        )
        upstream = torch.full_like(output.loss, dloss)
        output.loss.backward(upstream)
        truth = expected(logits, target, emphasis, upstream.cpu(), sample_weight=sample_weight, **options)
        check(output, leaf.grad, truth)
        assert torch.equal(own.detach(), leaf.grad)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", REDUCTIONS, ids=str)
@pytest.mark.parametrize("shape", [(2, 4097), (2, 3 * 16384 + 7), (2, 32768), (65, 10), (1, 37), (5, 1), (0, 10)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shapes(impl, options, shape, dtype):
    logits, target = make(*shape, dtype)
    leaf = leaf_of(logits, impl)
    output = dm_loss(leaf * 1, target.to(leaf.device), DM, impl=impl, inplace=True, return_output=True, **options)
    output.loss.sum().backward()
    check(output, leaf.grad, expected(logits, target, DM, **options))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", REDUCTIONS, ids=str)
@pytest.mark.parametrize("columns", [slice(8, 56), slice(3, 51), slice(0, 47)], ids=str)
def test_rows_of_a_wider_tensor(impl, options, columns):
    """What lies between the rows is nobody's, and stays as it is."""
    wide, _ = make(20, 64)
    logits = wide[:, columns]
    target = torch.arange(20) % logits.shape[1]
    leaf = leaf_of(wide, impl)
    whole = leaf * 1
    output = dm_loss(whole[:, columns], target.to(leaf.device), DM, impl=impl, inplace=True, return_output=True, **options)
    output.loss.sum().backward()
    check(output, leaf.grad[:, columns], expected(logits, target, DM, **options))
    outside = torch.ones(64, dtype=torch.bool)
    outside[columns] = False
    assert torch.equal(whole.detach().cpu()[:, outside], wide[:, outside])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", REDUCTIONS, ids=str)
def test_single_example_and_channels_last(impl, options):
    logits, target = make(24, 7)
    device = device_of(impl)
    leaf = leaf_of(logits, impl)
    single = dm_loss((leaf * 1)[3], target[3].to(device), DM, impl=impl, inplace=True, return_output=True, **options)
    single.loss.backward()
    own = expected(logits[3:4], target[3:4], DM, **options)
    own = own._replace(loss=own.loss.reshape(()), allowed={**own.allowed, "loss": own.allowed["loss"].reshape(())})
    rows = single._replace(
        example_weight=single.example_weight[None], target_prob=single.target_prob[None], correct=single.correct[None]
    )
    check(rows, leaf.grad[3:4], own)

    leaf = leaf_of(logits, impl)
    spatial = (leaf * 1).view(2, 3, 4, 7).movedim(-1, 1)
    where = target.view(2, 3, 4).to(device)
    output = dm_loss(spatial, where, DM, impl=impl, inplace=True, return_output=True, **options)
    output.loss.sum().backward()
    flat = output._replace(
        loss=output.loss.flatten() if output.loss.dim() else output.loss,
        example_weight=output.example_weight.flatten(),
        target_prob=output.target_prob.flatten(),
        correct=output.correct.flatten(),
    )
    check(flat, leaf.grad, expected(logits, target, DM, **options))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nothing_is_overwritten_where_no_gradient_is_wanted(impl):
    logits, target = make(6, 9)
    device = device_of(impl)
    for given in (logits.to(device), logits.to(device, copy=True).requires_grad_()):
        with torch.no_grad():
            output = dm_loss(given, target.to(device), DM, impl=impl, inplace=True, return_output=True)
        check(output, None, expected(logits, target, DM))
        assert torch.equal(given.detach().cpu(), logits)
    plain = logits.to(device)
    assert not DMLoss(DM, inplace=True, impl=impl)(plain, target.to(device)).requires_grad
    assert torch.equal(plain.cpu(), logits)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_logits_that_are_not_overwritten_are_not_taken_for_overwritten(impl):
    """A loss without a gradient leaves them to everyone else's backward pass."""
    logits, target = make(6, 9)
    leaf = logits.to(device_of(impl)).requires_grad_()
    hidden = leaf * 1
    squares = hidden**2
    with torch.no_grad():
        dm_loss(hidden, target.to(leaf.device), DM, impl=impl, inplace=True)
    squares.sum().backward()
    assert torch.equal(leaf.grad, 2 * leaf.detach())


def view_of_a_leaf():
    return torch.zeros(4, 5, requires_grad=True)[:, 1:]


EVERYWHERE = ("cpu", "triton")


@pytest.mark.parametrize(
    ("make_logits", "message", "impls"),
    [
        (lambda: torch.zeros(4, 5, requires_grad=True), "expected logits that were computed, got a leaf tensor", EVERYWHERE),
        (view_of_a_leaf, "expected logits that were computed, got a view of a leaf tensor", EVERYWHERE),
        (
            lambda: torch.zeros(5, requires_grad=True).mul(1).expand(4, 5),
            r"rows that do not overlap, got strides \(0, 1\)",
            EVERYWHERE,
        ),
        (
            lambda: torch.zeros(9, requires_grad=True).mul(1).unfold(0, 6, 1),
            r"rows that do not overlap, got strides \(1, 1\)",
            EVERYWHERE,
        ),
        (
            lambda: torch.zeros(4, 1, requires_grad=True).mul(1).expand(4, 5),
            r"classes are adjacent in memory, got strides",
            ["cpu"],
        ),
        (
            lambda: torch.zeros(5, 4, requires_grad=True).mul(1).t(),
            r"classes are adjacent in memory, got strides \(1, 4\)",
            ["cpu"],
        ),
        (
            lambda: torch.zeros(4, 5, 3, requires_grad=True).mul(1),
            r"classes are adjacent in memory, got strides \(15, 3, 1\)",
            ["cpu"],
        ),
        (
            lambda: torch.zeros(4, 6, 5, requires_grad=True).mul(1).movedim(-1, 1)[:, :, ::2],
            r"channels-last layout.*got strides \(30, 1, 10\) for shape \(4, 5, 3\)",
            ["cpu"],
        ),
        (
            lambda: torch.zeros(4, 1, requires_grad=True).mul(1).expand(4, 5),
            r"rows that do not overlap, got strides \(1, 0\)",
            ["triton"],
        ),
        (
            lambda: torch.zeros(2, 5, 3, 4, requires_grad=True).mul(1)[..., 1:],
            r"spatial dimensions that are one in memory.*got strides \(60, 12, 4, 1\) for shape \(2, 5, 3, 3\)",
            ["triton"],
        ),
        (
            lambda: torch._neg_view(torch.zeros(4, 5, requires_grad=True).mul(1)),
            r"logits as they are in memory, got a view that torch negates",
            ["triton"],
        ),
    ],
)
def test_logits_that_cannot_be_overwritten(make_logits, message, impls):
    for impl in impls:
        with torch.device(device_of(impl)):
            logits = make_logits()
            target = torch.zeros(logits.shape[:1] + logits.shape[2:], dtype=torch.int64)
        before = logits.detach().clone()
        with pytest.raises(ValueError, match=r"inplace=True: .*" + message):
            dm_loss(logits, target, DM, impl=impl, inplace=True)
        assert torch.equal(logits.detach(), before)


def test_wrong_arguments():
    logits, target = torch.zeros(4, 5, requires_grad=True) * 1, torch.zeros(4, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"inplace: expected a bool, got 1"):
        dm_loss(logits, target, DM, inplace=1)
    with pytest.raises(ValueError, match=r"inplace=True: expected impl 'triton' or 'cpu', got 'reference'"):
        dm_loss(logits, target, DM, inplace=True, impl="reference")


@pytest.mark.parametrize("options", REDUCTIONS, ids=str)
def test_a_wrong_label_leaves_the_logits_as_they_were(options):
    leaf, target = make(4, 5).logits.requires_grad_(), torch.tensor([0, 1, 5, 2])
    logits = leaf * 1
    with pytest.raises(IndexError, match=r"target: expected labels in \[0, 5\) or ignore_index=-100, got 5"):
        dm_loss(logits, target, DM, inplace=True, **options)
    assert torch.equal(logits, leaf)
    logits.sum().backward()


class Raises(edf.EDF):
    """A subclass with a weight of its own."""

    def log_weight(self, log_p, log_q):
        raise OverflowError("mine")


def raises(log_p, log_q):
    raise OverflowError("mine")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("options", REDUCTIONS, ids=str)
@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize(
    ("emphasis", "error"),
    [(raises, OverflowError), (Raises(), OverflowError), (lambda log_p, log_q: log_p.sum(), ValueError)],
    ids=["callable", "subclass", "shape"],
)
def test_a_function_that_raises_leaves_the_logits_as_they_were(impl, dtype, options, spatial, emphasis, error):
    leaf = leaf_of(make(6, 5, dtype).logits, impl)
    logits = (leaf * 1).view(2, 3, 5).movedim(-1, 1) if spatial else leaf * 1
    target = torch.zeros(logits.shape[:1] + logits.shape[2:], dtype=torch.int64, device=leaf.device)
    before = logits.detach().clone()
    with pytest.raises(error):
        dm_loss(logits, target, emphasis, impl=impl, inplace=True, **options)
    assert torch.equal(logits, before)
    (logits.sum() + dm_loss(logits, target, DM, impl=impl, inplace=True, **options).sum() * 0).backward()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("options", REDUCTIONS, ids=str)
@pytest.mark.parametrize("emphasis", EMPHASES, ids=["dm", "cce", "custom"])
def test_uses_that_are_errors(impl, dtype, options, emphasis):
    """A later use of the logits, an earlier operation that kept them, a second backward, a second derivative."""
    logits, target = make(6, 9, dtype)
    device = device_of(impl)
    target = target.to(device)

    def loss_of(logits):
        return dm_loss(logits, target, emphasis, impl=impl, inplace=True, **options).sum()

    used = leaf_of(logits, impl) * 1
    total = loss_of(used) + used.logsumexp(1).sum()
    with pytest.raises(RuntimeError, match=r"logits were used again after the loss had overwritten them"):
        total.backward()

    used = leaf_of(logits, impl) * 1
    total = loss_of(used) + loss_of(used * 1)
    with pytest.raises(RuntimeError, match=r"logits were used again after the loss had overwritten them"):
        total.backward()

    whole = leaf_of(logits, impl) * 1
    total = loss_of(whole[:]) + whole.sum()
    with pytest.raises(RuntimeError, match=r"logits were used again after the loss had overwritten them"):
        total.backward()

    total = loss_of(torch.tanh(leaf_of(logits, impl)))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()

    used = leaf_of(logits, impl) * 1
    squares = used.square().sum()
    total = loss_of(used) + squares
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()

    total = loss_of(leaf_of(logits, impl) * 1)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"buffer was used up by the first backward pass.*retain_graph=True"):
        total.backward()

    leaf = leaf_of(logits, impl)
    total = loss_of(leaf * 1)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(total, leaf, create_graph=True)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", REDUCTIONS, ids=str)
def test_an_earlier_use_that_kept_nothing_counts(impl, options):
    logits, target = make(6, 9)
    leaf = leaf_of(logits, impl)
    used = leaf * 1
    total = used.sum()
    output = dm_loss(used, target.to(leaf.device), DM, impl=impl, inplace=True, return_output=True, **options)
    (output.loss.sum() + total).backward()
    alone = leaf_of(logits, impl)
    dm_loss(alone, target.to(leaf.device), DM, impl=impl, **options).sum().backward()
    assert torch.equal(leaf.grad, alone.grad + 1)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# torch's tracer looks at the .grad of whatever it is given.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", REDUCTIONS, ids=str)
@pytest.mark.parametrize("emphasis", EMPHASES, ids=["dm", "cce", "custom"])
def test_compiled(impl, options, emphasis):
    compiled_overwrites(impl, options, "aot_eager", emphasis)


# torch's own inductor uses torch.jit.script_method.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", [{}, {"reduction": "mean"}], ids=str)
def test_compiled_with_inductor(impl, options):
    compiled_overwrites(impl, options, "inductor", DM)


def compiled_overwrites(impl, options, backend, emphasis):
    logits, target = make(9, 30, ignored=0.2)
    target_there = target.to(device_of(impl))

    @torch.compile(fullgraph=True, backend=backend)
    def step(features):
        return dm_loss(features * 2, target_there, emphasis, impl=impl, inplace=True, return_output=True, **options)

    @torch.compile(fullgraph=True, backend=backend)
    def given(logits):
        return dm_loss(logits, target_there, emphasis, impl=impl, inplace=True, return_output=True, **options)

    truth = expected(logits, target, emphasis, **options)
    for call in (lambda half: step(half), lambda half: given(half * 2)):
        leaf = leaf_of(logits / 2, impl)
        output = call(leaf)
        output.loss.sum().backward()
        check(output, leaf.grad / 2, truth)


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_leaf_is_refused_in_compiled_code_too():
    compiled = torch.compile(lambda z, t: dm_loss(z, t, DM, inplace=True), backend="aot_eager")
    with pytest.raises((ValueError, RuntimeError), match=re.compile("leaf", re.IGNORECASE)):
        compiled(torch.zeros(4, 5, requires_grad=True), torch.zeros(4, dtype=torch.int64))
