"""The recipes: models can be built, and settings equal those published with the quoted results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vg.config import RunConfig, load_config
from vg.data.detection.coco import CocoConfig
from vg.data.mixture import MixtureConfig
from vg.data.synthetic.glyphs import GlyphsConfig
from vg.models.grounding_dino.config import GroundingDinoConfig, ResNetConfig, SwinConfig
from vg.models.rec.config import DenseHeadConfig, RecConfig
from vg.models.rec.model import RecModel
from vg.training.optim import build_schedule, select_trainable
from vg.types import Features, Text

FOLDER = Path(__file__).parents[1] / "configs" / "grounding_dino"
FINE_TUNED = ["finetune_coco_swin_t", "finetune_coco_swin_b", "finetune_cat", "finetune_own"]
TRAINED = [*FINE_TUNED, "scratch_coco_r50", "finetune_refcoco_mm_t", "pretrain_odvg_mm_t"]
RECIPES = [*TRAINED, "finetune_lora", "coco_zeroshot_swin_t"]

# As published: learning rates of the model, the backbone and BERT (0: frozen), epochs, milestones, warm-up steps,
# images per process, images per step. mmengine's `custom_keys` match substrings, so that `backbone: 0.1` also covers
# BERT, `language_model.language_backbone`.
PUBLISHED = {
    "scratch_coco_r50": (1e-4, 1e-5, 1e-5, 12, [11], 0, 2, 16),
    "finetune_coco_swin_t": (1e-4, 1e-5, 1e-5, 12, [11], 0, 2, 32),
    "finetune_coco_swin_b": (1e-4, 1e-5, 1e-5, 12, [11], 0, 2, 32),
    "finetune_cat": (5e-5, 5e-6, 0, 20, [15], 30, 2, 16),
    "finetune_own": (5e-5, 5e-6, 0, 20, [15], 30, 4, 16),  # like finetune_cat, on one GPU
    "finetune_refcoco_mm_t": (2e-4, 2e-5, 2e-5, 5, [3], 0, 4, 32),
    "pretrain_odvg_mm_t": (4e-4, 4e-5, 4e-5, 30, [19, 26], 1000, 4, 128),
}
GPUS = {
    "scratch_coco_r50": 8,
    "finetune_coco_swin_t": 16,
    "finetune_coco_swin_b": 16,
    "finetune_cat": 8,
    "finetune_own": 1,
    "finetune_refcoco_mm_t": 8,
    "pretrain_odvg_mm_t": 32,
}
FIGURES = {
    "coco_zeroshot_swin_t": ["48.4 AP", "48.5"],
    "scratch_coco_r50": ["48.9 AP", "official 48.1"],
    "finetune_coco_swin_t": ["58.1 AP", "official 57.2"],
    "finetune_coco_swin_b": ["59.7 AP", "56.9 before"],
    "finetune_cat": ["90.5 AP", "86.7 before"],
    "finetune_own": ["86.7 -> 90.5 AP"],
    "finetune_lora": ["86.7 -> 90.5 AP", "5 % of the weights"],
    "finetune_refcoco_mm_t": ["89.5 / 91.4 / 86.6", "53.1 / 59.1 / 46.8 before"],
    "pretrain_odvg_mm_t": ["48.5 AP"],
}
# Swin-T of transformers has 172,250,626, including an unused norm of 1,536. Separate heads of the layers add
# 5 x 132,612 and 7 scales or biases, and denoising adds a row of 256 per label.
PARAMETERS = {
    "coco_zeroshot_swin_t": 172_250_626 - 1_536,
    "finetune_coco_swin_t": 172_250_626 - 1_536 + 5 * 132_612 + 7 + 80 * 256,
    "finetune_coco_swin_b": 232_315_264 - 2_048 + 5 * 132_612 + 7 + 80 * 256,
    "finetune_cat": 172_250_626 - 1_536 + 5 * 132_612 + 7 + 256,
    "finetune_refcoco_mm_t": 172_913_693 - 1_536 + 256 * 256,
    "pretrain_odvg_mm_t": 172_913_693 - 1_536 + 256 * 256,
    "finetune_lora": 172_250_626 - 1_536 + 5 * 132_612 + 7 + 256 * 256,
}


def recipe(name: str) -> RunConfig:
    return load_config(FOLDER / f"{name}.yaml")


def model_of(config: RunConfig) -> GroundingDinoConfig:
    assert isinstance(config.model, GroundingDinoConfig)
    return config.model


def test_every_recipe_is_listed_here() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.yaml")) == sorted(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_models_can_be_built_and_every_module_name_matches(name: str) -> None:
    config = recipe(name)
    with torch.device("meta"):
        model = model_of(config).build(pretrained=False)
    if name in PARAMETERS:
        assert model.num_parameters() == PARAMETERS[name]
    if config.optim.lora:
        pytest.importorskip("peft")
    select_trainable(model, config.optim)
    trainable = {parameter for parameter, weights in model.named_parameters() if weights.requires_grad}
    for group in config.optim.groups.keys() - set(config.optim.freeze):
        assert any(parameter.startswith(f"{group}.") for parameter in trainable), group
    frozen = not any(parameter.startswith("text.network.") for parameter in trainable)
    assert frozen == (name in ("finetune_cat", "finetune_own"))
    assert any(parameter.startswith("text.projection.") for parameter in trainable)


@pytest.mark.parametrize("name", TRAINED)
def test_settings_equal_the_published_ones(name: str) -> None:
    config = recipe(name)
    model, optim, train = model_of(config), config.optim, config.train
    groups = optim.groups
    bert: Any = groups["text.network"].lr if "text.network" in groups else optim.lr
    bert = 0 if "text.network" in optim.freeze else bert
    images = GPUS[name] * config.data.batch_size * train.accumulate
    settings = (optim.lr, groups["backbone"].lr, bert, train.epochs, optim.milestones, optim.warmup_steps)
    assert (*settings, config.data.batch_size, images) == PUBLISHED[name]
    assert (optim.weight_decay, optim.decay_vectors, optim.clip_norm, optim.decay) == (1e-4, True, 0.1, 0.1)
    assert optim.schedule == "step"
    assert (model.fusion_dropout, model.fusion_drop_path, model.logit_eps) == (0.1, 0.0, (1e-3, 1e-5))
    assert model.denoising is not None
    assert (model.denoising.num_queries, model.denoising.label_noise, model.denoising.box_noise) == (100, 0.5, 1.0)
    matching = model.loss.matching
    assert (matching.class_cost, matching.class_weight, matching.l1, matching.giou) == ("sum", 2, 5, 2)
    assert (model.loss.class_weight, model.loss.l1, model.loss.giou) == (1, 5, 2)
    resize = config.data.augment.resize
    assert resize is not None
    assert (resize.shortest, resize.crop) == (list(range(480, 801, 32)), 0.5)
    assert config.data.augment.flip == (0.0 if "refcoco" in name else 0.5)
    if isinstance(config.data.train, CocoConfig):
        assert config.data.train.min_side == 1
    assert not model.shared_heads
    classes = (model.classes.scale, model.classes.bias)
    assert classes == (("learned", False) if name in FINE_TUNED else ("width", True))


@pytest.mark.parametrize(
    ("name", "width", "depths", "heads", "window", "drop_path"),
    [
        ("finetune_coco_swin_t", 96, [2, 2, 6, 2], [3, 6, 12, 24], 7, 0.2),
        ("finetune_coco_swin_b", 128, [2, 2, 18, 2], [4, 8, 16, 32], 12, 0.3),
        ("pretrain_odvg_mm_t", 96, [2, 2, 6, 2], [3, 6, 12, 24], 7, 0.2),
    ],
)
def test_backbones(name: str, width: int, depths: list[int], heads: list[int], window: int, drop_path: float) -> None:
    swin = model_of(recipe(name)).backbone
    assert isinstance(swin, SwinConfig)
    assert (swin.width, swin.depths, swin.heads, swin.window, swin.drop_path) == (
        width,
        depths,
        heads,
        window,
        drop_path,
    )


def test_adapters_are_few_parameters() -> None:
    """Rank-16 adapters and fully trained heads; all else equals finetune_own."""
    pytest.importorskip("peft")
    config, full = recipe("finetune_lora"), recipe("finetune_own")
    assert config.model == full.model
    images = (recipe.data.batch_size * recipe.train.accumulate for recipe in (config, full))
    assert next(images) == next(images) == 16
    with torch.device("meta"):
        model = model_of(config).build(pretrained=False)
    total = model.num_parameters()
    select_trainable(model, config.optim)
    assert round(100 * model.num_parameters(trainable_only=True) / total) == 5
    modules = ("backbone", "text.network", "encoder", "decoder.layers")
    adapted = {name for name, weights in model.named_parameters() if ".lora_" in name and weights.requires_grad}
    assert all(any(name.startswith(f"{module}.") for name in adapted) for module in modules)


def test_resnet() -> None:
    backbone = model_of(recipe("scratch_coco_r50")).backbone
    assert backbone == ResNetConfig(id="microsoft/resnet-50")
    assert model_of(recipe("scratch_coco_r50")).weights is None


def test_protocols() -> None:
    """COCO: 300 pairs scored by the mean over tokens; expressions: scored by the maximum over tokens."""
    coco, refcoco = (model_of(recipe(name)).predict for name in ("coco_zeroshot_swin_t", "finetune_refcoco_mm_t"))
    assert (coco.score, coco.top_k, coco.threshold, coco.nms) == ("mean", 300, 0.0, None)
    assert (refcoco.score, refcoco.top_k) == ("max", 30)
    published = GroundingDinoConfig(weights="IDEA-Research/grounding-dino-tiny")
    assert model_of(recipe("coco_zeroshot_swin_t")) == published


def test_sampled_negatives_equal_mm_grounding_dino() -> None:
    vocabulary: Any = recipe("pretrain_odvg_mm_t").data.train.vocabulary  # type: ignore[union-attr]
    assert (vocabulary.negatives, vocabulary.full) == (85, 0.5)
    assert (vocabulary.clean, vocabulary.alternatives, vocabulary.lower) == (True, True, True)


def test_captions_are_prompts_as_a_whole_in_pretraining_as_published() -> None:
    assert recipe("pretrain_odvg_mm_t").data.train.captions == "whole"  # type: ignore[union-attr]


@pytest.mark.parametrize("name", TRAINED)
def test_the_learning_rate_decays_at_the_milestones(name: str) -> None:
    optim = recipe(name).optim
    weights = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weights], lr=1.0)
    steps = 400  # per epoch
    schedule = build_schedule(optimizer, optim, 30 * steps, steps)
    factor = schedule.lr_lambdas[0]
    for index, milestone in enumerate(optim.milestones):
        assert factor(milestone * steps - 1) == pytest.approx(0.1**index)
        assert factor(milestone * steps) == pytest.approx(0.1 ** (index + 1))


@pytest.mark.parametrize("name", RECIPES)
def test_comments_state_result_hardware_and_source(name: str) -> None:
    comment = " ".join(
        line.removeprefix("# ") for line in (FOLDER / f"{name}.yaml").read_text().splitlines() if line.startswith("#")
    )
    for figure in FIGURES[name]:
        assert figure in comment
    assert "mmdetection" in comment
    if name in PUBLISHED and name != "finetune_own":
        assert f"{GPUS[name]} GPUs x {PUBLISHED[name][6]} images" in comment
        assert f"{PUBLISHED[name][3]} epochs" in comment
        batch_size = load_config(FOLDER / f"{name}.yaml").optim.batch_size
        assert batch_size == GPUS[name] * PUBLISHED[name][6], "samples per step that the learning rate is for"
    assert f"configs/grounding_dino/{name}.yaml" in comment, "the command that runs it"


def test_rec_recipes() -> None:
    configs = {path.stem: load_config(path) for path in (FOLDER.parent / "rec").glob("*.yaml")}
    sizes = {name: config.model.image_size for name, config in configs.items() if isinstance(config.model, RecConfig)}
    assert sizes == {
        "refcoco": 224,
        "refcoco_cached": 224,
        "refcoco_dense": 224,
        "refcoco_dense_cached": 224,
        "refcoco_dense_lora": 224,
        "refcoco_dense_text_lora": 224,
        "refcoco_dense_two_texts": 224,
        "refcoco_dense_448": 448,
        "refcoco_dense_levels": 448,
        "refcoco_dense_672": 672,
        "refcoco_dense_vitl": 448,
        "refcoco_record": 448,
        "refcoco_joint": 448,
        "crowded_scenes": 96,
        "absent_and_several": 64,
        "glyphs": 64,
        "collage": 128,
    }
    for name in configs.keys() - {"crowded_scenes", "absent_and_several", "glyphs", "collage"}:
        samples = 256 if name == "refcoco_record" else 64
        assert configs[name].data.batch_size * configs[name].train.accumulate == samples, name
        assert configs[name].train.output == f"runs/{name}"
    joint = configs["refcoco_joint"].data
    assert joint.drop_overlap
    assert isinstance(joint.train, MixtureConfig)
    assert [part.split for part in joint.train.datasets] == ["train"] * 3  # type: ignore[union-attr]
    assert {(part.path, part.split) for part in joint.eval_datasets().values()} == {  # type: ignore[union-attr]
        *((f"jxu124/{name}", split) for name in ("refcoco", "refcocoplus") for split in ("val", "testA", "testB")),
        *(("jxu124/refcocog", split) for split in ("val", "test")),
    }


def test_the_recipe_of_glyphs_is_that_of_the_demo() -> None:
    demo, glyphs = (load_config(FOLDER.parent / name) for name in ("demo_rec.yaml", "rec/glyphs.yaml"))
    assert isinstance(glyphs.data.eval, GlyphsConfig)
    assert (glyphs.data.eval.split, glyphs.data.eval.image_size) == ("val", 64)
    glyphs.data.train, glyphs.data.eval = demo.data.train, demo.data.eval
    glyphs.train.output, glyphs.train.epochs = demo.train.output, demo.train.epochs
    assert glyphs == demo


def test_the_recipe_of_absent_and_several_is_that_of_the_demo() -> None:
    demo, any_number = (load_config(FOLDER.parent / name) for name in ("demo_rec.yaml", "rec/absent_and_several.yaml"))
    for config, number, boxes in ((demo, "one", 5), (any_number, "any", 10)):
        assert isinstance(config.model, RecConfig)
        assert isinstance(config.model.head, DenseHeadConfig)
        assert (config.model.head.objects, config.model.head.num_boxes) == (number, boxes)
        assert asdict(config.train) == asdict(demo.train) | {"output": config.train.output}
        assert config.optim == demo.optim
    train, evaluation = (settings.build() for settings in (any_number.data.train, any_number.data.eval))
    assert train.provenance.task == evaluation.provenance.task == "generalized"
    assert numbers_of_boxes(evaluation) == {0: 20, 1: 20, 2: 20}
    assert min(numbers_of_boxes(train).values()) > 15  # a scene may lack expressions of one type


def numbers_of_boxes(source: Any) -> Counter[int]:
    return Counter(min(len(source.load(index, 0).boxes), 2) for index in range(60))


def test_the_size_of_a_cache_of_several_layers() -> None:
    """As stated in the recipe; RefCOCO has 16,994 images in train and 3,000 in val, testA and testB."""
    path = FOLDER.parent / "rec" / "refcoco_dense_levels.yaml"
    encoder = "{id: null, architecture: {model_type: dinov3_vit, hidden_size: 768, num_hidden_layers: 12, "
    encoder += "num_attention_heads: 12, intermediate_size: 3072, num_register_tokens: 4}, "
    encoder += "layers: [3, 6, 9, 12], mixed_width: 768}"
    config = load_config(path, [f"model.vision={encoder}", "model.text={id: null, architecture: {model_type: bert}}"])
    assert load_config(path).model.vision.layers == [3, 6, 9, 12]  # type: ignore[union-attr]
    with torch.device("meta"), torch.no_grad():
        model = config.model.build(pretrained=False)
        assert isinstance(model, RecModel)
        tokens, grid = model.encode_images(torch.zeros(1, 3, *model.image_spec.resized(1, 1)))
    assert model.vision.width == 3072
    assert (tuple(tokens.shape), grid) == ((1, 5 + 28 * 28, 768), (28, 28))
    size = 2 * tokens.numel()
    comment = path.read_text().partition("base:")[0]
    for number in (f"{size / 1e6:.2f} MB", f"{16_994 * size / 1e9:.1f} GB", f"{19_994 * size / 1e9:.1f} GB"):
        assert number in comment


PUBLISHED_ENCODERS = [
    "model.vision={id: null, architecture: {model_type: dinov3_vit, hidden_size: 768, num_hidden_layers: 12, "
    "num_attention_heads: 12, intermediate_size: 3072, num_register_tokens: 4}}",
    "model.text={id: null, architecture: {model_type: bert, hidden_size: 384, num_hidden_layers: 12, "
    "num_attention_heads: 12, intermediate_size: 1536}}",
]


@pytest.mark.parametrize("name", ["refcoco_dense_text_lora", "refcoco_dense_two_texts"])
def test_the_cost_of_adapters_in_text_encoders(name: str) -> None:
    """As stated in the recipe; RefCOCO has 120,624 expressions of 16,994 images in train, and 3,000 other images."""
    pytest.importorskip("peft")
    path = FOLDER.parent / "rec" / f"{name}.yaml"
    clip = ["model.extra_text={id: null, frozen: false, architecture: {model_type: clip_text_model}}"]
    encoders = PUBLISHED_ENCODERS + (clip if name == "refcoco_dense_two_texts" else [])
    config = load_config(path, [*encoders, "model.text.frozen=false"])
    assert isinstance(config.model, RecConfig)
    extra = load_config(path).model.extra_text  # type: ignore[union-attr]
    assert (extra and extra.id) == ("openai/clip-vit-base-patch16" if config.model.extra_text else None)
    rows, length = 2, 16
    with torch.device("meta"):
        model = config.model.build(pretrained=False)
        assert isinstance(model, RecModel)
        total = model.num_parameters() - sum(weights.numel() for weights in model.head.parameters())
        select_trainable(model, config.optim)
        text = torch.ones((rows, length), dtype=torch.long)
        mask = text.bool()
        tokens = Text(text, mask, mask, mask, Text(text, mask, mask, mask))

        def gigaflops(function: Callable[[], object]) -> float:
            with FlopCounterMode(display=False) as counter:
                function()
            return counter.get_total_flops() / rows / 1e9

        def step() -> None:
            words, valid = model.encode_text(tokens)
            output = model.head(Features(torch.zeros(rows, 201, 768), (14, 14), words, valid))
            (output.logits.sum() + output.boxes.sum()).backward()

        words_only = gigaflops(lambda: model.encode_text(tokens)[0].sum().backward())
        both, image = gigaflops(step), gigaflops(lambda: model.encode_images(torch.zeros(rows, 3, 224, 224)))
    trained = {name: weights.numel() for name, weights in model.named_parameters() if weights.requires_grad}
    adapters = sum(count for name, count in trained.items() if ".lora_" in name)
    assert {name.split(".")[0] for name in trained if ".lora_" in name} == {"text", *(["extra_text"] if extra else [])}
    assert all(name.startswith("head.") for name in trained if ".lora_" not in name)
    petaflops = both * 120_624 * config.train.epochs / 1e6
    assert config.data.cache
    cache = image * (16_994 * len(config.data.cache.views) + 3_000) / 1e6
    comment = path.read_text().partition("base:")[0].replace("\n# ", " ")
    for figure in (
        f"{adapters:,} weights of the adapters are {adapters / total:.1%} of the {total:,}".replace("%", " %"),
        f"{words_only:.1f} GFLOP in the text encoder{'s' if extra else ''} and {both - words_only:.1f} in the head",
        f"{config.train.epochs} epochs are {petaflops:.1f} PFLOP, or {petaflops * 1000 / 20 / 60:.0f} minutes",
        f"takes {cache:.1f} PFLOP once",
    ):
        assert figure in comment, figure


def test_encoder_adapters_and_the_head_are_trained() -> None:
    pytest.importorskip("peft")
    sizes = "hidden_size: 384, num_hidden_layers: 2, num_attention_heads: 6, intermediate_size: 1536"
    encoders = [
        f"model.{encoder}={{id: null, frozen: false, architecture: {{model_type: {model_type}, {sizes}}}}}"
        for encoder, model_type in (("vision", "dinov3_vit"), ("text", "bert"))
    ]
    config = load_config(FOLDER.parent / "rec" / "refcoco_dense_lora.yaml", encoders)
    with torch.device("meta"):
        model = config.model.build(pretrained=False)
    head = {name for name, _ in model.named_parameters() if name.startswith("head.")}
    select_trainable(model, config.optim)
    trained = {name for name, weights in model.named_parameters() if weights.requires_grad}
    adapters = {name for name in trained if ".lora_" in name}
    assert trained - adapters == head
    assert sum(".vision" in f".{name}" for name in adapters) == sum(".text" in f".{name}" for name in adapters) == 8
