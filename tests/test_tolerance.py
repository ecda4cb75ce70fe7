"""The bound lets no fault through: results that are wrong in a way that a tolerance by dtype would miss."""

import pytest
import torch
from batches import make, run
from tolerance import check, expected

from fused_dm import edf

DM = edf.DM(beta=8, lambd=0.5)

WRONG = {
    "all zeros": lambda g: g * 0,
    "sign": lambda g: -g,
    "a hundredth too large": lambda g: g * 1.01,
    "one row twice": lambda g: torch.cat([g[:1], g[:1], g[2:]]),
    "last class missing": lambda g: torch.cat([g[:, :-1], g[:, -1:] * 0], 1),
    "one class off": lambda g: g.roll(1, 1),
    "a row missing": lambda g: torch.cat([g[:-1], g[-1:] * 0]),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "a class masked by the lowest number"])
def test_wrong_gradients_are_noticed(wrong, dtype, masked):
    logits, target = make(64, 500, dtype)
    if masked:
        logits[:, 3] = torch.finfo(dtype).min
        target[target == 3] = 4
    truth = expected(logits, target, DM)
    output, dlogits = run("cpu", logits, target, DM)
    check(output, dlogits, truth)
    with pytest.raises(AssertionError, match=r"dlogits: element \d+ of \(64, 500\) is .* times the bound"):
        check(output, wrong(dlogits.float()), truth)


@pytest.mark.parametrize("name", ["loss", "example_weight", "target_prob", "sum_weight"])
def test_wrong_numbers_are_noticed(name):
    logits, target = make(64, 500)
    truth = expected(logits, target, DM)
    output, dlogits = run("cpu", logits, target, DM)
    with pytest.raises(AssertionError, match=f"{name}: element"):
        check(output._replace(**{name: getattr(output, name) * (1 + 3e-5)}), dlogits, truth)
