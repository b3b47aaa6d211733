"""Fixtures of the tests of record files."""

import json

import pytest


@pytest.fixture
def write(tmp_path):
    def write_records(records, name="data.json"):
        path = tmp_path / name
        if name.endswith("l"):
            path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))
        else:
            path.write_text(json.dumps(records))
        return path

    return write_records
