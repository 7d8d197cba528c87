"""The memory of the machine and the matrix products of its CPU."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch.nn import functional as F

from vg import machine
from vg.machine import _is_amd, available_ram, size_text


def test_sizes_are_in_units_of_1000() -> None:
    sizes = (0, 12_130_000, 999_900_000, 1e9, 24_200_000_000)
    assert [size_text(size) for size in sizes] == ["0.00 MB", "12.1 MB", "999.9 MB", "1.00 GB", "24.20 GB"]


def test_the_limit_of_a_container_counts(tmp_path: Path) -> None:
    free = psutil.virtual_memory().available

    def limited(name: str, limit: str) -> int:
        file = tmp_path / "sys/fs/cgroup" / name
        used = file.with_name({"memory.max": "memory.current"}.get(file.name, "memory.usage_in_bytes"))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{limit}\n")
        used.write_text("300\n")
        found = available_ram(tmp_path)
        file.unlink()
        return found

    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/job\n0::/slurm/job\n")
    for name in ("memory.max", "slurm/memory.max", "slurm/job/memory.max", "memory/memory.limit_in_bytes"):
        assert limited(name, "1000") == 700
        assert limited(name, "200") == 0
    assert limited("memory.max", "max") > free / 2
    assert available_ram(tmp_path / "missing") > free / 2


STEPS = """
import resource, sys
from vg.machine import reuse_freed_memory

if sys.argv[1] == "reuse":
    assert reuse_freed_memory()
import torch

for _ in range(8):  # the heap grows at first
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(2**24) for _ in range(4)]
    tensors.clear()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="these are settings of glibc")
def test_freed_memory_is_used_again() -> None:
    def faults(mode: str) -> int:
        command = [sys.executable, "-c", STEPS, mode]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert faults("plain") > 10 * faults("reuse")


PRODUCTS = """
import json, platform, sys
from pathlib import Path
import torch
import vg.machine

torch.manual_seed(0)
a, b = torch.randn(300, 200), torch.randn(200, 400)
exact = a.double() @ b.double()
query = torch.randn(2, 4, 150, 16, requires_grad=True)
layer = torch.nn.MultiheadAttention(16, 2)
setting, seen = torch.backends.mkldnn.matmul, []

def results():
    attended = torch.nn.functional.scaled_dot_product_attention(query, query, query)
    attended.grad_fn.register_prehook(lambda *_: seen.append(setting.fp32_precision))
    (gradient,) = torch.autograd.grad(attended.square().sum(), query)
    layer(*[query[0]] * 3, need_weights=False)[0].sum().backward()
    seen.append(setting.fp32_precision)
    return float((a @ b - exact).abs().max()), torch.stack((attended, gradient)).detach()

before, attended = results()
if sys.argv[1] == "amd":
    vg.machine._is_amd = lambda: True
used = vg.machine.use_fast_products()
assert vg.machine.use_fast_products() == used
after, again = results()
compiled = torch.compile(torch.nn.functional.scaled_dot_product_attention, backend="eager")(query, query, query)
difference = max(float((again - attended).abs().max()), float((compiled - attended[0]).abs().max()))
print(json.dumps([used, before, after, difference, seen]))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="these settings are for machines without a GPU")
@pytest.mark.parametrize("maker", ["amd", "this"])
def test_fast_products_keep_their_precision(maker: str) -> None:
    command = [sys.executable, "-c", PRODUCTS, maker]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used, before, after, difference, precisions = json.loads(lines)
    assert after < 2 * before  # in bfloat16 it would be 1,000 times as much
    assert difference < 1e-5
    default, after_attention, in_backward, last = precisions
    assert default == after_attention == in_backward != "bf16"  # attention has no products of oneDNN
    assert last == ("bf16" if used else default)  # not on a CPU of another maker, or that would compute in bfloat16


def test_attention_of_short_sequences_equals_that_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = F.scaled_dot_product_attention
    fast = machine._fast_attention(attention, SimpleNamespace(), "ieee")
    calls: list[tuple[Any, ...]] = []
    short = machine._short_attention
    monkeypatch.setattr(machine, "_short_attention", lambda *inputs: calls.append(inputs) or short(*inputs))
    rows = torch.rand(3, 4, 20, 20) > 0.5
    rows[..., 0] = True
    without_key = rows.clone()
    without_key[1, 2, 3] = False
    # Without a key, with biases, in causal order or with another scale, torch computes it.
    cases: list[tuple[dict[str, Any], int]] = [
        ({}, 1),
        *(({"attn_mask": mask}, 1) for mask in (rows, rows[:, :1], rows[:, :1, :1])),
        *(({"attn_mask": mask}, 0) for mask in (without_key, torch.randn(3, 4, 20, 20))),
        *(({"is_causal": True}, 0), ({"scale": 0.5}, 0)),
    ]
    for options, expected in cases:
        inputs = [torch.randn(3, 4, 20, size, requires_grad=True) for size in (16, 16, 8)]
        calls.clear()
        results = []
        for function in (attention, fast):
            attended = function(*inputs, **options)
            results.append((attended, *torch.autograd.grad(attended.sin().sum(), inputs)))
        assert len(calls) == expected
        for correct, found in zip(*results, strict=True):
            torch.testing.assert_close(found, correct, rtol=0, atol=1e-5)
    long = torch.randn(1, 1, machine.SHORT + 1, 8)
    calls.clear()
    assert torch.equal(fast(long, long, long), attention(long, long, long))
    assert not calls


def test_the_maker_of_the_cpu_is_read_from_the_system(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    for maker, expected in (("AuthenticAMD", True), ("GenuineIntel", False)):
        (tmp_path / "proc/cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {maker}\n")
        assert _is_amd(tmp_path) is expected
