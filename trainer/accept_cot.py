import runpy  # the earlier name of trainer/chains/accept.py

if __name__ == "__main__":
    runpy.run_module("boxgrpo.trainer.chains.accept", run_name="__main__", alter_sys=True)
