"""`--profile_steps` on both loops."""

import json
from pathlib import Path

import pytest
import torch

from boxgrpo.trainer import grpo, sft
from boxgrpo.trainer.options import GrpoOptions, SftOptions, profile_window
from boxgrpo.trainer.profiling import profiler
from boxgrpo.trainer.profiling.chrome_trace import read_chrome_trace
from boxgrpo.trainer.profiling.profiler import profiled
from boxgrpo.trainer.profiling.timeline import Row, rows
from boxgrpo.trainer.runtime.ranks import Ranks
from boxgrpo.trainer.runtime.spans import named_range
from runs import lines


@pytest.fixture
def shared(initial, record_file):
    """Options of both loops."""
    files = {"model": str(initial), "data": str(record_file), "output_dir": str(record_file.parent / "run")}
    return files | {"min_pixels": 784, "max_pixels": 9408, "dataloader_num_workers": 0}


def test_steps_of_grpo_are_profiled_stage_by_stage(shared):
    sizes = {"prompts_per_step": 2, "num_generations": 2, "max_completion_length": 4, "max_steps": 4}
    grpo.train(GrpoOptions(**shared, **sizes, profile_steps="2:4", peak_tflops=0.1), Ranks())
    folder = Path(shared["output_dir"])
    table, kept, trace = (folder / f"profile/steps2-3-rank0.{end}" for end in ("md", "json", "trace.json.gz"))
    assert {*folder.glob("profile/*")} == {table, kept, trace}
    kept = [Row(**row) for row in json.loads(kept.read_text())]
    assert [row.samples for row in kept] == [row.samples for row in rows(read_chrome_trace(trace))]
    found = {row.name: row for row in kept}
    outer = "data rollout reward pack reference policy optimizer".split()
    assert found["step"].titles == ["step 2", "step 3"]
    assert [name for name in found if name.count(" > ") == 1] == [f"step > {name}" for name in outer]
    inner = ("rollout > vision", "rollout > prefill", "rollout > decode", "policy > forward", "policy > backward")
    assert {f"step > {name}" for name in (*inner, "policy > forward > head+loss", "reference > head")} <= found.keys()
    assert found["step > rollout > decode"].titles == ["decode 4x4"]
    assert all(row.launches > 0 for name, row in found.items() if name != "step > data")
    assert sum(row.seconds for row in found.values() if row.depth == 1) <= found["step"].seconds
    assert "decode 4x4" in table.read_text()
    for line in lines(folder):
        assert not {key for key in line if " " in key or key in ("timing_s/step", "timing_s/head+loss")}
        assert 0 < line["perf/mfu"] < 10


def test_steps_of_sft_are_profiled_up_to_the_runs_end(shared, record_file):
    turns = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]
    records = [{"images": r["images"], "messages": turns} for r in json.loads(record_file.read_text())]
    record_file.write_text(json.dumps(records))
    sft.train(SftOptions(**shared, max_steps=3, train_batch_size=2, profile_steps="2:9"), Ranks())
    (trace,) = Path(shared["output_dir"]).glob("profile/*.gz")
    found = {row.name: row for row in rows(read_chrome_trace(trace))}
    assert trace.name == "steps2-3-rank0.trace.json.gz" and found["step"].titles == ["step 2", "step 3"]
    parts = ("data", "policy", "policy > forward", "policy > forward > head+loss", "policy > backward", "optimizer")
    assert found.keys() == {"step", *(f"step > {name}" for name in parts)}
    metrics = lines(shared["output_dir"])[0]
    assert "perf/mfu" not in metrics  # this CPU's peak is unknown
    timed = {key for key in metrics if key.startswith("timing_s/")}
    assert timed == {"timing_s/data", "timing_s/policy", "timing_s/optimizer"}


def test_a_step_that_fails_leaves_its_profile(tmp_path):
    """Its name has the rank's number."""
    o = GrpoOptions(output_dir=str(tmp_path), profile_steps="1:3")
    with pytest.raises(KeyError):
        for step in profiled(range(1, 5), o, Ranks(1, 2)):
            with named_range("step", step):
                torch.ones(2).add_(1)
                if step == 2:
                    raise KeyError
    (trace,) = tmp_path.glob("profile/*.gz")
    assert trace.name == "steps1-2-rank1.trace.json.gz"
    assert rows(read_chrome_trace(trace))[0].titles == ["step 1", "step 2"]


def take(steps, o) -> list[int]:
    taken = []
    for step in profiled(steps, o, Ranks()):
        with named_range("step", step):
            taken.append(step)
    return taken


def test_a_resumed_run_profiles_the_steps_that_are_left(tmp_path, caplog):
    o = GrpoOptions(output_dir=str(tmp_path), profile_steps="3:6")
    assert take(range(5, 8), o) == [5, 6, 7]
    assert [path.name for path in tmp_path.glob("profile/*.gz")] == ["steps5-5-rank0.trace.json.gz"]
    assert take(range(6, 8), o) == [6, 7]
    assert "continues from step 6" in caplog.text


def test_under_nsys_only_the_steps_are_marked(tmp_path, monkeypatch):
    """By cudaProfilerStart and Stop, for nsys profile -c cudaProfilerApi; torch records nothing."""
    called = []
    monkeypatch.setenv(profiler.UNDER_NSYS, "1")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: called.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: called.append("stop"))
    for step in profiled(range(1, 5), GrpoOptions(output_dir=str(tmp_path), profile_steps="2:4"), Ranks(device="cuda")):
        called.append(step)
        assert not torch.autograd._profiler_enabled()
    assert called == [1, "start", 2, 3, "stop", 4]


def test_steps_after_the_end_of_the_data_are_refused(tmp_path):
    with pytest.raises(ValueError, match="10:13; the run ends with step 4"):
        list(profiled(range(1, 5), GrpoOptions(output_dir=str(tmp_path), profile_steps="10:13"), Ranks()))
    assert profile_window("") == range(0) and profile_window("10:13") == range(10, 13)
