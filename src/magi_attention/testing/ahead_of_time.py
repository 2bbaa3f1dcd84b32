"""Kernels through the compiler alone, without a GPU: what each costs in registers, spills and shared memory, and whether that may be.

Not under ``TRITON_INTERPRET=1``, which leaves nothing to compile.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from magi_attention.kernels.ahead_of_time import AotVariant
from magi_attention.testing.machine_code import unwritten_uniform_registers

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")

# Backends whose module ``variants`` offers `aot_variants`.
BACKENDS = ("triton", "hopper")

# Of one block of threads. CUDA programming guide, "Technical Specifications per Compute Capability"; CDNA 3 ISA, "Local Data Share".
SHARED_LIMIT = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}

# What a product on the matrix units is called in machine code.
MATRIX_INSTRUCTION = {"sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
_MATRIX_INSTRUCTION_ELSEWHERE = "HMMA"


@dataclass(frozen=True)
class Code:
    """What the compiler made of a kernel: numbers a thread, and of shared memory a block; ``spilled`` and ``shared`` in bytes.

    ``partial_waits``: how often it waits for some asynchronous products but not all, on sm_90.
    ``swizzles``: of the operands of products in shared memory, in bytes, each width once.
    ``continued_sums``: how many products of tiles go on from a sum, rather than begin at 0.
    ``unwritten``: uniform registers that are read though nothing has written them, which is the compiler's error.
    """

    registers: int
    spilled: int
    shared: int
    matrix_instructions: int
    partial_waits: int = 0
    swizzles: tuple[int, ...] = ()
    continued_sums: int = 0
    unwritten: tuple[str, ...] = ()


def variants_of(backend: str, arch: str) -> list[AotVariant]:
    """The variants that a backend offers for an architecture."""
    variants: list[AotVariant] = importlib.import_module(f"magi_attention.kernels.{backend}.variants").aot_variants(
        arch
    )
    return variants


def matrix_instruction(arch: str) -> str:
    """Of half-precision products on ``arch``."""
    return MATRIX_INSTRUCTION.get(arch, _MATRIX_INSTRUCTION_ELSEWHERE)


def compile_variant(variant: AotVariant, arch: str) -> Code:
    """Compile for ``arch``. Raises what the compiler raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source_class = ASTSource
    if variant.is_gluon:
        from triton.experimental.gluon._runtime import GluonASTSource

        source_class = GluonASTSource
    names = list(variant.signature)
    source = source_class(
        fn=variant.function,
        signature=dict(variant.signature),
        constexprs=dict(variant.constexprs),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned},
    )
    target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)
    compiled = triton.compile(source, target=target, options=dict(variant.options))
    return _read_amd(compiled, arch) if arch.startswith("gfx") else _read_nvidia(compiled, arch)


def complaints(variant: AotVariant, arch: str, code: Code) -> list[str]:
    """What is wrong with it, in words: nothing, if all is well."""
    found = []
    if code.spilled > variant.most_spilled:
        found.append(f"spills {code.spilled} bytes a thread, where {variant.most_spilled} are allowed")
    if code.shared > SHARED_LIMIT[arch]:
        found.append(f"takes {code.shared} bytes of shared memory, where {arch} has {SHARED_LIMIT[arch]}")
    if variant.uses_matrix_units and not code.matrix_instructions:
        found.append(f"has no {matrix_instruction(arch)}: its products do not run on the matrix units")
    if variant.keeps_products_in_flight and not code.partial_waits:
        found.append("waits for every product at once: nothing runs under them")
    if len(code.swizzles) > 1:
        widths = ", ".join(map(str, code.swizzles))
        found.append(f"has operands in shared memory with swizzles of {widths} bytes, whose descriptors ptxas confuses")
    if not variant.uses_matrix_units and code.continued_sums:
        found.append("sums term by term over tiles: its rounding error grows with the number of terms")
    if code.unwritten:
        found.append(f"reads uniform registers that nothing has written: {', '.join(code.unwritten)}")
    return found


def report(variant: AotVariant, arch: str) -> dict[str, Any]:
    """One row of the table: the variant, its code, and what is wrong with it."""
    start = time.perf_counter()
    row: dict[str, Any] = {
        "kernel": variant.kernel,
        "arch": arch,
        "head_dims": "/".join(map(str, variant.head_dims)),
        "dtype": variant.dtype,
        "case": variant.case,
        "options": dict(variant.options),
    }
    try:
        code = compile_variant(variant, arch)
    except Exception as error:  # a row that says so; whoever reads the table sees what else compiles
        return {**row, "complaints": [f"does not compile: {type(error).__name__}: {str(error)[:300]}"]}
    seconds = round(time.perf_counter() - start, 1)
    return {**row, **vars(code), "seconds": seconds, "complaints": complaints(variant, arch, code)}


def _read_nvidia(compiled: Any, arch: str) -> Code:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, machine_code = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    return Code(
        registers=_number(r"\bREG:(\d+)", usage),
        spilled=_number(r"\bSTACK:(\d+)", usage),  # these kernels keep nothing else on the stack
        shared=compiled.metadata.shared,
        matrix_instructions=len(re.findall(rf"\b{matrix_instruction(arch)}\b", machine_code)),
        partial_waits=len(re.findall(r"DEPBAR\.LE gsb0, 0x[1-9]", machine_code)),
        swizzles=_swizzles(compiled.asm["ttgir"]),
        continued_sums=_continued_sums(compiled.asm["ttgir"]),
        unwritten=unwritten_uniform_registers(machine_code),
    )


def _read_amd(compiled: Any, arch: str) -> Code:
    text = compiled.asm["amdgcn"]
    return Code(
        registers=_number(r"\.vgpr_count:\s+(\d+)", text),
        spilled=4 * _number(r"\.vgpr_spill_count:\s+(\d+)", text),
        shared=compiled.metadata.shared,
        matrix_instructions=len(re.findall(rf"\b{matrix_instruction(arch)}", text)),
        continued_sums=_continued_sums(compiled.asm["ttgir"]),
    )


def _swizzles(ttgir: str) -> tuple[int, ...]:
    """Of operands that the matrix units read from shared memory (sm_90 and later), by Triton's encodings; 0 is of rows of numbers."""
    widths = {int(width) for width in re.findall(r"nvmma_shared<\{swizzlingByteWidth = (\d+)", ttgir)}
    return tuple(sorted(widths - {0}))


def _continued_sums(ttgir: str) -> int:
    zeros = set(re.findall(r"(%\w+) = arith\.constant dense<0\.0+e\+00>", ttgir))
    return sum(begin not in zeros for begin in re.findall(r"tt\.dot %\w+, %\w+, (%\w+)", ttgir))


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"the tool's output has no {pattern}: {text[:500]}"
    return int(found[1])
