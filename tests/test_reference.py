"""The definition against numbers worked out from the original layer's formula, and its two forms against each other."""

import pytest
import torch
from batches import EMPHASES, IMPLEMENTATIONS, make, run
from tolerance import check, expected

from fused_dm import edf, reference

LOGITS = torch.tensor([[2.0, 1, 0], [0, 1, 3], [1, 1, 1], [-3, 4, -2]], dtype=torch.float64)
TARGET = torch.tensor([0, 1, 2, 1])
PROB = torch.tensor([0.665240955775, 0.114195199385, 0.333333333333, 0.996620823409], dtype=torch.float64)
# (lambd, beta): weights, their sum, reported value; by the formula in 30-digit arithmetic, eps = 1e-6
TABLE = {
    (0.0, 2.0): ([1.953295777989, 5.880310703412, 3.793667894683, 1.006781242386], 12.63405562847, 1.403090371392),
    (0.5, 8.0): ([8.884405376096, 10.96495803181, 21.74103384821, 1.027355164919], 42.61775243104, 1.203771871643),
    (1.0, 8.0): ([5.939134479744, 2.246194040907, 5.916693590664, 1.027308280904], 15.12933040222, 0.9120265795789),
    (2.0, 12.0): ([5.91654947926, 1.148683510431, 2.432425454287, 1.041098629495], 10.53875708347, 0.7192407651525),
}
GRADIENT = torch.tensor(
    [
        [-0.104233466097, 0.0762007695702, 0.0280326965263],
        [0.00610100704307, -0.128643009275, 0.122542002232],
        [0.127534984263, 0.127534984263, -0.255069968526],
        [0.00324110806058, -0.0120513532057, 0.00881024514513],
    ],
    dtype=torch.float64,
)
DIGITS = {"rtol": 1e-11, "atol": 0}  # the numbers above have twelve digits
INTEGRALS = {(0.0, 2.0): 3.1945, (0.5, 8.0): 11.4082, (1.0, 8.0): 4.4197, (2.0, 8.0): 2.1064}


@pytest.mark.parametrize("form", ["literal", "stable"])
@pytest.mark.parametrize(("lambd", "beta"), TABLE)
def test_original_layer(form, lambd, beta):
    weights, total, value = TABLE[lambd, beta]
    logits = LOGITS.clone().requires_grad_()
    output = reference.dm_loss(logits, TARGET, edf.DM(beta=beta, lambd=lambd), form=form)
    output.loss.backward()
    expected_weights = torch.tensor(weights, dtype=torch.float64)
    torch.testing.assert_close(output.target_prob, PROB, **DIGITS)
    torch.testing.assert_close(output.example_weight * output.sum_weight, expected_weights, **DIGITS)
    torch.testing.assert_close(output.sum_weight, torch.tensor(total, dtype=torch.float64), **DIGITS)
    torch.testing.assert_close(output.loss.detach(), torch.tensor(value, dtype=torch.float64), **DIGITS)
    if (lambd, beta) == (0.5, 8.0):
        torch.testing.assert_close(logits.grad, GRADIENT, **DIGITS)
    if (lambd, beta) == (0.0, 2.0):
        first = torch.tensor([-0.077302686, 0.056512791, 0.020789894], dtype=torch.float64)
        torch.testing.assert_close(logits.grad[0], first, rtol=0, atol=1e-9)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("lambd", "beta"), TABLE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_original_layer_in_every_implementation(impl, lambd, beta, dtype):
    emphasis = edf.DM(beta=beta, lambd=lambd)
    logits = LOGITS.to(dtype)
    output, dlogits = run(impl, logits, TARGET, emphasis)
    check(output, dlogits, expected(logits, TARGET, emphasis))


@pytest.mark.parametrize(("lambd", "beta"), INTEGRALS)
def test_integrals(lambd, beta):
    p = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    assert edf.DM(beta=beta, lambd=lambd).weight(p).mean().item() == pytest.approx(INTEGRALS[lambd, beta], abs=5e-5)


@pytest.mark.parametrize("reduction", ["sum_weight", "mean", "sum", "none"])
@pytest.mark.parametrize("emphasis", EMPHASES, ids=str)
def test_literal_and_stable_form_agree(emphasis, reduction):
    logits, target = make(50, 20, torch.float64, margins=5.0, ignored=0.2)
    weight = torch.linspace(-0.5, 2, 20, dtype=torch.float64)
    results = []
    for form in ("literal", "stable"):
        leaf = logits.clone().requires_grad_()
        output = reference.dm_loss(leaf, target, emphasis, form=form, reduction=reduction, weight=weight)
        output.loss.sum().backward()
        results.append((*(field.detach() for field in output), leaf.grad))
    for literal, stable in zip(*results, strict=True):
        torch.testing.assert_close(literal, stable, rtol=1e-10, atol=1e-13, equal_nan=True)


# torch's own forward-mode decompositions use torch.jit.script.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_forward_and_reverse_mode_transforms():
    logits, target = make(6, 5, torch.float64)

    def loss(z):
        return reference.dm_loss(z, target, edf.DM(beta=8, lambd=0.5)).loss

    leaf = logits.clone().requires_grad_()
    loss(leaf).backward()
    tangent = torch.randn_like(logits)
    torch.testing.assert_close(torch.func.grad(loss)(logits), leaf.grad)
    torch.testing.assert_close(torch.func.jvp(loss, (logits,), (tangent,))[1], (leaf.grad * tangent).sum())
