"""The bytes of every token id, as tensors, so that text can be written where the ids are."""

from collections.abc import Iterable
from typing import NamedTuple, Self

import torch
from torch import Tensor


class VocabularyBytes(NamedTuple):
    """Token id t has the bytes data[offsets[t] : offsets[t + 1]]; special tokens have none."""

    data: Tensor  # (total) uint8
    offsets: Tensor  # (V+1) int64
    eos: Tensor  # (V) bool

    @classmethod
    def build(cls, tokens: list[bytes], eos_ids: Iterable[int], device: torch.device | str = "cpu") -> Self:
        """Pack the vocabulary.

        Args:
            tokens: the bytes of every id the model can emit, in id order; b"" for special tokens and for the ids with
                which a model pads its vocabulary.
            eos_ids: ids that end a completion.

        Raises:
            ValueError: an EOS id lies outside the vocabulary.
        """
        eos = torch.zeros(len(tokens), dtype=torch.bool)
        for token_id in eos_ids:
            if not 0 <= token_id < len(tokens):
                raise ValueError(f"EOS id {token_id} is outside the {len(tokens)} ids; pass bytes for every id.")
            eos[token_id] = True
        data = torch.frombuffer(bytearray(b"".join(tokens)) or bytearray(1), dtype=torch.uint8)
        sizes = torch.tensor([0, *map(len, tokens)], dtype=torch.int64)
        return cls(data, sizes.cumsum(0), eos).to(device)

    def to(self, device: torch.device | str) -> Self:
        return VocabularyBytes(*(tensor.to(device) for tensor in self))
