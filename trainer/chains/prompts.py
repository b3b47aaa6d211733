"""The words that make_cot sends, and how a judge's answer is read (paper, section 3.2; the wording is ours)."""

import re
from collections.abc import Sequence

from boxgrpo.trainer.data.example import box_text

# 150 words leave room in the 256 tokens that GRPO samples.
_CHAIN = """\
You are shown {images} and a question about {them}. The answer is known: it is a bounding box.

Question: {question}
Box: {box}

A box is written (x1, y1), (x2, y2), its top left and its bottom right corner, in thousandths of the width and of the \
height of the image in which the question wants something found.

Write down how a careful observer who was not told the box would find it: what is asked for, what each image that \
matters shows, how the images belong together, which other candidates there are and why they are not meant, and where \
the object lies that remains. Say only what can be seen. Never say or hint that the box was given. At most 150 words.

Reply in this form and add nothing:
<think>the reasoning</think><answer>{box}</answer>"""

_JUDGE = """\
You are shown {images} and a question about {them}, whose correct answer is the box {box}: its top left and its bottom \
right corner, in thousandths of the width and of the height of the image in which the question wants something found.

Question: {question}

{replies}

Judge each reply by its reasoning. Is everything that it says to be seen really there? Does one step follow from \
another, and do they lead to this box and no other object? Does it find the box by itself, without having been told? \
Is it clear and free of repetition?

Write one short sentence about each reply, then a last line with the number of the best one, or with 0 if none of \
them is sound:
Best: N"""

_BEST = re.compile(r"\bbest\b[^\n0-9]{0,20}([0-9]{1,3})(?![0-9])", re.IGNORECASE)
_BARE = re.compile(r"\W*([0-9]{1,3})\W*")


def chain_prompt(question: str, box: Sequence[float], images: int) -> str:
    """Asks for one reasoning chain; the images stand before it."""
    return _CHAIN.format(question=question, box=box_text(box), **_named(images))


def judge_prompt(question: str, box: Sequence[float], images: int, chains: Sequence[str]) -> str:
    """Asks which of the chains is best, counted from 1; the images stand before it."""
    replies = "\n\n".join(f"Reply {k}:\n{chain}" for k, chain in enumerate(chains, 1))
    return _JUDGE.format(question=question, box=box_text(box), replies=replies, **_named(images))


def read_verdict(text: str, chains: int) -> int | None:
    """The number after the last "Best", or the only thing said: 1 to `chains`, 0 for none; None: no such number."""
    *_, last = None, *_BEST.finditer(text)
    found = last or _BARE.fullmatch(text)
    return int(found[1]) if found and int(found[1]) <= chains else None


def _named(images: int) -> dict[str, str]:
    return {"images": "an image", "them": "it"} if images == 1 else {"images": f"{images} images", "them": "them"}
