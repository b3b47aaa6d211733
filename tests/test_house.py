"""The rules of the house: who imports whom, which names are free, how the commands start, what an import does."""

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
COMMANDS = ("grpo", "sft", "evaluator", "demo", "memory", "ground", "make_cot", "accept_cot", "inspect_data")

# What a package must not import. csrc <- kernels <- model <- trainer; nobody looks at bench and tests.
FORBIDDEN = {
    "kernels": {"boxgrpo.model", "boxgrpo.trainer", "boxgrpo.bench", "transformers", "tokenizers", "datasets", "PIL"},
    "model": {"boxgrpo.trainer", "boxgrpo.bench"},
    "trainer": {"boxgrpo.bench"},
    "bench": set(),
}
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


def within(name, packages):
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("path", FILES, ids=names(FILES))
def test_imports(path):
    """One direction; absolute across packages and in scripts; never by a folder's bare name."""
    package = path.relative_to(ROOT).parts[0]
    own = {file.stem for file in path.parent.glob("*.py")} - {"__init__"}
    siblings = own if path.parent in SCRIPT_FOLDERS else own - DEPENDENCIES
    # As scripts they have no package; as modules they would be there twice.
    script = any(line.startswith("if __name__ ==") for line in path.read_text().splitlines())
    for name, relative in imports(path):
        assert not within(name, FORBIDDEN[package] | {"tests"}), f"{package}/ must not import {name}"
        assert relative or not within(name, {*PACKAGES, *siblings}), f"{name} is found by its bare name: write boxgrpo."
        assert not (relative and script), f"a script imports absolutely: {name}"
        room = ".".join(["boxgrpo", *path.relative_to(ROOT).parent.parts])
        assert not relative or within(name, {room}), f"absolute across rooms: {name}"


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

# What `python -P -m boxgrpo.trainer.NAME --help` does, for each name on the command line, in one process.
MODULE_PROBE = """
import runpy, sys

for name in sys.argv[1:]:
    sys.argv = [name, "--help"]
    try:
        runpy.run_module(f"boxgrpo.trainer.{name}", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert not end.code, f"{name} --help ended with {end.code}"
"""


@pytest.fixture(scope="module")
def run_command(tmp_path_factory):
    """run_command(name): the finished process. All are started together, two at a time, beside a fake `kernels`.

    The fake is the Hugging Face distribution as transformers meets it: the version it asks for, and whatever names it
    imports. Each process tells on leaving which `kernels` its path leads to.
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
        "import atexit\n\n@atexit.register\ndef tell():\n    import kernels\n    print('kernels:', kernels.__file__)\n"
    )
    python, torchrun = sys.executable, str(pathlib.Path(sys.executable).parent / "torchrun")
    commands = {f"python trainer/{name}.py": [python, f"trainer/{name}.py", "--help"] for name in COMMANDS}
    commands["bench"] = [python, "bench/studies/demo_seeds.py", "--help"]
    commands["import"] = [python, "-P", "-c", IMPORT_PROBE]
    commands["python -P -m"] = [python, "-P", "-c", MODULE_PROBE, *COMMANDS]
    # --standalone: the default rendezvous port is one for the whole machine.
    commands["torchrun"] = [torchrun, "--standalone", "trainer/grpo.py", "--help"]
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


@pytest.mark.parametrize("name", COMMANDS)
def test_script_starts(run_command, name):
    assert "usage:" in run_command(f"python trainer/{name}.py")


@pytest.mark.parametrize("form", ["python -P -m", "torchrun", "bench"])
def test_other_forms_start(run_command, form):
    assert run_command(form).count("usage:") == (len(COMMANDS) if form == "python -P -m" else 1)
