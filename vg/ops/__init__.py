"""Operators: deformable attention with a PyTorch reference and compiled kernels for CPU and CUDA."""

from __future__ import annotations

from vg.errors import BuildError
from vg.ops.build import Backend, backend_info
from vg.ops.deform_attn import deform_attn, deform_attn_fused
from vg.ops.patch import patch_transformers

__all__ = ["Backend", "BuildError", "backend_info", "deform_attn", "deform_attn_fused", "patch_transformers"]
