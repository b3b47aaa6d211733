import runpy  # the earlier name of trainer/apps/memory.py

if __name__ == "__main__":
    runpy.run_module("boxgrpo.trainer.apps.memory", run_name="__main__", alter_sys=True)
