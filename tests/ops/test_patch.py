"""The detectors of transformers have equal outputs with our operator, and their own operator after `restore`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vg.ops import patch, patch_transformers

DETR = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_queries": 6,
}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}
TEXT = {
    "model_type": "bert",
    "vocab_size": 1100,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def _grounding_dino(name: str) -> tuple[nn.Module, dict[str, Any]]:
    import transformers

    swin = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 4], "window_size": 4, "image_size": 64}
    swin["out_indices"] = [2, 3, 4]
    backbone = transformers.SwinConfig(**swin)
    text = transformers.BertConfig(**{k: v for k, v in TEXT.items() if k != "model_type"})
    config = getattr(transformers, f"{name}Config")(backbone_config=backbone, text_config=text, **DETR)
    text_input = {"input_ids": torch.tensor([[101, 1063, 1064, 1012, 102]])}
    return getattr(transformers, f"{name}ForObjectDetection")(config), text_input


def _deformable_detr() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(**RESNET, out_features=["stage2", "stage3", "stage4"])
    config = DeformableDetrConfig(
        use_timm_backbone=False, backbone=None, use_pretrained_backbone=False, backbone_config=backbone, **DETR
    )
    return DeformableDetrForObjectDetection(config), {}


def _rt_detr(name: str, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    import transformers

    backbone = transformers.RTDetrResNetConfig(**RESNET, out_features=["stage2", "stage3", "stage4"])
    sizes = {**DETR, "encoder_hidden_dim": 32, "encoder_in_channels": [16, 24, 32], "feat_strides": [8, 16, 32]}
    sizes |= {
        "decoder_in_channels": [32, 32, 32],
        "anchor_image_size": None,
        "num_denoising": 0,
        "hidden_expansion": 0.5,
    }
    config = getattr(transformers, f"{name}Config")(backbone_config=backbone, **sizes, **options)
    return getattr(transformers, f"{name}ForObjectDetection")(config), {}


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "grounding_dino": lambda: _grounding_dino("GroundingDino"),
    "mm_grounding_dino": lambda: _grounding_dino("MMGroundingDino"),
    "deformable_detr": _deformable_detr,
    "rt_detr": lambda: _rt_detr("RTDetr"),
    "rt_detr_v2": lambda: _rt_detr("RTDetrV2"),
    "rt_detr_v2_discrete": lambda: _rt_detr("RTDetrV2", decoder_method="discrete"),
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of the values of all calls of our operator."""
    seen: list[torch.Size] = []
    original = patch.deform_attn

    def count(value: Tensor, *rest: Any) -> Tensor:
        seen.append(value.shape)
        return original(value, *rest)

    monkeypatch.setattr(patch, "deform_attn", count)
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_patched_models_have_equal_outputs_and_gradients(name: str, calls: list[torch.Size]) -> None:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    for parameter in model.parameters():  # also those initialized to zero, such as offsets
        nn.init.normal_(parameter, std=0.05) if parameter.dim() > 1 else None
    model.eval()
    inputs = {"pixel_values": torch.randn(1, 3, 64, 96), **inputs}

    def run() -> tuple[Tensor, Tensor, list[Tensor | None]]:
        model.zero_grad()
        output = model(**inputs)
        logits = output.logits.nan_to_num(neginf=0)
        (logits.sum() + output.pred_boxes.square().sum()).backward()
        return logits, output.pred_boxes, [p.grad for p in model.parameters()]

    expected = run()
    assert not calls
    with patch_transformers():
        found = run()
    assert bool(calls) == (name != "rt_detr_v2_discrete")
    torch.testing.assert_close(found[:2], expected[:2], rtol=1e-5, atol=1e-5)
    scale = max(float(grad.abs().max()) for grad in expected[2] if grad is not None)
    for one, other in zip(found[2], expected[2], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * scale)
    calls.clear()
    run()
    assert not calls  # restored


def test_half_precision_models(calls: list[torch.Size]) -> None:
    torch.manual_seed(0)
    model, inputs = MODELS["deformable_detr"]()
    model.bfloat16().eval()
    with patch_transformers(), torch.no_grad():
        output = model(pixel_values=torch.randn(1, 3, 64, 96, dtype=torch.bfloat16), **inputs)
    assert calls
    assert output.pred_boxes.isfinite().all()


def test_patch_by_call_and_as_context_manager_restores() -> None:
    def functions() -> list[Any]:
        modules = [importlib.import_module(f"transformers.models.{x}.modeling_{x}") for x in patch.FAMILIES]
        return [m.MultiScaleDeformableAttention.forward for m in modules[:-1]] + [
            modules[-1].multi_scale_deformable_attention_v2
        ]

    before = functions()
    done = patch_transformers()
    assert all(one is not other for one, other in zip(functions(), before, strict=True))
    with pytest.raises(KeyError), patch_transformers():  # patched twice, and an exception inside
        raise KeyError
    assert all(one is not other for one, other in zip(functions(), before, strict=True))
    done.restore()
    done.restore()
    assert functions() == before


def test_a_missing_function_of_transformers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.rt_detr import modeling_rt_detr

    monkeypatch.delattr(modeling_rt_detr, "MultiScaleDeformableAttention")
    from transformers.models.grounding_dino.modeling_grounding_dino import MultiScaleDeformableAttention as First

    before = First.forward
    with pytest.raises(ImportError, match=r"modeling_rt_detr of transformers .* has no MultiScaleDeformableAttention"):
        patch_transformers()
    assert First.forward is before
