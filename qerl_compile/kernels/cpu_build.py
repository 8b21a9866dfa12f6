"""Builds and loads the C++ kernels.

Why built on the user's machine: a wheel stays pure Python and the code uses the vector instructions that are there.
The first call costs about two seconds of g++ or clang++, later processes about 30 ms. A library is kept in
`$XDG_CACHE_HOME/qerl-compile` (default `~/.cache/qerl-compile`) under a name that hashes the source, the flags and
everything the compiler says of itself and of the CPU, so that a home directory shared by different machines is safe.
It has no torch headers and a C interface, so it does not depend on the torch version. It takes OpenMP from the
libgomp that torch has loaded.

Without a compiler, or with `QERL_CPU_KERNEL=torch` in the environment, `available` returns None and the operators stay
in torch.
"""

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

HEADER = Path(__file__).with_name("cpu_vectors.h")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-w")
# Below this many multiplications per thread, waking a thread costs more than it saves (a few microseconds).
GRAIN = 2**18

_CTYPES = {"p": ctypes.c_void_p, "l": ctypes.c_long, "f": ctypes.c_float, "i": ctypes.c_int}

Kernels = TypeVar("Kernels")


def available(make: Callable[[], Kernels], what: str, without: str) -> Kernels | None:
    """The kernels that `make` builds and loads; None, with a warning, if they cannot be had on this machine.

    Args:
        make: calls `build` and loads the result.
        what: the kernel, for the warning.
        without: what the user loses, for the warning.
    """
    if os.environ.get("QERL_CPU_KERNEL") == "torch":
        return None
    try:
        return make()
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            f"The C++ kernel for {what} could not be built; {without}: {reason.strip()}\n"
            "Install g++ or clang++ with OpenMP, or set QERL_CPU_KERNEL=torch to silence this.",
            RuntimeWarning,
            stacklevel=3,
        )
        return None


def declare(function: Any, arguments: str, result: object = None) -> None:
    """Tell ctypes the signature of a C function.

    Args:
        function: of a loaded library.
        arguments: a letter each: p pointer, l long, f float, i int.
        result: a ctypes type, None for void.
    """
    function.restype = result
    function.argtypes = [_CTYPES[letter] for letter in arguments]


def build(source: Path, flags: tuple[str, ...]) -> Path:
    """Compile a source file, or find it already compiled.

    Args:
        source: a .cpp file that includes nothing of ours but cpu_vectors.h.
        flags: options of the compiler.

    Returns:
        Path of the shared library.

    Raises:
        OSError: there is no compiler, or no folder can be written.
        subprocess.SubprocessError: the compiler failed or hung.
    """
    compiler = _compiler()
    macros = _run([*compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull])
    parts = [source.read_text(), HEADER.read_text(), *flags, macros]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    folder = _cache_folder()
    library = folder / f"{source.stem}-{key}.so"
    if not library.exists():
        handle, name = tempfile.mkstemp(suffix=".so", dir=folder)
        os.close(handle)
        try:
            _run([*compiler, *flags, str(source), "-o", name])
            Path(name).replace(library)
        finally:
            Path(name).unlink(missing_ok=True)
    return library


def _compiler() -> list[str]:
    if chosen := os.environ.get("CXX"):
        return shlex.split(chosen)
    for name in ("g++", "clang++", "c++"):
        if found := shutil.which(name):
            return [found]
    raise FileNotFoundError("no C++ compiler found (looked for $CXX, g++, clang++, c++).")


def _run(command: list[str]) -> str:
    # The command is the user's own compiler with our fixed options.
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout  # noqa: S603


def _cache_folder() -> Path:
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qerl-compile"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: the user has no home directory
        pass
    return Path(tempfile.mkdtemp(prefix="qerl-compile-"))


def threads(work: int) -> int:
    """How many threads are worth waking for this many multiplications."""
    return min(torch.get_num_threads(), 1 + work // GRAIN)
