"""The results as a page, plots and the numbers in the documents, all from the records in bench/results.

    python -P -m boxgrpo.bench.publish.report          writes RESULTS.md, results/<device>/*.png, the documents' blocks
    python -P -m boxgrpo.bench.publish.report --check   writes nothing; exit status 1 where one of them differs

A block is what stands between `<!-- results:NAME -->` or `<!-- profile:NAME -->` and `<!-- end -->` in README.md,
docs/*.md or bench/README.md. Of each part a device's newest dated file counts that has it, and the records of the
studies.
"""

import argparse
import re
from itertools import zip_longest
from pathlib import Path

from jinja2.runtime import Macro

from boxgrpo.bench.machine import describe
from boxgrpo.bench.publish import plots
from boxgrpo.bench.publish.demands import minutes, verdicts
from boxgrpo.bench.publish.tables import template
from boxgrpo.bench.records import PARTS, STUDIES, Records, part, read_all
from boxgrpo.bench.studies.ablation_tables import summary as ablation_table
from boxgrpo.trainer.runtime.ranks import run_as_script

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"(?P<open><!-- (?P<name>(?:results|profile):[\w ]+) -->)(?P<body>.*?)(?P<close><!-- end -->)", re.S)
WIDTH = 120


def documents(root: Path) -> list[Path]:
    """Those that may hold blocks."""
    return [root / "README.md", root / "bench/README.md", *sorted((root / "docs").glob("*.md"))]


def page(found: Records) -> str:
    """bench/RESULTS.md: every table that the records give, each under the machine that it was measured on."""
    devices = []
    for folder, record in found.devices.items():
        measured = [part(record, name)["machine"] for name in ("kernels", "rewards", "step") if name in record]
        devices.append(
            {
                "folder": folder,
                "record": record,
                "parts": {name: part(record, name) for name in PARTS if name in record},
                # The machine of each part that figures are wanted of, once where it is the same.
                "machines": list(dict.fromkeys(describe(m, peers=True) for m in measured or [record["machine"]])),
                "plots": [
                    {"file": file, "title": plot.title, "part": plot.parts[0] if len(plot.parts) == 1 else ""}
                    for file, plot in plots.PLOTS.items()
                    if plot.data(record) is not None
                ],
                "verdicts": verdicts(record),
            }
        )
    text = template("results.md").render(devices=devices, studies=found.studies, ablation_table=ablation_table)
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
    known = {"parts": parts, "study": found.studies, "minutes": minutes(record), "profile": parts["profile"]}
    filled = {}
    for kind in ("results", "profile"):
        module = template(f"block_{kind}.md").make_module(known | {"ablation_table": ablation_table})
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
        on_its_own = block["body"].startswith("\n")
        if block["body"].strip() == body if on_its_own else block["body"].split() == body.split():
            return block[0]
        column = block.start("body") - text.rfind("\n", 0, block.start("body")) - 1
        return block["open"] + (f"\n\n{body}\n\n" if on_its_own else _wrapped(body, column)) + block["close"]

    return BLOCK.sub(replaced, text)


def _wrapped(text: str, column: int) -> str:
    """The words in lines of the documents' width, the first of which begins at a column."""
    lines = [[]]
    for word in text.split():
        if lines[-1] and column + len(word) + 1 > WIDTH:
            lines.append([])
            column = 0
        column += len(word) + (1 if lines[-1] else 0)
        lines[-1].append(word)
    return "\n".join(" ".join(words) for words in lines)


def texts(root: Path, found: Records) -> dict[Path, str]:
    """What the page and every document should hold."""
    wanted = blocks(found)
    filled = {path: fill(path.read_text(), wanted) for path in documents(root)}
    return filled | {root / "bench/RESULTS.md": page(found)}


def drift(root: Path) -> list[str]:
    """The places that differ from the records, and blocks that no document has."""
    found, places, held = read_all(root / "bench/results"), [], set()
    for path, text in texts(root, found).items():
        name, old = path.relative_to(root), path.read_text() if path.exists() else ""
        if path.name == "RESULTS.md":
            places += [f"{name}, line {n}" for n in _differing_lines(old, text)[:1]]
            continue
        held |= {block["name"] for block in BLOCK.finditer(old)}
        pairs = zip(BLOCK.finditer(old), BLOCK.finditer(text), strict=True)
        places += [f"{name}, block {a['name']}" for a, b in pairs if a["body"] != b["body"]]
    places += [f"block {name}, which no document has" for name in blocks(found) if name not in held]
    for device, record in found.devices.items():
        stale = plots.stale(record, root / "bench/results" / device)
        places += [f"bench/results/{device}/{name}" for name in stale]
    return places


def _differing_lines(old: str, new: str) -> list[str]:
    """The numbers of the lines that differ, each with the heading above it."""
    heading, found = "", []
    for n, (a, b) in enumerate(zip_longest(old.splitlines(), new.splitlines()), start=1):
        heading = b.strip("# ") if b and b.startswith("#") else heading
        found += [f"{n}, under {heading!r}"] if a != b else []
    return found


def write(root: Path) -> None:
    found = read_all(root / "bench/results")
    for device, record in found.devices.items():
        plots.draw(record, root / "bench/results" / device)
    for path, text in texts(root, found).items():
        path.write_text(text)


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and fail where anything would change")
    if not parser.parse_args(args).check:
        write(ROOT)
    elif places := drift(ROOT):
        mend = "`python -P -m boxgrpo.bench.publish.report` writes them"
        raise ValueError(f"these differ from the records: {'; '.join(places)}. {mend}.")


if __name__ == "__main__":
    run_as_script(main, "report.py")
