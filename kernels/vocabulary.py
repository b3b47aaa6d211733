"""The bytes of every token id, as tensors, so that text can be written where the ids are."""

from collections.abc import Iterable
from typing import NamedTuple, Self

import torch
from torch import Tensor


class VocabularyBytes(NamedTuple):
    """Token id t has the bytes data[offsets[t] : offsets[t + 1]]; special tokens have none, but for the box marks."""

    data: Tensor  # (total) uint8
    offsets: Tensor  # (V+1) int64
    eos: Tensor  # (V) bool
    marks: Tensor  # (V) bool, tokens that are silent in every answer format but "marked"

    @classmethod
    def build(
        cls,
        tokens: list[bytes],
        eos_ids: Iterable[int],
        device: torch.device | str = "cpu",
        *,
        mark_ids: Iterable[int] = (),
    ) -> Self:
        """Pack the vocabulary.

        Args:
            tokens: the bytes of every id the model can emit, in id order; b"" for special tokens other than the box
                marks, and for the ids with which a model pads its vocabulary.
            eos_ids: ids that end a completion.
            mark_ids: the special tokens `<|box_start|>` and `<|box_end|>`, where the vocabulary has them.

        Raises:
            ValueError: an EOS id or a mark's id lies outside the vocabulary.
        """
        eos = _flags("EOS", eos_ids, len(tokens))
        marks = _flags("mark", mark_ids, len(tokens))
        data = torch.frombuffer(bytearray(b"".join(tokens)) or bytearray(1), dtype=torch.uint8)
        sizes = torch.tensor([0, *map(len, tokens)], dtype=torch.int64)
        return cls(data, sizes.cumsum(0), eos, marks).to(device)

    def to(self, device: torch.device | str) -> Self:
        return VocabularyBytes(*(tensor.to(device) for tensor in self))


def _flags(kind: str, ids: Iterable[int], vocabulary: int) -> Tensor:
    flags = torch.zeros(vocabulary, dtype=torch.bool)
    for token_id in ids:
        if not 0 <= token_id < vocabulary:
            raise ValueError(f"{kind} id {token_id} is outside the {vocabulary} ids; pass bytes for every id.")
        flags[token_id] = True
    return flags
