"""bench/RESULTS.md: every table that the records give, each under the machine that it was measured on."""

from boxgrpo.bench.bench_data import WANTED
from boxgrpo.bench.kernel_bench.kernels_table import table as kernels_table
from boxgrpo.bench.profiles.profile_step import shown
from boxgrpo.bench.step_bench.step_table import growth_table, phases_table, steps_table
from boxgrpo.bench.studies.ablation_tables import summary as ablation_summary
from boxgrpo.bench.studies.demo_seeds import table as demo_table

from .demands import verdict_table, verdicts
from .plots import PLOTS
from .result_files import Records, described, part

HEAD = """# Results

Made by `python -P -m boxgrpo.bench.publish.report` from the records in [results/](results); what these measure, and
how, stands at the head of each command. Of each part a device's newest dated file counts that has it. In them are all
samples; times here are medians, where a table says nothing else. A kernel's floor goes by a copy, which on a CPU
also reads what it overwrites: what only reads can pass 100 %."""


def page(found: Records) -> str:
    sections = [HEAD, *(_device(name, record) for name, record in found.devices.items())]
    if "cpu" not in found.devices:
        sections.append("## CPU\n\nNothing has been recorded: `make bench` does.")
    if not found.devices.keys() - {"cpu"}:
        sections.append("## GPU\n\nNothing has been recorded on a GPU yet: `make bench-gpu` does.")
    sections += [_long(name, record) for name, record in found.long.items()]
    return "\n\n".join(sections) + "\n"


def _device(folder: str, record: dict) -> str:
    parts = [f"## {record['machine']['device']}"]
    for name, told in PARTS.items():
        if name in record:
            measured = part(record, name)
            table = [told(measured)] if measured.get("rows") else []
            parts += [f"### {TITLES[name]}", _machine(measured), *table, *_left_out(measured)]
            parts += _plots(folder, record, name)
    wanted = "### What is wanted, and what was measured: `bench/publish/demands.py`"
    parts += [wanted, *_machines(record), verdict_table(verdicts(record)), *_tests(record)]
    return "\n\n".join([*parts, *_plots(folder, record, "")])


def _left_out(measured: dict) -> list[str]:
    """Peers that are not installed, and what failed."""
    lines = [f"- {peer} is left out: {why}" for peer, why in measured.get("skipped", {}).items()]
    lines += [f"- {e['case']}, {e.get('implementation', 'all')}: {e['error']}" for e in measured.get("errors", ())]
    for r in measured.get("rows", ()):
        lines += [f"- {r['case']}, {key[:-6]}: {why}" for key, why in r.items() if key.endswith("_error")]
    return ["\n".join(lines)] * bool(lines)


def _tests(record: dict) -> list[str]:
    """What became of the tests marked gpu, and of the parts of a run against the clock."""
    if "tests" not in record:
        return []
    counts = ", ".join(f"{n} {outcome.lower()}" for outcome, n in record["tests"]["counts"].items())
    failed = "".join(f"\n- {name}" for name in record["tests"]["failed"])
    outcomes = [[name, p["outcome"], f"{p['seconds']:.0f}"] for name, p in record.get("parts", {}).items()]
    return [f"Tests marked gpu: {counts}.{failed}", _table(["part", "outcome", "s"], outcomes)]


def _plots(folder: str, record: dict, name: str) -> list[str]:
    """Links to a part's plots; to those of several parts by an empty name."""
    drawn = {file: plot for file, plot in PLOTS.items() if plot.part == name and plot.data(record) is not None}
    return [f"![{plot.title}](results/{folder}/{file})" for file, plot in drawn.items()]


def _machine(measured: dict) -> str:
    on = measured["machine"] | {key: measured[key] for key in ("threads",) if key in measured}
    told = described(on, peers=True)
    if "load_before" in measured:
        told += f"; load before {measured['load_before']}"
    if "took_s" in measured:
        told += f"; took {measured['took_s']} s"
    if "ceilings" in measured:
        limits = measured["ceilings"]
        told += (
            f"; {limits['flop_per_second'] / 1e12:.3g} TFLOP/s and {limits['bytes_per_second'] / 1e9:.3g} GB/s measured"
        )
        if "sum_bytes_per_second" in limits:
            told += f", {limits['sum_bytes_per_second'] / 1e9:.3g} GB/s by a sum in place"
    return f"*{told}*"


def _machines(record: dict) -> list[str]:
    """The machine of each part that figures are wanted of, once where it is the same."""
    measured = [part(record, name)["machine"] for name in ("kernels", "rewards", "step") if name in record]
    told = dict.fromkeys(described(machine, peers=True) for machine in measured or [record["machine"]])
    return ["; ".join(f"*{machine}*" for machine in told)]


def _step(measured: dict) -> str:
    told = [steps_table(measured)]
    if "cuda" in measured["machine"]:
        told.append(BY_PHASE)
    told += [f"{r['case']}:\n\n{phases_table(r)}" for r in measured["rows"] if "phases" in r]
    if "growth" in measured:
        told.append(f"How our step grows, the other sizes as in the first row:\n\n{growth_table(measured['growth'])}")
    return "\n\n".join(told)


def _rewards(measured: dict) -> str:
    rows = []
    for r in measured["rows"]:
        size = f"{r['completions']} x {r['tokens']} tokens" if "tokens" in r else f"{r['bytes'] / 1e6:.1f} MB"
        first, rate = (f"{r[key]:.{digits}f}" if key in r else "" for key, digits in RATES)
        rows.append([r["run"], size, f"{r['ms']:.4g}", first, rate, str(r["rounds"])])
    return _table(["run", "of", "ms", "ms, first of a turn", "GB/s", "rounds"], rows)


def _profile(measured: dict) -> str:
    return f"{measured['case']}, by {measured['tool']}; mean of {measured['steps']} steps.\n\n{shown(measured)}"


BY_PHASE = """Phases overlap on a GPU. Their times are of a second run in which each waits for the device, and add up
to more than the step of the first table, which nobody watched and which their last line repeats."""
RATES = (("first_ms", 3), ("gb_per_second", 2))


def _guard(measured: dict) -> str:
    rows = [[r["case"], f"{r['ratio']:.3f}", f"{r['spread'][0]:.3f}–{r['spread'][1]:.3f}"] for r in measured["rows"]]
    return _table(["case", "our processor seconds over eager's", "from–to"], rows)


PARTS = {"kernels": kernels_table, "rewards": _rewards, "step": _step, "profile": _profile, "guard": _guard}
TITLES = {
    "kernels": "Kernels: `bench/kernel_bench/kernels_table.py`",
    "rewards": "Rewards: `bench/reward_bench/rewards_table.py`",
    "step": "A step: `bench/step_bench/step_table.py`",
    "profile": "A step by its ranges: `bench/profiles/profile_step.py`",
    "guard": "What CI holds the kernels to: `bench/kernel_bench/guard.py`",
}


def _long(name: str, record: dict) -> str:
    title, told = LONG[name]
    return "\n\n".join([f"## {title}", _machine(record), told(record)])


def _data(record: dict) -> str:
    rows = [[key, f"{record[key]:.2f}", f"{most:g}"] for key, most in WANTED.items()]
    size = f"{record['options']['records']:,} records, {record['megabytes']} MB:"
    return f"{size}\n\n{_table(['', 'found', 'at most'], rows)}"


def _soak(record: dict) -> str:
    rows = [
        [name, d["demand"], d["found"], "met" if d["met"] else "NOT MET"]
        for name, found in record["parts"].items()
        for d in found["demands"]
    ]
    return _table(["part", "demand", "found", ""], rows)


def _fuzz(record: dict) -> str:
    rows = [[r["run"], f"{r['cases']:,}", str(r["seconds"])] for r in record["rows"]]
    return _table(["compiled parser against Python's re", "cases, no difference", "s"], rows)


def _ablation(record: dict) -> str:
    return ablation_summary(record["runs"])


LONG = {
    "demo": ("The demo on three seeds: `make seeds`", demo_table),
    "data": ("A file of MGrounding-630k's size: `bench/bench_data.py`", _data),
    "soak": ("Runs that are killed: `make soak`", _soak),
    "soak_zero2": ("The same with ZeRO-2", _soak),
    "fuzz": ("The box parser: `make fuzz`", _fuzz),
    "ablation": ("The paper's methods on the drawn world: `make ablation`", _ablation),
}


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
