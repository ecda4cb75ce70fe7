"""Who may import whom: the definition stays apart from the implementations, and device code apart from the host's."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fused_dm"
KERNELS = ROOT / "kernels" / "fused_dm_kernels"

# What each module imports of the project. A new module is added here, with what it is allowed.
EDGES = {
    "__init__": {"edf", "reference", "schedules", "_api", "_environment", "_linear", "_report"},
    "__main__": {"_cli", "_extras"},
    "_api": {"_cpu", "_loss", "_operators", "_validation", "edf", "reference"},
    "_cli": {"_environment", "_extras", "_plot", "edf"},
    "_cpu": {"_rows", "_walk"},
    "_environment": {"_api", "_walk", "__version__"},
    "_extras": set(),
    "_launch": set(),
    "_linear": {"_api", "_linear_operators", "_loss", "_operators", "_validation", "edf", "reference"},
    "_linear_blocks": {"_cpu", "_rows", "_triton", "edf"},
    "_linear_operators": {"_cpu", "_linear_blocks", "_operator", "_rows"},
    "_loss": {"_cpu", "_operator", "_operators", "_rows", "_validation", "edf"},
    "_operator": set(),
    "_operators": {"_cpu", "_launch", "_operator", "_rows", "_triton"},
    "_plot": {"_report", "edf"},
    "_report": {"_api", "_extras", "_linear", "_plot", "_validation"},
    "_rows": set(),
    "_triton": {"_launch", "_rows", "edf", "fused_dm_kernels"},
    "_validation": {"edf"},
    "_walk": set(),
    "edf/__init__": {"_check", "_custom", "_density", "_designed", "_draw", "_forms", "_losses", "_names"},
    "edf/_check": {"_density", "_measure", "_operators", "_validation"},
    "edf/_custom": {"_density", "_forms", "_names"},
    "edf/_density": {"_forms", "_measure"},
    "edf/_designed": {"_density"},
    "edf/_draw": {"_density", "_extras", "_measure", "_names", "_plot"},
    "edf/_forms": set(),
    "edf/_losses": {"_density", "_designed", "_forms"},
    "edf/_measure": set(),
    "edf/_names": {"_density"},
    "reference": set(),
    "schedules": {"edf"},
}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            names |= {prefix} if node.module else {f"{prefix}{alias.name}" for alias in node.names}
    return names


def test_every_module_is_listed():
    assert {path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py")} == set(EDGES)


@pytest.mark.parametrize("module", EDGES)
def test_edges(module):
    names = imported(PACKAGE / f"{module}.py")
    own = {
        name.lstrip(".").split(".")[0] for name in names if name.startswith(".") or name.split(".")[0].startswith("fused_dm")
    }
    assert own == EDGES[module]
    if module != "_triton":
        assert not any(name.split(".")[0] == "triton" for name in names)


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda path: path.stem)
def test_device_code_imports_triton_and_itself(path):
    for name in imported(path):
        assert name.startswith(".") or name.split(".")[0] == "triton", name
