"""Peak memory that forward and backward add on a CPU: ``python benchmarks/memory.py``.

The peak of the process's resident memory during one forward and backward of `flex_flash_attn_func`, less what was resident before,
as a multiple of the bytes of q, k, v, out and the gradients of the four. Of these, out and the gradients of q, k, v are themselves
among what is added. Linux only.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from attention_masks import make_masks
from magi_attention.functional.flex_flash_attn import flex_flash_attn_func

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MIB = 1 << 20


def resident_bytes(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (the peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: this benchmark needs Linux")


def forget_peak() -> None:
    """Let ``VmHWM`` start again from what is resident now (5: see proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def forward_and_backward(tensors: list[torch.Tensor], dout: torch.Tensor, slices: list[torch.Tensor]) -> torch.Tensor:
    """``[tokens, heads, head_dim]``: out; gradients are left in the tensors."""
    out = flex_flash_attn_func(*tensors, *slices)[0]
    out.backward(dout)
    return out


def main() -> None:
    """Measure once and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--mask", default="causal", help="one of benchmarks/attention_masks.py")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    def make(num_tokens: int) -> tuple[list[torch.Tensor], torch.Tensor, list[torch.Tensor]]:
        heads = (args.heads, args.kv_heads, args.kv_heads, args.heads)
        q, k, v, dout = (torch.randn(num_tokens, h, args.head_dim).to(DTYPES[args.dtype]) for h in heads)
        slices = make_masks(num_tokens)[args.mask].mask.to_slices()
        return [x.requires_grad_() for x in (q, k, v)], dout, [torch.from_numpy(x).int() for x in slices]

    # The compiled kernel, its threads and autograd's are there before, as in any process that has worked a while.
    forward_and_backward(*make(256))
    tensors, dout, slices = make(args.tokens)
    forget_peak()
    before, start = resident_bytes("VmRSS"), time.perf_counter()
    out = forward_and_backward(tensors, dout, slices)
    seconds = time.perf_counter() - start
    added = resident_bytes("VmHWM") - before
    own = 2 * sum(x.nbytes for x in (*tensors, out))
    print(
        f"{args.mask}, {args.tokens:,} tokens, {args.heads} q and {args.kv_heads} kv heads, head_dim {args.head_dim}, {args.dtype}, "
        f"{args.threads} threads: {seconds:.1f} s; adds {added / MIB:.0f} MiB, "
        f"{added / own:.2f} times the {own / MIB:.0f} MiB of q, k, v, out and their gradients"
    )


if __name__ == "__main__":
    main()
