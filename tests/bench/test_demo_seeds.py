"""The demo's seeds: what the record says of a base model."""

import json

from boxgrpo.bench.studies import demo_seeds


def test_a_base_models_run_is_recorded_where_it_stands_beside_the_model(tmp_path):
    lines = [{"step": 50, "step_time": 2.0}, {"step": 100, "step_time": 3.0}]
    lines += [{"step": 100, "eval/accuracy_at_0.5": 0.75}]
    assert demo_seeds.base_run(tmp_path / "model") == {}
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert demo_seeds.base_run(tmp_path / "model") == {"seconds": 250.0, "accuracy_at_0.5": {100: 0.75}}
