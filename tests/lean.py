"""Triton's interpreter, made faster: what depends on types alone is found out once, and not at every operation.

An operation of the language (`x + y`, `tl.load`) checks and converts its operands, and then calls the interpreter's builder,
whose methods are numpy's functions. Which methods it calls on what depends on the types of the operands and on the values of
constants, as it must where kernels are compiled. So the calls are noted the first time, and repeated from then on with other
arrays. numpy is given the same arrays in the same order.

One check is done that the interpreter leaves out: integers of less than 64 bits must not overflow. `install` is called once,
by `interpreter.install`.
"""

from typing import NamedTuple

import numpy as np


class IntegerOverflow(AssertionError):
    """A sum, a difference or a product that its type cannot hold."""


class Operand(NamedTuple):
    """The number of an operand, or of the call after them, that gives an argument."""

    number: int


class Notes:
    """A builder that does what another does, and notes which methods are called on what."""

    def __init__(self, builder, handles) -> None:
        self.builder = builder
        self.handles = list(handles)  # kept, so that their ids remain theirs
        self.numbers = {id(handle): number for number, handle in enumerate(handles)}
        self.constants: list = []
        self.calls: list[tuple] = []
        self.complete = True

    def operand(self, argument):
        if id(argument) in self.numbers:
            return Operand(self.numbers[id(argument)])
        if hasattr(argument, "data") and not any(argument is constant for constant in self.constants):
            self.complete = False  # of another origin, such as a reduction
        return argument

    def __getattr__(self, name):
        method = getattr(self.builder, name)

        def constant(*arguments):
            self.constants.append(method(*arguments))
            return self.constants[-1]

        def noted(*arguments):
            self.calls.append((method, [self.operand(argument) for argument in arguments]))
            result = method(*arguments)  # None for a store, and then so is every None after it
            self.numbers[id(result)] = len(self.handles)
            self.handles.append(result)
            return result

        if name.startswith("create_"):
            return noted
        return constant if name.startswith("get_") else method


def install() -> None:
    """Make the interpreter of this process faster."""
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    _values(tl.core, interpreter)
    _overflow(TritonSemantic, interpreter)
    _operations(tl, interpreter)


def _values(core, interpreter):
    """What a value keeps of its type is the type's, and not made again for each value."""
    describe, numpy_type, numpy_types = core.tensor.__init__, interpreter._get_np_dtype, {}

    def init(self, handle, type):
        try:
            self.shape, self.numel, self.dtype = type.described
        except AttributeError:
            describe(self, handle, type)
            type.described = self.shape, self.numel, self.dtype
        self.handle, self.type = handle, type

    def kept_numpy_type(dtype):
        if dtype.name not in numpy_types:
            numpy_types[dtype.name] = numpy_type(dtype)
        return numpy_types[dtype.name]

    core.tensor.__init__ = init
    interpreter._get_np_dtype = kept_numpy_type


def _overflow(semantic, interpreter):
    """Triton has the sums computed in 64 bits to compare them, and compares nothing unless it debugs."""
    exactly = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def create_check(self, lhs, rhs, operation, dtype):
        wide = exactly[operation](lhs.data.astype(np.int64), rhs.data.astype(np.int64))
        if wide.size and (wide.min() < dtype.get_int_min_value() or wide.max() > dtype.get_int_max_value()):
            raise IntegerOverflow(f"{operation} of two {dtype}: {wide.min()} to {wide.max()}")

    def sanitize(self, lhs, rhs, operation):
        if lhs.dtype.int_bitwidth < 64:
            self.builder.create_check(lhs.handle, rhs.handle, operation.__name__, lhs.dtype)

    interpreter.InterpreterBuilder.create_check = create_check
    semantic.binary_op_sanitize_overflow_impl = sanitize


def _operations(tl, interpreter):
    """Operations are replaced once for the process, and not at every launch and every call of a function on the device."""
    tensor, constexpr, patch = tl.tensor, tl.constexpr, interpreter._patch_lang
    packages, patched = {}, set()

    def key_of(value):
        kind = type(value)
        if kind is tensor:
            return value.type.name
        if kind is constexpr:
            return kind, key_of(value.value)
        if kind in (tuple, list, tl.tuple):
            return kind, *map(key_of, value)
        if kind in (float, slice) or isinstance(value, tl.dtype):
            return kind, repr(value)
        return kind, value

    def own(value):
        """The same, with a handle that is no other operand's."""
        if not is_tensor(value):
            return value
        return tensor(interpreter.TensorHandle(value.handle.data, value.handle.dtype), value.type)

    def is_tensor(value):
        return type(value) is tensor

    def plan_of(function, arguments, options):
        """What the operation returns, and how to have it again: None if its operands do not say all."""
        arguments, options = [own(value) for value in arguments], {name: own(value) for name, value in options.items()}
        given = [value.handle for value in (*arguments, *options.values()) if is_tensor(value)]
        notes = Notes(interpreter.interpreter_builder, given)
        result = function(*arguments, _semantic=type(interpreter.interpreter_semantic)(notes), **options)
        if not (notes.complete and is_tensor(result) and id(result.handle) in notes.numbers):
            return result, None
        return result, (notes.calls, notes.numbers[id(result.handle)], result.type)

    def replaced(obj, name, function, builder, scope):
        plans = {}

        def operation(*arguments, _semantic=None, **options):
            if _semantic is not None:
                return function(*arguments, _semantic=_semantic, **options)
            key = *map(key_of, arguments), *[(name, key_of(value)) for name, value in options.items()]
            if key not in plans:
                result, plans[key] = plan_of(function, arguments, options)
                return result
            if plans[key] is None:
                return function(*arguments, _semantic=interpreter.interpreter_semantic, **options)
            calls, number, kind = plans[key]
            handles = [value.handle for value in (*arguments, *options.values()) if is_tensor(value)]
            for method, operands in calls:
                handles.append(method(*[handles[each.number] if type(each) is Operand else each for each in operands]))
            return tensor(handles[number], kind)

        scope.set_attr(obj, name, operation)

    def patch_once(function):
        if function not in packages:
            seen = function.__globals__.values()
            packages[function] = tuple(any(value is package for value in seen) for package in (tl, tl.core))
        if packages[function] not in patched:
            patched.add(packages[function])
            patch(function)
        return interpreter._LangPatchScope()

    interpreter._patch_attr = replaced
    interpreter._patch_lang = patch_once
