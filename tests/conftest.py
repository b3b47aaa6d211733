"""Fixtures shared by the test files."""

import os
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared():
    """The folder of real records, photos and the Qwen2 merges; not part of the repository."""
    folder = pathlib.Path(os.environ.get("BOXGRPO_SHARED", ROOT.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"no real data at {folder}; set BOXGRPO_SHARED")
    return folder
