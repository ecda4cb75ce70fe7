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
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

import fused_dm_kernels as kernels
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_dm import _launch, _triton
from fused_dm._launch import H100, MI300X, Launch, Sizes

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
# Loads of a block of logits in the kernel's text, and exponentials an element costs over all passes.
PASSES = {
    "margin": 1,
    "forward": 1,
    "split": 1,
    "batch": 1,
    "gradient": 1,
    "multiply": 1,
    "fused": 2,
    "totals": 0,
    "divisor": 0,
    "received": 0,
}
# Exponentials for a row that a thread holds: rescaling the sum, p and q, the weight relative to the batch, the coefficient.
EXP_PER_ROW = 6
# And for a part of a row that a thread keeps: rescaling it at a block, and at the end.
EXP_PER_LANE = 2
# And for rows that begin anywhere: passes over the elements of their edges, and for a row rescaling its sum, that of the edges,
# and what is in registers.
EXP_OF_EDGES = {"margin": (1, 2), "forward": (1, 2), "split": (1, 2), "batch": (1, 2), "gradient": (1, 0), "fused": (2, 3)}
# And those of the EDF: calls of exp, expm1_negative, softplus and log_sum in its log_weight and its f; a log_sum and a softplus
# of the same difference share theirs.
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
    # (N, V, d1, ...) in memory: the positions are adjacent, and so many; 0 for rows whose classes are.
    positions: int = 0
    rows: int = 8192
    # Parts of a row whose statistics the launch combines; 0 where it reads the logits.
    parts: int = 0
    # The logits lie otherwise than their gradient does.
    apart: bool = False
    # Arguments that this launch makes constants: None, 1, a flag. RUN_TIME makes one an argument that is None elsewhere.
    constants: dict[str, object] = dataclasses.field(default_factory=dict)

    @property
    def layout(self) -> _triton._Layout:
        stride = (self.classes, 1)
        shape: tuple[int, ...] = (self.rows, self.classes)
        if self.positions:
            stride = (self.classes * self.positions, self.positions, 1)
            shape = (self.rows // self.positions, self.classes, self.positions)
        other = (stride[0] + 1, *stride[1:]) if self.apart else stride
        return _triton._Layout(shape, ITEMSIZE[self.dtype], logits=other, dlogits=stride)

    @property
    def sizes(self) -> Sizes:
        return self.layout.sizes

    def launch(self, target: GPUTarget) -> Launch:
        """What the package chooses on an H100, on another GPU of its size, or on an MI300X for AMD."""
        limits = target.backend == "cuda" and target.arch < _launch.ARCH_UNLIMITED
        device = MI300X if target.backend == "hip" else H100._replace(limits=limits, fewer=0 if target.arch == 90 else 1)
        if self.kernel == "totals":
            return Launch("tiles", 1, 1024, 8, 1024)
        if self.kernel == "received":
            return Launch("tiles", 1, _launch.RECEIVED, 8, _launch.RECEIVED)
        if self.kernel == "divisor":
            chosen = _launch.divisor(self.rows)
            return Launch("tiles", 1, chosen["BLOCK"], chosen["num_warps"], chosen["BLOCK"])
        if self.parts:
            return _launch.combining(self.sizes, self.parts)
        if self.kernel in ("gradient", "multiply"):
            return _launch.gradient(self.sizes, device, whole_rows=self.kernel == "multiply")
        choose = {"fused": _launch.fused, "margin": _launch.margin}.get(self.kernel, _launch.forward)
        chosen = choose(self.sizes, device, capped="CAPPED" in self.constants)
        way = {"split": "split", "batch": "alone"}.get(self.kernel, "tiles")
        if chosen.way != way:
            raise ValueError(f"{self}: expected a shape that is launched by {way}, got {chosen}")
        return chosen

    @property
    def label(self) -> str:
        """The shape in the table."""
        name = f"{self.classes}"
        if self.positions:
            name += f" x {self.positions}"
        if self.apart:
            name += " apart"
        return f"{name} / {self.parts}" if self.parts else name


@dataclasses.dataclass
class Row:
    """What one compilation gave."""

    triton: str
    target: str
    kernel: str
    dtype: str
    family: str
    classes: str
    aligned: bool
    one_block: bool
    kept: int  # blocks in registers of a fused kernel that has several
    layout: str
    combines: bool
    capped: bool
    lanes: int
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

    def violations(self) -> list[str]:
        found = []
        # The loop of the batch kernel is over a few tiles, and under Triton 3.6 a word of stack is stored and loaded in each.
        if self.local_in_loop > (2 if self.kernel == "batch" else 0):
            found.append(f"{self.local_in_loop} accesses of local memory inside a loop")
        keeps = self.kernel == "fused" and not self.one_block
        if self.stack > MAX_STACK:
            found.append(f"{self.stack} bytes of stack")
        threads = self.warps * TARGETS[self.target].warp_size
        if threads > _launch.MOST_THREADS:
            found.append(f"{threads} threads, expected at most {_launch.MOST_THREADS}")
        if self.kernel in ("totals", "divisor", "received") or self.dtype == "fp64":
            return found
        long = self.classes.isdigit() and int(self.classes) > 65536 and self.aligned and not self.capped
        walks = self.kernel == "fused" and long and self.target.startswith("sm_")
        if walks and 2 * self.registers * self.warps * 32 <= 65536:
            # Twice as many rows would be in flight, more than L2 holds.
            found.append(f"{self.registers} registers leave room for two programs on a multiprocessor")
        vector = 16 // ITEMSIZE[self.dtype]
        wide = max(1, self.elements // vector)
        # A row of one block stays in registers: it is read once, exponentiated once and written once.
        passes = 1 if self.kernel == "fused" and self.one_block else PASSES[self.kernel]
        if self.aligned and not self.combines:
            if self.wide_loads < passes * wide:
                found.append(f"{self.wide_loads} loads of 128 bits, expected {passes * wide}")
            stores = {"gradient": 1, "multiply": 1, "fused": self.kept + 1 if keeps else 1}.get(self.kernel, 0)
            if self.wide_stores < stores * wide:
                found.append(f"{self.wide_stores} stores of 128 bits, expected {stores * wide}")
        # Rows that a thread has a part of.
        rows = max(1, min(self.block_n, self.elements // vector if self.aligned else self.elements))
        if self.layout == "positions":
            rows = max(rows, vector)
        # A softcap takes the exponentials of a tanh; the fused kernel does it once more, for the slope of its last block.
        per_element = passes + 2 * (passes + (self.kernel == "fused" and self.one_block)) if self.capped else passes
        per_row = EXP_PER_ROW + EXP_OF_FAMILY[self.family]
        if self.lanes > 1:
            # The gradient of the label's block is another branch than that of the others: of the two one is run.
            per_element += self.kernel in ("gradient", "fused")
            per_row += EXP_PER_LANE
        # The kernel's text has every block that stays in registers, and one for the others.
        texts = self.kept + 1 if keeps else 1
        per_element *= texts
        per_row += texts - 1
        passes_of_edges, more_of_row = EXP_OF_EDGES.get(self.kernel, (0, 0)) if self.layout == "shifted" else (0, 0)
        edges = passes_of_edges * math.ceil(self.block_n * 2 * vector / threads)
        per_row += more_of_row
        # For AMD the loops come in up to three copies, peeled or unrolled.
        copies = 3 if self.target.startswith("gfx") else 1
        allowed = copies * (per_element * self.elements + per_row * rows + edges * (per_element // passes))
        if self.exps > allowed:
            found.append(f"{self.exps} exponentials for {self.elements} elements, expected at most {allowed}")
        return found


# 8 x 21 x 256 x 256, and positions that no vector divides.
IMAGE = {"positions": 65536, "rows": 8 * 65536}
ODD_IMAGE = {"positions": 441, "rows": 64 * 441}
RUN_TIME = object()
CAPPED: dict[str, object] = {"transform_ptr": RUN_TIME, "CAPPED": True}
CASES = [
    *(Case(kernel, "bf16", classes) for kernel in ("forward", "gradient") for classes in (16, 256, 1000, 128256, 50257)),
    *(Case("fused", "bf16", classes) for classes in (16, 256, 1000, 8192, 16384, 32000, 128256, 50257)),
    *(Case(kernel, "fp32", classes) for kernel in ("forward", "gradient") for classes in (1000, 128256)),
    *(Case("fused", "fp32", classes) for classes in (1000, 8192, 32000)),
    *(Case(kernel, "bf16", 128256) for kernel in ("margin", "multiply")),
    *(Case("split", dtype, 10**7, rows=16) for dtype in ("bf16", "fp32")),
    Case("batch", "bf16", 10**7, rows=16, parts=66),
    *(Case("batch", dtype, 100, rows=32) for dtype in ("bf16", "fp32")),
    Case("batch", "bf16", 104, rows=128),
    *(Case(kernel, "bf16", classes) for kernel in ("forward", "gradient", "fused") for classes in (10, 100, 1001, 3001)),
    *(Case(kernel, "fp32", classes) for kernel in ("forward", "gradient", "fused") for classes in (1001, 50257)),
    *(Case(kernel, "bf16", classes, apart=True) for kernel in ("gradient", "fused") for classes in (1001, 50257)),
    *(Case(kernel, "bf16", 21, **IMAGE) for kernel in ("forward", "gradient", "fused")),
    *(Case(kernel, "fp32", 1000, **IMAGE) for kernel in ("forward", "gradient", "fused")),
    *(Case(kernel, "bf16", 21, **ODD_IMAGE) for kernel in ("forward", "gradient", "fused")),
    *(Case(kernel, "bf16", 32000, constants=CAPPED) for kernel in ("forward", "gradient", "fused")),
    Case("totals", "fp32", 0),
    Case("divisor", "fp32", 0),
    Case("received", "fp32", 0),
]
ONES = dict.fromkeys(("V", "dloss_stride", "ignore_index", "parts"), 1)
# Every family, dtype and option compiles; one target shows it.
VARIANTS = [
    *(Case(kernel, "bf16", 128256, family, weighted=True) for kernel in ("forward", "fused") for family in kernels.FAMILIES),
    *(Case("batch", "bf16", 100, family, weighted=True, rows=32) for family in ("dm", "cce")),
    *(Case(kernel, dtype, 128256) for kernel in ("forward", "gradient", "fused") for dtype in ("fp16", "fp64")),
    *(Case("batch", dtype, 100, rows=32) for dtype in ("fp16", "fp64")),
    *(Case(kernel, "fp64", classes) for kernel in ("forward", "gradient", "fused") for classes in (40, 64, 100, 101, 200)),
    Case("batch", "fp64", 10**7, rows=16, parts=66),
    *(Case(kernel, dtype, 50257) for kernel in ("margin", "multiply") for dtype in ("bf16", "fp64")),
    *(Case(kernel, "fp64", classes) for kernel in ("forward", "gradient", "fused") for classes in (1001, 50257)),
    *(Case("fused", "bf16", classes) for classes in (5001, 128257)),
    *(Case("fused", "bf16", 50257, family, weighted=True) for family in ("js", "agce")),
    Case("split", "bf16", 10**7 + 1, rows=16),
    *(Case(kernel, "bf16", 50257, constants=CAPPED) for kernel in ("forward", "gradient", "fused")),
    Case("margin", "fp32", 10**7, rows=1, parts=1056),
    *(Case(kernel, "fp64", 21, **IMAGE) for kernel in ("forward", "gradient", "fused")),
    *(Case(kernel, "bf16", 21, **IMAGE) for kernel in ("margin", "multiply")),
    Case("split", "bf16", 10**7, rows=16, positions=16),
    *(Case(kernel, "bf16", 8, constants=ONES) for kernel in ("margin", "forward", "gradient", "multiply", "fused")),
    Case("gradient", "bf16", 128256, constants={"SKIP_ONE": True}),
    Case("gradient", "bf16", 128256, constants={"totals_ptr": None}),
    Case("gradient", "bf16", 21, constants={"totals_ptr": None}, **IMAGE),
    Case("gradient", "bf16", 10**7, rows=16, constants={"dloss_ptr": None}),
    *(Case(kernel, "bf16", 128256, constants=CAPPED) for kernel in ("margin", "forward", "gradient", "fused")),
    *(Case("fused", dtype, classes, constants=CAPPED) for dtype in ("bf16", "fp32") for classes in (1000, 8192, 32000)),
    *(Case(kernel, "bf16", 21, constants=CAPPED, **IMAGE) for kernel in ("forward", "gradient", "fused")),
    Case("batch", "bf16", 100, rows=32, constants=CAPPED),
    Case("split", "bf16", 10**7, rows=16, constants=CAPPED),
    Case("totals", "fp32", 0, constants={"P": 1}),
    Case("received", "fp64", 0),
    *(Case("divisor", dtype, 0, weighted=True) for dtype in ("fp32", "fp64")),
    *(Case("divisor", "fp32", 0, weighted=True, constants={name: None}) for name in ("weight_ptr", "sample_weight_ptr")),
    *(Case("totals", "fp32", 0, family, constants={"normalizer_ptr": RUN_TIME}) for family in ("dm", "cce")),
]


def compile_case(case: Case, target: GPUTarget):
    """The compiled kernel, specialised as a launch on aligned tensors would be."""
    launch = case.launch(target)
    blocks = case.kernel == "fused" and launch.span > launch.block_v
    kernel = kernels.fused_blocks_kernel if blocks else getattr(kernels, f"{case.kernel}_kernel")
    log_weight, loss = kernels.FAMILIES[case.family]
    compute = "fp64" if case.dtype == "fp64" else "fp32"
    constants = {
        "LOG_WEIGHT": log_weight,
        "LOSS": loss,
        "UNIT": case.layout.unit,
        "LAYOUT": case.layout.layout,
        "SKIP_ONE": False,
        "transform_ptr": None,
        "CAPPED": False,
        "STREAM": launch.stream,
        "ONE_BLOCK": True,
        "PARTS": triton.next_power_of_2(case.parts or 1),
        "BLOCK_N": launch.block_n,
        "BLOCK_V": launch.block_v,
        "LANES": launch.lanes,
        "STAGES": launch.stages,
        "KEPT": launch.kept,
        "TILES": launch.repeat,
        "BLOCK": launch.block_v,
        "DTYPE": tl.float64 if case.dtype == "fp64" else tl.float32,
    }
    if not case.weighted:
        constants |= {"weight_ptr": None, "sample_weight_ptr": None}
    if case.kernel in ("totals", "batch"):
        constants["normalizer_ptr"] = None
    if not case.parts:
        constants |= {"parts_ptr": None, "parts": 1} if case.kernel != "split" else {}
    constants.update(case.constants)
    types = {
        "logits_ptr": f"*{case.dtype}",
        "dlogits_ptr": f"*{case.dtype}",
        "target_ptr": "*i64",
        "params_ptr": "*fp64",
        "transform_ptr": "*fp64",
        "totals_ptr": "*fp64",
        "normalizer_ptr": "*fp64",
        "divisor_ptr": "*fp64",
        "correct_ptr": "*u8",
        **dict.fromkeys(
            (
                "weight_ptr",
                "sample_weight_ptr",
                "example_weight_ptr",
                "target_prob_ptr",
                "rows_ptr",
                "parts_ptr",
                "partials_ptr",
                "margin_ptr",
                "dloss_ptr",
                "loss_ptr",
            ),
            f"*{compute}",
        ),
    }
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names and value is not RUN_TIME}
    signature: dict[str, object] = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    constexprs: dict[tuple[int, ...], object] = {(names.index(name),): value for name, value in constants.items()}
    # The stride of the adjacent dimension is 1, which a launch makes a constant.
    for name in ("logits_strides", "dlogits_strides"):
        if name in names:
            adjacent = 1 if case.positions else 2
            signature[name] = tuple("constexpr" if i == adjacent else "i32" for i in range(3))
            constexprs[names.index(name), adjacent] = 1
    # A stride that is a multiple of 16 units is left to chance: what holds without it holds with it.
    divisible = [name for name in names if name in types and name not in constants] + (["SPAN"] if "SPAN" in names else [])
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(kernel, signature, constexprs=constexprs, attrs=attributes)
    options: dict[str, object] = {"num_warps": launch.num_warps, "enable_fp_fusion": True}
    if launch.registers and target.arch < _launch.ARCH_UNLIMITED:
        options["maxnreg"] = launch.registers
    return triton.compile(source, target=target, options=options)


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
    launch = case.launch(target)
    threads = launch.num_warps * target.warp_size
    columns = triton.next_power_of_2(case.parts) if case.parts else launch.block_v
    return Row(
        triton=triton.__version__,
        target=name,
        kernel=case.kernel,
        dtype=case.dtype,
        family=case.family,
        classes=case.label,
        aligned=case.layout.unit > 1,
        one_block=launch.span == launch.block_v,
        kept=launch.kept,
        layout=case.layout.layout,
        combines=bool(case.parts),
        capped="CAPPED" in case.constants,
        lanes=launch.lanes,
        block_n=launch.block_n,
        block_v=columns,
        warps=launch.num_warps,
        shared=compiled.metadata.shared,
        elements=math.ceil(launch.block_n * columns / threads),
        **(_read_amd if target.backend == "hip" else _read_nvidia)(compiled),
    )


PAIRS = [(case, target) for target in TARGETS for case in CASES] + [(case, "sm_90") for case in VARIANTS]


def _measure_number(number: int) -> Row:
    return measure(*PAIRS[number])


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
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--target", default="", help="targets whose name contains this")
    parser.add_argument(
        "--main", action="store_true", help="leave out the variants of dtypes and options, and families but for forward"
    )
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("unset TRITON_INTERPRET: the interpreter does not compile")
    wanted = [
        number
        for number, (case, target) in enumerate(PAIRS)
        if arguments.only in case.kernel
        and arguments.target in target
        and not (arguments.main and case in VARIANTS and not (case.kernel == "forward" and case.weighted))
    ]
    with ProcessPoolExecutor(arguments.processes) as pool:
        rows = list(pool.map(_measure_number, wanted))
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
