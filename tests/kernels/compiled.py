"""Compiles the row kernels for devices that need not be there; prints registers and spills.

With the argument "oversized" it compiles one that has to spill, which shows that spills are seen.

A program of its own: a process in which Triton interprets cannot compile.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import rows
from kernels.reference import IGNORE_INDEX

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {"labels": "*i64", "negative_of": "*i64", "exemplar_of": "*i64"}
SIZES = ("rows", "negatives", "vocab", "stride", "gradient_stride")
ALIGNED = ("stride", "gradient_stride")  # as a launch finds them; the vocabulary is of any length
FIXED = {"IGNORE": IGNORE_INDEX, "STATISTICS": rows.STATISTICS, "BLOCK": rows.BLOCK}


def sources() -> dict[str, ASTSource]:
    """Both kernels, the second in all the forms that a training step may ask for."""
    found = {
        "statistics" + (" with reach" if reach else ""): source(
            rows.statistics_kernel, {"REACH": reach}, "fp32"
        )
        for reach in (False, True)
    }
    forms = itertools.product(["fp32", "bf16", "fp16"], [1, 16], [True, False])
    for dtype, splits, detach in forms:
        form = {"SPLITS": splits, "GRADIENT": True, "EXEMPLAR_GRADIENT": True, "DETACH": detach}
        found[f"gradient {dtype} {splits} {detach}"] = source(rows.gradient_kernel, form, dtype)
    bare = {"SPLITS": 4, "DETACH": True}
    for gradient, exemplar in ((False, False), (True, False)):
        form = bare | {"GRADIENT": gradient, "EXEMPLAR_GRADIENT": exemplar}
        kernel = source(rows.gradient_kernel, form, "bf16")
        found["gradient bf16 4 " + ("without exemplar's" if gradient else "losses alone")] = kernel
    return found


def oversized() -> dict[str, ASTSource]:
    """A block far too large for the registers of its threads."""
    form = {"REACH": False, "BLOCK": 32 * rows.BLOCK}
    return {"statistics": source(rows.statistics_kernel, form, "fp32")}


def source(kernel: triton.JITFunction, form: dict[str, object], dtype: str) -> ASTSource:
    constants = FIXED | form
    types = {
        name: "constexpr"
        if name in constants
        else POINTERS.get(name, "i32" if name in SIZES else "*fp32")
        for name in kernel.arg_names
    }
    if "gradient" in types:
        types["gradient"] = f"*{dtype}"
    aligned = {name for name, kind in types.items() if kind.startswith("*")} | set(ALIGNED)
    attributes = {
        (number,): [["tt.divisibility", 16]]
        for number, name in enumerate(kernel.arg_names)
        if name in aligned and name in types
    }
    return ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)


def usage(compiled: triton.compiler.CompiledKernel) -> dict[str, int]:
    """What the binary itself says it needs, and how its memory is read and written."""
    code = compiled.asm.get("ptx", "")
    vectors = {
        "vector loads": len(re.findall(r"ld\.global[.\w]*\.v[24]\.", code)),
        "vector stores": len(re.findall(r"st\.global[.\w]*\.v[24]\.", code)),
    }
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        # To memory; a scalar register that is spilled goes into a lane of a vector register.
        spilled = r"\.(?:vgpr_spill_count|private_segment_fixed_size):\s*(\d+)"
        registers = r"\.vgpr_count:\s*(\d+)"
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        # Bytes a thread: what a function spills lies in its stack frame, LOCAL is beside it.
        spilled, registers = r"(?:STACK|LOCAL):(\d+)", r"REG:(\d+)"
    found = re.findall(spilled, text)
    assert len(found) == 2, text
    return vectors | {
        "registers": int(re.search(registers, text)[1]),
        "spilled": sum(map(int, found)),
    }


if __name__ == "__main__":
    print(
        json.dumps(
            {
                target: {
                    name: usage(triton.compile(made, target=device, options=rows.OPTIONS))
                    for name, made in (oversized if "oversized" in sys.argv else sources)().items()
                }
                for target, device in TARGETS.items()
            }
        )
    )
