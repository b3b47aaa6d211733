"""Records of files read in pieces: the same as json reads whole, wherever the pieces end."""

import json

import pytest

from boxgrpo.trainer.data import scan as records
from boxgrpo.trainer.data.scan import scan

MIXED = [
    {"a": 'quote " backslash \\ brace } bracket ]', "b": [1, -2.5, 1e3, None, True]},
    {"text": "größer 漢字 🦊", "nested": {"x": [{}, [], ""]}},
    {},
    17,
    -3.25,
    "alone ]",
    None,
    {"long": "x" * 500},
    [1, [2]],
    True,
]


def test_one_object_over_several_lines_is_no_jsonl(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(MIXED[1], indent=1))
    with pytest.raises(ValueError, match=r"a\.json is one JSON object over several lines. If it is a record, put \[ "):
        list(scan(tmp_path / "a.json"))


@pytest.mark.parametrize("ascii_only", [True, False], ids=["escapes", "UTF-8"])
@pytest.mark.parametrize("indent", [None, 2])
def test_pieces_of_any_length_give_what_the_whole_file_holds(tmp_path, monkeypatch, ascii_only, indent):
    """A number, a string, an escape or a character of several bytes cut in two at every place."""
    path = tmp_path / "a.json"
    text = json.dumps(MIXED, ensure_ascii=ascii_only, indent=indent)
    path.write_text(f"\ufeff {text} \n", encoding="utf-8")
    raw = path.read_bytes()
    for chunk in range(1, 40):
        monkeypatch.setattr(records, "CHUNK", chunk)
        rows = list(scan(path))
        assert [row.value for row in rows] == MIXED, chunk
        assert [json.loads(raw[row.start : row.stop]) for row in rows] == MIXED, chunk


def test_lines_and_their_places(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"n": 1}\r\n\n  {"n": "é"}\n{"n": \n{"n": 4}'.encode())
    rows = list(scan(path))
    assert [row.value for row in rows] == [{"n": 1}, {"n": "é"}, None, {"n": 4}]
    assert rows[2].fault and not rows[3].fault
    raw = path.read_bytes()
    assert [json.loads(raw[r.start : r.stop].decode("utf-8-sig")) for r in rows if not r.fault] == [
        row.value for row in rows if not row.fault
    ]


@pytest.mark.parametrize(
    ("text", "byte"),
    [
        ('[{"a": 1}, {"b": 2]', 18),
        ('[{"a": 1} {"b": 2}]', 10),
        ('[{"a": 1}, ]', 11),
        ('[{"a": 1}', 9),
        ('[{"a": 1}] x', 11),
        ('[{"é": 1}, {"b: 2}]', 13),
        ("[", 1),
        ('[{"a": tru}]', 7),
    ],
)
@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_a_broken_array_is_refused_with_its_byte(tmp_path, monkeypatch, text, byte, chunk):
    monkeypatch.setattr(records, "CHUNK", chunk)
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"a\.json is not JSON .*byte {byte}\b"):
        list(scan(path))


def test_nesting_without_end_is_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[" * 200_000)
    with pytest.raises(ValueError, match="is not JSON"):
        list(scan(path))


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("chunk", [5, 1 << 20])
@pytest.mark.parametrize(
    "around",
    [
        {"data": 0},
        {"version": "1.0", "count": 2, "final": True, "data": 0},
        {"records": 0, "license": {"by": ["x"]}},
    ],
    ids=str,
)
def test_case_24_an_object_may_hold_the_records(tmp_path, monkeypatch, around, indent, chunk):
    """{"data": [...]} in one file, on one line or many, with other values before and behind it."""
    monkeypatch.setattr(records, "CHUNK", chunk)
    wanted = [{"images": ["ä.png"], "data": [{}]}, {"n": 2}]
    around = {key: value or wanted for key, value in around.items()}
    path = tmp_path / "a.json"
    path.write_text(json.dumps(around, indent=indent, ensure_ascii=False))
    rows, raw = list(scan(path)), path.read_bytes()
    assert [row.value for row in rows] == wanted == [json.loads(raw[row.start : row.stop]) for row in rows]
    path.write_text(path.read_text()[:-1])
    with pytest.raises(ValueError, match=r"a\.json is not JSON"):
        list(scan(path))


def test_a_chat_in_each_line_is_no_such_object(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [{"messages": [{"role": "user"}]}, {"data": 3}]
    path.write_text("\n".join(map(json.dumps, lines)))
    assert [row.value for row in scan(path)] == lines
