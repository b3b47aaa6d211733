"""Records and images in every place where data sets keep them: paths, bytes, base64, Parquet files, Arrow folders."""

import base64
import io
import json
import logging
import pickle
import sys
from itertools import islice
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from boxgrpo.trainer.apps import inspect_data
from boxgrpo.trainer.data import images, readers, tables
from boxgrpo.trainer.data.images import Embedded, image_size, load_image
from boxgrpo.trainer.data.loader import Loader
from boxgrpo.trainer.data.processor import Processor
from boxgrpo.trainer.data.readers import read_examples, read_usable
from boxgrpo.trainer.data.vocabulary import demo_tokenizer
from boxgrpo.trainer.evaluation.evaluate import evaluate
from boxgrpo.trainer.options import EvalOptions
from boxgrpo.trainer.runtime.ranks import Ranks

QUESTION = {"question": "Where is it?", "answer": [100, 200, 300, 400]}
TURNS = [{"from": "human", "value": "<image>Where?"}, {"from": "gpt", "value": "There."}]


def picture(number=0, kind="PNG") -> bytes:
    """An image file of (56 + 28 * number) x 56 pixels."""
    shades = np.random.default_rng(number).integers(0, 256, (56, 56 + 28 * number, 3), dtype=np.uint8)
    Image.fromarray(shades).save(out := io.BytesIO(), kind)
    return out.getvalue()


@pytest.fixture
def on_disk(tmp_path):
    """a.png, and its bytes."""
    (tmp_path / "a.png").write_bytes(picture())
    return picture()


def one(path, **options):
    ((example,), faults) = read_examples(path, **options)
    assert not faults
    return example


@pytest.mark.parametrize(
    "place",
    [
        {"images": ["a.png"]},
        {"images": "a.png"},
        {"image": "a.png"},
        {"image": ["a.png"]},
        {"image": "a.png", "images": ["a.png"]},
        {"images": [{"path": "a.png", "bytes": None}]},
        {"images": [{"type": "image", "image": "a.png"}]},
        {"images": [{"type": "image_url", "image_url": {"url": "a.png"}}]},
    ],
    ids=str,
)
@pytest.mark.parametrize("rest", [QUESTION, {"conversations": TURNS}], ids=["question", "chat"])
def test_case_13_an_image_is_found_under_either_key(write, tmp_path, on_disk, place, rest):
    """`image` as well as `images`, one or a list, in questions and in chats."""
    assert one(write([place | rest])).images == (str(tmp_path / "a.png"),)


def test_case_13_several_images_under_image(write, tmp_path):
    example = one(write([QUESTION | {"image": ["a.png", "b.png"]}]))
    assert example.images == (str(tmp_path / "a.png"), str(tmp_path / "b.png"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF"])
def test_base64_is_decoded(write, kind):
    """Alone, in lines, as a data URI, as bytes of a dictionary, or as the URL of a chat's part."""
    content = picture(1, kind)
    text = base64.b64encode(content).decode()
    uri = f"data:image/{kind.lower()};charset=utf-8;base64,{text}"
    lines = base64.encodebytes(content).decode()
    forms = [text, lines, uri, {"bytes": text, "path": "x"}, {"type": "image_url", "image_url": {"url": uri}}]
    examples, faults = read_examples(write([QUESTION | {"images": [form]} for form in forms]))
    assert len(examples) == len(forms) and not faults
    for example in examples:
        (image,) = example.images
        assert image.content == content and image_size(image) == (84, 56)
        assert np.array_equal(load_image(image), Image.open(io.BytesIO(content)).convert("RGB"))


@pytest.mark.parametrize(
    ("image", "reason", "message"),
    [
        ("https://example.invalid/a.png", "image_url", "URLs are not fetched. Download it and give its path."),
        ({"type": "image_url", "image_url": {"url": "http://x.invalid/a"}}, "image_url", "URLs are not fetched"),
        ("s3://bucket/a.png", "image_url", "URLs are not fetched"),
        ("//host/a.png", "image_url", "URLs are not fetched"),
        ("WWW.host/a.png", "image_url", "URLs are not fetched"),
        ("clip.mp4", "video", "videos are not read. Give its frames as images."),
        ("clip.M4V", "video", "videos are not read."),
        ("data:image/png;base64,iVBORw0K!", "bad_base64", "is not base64"),
        ("data:image/png;base64," + "A" * 41, "bad_base64", "is not base64"),
        ("iVBORw0KGgo" + "A_b-" * 10_000, "bad_base64", "is not base64 (its letters are A-Z, a-z, 0-9, + and /)"),
        ({"bytes": "/9j/" + "A_b-" * 70}, "bad_base64", "image '/9j/A_b-A_b-"),
        ("/9j/" + "A!b/c.d/" * 200, "bad_base64", "is not base64"),
        ("a" * 252 + ".png", "long_path", "..., of 256 characters; a path has at most 4095 bytes, a name in it 255"),
        ("é" * 126 + ".png", "long_path", "of 130 characters"),
        ("a/" * 2_048 + "a.png", "long_path", "of 4101 characters"),
        (7, "no_images", "image is 7; a path, bytes or base64 is needed."),
        ({"bytes": None, "path": None}, "no_images", "a path, bytes or base64 is needed."),
        ("file:///etc/a.png", "image_outside_root", "lies outside --image_root"),
    ],
)
def test_case_16_what_is_no_image_here_is_refused_in_a_line(write, tmp_path, image, reason, message):
    """URLs and videos, with what to do instead."""
    _, (fault,) = read_examples(write([QUESTION | {"images": [image]}]), image_root=tmp_path, min_usable=0)
    assert fault.reason == reason and message in fault.message and "\n" not in fault.message
    assert len(fault.message) < 250


def test_case_16_a_video_beside_the_images_is_refused(write):
    """A record with a video would be learned without it."""
    _, (fault, both) = read_examples(
        write([QUESTION | {"images": ["a"], "videos": ["a.mp4"]}, QUESTION | {"images": ["a"], "image": "b"}]),
        min_usable=0,
    )
    assert fault.reason == "video" and "Give their frames as images." in fault.message
    assert both.reason == "two_image_lists"


def test_a_path_as_long_as_a_path_can_be_is_taken(write, tmp_path):
    paths = ["a" * 251 + ".png", "é" * 125 + ".png", "AAAA/" * 100 + "a.png", "www.png", "./www.host/a.png"]
    paths.append("www.a.org/a.png")  # which is here
    (tmp_path / "www.a.org").mkdir()
    (tmp_path / "www.a.org/a.png").touch()
    examples, faults = read_examples(write([QUESTION | {"images": [path]} for path in paths]))
    expected = [(str(tmp_path / path),) for path in paths]
    assert not faults and [example.images for example in examples] == expected


def test_inspect_counts_an_image_whose_text_is_too_long_for_a_path(write, capsys):
    """It does not end where the files are looked for."""
    coded = ["iVBORw0KGgo" + "A_b-" * 10_000, "a" * 300 + ".png"]
    path = write([QUESTION | {"images": [image]} for image in ["a.png", *coded]])
    inspect_data.main([str(path), "--box_unit=thousandths"])
    shown = "".join(capsys.readouterr())
    assert "bad_base64" in shown and "long_path" in shown and max(map(len, shown.splitlines())) < 300


def test_a_file_url_is_a_path(write, tmp_path):
    assert one(write([QUESTION | {"images": [f"file://{tmp_path}/a%20b.png"]}])).images == (f"{tmp_path}/a b.png",)


@pytest.mark.parametrize(("brand", "remedy"), [("heic", "pip install 'pillow-heif'"), ("avis", "pillow>=11.3")])
def test_heic_is_named_where_pillow_cannot_read_it(tmp_path, brand, remedy):
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftyp" + brand.encode() + b"\0" * 40)
    with pytest.raises(ValueError, match=f"a.heic cannot be opened as an image .*{remedy}"):
        load_image(tmp_path / "a.heic")


def test_heic_is_read_where_pillow_heif_is_installed(tmp_path, monkeypatch):
    """By a stand-in for the package, which registers a format of that name."""

    def register():
        Image.register_open("HEIF", lambda file, name: Image.new("RGB", (60, 30)), lambda head: b"ftypheic" in head)

    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register))
    images._formats.cache_clear()
    try:
        (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 40)
        assert load_image(tmp_path / "a.heic").size == (60, 30)
    finally:
        Image.OPEN.pop("HEIF")
        images._formats.cache_clear()


COUNT = 7


def rows():
    """Records with one image each as bytes; the third has an inverted box, the sixth's image is broken."""
    found = [QUESTION | {"id": str(n), "image": {"bytes": picture(n), "path": f"{n}.png"}} for n in range(COUNT)]
    found[2] = found[2] | {"answer": [300, 200, 100, 400]}
    found[5] = found[5] | {"image": {"bytes": b"no image", "path": "5.png"}}
    return found


@pytest.fixture
def places(tmp_path, monkeypatch):
    """The same records as a JSON file beside image files, as a Parquet file, and as a folder of `save_to_disk`."""
    monkeypatch.setenv("BOXGRPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tables, "ROWS_AT_ONCE", 3)
    plain = []
    for row in rows():
        (tmp_path / row["image"]["path"]).write_bytes(row["image"]["bytes"])
        plain.append(row | {"image": row["image"]["path"]})
    (tmp_path / "records.json").write_text(json.dumps(plain))
    parquet.write_table(pa.Table.from_pylist(rows()), tmp_path / "records.parquet")
    features = datasets.Features(
        {name: datasets.Value("string") for name in ("question", "id")}
        | {"answer": datasets.List(datasets.Value("int64")), "image": datasets.Image(decode=False)}
    )
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows(), features=features).save_to_disk(tmp_path / "folder", num_shards=2)
    return [tmp_path / name for name in ("records.json", "records.parquet", "folder")]


def test_case_15_tables_give_what_json_gives(places):
    """The same examples, faults, slots, order and prompts, also after a resume.

    A worker gets the records' places alone: it reads and decodes the images.
    """
    processor = Processor(demo_tokenizer(["Where"]), Qwen2VLImageProcessorPil(), min_pixels=784, max_pixels=9408)
    steps = []
    for path in places:
        examples, faults = read_examples(path)
        assert [(f.source, f.reason) for f in faults] == [(f"{path.name}#2", "box_inverted")]
        assert [e.id for e in examples] == list("013456") and examples[0].gold == (100, 200, 300, 400)
        assert [e.id for e in pickle.loads(pickle.dumps(examples[2:4]))] == ["3", "4"]
        assert examples.files[0].table == (path.name != "records.json")
        options = {"batch_size": 2, "seed": 1}
        whole = Loader(examples, processor.prompt, workers=0, **options)
        found = list(islice(whole, 3))
        assert list(whole.faults) == [f"{path.name}#5"]  # found when its image is decoded
        sent = pickle.dumps(whole._slots.examples)
        assert len(sent) < 3000 and pickle.loads(sent)[0] == examples[0]
        resumed = Loader(examples, processor.prompt, workers=0, start=2, **options)
        assert [g.record.id for g in next(iter(resumed))] == [g.record.id for g in found[1]]
        steps.append([(g.serial, g.record.id, g.prompt) for step in found for g in step])
    for other in steps[1:]:
        for (serial, name, prompt), (same, again, there) in zip(steps[0], other, strict=True):
            assert (serial, name) == (same, again) and torch.equal(prompt.input_ids, there.input_ids)
            assert torch.equal(prompt.pixels.patches, there.pixels.patches)


def test_tables_are_usable_sources(places, capsys, caplog):
    """Mixed by count with other files, and shown by inspect."""
    values = {"schema": "auto", "box_unit": "auto", "image_root": "", "seed": 0}
    mixed, _ = read_usable(SimpleNamespace(data=[f"{places[1]}#2", f"{places[2]}#3"], **values), needs="gold")
    assert [s.split("#")[0] for s in mixed.sources] == ["records.parquet"] * 2 + ["folder"] * 3
    one_shard, _ = read_examples(next(places[2].glob("*-00001-of-00002.arrow")))
    assert [e.id for e in one_shard] == list("456")
    for path in places[1:]:
        inspect_data.main([str(path), "--json", "-"])
        found = json.loads(capsys.readouterr().out)
        assert (found["usable"], found["schema"]) == (6, "univg_stage2")
        assert found["first_boxes"][0]["image"] == "0.png" and found["first_boxes"][0]["size"] == [56, 56]


def test_tables_are_evaluated_with_pictures(places, tmp_path):
    """Scores, page and pictures of answers from a file; the images have no files of their own."""
    (tmp_path / "answers.json").write_text(json.dumps(["<answer>(100, 200), (300, 400)</answer>"] * (COUNT - 1)))
    values = {"predictions": str(tmp_path / "answers.json"), "resamples": 0, "pictures": 2, "cases": 1}
    for path in places[1:]:
        out = tmp_path / f"eval_{path.name}"
        options = EvalOptions(data=[str(path)], output_dir=str(out), **values)
        assert evaluate(options, Ranks())["accuracy_at_0.5"] == 1.0
        assert len(list((out / "pictures").glob("*.png"))) == 2 and (out / "report.html").is_file()


def test_a_parquet_file_is_converted_once_until_it_changes(places, tmp_path, monkeypatch):
    """Its rows are then read one by one, however it is divided into groups."""
    read_examples(places[1])
    (made,) = (tmp_path / "cache/tables").iterdir()
    tables._open.cache_clear()
    monkeypatch.setattr(parquet, "ParquetFile", lambda path: pytest.fail("converted again"))
    read_examples(places[1])
    monkeypatch.undo()
    monkeypatch.setenv("BOXGRPO_CACHE", str(tmp_path / "cache"))
    parquet.write_table(pa.Table.from_pylist(rows()[:2]), places[1])
    tables._open.cache_clear()
    assert len(read_examples(places[1])[0]) == 2
    (again,) = (tmp_path / "cache/tables").iterdir()
    assert again.name != made.name


def test_a_large_folders_scan_is_kept(places, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(readers, "CACHE_MIN_BYTES", 0)
    for path in places[1:]:
        first = read_examples(path)
        with monkeypatch.context() as patched:
            patched.setattr(readers, "scan_table", lambda path: pytest.fail("scanned again"))
            again = read_examples(path)
        assert again[1] == first[1] and [e.id for e in again[0]] == [e.id for e in first[0]]


def test_columns_without_a_value_are_no_keys(tmp_path, monkeypatch):
    """A table has every column and field in every row: chats beside questions, texts beside images in parts."""
    monkeypatch.setenv("BOXGRPO_CACHE", str(tmp_path / "cache"))
    chat = [{"role": "user", "content": "Where?", "weight": None}, {"role": "assistant", "content": "There."}]
    records = [{"images": ["a.png"], "messages": chat, "answer_format": None, "target_image": None}] * 2
    parquet.write_table(pa.Table.from_pylist(records), tmp_path / "chats.parquet")
    examples, faults = read_examples(tmp_path / "chats.parquet")
    assert not faults and [role for role, _ in examples[0].turns] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("both", "both holds the splits train, test. Name the folder of one: .*both/train"),
        ("empty", "empty is a folder without state.json"),
        ("bad.parquet", "bad.parquet cannot be read as a table"),
        ("gone", "gone; there is no such file or folder. Correct --data.$"),
    ],
)
def test_other_folders_and_files_are_refused(tmp_path, monkeypatch, name, message):
    monkeypatch.setenv("BOXGRPO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "both").mkdir()
    (tmp_path / "both/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no table")
    source = SimpleNamespace(data=[str(tmp_path / name)], schema="auto", box_unit="auto", image_root="", seed=0)
    with pytest.raises(ValueError, match=message):
        read_usable(source, needs="gold")


def test_a_hub_id_is_told_how_to_fetch_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = SimpleNamespace(data=["lmms-lab/RefCOCO"], schema="auto", box_unit="auto", image_root="", seed=0)
    with pytest.raises(ValueError, match="hf download lmms-lab/RefCOCO --repo-type dataset --local-dir lmms-lab/RefC"):
        read_usable(source, needs="gold")


def test_without_pyarrow_a_table_says_what_to_install(places, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    tables._open.cache_clear()
    with pytest.raises(ValueError, match="records.parquet and an import fails: .*pyarrow.*Run `pip install pyarrow`"):
        read_examples(places[1])


def test_bytes_are_not_shown():
    assert len(repr(Embedded("a.png", b"x" * 10_000))) < 40 and logging.getLevelName(20)
