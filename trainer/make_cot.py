import runpy  # the earlier name of trainer/chains/make.py

if __name__ == "__main__":
    runpy.run_module("boxgrpo.trainer.chains.make", run_name="__main__", alter_sys=True)
