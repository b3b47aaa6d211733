"""The earlier name of trainer/chains/accept.py as a command."""

import runpy

if __name__ == "__main__":
    runpy.run_module("boxgrpo.trainer.chains.accept", run_name="__main__", alter_sys=True)
