"""What each CUDA kernel of csrc/ takes of a GPU, by nvcc: no GPU and no CUDA build of torch is needed.

python bench/kernel_bench/compile_cuda.py
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from boxgrpo.bench.kernel_bench.resources import Resources, read_cubin

SOURCE = Path(__file__).resolve().parents[2] / "csrc/box_parser_cuda.cu"
CAPABILITIES = (80, 90)
KERNELS = ("score_texts", "score_tokens", "overlap")


def compile_cuda(source: Path, capability: int) -> dict[str, Resources]:
    """Kernel -> resources, of `source` compiled for one compute capability.

    Raises:
        RuntimeError: nvcc refuses the source.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        command = ["nvcc", "-std=c++20", "-O3", "-fmad=false", f"-arch=sm_{capability}", "-I", str(SOURCE.parent)]
        done = subprocess.run([*command, "-cubin", str(source), "-o", cubin.name], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc does not compile {source} for sm_{capability}: {done.stderr}")
        found = read_cubin(cubin.name)
    return {next((k for k in KERNELS if k in name), name): taken for name, taken in found.items()}


def main() -> None:
    if shutil.which("nvcc") is None:
        print("compile_cuda: skipped, no nvcc here")
        return
    spilled = 0
    for capability in CAPABILITIES:
        for name, r in compile_cuda(SOURCE, capability).items():
            spilled += r.spilled
            words = f"{r.registers} registers, {r.shared} bytes shared, {r.spilled} bytes spilled"
            print(f"sm_{capability} {name}: {words}")
    sys.exit(f"{spilled} bytes are spilled." if spilled else 0)


if __name__ == "__main__":
    main()
