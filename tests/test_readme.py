"""The README's Python examples run as they stand."""

import pathlib
import re

import pytest

README = pathlib.Path(__file__).resolve().parent.parent / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("i", range(len(EXAMPLES)))
def test_example(i, monkeypatch, capsys):
    if "trl" in EXAMPLES[i]:
        utils = pytest.importorskip("trl.trainer.utils")
        monkeypatch.setattr(utils, "_ChunkedLogProbFunction", utils._ChunkedLogProbFunction)  # put back afterwards
    scope = {}
    exec(EXAMPLES[i], scope)
    if "loss" in scope:
        assert scope["hidden"].grad.any() and scope["head"].grad.any()
    for line in re.findall(r"print\(.*#(.*)", EXAMPLES[i]):
        assert capsys.readouterr().out.strip() == line.strip()


def test_an_example_for_each_repository():
    assert len(EXAMPLES) == 6 and sum("boxgrpo.kernels.dropin" in example for example in EXAMPLES) == 4
