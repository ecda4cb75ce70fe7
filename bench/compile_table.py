"""What the compiler makes of every kernel, without a GPU: `python -m bench.compile_table`.

Each kernel is compiled at the launch shapes that the package chooses, for sm_80, sm_90, sm_100 and gfx942, and its machine
code is read: registers, stack, spills inside loops, 128-bit accesses, exponentials per element. `violations` holds what
must not happen; the test suite calls it for the installed Triton and for another one.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

import fused_dm_kernels as kernels
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_dm import _triton as launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
# Loads of a block of logits in the kernel's text, and exponentials an element costs over all passes.
PASSES = {"margin": 1, "forward": 1, "gradient": 1, "multiply": 1, "fused": 2, "totals": 0}
# Exponentials for a row that a thread holds: rescaling the sum, p and q, the weight relative to the batch, the coefficient.
EXP_PER_ROW = 4
# And those of the EDF: calls of exp, expm1_negative, softplus and log_sum in its log_weight and its f.
EXP_OF_FAMILY = {
    "dm": 1,
    "normal": 1,
    "beta": 0,
    "cce": 0,
    "mae": 1,
    "dft": 1,
    "mse": 1,
    "gce": 1,
    "truncated_gce": 1,
    "focal": 3,
    "sce": 2,
    "taylorce": 3,
    "poly1": 3,
    "phuberce": 1,
    "aul": 5,
    "agce": 5,
    "ael": 3,
    "js": 4,
    "self_paced": 0,
    "self_paced_linear": 0,
}
MAX_STACK = 16


@dataclasses.dataclass
class Case:
    """A kernel at one launch shape."""

    kernel: str
    dtype: str
    classes: int
    family: str = "dm"
    weighted: bool = False
    # Arguments that this launch makes constants: None, 1, a flag. RUN_TIME makes one an argument that is None elsewhere.
    constants: dict[str, object] = dataclasses.field(default_factory=dict)

    @property
    def config(self) -> dict[str, int]:
        if self.kernel == "totals":
            return {"BLOCK": 1024, "num_warps": 8}
        capped = bool(self.constants.get("CAPPED"))
        return launch.tile(self.classes, ITEMSIZE[self.dtype], keep=self.kernel == "fused", capped=capped)


@dataclasses.dataclass
class Row:
    """What one compilation gave."""

    triton: str
    target: str
    kernel: str
    dtype: str
    family: str
    classes: int
    block_n: int
    block_v: int
    warps: int
    registers: int
    stack: int
    local_in_loop: int
    shared: int
    wide_loads: int
    wide_stores: int
    narrow_loads: int
    exps: int
    elements: int
    capped: bool = False

    def violations(self) -> list[str]:
        found = []
        if self.local_in_loop:
            found.append(f"{self.local_in_loop} accesses of local memory inside a loop")
        if self.stack > MAX_STACK:
            found.append(f"{self.stack} bytes of stack")
        if self.kernel == "totals" or self.dtype == "fp64":
            return found
        vector = 16 // ITEMSIZE[self.dtype]
        aligned = self.classes % vector == 0
        wide = max(1, self.elements // vector)
        # A row of one block stays in registers: it is read once, exponentiated once and written once.
        one_block = self.kernel == "fused" and self.classes <= self.block_v
        passes = 1 if one_block else PASSES[self.kernel]
        if aligned and self.wide_loads < passes * wide:
            found.append(f"{self.wide_loads} loads of 128 bits, expected {passes * wide}")
        stores = {"gradient": 1, "multiply": 1, "fused": passes}.get(self.kernel, 0)
        if aligned and self.wide_stores < stores * wide:
            found.append(f"{self.wide_stores} stores of 128 bits, expected {stores * wide}")
        rows = max(1, min(self.block_n, self.elements // vector if aligned else self.elements))
        an_element, a_row = passes, EXP_PER_ROW + EXP_OF_FAMILY[self.family]
        if self.capped:
            # tanh takes one more, in the fused kernel also for the slope of the block in registers; and so does the label's.
            an_element, a_row = 2 * passes + (self.kernel == "fused"), a_row + 1
        allowed = an_element * self.elements + a_row * rows
        if self.exps > allowed:
            found.append(f"{self.exps} exponentials for {self.elements} elements, expected at most {allowed}")
        return found


CASES = [
    *(Case(kernel, "bf16", classes) for kernel in ("forward", "gradient") for classes in (16, 256, 1000, 128256, 50257)),
    *(Case("fused", "bf16", classes) for classes in (16, 256, 1000, 8192, 16384, 32000, 128256, 50257)),
    *(Case(kernel, "fp32", classes) for kernel in ("forward", "gradient") for classes in (1000, 128256)),
    *(Case("fused", "fp32", classes) for classes in (1000, 8192, 32000)),
    *(Case(kernel, "bf16", 128256) for kernel in ("margin", "multiply")),
    Case("totals", "fp32", 0),
]
RUN_TIME = object()
ONES = dict.fromkeys(("V", "logits_row_stride", "dlogits_row_stride", "dloss_stride", "ignore_index"), 1)
# Every family, dtype and option compiles; one target shows it.
VARIANTS = [
    *(Case(kernel, "bf16", 128256, family, weighted=True) for kernel in ("forward", "fused") for family in kernels.FAMILIES),
    *(Case(kernel, dtype, 128256) for kernel in ("forward", "gradient", "fused") for dtype in ("fp16", "fp64")),
    Case("totals", "fp64", 0, "cce"),
    *(Case(kernel, "bf16", 8, constants=ONES) for kernel in ("margin", "forward", "gradient", "multiply", "fused")),
    Case("gradient", "bf16", 128256, constants={"SKIP_ONE": True}),
    Case("gradient", "bf16", 128256, constants={"totals_ptr": None}),
    Case("totals", "fp32", 0, constants={"P": 1}),
    *(
        Case(kernel, dtype, classes, constants={"transform_ptr": RUN_TIME, "CAPPED": True})
        for kernel in ("forward", "gradient", "fused")
        for dtype, classes in (("bf16", 1000), ("bf16", 32000), ("bf16", 128256), ("fp32", 128256))
    ),
    *(Case(kernel, "bf16", 128256, constants={"transform_ptr": RUN_TIME}) for kernel in ("forward", "gradient", "fused")),
    *(Case("totals", "fp32", 0, family, constants={"normalizer_ptr": RUN_TIME}) for family in ("dm", "cce")),
]


def compile_case(case: Case, target: GPUTarget):
    """The compiled kernel, specialised as a launch on aligned tensors would be."""
    kernel = getattr(kernels, f"{case.kernel}_kernel")
    log_weight, loss = kernels.FAMILIES[case.family]
    compute = "fp64" if case.dtype == "fp64" else "fp32"
    config = dict(case.config)
    warps = config.pop("num_warps")
    vector = 16 // ITEMSIZE[case.dtype]
    unit = vector if case.classes % vector == 0 else 1
    constants = {"LOG_WEIGHT": log_weight, "LOSS": loss, "UNIT": unit, "SKIP_ONE": False, **config}
    constants |= {"transform_ptr": None, "CAPPED": False}
    constants["ONE_BLOCK"] = case.classes <= config.get("BLOCK_V", 0)
    if not case.weighted:
        constants["weight_ptr"] = None
    if case.kernel == "totals":
        constants["normalizer_ptr"] = None
    constants.update(case.constants)
    types = {
        "logits_ptr": f"*{case.dtype}",
        "dlogits_ptr": f"*{case.dtype}",
        "target_ptr": "*i64",
        "params_ptr": "*fp64",
        "transform_ptr": "*fp64",
        "totals_ptr": "*fp64",
        "normalizer_ptr": "*fp64",
        **dict.fromkeys(("weight_ptr", "rows_ptr", "partials_ptr", "margin_ptr", "dloss_ptr", "loss_ptr"), f"*{compute}"),
    }
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names and value is not RUN_TIME}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    # A stride that is a multiple of 16 units is left to chance: what holds without it holds with it.
    divisible = [name for name in names if name in types and name not in constants] + (["SPAN"] if "SPAN" in names else [])
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(kernel, signature, constexprs={(names.index(k),): v for k, v in constants.items()}, attrs=attributes)
    return triton.compile(source, target=target, options={"num_warps": warps, "enable_fp_fusion": True})


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True).stdout


def _in_loops(code: list[tuple[int, str]], branch: re.Pattern, access: re.Pattern, address_of) -> int:
    """Accesses that lie between the target of a backward branch and the branch."""
    loops = []
    for at, text in code:
        match = branch.search(text)
        if match and (to := address_of(match)) is not None and to <= at:
            loops.append((to, at))
    return sum(bool(access.search(text)) and any(lo <= at <= hi for lo, hi in loops) for at, text in code)


def _read_nvidia(compiled) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        sass = _tool("cuobjdump", "-sass", file.name)
        usage = _tool("cuobjdump", "-res-usage", file.name)
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;/]+);", sass)]
    local = _in_loops(
        code, re.compile(r"\bBRA\S*\s.*?(0x[0-9a-f]+)"), re.compile(r"\b(LDL|STL)\b"), lambda match: int(match[1], 16)
    )
    text = "\n".join(line for _, line in code)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "local_in_loop": local,
        "wide_loads": len(re.findall(r"\bLDG\S*\.128", text)),
        "wide_stores": len(re.findall(r"\bSTG\S*\.128", text)),
        "narrow_loads": len(re.findall(r"\bLDG(?!\S*\.128)", text)),
        "exps": len(re.findall(r"\bMUFU\.EX2", text)),
    }


def _read_amd(compiled) -> dict[str, int]:
    assembly = compiled.asm["amdgcn"]
    lines = list(enumerate(assembly.splitlines()))
    labels = {match[1]: at for at, line in lines if (match := re.match(r"(\.?\w+):", line))}
    local = _in_loops(
        lines, re.compile(r"s_c?branch\S*\s+(\S+)"), re.compile(r"\bscratch_(load|store)"), lambda match: labels.get(match[1])
    )
    loads = re.findall(r"\b(?:global|buffer)_load_(\w+)", assembly)
    stores = re.findall(r"\b(?:global|buffer)_store_(\w+)", assembly)
    return {
        "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1]),
        "stack": int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", assembly)[1]),
        "local_in_loop": local,
        "wide_loads": loads.count("dwordx4"),
        "wide_stores": stores.count("dwordx4"),
        "narrow_loads": sum(width != "dwordx4" for width in loads),
        "exps": len(re.findall(r"\bv_exp_f32", assembly)),
    }


def measure(case: Case, name: str) -> Row:
    target = TARGETS[name]
    compiled = compile_case(case, target)
    config = case.config
    threads = config["num_warps"] * target.warp_size
    return Row(
        triton=triton.__version__,
        target=name,
        kernel=case.kernel,
        dtype=case.dtype,
        family=case.family,
        classes=case.classes,
        block_n=config.get("BLOCK_N", 1),
        block_v=config.get("BLOCK_V", config.get("BLOCK", 0)),
        warps=config["num_warps"],
        shared=compiled.metadata.shared,
        elements=math.ceil(config.get("BLOCK_N", 1) * config.get("BLOCK_V", 0) / threads),
        capped=bool(case.constants.get("CAPPED")),
        **(_read_amd if target.backend == "hip" else _read_nvidia)(compiled),
    )


def table(rows: list[Row]) -> str:
    heads = ["target", "kernel", "dtype", "EDF", "V", "block", "warps", "regs", "stack", "shared"]
    heads += ["ld.128", "st.128", "ld.narrow", "exp2", "elements"]
    lines = [
        [
            row.target,
            row.kernel,
            row.dtype,
            row.family,
            row.classes,
            f"{row.block_n}x{row.block_v}",
            row.warps,
            row.registers,
            row.stack,
            row.shared,
            row.wide_loads,
            row.wide_stores,
            row.narrow_loads,
            row.exps,
            row.elements,
        ]
        for row in rows
    ]
    widths = [max(len(str(line[i])) for line in [heads, *lines]) for i in range(len(heads))]
    return "\n".join(
        "  ".join(str(cell).rjust(width) for cell, width in zip(line, widths, strict=True)) for line in [heads, *lines]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("unset TRITON_INTERPRET: the interpreter does not compile")
    rows = [measure(case, target) for target in TARGETS for case in CASES]
    rows += [measure(case, "sm_90") for case in VARIANTS]
    print(f"Triton {triton.__version__}; per thread: registers, bytes of stack, accesses, exponentials and elements of a block")
    print(table(rows))
    broken = [(row, found) for row in rows if (found := row.violations())]
    for row, found in broken:
        print(f"VIOLATION {row.target} {row.kernel} {row.dtype} {row.family} V={row.classes}: {'; '.join(found)}")
    print(f"{len(rows)} compilations, {len(broken)} outside the bounds")
    if arguments.json:
        arguments.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
