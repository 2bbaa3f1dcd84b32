"""Every variable: its default, what it may be, and the message for what it may not be."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from magi_attention import env

PREFIX = "MAGI_ATTENTION_"

FLAGS: dict[str, Callable[[], bool | None]] = {
    "SANITY_CHECK": env.sanity_check,
    "SDPA_BACKEND": env.sdpa_backend,
    "DETERMINISTIC_MODE": env.deterministic_mode,
    "FORWARD_HIGH_PRECISION_REDUCE": env.forward_high_precision_reduce,
    "BACKWARD_HIGH_PRECISION_REDUCE": env.backward_high_precision_reduce,
    "QO_COMM": env.qo_comm,
    "HIERARCHICAL_COMM": env.hierarchical_comm,
}
# Name: (reader, default, least).
COUNTS: dict[str, tuple[Callable[[], int], int, int]] = {
    "DIST_ATTN_RUNTIME_DICT_SIZE": (env.dist_attn_runtime_dict_size, 1000, 1),
    "MIN_CHUNKS_PER_RANK": (env.min_chunks_per_rank, 8, 1),
    "FFA_FORWARD_SM_MARGIN": (env.ffa_forward_sm_margin, 0, 0),
    "FFA_BACKWARD_SM_MARGIN": (env.ffa_backward_sm_margin, 0, 0),
}


@pytest.fixture(autouse=True)
def _nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*FLAGS, *COUNTS, "DSINK_ALL_REDUCE_OP", "BACKEND"):
        monkeypatch.delenv(PREFIX + name, raising=False)


@pytest.mark.parametrize("name", FLAGS)
def test_flags(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unset = None if name == "QO_COMM" else False  # which is decided by the mask where nobody says
    assert FLAGS[name]() is unset
    for value, expected in {"1": True, "0": False, "true": True, "False": False, "": unset, " 1 ": True}.items():
        monkeypatch.setenv(PREFIX + name, value)
        assert FLAGS[name]() is expected
        assert [other for other in FLAGS if FLAGS[other]()] == [name] * bool(expected)
    for value in ("2", "yes", "-1"):
        monkeypatch.setenv(PREFIX + name, value)
        with pytest.raises(ValueError, match=f"^{PREFIX}{name} must be 0 or 1, got '{value}'"):
            FLAGS[name]()


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read, default, least = COUNTS[name]
    assert read() == default
    for value, expected in {"17": 17, str(least): least, "": default}.items():
        monkeypatch.setenv(PREFIX + name, value)
        assert read() == expected
    for value in (str(least - 1), "many", "1.5", "--5", "²"):
        monkeypatch.setenv(PREFIX + name, value)
        with pytest.raises(ValueError, match=f"^{PREFIX}{name} must be an int of at least {least}, got '{value}'"):
            read()


def test_dsink_all_reduce_op(monkeypatch: pytest.MonkeyPatch) -> None:
    assert env.dsink_all_reduce_op() == "none"
    for value in ("none", "sum", "avg", "SUM"):
        monkeypatch.setenv(f"{PREFIX}DSINK_ALL_REDUCE_OP", value)
        assert env.dsink_all_reduce_op() == value.lower()
    monkeypatch.setenv(f"{PREFIX}DSINK_ALL_REDUCE_OP", "max")
    with pytest.raises(ValueError, match=f"^{PREFIX}DSINK_ALL_REDUCE_OP must be one of none, sum, avg, got 'max'"):
        env.dsink_all_reduce_op()


def test_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    assert env.backend() == "auto"
    monkeypatch.setenv(f"{PREFIX}BACKEND", "Reference")
    assert env.backend() == "reference"
    monkeypatch.setenv(f"{PREFIX}BACKEND", "")
    assert env.backend() == "auto"
