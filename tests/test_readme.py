"""The Python examples of README.md and docs/*.md run as they stand; links and references name what is there."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
EXAMPLES = [
    pytest.param(code, id=f"{path.stem}-{i}")
    for path in DOCUMENTS
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL))
]


@pytest.mark.parametrize("code", EXAMPLES)
def test_example(code, monkeypatch, capsys):
    if "trl" in code:
        utils = pytest.importorskip("trl.trainer.utils")
        monkeypatch.setattr(utils, "_ChunkedLogProbFunction", utils._ChunkedLogProbFunction)  # restored afterwards
    scope = {}
    exec(code, scope)
    if "loss" in scope:
        assert scope["hidden"].grad.any() and scope["head"].grad.any()
    for line in re.findall(r"print\(.*#(.*)", code):
        assert capsys.readouterr().out.strip() == line.strip()


def test_an_example_for_each_repository():
    codes = [example.values[0] for example in EXAMPLES]
    assert len(codes) == 6 and sum("boxgrpo.kernels.dropin" in code for code in codes) == 4


def test_links_lead_to_files():
    """In every document: a relative link, with or without a section, names a file of the repository."""
    for path in (*DOCUMENTS, ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md", ROOT / "bench/README.md"):
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]*)?\)", path.read_text()):
            assert link.startswith("http") or (path.parent / link).exists(), f"{path.name} links to {link}"


def test_references_name_sections_of_the_architecture():
    """In code and documents: `ARCHITECTURE.md, Traps` or `ARCHITECTURE.md, section "Traps"`."""
    titles = tuple(re.findall(r"^## (.*)$", (ROOT / "ARCHITECTURE.md").read_text(), re.MULTILINE))
    folders, found = ("csrc", "kernels", "model", "trainer", "bench", "tests", "docs"), 0
    for path in (p for folder in folders for p in (ROOT / folder).rglob("*.*")):
        if path.suffix in (".py", ".h", ".yaml", ".md") and path != pathlib.Path(__file__):
            text = re.sub(r"\s+", " ", path.read_text())
            for named in re.findall(r'ARCHITECTURE\.md, (?:section )?"?([A-Z].{0,30})', text):
                assert named.startswith(titles), f"{path}: {named}"
                found += 1
    assert found > 10


def test_the_architecture_names_functions_that_exist():
    """`file.py: name`, with as much of the path as is needed."""
    text = re.sub(r"\s+", " ", (ROOT / "ARCHITECTURE.md").read_text())
    named = re.findall(r"`([\w/]+\.py): ([\w.]+)`", text)
    assert len(named) > 20
    paths = [path for folder in ("kernels", "model", "trainer") for path in (ROOT / folder).rglob("*.py")]
    for file, name in named:
        found = [path.read_text() for path in paths if f"/{path.relative_to(ROOT)}".endswith(f"/{file}")]
        for part in name.split("."):
            assert any(re.search(rf"^ *(def|class) {part}\b", code, re.MULTILINE) for code in found), f"{file}: {name}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 220
