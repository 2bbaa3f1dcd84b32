"""What a user can get wrong in a call, found before any tensor moves."""

from __future__ import annotations

from operator import index

from torch import Tensor

from magi_attention.common.enum import AttnRole
from magi_attention.runtime.session import Session


def as_int(name: str, value: object, least: int | None = None, what: str = "an int") -> int:
    """An int of any kind (numpy's, a tensor's) as Python's; ValueError says that ``value`` must be ``what``."""
    try:
        number = None if isinstance(value, bool) else index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or (least is not None and number < least):
        raise ValueError(f"{name} must be {what}, got {value!r}")
    return number


def as_flag(name: str, value: object) -> bool:
    """True or False, or what equals them; ValueError for anything else, of which "False" would else count as true."""
    if value not in (True, False):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def check_heads(num_heads_q: int, num_heads_kv: int, head_dim: int) -> tuple[int, int, int]:
    """The three as ints; ValueError where heads do not group or a size is not positive."""
    num_heads_q, num_heads_kv, head_dim = (
        as_int(name, value, least=1, what="a positive int")
        for name, value in (("num_heads_q", num_heads_q), ("num_heads_kv", num_heads_kv), ("head_dim", head_dim))
    )
    if num_heads_q % num_heads_kv:
        raise ValueError(
            f"num_heads_q must be a multiple of num_heads_kv, since every key/value head serves equally many query heads, got "
            f"{num_heads_q} and {num_heads_kv}"
        )
    return num_heads_q, num_heads_kv, head_dim


def check_rows(x: Tensor, rows: int, what: str, remedy: str) -> None:
    """ValueError where ``x`` does not have ``rows`` rows."""
    if not isinstance(x, Tensor) or x.dim() < 1 or x.shape[0] != rows:
        got = f"shape {_describe(x)}" if isinstance(x, Tensor) else _describe(x)
        raise ValueError(f"{what} must be a tensor of {rows} rows ([{rows}, ...]), got {got}; {remedy}")


def check_global_rows(x: Tensor, session: Session, role: AttnRole) -> None:
    """ValueError where ``x`` is not a whole sequence."""
    check_rows(x, session.layout(role).total_seqlen, "x", "dispatch takes the whole, unpadded sequence")


def check_local_rows(x: Tensor, session: Session, role: AttnRole, taker: str, what: str = "x") -> None:
    """ValueError where ``x`` is not this rank's rows, which ``taker`` takes."""
    rank = session.key.cp_rank
    rows = int(session.layout(role).num_rows[rank])
    check_rows(x, rows, what, f"{taker} takes the local rows of rank {rank} as dispatch gave them")


def _describe(x: object) -> str:
    return str(list(x.shape)) if isinstance(x, Tensor) else f"a {type(x).__name__}"


def check_role(role: AttnRole) -> AttnRole:
    """The role as an enum; ValueError names the roles."""
    try:
        return AttnRole(role)
    except ValueError:
        names = ", ".join(repr(r.value) for r in AttnRole)
        raise ValueError(f"attn_role must be an AttnRole, one of {names}, got {role!r}") from None


def check_qkv(q: Tensor, k: Tensor, v: Tensor, session: Session) -> None:
    """ValueError where local q, k, v are not what the key was made for."""
    key, part = session.key, session.rank_plan
    layouts = (
        ("q", q, part.num_q, key.num_heads_q, key.head_dim),
        ("k", k, part.num_k, key.num_heads_kv, key.head_dim),
        ("v", v, part.num_k, key.num_heads_kv, None),
    )
    for name, x, rows, heads, head_dim in layouts:
        if (
            not isinstance(x, Tensor)
            or x.dim() != 3
            or x.shape[0] != rows
            or x.shape[1] != heads
            or (head_dim is not None and x.shape[2] != head_dim)
        ):
            wanted = f"[{rows}, {heads}, {'any head_dim' if head_dim is None else head_dim}]"
            raise ValueError(
                f"{name} must be {wanted}: the local rows of rank {key.cp_rank}, and the heads that the key was made for; got "
                f"{_describe(x)}. Dispatch the global tensor with this key, or make a key for these heads"
            )
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        raise ValueError(f"q, k and v must have one floating-point dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}")


def check_sink(sink: Tensor | None, q: Tensor) -> None:
    """ValueError where the sink is not ``[num_sink, num_heads_q]`` on q's device."""
    if sink is None:
        return
    is_right = isinstance(sink, Tensor) and sink.dtype.is_floating_point and sink.device == q.device
    if not is_right or sink.dim() != 2 or sink.shape[1] != q.shape[1]:
        got = f"{list(sink.shape)} {sink.dtype} on {sink.device}" if isinstance(sink, Tensor) else _describe(sink)
        raise ValueError(f"sink must be a floating-point tensor [num_sink, {q.shape[1]}] on {q.device}, got {got}")
