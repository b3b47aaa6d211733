import runpy  # the earlier name of bench/bench.py

if __name__ == "__main__":
    runpy.run_path(__file__.replace("bench_all.py", "bench.py"), run_name="__main__")
