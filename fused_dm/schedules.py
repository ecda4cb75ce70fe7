"""Schedules of an EDF's parameters over training, stepped like those of `torch.optim.lr_scheduler`.

With very many classes every p starts near 1 / V, where an EDF with a large beta tells few examples apart and may hold on to
those few: such a beta is raised from 0, at which all examples count alike. A schedule writes the parameters into the loss
module's buffer in place, so a compiled model is not compiled again, and a captured CUDA graph sees them at its next replay::

    >>> import fused_dm
    >>> criterion = fused_dm.DMLoss("dm:beta=0,lambd=0.5")
    >>> schedule = fused_dm.schedules.Linear(criterion, steps=1000, beta=8)  # from the present value to 8
    >>> for _ in range(500):
    ...     schedule.step()  # after optimizer.step(), outside of compiled code
    >>> criterion.emphasis
    DM(beta=4.0, lambd=0.5)

A schedule becomes a submodule of its criterion, so that the step is in the `state_dict` of the criterion and of a model that
holds it; `schedule.state_dict()` serves loops that save the two apart. Loading puts a criterion and a schedule that were made
with the same arguments where the others were; arguments are not in the state::

    >>> resumed = fused_dm.DMLoss("dm:beta=0,lambd=0.5")
    >>> schedule = fused_dm.schedules.Linear(resumed, steps=1000, beta=8)
    >>> _ = resumed.load_state_dict(criterion.state_dict())
    >>> schedule.last_step, str(resumed.emphasis)
    (500, 'dm:beta=4,lambd=0.5')
"""

import bisect
import dataclasses
import itertools
import math
import zlib
from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from . import edf

__all__ = ["Cosine", "Linear", "Schedule", "Step"]

# A ramp is checked before training at this many of its steps, the ends among them: an EDF may want whole numbers.
_CHECKED = 256


class _Criterion(Protocol):
    emphasis: edf.EDF

    def set_emphasis(self, emphasis: edf.EDF | str) -> None: ...


def _named(density: edf.EDF, prefix: str = "") -> dict[str, float]:
    """The parameters of an EDF by name; those of the parts of a composition by names such as "parts.0.beta"."""
    found: dict[str, float] = {}
    for field in dataclasses.fields(density):
        value, name = getattr(density, field.name), f"{prefix}{field.name}"
        if isinstance(value, edf.EDF):
            found |= _named(value, f"{name}.")
        elif isinstance(value, tuple):
            for index, part in enumerate(value):
                found |= _named(part, f"{name}.{index}.")
        elif isinstance(value, (int, float)):
            found[name] = value
    return found


def _replaced(density: edf.EDF, values: dict[str, float], prefix: str = "") -> edf.EDF:
    """The EDF with other parameters, by the names of `_named`."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(density):
        value, name = getattr(density, field.name), f"{prefix}{field.name}"
        if name in values:
            changes[field.name] = values[name]
        elif isinstance(value, edf.EDF):
            changes[field.name] = _replaced(value, values, f"{name}.")
        elif isinstance(value, tuple):
            changes[field.name] = tuple(_replaced(part, values, f"{name}.{index}.") for index, part in enumerate(value))
    return dataclasses.replace(density, **changes)


def _parameters(criterion: torch.nn.Module, name: str) -> dict[str, float]:
    """The parameters of the criterion's EDF by name."""
    if not (isinstance(criterion, torch.nn.Module) and hasattr(criterion, "set_emphasis")):
        raise TypeError(f"{name}: expected criterion to be a DMLoss, got {type(criterion).__name__}")
    density = criterion.emphasis
    if not isinstance(density, edf.EDF):
        raise ValueError(f"{name}: expected a criterion with a built-in EDF; a callable has no parameters to schedule")
    return _named(density)


def _number(name: str, parameter: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected {parameter} to be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}: expected {parameter} to be a number that fp32 can hold, got {value!r}") from None


def _whole(name: str, argument: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected {argument} to be whole numbers of steps, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected {argument} of at least 1, got {value}")
    return value


class Schedule(torch.nn.Module):
    """Base class: parameters that go from value to value, each reached at a milestone, in a way that `fraction` describes.

    Between two milestones a and b, a parameter that is u at a and v at b has the value `u + (v - u) fraction((step - a) /
    (b - a))`; from the last milestone on it keeps its last value. `Linear`, `Cosine` and `Step` are the usual ways; a
    schedule of your own defines `fraction`.

    Args:
        criterion: a `DMLoss`, or another module with `emphasis` and `set_emphasis`. The schedule becomes its submodule
            `schedule` (`schedule2` and so on if there are several, of different parameters); `del criterion.schedule` ends
            it.
        milestones: increasing numbers of steps, at least 1.
        values: of each scheduled parameter, by name, one value more than there are milestones: the first is that of step 0. The
            parameters of a composition's parts have names such as "parts.0.beta", or "part.q".

    Attributes:
        last_step: how many steps were made. The `state_dict` holds it and the values of step 0, in one CPU tensor.

    Raises:
        TypeError: the criterion is no such module, or a number is expected and something else given.
        ValueError: the criterion's EDF is a callable, does not know a parameter or cannot take a value that it would be
            given, or another schedule has the parameter already.
    """

    def __init__(self, criterion: torch.nn.Module, milestones: Sequence[int], values: dict[str, Sequence[float]]) -> None:
        super().__init__()
        name = type(self).__name__
        criterion = getattr(criterion, "_orig_mod", criterion)  # torch.compile wraps the module whose state is meant
        known = _parameters(criterion, name)
        if not values:
            raise ValueError(f"{name}: expected a parameter to schedule, one of: {', '.join(known) or 'none is known'}")
        for parameter in values:
            if parameter not in known:
                raise ValueError(f"{name}: {criterion.emphasis} has no parameter {parameter!r}; known: {', '.join(known)}")
            for other in criterion.children():
                if isinstance(other, Schedule) and parameter in other._values:
                    raise ValueError(f"{name}: {parameter} has a schedule already; end that first: del criterion.schedule")
        self._milestones = [0, *(_whole(name, "milestones", step) for step in milestones)]
        if any(after <= before for before, after in itertools.pairwise(self._milestones)) or len(self._milestones) < 2:
            raise ValueError(f"{name}: expected increasing milestones, got {list(milestones)}")
        self._values: dict[str, list[float]] = {}
        for parameter, given in values.items():
            self._values[parameter] = [_number(name, parameter, value) for value in given]
            if len(self._values[parameter]) != len(self._milestones):
                expected, got = len(milestones), len(given) - 1
                raise ValueError(f"{name}: expected {expected} values of {parameter}, one for each milestone, got {got}")
        # In a tuple: a module would become a submodule, and the criterion is to hold this one.
        self._criterion = (cast(_Criterion, criterion),)
        self.last_step = 0
        last = self._milestones[-1]
        for step in sorted({*self._milestones, *(round(index * last / _CHECKED) for index in range(_CHECKED))}):
            try:
                self.emphasis_at(step)
            except ValueError as error:
                raise ValueError(f"{name}: not possible at step {step} of {last}: {error}") from None
        self._set()
        names = itertools.chain(["schedule"], (f"schedule{count}" for count in itertools.count(2)))
        criterion.add_module(next(name for name in names if not hasattr(criterion, name)), self)

    @staticmethod
    def fraction(time: float) -> float:
        """The part of the way to the next value that is gone, 0 to 1, after the part `time`, in [0, 1), of the steps to it."""
        raise TypeError("Schedule: expected the class to define fraction(time)")

    def values_at(self, step: int) -> dict[str, float]:
        """The scheduled parameters after `step` steps, at least 0, by name."""
        if step < 0:
            raise ValueError(f"{type(self).__name__}: expected a step of at least 0, got {step}")
        stage = bisect.bisect_right(self._milestones, step) - 1
        if stage == len(self._milestones) - 1:
            return {parameter: values[-1] for parameter, values in self._values.items()}
        begin, end = self._milestones[stage : stage + 2]
        way = self.fraction((step - begin) / (end - begin))
        return {
            parameter: values[stage] + (values[stage + 1] - values[stage]) * way for parameter, values in self._values.items()
        }

    def emphasis_at(self, step: int) -> edf.EDF:
        """The EDF after `step` steps; parameters that are not scheduled have their present values.

        Raises:
            ValueError: the criterion has an EDF by now that does not know a parameter.
        """
        density, values = self._criterion[0].emphasis, self.values_at(step)
        if unknown := values.keys() - _named(density).keys():
            raise ValueError(
                f"{type(self).__name__}: {density}, the criterion's EDF by now, has no parameter {sorted(unknown)}"
            )
        return _replaced(density, values)

    def step(self) -> None:
        """Make a step: the criterion gets the next EDF. Call it after `optimizer.step()`, outside of compiled code."""
        self.last_step += 1
        self._set()

    def _set(self) -> None:
        self._criterion[0].set_emphasis(self.emphasis_at(self.last_step))

    def extra_repr(self) -> str:
        ramps = (f"{name}: {' -> '.join(f'{value:g}' for value in values)}" for name, values in self._values.items())
        return f"{', '.join(ramps)}, step {self.last_step} of {self._milestones[-1]}"

    def get_extra_state(self) -> Tensor:
        """`last_step`, a checksum of the parameters' names and their values at step 0 in the names' order; fp64, on the CPU.

        Not as buffers: those move to a GPU, where reading them would synchronise, and lose digits when a model is cast. A
        tensor, as not every format of checkpoints holds anything else.
        """
        starts = [self._values[parameter][0] for parameter in sorted(self._values)]
        return torch.tensor([self.last_step, self._checksum, *starts], dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Any) -> None:
        """Go to the step and the starts of `get_extra_state`.

        Raises:
            ValueError: `state` is that of another schedule, or the criterion's EDF cannot take its values.
        """
        names = sorted(self._values)
        # A checkpoint may have been loaded to a GPU.
        step, checksum, *starts = (
            state.tolist() if isinstance(state, Tensor) and state.dim() == 1 and len(state) > 1 else (0, 0)
        )
        if checksum != self._checksum or len(starts) != len(names):
            raise ValueError(
                f"{type(self).__name__}: expected the state of a schedule of {', '.join(names)}, got another one's"
            )
        before, values = self.last_step, {parameter: list(values) for parameter, values in self._values.items()}
        try:
            self.last_step = int(step)
            for parameter, start in zip(names, starts, strict=True):
                self._values[parameter][0] = start
            self._set()
        except ValueError:
            self.last_step, self._values = before, values
            raise

    @property
    def _checksum(self) -> int:
        return zlib.crc32(",".join(sorted(self._values)).encode())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # Torch gathers what is wrong with a whole model in a list, the last argument.
        try:
            super()._load_from_state_dict(state_dict, prefix, *rest)
        except ValueError as error:
            rest[-1].append(f"{prefix.removesuffix('.')}: {error}")


class _Ramp(Schedule):
    def __init__(self, criterion: torch.nn.Module, steps: int, **parameters: float | tuple[float, float]) -> None:
        present = _parameters(criterion, type(self).__name__)
        values = {}
        for name, value in parameters.items():
            # The base class names a parameter that is not known, and a value that is no number.
            values[name] = value if isinstance(value, tuple) and len(value) == 2 else (present.get(name, 0.0), value)
        super().__init__(criterion, [_whole(type(self).__name__, "steps", steps)], cast(dict[str, Sequence[float]], values))


class Linear(_Ramp):
    """A straight ramp: after `step` of `steps` steps a parameter is start + (end - start) step / steps.

    Args:
        criterion: see `Schedule`.
        steps: steps until the end is reached, at least 1.
        parameters: the end of each scheduled parameter of the criterion's EDF, by name, from its present value on, or a pair
            (start, end).

    Raises:
        TypeError, ValueError: see `Schedule`.

    Example:
        >>> import fused_dm
        >>> criterion = fused_dm.DMLoss("dm:beta=0,lambd=0.5")
        >>> schedule = fused_dm.schedules.Linear(criterion, steps=4, beta=8, lambd=(0, 1))
        >>> [str(schedule.emphasis_at(step)) for step in (0, 1, 4, 5)]
        ['dm:beta=0,lambd=0', 'dm:beta=2,lambd=0.25', 'dm:beta=8,lambd=1', 'dm:beta=8,lambd=1']
    """

    @staticmethod
    def fraction(time: float) -> float:
        return time


class Cosine(_Ramp):
    """A ramp that starts and ends gently: start + (end - start) (1 - cos(pi step / steps)) / 2.

    Args:
        criterion, steps, parameters: see `Linear`.

    Raises:
        TypeError, ValueError: see `Schedule`.

    Example:
        >>> import fused_dm
        >>> criterion = fused_dm.DMLoss("dm:beta=0,lambd=0.5")
        >>> schedule = fused_dm.schedules.Cosine(criterion, steps=4, beta=8)
        >>> [round(schedule.values_at(step)["beta"], 3) for step in range(5)]
        [0.0, 1.172, 4.0, 6.828, 8.0]
    """

    @staticmethod
    def fraction(time: float) -> float:
        return (1 - math.cos(math.pi * time)) / 2


class Step(Schedule):
    """Jumps: each parameter keeps its value until the next milestone.

    Args:
        criterion: see `Schedule`.
        milestones: increasing numbers of steps, at least 1, as in `torch.optim.lr_scheduler.MultiStepLR`.
        parameters: of each scheduled parameter of the criterion's EDF, by name, its value from each milestone on.

    Raises:
        TypeError, ValueError: see `Schedule`.

    Example:
        >>> import fused_dm
        >>> criterion = fused_dm.DMLoss("dm:beta=0,lambd=0.5")
        >>> schedule = fused_dm.schedules.Step(criterion, milestones=[2, 3], beta=[4, 8])
        >>> [schedule.values_at(step)["beta"] for step in range(5)]
        [0.0, 0.0, 4.0, 8.0, 8.0]
    """

    def __init__(self, criterion: torch.nn.Module, milestones: Sequence[int], **parameters: Sequence[float]) -> None:
        present = _parameters(criterion, type(self).__name__)
        if not isinstance(milestones, (tuple, list)):
            raise TypeError(f"Step: expected a list of milestones, got {milestones!r}")
        for name, values in parameters.items():
            if not isinstance(values, (tuple, list)):
                raise TypeError(f"Step: expected a list of values of {name}, one for each milestone, got {values!r}")
        super().__init__(
            criterion, milestones, {name: [present.get(name, 0.0), *values] for name, values in parameters.items()}
        )

    @staticmethod
    def fraction(time: float) -> float:
        return 0.0
