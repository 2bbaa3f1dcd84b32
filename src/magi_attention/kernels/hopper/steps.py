"""Pieces that the kernels share: which item of work comes next, and its segments."""

from __future__ import annotations

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin


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
def locate(item, num_tiles, num_heads, at_once):
    """The rank of an item's tile, and its head. Items come in groups of ``at_once`` heads, whose inputs stay in the L2 cache."""
    group = item // (num_tiles * at_once)
    rest = item % (num_tiles * at_once)
    first = group * at_once
    width = gl.minimum(at_once, num_heads - first)
    return rest // width, first + rest % width


@gluon.jit
def load_segment(p_segments, at):
    """``(begin, end, inner_begin, inner_end, lo, hi, other_begin, other_end)`` of a `SegmentList`."""
    p = p_segments + at * 8
    return (
        gl.load(p), gl.load(p + 1), gl.load(p + 2), gl.load(p + 3),
        gl.load(p + 4), gl.load(p + 5), gl.load(p + 6), gl.load(p + 7),
    )  # fmt: skip


@gluon.jit
def mask_scores(s, start, row, segment, BLOCK: gl.constexpr, layout: gl.constexpr):
    """Scores ``[rows, columns]`` of a block whose columns begin at ``start``, -inf where the segment has no cell."""
    first = gl.maximum(row + segment[4], segment[0]) - start
    last = gl.minimum(row + segment[5], segment[1] - 1) - start
    last = gl.where((row >= segment[6]) & (row < segment[7]), last, -1)
    column = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, layout))
    cells = (column[None, :] >= first[:, None]) & (column[None, :] <= last[:, None])
    return gl.where(cells, s, float("-inf"))


@builtin
def reduce_add(tensor_desc, coord, src, _semantic=None):
    """Add a tile of shared memory to global memory by the copy engine; a store of `tma`, that `tma.store_wait` waits for.

    Gluon of Triton 3.6 has no public name for it.
    """
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, coord, src.handle)
