"""Operators of torch.library that are called directly where nobody but autograd would hear of them.

The dispatcher and the wrappers of `torch.library.custom_op` take 25 to 60 us a call, several times the launch of a kernel. A
tracer, a mode, a transform and a subclass of Tensor need them, and get them; for plain tensors in eager mode the function is
called, as the forward of a `torch.autograd.Function` where a gradient is wanted.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils._python_dispatch import _get_current_dispatch_mode

_PLAIN = (Tensor, torch.nn.Parameter)


def is_eager() -> bool:
    """Whether this thread's torch calls are computed as they come: nothing traces, transforms or looks at them."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if _get_current_dispatch_mode() is not None or torch._ops._len_torch_dispatch_stack_pre_dispatch():
        return False
    return torch._C._get_tracing_state() is None


def is_plain(tensor: Tensor) -> bool:
    """Whether it is a tensor of numbers and nothing else: no subclass, and no batch of those that batched gradients make."""
    return type(tensor) in _PLAIN and not torch._C._functorch.is_legacy_batchedtensor(tensor)


def is_batch(tensor: Tensor) -> bool:
    """Whether it is one of several that are computed at once, by torch.vmap or with `is_grads_batched=True`."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


class Operator:
    """An operator with its fake kernel and its derivative.

    Attributes:
        definition: the operator as torch.library knows it.
        returned: number of the argument that it returns with another derivative, if it does.
    """

    def __init__(self, name: str, mutates_args: Sequence[str], returns: str | None, function: Callable[..., Any]) -> None:
        self.definition = torch.library.custom_op(name, mutates_args=mutates_args)(function)
        self.register_fake = self.definition.register_fake
        parameters = inspect.signature(function).parameters
        self._function = function
        self._defaults = tuple(parameter.default for parameter in parameters.values())
        self._mutated = [number for number, parameter in enumerate(parameters) if parameter in mutates_args]
        self.returned = None if returns is None else list(parameters).index(returns)
        self._derivative: type[torch.autograd.Function] | None = None

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """As `torch.library.register_autograd`."""
        self.definition.register_autograd(backward, setup_context=setup_context)
        function, returned = self._function, self.returned

        # A `setup_context` of its own would have autograd take apart the signature in every call.
        def forward(ctx, *args):
            if returned is None or args[returned]._is_view():
                output = function(*args)
            else:
                output = args[returned]
                ctx.mark_dirty(output)
            setup_context(ctx, args, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._derivative = type(function.__name__, (torch.autograd.Function,), methods)

    def __call__(self, *args: Any) -> Any:
        if not is_eager():
            return self.definition(*args)
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        if (wanted and self._derivative is None) or not all(map(is_plain, tensors)):
            return self.definition(*args)
        for number in self._mutated:
            increment_version(args[number])
        if wanted and self._derivative is not None:
            return self._derivative.apply(*args, *self._defaults[len(args) :])
        return self._function(*args)


def operator(
    name: str, mutates_args: Sequence[str] = (), returns: str | None = None
) -> Callable[[Callable[..., Any]], Operator]:
    """As `torch.library.custom_op`.

    `returns` is the argument that the operator returns a copy of, with another derivative. A direct call that brings the
    derivative returns the argument itself, which the caller gives up.
    """
    return lambda function: Operator(name, mutates_args, returns, function)
