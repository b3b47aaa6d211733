"""The special tokens and chat templates, the demo's small tokenizer, and the bytes of a tokenizer's ids."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

# From 151643 on in Qwen2's vocabulary.
_SPECIAL_NAMES = (
    "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end "
    "vision_start vision_end vision_pad image_pad video_pad"
)
SPECIAL_TOKENS = tuple(f"<|{name}|>" for name in _SPECIAL_NAMES.split())
BOX_MARKS = ("<|box_start|>", "<|box_end|>")

SYSTEM_PROMPT = "You are a helpful assistant."


def chat_template(default_system: str | None) -> str:
    """A template equivalent to the families' own for text and images, with the system's text of a chat without one.

    None: such a chat has no system's turn. A message's content is a string or a list of parts.
    """
    turn = f"<|im_start|>system\n{default_system}<|im_end|>\n"
    first = "{%- if loop.first and message.role != 'system' %}{{- '" + turn + "' }}{%- endif %}"
    return (
        f"{{%- for message in messages %}}{'' if default_system is None else first}"
        "{{- '<|im_start|>' + message.role + '\n' }}"
        "{%- if message.content is string %}{{- message.content }}{%- else %}"
        "{%- for part in message.content %}"
        "{%- if part.type == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"
        "{%- elif part.type == 'text' %}{{- part.text }}{%- endif %}"
        "{%- endfor %}{%- endif %}"
        "{{- '<|im_end|>\n' }}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
    )


# Pieces of the demo's tokenizer: a run of tags and punctuation with the spaces inside it and before a digit, a whole
# number, a word, white space.
_TAG_OR_MARK = r"(?:</?(?:think|answer)>|[^\s\p{L}\p{N}])"
_DEMO_PIECES = rf" ?{_TAG_OR_MARK}(?:{_TAG_OR_MARK}| (?=[^\s\p{{L}}]))*| ?\p{{N}}+| ?\p{{L}}+|\s+"


def demo_tokenizer(
    texts: Iterable[str], *, phrases: Sequence[str] = (), vocab_size: int = 1024
) -> PreTrainedTokenizerBase:
    """A small tokenizer: each piece of `texts` is one token, and any other text is split into bytes.

    Pieces are words, whole numbers, and runs of tags and punctuation such as `), (` or `.</think><answer>(`, so that
    a completion of the demo has few tokens. The vocabulary holds whole pieces and no merges: BPE would spend ids on
    fragments that never occur alone. Special tokens have Qwen2's names and the last ids.

    Args:
        texts: the texts whose most frequent pieces form the vocabulary.
        phrases: fixed strings, such as a template's sentences, that are treated as one piece each.
        vocab_size: maximum number of tokens, at least the 256 bytes and 14 special tokens; fewer if texts has fewer.
    """
    alphabet = list(bytes_to_unicode().values())
    room = vocab_size - len(alphabet) - len(SPECIAL_TOKENS)
    longest_first = sorted(phrases, key=len, reverse=True)
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("|".join([*map(re.escape, longest_first), _DEMO_PIECES])), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    counts = Counter(piece for text in texts for piece, _ in split.pre_tokenize_str(text))
    frequent = sorted((piece for piece in counts if len(piece) > 1), key=lambda piece: (-counts[piece], piece))
    vocab = {piece: index for index, piece in enumerate(alphabet + frequent[:room])}
    backend = Tokenizer(BPE(vocab=vocab, merges=[], ignore_merges=True))  # a whole piece of the vocabulary is one token
    backend.pre_tokenizer = split
    backend.decoder = decoders.ByteLevel()
    return with_special_tokens(PreTrainedTokenizerFast(tokenizer_object=backend))


def token_bytes(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[bytes]:
    """The bytes of each id, for the kernels' `VocabularyBytes`; special tokens are empty, except the box marks.

    Args:
        tokenizer: a byte-level tokenizer.
        vocab_size: the model's vocabulary; ids beyond the tokenizer's are empty.
    """
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    special = set(tokenizer.all_special_ids)
    added = tokenizer.added_tokens_decoder
    table = []
    for index, piece in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))):
        if index in special and piece not in BOX_MARKS:
            table.append(b"")
        elif index in added:  # its content is plain text, not byte-level characters
            table.append(piece.encode())
        else:
            table.append(bytes(byte_of[character] for character in piece))
    return table + [b""] * (vocab_size - len(table))


def box_mark_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of `<|box_start|>` and `<|box_end|>`, if the tokenizer has them."""
    return [index for index, token in tokenizer.added_tokens_decoder.items() if token.content in BOX_MARKS]


def with_special_tokens(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer with `SPECIAL_TOKENS` after its own, their roles, and Qwen2-VL's chat template."""
    # Before the roles are set: adding these tokens by role would give them other ids.
    tokenizer.add_special_tokens({"extra_special_tokens": list(SPECIAL_TOKENS)})
    tokenizer.pad_token, tokenizer.eos_token = "<|endoftext|>", "<|im_end|>"
    tokenizer.chat_template = chat_template(SYSTEM_PROMPT)
    return tokenizer
