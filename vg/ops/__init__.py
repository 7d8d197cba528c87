"""Operators: deformable attention with a PyTorch reference and compiled kernels for CPU and CUDA."""

from __future__ import annotations

from vg.ops.deform_attn import deform_attn, deform_attn_fused

__all__ = ["deform_attn", "deform_attn_fused"]
