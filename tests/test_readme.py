"""What the README tells a reader to run, runs as it stands."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def code_blocks() -> dict[str, str]:
    """The Python blocks of the README, by the heading that they stand under."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = {}
    for section in re.split(r"^## ", text, flags=re.MULTILINE):
        for block in re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL):
            heading = section.splitlines()[0]
            assert heading not in blocks, f"two blocks under {heading!r}: say here how each is run"
            blocks[heading] = block
    return blocks


def run(*arguments: str) -> str:
    """Standard output of a Python process; its errors are the test's."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::DeprecationWarning:magi_attention"}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_blocks_are_run_here() -> None:
    assert set(code_blocks()) == {"Quick start: one device", "Quick start: many devices"}


def test_one_device() -> None:
    # With torch.distributed out of reach, for one device must not need it.
    code = code_blocks()["Quick start: one device"]
    assert "torch.Size([512, 8, 64]) torch.Size([512, 8])" in run("-c", code)
    unavailable = "".join(
        f"del torch.distributed.{name}\n" for name in ("init_process_group", "all_reduce", "all_to_all_single")
    )
    assert "torch.Size([512, 8, 64])" in run("-c", f"import torch.distributed\n{unavailable}{code}")


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_many_devices(num_ranks: int, tmp_path: Path) -> None:
    script = tmp_path / "quick_start.py"
    script.write_text(code_blocks()["Quick start: many devices"], encoding="utf-8")
    if num_ranks == 1:
        output = run(str(script))
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        address = ("--master-addr", "127.0.0.1", "--master-port", port)
        output = run("-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks), *address, str(script))
    assert f"on {num_ranks} rank" in output
    assert "torch.Size([512, 512])" in output
