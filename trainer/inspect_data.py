import runpy  # the earlier name of trainer/apps/inspect_data.py

if __name__ == "__main__":
    runpy.run_module("boxgrpo.trainer.apps.inspect_data", run_name="__main__", alter_sys=True)
