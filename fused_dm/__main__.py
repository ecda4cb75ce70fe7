"""The command `fused-dm`, also `python -m fused_dm`."""

import sys

from ._extras import require


def main() -> None:
    """Run the command; without what it needs, say how to install that."""
    try:
        require("fused-dm", "cli", "typer", "rich")
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}")
    from ._cli import app

    app(prog_name="fused-dm")


if __name__ == "__main__":
    main()
