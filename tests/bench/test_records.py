"""The files of results: what is kept from one run to the next, and which day counts."""

import json

import pytest

from boxgrpo.bench.machine import machine
from boxgrpo.bench.records import begin, dated, dump, find_row, newest, part, write


def test_numbers_stand_in_a_line_and_come_back(tmp_path):
    record = {"machine": {"device": "a [b] \\n"}, "empty": [{}, []], "rows": [{"samples": [1.5, None, 2]}, {"x": {}}]}
    assert json.loads(dump(record)) == record
    assert '"samples": [1.5, null, 2]' in dump(record)
    write(record, tmp_path / "2026-01-02.json")
    assert json.loads((tmp_path / "2026-01-02.json").read_text()) == record
    assert [path.name for path in tmp_path.iterdir()] == ["2026-01-02.json"]


def test_a_row_is_found_by_its_values_and_those_of_its_shape():
    rows = [{"op": "a", "shape": {"N": 1}}, {"op": "a", "shape": {"N": 2, "V": 3}}]
    assert find_row(rows, op="a", V=3) is rows[1] and find_row(rows, N=1, V=3) is None


def test_the_newest_day_counts_and_other_files_do_not(tmp_path):
    with pytest.raises(ValueError, match="has no results of any day; `make bench`"):
        newest(tmp_path)
    for name in ("2026-02-01", "2025-12-31", "demo", "2026-2-9"):
        write({"name": name}, tmp_path / f"{name}.json")
    assert [path.stem for path in dated(tmp_path)] == ["2025-12-31", "2026-02-01"]
    assert newest(tmp_path) == {"name": "2026-02-01"}


def test_a_part_that_the_last_day_lacks_is_an_older_days(tmp_path):
    """With the machine that it was measured on; the newest that has it."""
    for day, parts in (("01", ("step", "kernels")), ("02", ("step",)), ("03", ("kernels",))):
        rows = {name: {"rows": [day]} for name in parts}
        write({"machine": {"date": day}} | rows, tmp_path / f"2026-01-{day}.json")
    found = newest(tmp_path)
    assert found["machine"] == {"date": "03"} and found["kernels"] == {"rows": ["03"]}
    assert part(found, "step") == {"machine": {"date": "02"}, "rows": ["02"]}


def test_parts_of_another_run_keep_their_machine(tmp_path):
    """All else is kept only from the same machine, revision and day."""
    path = tmp_path / "2026-01-02.json"
    old = {"machine": {"device": "old"}, "load_before": 7, "ceilings": {"flop_per_second": 1}, "kernels": {"rows": [1]}}
    write(old | {"parts": {"build": {}}}, path)
    record = begin(path)
    assert record["machine"] == machine() and not record.keys() & {"ceilings", "parts"}
    kept = {"machine": {"device": "old"}, "load_before": 7, "ceilings": {"flop_per_second": 1}, "rows": [1]}
    assert part(record, "kernels") == record["kernels"] == kept
    assert part(record | {"step": {"rows": []}}, "step")["machine"] == machine()
    assert "kernels" not in begin(tmp_path / "2026-01-03.json")
    write(old | {"machine": machine(), "parts": {"build": {}}}, path)
    assert begin(path)["parts"] == {"build": {}} and begin(path)["ceilings"] == old["ceilings"]
