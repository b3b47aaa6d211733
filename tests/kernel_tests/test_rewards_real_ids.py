"""On token ids of the real Qwen2 tokenizer: ids give what their text gives, wherever the tokens cut it."""

import itertools
import random

import pytest
import torch

from boxgrpo.kernels import ANSWER_FORMATS, VocabularyBytes, grounding_rewards, grounding_rewards_from_ids, pack_texts
from boxgrpo.trainer.data.vocabulary import SPECIAL_TOKENS, box_mark_ids, qwen2_tokenizer, token_bytes
from fuzz_rewards import completions

ROWS = 151_936  # of the 2B's head
END = 151_645


@pytest.fixture(scope="module")
def qwen2(shared):
    return qwen2_tokenizer(shared / "data/qwen2_tokenizer/merges.txt")


@pytest.fixture(scope="module")
def tokens(qwen2):
    return token_bytes(qwen2, ROWS)


@pytest.fixture(scope="module")
def table(qwen2, tokens):
    return VocabularyBytes.build(tokens, [151_643, END], mark_ids=box_mark_ids(qwen2))


def check(rows, texts, table, codes):
    """The rewards of ids, after all fields were compared with those of the texts by Python's `re`."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    lengths, gold = (
        torch.tensor([len(row) for row in rows]),
        torch.tensor([[100.0, 200, 300, 400]]).repeat(len(rows), 1),
    )
    got = grounding_rewards_from_ids(ids, lengths, table, gold, answer_format=codes)
    want = grounding_rewards(*pack_texts(texts), gold, answer_format=codes, backend="torch")
    for name, a, b in zip(got._fields, got, want, strict=True):
        wrong = (a != b).view(len(rows), -1).any(1).nonzero().flatten().tolist()
        assert not wrong, (name, texts[wrong[0]], rows[wrong[0]])
    return got


def test_20000_texts(qwen2, table):
    """Encoded as the tokenizer does: special tokens in the text become themselves, and the first end ends it."""
    draw = random.Random(0)
    raw, names = completions(draw, 20_000)
    texts = [text.decode(errors="replace") for text in raw]
    for i in range(0, len(texts), 10):
        texts[i] += draw.choice(("<|im_end|>", "<|im_end|>\n", "<|image_pad|>", "<|endoftext|>(1, 2), (3, 4)"))
    rows = qwen2(texts, add_special_tokens=False)["input_ids"]
    assert sum(map(len, rows)) > 500_000
    silent = [token for token in SPECIAL_TOKENS if token not in ("<|box_start|>", "<|box_end|>")]
    heard = []
    for text, name in zip(texts, names, strict=True):
        text = text.split("<|im_end|>")[0].split("<|endoftext|>")[0]
        for token in silent if name == "marked" else SPECIAL_TOKENS:
            text = text.replace(token, "")
        heard.append(text.encode())
    codes = torch.tensor([ANSWER_FORMATS[name] for name in names], dtype=torch.uint8)
    got = check(rows, heard, table, codes)
    assert got.found.sum() > 5000 and got.format.sum() > 5000


def spellings(text, by_bytes):
    """Every way to write `text` in tokens of the vocabulary."""
    if not text:
        return [[]]
    return [
        [by_bytes[text[:size]], *rest]
        for size in range(1, len(text) + 1)
        if text[:size] in by_bytes
        for rest in spellings(text[size:], by_bytes)
    ]


def test_a_tag_or_a_number_cut_in_every_way(tokens, table):
    """Each part of an answer in every spelling that the vocabulary allows, between the parts as they are."""
    by_bytes = {token: i for i, token in enumerate(tokens) if token}
    parts = [
        b"<think>",
        b"It is",
        b"</think>",
        b" \n",
        b"<answer>",
        b"(100, ",
        b"200), (",
        b"300",
        b", 400)",
        b"</answer>",
    ]
    bytewise = [[by_bytes[bytes([byte])] for byte in part] for part in parts]
    rows = []
    for k, part in enumerate(parts):
        found = spellings(part, by_bytes)
        before, after = (list(itertools.chain(*x)) for x in (bytewise[:k], bytewise[k + 1 :]))
        rows += [[*before, *spelling, *after] for spelling in found]
        assert part.count(b"0") or len(found) > 1, part  # in Qwen2 a digit is always a token
    # And across the parts: random spellings of the whole.
    whole, draw = b"".join(parts), random.Random(0)
    for _ in range(3000):
        row, at = [], 0
        while at < len(whole):
            sizes = [size for size in range(1, 16) if whole[at : at + size] in by_bytes and at + size <= len(whole)]
            size = draw.choice(sizes)
            row.append(by_bytes[whole[at : at + size]])
            at += size
        rows.append(row)
    used = {tokens[i] for row in rows for i in row}
    assert {b">(", b"think", b"nk", b"),", b" (", b")</"} <= used and len(set(map(tuple, rows))) > 2000
    got = check([[*row, END] for row in rows], [whole] * len(rows), table, torch.zeros(len(rows), dtype=torch.uint8))
    assert (got.format == 1).all() and (got.accuracy == 1).all()
