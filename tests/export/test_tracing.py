"""What is replaced during tracing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from vg import machine
from vg.export import tracing


def test_attention_is_replaced_where_it_has_a_wrapper(monkeypatch: pytest.MonkeyPatch) -> None:
    replaced: list[Any] = []
    monkeypatch.setattr(tracing, "_attention", lambda query, *_: replaced.append(query) or query)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # as in an export
    query = torch.randn(1, 2, 5, 8)
    for wrap in (False, True):
        if wrap:
            wrapper = machine._fast_attention(F.scaled_dot_product_attention, SimpleNamespace(), "none")
            monkeypatch.setattr(F, "scaled_dot_product_attention", wrapper)
        with tracing.traceable("gather"):
            F.scaled_dot_product_attention(query, query, query)
    assert len(replaced) == 2
