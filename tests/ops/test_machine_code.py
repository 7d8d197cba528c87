"""The CUDA kernels as machine code of sm_90: nothing spills, and no load or store of a vector is split."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from collections import Counter
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "csrc"
STORE = "STG"
# Bits 0-11 of an instruction of 16 bytes.
OPCODES = {0x981: "LDG", 0x986: STORE, 0x98E: "RED", 0x9A6: "RED", 0x947: "BRA", 0x918: "NOP"}
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 8, 6: 16}  # bytes of a load or store by bits 73-75

pytestmark = pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Counter[str]], str]:
    """Return the instructions of each kernel by name, loads and stores with their bytes, and what ptxas reports."""
    cubin = tmp_path_factory.mktemp("sm_90") / "deform_attn.cubin"
    command = ["nvcc", "-O3", "-std=c++17", "-cubin", "-arch=sm_90", "-Xptxas", "-v", "-o", str(cubin)]
    report = subprocess.run([*command, str(SOURCES / "deform_attn.cu")], capture_output=True, text=True, check=True)
    return {name: count(code) for name, code in kernels_of(cubin.read_bytes())}, report.stderr


def kernels_of(elf: bytes) -> list[tuple[str, bytes]]:
    """Return name and machine code of the kernels, which are the sections .text.NAME."""
    (start,) = struct.unpack_from("<Q", elf, 0x28)
    size, number, names = struct.unpack_from("<HHH", elf, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", elf, start + i * size) for i in range(number)]
    found = []
    for name, _, _, _, offset, length in sections:
        first = sections[names][4] + name
        text = elf[first : elf.index(b"\0", first)].decode()
        if text.startswith(".text."):
            found.append((text[6:], elf[offset : offset + length]))
    return found


def count(code: bytes) -> Counter[str]:
    found: Counter[str] = Counter()
    for low, high in struct.iter_unpack("<QQ", code):
        name = OPCODES.get(low & 0xFFF, "other")
        found[f"{name}.{SIZES[high >> 9 & 7]}" if name in ("LDG", STORE) else name] += 1
    return found


def published(kernels: dict[str, Counter[str]], kind: str, dtype: str) -> list[Counter[str]]:
    """Return the kernels for 4 levels, 4 points and 32 channels, plain and fused; `dtype` as in mangled names."""
    pattern = rf"{kind}INS_3CutI(NS_)?{dtype}Li\dELi\dELi4ELi4ELb"
    found = [instructions for name, instructions in kernels.items() if re.search(pattern, name)]
    assert len(found) == 2
    return found


def test_no_kernel_spills(compiled: tuple[dict[str, Counter[str]], str]) -> None:
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", compiled[1])
    assert len(spills) == len(compiled[0])
    assert set(spills) == {("0", "0")}


@pytest.mark.parametrize("dtype", ["f", "4HalfE", "6BFloatE"])
@pytest.mark.parametrize("kind", ["14forward_kernel", "15backward_kernel"])
def test_vectors_are_stored_whole(kind: str, dtype: str, compiled: tuple[dict[str, Counter[str]], str]) -> None:
    for instructions in published(compiled[0], kind, dtype):
        assert instructions["STG.1"] == instructions["STG.2"] == 0
        assert instructions["STG.16"] > 0
        assert instructions["LDG.16"] >= 8


@pytest.mark.parametrize("dtype", ["4HalfE", "6BFloatE"])
def test_sums_are_rounded_8_at_a_time(dtype: str, compiled: tuple[dict[str, Counter[str]], str]) -> None:
    pattern = rf"17round_sums_kernelINS_{dtype}Li8E"
    (kernel,) = [found for name, found in compiled[0].items() if re.search(pattern, name)]
    assert (kernel["LDG.16"], kernel["STG.16"]) == (2, 1)


@pytest.mark.parametrize("kind", ["14forward_kernel", "15backward_kernel"])
def test_float16_costs_what_bfloat16_costs(kind: str, compiled: tuple[dict[str, Counter[str]], str]) -> None:
    pairs = zip(published(compiled[0], kind, "4HalfE"), published(compiled[0], kind, "6BFloatE"), strict=True)
    for half, brain in pairs:
        assert half.total() < 1.05 * brain.total()


def test_corners_outside_are_read_without_branches(compiled: tuple[dict[str, Counter[str]], str]) -> None:
    plain, fused = published(compiled[0], "15backward_kernel", "6BFloatE")
    assert plain["BRA"] <= 50  # a branch around each load: 16 more
    assert fused["BRA"] <= 66


# Instructions of the kernels, plain and fused. Address arithmetic, a division or an exponential per point exceed them.
LONGEST = {
    ("14forward_kernel", "f"): (520, 785),
    ("14forward_kernel", "6BFloatE"): (990, 1370),
    ("15backward_kernel", "f"): (860, 1220),
    ("15backward_kernel", "6BFloatE"): (1960, 2445),
}


@pytest.mark.parametrize(("kind", "dtype"), LONGEST)
def test_kernels_stay_short(kind: str, dtype: str, compiled: tuple[dict[str, Counter[str]], str]) -> None:
    for instructions, most in zip(published(compiled[0], kind, dtype), LONGEST[kind, dtype], strict=True):
        assert instructions.total() - instructions["NOP"] <= most
