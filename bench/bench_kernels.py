"""The earlier name of bench/kernel_bench/kernels_table.py as a command."""

import runpy

if __name__ == "__main__":
    runpy.run_module("boxgrpo.bench.kernel_bench.kernels_table", run_name="__main__", alter_sys=True)
