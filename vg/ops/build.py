"""Compiled kernels: those of the wheel, or built once into the user's cache, or none and a warning that says why.

Environment:
    VG_DEFORM_ATTN   auto (default) | reference | cpp | emulate: what runs on CPU tensors. reference holds for CUDA
                     tensors too; emulate is the CUDA source compiled for the CPU, for tests. What is named must work.
    VG_BUILD         0: compile nothing
    XDG_CACHE_HOME   where vg/ops/ with the built libraries lies (default ~/.cache)
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from vg.errors import BuildError

SETTINGS = ("auto", "reference", "cpp", "emulate")
PACKAGE = Path(__file__).parents[1]
# Not -ffast-math: NaN and infinity have a meaning here. The stable ABI of torch 2.10 lets one library serve later ones.
FLAGS = ("-O3", "-std=c++17", "-DTORCH_TARGET_VERSION=0x020a000000000000")
WHEEL_CAPABILITIES = ((8, 0), (9, 0), (10, 0), (12, 0))  # of the GPUs for which a wheel is made
HOST_FLAGS = ("-fPIC", "-fno-math-errno", "-fno-trapping-math")


@dataclass(frozen=True)
class Backend:
    name: str  # reference, cpp, emulate or cuda
    reason: str


def backend_info() -> dict[str, Backend]:
    """Which implementation runs on the tensors of each kind of device, and why. Builds it if that is due."""
    return {device: backend(device) for device in ("cpu", "cuda")}


@functools.cache
def backend(device: str) -> Backend:
    """What runs on the tensors of a kind of device ("cpu", "cuda"): finds, builds and loads it at the first call."""
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
        if os.environ.get("VG_BUILD") != "0":  # or the user knows
            warnings.warn(f"deformable attention on {device} runs in PyTorch, which is slow. {error}", stacklevel=2)
        return Backend("reference", str(error))


def _load(name: str) -> str:
    """Load a library into torch; where it came from."""
    prebuilt = prebuilt_path(name)
    if prebuilt.exists():
        try:
            torch.ops.load_library(prebuilt)
            return f"prebuilt: {prebuilt}"
        except OSError:  # made for a newer system: build one for this
            pass
    path = library_in_cache(name)
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise BuildError(f"{path} does not load: {error}") from error
    return f"built from source: {path}"


def prebuilt_path(name: str) -> Path:
    """Where the package holds a library that was made with `compile_library` (it need not exist).

    Its name tells its sources: after a change of the sources it is not found instead of being wrong.
    """
    return PACKAGE / "ops" / f"{name}-{_digest(*map(Path.read_bytes, _sources()))}.so"


def library_in_cache(name: str) -> Path:
    """The library in the user's cache, built if it is not there; one process builds, the others wait."""
    command, version = _command(name)
    sources = [path.read_bytes() for path in _sources()]
    key = _digest(*sources, *map(str.encode, (*command, version, torch.__version__)))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vg" / "ops"
    path = cache / f"{name}-{key}.so"
    if path.exists():
        return path
    if os.environ.get("VG_BUILD") == "0":
        raise BuildError("VG_BUILD=0 forbids to build it, and it was not built before.")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            if not path.exists():
                compile_library(name, path)
    except OSError as error:
        raise BuildError(f"Its cache cannot be written: {error}. Set XDG_CACHE_HOME to another folder.") from error
    return path


def compile_library(name: str, path: Path) -> None:
    """Compile one of the libraries ("cpp", "cuda", "emulate"); it appears at the path all at once."""
    command, _ = _command(name)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise BuildError(f"Its build failed:\n{' '.join(done.args)}\n{done.stdout}{done.stderr}")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _command(name: str) -> tuple[list[str], str]:
    """The compiler's command line without -o, and the compiler's version."""
    sources = _sources()[0].parent
    host, kernels = str(sources / "deform_attn.cpp"), str(sources / "deform_attn.cu")
    torch_folder = Path(torch.__file__).parent
    # No rpath: torch's libraries are in the process before ours.
    torch_flags = [f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
    if name == "cuda":
        toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
        compiler = shutil.which("nvcc") or shutil.which("nvcc", path=toolkit / "bin")
        if not compiler:
            raise BuildError(
                f"nvcc was not found: install the CUDA toolkit {torch.version.cuda}, and set CUDA_HOME or PATH."
            )
        command = [compiler, *FLAGS, "-shared", "-DVG_WITH_CUDA", *_architectures(), "-Xcompiler", ",".join(HOST_FLAGS)]
        command += [host, kernels, *torch_flags, "-ltorch_cuda"]
        return command, _output(compiler, "--version")
    compiler = shutil.which("g++")
    if not compiler:
        raise BuildError("g++ was not found: install it (Debian, Ubuntu: apt install g++), version 9 or newer.")
    command = [compiler, *FLAGS, *HOST_FLAGS, "-shared"]
    command += [host] if name == "cpp" else ["-DVG_EMULATE", host, "-x", "c++", kernels, "-x", "none"]
    return [*command, *torch_flags], _output(compiler, "-dumpfullversion")


def _architectures() -> Iterator[str]:
    """nvcc's flags for the GPUs of this machine; all that the kernels know where there is none (to make a wheel)."""
    devices = range(torch.cuda.device_count())
    for capability in sorted({torch.cuda.get_device_capability(device) for device in devices}) or WHEEL_CAPABILITIES:
        number = "".join(map(str, capability))
        yield f"-gencode=arch=compute_{number},code=[sm_{number},compute_{number}]"


def _sources() -> list[Path]:
    inside = PACKAGE / "csrc"  # in a wheel; in a checkout the folder lies beside the package
    folder = inside if inside.exists() else PACKAGE.parent / "csrc"
    sources = sorted(path for path in folder.glob("*") if path.suffix in (".h", ".cuh", ".cpp", ".cu"))
    if not sources:
        raise BuildError(f"Its sources are not in {folder}: install vg again.")
    return sources


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    if sys.platform == "win32":
        raise BuildError("There are no kernels for Windows yet; they run in its Linux (WSL).")
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # ends with the file, also when the process dies
        yield
