"""Grounding DINO (Liu et al. 2023, arXiv 2303.05499): any number of phrases in, a scored box for all they name.

The story, in reading order:
    image.py    backbone and pyramid: a picture becomes some 20,000 tokens of 4 scales
    text.py     BERT reads every phrase of the prompt on its own
    encoder.py  feature enhancer: the two look at each other and at themselves, six times
    queries.py  language-guided query selection: the 900 image tokens that fit the text best
    decoder.py  cross-modality decoder: these become boxes, refined six times
    answer.py   from logits to boxes in pixels, scored per phrase
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vg.losses.set_loss import SetLoss
from vg.models.base import GroundingModel
from vg.models.encoders import enable_checkpointing, load_tokenizer
from vg.models.grounding_dino.attention import Attention, DeformableAttention
from vg.models.grounding_dino.checkpoints.load import load_into
from vg.models.grounding_dino.config import GroundingDinoConfig
from vg.models.grounding_dino.decoder import Decoder
from vg.models.grounding_dino.denoising import Denoising
from vg.models.grounding_dino.encoder import FeatureEnhancer, FusionLayer
from vg.models.grounding_dino.image import ImageFeatures, Neck, encode_images
from vg.models.grounding_dino.postprocess import answers
from vg.models.grounding_dino.queries import BoxHead, QuerySelection
from vg.models.grounding_dino.text import TextEncoder, TextFeatures
from vg.types import Batch, FittedImage, ImageSpec, LossName, Prediction, PromptTargets, Text, TextSpec


class Output(NamedTuple):
    logits: Tensor  # [L, R, Q, T] of all decoder layers in training, else of the last; -inf = no such token or query
    boxes: Tensor  # [L, R, Q, 4] cxcywh 0..1 of the image without padding
    encoder_logits: Tensor  # [R, Q, T] of the selected image tokens
    encoder_boxes: Tensor  # [R, Q, 4]
    queries: Tensor  # [R, Q, D] after the last layer
    text: Tensor  # [R, T, D] after the feature enhancer
    denoising: tuple[Tensor, Tensor, Tensor] | None  # in training: logits, boxes, and which box [R, M] each restores


class GroundingDino(GroundingModel):
    def __init__(self, config: GroundingDinoConfig, pretrained: bool = True):
        super().__init__()
        self.config = config
        own = pretrained and config.weights is None  # else the checkpoint brings backbone and text encoder
        self.backbone = config.backbone.build(own)
        self.neck = Neck(self.backbone.channels, config.width, config.levels, config.position_temperature)
        self.text = TextEncoder(config.text, config.width, own)
        self.encoder = FeatureEnhancer(config)
        self.queries = QuerySelection(config)
        self.decoder = Decoder(config)
        self.denoising = Denoising(config.denoising, config.width) if config.denoising else None
        self._initialise()
        if pretrained and config.weights is not None:
            tokenizer = load_into(self, config.weights)
            if tokenizer is not None and config.text.tokenizer is None:
                self.load_tokenizer(tokenizer)
        if config.gradient_checkpointing:
            if self.backbone.network.supports_gradient_checkpointing:  # a ResNet does not
                enable_checkpointing(self.backbone.network)
            enable_checkpointing(self.text.network)

    def forward(self, batch: Batch) -> Output:
        image = self.encode_image(batch)
        text = self.encode_text(batch.text)
        if len(text.tokens) == len(image.tokens):  # one prompt per image
            teach = self.training and self.denoising is not None
            return self.ground(image, text, batch.prompt_targets if teach else None)
        if self.training:
            raise ValueError("training takes one prompt per image: make batches with Collator(..., one_prompt=True)")
        # Prompts of one image share its features; as many at once as there are images, for the memory's sake.
        groups = torch.arange(len(text.tokens)).split(len(image.tokens))
        outputs = [self.ground(image.select(batch.text.image_ids[rows]), text.select(rows)) for rows in groups]
        parts = (
            torch.cat(part, dim=-3) if isinstance(part[0], Tensor) else None for part in zip(*outputs, strict=True)
        )
        return Output(*parts)  # type: ignore[arg-type]

    def encode_image(self, batch: Batch) -> ImageFeatures:
        """Section 3.1: the tokens of each image, and where they lie."""
        return encode_images(self.backbone, self.neck, batch.images, batch.sizes, not self.config.image.mix_sizes)

    def encode_text(self, text: Text) -> TextFeatures:
        """Section 3.4: the tokens of each prompt, phrase by phrase."""
        fresh = self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()
        return (self.text if fresh else self.text.recall)(text.token_ids, text.mask, self.text_spec.delimiter_ids)

    def ground(self, image: ImageFeatures, text: TextFeatures, targets: PromptTargets | None = None) -> Output:
        """Sections 3.2 and 3.3: prompt r asks about image r; what it should find is only told to denoising queries."""
        image, text = self.encoder(image, text)
        queries = self.queries(image, text)
        content, references, denoising = queries.content, queries.references, None
        mask = None if queries.real is None else queries.real[:, None, None]  # [R, 1, 1, Q]
        if self.denoising is not None and targets is not None:
            noisy = self.denoising(targets, content.shape[1])
            content, references = torch.cat((noisy.content, content), 1), torch.cat((noisy.references, references), 1)
            number = noisy.content.shape[1]
            mask = ~noisy.blocked if mask is None else ~noisy.blocked & F.pad(mask, (number, 0), value=True)
        logits, boxes, last = self.decoder(content, references, image, text, mask)
        if self.denoising is not None and targets is not None:
            denoising = logits[:, :, :number], boxes[:, :, :number], noisy.assignment
            logits, boxes, last = logits[:, :, number:], boxes[:, :, number:], last[:, number:]
        encoder_logits = queries.logits
        if queries.real is not None:
            absent = ~queries.real.unsqueeze(-1)  # [R, Q, 1]
            logits, encoder_logits = (x.masked_fill(absent, -torch.inf) for x in (logits, encoder_logits))
        return Output(logits, boxes, encoder_logits, queries.boxes, last, text.tokens, denoising)

    def loss(self, output: Output, batch: Batch) -> dict[LossName, Tensor]:
        return SetLoss(self.config.loss)(
            output.logits,
            output.boxes,
            batch.prompt_targets,
            batch.text.mask,
            encoder=(output.encoder_logits, output.encoder_boxes),
            denoising=output.denoising,
            vectors=(output.queries, output.text),
        )

    def batch_weight(self, batch: Batch) -> int:
        return sum(batch.prompt_targets.counts)

    def predict(self, output: Output, batch: Batch) -> list[Prediction]:
        return answers(output.logits[-1], output.boxes[-1], batch, self.config.predict)

    @property
    def image_spec(self) -> ImageSpec:
        return FittedImage(self.config.image.shortest, self.config.image.longest)

    @cached_property
    def text_spec(self) -> TextSpec:
        return self._text_spec(load_tokenizer(self.config.text))

    def load_tokenizer(self, folder: str) -> None:
        self.use_tokenizer(AutoTokenizer.from_pretrained(folder))

    def use_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.text_spec = self._text_spec(tokenizer)

    def _text_spec(self, tokenizer: PreTrainedTokenizerBase) -> TextSpec:
        return TextSpec(tokenizer, self.config.max_tokens, delimiters=(".", "?"))

    def _initialise(self) -> None:
        """Random weights as the official implementation has them (backbone and BERT keep their own)."""
        for part in (self.encoder, self.queries, self.decoder):
            for weights in part.parameters():
                if weights.dim() > 1:
                    nn.init.xavier_uniform_(weights)
        for module in self.modules():
            if isinstance(module, (Attention, BoxHead, DeformableAttention, FusionLayer)):
                module.reset_parameters()
