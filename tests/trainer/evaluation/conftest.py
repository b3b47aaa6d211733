"""A fixture of this folder's tests."""

import json

import pytest


@pytest.fixture
def write(tmp_path):
    """write(name, value) -> the path of a JSON file in the test's folder."""

    def write_json(name, value):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
        return path

    return write_json
