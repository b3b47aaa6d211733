"""The rules of the house: layers without cycles, budgets of lines, free names, commands that start, silent imports."""

import ast
import os
import pathlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ("kernels", "model", "trainer", "bench")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]

# A module imports its own room or those of lower layers; lazy imports count. Rooms of one layer are apart.
LAYERS = (
    ("csrc",),
    ("kernels",),
    ("model",),
    ("trainer/runtime",),
    ("trainer/effects.py",),
    ("trainer/arguments.py",),
    ("trainer/presence.py",),
    ("trainer/options.py",),
    ("trainer/profiling",),
    ("trainer/data",),
    ("trainer/rewards",),
    ("trainer/engine",),
    ("trainer/rollout",),
    ("trainer/step",),
    ("trainer/evaluation",),
    ("trainer/world",),  # below the loops: grpo.py without a model trains on it
    ("trainer/run.py",),
    ("trainer/sft.py",),
    ("trainer/grpo.py",),
    ("trainer/chains", "trainer/apps"),
    ("trainer/evaluator.py", "trainer/base.py", "trainer/demo.py", "trainer/cli.py"),
    ("bench",),
)
# Lines of a room (.py .cpp .h .cu .js .css .html .yaml .sh), raised only by what a feature needs; the commit says so.
BUDGET = {
    "csrc": 862,
    "kernels": 5139,
    "model": 2221,
    "trainer": 12_494,
    "bench": 5755,
    "tests": 20_899,
    "trainer/apps": 1208,
    "trainer/chains": 824,
    "trainer/data": 2407,
    "trainer/engine": 645,
    "trainer/evaluation": 2026,
    "trainer/profiling": 355,
    "trainer/recipes": 167,
    "trainer/rewards": 67,
    "trainer/rollout": 554,
    "trainer/runtime": 1136,
    "trainer/step": 355,
    "trainer/world": 1006,
}
PRODUCT = 26_500  # lines of the first five
COUNTED = {".py", ".cpp", ".h", ".cu", ".js", ".css", ".html", ".yaml", ".sh"}
FILE_LINES, FUNCTION_LINES = 350, 60
# Packages that `boxgrpo.kernels` must not load.
FORBIDDEN = {"transformers", "tokenizers", "datasets", "PIL"}
COMMANDS = ("grpo", "sft", "evaluator", "demo", "memory", "ground", "make_cot", "accept_cot", "inspect_data")
# Top-level names that a script's own folder, first on its path, would take away from a dependency.
DEPENDENCIES = set(
    "torch triton transformers tokenizers safetensors huggingface_hub accelerate datasets evaluate kernels peft "
    "deepspeed trl liger_kernel flash_attn verl vllm numpy PIL yaml tqdm rich matplotlib tensorboard nvtx regex "
    "requests packaging filelock sympy networkx psutil google absl markdown werkzeug "
    "flask jinja2 waitress playwright pytest openai anyio httpx pydantic".split()
)
# A script's folder stands first on sys.path, before the standard library and what it imports.
SCRIPT_FOLDERS = sorted({path.parent for path in FILES if "\nif __name__ ==" in path.read_text()})


def names(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


def module_name(path):
    return ".".join(["boxgrpo", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")


MODULES = {module_name(path): path for path in FILES}


def imports(path):
    """Every dotted name that a file imports, made absolute, and whether it was written relative."""
    package = ["boxgrpo", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((f"{module}.{alias.name}", node.level > 0) for alias in node.names)


def imported_modules(path):
    """Those of ours that a file imports."""
    for name, _ in imports(path):
        found = name if name in MODULES else name.rpartition(".")[0]
        if found in MODULES and MODULES[found] != path:
            yield found


def layer_of(path):
    """Number of the layer and the room in it; an earlier name of a command has none."""
    place = str(path.relative_to(ROOT))
    found = [
        (i, room) for i, rooms in enumerate(LAYERS) for room in rooms if place == room or place.startswith(f"{room}/")
    ]
    return found[-1] if found else None


def within(name, packages):
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("path", FILES, ids=names(FILES))
def test_imports(path):
    """Downwards; relative within a room, absolute across rooms and in scripts; never by a folder's bare name."""
    own = {file.stem for file in path.parent.glob("*.py")} - {"__init__"}
    siblings = own if path.parent in SCRIPT_FOLDERS else own - DEPENDENCIES
    script = (
        "\nif __name__ ==" in path.read_text()
    )  # as a script it has no package; as a module it would be there twice
    room = ".".join(["boxgrpo", *path.relative_to(ROOT).parent.parts])
    for name, relative in imports(path):
        assert not within(name, {"tests"})
        assert relative or not within(name, {*PACKAGES, *siblings}), f"{name} is found by its bare name: write boxgrpo."
        assert not (relative and script), f"a script imports absolutely: {name}"
        assert not relative or within(name, {room}), f"absolute across rooms: {name}"
    mine = layer_of(path)
    if mine is None:
        text = path.read_text()
        assert not text or ("runpy" in text and len(text.splitlines()) <= 5), "neither in a layer nor an earlier name"
        return
    for name in imported_modules(path):
        theirs = layer_of(MODULES[name])
        assert theirs is not None and (theirs[0] < mine[0] or theirs == mine), f"{name} is in a higher layer"
    if mine[1] == "kernels":
        assert not any(within(name, FORBIDDEN) for name, _ in imports(path))


def test_no_modules_import_each_other_in_a_circle():
    """But for kernels/x_triton.py, which x.py loads by name when the op first runs on Triton."""
    done, open_ = set(), []

    def visit(name):
        assert name not in open_, " -> ".join([*open_[open_.index(name) :], name])
        if name in done:
            return
        open_.append(name)
        for other in imported_modules(MODULES[name]):
            visit(other)
        done.add(open_.pop())

    for name in MODULES:
        visit(name)


def count_lines(room):
    return sum(len(p.read_text().splitlines()) for p in (ROOT / room).rglob("*") if p.suffix in COUNTED)


def test_the_product_keeps_its_budget():
    assert sum(map(count_lines, ("csrc", *PACKAGES))) <= PRODUCT


@pytest.mark.parametrize("room", BUDGET)
def test_a_room_keeps_its_budget(room):
    assert (lines := count_lines(room)) <= BUDGET[room], f"{room} has {lines} lines"
    if room == "trainer":
        rooms = {p.parent.name for p in (ROOT / room).glob("*/*") if p.suffix in COUNTED}
        assert {f"{room}/{name}" for name in rooms} == {r for r in BUDGET if r.startswith("trainer/")}


# Triton kernels over the limit, a third of which are their parameters: a kernel is one function on the device.
LONG_KERNELS = {"fused_kernel", "sample_kernel", "grpo_kernel"}


def test_files_and_functions_are_short():
    for path in (p for room in ("csrc", *PACKAGES) for p in (ROOT / room).rglob("*") if p.suffix in COUNTED):
        text = path.read_text()
        assert len(text.splitlines()) <= FILE_LINES, path
        for node in ast.walk(ast.parse(text)) if path.suffix == ".py" else ():
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name not in LONG_KERNELS:
                assert node.end_lineno - node.lineno < FUNCTION_LINES, f"{path}: {node.name}"


@pytest.mark.parametrize("folder", SCRIPT_FOLDERS, ids=names(SCRIPT_FOLDERS))
def test_module_names_are_free(folder):
    stems = {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()} - {"__init__"}
    assert not stems & (sys.stdlib_module_names | DEPENDENCIES)


# Runs with the fake `kernels` in reach: prints nothing and returns 0, or fails with the rule that was broken.
IMPORT_PROBE = """
import contextlib, importlib, io, os, pkgutil, random, signal, sys

import boxgrpo.kernels
heavy = {"transformers", "tokenizers", "datasets", "PIL", "matplotlib", "boxgrpo.model", "boxgrpo.trainer"}
assert not heavy & set(sys.modules), f"boxgrpo.kernels imports {heavy & set(sys.modules)}"

import numpy, rich.table, torch  # rich draws from `random` as it is imported
from transformers import Qwen2VLForConditionalGeneration  # with a shadowed `kernels` this fails

def state():
    return {
        "dtype": torch.get_default_dtype(), "device": torch.get_default_device(), "threads": torch.get_num_threads(),
        "matmul precision": torch.get_float32_matmul_precision(), "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(), "torch seed": torch.get_rng_state().tolist(),
        "random seed": random.getstate(), "numpy seed": numpy.random.get_state()[1].tolist(),
        "environment": dict(os.environ), "path": list(sys.path), "folder": os.getcwd(),
        "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],
    }

before, printed = state(), io.StringIO()
with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
    for name in ("kernels", "model", "trainer", "bench"):
        package = importlib.import_module(f"boxgrpo.{name}")
        for module in pkgutil.walk_packages(package.__path__, f"boxgrpo.{name}."):
            importlib.import_module(module.name)
after = state()
assert not (changed := [key for key in before if before[key] != after[key]]), f"an import changed: {changed}"
assert not printed.getvalue(), f"an import prints: {printed.getvalue()}"
"""

# What `python -P -m boxgrpo.trainer.NAME --help` and `boxgrpo NAME --help` do, for each name, in one process.
MODULE_PROBE = """
import runpy, sys
from boxgrpo.trainer import cli

def starts(words, run):
    sys.argv = words
    try:
        run()
    except SystemExit as end:
        assert not end.code, f"{words} ended with {end.code}"

for name in sys.argv[1:]:
    module = f"boxgrpo.trainer.{name}"
    starts([name, "--help"], lambda: runpy.run_module(module, run_name="__main__", alter_sys=True))
for name in cli.COMMANDS:
    starts(["boxgrpo", name, "--help"], cli.main)
starts(["boxgrpo"], cli.main)
"""


@pytest.fixture(scope="module")
def run_command(tmp_path_factory):
    """run_command(name): the finished process. All are started together, two at a time, beside a fake `kernels`.

    The fake is the Hugging Face distribution as transformers meets it: the version it asks for, and whatever names it
    imports. Each process prints on leaving which `kernels` its path leads to.
    """
    folder = tmp_path_factory.mktemp("site")
    (folder / "kernels").mkdir()
    (folder / "kernels/__init__.py").write_text(
        "class Anything:\n    def __init__(self, *args, **kwargs): pass\n    def __call__(self, x): return x\n\n"
        "def __getattr__(name):\n"
        "    if name.startswith('__'): raise AttributeError(name)\n"
        "    return (lambda *args, **kwargs: lambda x: x) if name.startswith('use_') else Anything\n"
    )
    (folder / "kernels-0.18.2.dist-info").mkdir()
    (folder / "kernels-0.18.2.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    (folder / "sitecustomize.py").write_text(
        "import atexit\n\n@atexit.register\ndef show():\n    import kernels\n    print('kernels:', kernels.__file__)\n"
    )
    python, torchrun = sys.executable, str(pathlib.Path(sys.executable).parent / "torchrun")
    commands = {
        "script": [python, "trainer/evaluator.py", "--help"],
        "benchmark": [python, "bench/bench_step.py", "--help"],
        "import": [python, "-P", "-c", IMPORT_PROBE],
        "modules": [python, "-P", "-c", MODULE_PROBE, *COMMANDS],
        # --standalone: the default rendezvous port is one for the whole machine.
        "torchrun": [torchrun, "--standalone", "trainer/grpo.py", "--help"],
    }
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    fake = f"kernels: {folder / 'kernels/__init__.py'}"
    with ThreadPoolExecutor(2) as pool:
        started = {
            name: pool.submit(subprocess.run, command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
            for name, command in commands.items()
        }

        def finished(name):
            process = started[name].result()
            assert process.returncode == 0, process.stdout + process.stderr
            assert fake in process.stdout, "another `kernels` shadows the Hugging Face distribution"
            return process.stdout

        yield finished


def test_an_import_does_nothing(run_command):
    """No print, no seed, no setting, no environment; and `boxgrpo.kernels` is light."""
    assert "usage:" not in run_command("import")


@pytest.mark.parametrize("form", ["script", "benchmark", "torchrun"])
def test_a_script_starts(run_command, form):
    assert run_command(form).count("usage:") == 1


def test_every_command_starts_under_each_of_its_names(run_command):
    from boxgrpo.trainer.cli import COMMANDS as NAMES

    assert run_command("modules").count("usage:") == len(COMMANDS) + len(NAMES) + 1
