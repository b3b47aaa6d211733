"""The benchmark of a step's images on small ones."""

import json

from boxgrpo.bench.loader_bench import run


def test_both_forms_of_a_steps_images_are_measured(monkeypatch, tmp_path, capsys):
    """Two images of 4 x 8 patches a step; without loader processes, whose start takes seconds."""
    monkeypatch.setattr(run, "WORKERS", 0)
    run.main(["--quick", f"--json={tmp_path / 'loader.json'}"])
    bits, values = json.loads((tmp_path / "loader.json").read_text())["loader"]["rows"]
    assert (bits["run"], values["run"]) == ("8-bit pixels", "fp32 patches")
    assert 0.038 < bits["megabytes"] < 0.1 and values["megabytes"] > 0.3
    assert 0 < bits["wait_s"] < bits["cpu_s"] + 0.1
    assert "| 8-bit pixels | 2 x 1 images of 56 x 112 |" in capsys.readouterr().out
