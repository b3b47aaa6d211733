"""Tables and texts made from records: Markdown templates in `templates/`, the same for pages, READMEs and the terminal.

`results.md` is the page; `tables.md` has a macro for each table. Each macro of `block_results.md` and
`block_profile.md` fills a block of a document: `<!-- results:NAME -->` and `<!-- profile:NAME -->`.
"""

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template, Undefined

from boxgrpo.bench.machine import describe
from boxgrpo.bench.peers import NAMES
from boxgrpo.bench.records import find_row
from boxgrpo.bench.studies.ablation_rows import COLUMNS, by_method
from boxgrpo.trainer.profiling.timeline import Row
from boxgrpo.trainer.profiling.timeline import table as timeline_table


def template(name: str) -> Template:
    return _environment().get_template(name)


def table(name: str, *data) -> str:
    """The table that a macro of `tables.md` makes of its arguments."""
    return str(getattr(template("tables.md").module, name)(*data)).strip()


def sizes(shape: Mapping[str, int]) -> str:
    """A shape in words, as names and tables have it."""
    return " ".join(f"{key}={value}" for key, value in shape.items())


def profile_table(profile: dict) -> str:
    """A line for each range of a recorded profile."""
    known = {f.name for f in fields(Row)}
    rows = [Row(**{key: value for key, value in row.items() if key in known}) for row in profile["rows"]]
    floors = {row["name"]: row["floor"] for row in profile["rows"] if row["floor"]}
    return timeline_table(rows, floors)


@cache
def _environment() -> Environment:
    found = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"f": _formatted, "sizes": sizes, "describe": describe, "profile_table": profile_table}
    found.filters |= {"by_method": by_method}
    found.globals |= {"find": find_row, "NAMES": NAMES, "COLUMNS": COLUMNS}
    return found


def _formatted(value, spec: str, scale: float = 1) -> str:
    """A number as Python's `format` writes it; empty for one that is missing."""
    return "" if value is None or isinstance(value, Undefined) else format(scale * value, spec)
