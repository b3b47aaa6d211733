"""The results as a page, plots and the numbers in the documents, all from the records in bench/results.

    python -P -m boxgrpo.bench.publish.report          writes RESULTS.md, results/<device>/*.png, the documents' blocks
    python -P -m boxgrpo.bench.publish.report --check   writes nothing; exit status 1 where one of them differs

A block is the text between `<!-- results:NAME -->` or `<!-- profile:NAME -->` and `<!-- end -->` in README.md,
docs/*.md or bench/README.md. Each part is that of a device's newest dated file that has it; the studies have files of
their own.
"""

import argparse
import re
import textwrap
from pathlib import Path

from jinja2.runtime import Macro

from boxgrpo.bench.publish import plots
from boxgrpo.bench.publish.demands import minutes, verdicts
from boxgrpo.bench.publish.tables import template
from boxgrpo.bench.records import PARTS, STUDIES, Records, part, read_all
from boxgrpo.trainer.arguments import FlagParser
from boxgrpo.trainer.runtime.ranks import run_as_script

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"(?P<open><!-- (?P<name>(?:results|profile):[\w ]+) -->)(?P<body>.*?)(?P<close><!-- end -->)", re.S)
WIDTH = 120


def page(found: Records) -> str:
    """bench/RESULTS.md: every table that the records give, each under the machine that it was measured on."""
    functions = {"part": part, "verdicts": verdicts, "plots_of": plots.shown}
    text = template("results.md").render(devices=found.devices, studies=found.studies, **functions)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def blocks(found: Records) -> dict[str, str]:
    """Each block's text, by `results:NAME` or `profile:NAME`.

    Raises:
        ValueError: a record is missing that a block is about.
    """
    record = found.devices.get("cpu", {})
    if missing := set(PARTS) - record.keys():
        raise ValueError(f"bench/results/cpu has no results of {', '.join(sorted(missing))}; `make bench` makes them.")
    if missing := set(STUDIES) - found.studies.keys():
        raise ValueError(
            f"bench/results/cpu has no {', '.join(sorted(missing))}.json; docs/benchmarks.md has the commands."
        )
    parts = {name: part(record, name) for name in PARTS}
    known = {"parts": parts, "study": found.studies, "minutes": minutes({}, record), "profile": parts["profile"]}
    filled = {}
    for kind in ("results", "profile"):
        module = template(f"block_{kind}.md").make_module(known)
        macros = {name: macro for name, macro in vars(module).items() if isinstance(macro, Macro)}
        filled |= {f"{kind}:{name.replace('_', ' ')}": str(macro()).strip() for name, macro in macros.items()}
    return filled


def fill(text: str, wanted: dict[str, str]) -> str:
    """The text with its blocks as they should be; one with the same words in other lines is left alone.

    Raises:
        ValueError: it has a block that nothing fills.
    """

    def replaced(block: re.Match) -> str:
        if (body := wanted.get(block["name"])) is None:
            raise ValueError(f"no record fills the block {block['name']!r}; there are {', '.join(wanted)}.")
        if block["body"].startswith("\n"):  # in lines of its own
            return block[0] if block["body"].strip() == body else f"{block['open']}\n\n{body}\n\n{block['close']}"
        if block["body"].split() == body.split():
            return block[0]
        indent = " " * (block.start("body") - text.rfind("\n", 0, block.start("body")) - 1)
        wrapped = textwrap.fill(
            body, WIDTH, initial_indent=indent, break_long_words=False, break_on_hyphens=False
        ).removeprefix(indent)
        return block["open"] + wrapped + block["close"]

    return BLOCK.sub(replaced, text)


def texts(root: Path, found: Records) -> dict[Path, str]:
    """What the page and every document that may hold blocks should contain."""
    documents = [root / "README.md", root / "bench/README.md", *sorted((root / "docs").glob("*.md"))]
    wanted = blocks(found)
    filled = {path: fill(path.read_text(), wanted) for path in documents}
    return filled | {root / "bench/RESULTS.md": page(found)}


def drift(root: Path) -> list[str]:
    """The places that differ from the records, and blocks that no document has."""
    found, places, held = read_all(root / "bench/results"), [], set()
    for path, text in texts(root, found).items():
        name, old = path.relative_to(root), path.read_text() if path.exists() else ""
        if path.name == "RESULTS.md":
            places += [f"{name}, {_first_difference(old, text)}"] if old != text else []
            continue
        for before, after in zip(BLOCK.finditer(old), BLOCK.finditer(text), strict=True):
            held.add(before["name"])
            places += [f"{name}, block {before['name']}"] if before["body"] != after["body"] else []
    places += [f"block {name}, which no document has" for name in blocks(found) if name not in held]
    for device, record in found.devices.items():
        stale = plots.stale(record, root / "bench/results" / device)
        places += [f"bench/results/{device}/{name}" for name in stale]
    return places


def _first_difference(old: str, new: str) -> str:
    """The first line that differs, and the heading above it."""
    before, after = old.splitlines(), new.splitlines()
    same = next((n for n, (a, b) in enumerate(zip(before, after)) if a != b), min(len(before), len(after)))
    headings = [line.strip("# ") for line in after[: same + 1] if line.startswith("#")]
    return f"line {same + 1}, under {headings[-1]!r}"


def write(root: Path) -> None:
    found = read_all(root / "bench/results")
    for device, record in found.devices.items():
        plots.draw(record, root / "bench/results" / device)
    for path, text in texts(root, found).items():
        path.write_text(text)


def main(args: list[str] | None = None) -> None:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and fail where anything would change")
    if not parser.parse_args(args).check:
        write(ROOT)
    elif places := drift(ROOT):
        remedy = "`python -P -m boxgrpo.bench.publish.report` writes them"
        raise ValueError(f"these differ from the records: {'; '.join(places)}. {remedy}.")


if __name__ == "__main__":
    run_as_script(main, "report.py")
