"""The data benchmark on a small file."""

import json

from boxgrpo.bench import bench_data


def test_a_small_file_is_scanned_once_and_opened_from_then_on(tmp_path, capsys):
    """20,000 records are enough for a scan to be kept; both readings go on at the same place."""
    bench_data.main(["--records=20000", "--repeats=1", f"--json={tmp_path / 'data.json'}"])
    found = json.loads((tmp_path / "data.json").read_text())
    (scan,), (opened,) = (found["readings"][kind] for kind in ("scan", "open"))
    assert scan["records"] == opened["records"] == 19_998 and scan["faulty"] == opened["faulty"] == 2
    assert found["same_order"]
    assert "20,000 records" in capsys.readouterr().out
