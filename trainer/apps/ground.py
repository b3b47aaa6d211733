"""Locate an object in images with a checkpoint: prints its reasoning and the box in pixels, and draws a picture.

    boxgrpo ground --model CHECKPOINT --image a.jpg --image b.jpg "question"
    boxgrpo ground --model CHECKPOINT --serve      the same as a web page on this machine

Boxes are in pixels of the image file, after its EXIF rotation. The exit status is 0 if the answer holds a box, 3 if it
holds none, 2 for wrong input. Decoding is greedy. Each question is answered by itself:
there is no conversation.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from boxgrpo.trainer.apps.grounding import Answer, Grounder
from boxgrpo.trainer.arguments import check_options, option, parse, repeated
from boxgrpo.trainer.data.example import check_text
from boxgrpo.trainer.options import CHOICES, RANGES, EvalOptions, check_pixels
from boxgrpo.trainer.presence import PICTURES, check_model, check_output
from boxgrpo.trainer.runtime.ranks import join_ranks, run_as_script

EXIT_WITHOUT_BOX = 3  # exit status


@dataclass
class GroundOptions:
    """Locate an object in images with a checkpoint, or serve a page for such questions."""

    choices: ClassVar = CHOICES | {"answer_format": ("think", "box"), "json": ("", "-")}
    ranges: ClassVar = RANGES | {"port": "[0, 65535]", "target_image": "[0, 2147483647]"}
    model: str = option("", "Folder with a Qwen2-VL or Qwen3-VL checkpoint in Hugging Face form, tokenizer included.")
    image: list[str] = field(
        default_factory=list, metadata=repeated("An image file; given once for each image, in the question's order.")
    )
    question: str = option("", "What to find.")
    target_image: int = option(0, "Number of the image that holds the box, from 1; 0: inferred from the question.")
    answer_format: str = option("think", "think, or box for a simple reference in one image, without reasoning.")
    output: str = option("grounded.png", "Picture to write; an existing file is replaced.")
    json: str = option("", "- prints the answer as JSON; empty: as text.")
    serve: bool = option(False, "Serve a web page for questions until Ctrl-C.")
    host: str = option("127.0.0.1", "Address to serve on; any but 127.0.0.1 admits other machines.")
    port: int = option(7860, "Port to serve on; 0: any free one.")
    max_completion_length: int = option(EvalOptions.max_completion_length, "Most tokens of an answer.")
    min_pixels: int = option(0, "Images are enlarged to at least this many pixels; 0: 4 of the model's image tokens.")
    max_pixels: int = option(0, "Images are reduced to at most this many pixels; 0: 512 of the model's image tokens.")
    dtype: str = option("auto", "float32 or bfloat16; auto: bfloat16 on a GPU, float32 elsewhere.")


def check(o: GroundOptions) -> None:
    """Refuse invalid options before the model is loaded."""
    check_options(o)
    check_pixels(o)
    check_model(o.model)
    if o.serve:
        if o.question or o.image:
            raise ValueError("serve is given with a question or an image; they are given on the page. Leave them out.")
        return
    check_text(o.question, "question")
    check_output("output", o.output, PICTURES)
    if Path(o.output).resolve() in {Path(path).resolve() for path in o.image}:
        raise ValueError(f"output is {o.output}, one of the images; it would be lost. Change --output.")


def terminal_text(answer: Answer) -> str:
    """The answer for a terminal; control characters of the model's text are replaced."""
    name, text = "answer", answer.answer
    if answer.reasoning is not None and answer.box is not None:
        name, text = "reasoning", answer.reasoning
    text = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
    return f"{name}: {text}\n{'box: ' if answer.box else ''}{answer.headline}"


def ask(o: GroundOptions, grounder: Grounder) -> bool:
    """Answer the question, print the answer and write the picture; returns whether the answer holds a box."""
    question = grounder.prepare(o.question, o.image, target=o.target_image, answer_format=o.answer_format)
    *_, ids = grounder.stream(question)
    answer = grounder.parse(question, ids)
    try:
        Path(o.output).parent.mkdir(parents=True, exist_ok=True)
        grounder.draw(question, answer).save(o.output)
    except OSError as error:
        raise ValueError(f"output is {o.output}; it cannot be written ({error}). Change --output.") from error
    if o.json:
        print(json.dumps(answer.as_json() | {"images": o.image, "picture": o.output}, indent=1))
    else:
        print(f"{terminal_text(answer)}\npicture: {o.output}")
    return answer.box is not None


def main(args: list[str] | None = None) -> None:
    o = parse(GroundOptions, args, prog="ground.py", positional="question")
    check(o)
    with join_ranks() as r:
        grounder = Grounder.load(o, r.device)
        if o.serve:
            from boxgrpo.trainer.apps.webpage import serve  # Flask and waitress come with the extra "serve"

            serve(grounder, name=Path(o.model).name, host=o.host, port=o.port)
        elif not ask(o, grounder):
            sys.exit(EXIT_WITHOUT_BOX)


if __name__ == "__main__":
    run_as_script(main, "ground.py")
