"""The profile of a benchmark's step at a tiny size, the page that explains one, and the kernel profiler's refusals."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from boxgrpo.bench.kernel_bench.run import run_once
from boxgrpo.bench.profiles import profile_step
from boxgrpo.bench.publish.tables import profile_table

NSIGHT = Path(profile_step.__file__).with_name("nsight.sh")


def test_a_step_is_profiled_and_its_ranges_stand_beside_their_floors(tmp_path, tiny_case, tokenizer):
    measured = {"flop_per_second": 1e11, "bytes_per_second": 1e10}
    found = profile_step.run(tiny_case, tmp_path / "run", 1, tokenizer, measured)
    by_name = {row["name"]: row for row in found["rows"]}
    assert found["tool"] == "torch.profiler" and not found["on_gpu"] and found["unwatched_step_s"] > 0
    assert by_name["step > rollout > decode"]["titles"] == ["decode 8x6"]
    assert {name for name, row in by_name.items() if row["floor"]} == profile_step.COUNTED.keys()
    head, forward = (by_name[f"step > policy > {name}"] for name in ("forward > head+loss", "forward"))
    assert 0 < head["seconds"] < forward["seconds"] and head["floor"]["gflop"] < forward["floor"]["gflop"]
    assert len(profile_table(found).splitlines()) == 2 + len(by_name)
    with pytest.raises(ValueError, match="there is no trace"):
        profile_step.read(tmp_path / "none.trace.json.gz")
    (trace,) = (tmp_path / "run/profile").glob("*.gz")
    again = profile_step.rows(profile_step.read_chrome_trace(trace))
    assert [profile_step.rounded(row) | {"floor": by_name[row.name]["floor"]} for row in again] == found["rows"]


def test_a_kernel_is_profiled_only_with_ncu_and_a_gpu(tmp_path):
    def refusal(*args, **environment):
        environment = {"PATH": os.environ["PATH"], "PYTHON": sys.executable} | environment
        done = subprocess.run([NSIGHT, *args], env=environment, capture_output=True, text=True)
        assert done.returncode == 1
        return done.stderr

    assert "no case" in refusal() and "there is no /no/python" in refusal("fused_grpo_loss", PYTHON="/no/python")
    bare = shutil.which("python3", path="/usr/local/bin:/usr/bin:/bin")  # boxgrpo is not installed there
    if bare and not (NSIGHT.parents[2] / "out/site").exists():
        assert f"{bare} has no boxgrpo" in refusal("fused_grpo_loss", PYTHON=bare)
    if not shutil.which("ncu"):
        assert "ncu is not on the PATH" in refusal("fused_grpo_loss")
    if not torch.cuda.is_available():
        (tmp_path / "ncu").symlink_to(shutil.which("false"))  # which is not reached
        assert "torch sees no GPU here" in refusal("fused_grpo_loss", PATH=f"{tmp_path}:{os.environ['PATH']}")


def test_a_kernels_case_is_found_by_its_op_or_the_beginning_of_its_name(monkeypatch):
    ran = []
    for name in ("cuda.synchronize", "cuda.profiler.start", "cuda.profiler.stop"):
        monkeypatch.setattr(f"torch.{name}", lambda name=name: ran.append(name.split(".")[-1]))
    ops = [
        SimpleNamespace(op=op, name=f"{op} N=8", make=lambda *_, op=op: {"boxgrpo": lambda: ran.append(op)})
        for op in ("loss_from", "loss")
    ]
    run_once("loss", "boxgrpo", ops)  # not the first whose name begins so
    assert ran == ["loss", "synchronize", "start", "loss", "synchronize", "stop"]
    run_once("loss_from N", "boxgrpo", ops)
    assert ran[6] == "loss_from"
    with pytest.raises(ValueError, match="no case is 'softmax'; there are: loss_from N=8; loss N=8"):
        run_once("softmax", "boxgrpo", ops)
    with pytest.raises(ValueError, match="loss N=8 is not run by 'apex' here; by boxgrpo"):
        run_once("loss", "apex", ops)
