"""Runs of `make` against an HTTP server of the test: its fixtures, and the records that go in and come out."""

import json
from pathlib import Path

import pytest
from PIL import Image

from boxgrpo.trainer.chains.make import CotOptions
from fake_openai import FakeOpenAI, Reply

KEY = "sk-a-secret-of-this-test"
SIZES = ((270, 210), (60, 80), (20, 40), (200, 150))


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)


@pytest.fixture
def server():
    with FakeOpenAI() as started:
        yield started


@pytest.fixture
def options(server, tmp_path):
    """options(records, **changes) -> CotOptions for so many records, or those given, with images of SIZES."""
    for k, size in enumerate(SIZES):
        Image.effect_noise(size, 60).convert("RGB").save(tmp_path / f"{k}.png")

    def made(records, **changes):
        if isinstance(records, int):
            records = [record(k) for k in range(records)]
        (tmp_path / "data.json").write_text(json.dumps(records))
        values = {"base_url": server.url, "model": "writer", "judge_model": "judge", "backoff": 0.01}
        values |= {"max_pixels": 9000, "data": str(tmp_path / "data.json"), "output_dir": str(tmp_path / "out")}
        values["box_unit"] = "thousandths"  # the boxes of `record` are all in a corner
        return CotOptions(**values | changes)

    return made


def record(k, **changes):
    box = [7 * k, 5 * k, 7 * k + 90, 5 * k + 60]
    return {"images": ["0.png", f"{1 + k % 3}.png"], "question": f"Where is thing {k}?", "answer": box} | changes


def number(seen):
    """The k of the `record(k)` that a request is about."""
    return int(seen.question.split()[-1][:-1])


def chain(box, thought="It is there."):
    return Reply(f"<think>{thought}</think><answer>{box}</answer>")


def written(o):
    return json.loads(Path(o.output_dir, "cold_start.json").read_text())


def sources(o):
    """Of the records written, the numbers in the data file."""
    return [int(made["cot"]["source"].removeprefix("data.json#")) for made in written(o)]
