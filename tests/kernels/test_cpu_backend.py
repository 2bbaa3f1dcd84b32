"""What is the C++ kernel's own: threads, strides and block borders that its packing must get right, low-precision conversions, NaN.

Shapes: num_q, num_k tokens; hq, hk heads; d, dv head dims. How the kernel is built: ``test_cpu_build.py``.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from magi_attention.kernels import cpu, reference
from magi_attention.kernels.interface import AttnSettings, KernelMask, Partial
from magi_attention.mask.bands import shift, split_k
from magi_attention.testing.kernel_check import (
    KernelCase,
    KernelInputs,
    check_kernel,
    make_inputs,
    row_statistics,
    run_kernel,
    solve,
)
from magi_attention.testing.mask_families import CAUSAL, FULL, MASK_FAMILIES, Slices
from magi_attention.testing.oracle import AttnResult, assert_results_as_exact, attention_oracle, plain_result

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEAD_DIMS = [(1, 1), (8, 8), (40, 40), (80, 80), (128, 128), (192, 128)]


@pytest.fixture(autouse=True)
def _library_is_there() -> Iterator[None]:
    """Without it the tiled kernel would be what is tested. Threads are put back."""
    assert cpu._library() is not None
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def _documents(num_documents: int, length: int) -> KernelMask:
    """Causal documents, all of one length."""
    num_tokens = num_documents * length
    rows = tuple((a, a + length, a, a + length, CAUSAL) for a in range(0, num_tokens, length))
    return Slices(rows, num_tokens, num_tokens).kernel_mask()


def assert_same_bits(first: AttnResult, second: AttnResult, what: str) -> None:
    for name, x in vars(first).items():
        assert x is None or torch.equal(x, getattr(second, name)), f"{name} differs {what}"


@pytest.mark.parametrize("softcap", [0.0, 20.0])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("family", ["full", "varlen_causal", "window", "shared_prefix", "empty_rows", "random_cross"])
def test_same_bits_for_any_number_of_threads(family: str, dtype: torch.dtype, softcap: float) -> None:
    """700 tokens: three blocks of keys, so that dq is a sum over partitions."""
    case = KernelCase(family, dtype, 700, 6, 2, head_dim=40, head_dim_v=24, softcap=softcap)
    inputs, results = make_inputs(case), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(run_kernel(cpu, inputs, case.slices.kernel_mask(), case.settings))
    for other in results[1:]:
        assert_same_bits(results[0], other, "from one number of threads to another")


SHORT_OF_THREADS = """
import resource, torch
from magi_attention.kernels import cpu
from magi_attention.testing.kernel_check import KernelCase, make_inputs, run_kernel
case = KernelCase("causal", num_tokens=3000, head_dim=8)
inputs, mask = make_inputs(case), case.slices.kernel_mask()
torch.set_num_threads(1)
expected = run_kernel(cpu, inputs, mask, case.settings)
with open("/proc/self/statm") as pages:
    used = int(pages.read().split()[0]) * resource.getpagesize()
cpu.torch.get_num_threads = lambda: 100
resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20),) * 2)
actual = run_kernel(cpu, inputs, mask, case.settings)
assert all(torch.equal(x, getattr(actual, name)) for name, x in vars(expected).items() if x is not None)
"""


@pytest.mark.parametrize(("num_documents", "num_heads_kv"), [(40, 1), (32, 3)])
def test_same_bits_of_documents_of_several_blocks(num_documents: int, num_heads_kv: int) -> None:
    """The sums of a dq go over three blocks of keys; how these are divided among threads may cut documents or not."""
    length, d = 768, 16
    mask, settings = _documents(num_documents, length), AttnSettings(softmax_scale=0.25)
    generator = torch.Generator().manual_seed(0)
    inputs = KernelInputs(*(torch.randn(mask.num_q, num_heads_kv, d, generator=generator) for _ in range(4)))
    torch.set_num_threads(1)
    one = run_kernel(cpu, inputs, mask, settings)
    for threads in (5, 8):
        torch.set_num_threads(threads)
        assert_same_bits(one, run_kernel(cpu, inputs, mask, settings), f"with {threads} threads")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_fewer_threads_than_asked_do_the_work() -> None:
    """100 threads' stacks do not fit into the memory that the process may still take: those that start serve."""
    if "LD_PRELOAD" in os.environ:
        pytest.skip("a sanitizer needs memory of its own")
    command, source = [sys.executable, "-c", SHORT_OF_THREADS], str(Path(cpu.__file__).parents[3])
    environment = {**os.environ, "PYTHONPATH": source}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]


def _into_wider_rows(x: Tensor) -> Tensor:
    """The same numbers as the middle columns of a wider buffer of NaN."""
    buffer = torch.full((x.shape[0], x[0].numel() + 8), math.nan, dtype=x.dtype)
    return buffer[:, 3:-5].unflatten(1, x.shape[1:]).copy_(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dims", HEAD_DIMS, ids=lambda dims: f"{dims[0]}-{dims[1]}")
def test_strided_views(head_dims: tuple[int, int], dtype: torch.dtype) -> None:
    """k and v out of one packed buffer, q and dout laid out heads first or in wider rows: the bits of contiguous tensors, and right."""
    d, dv = head_dims
    case = KernelCase("empty_rows", dtype, 301, 6, 3, head_dim=d, head_dim_v=dv, softcap=0.0 if d % 16 else 10.0)
    (inputs, truth), mask = solve(case), case.slices.kernel_mask()
    expected = run_kernel(cpu, inputs, mask, case.settings)
    truth.check(expected)
    kv = torch.cat([inputs.k, inputs.v], dim=-1)  # [num_k, hk, d + dv]
    k, v = kv.split([d, dv], dim=-1)
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (inputs.q, inputs.dout)]
    in_rows = [_into_wider_rows(x) for x in (inputs.q, inputs.dout)]
    for q, dout in (heads_first, in_rows):
        actual = run_kernel(cpu, KernelInputs(q, k, v, dout), mask, case.settings)
        assert_same_bits(expected, actual, "with strides")


def test_strides_beyond_32_bits() -> None:
    """Tokens 2^28 elements apart, so that the last are past 2^31: memory of which only the rows in use are ever touched."""
    apart, num_tokens, d = 1 << 28, 10, 16
    case = KernelCase("causal", torch.bfloat16, num_tokens, 1, 1, head_dim=d)
    inputs, mask = make_inputs(case), case.slices.kernel_mask()
    storage = torch.UntypedStorage(2 * ((num_tokens - 1) * apart + 4 * d))
    far = torch.tensor([], dtype=torch.bfloat16).set_(storage, 0, (num_tokens, 4, d), (apart, d, 1))
    q, k, v, dout = (far[:, i : i + 1].copy_(x) for i, x in enumerate(vars(inputs).values()))
    expected = run_kernel(cpu, inputs, mask, case.settings)
    actual = run_kernel(cpu, KernelInputs(q, k, v, dout), mask, case.settings)
    assert_same_bits(expected, actual, "with large strides")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_borders_of_tiles_and_blocks(dtype: torch.dtype) -> None:
    """Lengths around the tile of 60 queries and the block of 256 keys."""
    for num_tokens in (59, 60, 61, 255, 256, 257, 511, 513):
        for family in ("causal", "window", "more_keys"):
            check_kernel(cpu, KernelCase(family, dtype, num_tokens, 2, 1, head_dim=24))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_short_documents(dtype: torch.dtype) -> None:
    """2,000 causal documents of 32 tokens. The oracle sees them as heads of one document, which is the same attention."""
    num_documents, length, hq, hk, d = 2000, 32, 2, 1, 16
    num_tokens, mask = num_documents * length, _documents(num_documents, length)
    generator = torch.Generator().manual_seed(0)
    inputs = KernelInputs(*(torch.randn(num_tokens, h, d, generator=generator).to(dtype) for h in (hq, hk, hk, hq)))

    def as_heads(x: Tensor) -> Tensor:  # [num_tokens, h, ...] -> [length, num_documents * h, ...]
        return x.unflatten(0, (num_documents, length)).transpose(0, 1).flatten(1, 2)

    causal = torch.ones(length, length, dtype=torch.bool).tril()
    q, k, v, dout = (as_heads(x) for x in vars(inputs).values())
    oracle = attention_oracle(q, k, v, causal, dout=dout)
    plain = plain_result(q, k, v, causal, dout=dout)
    settings = AttnSettings(softmax_scale=d**-0.5, return_max_logits=True)
    actual = run_kernel(cpu, inputs, mask, settings)
    assert actual.max_logits is not None and oracle.max_logits is not None
    largest = oracle.max_logits.unflatten(0, (num_documents, hq)).amax(dim=0)
    torch.testing.assert_close(actual.max_logits.double(), largest, rtol=1e-6, atol=0)
    fields = {name: as_heads(x) for name, x in vars(actual).items() if x is not None and name != "max_logits"}
    assert_results_as_exact(AttnResult(**fields), oracle, plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_heads_q", "num_heads_kv"), [(8, 2), (3, 3), (10, 2), (70, 1)])
def test_documents_and_groups_of_heads(num_heads_q: int, num_heads_kv: int, dtype: torch.dtype) -> None:
    """Documents of 1 to 70 tokens under groups of heads of which a tile of 60 rows holds a whole number, or one and a part, or a part; rows
    that are used where they lie and rows that are not."""
    for family in ("varlen_causal", "prime_lengths", "cross_documents"):
        for d, dv in ((40, 24), (64, 32)):
            case = KernelCase(
                family, dtype, 150 if num_heads_q > 60 else 400, num_heads_q, num_heads_kv, head_dim=d, head_dim_v=dv
            )
            (inputs, truth), mask = solve(case), case.slices.kernel_mask()
            torch.set_num_threads(1)
            one = run_kernel(cpu, inputs, mask, case.settings)
            truth.check(one)
            torch.set_num_threads(5)
            assert_same_bits(one, run_kernel(cpu, inputs, mask, case.settings), "with 5 threads")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_documents_whose_keys_lie_elsewhere(dtype: torch.dtype) -> None:
    """48 queries attend 48 keys each, in another order: the same as in order, of keys that are put in that order."""
    length, num_documents = 48, 24
    num_tokens = length * num_documents
    order = np.random.default_rng(0).permutation(num_documents)
    rows = tuple((length * a, length * (a + 1), length * b, length * (b + 1), CAUSAL) for a, b in enumerate(order))
    elsewhere, in_order = Slices(rows, num_tokens, num_tokens).kernel_mask(), _documents(num_documents, length)
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(num_tokens, h, 64, generator=generator).to(dtype) for h in (4, 2, 2, 4))

    def put(x: Tensor) -> Tensor:
        return x.unflatten(0, (num_documents, length))[torch.from_numpy(order)].flatten(0, 1)

    settings = AttnSettings(softmax_scale=0.125)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        actual, expected = (
            run_kernel(cpu, inputs, mask, settings)
            for inputs, mask in (
                (KernelInputs(q, k, v, dout), elsewhere),
                (KernelInputs(q, put(k), put(v), dout), in_order),
            )
        )
        assert actual.dk is not None and actual.dv is not None
        assert_same_bits(expected, replace(actual, dk=put(actual.dk), dv=put(actual.dv)), f"with {threads} threads")


@pytest.mark.parametrize("family", ["varlen_causal", "random_cross"])
def test_what_nobody_writes_is_not_left_as_it_was(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """dq that is written once, that is a sum, and that is 0: into memory full of NaN, in both types."""
    case = KernelCase(family, torch.bfloat16, 700, 4, 2, head_dim=40)
    (inputs, truth), mask = solve(case), case.slices.kernel_mask()
    empty = torch.empty
    monkeypatch.setattr(cpu.torch, "empty", lambda *sizes, **options: empty(*sizes, **options).fill_(math.nan))
    wide = run_kernel(cpu, inputs, mask, case.settings)
    truth.check(wide)
    assert wide.out is not None and wide.lse is not None
    statistics = row_statistics(wide.out, wide.lse, inputs)
    arguments = (inputs.dout, inputs.q, inputs.k, inputs.v, *statistics, mask, case.settings)
    for name, x in zip(("dq", "dk", "dv"), cpu.backward(*arguments, grad_dtype=torch.bfloat16), strict=True):
        assert torch.equal(x, getattr(wide, name).to(torch.bfloat16)), name


@pytest.mark.parametrize("softcap", [0.0, 15.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["causal", "varlen_causal", "random_cross"])
def test_three_parts_are_one_call(family: str, dtype: torch.dtype, softcap: float) -> None:
    """The keys in three parts, cut off the block borders: forwards merged, dq added up, over keys of several blocks."""
    case = KernelCase(family, dtype, 700, 4, 2, head_dim=40, head_dim_v=24, softcap=softcap)
    (inputs, truth), whole = solve(case), case.slices.kernel_mask()
    one = run_kernel(cpu, inputs, whole, case.settings)
    cuts, parts = [0, 131, 407, whole.num_k], []
    for start, end in zip(cuts, cuts[1:], strict=False):
        bands, _, _ = split_k(whole.bands, np.array([start]), np.array([end]))
        parts.append((slice(start, end), KernelMask(shift(bands, 0, -start), whole.num_q, end - start)))
    partial = None
    for keys, mask in parts:
        partial = cpu.forward(inputs.q, inputs.k[keys], inputs.v[keys], mask, case.settings, into=partial)
    assert partial is not None
    lse, delta = row_statistics(partial.out, partial.lse, inputs)
    dq = torch.zeros(inputs.q.shape)
    grads = [
        cpu.backward(inputs.dout, inputs.q, inputs.k[keys], inputs.v[keys], lse, delta, mask, case.settings, dq=dq)
        for keys, mask in parts
    ]
    _, dk, dv = zip(*grads, strict=True)
    merged = AttnResult(*partial, dq, torch.cat(dk), torch.cat(dv))
    truth.check(merged)
    for name, x in vars(one).items():
        # In bfloat16, probabilities are rounded relative to the largest of the part.
        if x is not None and dtype != torch.bfloat16:
            torch.testing.assert_close(getattr(merged, name), x, rtol=2e-5, atol=2e-6)


def test_a_dq_with_strides_is_added_to() -> None:
    case = KernelCase("window", num_tokens=300, head_dim=40)
    inputs, mask = make_inputs(case), case.slices.kernel_mask()
    out, lse, _ = cpu.forward(inputs.q, inputs.k, inputs.v, mask, case.settings)
    arguments = (inputs.dout, inputs.q, inputs.k, inputs.v, *row_statistics(out, lse, inputs), mask, case.settings)
    dq = torch.full((case.num_heads_q, 300, 40), 2.0).transpose(0, 1)
    given = cpu.backward(*arguments, dq=dq)[0]
    assert given is dq
    assert torch.equal(dq, cpu.backward(*arguments)[0] + 2.0)


def test_merging_into_a_partial_with_strides() -> None:
    case = KernelCase("causal", num_tokens=200, head_dim=40)
    (inputs, truth), mask = solve(case), case.slices.kernel_mask()
    out = torch.zeros(4, 200, 40).transpose(0, 1)
    into = Partial(out, torch.full((4, 200), -math.inf).t(), torch.full((4,), -math.inf))
    merged = cpu.forward(inputs.q, inputs.k, inputs.v, mask, case.settings, into=into)
    assert merged.out is out
    truth.check(AttnResult(*merged))
    largest = torch.full((4, 3), -math.inf)
    into = Partial(torch.zeros(200, 4, 40), torch.full((200, 4), -math.inf), largest[:, 0])
    truth.check(AttnResult(*cpu.forward(inputs.q, inputs.k, inputs.v, mask, case.settings, into=into)))
    assert (largest[:, 1:] == -math.inf).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.15, -0.15])
def test_max_logits_are_those_before_the_softcap(dtype: torch.dtype, scale: float) -> None:
    plain = KernelCase("empty_rows", dtype, 301, head_dim=40, softmax_scale=scale, magnitude=5.0)
    inputs, mask = make_inputs(plain), plain.slices.kernel_mask()
    k = inputs.k.repeat_interleave(2, dim=1).double()
    logits = scale * torch.einsum("qhd,khd->hqk", inputs.q.double(), k)
    expected = logits.masked_fill(~plain.slices.dense(), -math.inf).amax(dim=(1, 2))
    for softcap in (0.0, 2.0):
        settings = replace(plain.settings, softcap=softcap)
        largest = cpu.forward(inputs.q, inputs.k, inputs.v, mask, settings).max_logits
        assert largest is not None
        torch.testing.assert_close(largest.double(), expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("num_tokens", [301, 16384], ids=["small", "past the caches"])
def test_results_in_the_inputs_dtype_are_the_float32_ones_rounded(num_tokens: int, dtype: torch.dtype) -> None:
    """Outputs of 8 MiB and more are written past the caches, whole lines at a time."""
    rows = tuple((a, min(a + 37, num_tokens), a, min(a + 37, num_tokens), CAUSAL) for a in range(0, num_tokens, 37))
    mask, settings = Slices(rows, num_tokens, num_tokens).kernel_mask(), AttnSettings(softmax_scale=0.2)
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(num_tokens, h, 32, generator=generator).to(dtype) for h in (8, 2, 2, 8))
    wide, lse, _ = cpu.forward(q, k, v, mask, settings)
    narrow = cpu.forward(q, k, v, mask, settings, out_dtype=dtype)
    assert torch.equal(narrow.out, wide.to(dtype)) and torch.equal(narrow.lse, lse)
    lse, delta = row_statistics(wide, lse, KernelInputs(q, k, v, dout))
    expected = cpu.backward(dout, q, k, v, lse, delta, mask, settings)
    actual = cpu.backward(dout, q, k, v, lse, delta, mask, settings, grad_dtype=dtype)
    for name, x, y in zip(("dq", "dk", "dv"), actual, expected, strict=True):
        assert x.dtype == dtype and torch.equal(x, y.to(dtype)), name


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_number_of_16_bits_is_read_and_written(dtype: torch.dtype) -> None:
    """A token that attends itself alone gets its own v: subnormals, infinities and NaN among them.

    Subnormals of bfloat16 may count as 0: processors that multiply bfloat16 do so.
    """
    v = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype).view(512, 1, 128)
    may_be_0 = (v.float().abs() < torch.finfo(dtype).tiny) & (dtype == torch.bfloat16)
    q = torch.ones(512, 1, 8, dtype=dtype)
    settings = AttnSettings(softmax_scale=1.0)
    for asked in (dtype, torch.float32):
        out = cpu.forward(q, q, v, _documents(512, 1), settings, out_dtype=asked).out
        expected = torch.where(may_be_0 & (out == 0), 0, v.to(asked))
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_results_are_rounded_to_nearest_even(dtype: torch.dtype) -> None:
    """The mean of two neighbours is half way between them. As torch rounds, from the smallest subnormals to past the largest number.

    Subnormals of bfloat16 may count as 0: processors that round to bfloat16 do so.
    """
    finite = torch.arange(1 << 15).to(torch.int16)
    finite = finite[finite.view(dtype).isfinite()]
    pairs = torch.stack([finite, finite + 1], dim=-1).view(dtype)  # [a multiple of 128, 2]; the last has infinity
    v = torch.cat([pairs, -pairs]).view(-1, 128, 2).transpose(1, 2).flatten(0, 1)  # [num_tokens, 128]
    num_tokens = v.shape[0]
    rows = tuple((i, i + 2, i, i + 2, FULL) for i in range(0, num_tokens, 2))
    mask = Slices(rows, num_tokens, num_tokens).kernel_mask()
    q, k = torch.ones(num_tokens, 1, 8, dtype=dtype), torch.zeros(num_tokens, 1, 8, dtype=dtype)
    wide, narrow = (
        cpu.forward(q, k, v.unsqueeze(1), mask, AttnSettings(softmax_scale=1.0), out_dtype=asked).out
        for asked in (torch.float32, dtype)
    )
    assert (wide.to(dtype).float() != wide).any()
    may_be_0 = (wide.abs() < torch.finfo(dtype).tiny) & (dtype == torch.bfloat16)
    expected = torch.where(may_be_0 & (narrow == 0), 0, wide.to(dtype))
    torch.testing.assert_close(narrow, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("num_keys", [200, 300])
def test_logits_that_overflow_to_minus_infinity(num_keys: int, dtype: torch.dtype) -> None:
    """Keys of the first block, or all, have probability 0 then, and nothing becomes NaN."""
    q, k, v = (torch.ones(n, 1, 16, dtype=dtype) for n in (4, num_keys, num_keys))
    k[:256] = -1e38
    mask = Slices(((0, 4, 0, num_keys, FULL),), 4, num_keys).kernel_mask()
    out, lse, _ = cpu.forward(q, k, v, mask, AttnSettings(softmax_scale=10.0))
    num_left = max(num_keys - 256, 0)
    assert torch.equal(out, torch.full_like(out, float(num_left > 0)))
    truth = 160.0 + math.log(num_left) if num_left else -math.inf
    torch.testing.assert_close(lse, torch.full_like(lse, truth), rtol=1e-6, atol=0)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("bad", ["q", "k"])
def test_nan_is_not_hidden(bad: str, softcap: float) -> None:
    """A NaN in a logit makes its row NaN, and no other row: what the reference kernel says."""
    case = KernelCase("varlen_causal", num_tokens=301, head_dim=16, softcap=softcap)
    inputs, mask = make_inputs(case).clone(), case.slices.kernel_mask()
    before = run_kernel(cpu, inputs, mask, case.settings)
    getattr(inputs, bad)[150] = math.nan
    actual, expected = (run_kernel(kernel, inputs, mask, case.settings) for kernel in (cpu, reference))
    for name in ("out", "lse", "max_logits"):
        x, y = getattr(actual, name), getattr(expected, name)
        assert y.isnan().any() and torch.equal(x.isnan(), y.isnan()), f"{name} is NaN elsewhere than the reference's"
    assert actual.lse is not None and before.out is not None and actual.out is not None
    sound = ~actual.lse.isnan()
    assert sound.any() and torch.equal(actual.out[sound], before.out[sound])
    assert all(x is not None and x.isnan().any() for x in (actual.dq, actual.dk, actual.dv))
    # And it stays where other keys are merged.
    into, good = Partial(actual.out, actual.lse, actual.max_logits), make_inputs(case)
    merged = cpu.forward(good.q, good.k, good.v, mask, case.settings, into=into)
    assert torch.equal(merged.lse.isnan(), ~sound) and torch.equal(merged.out.isnan().any(dim=-1), ~sound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["empty_rows", "varlen_causal"])
def test_what_nobody_attends_is_not_read(family: str, dtype: torch.dtype) -> None:
    """NaN in queries that attend nothing and in keys that nothing attends (padding, say) reaches no result."""
    case = KernelCase(family, dtype, 301, head_dim=40, softcap=10.0)
    # Documents of the first 270 tokens, and padding.
    rows = case.slices.rows if family == "empty_rows" else MASK_FAMILIES[family](270).rows
    slices, inputs = Slices(rows, 301, 301), make_inputs(case)
    mask, attended = slices.kernel_mask(), slices.dense()
    expected, poisoned = run_kernel(cpu, inputs, mask, case.settings), inputs.clone()
    idle_q, idle_k = ~attended.any(dim=1), ~attended.any(dim=0)
    assert idle_q.any() and idle_k.any()
    for x, idle in ((poisoned.q, idle_q), (poisoned.dout, idle_q), (poisoned.k, idle_k), (poisoned.v, idle_k)):
        x[idle] = math.nan
    out, lse, max_logits = cpu.forward(poisoned.q, poisoned.k, poisoned.v, mask, case.settings)
    lse, delta = row_statistics(out, lse, inputs)
    grads = cpu.backward(poisoned.dout, poisoned.q, poisoned.k, poisoned.v, lse, delta, mask, case.settings)
    assert_same_bits(expected, AttnResult(out, lse, max_logits, *grads), "with NaN in what is not attended")


@pytest.mark.parametrize("magnitude", [1e2, 1e4, 1e12, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_single_key_gives_its_value(dtype: torch.dtype, magnitude: float) -> None:
    """The largest logit less itself is 0, however large: a product and a difference must not be fused."""
    alone = Slices(tuple((i, i + 1, i, i + 1, 0) for i in range(40)), 40, 40)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(40, heads, 16, generator=generator).to(dtype) for heads in (2, 1, 1))
    out, lse, _ = cpu.forward(q * magnitude, k, v, alone.kernel_mask(), AttnSettings(0.25))
    assert torch.equal(out, v.float().expand_as(out)) and torch.isfinite(lse).all()
