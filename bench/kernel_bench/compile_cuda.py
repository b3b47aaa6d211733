"""The registers and memory that each CUDA kernel of csrc/ needs, by nvcc; without a GPU or a CUDA build of torch.

python bench/kernel_bench/compile_cuda.py
"""

import shutil
import sys

from boxgrpo.kernels.resources import CUDA_CAPABILITIES, SOURCE, compile_cuda


def main() -> None:
    if shutil.which("nvcc") is None:
        print("compile_cuda: skipped, no nvcc here")
        return
    spilled = 0
    for capability in CUDA_CAPABILITIES:
        for name, (registers, spill, shared) in compile_cuda(SOURCE, capability).items():
            spilled += spill
            print(f"sm_{capability} {name}: {registers} registers, {shared} bytes shared, {spill} bytes spilled")
    sys.exit(f"{spilled} bytes are spilled." if spilled else 0)


if __name__ == "__main__":
    main()
