"""The benchmarks that --bench names: their record format, their tasks, and their published scores."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType

from boxgrpo.trainer.data.example import Example

from . import mmiu, odinw
from .questions import FACTS

Rows = Mapping[str, Sequence[float]]  # by model: a number for each column, then the average


@dataclass(frozen=True)
class Bench:
    """A benchmark.

    Attributes:
        title: as a page shows it.
        schema: name of the reader's schema for its files.
        columns: the column of each task in the published tables, in their order. Other tasks have no column.
        published: tables to compare with, by name, all with the same columns.
        task_of: the task of a record.
        module: for a benchmark whose answer is not one box. It has `read(path, image_root)`, which opens no image and
            gives questions (Examples for `Processor.prompt`) and faults; `grade(questions, texts)`, a JSON dictionary
            for each answer; and `score(questions, answers)`, with `mean` and `tasks` in %. Image paths must not leave
            `image_root`; with None they may be any paths, relative to the file's folder.
    """

    title: str
    schema: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    published: Mapping[str, Rows] = field(default_factory=dict)
    task_of: Callable[[Example], str] = lambda example: example.task
    module: ModuleType | None = None

    def labelled(self, example: Example) -> Example:
        """The example with the name that its task has in this benchmark."""
        return dataclasses.replace(example, task=self.task_of(example))

    def ordered(self, tasks: Mapping[str, object]) -> list[str]:
        """The tasks in the order of the published columns, then the others by name."""
        return sorted(tasks, key=lambda task: ([*self.columns, task].index(task), task))


def _file(example: Example) -> str:
    return example.source.rsplit("#", 1)[0]


_REFCOCO = re.compile(r"refcoco[_-]?(\+|plus|p|g)?.*?((?<!e)val|test_?a|test_?b|test)", re.IGNORECASE)


def _refcoco_task(example: Example) -> str:
    """`refcoco+_testA` and the like, by the record's task or its file's name: the records do not name their split."""
    found = _REFCOCO.search(example.task) or _REFCOCO.search(_file(example))
    if not found:
        return example.task
    kind = re.sub("p(lus)?", "+", (found[1] or "").lower())
    split = re.sub("test_?([ab])", lambda part: f"test{part[1].upper()}", found[2].lower())
    return f"refcoco{kind}_{split}"


def _lisa_task(example: Example) -> str:
    """`lisa_val` or `lisa_test`, by the record's task or its file's name."""
    found = re.findall("(?<!e)val|test", f"{_file(example)} {example.task}")
    return f"lisa_{found[-1]}" if found else "lisa"


def _of_boxes(title: str, schema: str, columns: str, *tables: str, **task_of: Callable) -> Bench:
    """A benchmark of single boxes, with the paper's `columns` and `tables` of these names."""
    rows = {name: FACTS["tables"][name] for name in tables}
    return Bench(title, schema, FACTS["columns"][columns], rows, **task_of)


BENCHES = {
    "": Bench("Records"),
    "mig": _of_boxes("MIG-Bench", "mig_bench", "mig", "Table 1", "Table 6"),
    "refcoco": _of_boxes("RefCOCO/+/g", "refcoco", "refcoco", "Table 3", task_of=_refcoco_task),
    "lisa": _of_boxes("LISA-Grounding", "lisa", "reasoning", "Table 2", task_of=_lisa_task),
    "llmseg": _of_boxes("LLMSeg-Grounding", "llmseg", "reasoning", "Table 2", task_of=lambda _: "llmseg"),
    "reasonvos": _of_boxes("ReasonVOS-Grounding", "reasonvos", "reasoning", "Table 2", task_of=lambda _: "reasonvos"),
    "revos": _of_boxes("ReVOS-Grounding", "revos", "reasoning", "Table 2", task_of=lambda _: "revos"),
    # Accuracy in % of MMIU, AP in % of ODinW, which was published without its question and scoring.
    "mmiu": Bench("MMIU", published={"published": {"UniVG-R1": [53.03]}}, module=mmiu),
    "odinw": Bench("ODinW-13", published={"published": {"UniVG-R1": [33.3]}}, module=odinw),
}
