"""boxgrpo.kernels.dropin's reward functions, as VLM-R1 v0.2.1 calls them, beside its rules in regular expressions."""

import inspect
import random
import re

import pytest

from boxgrpo.kernels import dropin
from kernel_cases import assert_refused

THINK = "<think>Here.</think>"
GOLD = [0, 0, 500, 500.0]
ANSWERS = {  # text: IoU, format
    THINK + '<answer>{"bbox_2d": [0, 0, 500, 250]}</answer>': (0.5, 1.0),
    THINK + '\n<answer>```json\n[{"bbox_2d": [0,0, 500,\n500], "label": "é, 框"}]\n```</answer>': (1.0, 1.0),
    THINK + "<answer>[0, 0, 500, 500]</answer>": (1.0, 0.0),
    '<answer>{"bbox_2d": [250, 0, 500, 500]}</answer>': (0.5, 0.0),
    THINK + '<answer>{"bbox_2d": [0, 0, 500, 500]}, {"bbox_2d": [1, 1, 2, 2]}</answer>': (1.0, 1.0),
    THINK + "<answer>none</answer><answer>{[0, 0, 500, 500]}</answer>": (0.0, 1.0),
    THINK + '<answer>{"bbox_2d": [0.0, 0.0, 500.0, 500.0]}</answer>': (0.0, 0.0),
    THINK + '<answer>{"bbox_2d": [500, 500, 0, 0]}</answer>': (0.0, 1.0),
    THINK + '<answer>{"bbox_2d": [499, 0, 900, 500]}</answer>': (0.0, 1.0),  # 1 unit of overlap
    THINK + '<answer>{"bbox_2d": [498, 0, 998, 500]}</answer>': (2 / 998, 1.0),
    THINK + '<answer>{"bbox_2d": [7, 7, 7, 7]}</answer>': (0.0, 1.0),
    THINK + '{"bbox_2d": [0, 0, 500, 500]}': (0.0, 0.0),
    "": (0.0, 0.0),
}


def chat(texts):
    return [[{"content": text}] for text in texts]


@pytest.mark.parametrize("form", ["text", "list"])
def test_case_19_json_boxes_and_text_solutions(form):
    """Boxes in JSON, and solutions as texts with an <answer>, the last of which counts, or as lists."""
    gold = f"<answer>1</answer> <answer> {GOLD} </answer>" if form == "text" else GOLD
    columns = {"prompts": chat(ANSWERS), "image_path": [["a.jpg"]] * len(ANSWERS), "problem": [""] * len(ANSWERS)}
    accuracy = dropin.iou_reward(chat(ANSWERS), [gold] * len(ANSWERS), **columns)
    form = dropin.format_reward_rec(chat(ANSWERS), solution=[gold] * len(ANSWERS), **columns)
    assert list(zip(accuracy, form, strict=True)) == [(pytest.approx(iou), well) for iou, well in ANSWERS.values()]
    assert all(type(value) is float for value in [*accuracy, *form])
    assert dropin.iou_reward([], []) == [] and dropin.format_reward_rec([]) == []


def test_the_format_is_that_of_the_regular_expression():
    """Texts of random parts in random order, with half of them in the format."""
    pattern = r"<think>.*?</think>\s*<answer>.*?\{.*\[\d+,\s*\d+,\s*\d+,\s*\d+\].*\}.*?</answer>"
    parts = ["<think>", "</think>", "<answer>", "{", "[1, 2,3, 4]", "[1, 2]", "}", "</answer>", " \n"]
    draw = random.Random(0)
    texts = [
        "".join(part for part in parts for _ in range(draw.choice((0, 1, 1, 1, 2))))
        + "".join(draw.choices(parts, k=draw.randrange(6)))
        for _ in range(2000)
    ]
    want = [float(re.search(pattern, text, re.DOTALL) is not None) for text in texts]
    assert dropin.format_reward_rec(chat(texts)) == want and 300 < sum(want) < 1700


def test_what_is_refused():
    one = chat([*ANSWERS][:1])
    assert_refused(
        ("solution '.0, 1.' holds no box; it is '<answer>", lambda: dropin.iou_reward(one, ["[0, 1]"])),
        ("holds no box", lambda: dropin.iou_reward(one, ["<answer>[0, 0, 5]</answer>"])),
        ("holds no box", lambda: dropin.iou_reward(one, ['<answer>{"bbox_2d": [0, 0, 5, 5]}</answer>'])),
        ("holds no box", lambda: dropin.iou_reward(one, [None])),
        ("solution has 2 entries for 1 completions", lambda: dropin.iou_reward(one, [GOLD] * 2)),
        ("image_grid_thw is given; VLM-R1 after", lambda: dropin.iou_reward(one, [GOLD], image_grid_thw=[[1, 8, 8]])),
    )


def test_signatures():
    for reward, gold in ((dropin.iou_reward, ", solution: list"), (dropin.format_reward_rec, "")):
        assert str(inspect.signature(reward)).startswith(f"(completions: list[list[dict]]{gold}, **kwargs)")
