"""nsys's SQLite export: work belongs to the range of its launch, in one process and in the domain of its steps."""

import sqlite3

import pytest

from boxgrpo.bench.profiles.nsys_sqlite import read_nsys
from boxgrpo.trainer.profiling.timeline import rows

PID, OTHER, S = 5 << 24, 6 << 24, 10**9
# The columns that are read, and some that have others of their name elsewhere.
TABLES = {
    "StringIds": "id, value",
    "NVTX_EVENTS": "start, end, eventType, text, globalTid, textId, domainId",
    "CUPTI_ACTIVITY_KIND_RUNTIME": "start, end, globalTid, correlationId",
    "CUPTI_ACTIVITY_KIND_KERNEL": "start, end, correlationId, globalPid, demangledName",
    "CUPTI_ACTIVITY_KIND_MEMCPY": "start, end, correlationId, globalPid, bytes",
    "CUPTI_ACTIVITY_KIND_GRAPH_TRACE": "start, end, correlationId, globalPid, graphId",
}


def nsys_file(path, **more):
    """Two processes; ours pushes registered strings, decodes with a graph, and its backward has a thread of its own."""
    content = {
        "StringIds": list(enumerate(["step 4", "decode 8x64", "attention", "gemm", "wgrad"])),
        "NVTX_EVENTS": [
            *((0, None, 75, "boxgrpo", PID + 1, None, 3), (0, None, 75, "NCCL", PID + 1, None, 1)),
            *((0, 10 * S, 59, None, PID + 1, 0, 3), (1 * S, 4 * S, 59, None, PID + 1, 1, 3)),
            (5 * S, 9 * S, 59, "backward 9", PID + 1, None, 3),
            (5 * S, 6 * S, 59, "ncclAllReduce", PID + 1, None, 1),
            *((0, None, 75, "boxgrpo", OTHER + 1, None, 1), (0, 9 * S, 59, None, OTHER + 1, 0, 1)),
        ],
        "CUPTI_ACTIVITY_KIND_RUNTIME": [
            *((2 * S, 2 * S + 1, PID + 1, 7), (6 * S, 6 * S + 1, PID + 2, 8)),
            (7 * S, 7 * S + 1, OTHER + 1, 7),  # each process numbers its own
        ],
        "CUPTI_ACTIVITY_KIND_KERNEL": [
            *((8 * S, 9 * S, 8, PID, 4), (8 * S, 9 * S, 7, OTHER, 4), (9 * S, 10 * S, 99, PID, 4)),
            *(() if more else ((6 * S, 7 * S, 7, PID, 2), (7 * S, 8 * S, 7, PID, 3))),
        ],
        "CUPTI_ACTIVITY_KIND_MEMCPY": [(9 * S, 10 * S, 8, PID, 4096)],
    }
    with sqlite3.connect(path) as db:
        for table, lines in (content | more).items():
            db.execute(f"CREATE TABLE {table} ({TABLES[table]})")
            db.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(lines[0]))})", lines)
    return path


def test_nsys_gives_kernels_to_the_range_of_their_launch(tmp_path):
    """One process, the domain of its steps, strings looked up; what was launched before the recording is left out."""
    found = {row.name: row for row in rows(read_nsys(nsys_file(tmp_path / "a.sqlite")))}
    assert found.keys() == {"step", "step > decode", "step > backward"}
    assert found["step > decode"].titles == ["decode 8x64"] and found["step"].launches == 4
    assert dict(found["step > decode"].top) == {"attention": 0.5, "gemm": 0.5}
    assert dict(found["step > backward"].top) == {"wgrad": 0.5, "memory copy": 0.5}
    assert found["step > decode"].gpu_seconds == 2 and found["step > backward"].idle_seconds == 1


def test_a_graph_that_nsys_traced_whole_is_one_piece_of_work(tmp_path):
    path = nsys_file(tmp_path / "a.sqlite", CUPTI_ACTIVITY_KIND_GRAPH_TRACE=[(6 * S, 8 * S, 7, PID, 1)])
    found = {row.name: row for row in rows(read_nsys(path))}
    assert found["step > decode"].top == [("CUDA graph", 1)] and found["step > decode"].gpu_seconds == 2


def test_a_file_of_nsys_without_steps_is_refused(tmp_path):
    with sqlite3.connect(tmp_path / "a.sqlite") as db:
        db.execute("CREATE TABLE StringIds (id, value)")  # tables of what did not happen are not there
    with pytest.raises(ValueError, match="holds no range called step"):
        read_nsys(tmp_path / "a.sqlite")
    with pytest.raises(ValueError, match="there is no"):
        read_nsys(tmp_path / "b.sqlite")
