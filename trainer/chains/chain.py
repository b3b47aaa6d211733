"""From a record with a gold box to one with a reasoning chain: three are asked for, checked, and the best is picked."""

import asyncio
import dataclasses
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from boxgrpo.kernels import grounding_rewards, pack_texts
from boxgrpo.trainer.data.processor import THINK_SUFFIX
from boxgrpo.trainer.data.readers import Example, plain_text

from .prompts import chain_prompt, judge_prompt, read_verdict
from .server import HALF, Ask, Asker, Pictures

log = logging.getLogger(__name__)

_MARK = re.compile("<\\||<image>|[\ud800-\udfff]")  # of chat templates and of records; half a character


@dataclass
class Outcome:
    """What became of an example: its record, or the reason why it has none; and a word on each of its chains."""

    record: dict | None
    reason: str = ""
    chains: Sequence[str] = ()  # passed, half_answer, bad_form or wrong_box


def check_chains(texts: Sequence[str], gold: Sequence[float], min_iou: float) -> tuple[list[str], list[float]]:
    """`passed`, `bad_form` or `wrong_box` for each text, and its box's IoU with gold (0-1000).

    The form is the format reward's and stricter: nothing before `<think>`, something in it, each tag once, and no mark
    that a chat template or a reader of records would trip over.
    """
    packed = pack_texts([text.encode(errors="replace") for text in texts])
    rewards = grounding_rewards(*packed, torch.tensor([gold] * len(texts), dtype=torch.float32))
    ious = rewards.accuracy.tolist()
    found = []
    for text, form, iou in zip(texts, rewards.format.tolist(), ious):
        thought = text.removeprefix("<think>").partition("</think>")[0].strip()
        once = all(text.count(tag) == 1 for tag in ("<think>", "</think>", "<answer>", "</answer>"))
        good = form == 1 and text.startswith("<think>") and thought and once and not _MARK.search(text)
        found.append("bad_form" if not good else "passed" if iou > min_iou else "wrong_box")
    return found, ious


async def settle(example: Example, pictures: Pictures, asker: Asker, o) -> Outcome:
    """Ask for an example's chains, check them, have the best picked, and make its stage-1 record."""
    if example.gold is None:
        return Outcome(None, "no_gold_box")
    if example.answer_format != "think":
        return Outcome(None, "no_thinking_asked")
    x1, y1, x2, y2 = gold = tuple(float(round(v)) for v in example.gold)  # chains write whole numbers
    if x1 == x2 or y1 == y2:
        return Outcome(None, "box_too_small")

    question = plain_text(example.question).removesuffix(THINK_SUFFIX)
    images = len(example.images)
    settings = {"pictures": pictures, "max_tokens": o.max_tokens, "source": example.source}
    prompt = chain_prompt(question, gold, images)
    asks = [Ask("chain", o.model, prompt, temperature=o.temperature, number=k, **settings) for k in range(o.chains)]
    answers = await asyncio.gather(*map(asker.answer, asks))
    for answer in answers:
        if "failure" in answer:
            return _unanswered(example, answer)
    texts = [answer["text"].strip() for answer in answers]
    words, ious = check_chains(texts, gold, o.min_iou)
    words = ["half_answer" if a["finish"] in HALF else word for a, word in zip(answers, words)]
    passed = [k for k, word in enumerate(words) if word == "passed"]
    if not passed:
        return Outcome(None, "no_chain_passed", words)

    prompt = judge_prompt(question, gold, images, [texts[k] for k in passed])
    judge = Ask("judge", o.judge_model or o.model, prompt, temperature=o.judge_temperature, **settings)
    verdict = await asker.answer(judge)
    if "failure" in verdict:
        return dataclasses.replace(_unanswered(example, verdict), chains=words)
    best = read_verdict(verdict["text"], len(passed)) if verdict["finish"] not in HALF else None
    if not best:
        return Outcome(None, "verdict_unreadable" if best is None else "none_sound", words)
    k = passed[best - 1]
    root = o.image_root or o.output_dir
    asked = "<image>" * images + question + THINK_SUFFIX
    turns = (("user", asked), ("assistant", texts[k]))
    record = {
        "id": example.id,
        "task": example.task,
        "images": [os.path.relpath(path, root) for path in example.images],
        "target_image": example.target_image,
        "messages": [{"role": role, "content": text} for role, text in turns],
        "cot": {
            "source": example.source,
            "gold": list(example.gold),
            "iou": ious[k],
            "model": asks[k].model,
            "judge": judge.model,
            "chain": answers[k]["key"],
            "verdict": verdict["key"],
            "passed": len(passed),
        },
    }
    return Outcome(record, chains=words)


def _unanswered(example: Example, answer: dict) -> Outcome:
    if answer["message"]:
        log.warning("%s is left out: %s (%s)", example.source, answer["failure"], answer["message"])
    return Outcome(None, answer["failure"])
