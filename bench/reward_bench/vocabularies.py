"""The tokenizer of a benchmark: Qwen2's where its merges are at hand, else one made here with as many tokens."""

import itertools
import os
import string
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from boxgrpo.bench.step_bench.cases import merges
from boxgrpo.trainer.data.vocabulary import SPECIAL_TOKENS, demo_tokenizer, qwen2_tokenizer

TOKENS = 151_657  # of Qwen2's
BYTES = 256


def benchmark_tokenizer(path: str | os.PathLike | None, texts: Sequence[str]) -> tuple[PreTrainedTokenizerBase, str]:
    """A tokenizer of 151,657 tokens, and what it was made from.

    Without Qwen2's merges the pieces of `texts` are tokens, as they would be there, and four-letter words fill the
    vocabulary up: special tokens have their published ids, and a sampled token is one of as many.

    Raises:
        ValueError: `path` is given, and is no merges.txt of Qwen2.
    """
    try:
        return qwen2_tokenizer(merges(path)), "Qwen2's merges"
    except ValueError:
        if path:
            raise
    missing = TOKENS - BYTES - len(SPECIAL_TOKENS)
    words = ("".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=4))
    filler = [" ".join(itertools.islice(words, 1000)) for _ in range(0, missing, 1000)]
    # Twice: what is frequent comes first.
    return demo_tokenizer([*texts, *texts, *filler], vocab_size=TOKENS), "made here, no merges.txt at hand"
