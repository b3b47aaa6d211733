"""The reward functions of VLM-R1 v0.2.1, for a box in JSON; univg_r1.py has UniVG-R1's version of them."""

import json
import re

ANSWER = re.compile("<answer>(.*?)</answer>", re.DOTALL)
OPENING = re.compile(r"<think>.*?</think>\s*<answer>", re.DOTALL)
BOX = re.compile(r"\[" + r",\s*".join([r"(\d+)"] * 4) + r"\]")


def iou_reward(completions: list[list[dict]], solution: list, **kwargs) -> list[float]:
    """IoU, 0-1, of the first box [x1, y1, x2, y2] in each completion's first <answer> with its gold box.

    0 without a box, and, as in VLM-R1, where the boxes overlap by no more than 1 unit in width or in height.

    Args:
        completions: n answers in chat form, [{"role": …, "content": text}].
        solution: n gold boxes in the answers' units: a text whose last <answer> is a JSON list, or a list of 4 numbers.
        kwargs: other columns of the data set, ignored.

    Returns:
        n floats.

    Raises:
        ValueError: `solution` does not hold n boxes; `image_grid_thw` is given, which later versions of VLM-R1 use.
    """
    if "image_grid_thw" in kwargs:
        raise ValueError(
            "image_grid_thw is given; VLM-R1 after v0.2.1 scales answers from the resized image by it, which this "
            "reward does not. Bring answers and solution to one scale, and leave the column out."
        )
    if len(solution) != len(completions):
        raise ValueError(f"solution has {len(solution)} entries for {len(completions)} completions. Give one for each.")
    golds = [_gold_box(given) for given in solution]
    answers = [ANSWER.search(completion[0]["content"]) for completion in completions]
    boxes = [answer and BOX.search(answer[1]) for answer in answers]
    return [_iou([*map(int, box.groups())], gold) if box else 0.0 for box, gold in zip(boxes, golds, strict=True)]


def format_reward_rec(completions: list[list[dict]], **kwargs) -> list[float]:
    """1 for each answer <think>…</think><answer>…{…[x1, y1, x2, y2]…}…</answer>, else 0; `completions` as above."""
    return [float(_has_format(completion[0]["content"])) for completion in completions]


def _has_format(text: str) -> bool:
    """Whether the parts stand in this order anywhere in the text, in linear time."""
    opening, end = OPENING.search(text), text.rfind("</answer>")
    brace = text.find("{", opening.end()) if opening else -1
    return -1 < brace < end and BOX.search(text, brace, max(text.rfind("}", brace, end), brace)) is not None


def _gold_box(given) -> list[float]:
    """The four numbers of a solution, a text with an <answer> or a list."""
    try:
        box = json.loads(ANSWER.findall(given)[-1]) if isinstance(given, str) else list(given)
        x1, y1, x2, y2 = map(float, box)
    except (IndexError, TypeError, ValueError) as error:
        raise ValueError(
            f"solution {given!r} holds no box; it is '<answer>[x1, y1, x2, y2]</answer>' or a list of 4 numbers."
        ) from error
    return [x1, y1, x2, y2]


def _iou(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 1 or height <= 1:
        return 0.0
    areas = ((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return width * height / (sum(areas) - width * height)
