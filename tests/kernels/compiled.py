"""Compile the Triton kernels for several devices and print their registers and spills as JSON.

The devices need not be present. The argument "oversized" compiles a kernel that must spill, to show
that spills are detected. This is a separate program because a process in which Triton interprets
kernels cannot compile them.
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

from kernels import IGNORE_INDEX, cuda

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {"labels": "*i64", "negative_of": "*i64", "exemplar_of": "*i64"}
SIZES = ("rows", "negatives", "vocab", "stride", "gradient_stride")
ALIGNED = ("stride", "gradient_stride")  # as in a launch; the vocabulary has any length
FIXED = {"IGNORE": IGNORE_INDEX, "STATISTICS": cuda.STATISTICS, "BLOCK": cuda.BLOCK}


def sources() -> dict[str, ASTSource]:
    """Both kernels, the second in every form that a training step may need."""
    found = {
        "statistics" + (" with reach" if reach else ""): source(
            cuda.statistics_kernel, {"REACH": reach}, "fp32"
        )
        for reach in (False, True)
    }
    forms = itertools.product(["fp32", "bf16", "fp16"], [1, 16], [True, False])
    for dtype, splits, detach in forms:
        form = {"SPLITS": splits, "GRADIENT": True, "EXEMPLAR_GRADIENT": True, "DETACH": detach}
        found[f"gradient {dtype} {splits} {detach}"] = source(cuda.gradient_kernel, form, dtype)
    bare = {"SPLITS": 4, "DETACH": True}
    for gradient, exemplar in ((False, False), (True, False)):
        form = bare | {"GRADIENT": gradient, "EXEMPLAR_GRADIENT": exemplar}
        kernel = source(cuda.gradient_kernel, form, "bf16")
        found["gradient bf16 4 " + ("without exemplar's" if gradient else "losses alone")] = kernel
    return found


def oversized() -> dict[str, ASTSource]:
    """A kernel with a block far too large for the registers of its threads."""
    form = {"REACH": False, "BLOCK": 32 * cuda.BLOCK}
    return {"statistics": source(cuda.statistics_kernel, form, "fp32")}


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
    """Registers and spilled bytes that the binary reports; vector loads and stores in its code."""
    code = compiled.asm.get("ptx", "")
    vectors = {
        "vector loads": len(re.findall(r"ld\.global[.\w]*\.v[24]\.", code)),
        "vector stores": len(re.findall(r"st\.global[.\w]*\.v[24]\.", code)),
    }
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        # Spills to memory only: a scalar register spills into a lane of a vector register.
        spilled = r"\.(?:vgpr_spill_count|private_segment_fixed_size):\s*(\d+)"
        registers = r"\.vgpr_count:\s*(\d+)"
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        # Bytes per thread. Spills lie in the stack frame; LOCAL counts memory beside it.
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
                    name: usage(triton.compile(made, target=device, options=cuda.OPTIONS))
                    for name, made in (oversized if "oversized" in sys.argv else sources)().items()
                }
                for target, device in TARGETS.items()
            }
        )
    )
