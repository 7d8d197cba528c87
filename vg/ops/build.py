"""Find, build and load the compiled kernels; without them the PyTorch reference runs and a warning gives the reason.

A library comes from the wheel or is built once into the user's cache. Environment variables:
    VG_DEFORM_ATTN   auto (default) | reference | cpp | emulate: the implementation for CPU tensors. `reference` applies
                     to CUDA tensors, too; `emulate` is the CUDA source compiled for the CPU. Only `auto` falls back.
    VG_BUILD         0: compile nothing
    XDG_CACHE_HOME   built libraries are in vg/ops/ of this folder (default ~/.cache)
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from vg.errors import BuildError

SETTINGS = ("auto", "reference", "cpp", "emulate")
PACKAGE = Path(__file__).parents[1]
# No -ffast-math: results depend on NaN and infinity. Libraries of the stable ABI of torch 2.10 load in later versions.
FLAGS = ("-O3", "-std=c++17", "-DTORCH_TARGET_VERSION=0x020a000000000000")
WHEEL_CAPABILITIES = ((7, 5), (8, 0), (9, 0), (10, 0), (12, 0))  # GPUs that a wheel contains kernels for
HOST_FLAGS = ("-fPIC", "-fno-math-errno", "-fno-trapping-math")


@dataclass(frozen=True)
class Backend:
    name: str  # reference, cpp, emulate or cuda
    reason: str


def backend_info() -> dict[str, Backend]:
    """Return which implementation runs on CPU and on CUDA tensors, and why; build and load it if necessary."""
    return {device: backend(device) for device in ("cpu", "cuda")}


@functools.cache
def backend(device: str) -> Backend:
    """Return the implementation for a device type ("cpu", "cuda"); the first call builds and loads it, or raises."""
    setting = os.environ.get("VG_DEFORM_ATTN", "auto")
    if setting not in SETTINGS:
        raise BuildError(f"VG_DEFORM_ATTN={setting}; it must be one of {', '.join(SETTINGS)}")
    if setting == "reference":
        return Backend("reference", "VG_DEFORM_ATTN=reference")
    if device == "cuda" and not (torch.version.cuda and torch.cuda.is_available()):
        return Backend("reference", "torch sees no CUDA GPU")
    if device not in ("cpu", "cuda"):
        return Backend("reference", f"there are no kernels for {device}")

    name = "cuda" if device == "cuda" else "emulate" if setting == "emulate" else "cpp"
    try:
        return Backend(name, _load(name))
    except BuildError as error:
        if setting != "auto":
            raise
        if os.environ.get("VG_BUILD") != "0":  # else the user chose it
            warnings.warn(f"deformable attention on {device} runs in PyTorch, which is slow. {error}", stacklevel=2)
        return Backend("reference", str(error))


def _load(name: str) -> str:
    """Register the kernels of a library with torch and return its origin, and why a prebuilt one was not used."""
    prebuilt, unusable = prebuilt_path(name), ""
    if prebuilt.exists():
        try:
            _register(prebuilt)
            return f"prebuilt: {prebuilt}"
        except BuildError as error:  # made for a newer system or for other GPUs: build one for this system
            unusable = f"; {error}"
    try:
        path = library_in_cache(name)
        _register(path)
    except BuildError as error:
        raise BuildError(f"{error}{unusable}") from error
    return f"built from source: {path}{unusable}"


def _register(path: Path) -> None:
    """Load a library and register its kernels, which for CUDA runs one of them first.

    Raises:
        BuildError: the library does not load, or its kernels do not run on this GPU or with this driver.
    """
    try:
        register = ctypes.CDLL(str(path)).deform_attn_register
    except OSError as error:
        raise BuildError(f"{path} does not load: {error}") from error
    register.restype = ctypes.c_char_p
    if (problem := register()) is not None:
        raise BuildError(f"{path} does not run on this machine: {problem.decode()}")


def prebuilt_path(name: str) -> Path:
    """Return the path of the library in the package, built with `compile_library` (the file may not exist).

    Its name contains a hash of the sources, so a library of other sources is never loaded.
    """
    return PACKAGE / "ops" / f"{name}-{_hash_of_sources()}.so"


def library_in_cache(name: str) -> Path:
    """Return the library in the user's cache; if it is missing, one process builds it while the others wait."""
    command = _command(name)
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=False).stdout
    cache = _cache() / "vg" / "ops"
    path = cache / f"{name}-{_hash_of_sources(*command, version, torch.__version__)}.so"
    try:
        if path.exists():
            return path
        if os.environ.get("VG_BUILD") == "0":
            raise BuildError("VG_BUILD=0 forbids building the kernels, and no earlier build is in the cache.")
        if sys.platform == "win32":
            raise BuildError("There are no kernels for Windows yet; use Linux in WSL.")
        import fcntl

        cache.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed, even if the process dies
            if not path.exists():
                compile_library(name, path)
    except OSError as error:
        raise BuildError(
            f"The kernel cache cannot be read or written: {error}. Set XDG_CACHE_HOME to another folder."
        ) from error
    return path


def _cache() -> Path:
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder)
    try:
        return Path.home() / ".cache"
    except RuntimeError as error:  # a user without an entry in the password database, as in some containers
        raise BuildError(f"There is no folder for the kernel cache: {error} Set XDG_CACHE_HOME to a folder.") from error


def compile_library(name: str, path: Path) -> None:
    """Compile a library ("cpp", "cuda", "emulate") and move it to the path when it is complete."""
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        done = subprocess.run([*_command(name), "-o", str(unfinished)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise BuildError(f"The build of the kernels failed:\n{' '.join(done.args)}\n{done.stdout}{done.stderr}")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _command(name: str) -> list[str]:
    """Return the compiler's command line without -o."""
    sources = _sources()[0].parent
    host, kernels = str(sources / "deform_attn.cpp"), str(sources / "deform_attn.cu")
    torch_folder = Path(torch.__file__).parent
    # No rpath: torch has loaded its libraries before ours.
    torch_flags = [f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
    if name == "cuda":
        toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
        compiler = shutil.which("nvcc") or shutil.which("nvcc", path=toolkit / "bin")
        if not compiler:
            raise BuildError(
                f"nvcc was not found: install the CUDA toolkit {torch.version.cuda}, and set CUDA_HOME or PATH."
            )
        command = [compiler, *FLAGS, "-shared", "-DVG_WITH_CUDA", *_architectures(), "-Xcompiler", ",".join(HOST_FLAGS)]
        return [*command, host, kernels, *torch_flags, "-ltorch_cuda"]
    compiler = shutil.which("g++")
    if not compiler:
        raise BuildError("g++ was not found: install it (Debian, Ubuntu: apt install g++), version 9 or newer.")
    command = [compiler, *FLAGS, *HOST_FLAGS, "-shared"]
    command += [host] if name == "cpp" else ["-DVG_EMULATE", host, "-x", "c++", kernels, "-x", "none"]
    return [*command, *torch_flags]


def _architectures() -> Iterator[str]:
    """Yield nvcc's flags for the GPUs of this machine, or without a GPU those of a wheel."""
    devices = range(torch.cuda.device_count())
    for capability in sorted({torch.cuda.get_device_capability(device) for device in devices}) or WHEEL_CAPABILITIES:
        version = "".join(map(str, capability))
        yield f"-gencode=arch=compute_{version},code=[sm_{version},compute_{version}]"


def _sources() -> list[Path]:
    in_wheel = PACKAGE / "csrc"
    folder = in_wheel if in_wheel.exists() else PACKAGE.parent / "csrc"  # a checkout has it beside the package
    sources = sorted(path for path in folder.glob("*") if path.suffix in (".h", ".cuh", ".cpp", ".cu"))
    if not sources:
        raise BuildError(f"The sources of the kernels are missing from {folder}: install vg again.")
    return sources


def _hash_of_sources(*texts: str) -> str:
    """Return a hash of the kernels' sources and of further texts."""
    contents = [path.read_bytes() for path in _sources()] + [text.encode() for text in texts]
    return hashlib.sha256(b"\0".join(contents)).hexdigest()[:16]
