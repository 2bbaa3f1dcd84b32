"""Compile the CPU kernel on first use, once for all processes, and load it.

The library is cached under the user's cache directory (``XDG_CACHE_HOME``, else ``~/.cache``), by what it depends on: sources,
compiler, its flags, and the processor's instruction sets. It is written aside and renamed into place, under a lock: of many
ranks that start at once, one compiles.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = ("interface.cpp", "forward.cpp", "backward.cpp")
HEADERS = (
    "attention.h",
    "bands.h",
    "elements.h",
    "lanes.h",
    "pack.h",
    "partition.h",
    "product.h",
    "score_gradients.h",
    "simd.h",
)
FLAGS = ("-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-pthread", "-fPIC", "-shared")
COMPILERS = ("g++", "c++", "clang++")


class BuildError(RuntimeError):
    """There is no compiler, or it failed; the message holds what it printed."""


def load_library() -> ctypes.CDLL | None:
    """The kernel, compiled if it is not cached; None, with a warning, where that is not possible."""
    try:
        return ctypes.CDLL(str(build_library()))
    except (BuildError, OSError) as error:
        warnings.warn(
            f"the C++ attention kernel could not be built, so the slower torch version serves on CPUs: {error}. To have it, install a "
            f"C++17 compiler ({', '.join(COMPILERS)}), and let XDG_CACHE_HOME be a folder that can be written",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def build_library(extra_flags: tuple[str, ...] = ()) -> Path:
    """The path of the compiled kernel. ``extra_flags``: for the compiler, say sanitizers.

    Raises:
        BuildError: no compiler, or an error of it.
    """
    compiler = find_compiler()
    flags = (*FLAGS, *_machine_flags(), *extra_flags)
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"attention-{_digest(compiler, flags)}.so"
    if library.exists():
        return library
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(compiler, flags, library)
    return library


def find_compiler() -> str:
    """The C++ compiler: the first of ``COMPILERS`` on the PATH. ``$CXX`` is not read.

    Raises:
        BuildError: none is on the PATH.
    """
    for name in COMPILERS:
        path = shutil.which(name)
        if path is not None:
            return path
    raise BuildError(f"none of {', '.join(COMPILERS)} is on the PATH")


def cache_folder() -> Path:
    """Where compiled kernels are kept. BuildError: the user has no home directory, and ``XDG_CACHE_HOME`` is not set."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "magi_attention"
    except RuntimeError as error:  # no $HOME, and a user that the system does not know
        raise BuildError(f"there is no folder for caches: {error}") from error


def _machine_flags() -> tuple[str, ...]:
    return ("-mcpu=native",) if platform.machine() in ("aarch64", "arm64") else ("-march=native",)


def _digest(compiler: str, flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for file in (*SOURCES, *HEADERS):
        digest.update((Path(__file__).parent / file).read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    digest.update("\0".join((version, *flags, _processor())).encode())
    return digest.hexdigest()[:24]


def _processor() -> str:
    """What distinguishes processors for ``-march=native``: a shared cache may be seen from machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _compile(compiler: str, flags: tuple[str, ...], library: Path) -> None:
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory(dir=library.parent) as aside, ThreadPoolExecutor(len(SOURCES)) as pool:
        objects = [f"{aside}/{source}.o" for source in SOURCES]
        steps = [
            (compiler, *flags, "-c", str(here / source), "-o", made)
            for source, made in zip(SOURCES, objects, strict=True)
        ]
        list(pool.map(_run, steps))
        _run((compiler, *flags, *objects, "-o", f"{aside}/{library.name}"))
        os.replace(f"{aside}/{library.name}", library)


def _run(command: tuple[str, ...]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise BuildError(f"{command[0]} failed: {result.stderr[-2000:]}")
