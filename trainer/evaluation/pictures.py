"""Pictures of a run's results: predictions drawn over their images, sheets of such pictures, and curves."""

import base64
import io
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps

from boxgrpo.kernels import box_iou
from boxgrpo.trainer.data.example import Example
from boxgrpo.trainer.data.images import load_image
from boxgrpo.trainer.runtime.files import read_lines

log = logging.getLogger(__name__)

GOLD = (0, 150, 60)
PREDICTED = (225, 30, 30)
INK = (30, 30, 30)
FAINT = (110, 110, 110)
FRAME = (200, 200, 200)
PAPER = (255, 255, 255)
MARGIN = 12  # pixels, as are the sizes below
IMAGE_HEIGHT = 240
TEXT_SIZE = 15
LINE = 20
MIN_WIDTH = 420  # room for the legend under a single narrow image


def annotate(
    images: Sequence[Image.Image],
    *,
    gold: Sequence[float] | None = None,
    predicted: Sequence[float] | None = None,
    target_image: int = 0,
    question: str = "",
    reasoning: str | None = None,
    title: str = "",
    image_height: int = IMAGE_HEIGHT,
) -> Image.Image:
    """Draws the images side by side with the gold box (green) and the predicted box (red) on the target image.

    The images are `image_height` pixels high, or lower where they are wider than three times that.
    Boxes are x1, y1, x2, y2 on the 0-1000 scale of `images[target_image]` (counted from 0); None draws none. A
    predicted box that is inverted or leaves the image is drawn as far as it is visible; the IoU is `box_iou`'s.
    Below them are the legend with the IoU, the question and the reasoning, wrapped; characters that the font lacks
    show as boxes. With `reasoning` None there is no answer, and the legend reports no missing box. Returns RGB.
    """
    largest = (3 * image_height, image_height)
    shown = [ImageOps.contain(image.convert("RGB"), largest, Image.Resampling.LANCZOS) for image in images]
    width = max(sum(image.width for image in shown) + MARGIN * (len(shown) + 1), MIN_WIDTH)
    large, regular, small = (ImageFont.load_default(TEXT_SIZE + step) for step in (3, 0, -2))
    texts = ((title, large), (question, regular), (reasoning or "", regular))
    heading, asking, thought = (_wrap(text, font, width - 2 * MARGIN) for text, font in texts)
    top = MARGIN + len(heading) * LINE + (8 if heading else 0)
    captions = top + max(image.height for image in shown) + 6
    text = captions + 2 * LINE + 6
    page = Image.new("RGB", (width, text + LINE * (len(asking) + len(thought)) + 4 + MARGIN), PAPER)
    pen = ImageDraw.Draw(page)
    pen.multiline_text((MARGIN, MARGIN - 4), "\n".join(heading), INK, large, spacing=LINE - TEXT_SIZE)
    x = MARGIN
    for k, image in enumerate(shown):
        page.paste(image, (x, top))
        pen.rectangle([x - 1, top - 1, x + image.width, top + image.height], outline=FRAME)
        pen.text((x, captions), f"image {k + 1}", INK if k == target_image else FAINT, small)
        if k == target_image:
            # The gold box is drawn outside its edge, the predicted one inside: where they are equal, both are visible.
            _outline(pen, gold, image, (x, top), GOLD, outwards=3)
            _outline(pen, predicted, image, (x, top), PREDICTED, outwards=0)
        x += image.width + MARGIN
    _draw_legend(pen, captions + LINE, regular, gold, predicted, answered=reasoning is not None)
    for lines, y, ink in ((asking, text, INK), (thought, text + 4 + LINE * len(asking), FAINT)):
        for k, line in enumerate(lines):
            pen.text((MARGIN, y + k * LINE), line, ink, regular)
    return page


def annotate_example(example: Example, **options) -> Image.Image:
    """`annotate` of an example's images and gold box. Raises ValueError for an image that cannot be loaded."""
    images = [load_image(path) for path in example.images]
    return annotate(images, **{"gold": example.gold, "target_image": example.target_image} | options)


def draw_cases(cases: Sequence[tuple[dict, Example]], folder: Path, count: int) -> None:
    """Writes pictures of `count` cases spread evenly over the tasks, as 00.png, 01.png ...

    Args:
        cases: answers of `grade_texts` and their examples. Where the answers come from a file, the images may be on
            another machine: a case without its images has no picture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    count = min(count, len(cases))
    by_task = sorted(cases, key=lambda case: case[0]["task"])
    for number in range(count):
        a, example = by_task[number * len(cases) // count]
        texts = {"question": example.question, "reasoning": a["answer"], "title": example.task}
        try:
            annotate_example(example, predicted=a["box"], **texts).save(folder / f"{number:02d}.png")
        except ValueError as error:
            log.info("no picture of %s: %s", a["source"], error)


def data_uri(picture: Image.Image, form: str, **options) -> str:
    """The picture as a URI for a page, encoded by Pillow in the format `form`."""
    data = io.BytesIO()
    picture.save(data, form, **options)
    return f"data:image/{form.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"


def contact_sheet(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Lays pictures of any sizes out in rows of `columns`; a row is as high as its highest picture. Returns RGB."""
    rows = [pictures[k : k + columns] for k in range(0, len(pictures), columns)]
    widths = [max(picture.width for picture in pictures[k::columns]) for k in range(min(columns, len(pictures)))]
    heights = [max(picture.height for picture in row) for row in rows]
    x, y = (np.cumsum([MARGIN, *(side + MARGIN for side in sides)]).tolist() for sides in (widths, heights))
    sheet = Image.new("RGB", (x[-1], y[-1]), (225, 225, 225))
    for k, picture in enumerate(pictures):
        row, column = divmod(k, columns)
        left, top = x[column], y[row]
        sheet.paste(PAPER, (left, top, left + widths[column], top + heights[row]))
        sheet.paste(picture, (left, top))
    return sheet


def _draw_legend(pen, y: int, font, gold, predicted, *, answered: bool) -> None:
    x = MARGIN
    for name, colour, box in (("gold", GOLD, gold), ("predicted", PREDICTED, predicted)):
        if box is not None:
            pen.rectangle([x, y + 4, x + 12, y + 14], outline=colour, width=3)
            pen.text((x + 18, y), name, INK, font)
            x += 34 + round(font.getlength(name))
    if gold is not None and answered:
        found = "no box found"
        if predicted is not None:
            one, other = (torch.tensor([box], dtype=torch.float64) for box in (gold, predicted))
            found = f"IoU {box_iou(one, other).item():.2f}"
        pen.text((x, y), found, INK, font)


def _outline(pen, box, image: Image.Image, corner: tuple[int, int], colour: tuple[int, ...], *, outwards: int) -> None:
    """Draws a box (0-1000 of `image` at `corner`), or None, with a white seam, to be visible on a red object too."""
    if box is None:
        return
    x1, x2 = sorted(corner[0] + round(min(max(v / 1000, 0), 1) * image.width) for v in (box[0], box[2]))
    y1, y2 = sorted(corner[1] + round(min(max(v / 1000, 0), 1) * image.height) for v in (box[1], box[3]))
    # Pillow's corners are inclusive and its lines grow inwards; a box without width or height becomes a line.
    x1, y1, x2, y2 = x1 - outwards, y1 - outwards, max(x2 - 1, x1) + outwards, max(y2 - 1, y1) + outwards
    width = outwards or 2
    seam = (x1 - 1, y1 - 1, x2 + 1, y2 + 1) if outwards else (x1, y1, x2, y2)
    pen.rectangle(seam, outline=PAPER, width=width + 1)
    pen.rectangle((x1, y1, x2, y2), outline=colour, width=width)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Breaks `text` into lines of at most `width` pixels: between words, and inside a word that exceeds a line."""
    lines = [""]
    for word in text.split():
        if lines[-1] and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for character in word:
            if lines[-1] and font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return lines[1:]


REWARDS = (("rewards/accuracy/mean", "IoU", "#1f6fd6"), ("rewards/format/mean", "format", "#8a8a8a"))
DIFFICULTY = (
    ("difficulty/easy", "easy (mIoU > 0.7)", "#009e60"),
    ("difficulty/medium", "medium", "#e69f00"),
    ("difficulty/hard", "hard (mIoU < 0.3)", "#d62728"),
)


def plot_run(metrics_jsonl_path: str | os.PathLike, out_png: str | os.PathLike, title: str | None = None) -> None:
    """Plots a run's rewards and its shares of easy, medium and hard groups (the paper's Figure 3) by step.

    A curve skips lines without `step` or without its key; if a step occurs twice (in a resumed run), the later line
    counts. Thin lines are the raw values, thick ones their running mean. Raises ValueError for a line
    that is not JSON and for a file without any of the curves.
    """
    records = list(read_lines([Path(metrics_jsonl_path)]))
    figure = Figure(figsize=(10, 3.8), layout="constrained")  # no pyplot: no global state, no window
    for axes, panel, curves in zip(figure.subplots(1, 2), ("mean reward", "share of groups"), (REWARDS, DIFFICULTY)):
        for key, label, colour in curves:
            steps, values = _curve(records, key)
            if steps:
                axes.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8)
                axes.plot(steps, _running_mean(values), color=colour, linewidth=2, label=label)
        axes.set(xlabel="step", ylabel=panel, ylim=(-0.02, 1.02))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.legend(frameon=False, loc="best")
    if not any(axes.lines for axes in figure.axes):
        known = ", ".join(key for key, *_ in REWARDS + DIFFICULTY)
        raise ValueError(f"{metrics_jsonl_path} holds none of {known}. Give the metrics file of a GRPO run.")
    figure.suptitle(title)
    figure.savefig(out_png, dpi=130)


def _curve(records: Sequence[dict], key: str) -> tuple[list[int], np.ndarray]:
    points = {r["step"]: r[key] for r in records if "step" in r and r.get(key) is not None and math.isfinite(r[key])}
    steps = sorted(points)
    return steps, np.array([points[step] for step in steps])


def _running_mean(values: np.ndarray) -> np.ndarray:
    """The mean over a window of an eighth of the run around each value; the window shrinks at the ends."""
    half = max(len(values) // 16, 1)
    window = np.ones(2 * half + 1)
    sums, counts = (np.convolve(v, window)[half : half + len(values)] for v in (values, np.ones(len(values))))
    return sums / counts
