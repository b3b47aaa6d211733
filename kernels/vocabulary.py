"""The bytes of every token id, as tensors, so that ids are turned into text on their own device."""

from collections.abc import Iterable
from typing import NamedTuple, Self

import torch
from torch import Tensor

# Roles of a token: PLAIN contains no start of a tag or box, BRACKET may start a box, TEXT may start a tag or is empty.
PLAIN, BRACKET, TEXT, EOS, MARK = range(5)
_SIZE_BITS, _ROLE_BITS = 22, 3


class VocabularyBytes(NamedTuple):
    """The bytes of each token id. Special tokens have none, except the box marks."""

    data: Tensor  # (total) uint8
    entries: Tensor  # (V) int64, a token's start in `data`, size and role packed into one number; see `unpack_entries`

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
            mark_ids: the special tokens `<|box_start|>` and `<|box_end|>`, where the vocabulary has them. They are
                text in the answer format "marked" and skipped in the others.

        Raises:
            ValueError: an EOS id or a mark's id lies outside the vocabulary, or a token has 4 MiB or more.
        """
        roles = torch.tensor([_role(token) for token in tokens], dtype=torch.int64)
        for role, kind, ids in ((MARK, "mark", mark_ids), (EOS, "EOS", eos_ids)):
            for token_id in ids:
                if not 0 <= token_id < len(tokens):
                    raise ValueError(f"{kind} id {token_id} is outside the {len(tokens)} ids; pass bytes for every id.")
                roles[token_id] = role
        sizes = torch.tensor([len(token) for token in tokens], dtype=torch.int64)
        if (sizes >= 1 << _SIZE_BITS).any():
            raise ValueError(f"a token has {int(sizes.max())} bytes; a token must have less than 4 MiB. Split it.")
        starts = sizes.cumsum(0) - sizes
        entries = ((starts << _SIZE_BITS | sizes) << _ROLE_BITS) | roles
        data = torch.frombuffer(bytearray(b"".join(tokens)) or bytearray(1), dtype=torch.uint8)
        return cls(data, entries).to(device)

    def to(self, device: torch.device | str) -> Self:
        return VocabularyBytes(*(tensor.to(device) for tensor in self))


def _role(token: bytes) -> int:
    if not token or b"<" in token:
        return TEXT
    return BRACKET if b"(" in token or b"[" in token else PLAIN


def unpack_entries(entries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Start, size and role of each entry: token t is data[start : start + size]."""
    sizes = (entries >> _ROLE_BITS) & ((1 << _SIZE_BITS) - 1)
    return entries >> (_SIZE_BITS + _ROLE_BITS), sizes, entries & ((1 << _ROLE_BITS) - 1)
