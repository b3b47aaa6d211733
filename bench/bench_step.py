"""The earlier name of bench/step_bench/step_table.py as a command."""

import runpy

if __name__ == "__main__":
    runpy.run_module("boxgrpo.bench.step_bench.step_table", run_name="__main__", alter_sys=True)
