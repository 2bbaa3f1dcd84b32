"""In which order a program of the backward walks the queries that attend its tile of keys.

Queries, and the sums of their gradients, are too many for the L2 cache, but not those of one head, nor those of a few blocks. So programs
that run at the same time should be at the same head, or at the same block, whatever the length of their tiles.

By heads: head by head, from the first block to the last. Where tiles are of one length, as those of full masks and of windows, programs
pass the heads together.

In step, for causal masks (a row a tile of keys, a column a block of queries):

    ##########   <- <- <- <-     the longest tiles begin together at the last block, all heads of a block in turn, and pass every block
     #########   <- <- <- <-     at the same time;
      ########   <- <- <-
          ####   -> ->           one that starts when a shorter one of those is done begins at the diagonal, and meets at each block the
           ###   ->              others that start late

A block takes a few per cent longer there, so it is for masks whose tiles are so unlike that many kv heads are computed at once: as many as
make the longest tile take no longer than a processor's share of them.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from magi_attention.kernels.hopper.segments import SegmentList

# Heads at once from which walking in step was faster, of 2.0 (slower), 2.8 and more (faster).
_FROM_HEADS = 2.5


def choose_walk(work: SegmentList, num_kv_heads: int, group: int, num_programs: int) -> tuple[int, bool]:
    """How many kv heads are computed at once, and whether better in step, where ``num_programs`` run together."""
    heads = num_programs * work.longest / work.num_tiles
    at_once = max(1, min(num_kv_heads, round(heads)))
    rounds = -(-num_kv_heads // at_once)
    return -(-num_kv_heads // rounds), work.is_causal and group > 1 and heads >= _FROM_HEADS


@gluon.jit
def first_block(begin):
    """Where blocks of queries begin: their statistics are copied from multiples of 16 bytes alone. What is too much is masked."""
    return begin // 4 * 4


@gluon.jit
def place_blocks(p_segment, is_late, BLOCK: gl.constexpr, IN_STEP: gl.constexpr):
    """``(begin, end, origin, sign)`` of a segment's queries: the block for ``x``, from ``begin`` by ``BLOCK``, is ``origin + sign * x``."""
    begin = first_block(gl.load(p_segment))
    end = gl.load(p_segment + 1)
    if IN_STEP:
        last = begin + (gl.cdiv(end - begin, BLOCK) - 1) * BLOCK
        return begin, end, gl.where(is_late, 0, begin + last), gl.where(is_late, 1, -1)
    else:
        return begin, end, 0, 1
