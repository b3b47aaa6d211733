"""One question about some images, answered by a checkpoint: the reasoning, and the box in the image's own pixels."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from PIL import Image

from boxgrpo.kernels import grounding_rewards, pack_texts
from boxgrpo.model.batch import Prompt
from boxgrpo.model.checkpoint import load_model
from boxgrpo.model.families.qwen2_vl import Qwen2VL
from boxgrpo.trainer.data.example import Example, check_text, target_image
from boxgrpo.trainer.data.images import image_size
from boxgrpo.trainer.data.processor import Processor
from boxgrpo.trainer.evaluation.decode import GreedyDecoder
from boxgrpo.trainer.evaluation.pictures import annotate
from boxgrpo.trainer.options import resolve_dtype
from boxgrpo.trainer.runtime.ranks import RunFailed

PICTURE_HEIGHT = 420  # pixels, of each image in the picture


@dataclass(frozen=True)
class Question:
    """A question that is ready for the model."""

    example: Example
    sizes: tuple[tuple[int, int], ...]  # width and height of each image, pixels, upright
    prompt: Prompt


@dataclass(frozen=True)
class Answer:
    """The model's text and the box in it; `as_json` has the same fields."""

    question: str
    target_image: int  # counted from 1
    image_sizes: tuple[tuple[int, int], ...]  # width and height of each image, pixels, upright
    answer: str
    reasoning: str | None  # inside <think> </think>; None: the text has no such tags
    box: tuple[float, ...] | None  # x1, y1, x2, y2 in pixels of the target image's file; None: no box found
    box_1000: tuple[int, ...] | None  # the box as the model wrote it, 0-1000 of the target image
    note: str  # why there is no box, or what is wrong with it; empty if nothing is

    @property
    def headline(self) -> str:
        """The box in whole pixels and the image that holds it, or why there is no box."""
        if self.box is None:
            return self.note
        x1, y1, x2, y2 = map(round, self.box)
        width, height = self.image_sizes[self.target_image - 1]
        where = f"image {self.target_image}, {width} x {height} pixels"
        return f"({x1}, {y1}), ({x2}, {y2}) in {where}" + (f"; {self.note}" if self.note else "")

    def as_json(self) -> dict:
        """The fields as a dictionary for JSON, with the box rounded to hundredths of a pixel."""
        return vars(self) | {"box": self.box and [round(v, 2) for v in self.box]}


class Grounder:
    """Answers questions with a checkpoint by greedy decoding, with the decoder that also samples in GRPO.

    Args:
        max_completion_length: most tokens of an answer.
    """

    def __init__(self, model: Qwen2VL, processor: Processor, max_completion_length: int):
        self.processor = processor
        self.decoder = GreedyDecoder(model.eval(), processor, max_completion_length)

    @classmethod
    def load(cls, options, device: torch.device) -> "Grounder":
        """Load the checkpoint in the folder `options.model`; `options` is a `GroundOptions`.

        Raises:
            ValueError: the checkpoint is missing, broken or too large for the memory, or an option is invalid.
        """
        folder, dtype = options.model, resolve_dtype(options.dtype, device)
        limits = {"min_pixels": options.min_pixels, "max_pixels": options.max_pixels}
        try:
            processor = Processor.from_pretrained(folder, **limits)
            model = load_model(folder, dtype=dtype, device=device)
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise ValueError(
                f"{folder} does not fit into memory ({error}). Use a smaller model, or --dtype bfloat16."
            ) from error
        return cls(model, processor, options.max_completion_length)

    def prepare(
        self, text: str, images: Sequence[str | PathLike], *, target: int = 0, answer_format: str = "think"
    ) -> Question:
        """Read the images and build the prompt.

        Args:
            text: the question.
            target: number of the image that holds the box, counted from 1; 0: inferred from the question's wording,
                else the last image.
            answer_format: "think", or "box" for a simple reference in a single image, answered without reasoning.

        Raises:
            ValueError: no question, no image, an unreadable image, or an invalid target or answer format.
        """
        check_text(text, "question")
        if not images:
            raise ValueError("there are 0 images; a question needs at least 1. Add one with --image.")
        for path in images:
            if not Path(path).is_file():
                raise ValueError(f"image is {path}; there is no such file. Correct --image.")
        if not 0 <= target <= len(images):
            raise ValueError(
                f"target_image is {target} of {len(images)} images; count from 1, or give 0 to infer it "
                "from the question's wording. Change --target_image."
            )
        if answer_format not in ("think", "box"):
            raise ValueError(f"answer_format is {answer_format!r}; it must be think or box. Change --answer_format.")
        if answer_format == "box" and len(images) > 1:
            raise ValueError(
                f"answer_format is 'box' with {len(images)} images; it is for a simple reference in one image. "
                "Use --answer_format think."
            )
        example = Example(
            id="question",
            task="question",
            images=tuple(map(str, images)),
            question=text,
            gold=None,
            answer_format=answer_format,
            target_image=target - 1 if target else target_image({}, text, len(images)),
            source="question",
        )
        prompt = self.processor.prompt(example)
        return Question(example, tuple(image_size(path) for path in images), prompt)

    def stream(self, question: Question) -> Iterator[list[int]]:
        """Yield, after each token, all token ids of the answer so far; close the iterator to stop.

        Raises:
            ValueError: the GPU's memory runs out.
        """
        try:
            yield from self.decoder.stream(question.prompt)
        except torch.OutOfMemoryError as error:
            raise RunFailed(
                f"memory ran out over {len(question.prompt.input_ids)} tokens of question and images ({error}). "
                "Lower --max_pixels, or send fewer images."
            ) from error

    def parse(self, question: Question, ids: Sequence[int]) -> Answer:
        """Parse a completion; the parser of the rewards finds the box."""
        text = self.processor.decode(ids)
        raw, example = text.encode(), question.example
        target, sizes = example.target_image, question.sizes
        found = grounding_rewards(*pack_texts([raw]), torch.zeros(1, 4), answer_format=example.answer_format)
        start, end, *_ = found.spans[0].tolist()
        reasoning = None if start < 0 else raw[start:end].decode().strip()
        box = pixels = None
        note = ""
        if not found.found:
            note = "no box found in the answer"
            if ids[-1] not in self.decoder.eos_token_ids:
                note += f", which was cut off after {len(ids)} tokens; raise --max_completion_length"
        else:
            x1, y1, x2, y2 = box = tuple(int(v) for v in found.boxes[0])
            pixels = tuple(v * side / 1000 for v, side in zip(box, sizes[target] * 2, strict=True))
            if x1 >= x2 or y1 >= y2:
                note = "the box is inverted or empty: it encloses nothing"
            elif max(box) > 1000:
                note = "the box extends beyond the image"
        return Answer(example.question, target + 1, sizes, text, reasoning, pixels, box, note)

    def draw(self, question: Question, answer: Answer, *, words: bool = True) -> Image.Image:
        """Draw the images, scaled as for the model, with the box; with `words` also the question and the answer."""
        return annotate(
            self.processor.images_of(question.prompt),
            predicted=answer.box_1000,
            target_image=question.example.target_image,
            question=answer.question if words else "",
            reasoning=answer.answer if words else "",
            title=answer.headline,
            image_height=PICTURE_HEIGHT,
        )
