"""Packages that only some of fused_dm needs: asked for where they are used, never on import."""

import importlib.util


def require(what: str, extra: str, *packages: str) -> None:
    """Raise ModuleNotFoundError, with the command that helps, unless the packages of an extra are installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"{what} needs {' and '.join(missing)}: pip install {' '.join(missing)} (the extra {extra!r} of fused_dm)"
        )
