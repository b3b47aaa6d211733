"""Make a record with a reasoning chain from one with a gold box: request several chains, check them, keep the best.

The prompts in `templates/` (worded by this project, not the paper) are part of the stored answers' keys: after a change
of a prompt its answers are requested again.
"""

import asyncio
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jinja2 import Environment, FileSystemLoader

from boxgrpo.kernels import grounding_rewards, pack_texts
from boxgrpo.trainer.data.example import MARK, THINK_SUFFIX, Example, asked, box_text, number_images

from .ask import TRUNCATED, RecordImages, Requester

log = logging.getLogger(__name__)

PROMPTS = Environment(loader=FileSystemLoader(Path(__file__).with_name("templates")), trim_blocks=True)
_BEST = re.compile(r"\bbest\b[^\n0-9]{0,20}([0-9]{1,3})(?![0-9])", re.IGNORECASE)
_BARE = re.compile(r"\W*([0-9]{1,3})\W*")
_FORBIDDEN = re.compile("<\\||<image>|[\ud800-\udfff]")  # marks of chat templates and records; lone surrogates
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def render_prompt(kind: str, question: str, box: Sequence[float], images: int, chains: Sequence[str] = ()) -> str:
    """The text of a request, which follows the images: for a "chain", or to "judge" which of `chains` is best.

    The template limits a chain to 150 words, which fit into the 256 tokens that GRPO samples.
    """
    words = {"images": "an image", "them": "it"} if images == 1 else {"images": f"{images} images", "them": "them"}
    template = PROMPTS.get_template(f"{kind}.txt")
    return template.render(question=question, box=box_text(box), chains=chains, **words)


def check_chains(texts: Sequence[str], gold: Sequence[float], min_iou: float) -> tuple[list[str], list[float]]:
    """`passed`, `bad_form` or `wrong_box` for each text, and its box's IoU with gold (0-1000).

    The right form has a format reward of 1, `<think>` at the start, some reasoning, each tag once, and no mark that a
    chat template or the reader of records would interpret.
    """
    packed = pack_texts([text.encode(errors="replace") for text in texts])
    rewards = grounding_rewards(*packed, torch.tensor([gold] * len(texts), dtype=torch.float32))
    ious, labels = rewards.accuracy.tolist(), []
    for text, form, iou in zip(texts, rewards.format.tolist(), ious):
        thought = text.removeprefix("<think>").partition("</think>")[0].strip()
        once = all(text.count(tag) == 1 for tag in _TAGS)
        good = form == 1 and text.startswith("<think>") and thought and once and not _FORBIDDEN.search(text)
        labels.append("bad_form" if not good else "passed" if iou > min_iou else "wrong_box")
    return labels, ious


def read_verdict(text: str, chains: int) -> int | None:
    """The judge's choice, a number after the last "Best" or alone: 1 to `chains`; 0: no chain; None: unreadable."""
    *_, last = None, *_BEST.finditer(text)
    found = last or _BARE.fullmatch(text)
    return int(found[1]) if found and int(found[1]) <= chains else None


@dataclass
class Outcome:
    """The new record of an example, or the reason why there is none, and a label for each chain."""

    record: dict | None
    reason: str = ""
    labels: Sequence[str] = ()  # passed, half_answer, bad_form or wrong_box


async def make_record(example: Example, images: RecordImages, requester: Requester, o) -> Outcome:
    """Request an example's chains, check them, let the judge choose the best, and make the stage-1 record."""
    if example.gold is None:
        return Outcome(None, "no_gold_box")
    if example.answer_format != "think":
        return Outcome(None, "no_thinking_asked")
    x1, y1, x2, y2 = gold = tuple(float(round(v)) for v in example.gold)  # chains contain whole numbers
    if x1 == x2 or y1 == y2:
        return Outcome(None, "box_too_small")

    marked, count = asked(example.question.rstrip().removesuffix(THINK_SUFFIX)), len(example.images)
    if MARK not in marked:
        marked = MARK * count + marked
    if marked.count(MARK) < count:
        return Outcome(None, "images_in_later_turns")
    question = number_images(marked)
    request = render_prompt("chain", question, gold, count)
    answers = await asyncio.gather(*(requester.answer("chain", request, images, number=k) for k in range(o.chains)))
    for answer in answers:
        if "failure" in answer:
            return _left_out(example, answer)
    texts = [answer["text"].strip() for answer in answers]
    labels, ious = check_chains(texts, gold, o.min_iou)
    labels = ["half_answer" if a["finish"] in TRUNCATED else label for a, label in zip(answers, labels)]
    passed = [k for k, label in enumerate(labels) if label == "passed"]
    if not passed:
        return Outcome(None, "no_chain_passed", labels)

    request = render_prompt("judge", question, gold, count, [texts[k] for k in passed])
    verdict = await requester.answer("judge", request, images)
    if "failure" in verdict:
        return _left_out(example, verdict, labels)
    best = read_verdict(verdict["text"], len(passed)) if verdict["finish"] not in TRUNCATED else None
    if not best:
        return Outcome(None, "verdict_unreadable" if best is None else "none_sound", labels)
    k = passed[best - 1]
    turns = (("user", marked + THINK_SUFFIX), ("assistant", texts[k]))
    if example.system is not None:
        turns = (("system", example.system), *turns)
    record = {
        "id": example.id,
        "task": example.task,
        "images": [os.path.relpath(path, o.image_root or o.output_dir) for path in example.images],
        "target_image": example.target_image,
        "messages": [{"role": role, "content": text} for role, text in turns],
    }
    cot = {"source": example.source, "gold": list(example.gold), "iou": ious[k], "model": answers[k]["model"]}
    cot |= {"judge": verdict["model"], "chain": answers[k]["key"], "verdict": verdict["key"], "passed": len(passed)}
    return Outcome(record | {"cot": cot}, labels=labels)


def _left_out(example: Example, answer: dict, labels: Sequence[str] = ()) -> Outcome:
    if answer["message"]:
        log.warning("%s is left out: %s (%s)", example.source, answer["failure"], answer["message"])
    return Outcome(None, answer["failure"], labels)
