"""Documents, RESULTS.md and plots match the records, and a drift is reported with its place."""

import shutil

import pytest
import torch
from PIL import Image

from boxgrpo.bench.kernel_bench.cases import cases as report_cases
from boxgrpo.bench.machine import describe
from boxgrpo.bench.publish import plots, report
from boxgrpo.bench.publish.report import BLOCK, blocks, fill, page
from boxgrpo.bench.records import Records, dated, newest, read_all, write

ROOT = report.ROOT


def test_nothing_has_drifted_from_the_records():
    """`python -P -m boxgrpo.bench.publish.report` mends what this names."""
    assert report.drift(ROOT) == []


@pytest.fixture
def copy(tmp_path):
    """Documents, page and results in a folder of their own."""
    shutil.copytree(ROOT / "bench/results", tmp_path / "bench/results")
    for name in ("RESULTS.md", "README.md"):
        shutil.copy(ROOT / "bench" / name, tmp_path / "bench")
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    return tmp_path


def test_a_record_that_moved_on_is_noticed_everywhere_and_mended(copy):
    record = newest(copy / "bench/results/cpu")
    record["step"]["rows"][0] |= {"ours_s": 123.45, "ours_peak_mb": 4321}
    record["step"]["rows"][0]["phases"]["decode"]["seconds"] = 98.7
    record["kernels"]["rows"][0]["ms"] = 1234.5
    record["profile"]["unwatched_step_s"] = 7.654
    write(record, dated(copy / "bench/results/cpu")[-1])
    places = report.drift(copy)
    assert [p for p in places if p.startswith(("README", "docs"))] == [
        "README.md, block results:step short",
        *(f"docs/benchmarks.md, block results:{name}" for name in ("step", "phases")),
    ]
    assert any(p.startswith("bench/RESULTS.md, line") and "Kernels" in p for p in places)
    assert "bench/README.md, block profile:unwatched" in places
    drawn = [p for p in places if p.endswith("png")]
    assert drawn == [f"bench/results/cpu/{name}.png" for name in ("roofline", "phases", "growth", "memory")]
    report.write(copy)
    assert report.drift(copy) == []
    for name, text in (("docs/benchmarks", "| 44M | 4 | 1 | 123.45 |"), ("bench/README", "7654 ms")):
        assert text in (copy / f"{name}.md").read_text()


def test_numbers_written_by_hand_are_noticed(copy):
    training, results = copy / "docs/training.md", copy / "bench/RESULTS.md"
    text = training.read_text()
    training.write_text(text.replace("30 times, 12", "31 times, 12"))
    results.write_text("| well met |".join(results.read_text().rsplit("| met |", 1)))
    (copy / "bench/results/cpu/growth.png").unlink()
    first, second, third = report.drift(copy)
    assert first == "docs/training.md, block results:soak"
    assert second.startswith("bench/RESULTS.md, line") and "under 'The same with ZeRO-2'" in second
    assert third == "bench/results/cpu/growth.png, which is missing"
    benchmarks = copy / "docs/benchmarks.md"
    benchmarks.write_text(BLOCK.sub("", benchmarks.read_text(), count=1))
    assert "block results:demo machine, which no document has" in report.drift(copy)
    (copy / "docs/demo.md").write_text("On an <!-- results:demo machine -->abacus<!-- end -->.")
    assert "docs/demo.md, block results:demo machine" in report.drift(copy)


def test_a_block_keeps_its_lines_while_its_words_are_right():
    wanted = {"results:data": "one two three", "results:table": "| a |\n|---|"}
    text = "so <!-- results:data -->one\n two three<!-- end -->.\n\n<!-- results:table -->\n\n| b |\n\n<!-- end -->\n"
    new = fill(text, wanted)
    assert new.startswith("so <!-- results:data -->one\n two three<!-- end -->.")
    assert "<!-- results:table -->\n\n| a |\n|---|\n\n<!-- end -->" in new
    long = fill(text, wanted | {"results:data": " ".join(["word"] * 60)})
    assert all(len(line) <= 135 for line in long.splitlines()) and "\n<!-- end -->." not in long
    with pytest.raises(ValueError, match="no record fills the block 'results:data'; there are results:table"):
        fill(text, {"results:table": ""})


def test_a_device_without_records_is_named():
    text = page(Records({}, {}))
    assert "## CPU\n\nNothing has been recorded" in text and "## GPU\n\nNothing has been recorded" in text
    with pytest.raises(
        ValueError, match="no results of guard, kernels, loader, profile, rewards, step; `make bench` makes"
    ):
        blocks(Records({}, {}))


def test_every_table_and_plot_names_machine_revision_and_day():
    """In all sections of the page a line in italics stands above the first table; a plot has it as its caption."""
    found = read_all(ROOT / "bench/results")
    sections = page(found).replace("\n### ", "\n## ").split("\n## ")[1:]
    for section in (s for s in sections if "|---" in s):
        assert "revision " in section[: section.index("|---")], section[:80]
    record = newest()
    for plot in plots.PLOTS.values():
        shown = plots.caption(plot.data(record))
        assert "revision" in shown and record["machine"]["date"][:4] in shown
    gpu = {"device": "NVIDIA H200", "gpu_memory_gb": 150.1, "driver": "570", "cuda": "12.8", "torch": "2.11"}
    gpu |= {"threads": 16, "revision": "abc", "date": "2026-01-01"}
    text = "NVIDIA H200, 150 GB, 16 threads, driver 570, CUDA 12.8, torch 2.11, revision abc, 2026-01-01"
    assert describe(gpu) == text


def test_a_gpus_record_of_some_parts_is_drawn_and_described(tmp_path):
    """Every case that a GPU has, a peer without a name of its own; peers that were left out, what failed, the tests."""
    rows = [
        {"op": c.op, "shape": c.shape, "dtype": "bfloat16", "implementation": "boxgrpo", "ms": 1.0, "peak_mb": 40.0}
        | {"floor_is": "bytes", "percent_of_floor": 50.0, "bytes": c.bytes_floor, "flop": c.flops_floor or 1.0}
        for c in report_cases(torch.device("cuda"))
    ]
    rows.append(rows[0] | {"implementation": "somebody"})
    record = {
        "machine": {"device": "NVIDIA H200", "cuda": "13.0", "revision": "abc", "date": "2026-01-02"},
        "ceilings": {"bytes_per_second": 4e12, "flop_per_second": 8e14},
        "kernels": {"rows": rows, "skipped": {"trl": "trl is not installed"}, "errors": []},
        "step": {"rows": [{"model": "2B", "images": 4, "prompts": 1, "case": "2B, 4", "univg_r1_error": "no room"}]},
        "tests": {"counts": {"PASSED": 3, "FAILED": 1}, "failed": ["tests/test_a.py::test_b"]},
        "parts": {"tests": {"outcome": "failed with 1", "seconds": 9.0}},
    }
    plots.draw(record, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory.png", "roofline.png"]
    assert plots.stale(record, tmp_path) == []
    with Image.open(tmp_path / "roofline.png") as image:
        assert image.width > 1000
    text = page(Records({"nvidia-h200": record}, {}))
    assert "### Kernels" in text and "### Rewards" not in text and "results/nvidia-h200/memory.png" in text
    assert "trl is left out: trl is not installed" in text and "univg_r1: no room" in text
    assert "3 passed, 1 failed" in text and "- tests/test_a.py::test_b" in text
    assert "| tests marked gpu that fail | at most 0 | 1 | short by 1 |" in text
