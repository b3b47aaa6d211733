"""Reads chats: the turns of a record under `messages` or `conversations`, and the gold box in its first answer."""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain, repeat
from typing import NamedTuple

import torch

from boxgrpo.kernels import grounding_rewards, pack_texts

from .boxes import gold_box, pixel_size, tells_size
from .example import EMPTY, MARK, Box, Refused, Source, check_system, check_text, checked_box, refuse_keys
from .images import listed_images, resolve_images

CHAT = ("conversations", "messages")  # keys of a chat
Turns = tuple[tuple[str, str], ...]  # (role, text)
_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_IMAGE_KEYS = {"image", "image_url", "path", "url"}  # of a part: what names the image
_LABELS = {"id", "index", "name", "timestamp"}  # keys of a turn that change nothing
# Keys of a record that change what its chat means, beside those of every form (example.py), `label` if it is true or
# false. Any other key only describes it.
_CHANGING = frozenset(
    """
    sys prefix suffix assistant_prefix template add_generation_prompt prompt query instruction input response
    output completion reasoning_content thinking chosen rejected rejected_response rejected_images rejected_messages
    positive_messages negative_messages kto_tag label mask_history loss_mask completion_mask assistant_masks loss
    loss_scale loss_weight sample_weight weight weights resized_height resized_width
    """.split()
)
_IN_OBJECTS = "bbox of objects"  # in messages
_MARKED = re.compile(r"\((\d{1,9}),\s*(\d{1,9})\),\s*\((\d{1,9}),\s*(\d{1,9})\)")
# Four numbers in brackets, tags or quotes, such as (0.1, 0.2), (0.3, 0.4), or a corner of a JSON object.
_NUMBER = r"[\"']?-?[0-9]++(?:\.[0-9]++)?+[\"']?"
_ANY_BOX = re.compile(
    rf"[\[(>\"'](?:\s*+{_NUMBER}(?:[\s,()\[\]]++{_NUMBER}){{3}}\s*+[\])<\"']|(?:x_?1|x_?min|left)[\"']\s*+:)"
)
_PLACEHOLDER = re.compile("<ref-object>|<bbox>(?!.*</bbox>)", re.DOTALL)  # <bbox>…</bbox> holds its own box
# Units of boxes in `objects`, by ms-swift's names for them and those of its version 2.
_UNITS = {"real": "pixels", "norm1": "fractions", "norm_1": "fractions", "norm_1000": "thousandths"}


def read_chat(record: dict, file: Source, box_in: Callable[[Turns], Box | None]) -> dict:
    """Fields of the Example. A first question without an image has no gold box.

    While `file.objects_unit` is "auto", the gold box is the first in `objects` without a unit, as it is written.
    """
    if not _CHANGING.isdisjoint(record):
        refuse_keys(record, _CHANGING)
    system, turns, named = _read_turns(record)
    images = listed_images(record)
    if named and images and images != named:
        raise Refused("two_image_lists", f"images is {images!r:.80}; its parts name {named!r:.80}. Remove one list.")
    fields = {"images": resolve_images(named or images, file), "system": system}
    if len(fields["images"]) == 1 and tells_size(record):
        try:
            pixel_size(fields["images"][0], record, file)
        except Refused as refused:
            if refused.reason != "bad_size":  # then they may mean something else than the image's
                raise
    names, boxes = _read_objects(record.get("objects"), len(fields["images"]))
    if filled := bool(_PLACEHOLDER.search(" ".join(text for _, text in turns))):
        if open_boxes := [box for box in boxes if not box.unit and file.objects_unit == "auto"]:
            image = open_boxes[0].image
            gold = gold_box(open_boxes[0].corners, fields["images"][image], replace(file, unit="auto"), _IN_OBJECTS, {})
            return fields | {"question": turns[0][1], "turns": turns, "gold": gold, "target_image": image}
        asked = turns[0][1].count("<bbox>")
        turns = _fill(turns, names, boxes, fields["images"], file)
        if boxes[asked:]:
            fields["target_image"] = boxes[asked].image
    elif names or boxes:
        rule = "the chat has no <ref-object> or <bbox> that its names and boxes replace"
        raise Refused("unused_objects", f"objects is {record['objects']!r:.80}; {rule}. Place them, or remove objects.")
    gold, question, answer, unread = box_in(turns), turns[0][1], turns[1][1], False
    if filled and gold is None:
        box_in, gold = only_marked_box, only_marked_box(turns)
    if gold is None and not (box_in is only_marked_box and _MARKED.search(answer)):  # nor are several boxes read
        unread = bool(_ANY_BOX.search(answer))
    if gold and MARK not in question + (system or "") and any(MARK in text for _, text in turns[2::2]):
        gold = None
    return fields | {"question": question, "turns": turns, "gold": gold, "unread": unread}


def _read_turns(record: dict) -> tuple[str | None, Turns, list]:
    """The system's text, the other turns, and the images that their parts name; a part's place is a mark."""
    chat = record.get("messages") or record.get("conversations")
    if not isinstance(chat, list) or not chat or not all(isinstance(turn, dict) for turn in chat):
        raise Refused("no_turns", f"messages is {chat!r:.80}; a list of turns is needed. Correct it.")
    if record.get("conversations") not in (None, [], chat):
        raise Refused("two_chats", "messages and conversations differ; one chat is needed. Remove one of them.")
    system, turns, images = None, [], []
    for index, turn in enumerate(chat):
        keys = "role" if "role" in turn else "from", "content" if "content" in turn else "value"
        role, content = map(turn.get, keys)
        for key in turn.keys() - {*keys, *_LABELS} if len(turn) > 2 else ():
            if turn[key] not in EMPTY:
                rule = f"only {keys[0]} and {keys[1]} are used"
                raise Refused("unused_key", f"turn {index} has {key}: {turn[key]!r:.40}; {rule}. Remove it.")
        text = _text_of_parts(content, images, index) if isinstance(content, list) else content
        expected = ("user", "assistant")[len(turns) % 2]
        if index == 0 and role == "system":
            system = check_system(text)
        elif _ROLES.get(str(role)) != expected:
            rule = "user and assistant must alternate, user first; before them one turn may be the system's"
            raise Refused("turn_order", f"turn {index} is from {role!r}; {rule}. Remove or join turns.")
        else:
            name = "question" if expected == "user" else "answer"
            turns.append((expected, check_text(text, name, image_alone=expected == "user", turn=index)))
    if not turns or len(turns) % 2:
        raise Refused("no_answer", f"the last of {len(chat)} turns is from {role!r}; an answer ends a chat. Add it.")
    return system, tuple(turns), images


def _text_of_parts(parts: list, images: list, turn: int) -> str:
    """The parts' texts, with a mark for each image; what the parts say of the images is appended to `images`."""
    text = ""
    for part in parts:
        given = {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else {}
        kind = given.pop("type", None) or next(iter(given), None)
        if kind == "text" and given.keys() == {"text"} and isinstance(given["text"], str):
            text += given["text"]
        elif kind in ("image", "image_url") and len(given) <= 1 and given.keys() <= _IMAGE_KEYS:
            images += given.values()
            text += MARK
        else:
            rule = 'a part is {"type": "text", "text": ...} or {"type": "image", "image": ...}, with no other key'
            shown = f"is of type {kind!r} and has {', '.join(sorted(given)) or 'nothing else'}"
            raise Refused("bad_part", f"a part of turn {turn} {shown}; {rule}. Correct it; of a video give the frames.")
    return text


class _Object(NamedTuple):
    """A box of `objects`."""

    corners: object  # as it is written
    unit: str | None  # one of `BOX_UNITS`; None: it has no type
    image: int  # index of its image


def _read_objects(objects: object, images: int) -> tuple[list, list[_Object]]:
    """The names and boxes of `objects`, in a record with so many images.

    It is {"ref": names, "bbox": boxes, "bbox_type": unit, "image_id": indices of images}, or, as in ms-swift 2, a list
    of {"caption", "bbox", "bbox_type", "image"}, or the JSON text of either.
    """
    if objects in EMPTY:
        return [], []
    if isinstance(objects, str):
        try:
            objects = json.loads(objects)
        except (ValueError, RecursionError) as error:
            raise Refused("bad_objects", f"objects is {objects!r:.80}, not JSON ({error}). Write it again.") from error
    if isinstance(objects, list) and all(isinstance(one, dict) for one in objects):
        _check_keys(objects, ("caption", "bbox", "bbox_type", "image"))
        names = [one.get("caption") for one in objects]
        rows = [(one.get("bbox"), one.get("bbox_type"), one.get("image")) for one in objects]
    else:
        given = objects if isinstance(objects, dict) else {}
        names, boxes, image_of = lists = [given.get(key) or [] for key in ("ref", "bbox", "image_id")]
        if not isinstance(objects, dict) or not all(isinstance(one, list) for one in lists):
            rule = 'it is {"ref": names, "bbox": boxes} or a list of {"caption": name, "bbox": box}'
            raise Refused("bad_objects", f"objects is {objects!r:.80}; {rule}. Correct it.")
        _check_keys([objects], ("ref", "bbox", "bbox_type", "image_id"))
        rows = zip(boxes, repeat(given.get("bbox_type")), chain(image_of, repeat(0)))
    found = []
    for box, kind, index in rows:
        if (kind and str(kind) not in _UNITS) or index not in (None, *range(images)):
            rule = f"types are {', '.join(_UNITS)}, images 0 to {images - 1}"
            raise Refused("bad_objects", f"objects has a box of type {kind!r} in image {index!r}; {rule}. Correct it.")
        found.append(_Object(box, _UNITS[kind] if kind else None, int(index or 0)))
    return names, found


def _check_keys(objects: list[dict], known: tuple[str, ...]) -> None:
    for one in objects:
        for key in sorted(one.keys() - known):
            if one[key] not in EMPTY:
                rule = f"only {', '.join(known)} are used"
                raise Refused("unused_key", f"objects has {key}: {one[key]!r:.40}; {rule}. Remove it.")


def _fill(turns: Turns, names: list, boxes: Sequence[_Object], images: Sequence[str], file: Source) -> Turns:
    """The turns with names and boxes (0-1000) in the places of their placeholders, as ms-swift does for Qwen2-VL."""
    texts = {"<ref-object>": [], "<bbox>": []}
    for corners, unit, image in boxes:
        of_this = replace(file, unit=unit or file.objects_unit, counts=Counter())  # records are counted, not boxes
        box = gold_box(corners, images[image], of_this, _IN_OBJECTS, {})
        texts["<bbox>"].append("<|box_start|>({},{}),({},{})<|box_end|>".format(*map(round, box)))
    text = "".join(text for _, text in turns)
    if "<ref-object>" in text:
        refs = [check_text(name, "ref") for name in names]
        texts["<ref-object>"] = [f"<|object_ref_start|>{name}<|object_ref_end|>" for name in refs]
    for placeholder, values in texts.items():
        if (count := text.count(placeholder)) not in (0, len(values)):
            rule = f"objects has {len(values)} values for them; each needs one"
            raise Refused("bad_objects", f"the chat has {count} placeholders {placeholder}, {rule}. Correct objects.")
    left = {placeholder: iter(values) for placeholder, values in texts.items()}
    return tuple((role, _PLACEHOLDER.sub(lambda found: next(left[found[0]]), text)) for role, text in turns)


def tagged_box(turns: Turns) -> Box | None:
    """The box in the first answer's tags, if there is one."""
    answer = turns[1][1]
    if "<answer>" not in answer:  # a quick check before the kernel
        return None
    read = grounding_rewards(*pack_texts([answer.encode()]), torch.zeros(1, 4))
    return checked_box(read.boxes[0].tolist()) if read.found else None


def only_marked_box(turns: Turns) -> Box | None:
    """The box between marks in the first answer, if it has no other. The boxes of all answers are checked."""
    boxes = [[_marked_box(found) for found in _MARKED.findall(text)] for _, text in turns[1::2]]
    return boxes[0][0] if len(boxes[0]) == 1 else None


def _marked_box(found: tuple[str, ...]) -> Box:
    x1, y1, x2, y2 = box = [int(value) for value in found]
    if 0 <= x1 < x2 <= 1000 and 0 <= y1 < y2 <= 1000:  # a shortcut for valid boxes, of which a file may hold a million
        return float(x1), float(y1), float(x2), float(y2)
    return checked_box(box, what="box")
