"""Qwen2-VL on packed tokens: vision tower, decoder and head, under the published checkpoints' names."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from boxgrpo.model.attention import PackedAttention
from boxgrpo.model.batch import PackedBatch
from boxgrpo.model.decoder import Attend, Decoder
from boxgrpo.model.vision import VisionTower


class Qwen2VL(nn.Module):
    """`config` is transformers' Qwen2VLConfig. A tied head is the embedding itself: `lm_head` is None."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.visual = VisionTower(config.vision_config)
        self.model = Decoder(config.text_config)
        text = config.text_config
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(text.hidden_size, text.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """(V, H)"""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        return self.head_weight.device

    def forward(
        self, batch: PackedBatch | None = None, head: Callable | None = None, *, work: Callable[[], Any] | None = None
    ):
        """Hidden states of the rows that predict the scored tokens, or what `head` makes of them.

        Args:
            batch: on the model's device; without `image_embeds` the tower runs here, with gradient if it has any.
            head: called as head(hidden (N, H), weight (V, H)) inside this forward, so that engines which shard
                parameters have the head's weight gathered.
            work: called instead of all that, with the head's weight gathered: sampling with sharded parameters.

        Returns:
            (N, H), or the result of `head` or `work`.
        """
        if work is not None:
            return work()
        hidden = self.hidden(batch, PackedAttention(batch)).index_select(0, batch.predict_from)
        return hidden if head is None else head(hidden, self.head_weight)

    def hidden(self, batch: PackedBatch, attend: Attend) -> Tensor:
        """Hidden states of all rows: (T, H)."""
        x = self.model.embed_tokens(batch.input_ids)
        images = batch.image_embeds
        # A trained tower runs without images too: engines that shard parameters meet in every module of every pack.
        trained = self.visual is not None and next(self.visual.parameters()).requires_grad
        if images is None and (len(batch.image_rows) or trained):
            images = self.visual(batch.pixel_values, batch.image_grid_thw)
        if images is not None:
            x = x.index_copy(0, batch.image_rows, images.to(x.dtype))
        return self.model(x, batch.position_ids, attend)

    @torch.no_grad()
    def embed_images(self, pixel_values: Tensor | None, image_grid_thw: Tensor) -> Tensor:
        """(P / 4, H) without gradient, for a frozen tower: once a prompt, for rollout, reference and policy."""
        return self.visual(None if pixel_values is None else pixel_values.to(self.device), image_grid_thw)

    def freeze_vision(self, frozen: bool = True) -> None:
        """Freeze or free all of `visual`, merger included."""
        self.visual.requires_grad_(not frozen)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> "Qwen2VL":
        """Normal weights of the configs' `initializer_range`, zero biases, unit norms."""
        towers = (
            (self.visual, self.config.vision_config.initializer_range),
            (self.model, self.config.text_config.initializer_range),
        )
        for tower, std in towers:
            for name, parameter in tower.named_parameters():
                if name.endswith("bias"):
                    parameter.zero_()
                elif parameter.ndim == 1:
                    parameter.fill_(1.0)
                else:
                    parameter.normal_(0.0, std, generator=generator)
        if self.lm_head is not None:
            self.lm_head.weight.normal_(0.0, self.config.text_config.initializer_range, generator=generator)
        return self
