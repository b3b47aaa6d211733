"""Seconds of `make fuzz`, or minutes if slow: the compiled parser against `re`, and its header under the sanitizers."""

import json
import random
import re
import shutil

import pytest
import torch

import fuzz_rewards
from boxgrpo.bench.machine import RESULTS
from boxgrpo.kernels import ANSWER_FORMATS, dispatch
from fuzz_rewards import MARKS, TAGS, compiled, completions, differential, guided, sanitized

SEED = random.SystemRandom().randrange(2**32)  # a failure names it


@pytest.mark.skipif(dispatch.IMPORT_FAILURE is not None, reason="csrc/ is not compiled")
@pytest.mark.parametrize("seconds", [2, pytest.param(60, marks=pytest.mark.slow)])
def test_the_operators_agree_with_re(seconds):
    """Text and token ids, every answer format; enough answers are good for the agreement to mean something."""
    counts = differential(seconds, SEED)
    assert counts["cases"] > 1_000
    assert counts["boxes"] > counts["cases"] / 4 and counts["good_formats"] > counts["cases"] / 5


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
@pytest.mark.parametrize("seconds", [2, pytest.param(60, marks=pytest.mark.slow)])
def test_the_sanitizers_are_silent(tmp_path, seconds):
    """Against `re`, and itself fed byte by byte, in two pieces and as token ids."""
    program = compiled(tmp_path, "g++", "-fsanitize=address,undefined")
    assert sanitized(seconds, SEED, program)["cases"] >= fuzz_rewards.BATCH


BROKEN = {  # faults in the reading of token ids, which texts in pieces do not show
    "a copy from one byte too near the end": ("token_row.h", "tokens.size - kCopied;", "tokens.size - kCopied + 1;"),
    "a run of too many tokens": ("token_row.h", "end : id + kRun", "end : id + 2 * kRun"),
    "ids behind an end": ("token_row.h", "id < stop && !ended;", "id < stop;"),
    "a length that wraps": ("launch.h", "length < 0 ? 0 : ", ""),
}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
@pytest.mark.parametrize("fault", BROKEN)
def test_the_sanitizers_detect(tmp_path, monkeypatch, fault):
    name, right, wrong = BROKEN[fault]
    for path in fuzz_rewards.HEADERS.glob("*.h"):
        shutil.copy(path, tmp_path)
    source = (tmp_path / name).read_text()
    assert right in source
    (tmp_path / name).write_text(source.replace(right, wrong))
    monkeypatch.setattr(fuzz_rewards, "HEADERS", tmp_path)
    with pytest.raises(SystemExit, match=f"seed {SEED}"):
        sanitized(200, SEED, compiled(tmp_path, "g++", "-fsanitize=address,undefined"))


@pytest.mark.skipif(shutil.which("clang++") is None, reason="no clang++ here")
def test_libfuzzer_finds_nothing(tmp_path):
    program = compiled(tmp_path, "clang++", "-fsanitize=fuzzer,address,undefined", "-DBOXGRPO_LIBFUZZER")
    found = guided(5, SEED, tmp_path, program)
    assert found["cases"] > 1000 and found["coverage"] > 100


def test_the_cases_are_of_every_kind():
    """Repeated and unclosed tags, long digits, NULs, broken UTF-8, text around tags, boxes in the reasoning."""
    texts, names = completions(random.Random(0), 20_000)
    assert set(names) == set(ANSWER_FORMATS)

    def broken(text):
        return text.decode(errors="replace").encode() != text

    for least, holds in (
        (1000, lambda t: any(t.count(tag) > 1 for tag in TAGS)),
        (500, lambda t: t.count(b"<think>") > t.count(b"</think>")),
        (500, lambda t: t.count(b"<answer>") > t.count(b"</answer>")),
        (50, lambda t: re.search(rb"\d{100}", t)),
        (500, lambda t: b"\0" in t),
        (500, broken),
        (50, lambda t: "世界".encode() + b"</think>" in t),
        (50, lambda t: b"(300,400)</think>" in t or b"(300, 400)</think>" in t),
        (200, lambda t: t.endswith(b"</answer>\n")),
        (1000, lambda t: MARKS[1] in t),
    ):
        assert sum(map(bool, map(holds, texts))) > least


def test_a_difference_ends_the_run(monkeypatch):
    """A twin that refuses a newline before the end is found to differ from the parser."""
    twin = fuzz_rewards.grounding_rewards

    def without_newline(text, offsets, gold, **options):
        got = twin(text, offsets, gold, **options)
        if options["backend"] != "torch":
            return got
        last = text[(offsets[1:] - 1).clamp(min=0)] == ord("\n")
        return got._replace(format=torch.where(last, 0.0, got.format))

    monkeypatch.setattr(fuzz_rewards, "grounding_rewards", without_newline)
    with pytest.raises(SystemExit, match=f"differ in format; seed {SEED}"):
        differential(10, SEED)


def test_the_recorded_run_is_long_and_has_nothing_to_report():
    """bench/results/cpu/fuzz.json: how many cases, of which seed, at which revision."""
    found = json.loads((RESULTS / "cpu/fuzz.json").read_text())
    assert found["machine"]["revision"] and isinstance(found["seed"], int)
    cases = {row["run"]: row["cases"] for row in found["rows"]}
    assert cases.keys() == {"operators", "sanitizers", "libFuzzer"}
    assert sum(cases.values()) >= 2_000_000 and min(cases.values()) >= 100_000
