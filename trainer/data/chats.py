"""Reads chats: the turns of a record under `messages` or `conversations`, and the gold box in its first answer."""

import re
from collections.abc import Callable

import torch

from boxgrpo.kernels import grounding_rewards, pack_texts

from .example import Box, Refused, Source, check_text, checked_box
from .images import resolve_images

CHAT = ("conversations", "messages")  # keys of a chat
_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_MARKED = re.compile(r"\((\d{1,9}),\s*(\d{1,9})\),\s*\((\d{1,9}),\s*(\d{1,9})\)")


def _turns(record: dict) -> tuple[tuple[str, str], ...]:
    chat = record.get("messages", record.get("conversations"))
    if not isinstance(chat, list) or not chat or not all(isinstance(turn, dict) for turn in chat):
        raise Refused("no_turns", f"messages is {chat!r:.80}; a list of turns is needed.")
    turns = []
    for index, turn in enumerate(chat):
        role = turn.get("role", turn.get("from"))
        expected = ("user", "assistant")[index % 2]
        if _ROLES.get(str(role)) != expected:
            raise Refused(
                "turn_order", f"turn {index} is from {role!r}; user and assistant must alternate, user first."
            )
        text = turn.get("content", turn.get("value"))
        turns.append((expected, check_text(text, "answer" if index % 2 else "question")))
    if len(turns) % 2:
        raise Refused("no_answer", f"the last of {len(turns)} turns is the user's; a chat must end with an answer.")
    return tuple(turns)


def read_chat(record: dict, file: Source, gold_box: Callable) -> dict:
    turns = _turns(record)
    gold = gold_box(turns)
    images = resolve_images(record.get("images"), file)
    return {"images": images, "question": turns[0][1], "turns": turns, "gold": gold}


def tagged_box(turns: tuple[tuple[str, str], ...]) -> Box | None:
    """The box in the first answer's tags, if there is one."""
    answer = turns[1][1]
    if "<answer>" not in answer:  # a quick check before the kernel
        return None
    read = grounding_rewards(*pack_texts([answer.encode()]), torch.zeros(1, 4))
    return checked_box(read.boxes[0].tolist()) if read.found else None


def only_marked_box(turns: tuple[tuple[str, str], ...]) -> Box | None:
    """The box between marks in the first answer, if it has no other. The boxes of all answers are checked."""
    boxes = [[_marked_box(found) for found in _MARKED.findall(text)] for _, text in turns[1::2]]
    return boxes[0][0] if len(boxes[0]) == 1 else None


def _marked_box(found: tuple[str, ...]) -> Box:
    x1, y1, x2, y2 = box = [int(value) for value in found]
    if 0 <= x1 < x2 <= 1000 and 0 <= y1 < y2 <= 1000:  # a shortcut for valid boxes, of which a file may hold a million
        return float(x1), float(y1), float(x2), float(y2)
    return checked_box(box, what="box")
