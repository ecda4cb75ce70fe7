"""Text for EDFs and compositions of them, the inverse of `str`.

    sum      = product { "+" product }
    product  = [ number "*" ] factor { "*" factor }
    factor   = atom { "[" number "," number "]" }
    atom     = name [ ":" parameter "=" number { "," parameter "=" number } ] | "(" sum ")" | "max(" sum "," number ")"

Plain string operations only: a name may be read inside of compiled code.
"""

import dataclasses
import difflib

from ._density import EDF, Floored, Product, Scaled, Sum, Truncated

_STOPS = "+*()[],"
_KINDS: dict[str, type[EDF]] = {}
# Parameters by lower-case name, and those without a default. Made here, as compiled code cannot ask a dataclass.
_FIELDS: dict[str, dict[str, str]] = {}
_REQUIRED: dict[str, list[str]] = {}


def name_kind(kind: type[EDF]) -> None:
    """Let `parse` know a class under its name in lower case."""
    name = kind.__name__.lower()
    fields = dataclasses.fields(kind)
    _KINDS[name] = kind
    _FIELDS[name] = {field.name.lower(): field.name for field in fields}
    _REQUIRED[name] = [field.name for field in fields if field.default is dataclasses.MISSING]


def known_names() -> list[str]:
    """The names that `parse` knows."""
    return list(_KINDS)


def parse(text: str) -> EDF:
    """The EDF that `text` names, the inverse of `str(edf)`: "name" or "name:parameter=number,parameter=number".

    Compositions are written as `str` writes them, a number before what it multiplies: "0.5*cce+2*mae",
    "dm:beta=8,lambd=0.5*cce" (a product). "(cce+mae)[0.2,0.9]" is truncated to 0.2 < p <= 0.9, and "max(mae,0.1)" has a floor.
    Spaces do not matter, nor does the case of names.

    Args:
        text: for example "cce", "dm:beta=8,lambd=0.5" or "0.1*cce+4*mae".

    Returns:
        The frozen EDF.

    Raises:
        TypeError: `text` is no str.
        ValueError: the name, a parameter or a number is not known; the message names what was expected.
    """
    if not isinstance(text, str):
        raise TypeError(f"parse: expected text such as 'dm:beta=8,lambd=0.5', got {text!r}")
    emphasis, at = _sum(text, 0)
    if at < len(text):
        raise ValueError(f"EDF {text!r}: expected the end or one of + * [ at position {at}, got {text[at:]!r}")
    return emphasis


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] == " ":
        at += 1
    return at


def _follows(text: str, at: int, character: str) -> bool:
    return at < len(text) and text[at] == character


def _expect(text: str, at: int, character: str) -> int:
    if not _follows(text, at, character):
        got = repr(text[at]) if at < len(text) else "the end"
        raise ValueError(f"EDF {text!r}: expected {character!r} at position {at}, got {got}")
    return _skip(text, at + 1)


def _word(text: str, at: int, stops: str) -> tuple[str, int]:
    """What stands before the next of `stops`; the + in 1e+30 is none."""
    start = at
    while at < len(text):
        exponent = text[at] in "+-" and at - 2 >= start and text[at - 1] in "eE" and text[at - 2] in "0123456789."
        if text[at] in stops and not exponent:
            break
        at += 1
    return text[start:at].strip(), at


def _number(text: str, at: int, what: str) -> tuple[float, int]:
    word, at = _word(text, at, _STOPS)
    try:
        return float(word), at
    except ValueError:
        raise ValueError(f"EDF {text!r}: expected a number for {what}, got {word!r}") from None


def _sum(text: str, at: int) -> tuple[EDF, int]:
    part, at = _product(text, at)
    parts = [part]
    while _follows(text, at, "+"):
        part, at = _product(text, at + 1)
        parts.append(part)
    return (parts[0] if len(parts) == 1 else Sum(tuple(parts))), at


def _product(text: str, at: int) -> tuple[EDF, int]:
    at = _skip(text, at)
    scale = None
    if at < len(text) and text[at] in "0123456789.-":
        scale, at = _number(text, at, "the factor")
        at = _expect(text, at, "*")
    factor, at = _factor(text, at)
    factors = [factor]
    while _follows(text, at, "*"):
        factor, at = _factor(text, at + 1)
        factors.append(factor)
    product = factors[0] if len(factors) == 1 else Product(tuple(factors))
    return (product if scale is None else Scaled(scale, product)), at


def _factor(text: str, at: int) -> tuple[EDF, int]:
    part, at = _atom(text, _skip(text, at))
    at = _skip(text, at)
    while _follows(text, at, "["):
        low, at = _number(text, at + 1, "the lower end")
        high, at = _number(text, _expect(text, at, ","), "the upper end")
        at = _expect(text, at, "]")
        part = Truncated(part, low, high)
    return part, at


def _atom(text: str, at: int) -> tuple[EDF, int]:
    if _follows(text, at, "("):
        part, at = _sum(text, at + 1)
        return part, _expect(text, at, ")")
    name, at = _word(text, at, ":" + _STOPS)
    if name.lower() == "max" and _follows(text, at, "("):
        part, at = _sum(text, at + 1)
        least, at = _number(text, _expect(text, at, ","), "the floor")
        return Floored(part, least), _expect(text, at, ")")
    kind = _KINDS.get(name.lower())
    if kind is None:
        near = difflib.get_close_matches(name.lower(), list(_KINDS), n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown EDF {name!r}{hint} Known: {', '.join(_KINDS)}")
    values: dict[str, float] = {}
    if _follows(text, at, ":"):
        at = _parameters(text, at + 1, name.lower(), values)
    missing = [field for field in _REQUIRED[name.lower()] if field not in values]
    if missing:
        raise ValueError(f"EDF {text!r}: expected a value for {', '.join(missing)}")
    return kind(**values), at


def _parameters(text: str, at: int, name: str, values: dict[str, float]) -> int:
    """Read parameter=number, parameter=number from `at` into `values`."""
    fields = _FIELDS[name]
    while True:
        part, end = _word(text, at, _STOPS)
        if part:
            key, equals, digits = part.partition("=")
            field = fields.get(key.strip().lower())
            if field is None or field in values or not equals:
                raise ValueError(f"EDF {text!r}: expected each of ({', '.join(fields.values())}) at most once, got {part!r}")
            try:
                values[field] = float(digits)
            except ValueError:
                raise ValueError(f"EDF {text!r}: expected a number for {key.strip()}, got {digits.strip()!r}") from None
        # A comma that no parameter follows belongs to what stands around.
        if not _follows(text, end, ",") or "=" not in _word(text, end + 1, _STOPS)[0]:
            return end
        at = end + 1
