"""How the C++ kernel is built: once for all processes, again when something it depends on changes, not at all without a compiler.

Also the kernel suite under the compiler's sanitizers.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from magi_attention.kernels import cpu
from magi_attention.kernels.cpu import build
from magi_attention.kernels.registry import pick
from magi_attention.testing.kernel_check import KernelCase, check_kernel, make_inputs

TESTS = Path(__file__).parent


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and a backend that has not loaded its library yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cpu._library.cache_clear()
    yield tmp_path / "cache" / "magi_attention"
    cpu._library.cache_clear()


def _write_compiler(folder: Path, script: str) -> Path:
    """An executable ``g++`` of the shell's own commands alone; it is not asked to compile when asked for its version."""
    folder.mkdir(exist_ok=True)
    compiler = folder / "g++"
    compiler.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo "${{VERSION:-1}}"; exit 0; fi\n{script}\n')
    compiler.chmod(0o755)
    return compiler


ATTEND = """
import sys, torch
from magi_attention.kernels import cpu
from magi_attention.testing.kernel_check import KernelCase, check_kernel
torch.set_num_threads(1)
print("ready", flush=True)
sys.stdin.readline()
check_kernel(cpu, KernelCase(num_tokens=70))
assert cpu._library() is not None
print("right")
"""


def test_processes_that_start_at_once_compile_once(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four wait for one another before the first call; a compiler in front of the real one notes what each of its runs makes."""
    log = tmp_path / "compiled"
    _write_compiler(
        tmp_path / "bin", f'for last; do :; done\necho "${{last##*/}}" >> "{log}"\nexec "{build.find_compiler()}" "$@"'
    )
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    source = str(Path(cpu.__file__).parents[3])
    environment = {**os.environ, "PYTHONPATH": source, "PYTHONWARNINGS": "error::RuntimeWarning"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ATTEND], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        for _ in range(4)
    ]
    try:
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in processes:
            output, _ = process.communicate(timeout=240)
            assert process.returncode == 0 and output == "right\n"
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert sorted(file.suffix for file in cache.iterdir()) == [".lock", ".so"], "one library, and no half-written one"
    (library,) = cache.glob("*.so")
    assert sorted(log.read_text().splitlines()) == sorted([*(f"{source}.o" for source in build.SOURCES), library.name])


def _no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PATH", "")
    return "none of g\\+\\+, c\\+\\+, clang\\+\\+ is on the PATH"


def _compiler_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    _write_compiler(tmp_path / "bin", "echo 'no space left' >&2; exit 1")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return "g\\+\\+ failed: no space left"


def _compiler_of_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    _write_compiler(tmp_path / "bin", 'for last; do :; done; echo "not a library" > "$last"')
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return "attention-.*\\.so"


def _cache_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "cache").write_text("")
    return "Not a directory"


def _no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", unknown)
    return "there is no folder for caches"


BROKEN = [_no_compiler, _compiler_that_fails, _compiler_of_something_else, _cache_is_a_file, _no_home]


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("break_it", BROKEN, ids=lambda f: f.__name__.strip("_"))
def test_without_a_library_torch_serves_and_says_so_once(
    break_it: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(break_it)
    reason = break_it(tmp_path, monkeypatch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for dtype in (torch.bfloat16, torch.float32, torch.float16):
            case = KernelCase("varlen_causal", dtype, 97, head_dim=40, softcap=10.0)
            inputs = make_inputs(case)
            assert pick(inputs.q, inputs.k, inputs.v, case.settings) is cpu
            check_kernel(cpu, case)
    assert [one.category for one in caught] == [RuntimeWarning]
    message = str(caught[0].message)
    assert re.search(reason, message) and "install a C++17 compiler (g++, c++, clang++)" in message
    assert cpu._library() is None


def test_a_failed_build_leaves_nothing_and_is_tried_again(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = _write_compiler(tmp_path / "bin", "exit 1")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(build.BuildError, match="failed"):
        build.build_library()
    assert [file.suffix for file in cache.iterdir()] == [".lock"]
    _write_compiler(compiler.parent, 'for last; do :; done; echo compiled > "$last"')
    assert build.build_library().read_text() == "compiled\n"


def test_what_the_library_is_cached_by(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another library for other flags, another compiler, another processor, other sources; the same one for the same."""
    _write_compiler(tmp_path / "bin", 'for last; do :; done; echo "$@" > "$last"')
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    sources = tmp_path / "sources"
    shutil.copytree(build.__file__.removesuffix("build.py"), sources)
    monkeypatch.setattr(build, "__file__", str(sources / "build.py"))
    seen = [build.build_library(), build.build_library(("-DX",)), build.build_library(("-DX", "-DY"))]
    assert "-DX" not in seen[0].read_text() and "-DX -DY" in seen[2].read_text()
    monkeypatch.setenv("VERSION", "2")
    seen.append(build.build_library())
    with monkeypatch.context() as other:
        other.setattr(build, "_processor", lambda: "flags: of another")
        seen.append(build.build_library())
    for file in (*build.SOURCES, *build.HEADERS):
        with open(sources / file, "a") as source:
            source.write("// another line\n")
        seen.append(build.build_library())
    assert len(set(seen)) == len(seen) == len(list(cache.glob("*.so")))
    times = [library.stat().st_mtime_ns for library in seen]
    assert build.build_library() == seen[-1]
    monkeypatch.setenv("VERSION", "1")
    assert [library.stat().st_mtime_ns for library in seen] == times, "it was compiled again"


def test_every_source_is_listed() -> None:
    """A file that is not in the key would change without a new library."""
    folder = Path(cpu.__file__).parent
    assert {file.name for file in folder.iterdir() if file.suffix in (".cpp", ".h", ".inc")} == {
        *build.SOURCES,
        *build.HEADERS,
    }


SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")

# Runs in a process of its own: the sanitizers' runtime must be there before anything else is loaded.
SUITE = """
import ctypes, sys
import pytest
from magi_attention.kernels import cpu
cpu.load_library = lambda: ctypes.CDLL(sys.argv[1])
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "--capture=no", *sys.argv[2:]]))
"""


def _run_suite(library: Path, runtime: str | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        **({"LD_PRELOAD": runtime} if runtime else {}),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",  # so that the band table's memory is watched, too
        "PYTHONPATH": str(Path(cpu.__file__).parents[3]),
    }
    command = [sys.executable, "-c", SUITE, str(library), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=TESTS.parents[1], check=False)


@pytest.fixture(scope="module")
def sanitized() -> tuple[Path, str]:
    """The library built under the sanitizers, and the path of their runtime."""
    found = subprocess.run(
        [build.find_compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip("this compiler comes without libasan")
    return build.build_library(SANITIZERS), found


@pytest.mark.long
@pytest.mark.parametrize(
    "arguments",
    [
        (str(TESTS / "test_kernel_suite.py"), "-k", "cpu and not reference"),
        (str(TESTS / "test_cpu_backend.py"), "-k", "not many_short or bfloat16"),
    ],
    ids=["suite", "backend"],
)
def test_sanitizers_report_nothing(sanitized: tuple[Path, str], arguments: tuple[str, ...]) -> None:
    result = _run_suite(*sanitized, *arguments)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-8000:]
    assert re.search(r"\d{2,} passed", result.stdout), result.stdout[-2000:]
    assert "Sanitizer" not in result.stderr and "runtime error" not in result.stderr, result.stderr[-8000:]


INSTRUCTIONS = [("g++", "x86-64"), ("g++", "x86-64-v3"), ("g++", "x86-64-v4"), ("clang++", "native")]


@pytest.mark.long
@pytest.mark.parametrize(("compiler", "processor"), INSTRUCTIONS, ids="-".join)
def test_other_instruction_sets_and_compilers(
    compiler: str, processor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vectors of 4, 8 and 16 floats, with and without fused multiply-add and products of bfloat16."""
    path = shutil.which(compiler)
    if path is None or platform.machine() != "x86_64":
        pytest.skip(f"needs {compiler} on x86-64")
    monkeypatch.setattr(build, "find_compiler", lambda: path)
    monkeypatch.setattr(build, "_machine_flags", lambda: (f"-march={processor}",))
    library = build.build_library()
    lanes = ctypes.CDLL(str(library)).magi_cpu_vector_lanes()
    assert lanes == {"x86-64": 4, "x86-64-v3": 8, "x86-64-v4": 16}.get(processor, lanes)
    result = _run_suite(
        library,
        None,
        str(TESTS / "test_cpu_backend.py"),
        str(TESTS / "test_kernel_suite.py"),
        "-k",
        "cpu and not reference",
    )
    assert result.returncode == 0, result.stdout[-4000:]


@pytest.mark.long
@pytest.mark.parametrize("processor", ["armv8-a", "armv8.6-a+bf16"])
def test_neon(processor: str, tmp_path: Path) -> None:
    """Cross-compiled and run by an emulator; ``neon_check.cpp`` compares with sums in double."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64")
    folder, program = Path(build.__file__).parent, tmp_path / "check"
    flags = [flag for flag in build.FLAGS if flag not in ("-fPIC", "-shared")]
    sources = [*(str(folder / source) for source in build.SOURCES), str(TESTS / "neon_check.cpp")]
    command = [compiler, *flags, "-static", f"-march={processor}", f"-I{folder}", *sources, "-o", str(program)]
    subprocess.run(command, check=True)
    result = subprocess.run([emulator, "-cpu", "max", str(program)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    pairs = "two" if processor.endswith("bf16") else "one"
    assert f"4 lanes, bfloat16 {pairs} a word" in result.stdout


ONE_ROW_TOO_FAR = """
from magi_attention.kernels import cpu
from magi_attention.testing.kernel_check import KernelCase, check_kernel

def test_one_row_too_far():
    view = cpu._view
    cpu._view = lambda x: view(x[1:])
    check_kernel(cpu, KernelCase())
"""


@pytest.mark.long
def test_sanitizers_would_report(sanitized: tuple[Path, str], tmp_path: Path) -> None:
    """Inputs that end a row before the kernel thinks they do are caught: the test above can fail."""
    test = tmp_path / "test_one_row_too_far.py"
    test.write_text(ONE_ROW_TOO_FAR)
    result = _run_suite(*sanitized, str(test))
    assert result.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in result.stderr, result.stderr[-4000:]
