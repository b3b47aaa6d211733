"""What nsys exports to SQLite, as a `Timeline`.

The tables and columns are those of the export's schema reference in NVIDIA's Nsight Systems documentation; tables of
what did not happen are not there. A thread's id has its process's in the bits from 24 on.
"""

import sqlite3
from pathlib import Path

from boxgrpo.trainer.profiling.timeline import STEP, Range, Timeline, Work

PUSH_POP = 59  # NVTX_EVENTS.eventType
PROCESS = 24  # bits of a thread's id below its process's
ON_GPU = {  # table: column or text that names the work
    "CUPTI_ACTIVITY_KIND_KERNEL": "demangledName",
    "CUPTI_ACTIVITY_KIND_MEMCPY": "'memory copy'",
    "CUPTI_ACTIVITY_KIND_MEMSET": "'memory set'",
    "CUPTI_ACTIVITY_KIND_GRAPH_TRACE": "'CUDA graph'",  # where nsys does not trace a graph's nodes
}


def read_nsys(path: str | Path) -> Timeline:
    """Ranges are those of the NVTX domain that has the steps: ours, or torch.cuda.nvtx's.

    Work is what the GPU ran for them, launched when the CUDA call of its number was; kernels of a replayed CUDA graph
    have the number of the graph's launch. Of several ranks the first is read.

    Raises:
        ValueError: no step is in it.
    """
    if not Path(path).is_file():
        raise ValueError(f"there is no {path}. Export one with nsys export --type sqlite.")
    with sqlite3.connect(f"{Path(path).absolute().as_uri()}?mode=ro", uri=True) as database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        strings = dict(database.execute("SELECT id, value FROM StringIds")) if "StringIds" in tables else {}
        ranges, process = _ranges(database, strings) if "NVTX_EVENTS" in tables else ([], None)
        if process is None:
            raise ValueError(f"{path} holds no range called {STEP}. Record steps: nsys profile -t cuda,nvtx.")
        launched = {}
        if "CUPTI_ACTIVITY_KIND_RUNTIME" in tables:
            query = "SELECT correlationId, start FROM CUPTI_ACTIVITY_KIND_RUNTIME WHERE globalTid >> ? = ?"
            launched = dict(database.execute(query, (PROCESS, process)))
        work = []
        for table in sorted(tables & ON_GPU.keys()):
            query = f"SELECT {ON_GPU[table]}, correlationId, start, end FROM {table} WHERE globalPid >> ? = ?"
            for name, number, start, end in database.execute(query, (PROCESS, process)):
                if number in launched:  # else launched before the recording began
                    times = (launched[number] / 1e9, start / 1e9, end / 1e9, (end - start) / 1e9)
                    work.append(Work(strings.get(name, str(name)), *times))
    return Timeline(ranges, work, on_gpu=True)


def _ranges(database: sqlite3.Connection, strings: dict[int, str]) -> tuple[list[Range], int | None]:
    """The ranges of the first thread that has steps, in their domain; its process."""
    query = "SELECT start, end, text, textId, globalTid, domainId FROM NVTX_EVENTS WHERE eventType = ?"
    found = [
        (thread, domain, Range(text if text is not None else strings.get(text_id, ""), start / 1e9, end / 1e9))
        for start, end, text, text_id, thread, domain in database.execute(query, (PUSH_POP,))
        if end is not None
    ]
    loops = [(thread, domain) for thread, domain, r in found if r.title.split(" ")[0] == STEP]
    if not loops:
        return [], None
    loop = min(loops)
    return [r for thread, domain, r in found if (thread, domain) == loop], loop[0] >> PROCESS
