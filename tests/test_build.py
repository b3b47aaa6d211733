"""What installing builds: a wheel with the compiled parser, one without it, and the CUDA half of the binding."""

import os
import pathlib
import runpy
import shutil
import subprocess
import sys
import sysconfig
import venv

import pytest
import setuptools
import torch
from torch.utils import cpp_extension

ROOT = pathlib.Path(__file__).resolve().parent.parent
slow = pytest.mark.slow
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")

USE = """
import boxgrpo.kernels, pathlib, sys, warnings
from boxgrpo.kernels import dispatch, grounding_rewards, pack_texts
import torch
assert pathlib.Path(boxgrpo.kernels.__file__).is_relative_to(sys.prefix), boxgrpo.kernels.__file__
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    text = pack_texts([b"<think>a</think><answer>(1, 2), (3, 4)</answer>"])
    assert grounding_rewards(*text, torch.tensor([[1.0, 2.0, 3.0, 4.0]])).accuracy == 1
print(dispatch.IMPORT_FAILURE is None, [str(w.message)[:51] for w in caught])
"""


def source_of(folder):
    """A copy of the files that git tracks, or that it does not ignore."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "source" / name)
    return folder / "source"


def built_wheel(folder, **environment):
    """What `pip wheel .` makes."""
    source = source_of(folder)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(folder), "."]
    subprocess.run(command, cwd=source, env=os.environ | environment, check=True)
    (wheel,) = folder.glob("boxgrpo-*.whl")
    return wheel


def installed(folder, wheel):
    """The Python of an empty venv that has the wheel, and on its path what the wheel depends on."""
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv/bin/python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True)
    site = subprocess.run(
        [python, "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True
    )
    # A path alone: the .pth files in it, an editable boxgrpo among them, are not followed.
    dependencies = pathlib.Path(torch.__file__).parents[1]
    pathlib.Path(site.stdout.strip(), "dependencies.pth").write_text(f"{dependencies}\n")
    return python


def used(folder, wheel):
    """What USE prints where the wheel is installed."""
    done = subprocess.run([installed(folder, wheel), "-c", USE], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@slow
@pytest.mark.parametrize("missing", [pytest.param("nothing", marks=needs_compiler), "compiler", "torch"])
def test_a_wheel_serves_in_an_empty_venv(tmp_path, missing):
    """The twin serves where the wheel was built without a compiler, or without torch as pip builds it by itself."""
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden/torch.py").write_text("raise ImportError('no torch here')\n")
    compiler = {"CXX": "/bin/false", "CC": "/bin/false", "PATH": "/nowhere"}
    environment = {"nothing": {}, "compiler": compiler, "torch": {"PYTHONPATH": str(tmp_path / "hidden")}}[missing]
    wheel = built_wheel(tmp_path, **environment)
    assert wheel.name.endswith("-py3-none-any.whl") == (missing == "torch")
    warned = "False ['boxgrpo runs without its compiled box parser (No mo']"
    assert used(tmp_path, wheel) == ("True []" if missing == "nothing" else warned)


@slow
@needs_compiler
def test_case_18_a_wheel_trains_from_its_own_clone(tmp_path, initial, record_file):
    """The working folder's `kernels`, `model` and `bench` stay off the path of every process, loaders too."""
    python = installed(tmp_path, built_wheel(tmp_path))
    run = [python, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "trainer/grpo.py"]
    flags = {"model": initial, "data": record_file, "output_dir": tmp_path / "run", "max_steps": 1}
    flags |= {"prompts_per_step": 2, "num_generations": 2, "max_completion_length": 4, "dataloader_num_workers": 2}
    flags |= {"min_pixels": 784, "max_pixels": 9408, "beta": 0.0}
    command = [*run, *(f"--{name}={value}" for name, value in flags.items())]
    done = subprocess.run(command, cwd=tmp_path / "source", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and (tmp_path / "run/model.safetensors").exists(), done.stderr


# setup.py with a candidate before its own that no compiler takes.
BEHIND_A_BROKEN_ONE = """
import runpy, setuptools, sys
setup = setuptools.setup

def with_a_broken_one(**options):
    names = options["cmdclass"]["build_ext"].run.__globals__
    candidates = names["candidates"]

    def more():
        broken = candidates()[0]
        broken.sources = ["broken.cpp"]
        return [broken, *candidates()]

    names["candidates"] = more
    setup(**options)

setuptools.setup = with_a_broken_one
open("broken.cpp", "w").write("#error no compiler takes this\\n")
runpy.run_path("setup.py", run_name="__main__")
"""


@slow
@needs_compiler
@pytest.mark.parametrize("options", [["--inplace"], ["--build-lib", "built"]], ids=["inplace", "elsewhere"])
def test_where_the_first_candidate_does_not_compile_the_next_one_is_built(tmp_path, options):
    source = source_of(tmp_path)
    command = [sys.executable, "-c", BEHIND_A_BROKEN_ONE, "build_ext", *options]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0 and "Could not compile broken.cpp" in done.stderr, done.stderr
    (module,) = (source if options == ["--inplace"] else source / "built/boxgrpo").glob("kernels/_C*.so")
    script = f"import torch; torch.ops.load_library({str(module)!r}); torch.ops.boxgrpo.box_iou"
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)


def nvcc_flags(monkeypatch, gpus, **environment):
    """What setup.py gives to nvcc under a CUDA build of torch."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", "/usr/local/cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    extension = runpy.run_path(str(ROOT / "setup.py"))["candidates"]()[0]
    assert "csrc/box_parser_cuda.cu" in extension.sources
    objects = {pathlib.Path(source).stem for source in extension.sources}
    assert len(objects) == len(extension.sources)  # ninja, where it is installed, refuses two of one name
    return extension.extra_compile_args["nvcc"]


def test_architectures_are_named_where_no_gpu_is_in_sight(monkeypatch):
    """torch looks for them on the GPUs it sees, and fails where there is none."""
    flags = nvcc_flags(monkeypatch, gpus=0)
    assert [f for f in flags if "arch" in f] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    assert cpp_extension._get_cuda_arch_flags(flags) == []
    assert not any("arch" in flag for flag in nvcc_flags(monkeypatch, gpus=1))
    assert not any("arch" in flag for flag in nvcc_flags(monkeypatch, gpus=0, TORCH_CUDA_ARCH_LIST="9.0"))


@slow
@pytest.mark.skipif(shutil.which("nvcc") is None or shutil.which("g++") is None, reason="no nvcc or no g++ here")
def test_the_cuda_binding_compiles_and_links(tmp_path):
    """What setup.py builds for a CUDA torch, by hand: the binding needs none of its headers."""
    objects = [tmp_path / f"{name}.o" for name in ("binding", "box_parser", "kernels")]
    include = [f"-I{path}" for path in (*cpp_extension.include_paths(), sysconfig.get_path("include"))]
    for source, output in zip(("binding.cpp", "box_parser.cpp"), objects, strict=False):
        flags = ["-std=c++20", "-O1", "-fPIC", "-DBOXGRPO_CUDA", *include]
        subprocess.run(["g++", *flags, "-c", str(ROOT / "csrc" / source), "-o", str(output)], check=True)
    cuda = ["nvcc", "-std=c++20", "-arch=sm_80", "-Xcompiler", "-fPIC", "-c", str(ROOT / "csrc/box_parser_cuda.cu")]
    subprocess.run([*cuda, "-o", str(objects[2])], check=True)
    library, torch_lib = tmp_path / "boxgrpo.so", f"-L{pathlib.Path(torch.__file__).parent / 'lib'}"
    link = ["nvcc", "-shared", *map(str, objects), "-o", str(library), torch_lib, "-lc10", "-ltorch", "-ltorch_cpu"]
    subprocess.run(link, check=True)
    script = (
        f"import torch; torch.ops.load_library({str(library)!r})\n"
        "for name in ('grounding_rewards', 'grounding_rewards_from_ids', 'box_iou'):\n"
        "    assert torch._C._dispatch_has_kernel_for_dispatch_key(f'boxgrpo::{name}', 'CUDA'), name\n"
        "box = torch.tensor([[0.0, 0, 2, 2]])\n"
        "print(torch.ops.boxgrpo.box_iou(box, box, False, False).item())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "1.0\n"), done.stderr
