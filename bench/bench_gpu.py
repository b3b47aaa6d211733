import runpy  # the earlier name of bench/bench.py --gpu
import sys

if __name__ == "__main__":
    runpy.run_path(__file__.replace("bench_gpu.py", "bench.py"))["command"](["--gpu", *sys.argv[1:]])
