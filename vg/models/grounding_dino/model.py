"""Grounding DINO (Liu et al. 2023, arXiv 2303.05499): detect the objects that the phrases of a prompt name.

The steps of section 3 of the paper, in order:
    backbone.py          image backbone: multi-scale image features, about 20,000 tokens in 4 levels
    text_encoder.py      text backbone: BERT with sub-sentence attention masks, so that phrases do not mix
    feature_enhancer.py  feature enhancer: cross-attention between image and text, then self-attention, six layers
    query_selection.py   language-guided query selection: the 900 image tokens most similar to the text
    decoder.py           cross-modality decoder: six layers refine one box per query
and around them:
    denoising.py         further queries in training (DINO)
    postprocess.py       token logits to phrase scores and boxes in pixels

Shapes use the legend of vg/types.py; row r of R is one prompt, which belongs to the image in the same row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from vg.losses.set_loss import DenoisingOutput, SetLoss
from vg.models.base import GroundingModel
from vg.models.encoders import enable_checkpointing, layers_of, load_tokenizer, read_tokenizer
from vg.models.grounding_dino.attention import Attention, DeformableAttention
from vg.models.grounding_dino.backbone import ImageFeatures, Neck, extract_image_features, is_capturing_cuda_graph
from vg.models.grounding_dino.checkpoints.load import load_into
from vg.models.grounding_dino.checkpoints.variant import LABELS
from vg.models.grounding_dino.config import GroundingDinoConfig
from vg.models.grounding_dino.decoder import CrossModalityDecoder
from vg.models.grounding_dino.denoising import Denoising
from vg.models.grounding_dino.feature_enhancer import FeatureEnhancer, FusionLayer
from vg.models.grounding_dino.heads import BoxHead
from vg.models.grounding_dino.postprocess import postprocess
from vg.models.grounding_dino.query_selection import QuerySelection
from vg.models.grounding_dino.text_encoder import TextEncoder, TextFeatures
from vg.types import Batch, FittedImage, ImageSpec, LossName, Prediction, PromptTargets, Text, TextSpec


class Output(NamedTuple):
    logits: Tensor  # [L, R, Q, T] of all decoder layers in training, else of the last; -inf for padded tokens, queries
    boxes: Tensor  # [L, R, Q, 4] cxcywh, 0..1 of the image without padding
    encoder_logits: Tensor  # [R, Q, T] of the image tokens selected as queries
    encoder_boxes: Tensor  # [R, Q, 4]
    queries: Tensor  # [R, Q, D] after the last decoder layer
    text: Tensor  # [R, T, D] after the feature enhancer
    denoising: DenoisingOutput | None  # in training


class GroundingDino(GroundingModel):
    """Build with GroundingDinoConfig.build."""

    def __init__(self, config: GroundingDinoConfig, pretrained: bool = True):
        super().__init__()
        self.config = config
        load_backbones = pretrained and config.weights is None  # else the checkpoint has their weights, too
        self.backbone = config.backbone.build(load_backbones)
        self.neck = Neck(self.backbone.network.channels, config.width, config.levels, config.position_temperature)
        self.text = TextEncoder(config.text, config.width, load_backbones)
        self.encoder = FeatureEnhancer(config)
        self.queries = QuerySelection(config)
        self.decoder = CrossModalityDecoder(config)
        self._initialize()
        # Last, so that other random weights do not depend on the size of its embedding, which `use_classes` may change.
        self.denoising = Denoising(config.denoising, config.width) if config.denoising else None
        if pretrained and config.weights is not None:
            tokenizer = load_into(self, config.weights)
            if tokenizer is not None and config.text.tokenizer is None:
                self.load_tokenizer(tokenizer)
        if config.gradient_checkpointing:
            if self.backbone.network.supports_gradient_checkpointing:  # a ResNet does not
                enable_checkpointing(self.backbone.network)
            enable_checkpointing(self.text.network)

    def use_classes(self, number: int) -> None:
        if self.denoising is not None and not self.denoising.is_sized:
            self.denoising.resize(number)

    def layers_to_compile(self) -> Sequence[nn.Module]:
        return (*self.encoder.layers, *self.decoder.layers)

    def layers_to_shard(self) -> Sequence[nn.Module]:
        # With several image sizes in a batch, the backbone runs once for each of them.
        backbone = layers_of(self.backbone.network) if self.config.image.mix_sizes else []
        return (*backbone, *layers_of(self.text.network), *self.layers_to_compile())

    def load_own_state_dict(self, weights: Mapping[str, Tensor]) -> None:
        labels = weights.get(LABELS)
        if self.denoising is not None and labels is not None and len(labels) != self.denoising.labels.num_embeddings:
            raise ValueError(
                f"the checkpoint has {len(labels)} denoising labels, the model {self.denoising.labels.num_embeddings}: "
                f"set model.denoising.num_labels={len(labels)}"
            )
        super().load_own_state_dict(weights)

    def forward(self, batch: Batch) -> Output:
        """Run the network; raises ValueError in training if an image has several prompts."""
        image = self.encode_image(batch)
        text = self.encode_text(batch.text)
        if len(text.tokens) != len(image.tokens):  # images have several prompts
            return self._ground_in_chunks(image, text, batch)
        return self.ground(image, text, batch.prompt_targets if self.training else None)

    def encode_image(self, batch: Batch) -> ImageFeatures:
        """Extract multi-scale features [B, S, D] with the image backbone (section 3.1)."""
        mix_sizes = self.config.image.mix_sizes
        return extract_image_features(self.backbone, self.neck, batch.images, batch.sizes, mix_sizes)

    def encode_text(self, text: Text) -> TextFeatures:
        """Extract features [R, T, D] with the text backbone, phrase by phrase (sections 3.1 and 3.4)."""
        uncached = self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()
        uncached = uncached or is_capturing_cuda_graph(text.mask.device)
        encode = self.text if uncached else self.text.cached
        return encode(text.token_ids, text.mask, self.text_spec.delimiter_ids)

    def ground(self, image: ImageFeatures, text: TextFeatures, targets: PromptTargets | None = None) -> Output:
        """Run feature enhancer, query selection and decoder (sections 3.1 to 3.3) on R pairs of image and prompt.

        Args:
            targets: boxes to denoise, in training; the matching queries cannot attend to the denoising queries.
        """
        image, text = self.encoder(image, text)
        queries = self.queries(image, text)
        content, reference_logits = queries.content, queries.reference_logits  # [R, Q, D], [R, Q, 4]
        mask = None if queries.mask is None else queries.mask[:, None, None]  # [R, 1, 1, Q]
        noisy = None if self.denoising is None or targets is None else self.denoising(targets, content.shape[1])
        if noisy is not None:  # M + Q queries
            content = torch.cat((noisy.content, content), dim=1)
            reference_logits = torch.cat((noisy.reference_logits, reference_logits), dim=1)
            mask = noisy.mask if mask is None else noisy.mask & F.pad(mask, (noisy.content.shape[1], 0), value=True)
        logits, boxes, last = self.decoder(content, reference_logits, image, text, mask)
        denoising = None
        if noisy is not None:
            count = noisy.content.shape[1]  # M
            denoising = DenoisingOutput(logits[:, :, :count], boxes[:, :, :count], noisy.assignment)
            logits, boxes, last = logits[:, :, count:], boxes[:, :, count:], last[:, count:]
        encoder_logits = queries.logits
        if queries.mask is not None:
            padding = ~queries.mask.unsqueeze(-1)  # [R, Q, 1]
            logits, encoder_logits = (x.masked_fill(padding, -torch.inf) for x in (logits, encoder_logits))
        return Output(logits, boxes, encoder_logits, queries.boxes, last, text.tokens, denoising)

    def _ground_in_chunks(self, image: ImageFeatures, text: TextFeatures, batch: Batch) -> Output:
        """Ground several prompts per image, which share its features: as many at a time as there are samples.

        More would take more memory than a batch with one prompt per image.
        """
        if self.training:
            raise ValueError("training takes one prompt per image: make batches with Collator(..., one_prompt=True)")
        count = max(len(batch), len(image.tokens))
        chunks = (slice(start, start + count) for start in range(0, len(text.tokens), count))
        image_ids = batch.image_ids[batch.text.sample_ids]  # [R]
        outputs = [self.ground(image.select(image_ids[rows]), text.select(rows)) for rows in chunks]
        # R is the third axis from the right in every field of Output.
        fields = (torch.cat(x, dim=-3) if isinstance(x[0], Tensor) else None for x in zip(*outputs, strict=True))
        return Output(*fields)  # type: ignore[arg-type]

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
        """Return the number of boxes, which the loss is divided by."""
        return sum(batch.prompt_targets.counts)

    def predict(self, output: Output, batch: Batch) -> list[Prediction]:
        return postprocess(output.logits[-1], output.boxes[-1], batch, self.config.predict)

    @property
    def image_spec(self) -> ImageSpec:
        image = self.config.image
        return FittedImage(image.shortest, image.longest, mean=image.mean, std=image.std)

    @cached_property
    def text_spec(self) -> TextSpec:
        return self._text_spec(load_tokenizer(self.config.text))

    def load_tokenizer(self, folder: str) -> None:
        self.use_tokenizer(read_tokenizer(folder))

    def use_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.text_spec = self._text_spec(tokenizer)

    def _text_spec(self, tokenizer: PreTrainedTokenizerBase) -> TextSpec:
        return TextSpec(tokenizer, self.config.max_tokens, delimiters=(".", "?"), positions=self.text.positions)

    def _initialize(self) -> None:
        """Draw random weights as the official implementation does; backbones initialize themselves."""
        for component in (self.encoder, self.queries, self.decoder):
            for weights in component.parameters():
                if weights.dim() > 1:
                    nn.init.xavier_uniform_(weights)
        for module in self.modules():
            if isinstance(module, (Attention, BoxHead, DeformableAttention, FusionLayer)):
                module.reset_parameters()
