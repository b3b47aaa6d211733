"""nsys's SQLite export: work belongs to the range of its launch, in one process and in the domain of its steps."""

import sqlite3

import pytest

from boxgrpo.bench.profiles.nsys_sqlite import read_nsys
from boxgrpo.trainer.profiling.timeline import rows

PID, OTHER = 5 << 24, 6 << 24
SCHEMA = """
CREATE TABLE StringIds (id INTEGER NOT NULL PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE NVTX_EVENTS (start INTEGER NOT NULL, end INTEGER, eventType INTEGER NOT NULL, rangeId INTEGER,
    category INTEGER, color INTEGER, text TEXT, globalTid INTEGER, endGlobalTid INTEGER, textId INTEGER,
    domainId INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INTEGER NOT NULL, end INTEGER NOT NULL, eventClass INTEGER NOT NULL,
    globalTid INTEGER, correlationId INTEGER, nameId INTEGER NOT NULL, returnValue INTEGER NOT NULL,
    callchainId INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL,
    contextId INTEGER NOT NULL, streamId INTEGER NOT NULL, correlationId INTEGER, globalPid INTEGER,
    demangledName INTEGER NOT NULL, shortName INTEGER NOT NULL, graphNodeId INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_MEMCPY (start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL,
    contextId INTEGER NOT NULL, streamId INTEGER NOT NULL, correlationId INTEGER, globalPid INTEGER,
    bytes INTEGER NOT NULL, copyKind INTEGER NOT NULL);
"""


def nsys_file(path, graph_rows=()):
    """Two processes; ours pushes registered strings, decodes with a graph, and its backward has a thread of its own."""
    s = 10**9
    with sqlite3.connect(path) as db:
        db.executescript(SCHEMA)
        db.executemany(
            "INSERT INTO StringIds VALUES (?, ?)", enumerate(["step 4", "decode 8x64", "attention", "gemm", "wgrad"])
        )
        ranges = [  # start, end, type, text, thread, string, domain
            *((0, None, 75, "boxgrpo", PID + 1, None, 3), (0, None, 75, "NCCL", PID + 1, None, 1)),
            *((0, 10 * s, 59, None, PID + 1, 0, 3), (1 * s, 4 * s, 59, None, PID + 1, 1, 3)),
            (5 * s, 9 * s, 59, "backward 9", PID + 1, None, 3),
            (5 * s, 6 * s, 59, "ncclAllReduce", PID + 1, None, 1),
            *((0, None, 75, "boxgrpo", OTHER + 1, None, 1), (0, 9 * s, 59, None, OTHER + 1, 0, 1)),
        ]
        db.executemany(
            "INSERT INTO NVTX_EVENTS (start, end, eventType, text, globalTid, textId, domainId) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            ranges,
        )
        calls = [(2 * s, 2 * s + 1, PID + 1, 7), (6 * s, 6 * s + 1, PID + 2, 8)]
        calls.append((7 * s, 7 * s + 1, OTHER + 1, 7))  # each process numbers its own
        db.executemany("INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES (?, ?, 0, ?, ?, 0, 0, NULL)", calls)
        kernels = [(8, 9, 8, PID, 4, None), (8, 9, 7, OTHER, 4, None), (9, 10, 99, PID, 4, None)]
        kernels += [] if graph_rows else [(6, 7, 7, PID, 2, 11), (7, 8, 7, PID, 3, 12)]
        db.executemany(
            "INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (? * 1000000000, ? * 1000000000, 0, 1, 7, ?, ?, ?, 0, ?)",
            kernels,
        )
        db.execute("INSERT INTO CUPTI_ACTIVITY_KIND_MEMCPY VALUES (?, ?, 0, 1, 7, 8, ?, 4096, 1)", (9 * s, 10 * s, PID))
        if graph_rows:
            db.execute(
                "CREATE TABLE CUPTI_ACTIVITY_KIND_GRAPH_TRACE (start INTEGER, end INTEGER, deviceId INTEGER, "
                "graphId INTEGER, graphExecId INTEGER, contextId INTEGER, streamId INTEGER, correlationId INTEGER, "
                "globalPid INTEGER)"
            )
            db.execute("INSERT INTO CUPTI_ACTIVITY_KIND_GRAPH_TRACE VALUES (?, ?, 0, 1, 2, 1, 7, 7, ?)", graph_rows)
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
    path = nsys_file(tmp_path / "a.sqlite", graph_rows=(6 * 10**9, 8 * 10**9, PID))
    found = {row.name: row for row in rows(read_nsys(path))}
    assert found["step > decode"].top == [("CUDA graph", 1)] and found["step > decode"].gpu_seconds == 2


def test_a_file_of_nsys_without_steps_is_refused(tmp_path):
    with sqlite3.connect(tmp_path / "a.sqlite") as db:
        db.execute("CREATE TABLE StringIds (id INTEGER, value TEXT)")  # tables of what did not happen are not there
    with pytest.raises(ValueError, match="holds no range called step"):
        read_nsys(tmp_path / "a.sqlite")
    with pytest.raises(ValueError, match="there is no"):
        read_nsys(tmp_path / "b.sqlite")
