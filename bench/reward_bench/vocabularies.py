"""The tokenizer of a benchmark: Qwen2's where its merges are at hand, else one made here with as many tokens."""

import itertools
import os
import string
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from boxgrpo.bench.machine import shared_data
from boxgrpo.trainer.data.vocabulary import SPECIAL_TOKENS, demo_tokenizer, with_special_tokens

TOKENS, MERGES, BYTES = 151_657, 151_387, 256  # of Qwen2's tokenizer


def qwen2_tokenizer(path: str | os.PathLike | None) -> PreTrainedTokenizerBase:
    """The real Qwen2 tokenizer from its `merges.txt`; None: the one in the folder BOXGRPO_SHARED.

    Ids: 256 bytes in GPT-2's order, then one for each merge, then `SPECIAL_TOKENS` from 151643 on.

    Raises:
        ValueError: there is no such file, or it is not Qwen2's.
    """
    file = Path(path or shared_data() / "qwen2_tokenizer/merges.txt")
    if not file.is_file():
        raise ValueError(f"there is no {file}; the real vocabulary needs a Qwen2 model's. Name it with --merges.")
    lines = file.read_text(encoding="utf-8").rstrip("\n").split("\n")
    merges = [tuple(line.split(" ")) for line in lines if not line.startswith("#version")]
    if len(merges) != MERGES or any(len(merge) != 2 for merge in merges):
        raise ValueError(
            f"{file} holds {len(merges)} lines that should be Qwen2's {MERGES} merges of two pieces. "
            "Pass the merges.txt of a Qwen2 model."
        )
    pieces = [*bytes_to_unicode().values(), *(left + right for left, right in merges)]
    return with_special_tokens(Qwen2Tokenizer(vocab={piece: k for k, piece in enumerate(pieces)}, merges=merges))


def benchmark_tokenizer(path: str | os.PathLike | None, texts: Sequence[str]) -> tuple[PreTrainedTokenizerBase, str]:
    """A tokenizer of 151,657 tokens, and what it was made from.

    Without Qwen2's merges the pieces of `texts` are tokens, as they would be there, and four-letter words fill the
    vocabulary up: special tokens have their published ids, and a sampled token is one of as many.

    Raises:
        ValueError: `path` is given, and is no merges.txt of Qwen2.
    """
    try:
        return qwen2_tokenizer(path), "Qwen2's merges"
    except ValueError:
        if path:
            raise
    missing = TOKENS - BYTES - len(SPECIAL_TOKENS)
    words = ("".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=4))
    filler = [" ".join(itertools.islice(words, 1000)) for _ in range(0, missing, 1000)]
    # Twice: what is frequent comes first.
    return demo_tokenizer([*texts, *texts, *filler], vocab_size=TOKENS), "made here, no merges.txt at hand"
