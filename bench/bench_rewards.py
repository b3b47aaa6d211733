"""The earlier name of bench/reward_bench/rewards_table.py as a command."""

import runpy

if __name__ == "__main__":
    runpy.run_module("boxgrpo.bench.reward_bench.rewards_table", run_name="__main__", alter_sys=True)
