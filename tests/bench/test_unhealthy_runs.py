"""Runs that do not learn: what a run's record holds, its row and its picture."""

import json

from PIL import Image

from boxgrpo.bench.publish.tables import table
from boxgrpo.bench.studies import unhealthy_runs
from boxgrpo.trainer import demo
from boxgrpo.trainer.arguments import parse
from boxgrpo.trainer.options import GrpoOptions


def line(step):
    names = {change.metric for change in unhealthy_runs.CHANGES.values()} | {"rewards/accuracy/mean"}
    return dict.fromkeys(names, 0.5) | {"step": step, "rewards/format/mean": 0.0, "rewards/accuracy/mean": step / 100}


def test_a_run_is_recorded_with_what_the_health_rules_find_and_drawn(tmp_path, monkeypatch):
    ran = {}

    def torchrun(script, options, flags):
        o = parse(GrpoOptions, flags)
        ran[o.output_dir] = o
        (tmp_path / o.output_dir).mkdir(parents=True)
        text = "\n".join(json.dumps(line(n + 1)) for n in range(o.max_steps))
        (tmp_path / o.output_dir / "metrics.jsonl").write_text(text + "\n")

    monkeypatch.setattr(demo, "torchrun", torchrun)
    options = unhealthy_runs.UnhealthyRunsOptions(output_dir=str(tmp_path), max_steps=40)
    runs = [unhealthy_runs.train(options, name) for name in unhealthy_runs.CHANGES]
    assert len(ran) == len(runs) and all(o.max_steps == 40 for o in ran.values())
    few = ran[str(tmp_path / "parting")]
    assert few.data == [f"{tmp_path}/world/train.json#64"] and few.eval_every == 10
    assert [(f["kind"], f["step"]) for f in runs[0]["found"]] == [("clipped completions", 10), ("no format", 20)]
    row = "| nothing changed | clipped completions, 10; no format, 20 | 0.025 | 0.385 |"
    assert table("unhealthy_runs", {"runs": runs[:1]}).splitlines()[-1] == row
    assert runs[0]["iou"] == [0.025, 0.385]
    unhealthy_runs.plot(runs, tmp_path / "runs.png")
    assert Image.open(tmp_path / "runs.png").width > 1000
