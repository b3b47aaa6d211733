"""From a profile's events to the table: nesting, launches, idle time, graphs; and the reader of Chrome traces."""

import json

import pytest

from boxgrpo.trainer.profiling.chrome_trace import read_chrome_trace
from boxgrpo.trainer.profiling.timeline import Range, Timeline, Work, rows, table

# Two steps of 10 s. The GPU runs a forward's kernels late, in the backward's and the optimizer's time.
RANGES = [
    *(Range("step 2", 0, 10), Range("forward 100", 1, 4), Range("head+loss 7x9", 2, 3), Range("backward 100", 4, 9)),
    *(Range("step 3", 10, 20), Range("forward 120", 11, 14), Range("backward 120", 14, 19)),
    Range("save", 20, 30),  # of no step
]
WORK = [
    Work("layers", 1.5, 2, 3, 1),
    Work("gemm", 2.5, 5, 7, 2),
    Work("wgrad", 4.5, 7, 8, 1),
    Work("copy", 15, 15, 16, 1),
]
BY_NAME = ("step", "step > forward", "step > forward > head+loss", "step > backward")


@pytest.fixture(scope="module")
def found():
    return {row.name: row for row in rows(Timeline(RANGES, WORK, on_gpu=True))}


def test_ranges_nest_and_all_sizes_of_one_are_one_row(found):
    assert tuple(found) == BY_NAME
    assert [found[name].depth for name in BY_NAME] == [0, 1, 2, 1]
    assert [found[name].seconds for name in BY_NAME] == [10, 3, 0.5, 5]  # of a step
    on_cpu = rows(Timeline(RANGES, WORK, on_gpu=False))
    assert [row.samples for row in on_cpu] == [[10, 10], [3, 3], [1, 0], [5, 5]]
    assert all(row.gpu_seconds is None and not row.gpu_samples for row in on_cpu)
    assert found["step > forward"].titles == ["forward 100", "forward 120"]


def test_work_belongs_to_the_range_that_launched_it(found):
    """Whenever the GPU ran it; and to all ranges around that one."""
    assert [found[name].launches for name in BY_NAME] == [2, 1, 0.5, 1]
    assert found["step > forward"].top == [("gemm", 2 / 3), ("layers", 1 / 3)]
    assert found["step > backward"].top == [("wgrad", 0.5), ("copy", 0.5)]
    assert found["step > forward"].gpu_seconds == (7 - 2) / 2  # its first kernel's begin to its last one's end
    assert found["step > forward"].gpu_samples == [7 - 2, 0] and found["step > forward"].samples == [3, 3]


def test_idle_is_when_the_gpu_ran_nothing_at_all(found):
    assert found["step > forward"].idle_seconds == (2 + 3) / 2
    assert found["step > backward"].idle_seconds == (2 + 4) / 2
    assert found["step"].idle_seconds == (6 + 9) / 2


def test_a_profile_without_steps_is_refused():
    with pytest.raises(ValueError, match="no range called step"):
        rows(Timeline([Range("save", 0, 1)], [], on_gpu=False))


def test_the_table_shows_work_and_floors(found):
    floors = {"step > backward": {"gbytes": 0.5, "floor_s": 1.0}}
    lines = table(list(found.values()), floors).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")][4:9] == [
        *("kernels and copies", "GPU ms", "GPU idle, ms", "MB at least", "% of floor")
    ]
    # Its share is of the step's 3500 ms on the GPU.
    assert lines[3] == "| &emsp;forward, 2 sizes | 3000.0 | 71% | 1 | 2500.0 | 2500.0 |  |  | gemm 67%, layers 33% |"
    assert "| 500 | 100 |" in lines[5]  # a second of work in (1 + 1) / 2
    on_cpu = table(rows(Timeline(RANGES, WORK, on_gpu=False))).splitlines()
    assert "operator calls | GPU idle |" in on_cpu[0] and "| n/a |" in on_cpu[2]


def event(category, name, start, seconds, thread=1, **args):
    timed = {"ph": "X", "cat": category, "name": name, "ts": 1e6 * start, "dur": 1e6 * seconds}
    return timed | {"pid": 1, "tid": thread, "args": args}


def written(path, events):
    path.write_text(json.dumps({"traceEvents": events}))
    return path


def test_kernels_of_a_chrome_trace_belong_to_the_launch_with_their_correlation_number(tmp_path):
    """A kernel that the backward's own thread launched, two of one graph launch, one launched before the profile."""
    events = [
        *(event("user_annotation", "step 1", 0, 10), event("user_annotation", "decode 8x64", 1, 3)),
        *(event("user_annotation", "backward 9", 5, 4), event("user_annotation", "Optimizer.step#AdamW", 9, 1)),
        *(event("cuda_runtime", "cudaGraphLaunch", 2, 0.1, correlation=7),),
        *(event("kernel", "attention", 6, 1, correlation=7), event("kernel", "gemm", 7, 1, correlation=7)),
        *(event("cuda_driver", "cuLaunchKernel", 6, 0.1, thread=2, correlation=8),),
        *(event("kernel", "wgrad", 8, 1, correlation=8), event("gpu_memcpy", "Memcpy", 0, 1, correlation=1)),
    ]
    timeline = read_chrome_trace(written(tmp_path / "a.json", events))
    found = {row.name: row for row in rows(timeline)}
    assert timeline.on_gpu and found.keys() == {"step", "step > decode", "step > backward"}
    assert dict(found["step > decode"].top) == {"attention": 0.5, "gemm": 0.5}
    assert dict(found["step > backward"].top) == {"wgrad": 1} and found["step"].launches == 3


def test_an_operators_time_excludes_the_operators_it_calls(tmp_path):
    events = [
        *(event("user_annotation", "step 1", 0, 10), event("cpu_op", "linear", 1, 4), event("cpu_op", "mm", 2, 3)),
        event("cpu_op", "mm", 6, 1),
    ]
    (row,) = rows(read_chrome_trace(written(tmp_path / "a.json", events)))
    assert row.launches == 3 and row.top == [("mm", 0.8), ("linear", 0.2)] and row.gpu_seconds is None
