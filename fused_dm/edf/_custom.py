"""EDFs of your own, as a family like those of the catalogue: `register`."""

import contextlib
import dataclasses
import hashlib
import inspect
import re
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ._density import EDF
from ._forms import FAMILIES, Family
from ._names import known_names, name_kind

# The device functions (log_weight, loss) of the registered families, where the launcher finds them.
DEVICE_FORMS: dict[str, tuple[Any, Any]] = {}
_FIRST = ("log_p", "log_q")
# Names of registered EDFs, and what each belongs to.
_OWNERS: dict[str, str] = {}


def register(
    log_weight: Callable[..., Tensor] | None = None,
    *,
    triton: Any = None,
    loss: Callable[..., Tensor] | None = None,
    triton_loss: Any = None,
    name: str | None = None,
) -> Any:
    """Make an EDF class of a function of (log_p, log_q, *parameters) that returns log w; a decorator.

    The parameters become the fields of the class, with the function's defaults, so that the EDF has a name that `parse` knows,
    can be scheduled, added and multiplied, and is measured. With a `triton` form it is computed by the fused kernels, without
    one on the margins at a cost of order N. The kernels know it under the function's qualified name and a hash of its name
    here, the sources and what they take from a function around them; registering a changed function under the same name
    replaces it.

    Args:
        log_weight: torch function of log p and log(1 - p), tensors of one shape, and of the parameters, each a float or a
            0-d tensor. Its first two arguments may have any name.
        triton: the same as a `@triton.jit` function of (log_p, log_q, params_ptr), where `params_ptr` points to the parameters
            in fp64, in order.
        loss: f(p), if the weight is that of a loss, w = 2 p (1 - p) |f'(p)|; a function of the same arguments.
        triton_loss: f as a `@triton.jit` function, likewise.
        name: the name of the class; that of the function if None. `parse` knows it in lower case. It does not end as a number
            does before its exponent, such as "v1e".

    Returns:
        The class, a frozen dataclass whose fields are the parameters; or, without `log_weight`, a decorator that returns it.

    Raises:
        TypeError: an argument is no function, or its arguments are not as above.
        ValueError: the name belongs to another EDF or is none, a parameter has the name of an EDF's attribute or, but for its
            case, of another, or one of `loss` and `triton_loss` is missing.

    Example:
        >>> from fused_dm import edf
        >>> @edf.register
        ... def bell(log_p, log_q, beta=20.0):
        ...     return beta * ((log_p + log_q).exp() - 0.25)
        >>> bell(beta=30)
        bell(beta=30.0)
        >>> round(edf.parse("bell:beta=10").mode, 6)
        0.5
    """
    if log_weight is None:
        return lambda function: register(function, triton=triton, loss=loss, triton_loss=triton_loss, name=name)
    fields = _parameters("log_weight", log_weight)
    if loss is not None and [field[0] for field in _parameters("loss", loss)] != [field[0] for field in fields]:
        raise TypeError(f"register: expected loss to take the parameters of log_weight, {[field[0] for field in fields]}")
    for argument, function in (("triton", triton), ("triton_loss", triton_loss)):
        _check_device_form(argument, function)
    if triton is not None and (loss is None) != (triton_loss is None):
        raise ValueError("register: expected loss and triton_loss, or neither; the kernels report what torch reports")
    if triton is None and triton_loss is not None:
        raise ValueError("register: expected a triton form of the weight beside triton_loss")
    name = name or log_weight.__name__
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"register: expected name to be an identifier, got {name!r}")
    if re.search(r"\de$", name, re.IGNORECASE):
        raise ValueError(f"register: expected name not to end as a number does before its exponent, got {name!r}")
    owner = f"{log_weight.__module__}.{log_weight.__qualname__}"
    if name.lower() == "max" or (name.lower() in known_names() and _OWNERS.get(name.lower()) != owner):
        raise ValueError(f"register: expected a name that is not taken, got {name!r} for {owner}")
    family = f"{owner}:{_hash(name.lower(), log_weight, triton, loss, triton_loss)}"
    FAMILIES[family] = Family(log_weight, loss)
    if triton is not None:
        DEVICE_FORMS[family] = (triton, triton_loss)
    kind = dataclasses.make_dataclass(
        name,
        fields,
        bases=(EDF,),
        frozen=True,
        namespace={
            "family": family,
            "in_kernels": triton is not None,
            "__doc__": log_weight.__doc__ or f"Registered: {owner}.",
        },
    )
    kind.__module__, kind.__qualname__ = log_weight.__module__, log_weight.__qualname__
    _OWNERS[name.lower()] = owner
    name_kind(kind)
    return kind


def _parameters(argument: str, function: Any) -> list[Any]:
    """The parameters after log p and log q, as fields of a dataclass."""
    if not callable(function) or not hasattr(function, "__qualname__"):
        raise TypeError(f"register: expected {argument} to be a function of (log_p, log_q, *parameters), got {function!r}")
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:
        parameters = []
    if len(parameters) < 2 or any(p.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD for p in parameters):
        raise TypeError(f"register: expected {argument} to take (log_p, log_q, *parameters) by position, got {function!r}")
    names = [p.name for p in parameters[2:]]
    taken = [name for name in names if hasattr(EDF, name) or [other.lower() for other in names].count(name.lower()) > 1]
    if taken:
        raise ValueError(f"register: expected parameters that no EDF has an attribute for, and no two alike, got {taken}")
    empty = inspect.Parameter.empty
    return [(p.name, float) if p.default is empty else (p.name, float, p.default) for p in parameters[2:]]


def _check_device_form(argument: str, function: Any) -> None:
    # Triton is not imported here: a function under its decorator has these, in the interpreter and out of it.
    if function is not None and not (hasattr(function, "fn") and len(getattr(function, "arg_names", ())) == 3):
        raise TypeError(
            f"register: expected {argument} to be a @triton.jit function of (log_p, log_q, params_ptr), got {function!r}"
        )


def _source(function: Any) -> str:
    function = getattr(function, "fn", function)
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)
        return repr(function) if code is None else f"{code.co_code!r}{code.co_consts!r}{code.co_names!r}"


def _enclosed(function: Any) -> str:
    """What a function takes from the one around it, which is not in its source."""
    contents = []
    for cell in getattr(getattr(function, "fn", function), "__closure__", None) or ():
        # Empty while a function that calls itself is being defined.
        with contextlib.suppress(ValueError):
            contents.append(repr(cell.cell_contents))
    return "\0".join(contents)


def _hash(name: str, *functions: Any) -> str:
    text = "\0".join([name, *("" if function is None else _source(function) + _enclosed(function) for function in functions)])
    return hashlib.sha256(text.encode()).hexdigest()[:12]
