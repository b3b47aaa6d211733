"""Answers of other programs: scored without a model, without an image, and by the record that they belong to."""

import json
import re

import pytest
from PIL import Image

from boxgrpo.trainer.data.readers import read_examples
from boxgrpo.trainer.evaluation.benches import BENCHES
from boxgrpo.trainer.evaluator import main
from scoring import scored_by_counting, text, varied_answers


@pytest.fixture
def predictions(shared, write):
    """predictions(texts, *flags) -> the flags that score them on the sample of MIG-Bench."""

    def flags(texts, *more, data=shared / "data/mig_bench/MIG_data.sample.json"):
        return ["--bench=mig", f"--data={data}", f"--predictions={write(texts, 'answers.json')}", *more]

    return flags


def test_answers_of_other_programs_are_scored_without_a_model_or_an_image(
    shared, predictions, tmp_path, monkeypatch, capsys
):
    """The command as documented, in an empty folder: JSON on stdout and nothing else, no file written."""
    examples, _ = read_examples(shared / "data/mig_bench/MIG_data.sample.json")
    texts = varied_answers(examples)
    assert any(int(n) > 1000 for answered in texts for n in re.findall(r"\d+", answered))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    main(predictions(texts, "--json", "-"))
    found, expected = json.loads(capsys.readouterr().out), scored_by_counting(examples, texts)
    assert list(found["tasks"]) == list(BENCHES["mig"].columns)
    assert found["tasks"] == pytest.approx({task: 100 * accuracy for task, (accuracy, _) in expected.items()})
    ious = {task: scores["mean_iou"] for task, scores in found["summary"]["tasks"].items()}
    assert ious == pytest.approx({task: iou for task, (_, iou) in expected.items()}, abs=1e-6)
    assert found["mean"] == pytest.approx(sum(100 * accuracy for accuracy, _ in expected.values()) / 10)
    assert 20 < found["mean"] < 90, "neither all right nor all wrong"
    low, high = found["summary"]["interval"]["accuracy_at_0.5"]
    assert low < found["mean"] / 100 < high
    assert not list((tmp_path / "empty").iterdir())


def test_case_06_pixels_of_the_resized_image_are_a_format_of_their_own(write, tmp_path, capsys):
    """Qwen2.5-VL's exact box on a photo of 2000 x 1500, which it saw as 1148 x 840 at max_pixels 1003520."""
    box = 240, 930, 1310, 1410  # in pixels of the photo
    exact = [round(v * side) for v, side in zip(box, (1148 / 2000, 840 / 1500) * 2)]
    answers = write([f'```json\n[{{"bbox_2d": {exact}, "label": "cup"}}]\n```'], "answers.json")

    def iou(image, *flags):
        record = {"images": [image], "question": "Where?", "answer": [120, 620, 655, 940]}
        command = f"--data={write([record], 'data.json')}", f"--predictions={answers}", "--json=-", *flags
        main(list(command))
        return json.loads(capsys.readouterr().out)["summary"]["mean_iou"]

    Image.new("RGB", (2000, 1500)).save(tmp_path / "photo.png")
    assert iou("photo.png", "--answer_format=resized_pixels", "--max_pixels=1003520") > 0.99
    assert iou("photo.png", "--answer_format=resized_pixels") < 0.2, "at the default max_pixels it would be smaller"
    assert iou("photo.png", "--answer_format=pixels", "--max_pixels=1003520") < 0.2
    Image.new("RGB", (6000, 20)).save(tmp_path / "strip.png")
    with pytest.raises(ValueError, match=r"data\.json#0: absolute aspect ratio"):
        iou("strip.png", "--answer_format=resized_pixels")


def test_predictions_are_for_all_records_or_for_the_usable_ones(shared, predictions, write, capsys):
    """Two faulty records among 121: lists of 123 and 121 answers give the same, one of 122 is refused."""
    faulty = json.loads((shared / "data/mig_bench/MIG_data.faulty.json").read_text())
    records = json.loads((shared / "data/mig_bench/MIG_data.sample.json").read_text())
    records[5:5], records[50:50] = faulty[:1], faulty[1:]
    data = write(records, "MIG_data.json")
    usable, faults = read_examples(data)
    assert [f.source for f in faults] == ["MIG_data.json#5", "MIG_data.json#50"]
    texts = [text(e.gold) for e in usable]
    of_all = [*texts[:5], "lost", *texts[5:49], "lost too", *texts[49:]]
    for given in (texts, of_all):
        main(predictions(given, "--json=-", data=data))
        found = json.loads(capsys.readouterr().out)
        assert (found["mean"], found["summary"]["skipped"]) == (100, 2)
    message = r"holds 122 answers; .*MIG_data.json has 123 records, of which 121 can be used"
    with pytest.raises(ValueError, match=message):
        main(predictions(of_all[1:], data=data))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"a": 1}', "holds a JSON dict; it must be a list of answer strings"),
        ('["a", null]', "answer 1 is None; it must be a string"),
        (None, "there is no such file"),
    ],
)
def test_predictions_that_are_no_list_of_answers_are_refused(record_file, tmp_path, content, message):
    path = tmp_path / "answers.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=rf"answers\.json.*{message}"):
        main([f"--data={record_file}", f"--predictions={path}"])


def test_predictions_write_their_page_into_output_dir(record_file, write, tmp_path, capsys):
    """With pictures of the images that are there; other predictions are another evaluation."""
    write([text((10, 20, 300, 400))] * 6 + ["\ud800 half a character"], "answers.json")
    flags = [f"--data={record_file}", f"--predictions={tmp_path / 'answers.json'}", f"--output_dir={tmp_path / 'out'}"]
    main([*flags, "--pictures=7", f"--json={tmp_path / 'scores.json'}"])
    shown = capsys.readouterr().out
    assert re.search(r"mean over tasks +7 +87\.50", shown) and f"see {tmp_path / 'out'}/report.html" in shown
    assert json.loads((tmp_path / "scores.json").read_text())["mean"] == 87.5
    assert len(json.loads((tmp_path / "out/results.json").read_text())["answers"]) == 7
    assert len(list((tmp_path / "out/pictures").glob("*.png"))) == 6
    write(["other"] * 7, "answers.json")
    with pytest.raises(ValueError, match=r"\(other: predictions\)"):
        main(flags)


def test_the_files_of_refcoco_are_its_columns(write, tmp_path, capsys):
    """Pixels and both forms of record; the split is the file's name. The answers follow the files' order."""
    Image.new("RGB", (200, 100)).save(tmp_path / "a.jpg")
    found = {"image": "a.jpg", "problem": "Where?", "solution": [20, 10, 100, 50]}
    other = {"image": "a.jpg", "width": 200, "height": 100, "expression": "the cup", "bbox": [20, 10, 80, 40]}
    files = {"refcoco_val.json": [found] * 4, "refcocop_testA.json": [other] * 2, "refcocog_test.json": [other, found]}
    data = ["--data", *(str(write(records, name)) for name, records in files.items())]
    right, wrong = "(100, 100), (500, 500)", "(0, 0), (10, 10)"
    answers = write([right, right, right, wrong, right, wrong, wrong, wrong], "answers.json")
    flags = ["--bench=refcoco", *data, f"--predictions={answers}"]
    main([*flags, "--json=-"])
    scores = json.loads(capsys.readouterr().out)
    assert scores["tasks"] == {"refcoco_val": 75.0, "refcoco+_testA": 50.0, "refcocog_test": 0.0}
