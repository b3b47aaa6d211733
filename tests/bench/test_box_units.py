"""The study of the units of boxes on a few files."""

import json

import pytest

from boxgrpo.bench.studies import box_units


def test_every_file_has_an_outcome_by_its_records_and_by_its_family(shared, tmp_path, monkeypatch, capsys):
    """Two usual units x four units x seven families x seven numbers of records."""
    monkeypatch.setattr(box_units, "folder", lambda: tmp_path)
    box_units.main(["--files=1", f"--real={shared / 'data/mig_bench/MIG_data.sample.json'}"])
    rows = json.loads((tmp_path / "box_units.json").read_text())["rows"]
    for by in ("records", "family"):
        counts = [sum(row["found"].values()) for row in rows if row["by"] == by]
        assert counts == [42] * 7 + [14] * 7
    assert "| usual | real |" in capsys.readouterr().out
    with pytest.raises(ValueError, match="real is gone.json; there is no such file"):
        box_units.main(["--real=gone.json"])
