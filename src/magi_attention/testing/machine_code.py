"""What NVIDIA's machine code says of itself, read from a disassembly (``cuobjdump -sass``)."""

from __future__ import annotations

import re

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\S+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")
_REGISTER = re.compile(r"\bUR(\d+)\b")
_PREDICATE = re.compile(r"!?U?P(?:\d+|T)\b")
# Of those that do not begin with U.
_WRITE_UNIFORM = ("R2UR", "S2UR", "CS2UR", "LDCU", "VOTEU", "REDUX", "CREDUX", "SYNCS", "ELECT")
# Begin with U, and write a predicate or memory.
_WRITE_NONE = ("UISETP", "UFSETP", "UPLOP3", "UR2UP", "UTM", "UTC", "UBLK", "UCC", "UCGA")


def unwritten_uniform_registers(disassembly: str) -> tuple[str, ...]:
    """Uniform registers that an instruction reads and no earlier one of its function, in program order, has written.

    The code of a right compiler has none. Of address and matrix descriptors, which take several registers, those that are certain: both
    of ``desc[URn]``; of ``gdesc[URn]``, which holds the descriptors of both sides of a product, the right side's, and the left side's
    unless it comes from registers.
    """
    written: set[int] = set()
    unwritten: set[int] = set()
    for line in disassembly.splitlines():
        if "Function :" in line:
            written = set()
        found = _INSTRUCTION.search(line)
        if found and "UR" in found[2]:
            operands = [one.strip() for one in found[2].split(",")]
            writes, others = _written(found[1], operands)
            unwritten |= _read(found[1], others) - written
            written |= writes
    return tuple(f"UR{number}" for number in sorted(unwritten))


def _written(opcode: str, operands: list[str]) -> tuple[set[int], list[str]]:
    """The registers that an instruction writes, and its operands without them."""
    base = opcode.split(".")[0]
    if base.startswith(_WRITE_NONE) or not base.startswith(("U", *_WRITE_UNIFORM)):
        return set(), operands
    # Carries and such come first.
    at = next((i for i, one in enumerate(operands) if not _PREDICATE.fullmatch(one)), len(operands))
    if at == len(operands) or not _REGISTER.fullmatch(operands[at]):
        return set(), operands
    first, parts = int(operands[at][2:]), opcode.split(".")
    width = 4 if "128" in parts else 2 if "64" in parts or "WIDE" in parts or base == "CS2UR" else 1
    return set(range(first, first + width)), operands[:at] + operands[at + 1 :]


def _read(opcode: str, operands: list[str]) -> set[int]:
    read: set[int] = set()
    for at, operand in enumerate(operands):
        for found in _REGISTER.finditer(operand):
            number, kind = int(found[1]), operand[: found.start()].rpartition("]")[2]
            if kind.endswith("gdesc["):
                if opcode.startswith("HGMMA"):
                    # Registers of a left side stand between the result's and the descriptors.
                    read |= {number + 2, number + 3} if at > 1 else set(range(number, number + 4))
            elif kind.endswith("desc[") and not kind.endswith("idesc["):
                read |= {number, number + 1}
            else:
                read.add(number)
    return read
