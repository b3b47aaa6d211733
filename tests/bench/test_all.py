"""The file of a day's measurements: what a run writes, keeps and leaves out."""

import json

import pytest

from boxgrpo.bench import bench_all
from boxgrpo.bench.kernel_bench import guard as bench_guard
from boxgrpo.bench.machine import RESULTS, machine
from boxgrpo.bench.publish.result_files import LONG, begin, dated, dump, newest, part, records, write


def test_numbers_stand_in_a_line_and_come_back(tmp_path):
    record = {"machine": {"device": "a [b] \\n"}, "empty": [{}, []], "rows": [{"samples": [1.5, None, 2]}, {"x": {}}]}
    assert json.loads(dump(record)) == record
    assert '"samples": [1.5, null, 2]' in dump(record)
    write(record, tmp_path / "2026-01-02.json")
    assert json.loads((tmp_path / "2026-01-02.json").read_text()) == record
    assert [path.name for path in tmp_path.iterdir()] == ["2026-01-02.json"]


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


def test_what_another_run_measured_keeps_its_machine(tmp_path):
    path = tmp_path / "2026-01-02.json"
    old = {"machine": {"device": "old"}, "load_before": 7, "ceilings": {"flop_per_second": 1}, "kernels": {"rows": [1]}}
    write(old, path)
    record = begin(path)
    assert record["machine"] == machine() and "ceilings" not in record
    kept = {"machine": {"device": "old"}, "load_before": 7, "ceilings": {"flop_per_second": 1}, "rows": [1]}
    assert part(record, "kernels") == record["kernels"] == kept
    assert part(record | {"step": {"rows": []}}, "step")["machine"] == machine()
    assert part(old | {"rewards": {"machine": {"device": "new"}}}, "rewards") == {"machine": {"device": "new"}}
    assert "kernels" not in begin(tmp_path / "2026-01-03.json")


def test_a_machine_tells_its_threads_and_revision():
    assert {"device", "threads", "python", "torch", "revision", "date"} <= machine().keys()


def test_a_part_that_cannot_be_measured_is_named_and_the_others_are_kept(tmp_path, monkeypatch, capsys):
    """Rewards without a vocabulary; and a part that was stopped leaves the rows it had."""
    path = tmp_path / "day.json"

    def stopped(r, keep):
        keep({"rows": [1]})
        raise KeyboardInterrupt

    monkeypatch.setitem(bench_all.PARTS, "step", stopped)
    told = bench_all.Run({"machine": machine(), "ceilings": {}}, merges=str(tmp_path / "none.txt"))
    missing = bench_all.run(["rewards"], told, path)
    assert list(missing) == ["rewards"] and "Name it with --merges" in missing["rewards"]
    assert "Name it with --merges" in capsys.readouterr().err and not path.exists()
    with pytest.raises(KeyboardInterrupt):
        bench_all.run(["step"], told, path)
    assert json.loads(path.read_text())["step"] == {"rows": [1], "took_s": 0}


def test_unknown_parts_are_refused():
    with pytest.raises(ValueError, match="parts are kernels,x; x is none of kernels, guard, rewards, step, profile"):
        bench_all.main(["--parts", "kernels,x"])
    with pytest.raises(ValueError, match="only is 'fused'; name the parts it is meant for .* kernels, guard, step"):
        bench_all.main(["--only", "fused"])


def test_cases_that_nobody_has_are_refused():
    told = bench_all.Run({"machine": machine(), "ceilings": {}}, only="softmax")
    missing = bench_all.run(["kernels", "step"], told, None)
    for name in ("kernels", "step"):
        assert missing[name].startswith("only is 'softmax', which no case's name holds; there are ")
    with pytest.raises(ValueError, match="only is 'softmax', which no case's name holds"):
        bench_guard.guarded("softmax")


@pytest.mark.slow
def test_a_case_is_measured_whole(tmp_path):
    """Times, memory, floors and processor seconds of one op, by the command."""
    path = tmp_path / "one.json"
    bench_all.main(["--parts", "kernels,guard", "--only", "group_advantages B=16", "--json", str(path)])
    record = json.loads(path.read_text())
    assert {row["implementation"] for row in record["kernels"]["rows"]} == {"boxgrpo", "eager", "compile"}
    assert all(len(row["samples_ms"]) == 48 and row["peak_mb"] >= 0 for row in record["kernels"]["rows"])
    assert len(record["guard"]["rows"]) == 1
    assert record["ceilings"].keys() == {"bytes_per_second", "sum_bytes_per_second", "flop_per_second"}


def test_the_records_are_whole_and_of_trees_that_git_knows():
    """The newest day's parts, and those of the commands that keep a file of their own."""
    record, long = newest(RESULTS / "cpu"), records(RESULTS).long
    assert record.keys() >= {"machine", *bench_all.PARTS} and long.keys() == set(LONG)
    measured = {name: part(record, name) for name in bench_all.PARTS} | long
    for name, told in ((name, found["machine"]) for name, found in measured.items()):
        assert told["device"] and told["date"] and not told["revision"].endswith("dirty"), name
