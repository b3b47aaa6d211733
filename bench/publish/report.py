"""The results as a page, plots and the numbers of both READMEs, all from the records in bench/results.

    python -P -m boxgrpo.bench.publish.report          writes RESULTS.md, results/<device>/*.png, the READMEs' blocks
    python -P -m boxgrpo.bench.publish.report --check   writes nothing; exit status 1 where one of them differs

Of each part a device's newest dated file counts that has it, and the records that the long commands keep.
"""

import argparse
import sys
from pathlib import Path

from boxgrpo.bench.publish import plots as report_plots
from boxgrpo.bench.publish import profile_guide as profile_page
from boxgrpo.bench.publish.page import page
from boxgrpo.bench.publish.readme import blocks, filled, stale
from boxgrpo.bench.publish.result_files import Records, part, records

ROOT = Path(__file__).resolve().parents[2]


def drift(root: Path) -> list[str]:
    """The places that do not say what the records say."""
    found = records(root / "bench/results")
    places = [f"README.md, block {name}" for name in stale((root / "README.md").read_text(), blocks(found))]
    places += _differing(root / "bench/RESULTS.md", page(found))
    places += ["bench/README.md"] * ((root / "bench/README.md").read_text() != _guide(root, found))
    for device, record in found.devices.items():
        folder = root / "bench/results" / device
        places += [f"bench/results/{device}/{name}" for name in report_plots.stale(record, folder)]
    return places


def _guide(root: Path, found: Records) -> str:
    """bench/README.md as it should be: its example is the CPU's profile."""
    return profile_page.filled(
        (root / "bench/README.md").read_text(), profile_page.blocks(part(found.devices["cpu"], "profile"))
    )


def _differing(path: Path, wanted: str) -> list[str]:
    if not path.exists():
        return [f"bench/{path.name}, which is missing"]
    heading, old, new = "", path.read_text().splitlines(), wanted.splitlines()
    for n in range(max(len(old), len(new))):
        if n < len(new) and new[n].startswith("#"):
            heading = new[n].strip("# ")
        if old[n : n + 1] != new[n : n + 1]:
            return [f"bench/{path.name}, line {n + 1}, under {heading!r}"]
    return []


def write(root: Path) -> None:
    found = records(root / "bench/results")
    texts = {"README.md": filled((root / "README.md").read_text(), blocks(found))}
    texts |= {"bench/README.md": _guide(root, found), "bench/RESULTS.md": page(found)}
    for device, record in found.devices.items():
        report_plots.draw(record, root / "bench/results" / device)
    for name, text in texts.items():
        (root / name).write_text(text)


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and fail where anything would change")
    if not parser.parse_args(args).check:
        write(ROOT)
        return
    if places := drift(ROOT):
        raise ValueError(
            "not what the records say: "
            + "; ".join(places)
            + ". `python -P -m boxgrpo.bench.publish.report` writes them."
        )


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"report.py: {error}")
