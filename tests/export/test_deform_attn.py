"""The forms of deformable attention in exported programs equal vg's operator."""

from __future__ import annotations

import pytest
import torch

import vg.ops
from vg.export.deform_attn import Form, deform_attn_fused


@pytest.mark.parametrize("form", ["gather", "grid-sample"])
@pytest.mark.parametrize("references", [(1, 2), (1, 4), (2, 2), (2, 4)], ids=str)
def test_forms_equal_the_operator(form: Form, references: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes, B, Q, H, P, D = ((6, 9), (3, 5)), 2, 7, 3, 2, 4
    value = torch.randn(B, 69, H, D, generator=generator)
    points = torch.rand(B, Q, *references, generator=generator)
    offsets = 3 * torch.randn(B, Q, H, 2, P, 2, generator=generator)  # many points are outside
    logits = torch.randn(B, Q, H, 2 * P, generator=generator)
    expected = vg.ops.deform_attn_fused(value, shapes, points, offsets, logits)
    found = deform_attn_fused(form, value, (6, 9, 3, 5), points, offsets, logits)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
