"""What this machine offers: cores, free memory, how the C library hands it out, and the fastest matrix products."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt, from malloc.h
SHORT = 100  # tokens up to which attention by two products is faster, see scripts/benchmarks/short_attention.py


def num_cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_ram(root: Path = Path("/")) -> int:
    """Return the bytes of RAM that are available without swapping, at most what a container or job has left."""
    import psutil  # not to delay `vg --help`

    groups = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    own = next((groups / line[3:].strip("/") for line in lines if line.startswith("0::")), groups)
    files = [(folder / "memory.max", folder / "memory.current") for folder in (own, *own.parents)]
    files.append((groups / "memory/memory.limit_in_bytes", groups / "memory/memory.usage_in_bytes"))
    pairs = [[file.read_text().strip() for file in pair] for pair in files if all(file.is_file() for file in pair)]
    free = [max(0, int(limit) - int(used)) for limit, used in pairs if limit.isdigit()]  # "max": no limit
    return min([psutil.virtual_memory().available, *free])


def size_text(num_bytes: float) -> str:
    """Return a size for a message in units of 1000, as those of disks: "5.30 GB", "12.1 MB", "0.03 MB"."""
    if num_bytes >= 1e9:
        return f"{num_bytes / 1e9:.2f} GB"
    return f"{num_bytes / 1e6:.{1 if num_bytes >= 1e7 else 2}f} MB"


def reuse_freed_memory() -> bool:
    """Let this program keep the memory of freed tensors, for training on a CPU; call it before torch is imported.

    glibc returns each large tensor to the system when it is freed, and every page of the next one is a page fault: up
    to millions in a training step. Instead, freed memory stays in the heap, in pages of 2 MiB where the system has them
    (`scripts/benchmarks/cpu_settings.py` measures both). Variables MALLOC_* and THP_MEM_ALLOC_ENABLE of the environment
    take precedence.

    Returns:
        Whether the C library is glibc and accepted it.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch
    if platform.libc_ver()[0] != "glibc" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def use_fast_products() -> bool:
    """Compute float32 matrix products on CPUs of AMD with oneDNN instead of MKL; for programs without a GPU.

    MKL, the default of torch, has its fastest kernels for CPUs of Intel; on others oneDNN is faster
    (`scripts/benchmarks/cpu_settings.py` measures training steps with both). torch has it under a setting that also
    permits products of bfloat16, which oneDNN uses where a CPU has matrix units (AMX): a product computed here shows
    that precision is kept. Attention multiplies whole sequences if they are short; else torch multiplies small blocks,
    with MKL, because oneDNN takes up to ten times as long for these. While oneDNN is used,
    torch.get_float32_matmul_precision raises an error.

    Returns:
        Whether oneDNN is used.
    """
    if not _is_amd():
        return False
    import torch
    from torch.nn import functional as F

    if torch.cuda.is_available() or not torch.backends.mkldnn.is_available():
        return False
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    if setting.fp32_precision == "bf16":
        return True  # after an earlier call
    before, setting.fp32_precision = setting.fp32_precision, "bf16"
    a = torch.linspace(-1, 1, 2**18).sin().view(512, 512)
    if not torch.allclose((a @ a).double(), a.double() @ a.double(), rtol=0, atol=1e-2):  # bfloat16: 0.3
        setting.fp32_precision = before
        return False
    # Layers of torch and transformers call it, too.
    F.scaled_dot_product_attention = _fast_attention(F.scaled_dot_product_attention, setting, before)
    return True


def _fast_attention(attention: Callable[..., Tensor], setting: Any, precision: str) -> Callable[..., Tensor]:
    """Return an attention function that uses oneDNN for short sequences only, in the backward pass, too."""
    import torch

    def use_mkl(*_: Any) -> None:
        setting.fp32_precision = precision

    def use_onednn(*_: Any) -> None:
        setting.fp32_precision = "bf16"

    @wraps(attention)
    def call(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        if torch.compiler.is_compiling():
            return attention(query, key, value, attn_mask, *args, **kwargs)
        if not any(args) and not any(kwargs.values()) and _is_short(query, key, value, attn_mask):
            return _short_attention(query, key, value, attn_mask)
        use_mkl()
        try:
            x = attention(query, key, value, attn_mask, *args, **kwargs)
        finally:
            use_onednn()
        if x.grad_fn is not None:
            x.grad_fn.register_prehook(use_mkl)
            x.grad_fn.register_hook(use_onednn)
        return x

    return call


def _is_short(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether `_short_attention` can and should compute this."""
    import torch

    if query.device.type != "cpu" or query.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    if query.dim() != 4 or not query.shape[:2] == key.shape[:2] == value.shape[:2]:
        return False
    if max(query.shape[2], key.shape[2]) > SHORT:
        return False
    # The softmax of a query without any key would be NaN.
    return mask is None or (mask.dtype == torch.bool and mask.dim() == 4 and bool(mask.any(dim=-1).all()))


def _short_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Return attention [B, heads, Q, D] of queries [B, heads, Q, D], keys and values [B, heads, S, D].

    As `vg.export.tracing` has it for a graph, but faster: the mask is part of the first product.

    mask: [B, heads, Q, S] bool or broadcast to it, False = no attention.
    """
    import torch

    q, k, v = (x.flatten(0, 1) for x in (query, key, value))  # [B heads, Q or S, D]
    scale = query.shape[-1] ** -0.5
    if mask is None:
        scores = torch.bmm(q * scale, k.mT)  # [B heads, Q, S]
    else:
        bias = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)
        bias = bias.expand(*query.shape[:2], -1, -1).flatten(0, 1)  # [B heads, Q or 1, S]
        scores = torch.baddbmm(bias, q, k.mT, alpha=scale)
    return torch.bmm(scores.softmax(dim=-1), v).unflatten(0, query.shape[:2])


def _is_amd(root: Path = Path("/")) -> bool:
    try:
        text = (root / "proc/cpuinfo").read_text()
    except OSError:  # not Linux
        text = platform.processor()
    return "AuthenticAMD" in text
