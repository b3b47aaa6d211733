"""Answers to score, and an independent scorer: areas counted square by square."""

import random
import re

import numpy as np


def written(box):
    return "({:.0f}, {:.0f}), ({:.0f}, {:.0f})".format(*box)


def text(box, think="It is there."):
    return f"<think>{think}</think><answer>{written(box)}</answer>"


def counted(box):
    """The box's own squares on a sheet of 1300 x 1300; an inverted box has none."""
    sheet = np.zeros((1300, 1300), dtype=bool)
    x1, y1, x2, y2 = map(int, box)
    sheet[y1:y2, x1:x2] = True
    return sheet


def scored_by_counting(examples, texts):
    """Task -> (Acc@0.5, mean IoU): the paper's rule in its plainest form, areas counted square by square."""
    ious = {}
    for example, answered in zip(examples, texts):
        numbers = re.findall(r"\d+", answered.split("<answer>")[1].split("</answer>")[0])
        gold, box = counted(example.gold), counted(numbers if len(numbers) == 4 else (0, 0, 0, 0))
        ious.setdefault(example.task, []).append((gold & box).sum() / (gold | box).sum())
    return {task: (np.mean(np.array(found) > 0.5), np.mean(found)) for task, found in ious.items()}


def varied_answers(examples):
    """Near and far, beyond the image, inverted, and without a box; with another box in the reasoning."""
    draw = random.Random(0)
    texts = []
    for example in examples:
        kind = draw.random()
        if kind < 0.1:
            texts.append("<think>It is (1, 2), (3, 4).</think><answer>nowhere</answer>")
            continue
        box = [max(0, round(value + draw.gauss(0, 60))) for value in example.gold]
        texts.append(text(box[2:] + box[:2] if kind < 0.2 else box, think=f"Near {written(example.gold)}."))
    return texts
