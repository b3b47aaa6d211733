import runpy  # the earlier name of bench/reward_bench/run.py

if __name__ == "__main__":
    runpy.run_module("boxgrpo.bench.reward_bench.run", run_name="__main__", alter_sys=True)
