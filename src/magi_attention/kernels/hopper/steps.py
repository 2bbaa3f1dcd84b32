"""Pieces that the kernels share: which item of work comes next, and its segments."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def pick_item(start, num_items):
    """The item of a program's round that begins at ``start``: every other round runs backwards.

    Items come by falling work, so that going to and fro evens out what programs get.
    """
    programs = gl.num_programs(0)
    base = start - gl.program_id(0)
    backwards = ((base // programs) % 2 == 1) & (base + programs <= num_items)
    return gl.where(backwards, base + programs - 1 - gl.program_id(0), start)


@gluon.jit
def load_segment(p_segments, at):
    """``(begin, end, inner_begin, inner_end, lo, hi, other_begin, other_end)`` of a `SegmentList`."""
    p = p_segments + at * 8
    return (
        gl.load(p), gl.load(p + 1), gl.load(p + 2), gl.load(p + 3),
        gl.load(p + 4), gl.load(p + 5), gl.load(p + 6), gl.load(p + 7),
    )  # fmt: skip
