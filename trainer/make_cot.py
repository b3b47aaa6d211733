"""The earlier name of trainer/chains/make.py as a command."""

import runpy

if __name__ == "__main__":
    runpy.run_module("boxgrpo.trainer.chains.make", run_name="__main__", alter_sys=True)
