"""Compiled kernels are found, built once or replaced by the reference, with the reason reported."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vg.cli import main
from vg.errors import BuildError
from vg.ops import build

REPOSITORY = Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """An empty kernel cache; the implementation is selected again inside and after the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("VG_DEFORM_ATTN", raising=False)
    monkeypatch.delenv("VG_BUILD", raising=False)
    build.backend.cache_clear()
    yield monkeypatch
    build.backend.cache_clear()


def compiler(folder: Path, script: str) -> str:
    """Return a PATH whose only program is a g++ that runs this script; $out is the output file."""
    folder.mkdir()
    find_output = 'for word; do if [ "$before" = -o ]; then out=$word; fi; before=$word; done\n'
    (folder / "g++").write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{find_output}{script}\n")
    (folder / "g++").chmod(0o755)
    return str(folder)


def run(code: str, **environment: object) -> str:
    """Run code in a new process and return its output."""
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY), **{k: str(v) for k, v in environment.items()}}
    command = [sys.executable, "-c", code]
    # In "/", because Python searches the current folder for packages first.
    return subprocess.run(command, env=variables, cwd="/", capture_output=True, text=True, check=True).stdout


# Of one device: on a machine with a GPU, backend_info() would also build for it, wherever nvcc is.
BACKEND = "from vg.ops import build; b = build.backend('{}'); print(b.name, b.reason, sep='|')"
CPU = BACKEND.format("cpu")


# ---- compiled kernels ---------------------------------------------------------------------------------------------


@needs_compiler
def test_compiled_kernels_run_if_there_is_a_compiler() -> None:
    name = build.backend("cpu").name
    assert name == {"auto": "cpp"}.get(setting := os.environ.get("VG_DEFORM_ATTN", "auto"), setting)
    if name != "reference":
        for operator in ("deform_attn", "deform_attn_fused", "deform_attn_backward", "deform_attn_fused_backward"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"vg::{operator}", "CPU"), operator


@needs_compiler
def test_a_cached_library_loads_fast() -> None:
    build.library_in_cache("cpp")
    code = "import time, torch; start = time.perf_counter(); from vg.ops import build; build.backend('cpu'); "
    code += "print(time.perf_counter() - start)"
    assert float(run(code, VG_DEFORM_ATTN="cpp")) < 0.5  # 0.04 s on an idle machine


@needs_compiler
@pytest.mark.parametrize("compiled", ["", "torch.compile(fullgraph=True, backend='aot_eager')"])
def test_the_first_call_loads_the_kernels(compiled: str) -> None:
    build.library_in_cache("cpp")
    code = f"""
import torch, vg.ops
call = ({compiled or "lambda f: f"})(lambda *x: vg.ops.deform_attn(x[0], ((3, 4),), *x[1:]))
has = lambda: torch._C._dispatch_has_kernel_for_dispatch_key("vg::deform_attn", "CPU")
before = has()
call(torch.ones(1, 12, 2, 4), torch.rand(1, 5, 2, 1, 3, 2), torch.rand(1, 5, 2, 1, 3))
print(before, has())"""
    assert run(code, VG_DEFORM_ATTN="cpp") == "False True\n"


def test_a_required_library_that_fails_to_load_fails_every_call(tmp_path: Path) -> None:
    code = """
import torch, vg.ops
for _ in range(2):
    try:
        vg.ops.deform_attn(torch.ones(1, 1, 1, 1), ((1, 1),), torch.rand(1, 1, 1, 1, 1, 2), torch.rand(1, 1, 1, 1, 1))
    except vg.ops.BuildError:
        print("failed")"""
    assert run(code, VG_DEFORM_ATTN="cpp", XDG_CACHE_HOME=tmp_path, VG_BUILD=0) == "failed\n" * 2


def test_import_builds_nothing(tmp_path: Path) -> None:
    run("import vg.ops", XDG_CACHE_HOME=tmp_path, VG_DEFORM_ATTN="cpp")
    assert not list(tmp_path.iterdir())


def test_the_command_line_prints_the_implementation(
    capsys: pytest.CaptureFixture[str], fresh: pytest.MonkeyPatch
) -> None:
    fresh.setenv("VG_DEFORM_ATTN", "reference")
    main(["ops"])
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"deform_attn on {device}: reference (VG_DEFORM_ATTN=reference)" for device in ("cpu", "cuda")]


# ---- builds and prebuilt libraries --------------------------------------------------------------------------------


@needs_compiler
def test_two_processes_build_once(tmp_path: Path) -> None:
    library = build.library_in_cache("cpp")
    path = compiler(tmp_path / "bin", f"echo built >> {tmp_path}/log; sleep 1; cp {library} $out")
    path = compiler(tmp_path / "bin2", f'if [ "$1" = --version ]; then echo 1; else . {path}/g++; fi')
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY), "XDG_CACHE_HOME": str(tmp_path), "VG_DEFORM_ATTN": "cpp"}
    command = [sys.executable, "-c", CPU]
    both = [subprocess.Popen(command, env={**variables, "PATH": path}, stdout=subprocess.PIPE, text=True) for _ in "12"]
    outputs = [process.communicate()[0] for process in both]
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith(f"cpp|built from source: {tmp_path}")
    assert (tmp_path / "log").read_text() == "built\n"
    assert {x.suffix for x in (tmp_path / "vg" / "ops").iterdir()} == {".so", ".lock"}


def wheel_package(folder: Path) -> Path:
    """Write the package with the operators and their sources as in a wheel, without libraries, and return its path."""
    package = folder / "vg"
    shutil.copytree(REPOSITORY / "vg" / "ops", package / "ops", ignore=shutil.ignore_patterns("*.so"))
    shutil.copytree(REPOSITORY / "csrc", package / "csrc")
    (package / "__init__.py").touch()
    shutil.copy(REPOSITORY / "vg" / "errors.py", package)
    return package


@needs_compiler
def test_a_prebuilt_library_is_loaded_if_its_sources_match(tmp_path: Path) -> None:
    """In a package laid out like a wheel, the library is loaded only if it was built from the sources beside it."""
    package = wheel_package(tmp_path)
    prebuilt = package / "ops" / build.prebuilt_path("cpp").name
    shutil.copy(build.library_in_cache("cpp"), prebuilt)
    environment = {"PYTHONPATH": tmp_path, "XDG_CACHE_HOME": tmp_path / "cache", "VG_BUILD": "0"}
    assert run(CPU, **environment) == f"cpp|prebuilt: {prebuilt}\n"
    prebuilt.write_text("for another machine")
    assert run(CPU, **environment).startswith("reference|VG_BUILD=0")
    shutil.copy(build.library_in_cache("cpp"), prebuilt)
    with (package / "csrc" / "deform_attn.cpp").open("a") as file:
        file.write("// changed\n")
    assert run(CPU, **environment).startswith("reference|VG_BUILD=0")


WITH_A_GPU = """
import torch
torch.version.cuda = "13.0"
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
torch.cuda.get_device_capability = lambda device: (7, 0)
"""


def library(path: Path, result: str) -> Path:
    """Compile a library whose kernels run (`nullptr`) or do not run (the reason in quotes) on this machine."""
    code = f'extern "C" const char* deform_attn_register() {{ return {result}; }}'
    subprocess.run(["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", path], input=code, text=True, check=True)
    return path


@needs_compiler
def test_a_prebuilt_library_for_other_gpus_or_drivers_is_replaced(tmp_path: Path) -> None:
    prebuilt = wheel_package(tmp_path) / "ops" / build.prebuilt_path("cuda").name
    library(prebuilt, '"no kernel image is available"')
    built = library(tmp_path / "built.so", "nullptr")
    path = compiler(tmp_path / "bin", f"cp {built} $out")
    (tmp_path / "bin" / "g++").rename(tmp_path / "bin" / "nvcc")
    environment = {"PYTHONPATH": tmp_path, "XDG_CACHE_HOME": tmp_path / "cache", "PATH": path}
    why = f"{prebuilt} does not run on this machine: no kernel image is available"
    code = WITH_A_GPU + BACKEND.format("cuda")
    name, reason = run(code, **environment, VG_BUILD=0).strip().split("|")
    assert name == "reference"
    assert reason.startswith("VG_BUILD=0")
    assert reason.endswith(why)
    name, reason = run(code, **environment).strip().split("|")
    assert name == "cuda"
    assert reason.startswith(f"built from source: {tmp_path}")
    assert reason.endswith(why)
    library(prebuilt, "nullptr")
    assert run(code, **environment) == f"cuda|prebuilt: {prebuilt}\n"


@needs_compiler
def test_kernels_that_do_not_run_are_not_used(tmp_path: Path) -> None:
    """A toolkit newer than the driver builds kernels that fail at every call."""
    built = library(tmp_path / "built.so", '"the driver is too old"')
    path = compiler(tmp_path / "bin", f"cp {built} $out")
    (tmp_path / "bin" / "g++").rename(tmp_path / "bin" / "nvcc")
    output = run(WITH_A_GPU + BACKEND.format("cuda"), XDG_CACHE_HOME=tmp_path / "cache", PATH=path)
    assert output.startswith("reference|")
    assert output.endswith("does not run on this machine: the driver is too old\n")


# ---- no library ---------------------------------------------------------------------------------------------------


def test_a_failed_build_warns_once_with_the_compiler_output(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setenv("PATH", compiler(tmp_path / "bin", "echo 'error: no such luck' >&2; exit 1"))
    with pytest.warns(UserWarning, match="(?s)slow.*deform_attn.cpp.*error: no such luck"):
        assert build.backend("cpu").name == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "no such luck" in build.backend("cpu").reason
    assert not list((tmp_path / "cache").rglob("*.so"))
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_a_named_implementation_that_fails_is_an_error(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setenv("PATH", compiler(tmp_path / "bin", "echo 'error: no such luck' >&2; exit 1"))
    for name in ("cpp", "emulate"):
        fresh.setenv("VG_DEFORM_ATTN", name)
        with pytest.raises(BuildError, match="no such luck"):
            build.backend("cpu")
    with pytest.raises(SystemExit, match="no such luck"):
        main(["ops"])
    fresh.setenv("VG_DEFORM_ATTN", "fast")
    with pytest.raises(BuildError, match="must be one of auto, reference, cpp, emulate"):
        build.backend("cpu")


def test_a_library_that_does_not_load_is_named_in_the_warning(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setenv("PATH", compiler(tmp_path / "bin", "echo nonsense > $out"))
    with pytest.warns(UserWarning, match=r"cpp-\w+\.so does not load"):
        assert build.backend("cpu").name == "reference"


def test_without_a_compiler_the_reference_runs(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setenv("PATH", str(tmp_path))
    with pytest.warns(UserWarning, match=r"g\+\+ was not found: install it"):
        assert build.backend("cpu").name == "reference"


def test_an_unwritable_cache_is_reported(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    fresh.setenv("PATH", compiler(tmp_path / "bin", "exit 1"))
    with pytest.warns(UserWarning, match="Set XDG_CACHE_HOME to another folder"):
        assert build.backend("cpu").name == "reference"


def test_a_cache_that_cannot_be_read_is_reported(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("XDG_CACHE_HOME", f"/{300 * 'x'}")  # any access is an OSError, as without permission, which root has
    with pytest.warns(UserWarning, match="cannot be read or written.*Set XDG_CACHE_HOME to another folder"):
        assert build.backend("cpu").name == "reference"


def test_an_unknown_home_folder_is_reported(fresh: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    fresh.delenv("XDG_CACHE_HOME")
    fresh.setattr(Path, "home", home)
    with pytest.warns(UserWarning, match="Could not determine home directory. Set XDG_CACHE_HOME to a folder"):
        assert build.backend("cpu").name == "reference"


def test_vg_build_0_disables_building(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setenv("VG_BUILD", "0")
    fresh.setenv("PATH", compiler(tmp_path / "bin", "exit 1"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build.backend("cpu").reason.startswith("VG_BUILD=0")
    build.backend.cache_clear()
    fresh.setenv("VG_DEFORM_ATTN", "cpp")
    with pytest.raises(BuildError, match="VG_BUILD=0"):
        build.backend("cpu")


def test_other_devices_run_the_reference() -> None:
    assert build.backend("meta").name == "reference"


# ---- CUDA ---------------------------------------------------------------------------------------------------------


NO_GPU = """
import ctypes, pathlib, sys, torch, vg.ops
from vg.ops import build
ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
try:
    build._register(pathlib.Path(sys.argv[2]))
except vg.ops.BuildError as error:
    print(error)
print(torch._C._dispatch_has_kernel_for_dispatch_key("vg::deform_attn", "CUDA"))
"""


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
def test_the_cuda_library_compiles_and_is_refused_without_a_gpu(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """For sm_90, without a GPU; a CPU build of torch has no libtorch_cuda, which is then not linked."""
    fresh.setattr(build, "WHEEL_CAPABILITIES", ((9, 0),))
    command = build._command("cuda")
    if not torch.version.cuda:
        command.remove("-ltorch_cuda")
    fresh.setattr(build, "_command", lambda name: command)
    path = tmp_path / "cuda.so"
    build.compile_library("cuda", path)
    assert path.stat().st_size > 100_000
    stream = tmp_path / "stream.so"  # the function of libtorch_cuda that the library calls
    code = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }'
    subprocess.run(["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", stream], input=code, text=True, check=True)
    command = [sys.executable, "-c", NO_GPU, str(stream), str(path)]
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    output = subprocess.run(command, env=variables, cwd="/", capture_output=True, text=True, check=True).stdout
    assert output.startswith(f"{path} does not run on this machine: ")
    assert output.endswith("\nFalse\n"), "kernels that do not run are registered"
