"""The margin operator: every implementation against ordinary autograd in fp64."""

import math

import pytest
import torch
from batches import DTYPES, IMPLEMENTATIONS, SHAPES, device_of, make
from tolerance import BASE, compare, compute_dtype, depths

from fused_dm import margin, reference


def truth(logits, target, dmargin, ignore_index=-100):
    z = logits.double().requires_grad_()
    exact = reference.margin(z, target, ignore_index)
    exact.backward(torch.where(exact.isnan(), 0, dmargin.double()))
    return exact.detach(), z.grad


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_value_and_gradient(impl, dtype, shape):
    logits, target = make(*shape, dtype, ignored=0.2)
    dmargin = torch.linspace(-1, 2, shape[0])
    exact, gradient = truth(logits, target, dmargin)
    leaf = logits.detach().to(device_of(impl)).requires_grad_()
    margins = margin(leaf, target.to(leaf.device), impl=impl)
    margins.backward(torch.where(exact.isnan(), 0, dmargin).to(margins))
    u = torch.finfo(compute_dtype(dtype)).eps
    each, mean, reach = depths(logits, target)
    compare("margin", margins, exact, (BASE + 2 * reach) * u)
    rtol = torch.finfo(dtype).eps + (BASE + 2 * mean[:, None] + 2 * each) * u
    tiny = max(torch.finfo(torch.float32).tiny, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)
    compare("dlogits", leaf.grad, gradient, rtol * gradient.abs() + tiny)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_loss_of_the_margin_is_cross_entropy(impl):
    logits, target = make(20, 30, torch.float64)
    theirs = logits.clone().requires_grad_()
    torch.nn.functional.cross_entropy(theirs, target).backward()
    ours = logits.to(device_of(impl)).requires_grad_()
    torch.nn.functional.softplus(-margin(ours, target.to(ours.device), impl=impl), threshold=700).mean().backward()
    torch.testing.assert_close(ours.grad.cpu(), theirs.grad, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_other_class(impl):
    device = device_of(impl)
    only = torch.tensor([[3.0, -math.inf, -math.inf]], device=device, requires_grad=True)
    margins = margin(only, torch.tensor([0], device=device), impl=impl)
    margins.backward(torch.ones_like(margins))
    assert margins.item() == math.inf
    assert torch.equal(only.grad, torch.zeros_like(only))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_shapes_of_the_result(impl):
    device = device_of(impl)
    logits, target = make(24, 7)
    flat = margin(logits.to(device), target.to(device), impl=impl)
    spatial = margin(logits.reshape(2, 12, 7).movedim(-1, 1).to(device), target.reshape(2, 12).to(device), impl=impl)
    single = margin(logits[0].to(device), target[0].to(device), impl=impl)
    assert torch.equal(spatial.flatten(), flat)
    assert single.shape == ()
    assert single == flat[0]


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_second_backward_is_right(impl):
    device = device_of(impl)
    logits, target = make(6, 9)
    leaf = logits.to(device).requires_grad_()
    total = margin(leaf, target.to(device), impl=impl).sum()
    total.backward(retain_graph=True)
    first, leaf.grad = leaf.grad, None
    total.backward()
    assert torch.equal(first, leaf.grad)


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_double_backward_is_an_error(impl):
    device = device_of(impl)
    leaf = make(6, 9).logits.to(device).requires_grad_()
    (gradient,) = torch.autograd.grad(margin(leaf, torch.arange(6, device=device), impl=impl).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="fused_dm"):
        gradient.sum().backward()
