"""A kept plan launches what Triton would: run without the interpreter, by a driver that launches nothing."""

import contextlib
from unittest import mock

import torch
from triton.compiler.compiler import LazyDict
from triton.runtime.jit import JITFunction

from bench import null_driver
from fused_dm import _triton, _validation, dm_loss, edf

RECORDED = []
DM = edf.DM(beta=8, lambd=0.5)


def described(arguments):
    """Grid, stream, function and arguments of a launch; new buffers only as far as they are alike."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            address = argument.data_ptr() if argument.data_ptr() in KNOWN else argument.data_ptr() % 16
            yield argument.dtype, argument.shape, argument.stride(), address
        # Triton makes a new one of those in every launch, for profilers.
        elif not isinstance(argument, LazyDict):
            yield argument


@contextlib.contextmanager
def launches_of_triton():
    """Count the launches that Triton looks at."""
    found, run = [], JITFunction.run

    def counted(self, *args, **kwargs):
        found.append(self)
        return run(self, *args, **kwargs)

    with mock.patch.object(JITFunction, "run", counted):
        yield found


def launches(call):
    RECORDED.clear()
    with launches_of_triton() as looked_at:
        call()
    return [tuple(described(launch)) for launch in RECORDED], len(looked_at)


def step(logits, target, emphasis=DM, **options):
    def call():
        leaf = logits.detach().requires_grad_()
        dm_loss(leaf, target, emphasis, impl="triton", **options).sum().backward()

    return call


def compared(call):
    """The functions that Triton launches, after a look at the arguments and again without."""
    by_triton, looked_at = launches(call)
    again, looked_at_again = launches(call)
    assert 0 < looked_at <= len(by_triton), (looked_at, by_triton)
    assert looked_at_again == 0
    assert again == by_triton, (again, by_triton)
    return [launch[4] for launch in by_triton]


def main():
    null_driver.install(lambda *arguments: RECORDED.append(arguments))
    aligned = torch.zeros(40 * 32 + 1, dtype=torch.bfloat16)
    logits, shifted = aligned[:-1].view(40, 32), aligned[1:].view(40, 32)
    labels = torch.zeros(42, dtype=torch.int64)
    target, later = labels[:40], labels[1:41]
    weight = torch.ones(32)
    KNOWN.update(tensor.data_ptr() for tensor in (logits, shifted, target, later))
    with mock.patch.object(_validation, "interprets", return_value=True):
        few = compared(step(logits, target))
        # The same plan, for tensors that Triton compiles another kernel for.
        for other in (step(shifted, target), step(logits, later), step(logits, target, weight=weight)):
            assert compared(other)[0] != few[0]
        assert launches(step(logits, target))[1] == 0
        for options in (
            {"reduction": "mean"},
            {"reduction": "sum", "normalizer": 3.0},
            {"reduction": "none"},
            {"logit_scale": 2.0},
            {"emphasis": edf.CCE()},
            {"ignore_index": 16},
        ):
            # Whoever changes what is launched does so too.
            _triton.forget_plans()
            compared(step(logits, target, **options))
        for shape in ((700, 16), (600, 5000), (2, 20000), (3, 12, 64)):
            of_shape, positions = torch.zeros(shape), torch.zeros(shape[:1] + shape[2:], dtype=torch.int64)
            compared(step(of_shape, positions))
            compared(step(of_shape, positions, reduction="sum", normalizer=3.0))


KNOWN = set()

if __name__ == "__main__":
    main()
