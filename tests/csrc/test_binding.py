"""The CUDA half of the binding compiles with the headers of a CUDA build of torch, which this machine need not run."""

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest
import torch

from boxgrpo.kernels.resources import SOURCE

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")]
OTHER_WHEELS = ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT")  # they may lead to a CPU's build


@pytest.fixture(scope="module")
def cuda_torch(tmp_path_factory):
    """A folder with torch/include of a CUDA build of this version: a wheel of half a GB, if the index has it."""
    if torch.version.cuda:
        return pathlib.Path(torch.__file__).parents[1]
    folder = tmp_path_factory.mktemp("wheel")
    version = torch.__version__.partition("+")[0]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-cache-dir", f"torch=={version}"]
    environment = {key: value for key, value in os.environ.items() if key not in OTHER_WHEELS}
    environment["PIP_CONFIG_FILE"] = os.devnull
    give_up = pytest.fail if "CI" in os.environ else pytest.skip
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500, check=False
        )
    except subprocess.TimeoutExpired:
        give_up(f"torch {version} did not arrive within 500 s")
    if done.returncode:
        give_up(f"pip has no torch {version}: {done.stderr.strip().splitlines()[-1]}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        if "cuda: Optional[str] = None" in archive.read("torch/version.py").decode():
            give_up(f"{wheel.name} is no CUDA build")
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith("torch/include/")])
    wheel.unlink()
    return folder


@pytest.mark.parametrize("source", ["binding.cpp", "box_parser.cpp"])
def test_the_cuda_half_compiles_with_the_headers_of_a_cuda_torch(cuda_torch, source):
    include = (cuda_torch / "torch/include", cuda_torch / "torch/include/torch/csrc/api/include")
    flags = [f"-I{path}" for path in (*include, sysconfig.get_path("include"))]
    command = ["g++", "-std=c++20", "-DBOXGRPO_CUDA", "-fsyntax-only", *flags, str(SOURCE.with_name(source))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
