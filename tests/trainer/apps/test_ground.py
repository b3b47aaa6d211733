"""A question about images gets its reasoning, its box in their own pixels and a picture, or the reason for none."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from boxgrpo.trainer.apps import ground
from boxgrpo.trainer.apps.ground import GroundOptions, terminal_text
from boxgrpo.trainer.apps.grounding import PICTURE_HEIGHT
from boxgrpo.trainer.arguments import parse
from boxgrpo.trainer.evaluation.pictures import LINE, MARGIN, PREDICTED
from boxgrpo.trainer.runtime.ranks import run_as_script
from grounded import ANSWER, BOX, QUESTION, THOUGHT, loaded


def command(model, *paths):
    return [f"--model={model}", *(f"--image={path}" for path in paths)]


def test_the_command_prints_reasoning_and_box_and_writes_the_picture(certain, pair, tmp_path, capsys):
    """The box is in pixels of the upright second image: 80 x 160, stored as 160 x 80."""
    output = tmp_path / "made" / "grounded.png"
    flags = command(certain, *pair)
    ground.main([*flags, f"--output={output}", QUESTION])
    assert capsys.readouterr().out == (
        f"reasoning: {THOUGHT}\nbox: (10, 40), (40, 120) in image 2, 80 x 160 pixels\npicture: {output}\n"
    )
    top, left = MARGIN + LINE + 8, 2 * MARGIN + 112 * PICTURE_HEIGHT // 84  # of the second image
    shown = np.asarray(Image.open(output))[top : top + PICTURE_HEIGHT, left:]
    rows, columns = (shown == PREDICTED).all(-1).nonzero()
    edges = columns.min(), rows.min(), columns.max(), rows.max()
    height, width = PICTURE_HEIGHT, PICTURE_HEIGHT * 80 // 160  # but for what rounding to vision tokens changes
    assert edges == pytest.approx((width / 8, height / 4, width / 2, 3 * height / 4), abs=6)


def test_json_is_all_that_stands_on_standard_output(certain, pair, tmp_path, capsys):
    paths = [*map(str, pair)]
    output = str(tmp_path / "g.jpg")
    flags = [*command(certain, *paths), "--output", output, "--json", "-", "--target_image", "1"]
    ground.main([*flags, QUESTION])
    assert json.loads(capsys.readouterr().out) == {
        "question": QUESTION,
        "target_image": 1,
        "image_sizes": [[112, 84], [80, 160]],
        "answer": ANSWER,
        "reasoning": THOUGHT,
        "box": [14, 21, 56, 63],
        "box_1000": [125, 250, 500, 750],
        "note": "",
        "images": paths,
        "picture": output,
    }
    assert Image.open(output).format == "JPEG"


def test_without_a_box_the_status_is_3_and_the_picture_has_none(initial, images, tmp_path, capsys):
    output = tmp_path / "g.png"
    flags = [*command(initial, images["one"]), f"--output={output}", "--max_completion_length=20"]
    with pytest.raises(SystemExit) as end:
        ground.main([*flags, "Where is it?"])
    assert end.value.code == 3
    assert "no box found in the answer, which was cut off after 20 tokens; raise --max_completion_length" in (
        capsys.readouterr().out
    )
    assert not (np.asarray(Image.open(output)) == PREDICTED).all(-1).any()


def test_pixels_are_those_of_the_file_where_a_small_image_was_enlarged(grounder, images):
    asked = grounder.prepare(QUESTION, [images["small"]])
    *_, ids = grounder.stream(asked)
    answer = grounder.parse(asked, ids)
    assert (asked.sizes, answer.box) == (((20, 10),), (2.5, 2.5, 10.0, 7.5))


@pytest.mark.parametrize("who", ["certain", "initial"])
def test_the_answer_token_by_token_is_that_of_a_batch(who, pair, request):
    g = loaded(request.getfixturevalue(who), max_completion_length=40)
    asked = g.prepare(QUESTION, pair)
    *parts, ids = g.stream(asked)
    assert [len(part) for part in parts] == list(range(1, len(ids))) and parts[-1] == ids[:-1]
    assert [ids, ids] == [completion.tolist() for completion in g.decoder.complete([asked.prompt, asked.prompt])]


@pytest.mark.parametrize(
    ("question", "target", "found"),
    [
        ("Where is it?", 0, 2),
        ("Image 2 shows a cup. Find it in image 1.", 0, 1),
        ("Image 2 shows a cup. Find it in image 1.", 2, 2),
    ],
)
def test_the_target_is_the_one_named_else_the_questions_else_the_last(grounder, images, question, target, found):
    asked = grounder.prepare(question, [images["one"], images["turned"]], target=target)
    assert grounder.parse(asked, [grounder.decoder.eos_token_ids[0]]).target_image == found


def test_a_simple_reference_asks_for_no_reasoning_and_takes_the_first_box(grounder, images):
    asked = grounder.prepare("the cup", [images["small"]], answer_format="box")
    text = grounder.processor.decode(asked.prompt.input_ids)
    assert "simple reference. the cup" in text and "<think>" not in text
    answer = grounder.parse(asked, said(grounder, f"It is at {BOX}."))
    assert (answer.reasoning, answer.box_1000) == (None, (125, 250, 500, 750))


def said(grounder, text):
    """The ids of an answer that has ended."""
    return [*grounder.processor.tokenizer(text).input_ids, grounder.decoder.eos_token_ids[0]]


@pytest.mark.parametrize(
    ("text", "pixels", "note"),
    [
        ("<think>A</think><answer>(500, 250), (100, 750)</answer>", (56, 21, 11.2, 63), "encloses nothing"),
        ("<think>A</think><answer>(0, 0), (500, 2000)</answer>", (0, 0, 56, 168), "beyond the image"),
        ("<think>It is (1, 2), (3, 4).</think><answer>nowhere</answer>", None, "no box found in the answer"),
    ],
)
def test_the_fault_of_a_box_is_named(grounder, images, text, pixels, note):
    asked = grounder.prepare("Where is it?", [images["one"]])
    answer = grounder.parse(asked, said(grounder, text))
    assert answer.box == (pixels and pytest.approx(pixels))
    assert note in answer.note and answer.note in answer.headline and "cut off" not in answer.note
    grounder.draw(asked, answer)  # draws whatever there is


def test_control_characters_do_not_reach_the_terminal(grounder, images):
    asked = grounder.prepare("Where is it?", [images["one"]])
    answer = grounder.parse(asked, said(grounder, f"<think>\x1b[2J\x9b gone\nnext</think><answer>{BOX}</answer>"))
    shown = terminal_text(answer)
    assert "\x1b" not in shown and "\x9b" not in shown and "gone\nnext" in shown


def test_flags_and_the_question_stand_in_any_order(tmp_path):
    (tmp_path / "two.yaml").write_text("image: [a.png]\nquestion: Who?\n")
    for args in (["Where?", "--image", "a", "--image=b"], ["--image", "a", "Where?", "--image", "b"]):
        o = parse(GroundOptions, args, positional="question")
        assert (o.image, o.question) == (["a", "b"], "Where?")
    assert parse(GroundOptions, [], positional="question") == GroundOptions()
    o = parse(GroundOptions, [f"--config={tmp_path / 'two.yaml'}", "--image=b"], positional="question")
    assert (o.image, o.question) == (["a.png", "b"], "Who?")


def test_a_question_without_quotes_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        parse(GroundOptions, ["--image", "a", "Where", "is", "it"], positional="question")
    assert end.value.code == 2 and "'is' belongs to no flag; quote" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["Where?"], r"there are 0 images; .*--image"),
        (["--image={one}"], r"question is ''; text is needed"),
        (["--image={one}", " <image> "], r"question is ' <image> '"),
        (["--image={one}", "\udcff?"], r"question holds half of a surrogate pair"),
        (["--image={one}", "Is <|image_pad|> there?"], r"question: the user's text holds <\|image_pad\|>"),
        (["--image=gone.png", "Where?"], r"image is gone\.png; there is no such file\. Correct --image"),
        (["--image={notes}", "Where?"], r"notes\.png cannot be opened as an image"),
        (["--image={one}", "--target_image=2", "Where?"], r"target_image is 2 of 1 images; .*--target_image"),
        (["--image={one}", "--image={one}", "--answer_format=box", "Where?"], r"answer_format is 'box' with 2 images"),
        (["--image={one}", "--answer_format=list", "Where?"], r"answer_format is 'list'; it must be one of think, box"),
        (["--image={one}", "--output={one}", "Where?"], r"output is .*one\.png, one of the images"),
        (["--image={one}", "--output=box.txt", "Where?"], r"output is box\.txt; it must end in \.png"),
        (["--image={one}", "--json=x.json", "Where?"], r"json is 'x\.json'; it must be one of -"),
        (
            ["--image={one}", "--max_completion_length=0", "Where?"],
            r"max_completion_length is 0; it must be at least 1",
        ),
        (["--image={one}", "--model=", "Where?"], r"no model\. Name a checkpoint folder with --model"),
        (["--image={one}", "--model=nowhere", "Where?"], r"model is nowhere; there is no such folder"),
        (["Where?", "--serve"], r"serve is given with a question"),
        (["--serve", "--port=70000"], r"port is 70000; it must be at most 65535"),
    ],
)
def test_a_question_that_does_not_fit_is_refused_by_name(initial, images, tmp_path, monkeypatch, flags, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.png").write_text("no picture")
    names = {"one": images["one"], "notes": tmp_path / "notes.png"}
    with pytest.raises(ValueError, match=says):
        ground.main([f"--model={initial}", *(flag.format(**names) for flag in flags)])
    assert not (tmp_path / "grounded.png").exists()


@pytest.mark.parametrize("broken", ["config.json", "tokenizer.json", "model.safetensors", "preprocessor_config.json"])
def test_a_broken_checkpoint_is_refused_by_name(initial, tmp_path, broken):
    """Whichever of its files was cut in half."""
    folder = shutil.copytree(initial, tmp_path / "broken")
    whole = (folder / broken).read_bytes()
    (folder / broken).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"broken.*{broken}.* cannot be read \(.*\. (Fetch|Copy) it again"):
        loaded(folder)


def test_the_command_fails_without_a_traceback(initial, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(SystemExit) as end:
        run_as_script(lambda: ground.main([*command(initial, "cut.png"), "Where?"]), "ground.py")
    shown = capsys.readouterr()
    assert end.value.code == 2 and shown.out == "" and shown.err.startswith("ground.py: cut.png cannot be opened")
    assert not (tmp_path / "grounded.png").exists()
