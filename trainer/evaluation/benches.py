"""The benchmarks that --bench names: their record format, their tasks, and their published scores."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType

from boxgrpo.trainer.data.readers import Example

from . import mmiu, odinw, published
from .published import Table


@dataclass(frozen=True)
class Bench:
    """A benchmark.

    Attributes:
        title: as a page shows it.
        schema: name of the reader's schema for its files.
        columns: column of the published tables, by task, in their order. A task that is not there has none.
        published: tables to compare with, all with the same columns.
        task_of: the task of a record.
        module: for a benchmark whose answer is not one box. It has `read(path, image_root)`, which gives questions
            (Examples) and faults, `grade(questions, texts)`, a dictionary for each answer, and
            `score(questions, answers)`, with `mean` and `tasks` in %.
    """

    title: str
    schema: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    published: tuple[Table, ...] = ()
    task_of: Callable[[Example], str] = lambda example: example.task
    module: ModuleType | None = None

    def labelled(self, example: Example) -> Example:
        """The example under its task in this benchmark."""
        return dataclasses.replace(example, task=self.task_of(example))

    def ordered(self, tasks: Mapping[str, object]) -> list[str]:
        """The tasks in the order of the published columns, then the others by name."""
        return sorted(tasks, key=lambda task: ([*self.columns, task].index(task), task))


def _file(example: Example) -> str:
    return example.source.rsplit("#", 1)[0]


_REFCOCO = re.compile(r"refcoco[_-]?(\+|plus|p|g)?.*?((?<!e)val|test_?a|test_?b|test)", re.IGNORECASE)
_REFCOCO_KINDS = {"": "refcoco", "+": "refcoco+", "p": "refcoco+", "plus": "refcoco+", "g": "refcocog"}
_REFCOCO_SPLITS = {"val": "val", "testa": "testA", "testb": "testB", "test": "test"}


def _refcoco_task(example: Example) -> str:
    """`refcoco+_testA` and the like, by the record's task or its file's name: the records do not say their split."""
    found = _REFCOCO.search(example.task) or _REFCOCO.search(_file(example))
    if not found:
        return example.task
    kind, split = (found[1] or "").lower(), found[2].lower().replace("_", "")
    return f"{_REFCOCO_KINDS[kind]}_{_REFCOCO_SPLITS[split]}"


def _lisa_task(example: Example) -> str:
    """`lisa_val` or `lisa_test`, by the record's task or its file's name."""
    found = re.findall("(?<!e)val|test", f"{_file(example)} {example.task}")
    return f"lisa_{found[-1]}" if found else "lisa"


def _named(task: str) -> Callable[[Example], str]:
    return lambda example: task


MIG_TASKS = (
    *("diff", "view_diff", "common_object", "object_tracking", "multi_view", "region", "refer_grounding"),
    *("group_grounding", "reasoning", "correspondence"),
)
_REFCOCO_TASKS = (
    *("refcoco_val", "refcoco_testA", "refcoco_testB", "refcoco+_val", "refcoco+_testA", "refcoco+_testB"),
    *("refcocog_val", "refcocog_test"),
)
_REASONING_TASKS = ("lisa_val", "lisa_test", "llmseg", "reasonvos", "revos")
_reasoning = dict(zip(_REASONING_TASKS, published.REASONING.columns, strict=True))

BENCHES = {
    "": Bench("Records"),
    "mig": Bench(
        "MIG-Bench",
        "mig_bench",
        dict(zip(MIG_TASKS, published.MIG_COLUMNS, strict=True)),
        (published.MIG, published.MIG_2B),
    ),
    "refcoco": Bench(
        "RefCOCO/+/g",
        "refcoco",
        dict(zip(_REFCOCO_TASKS, published.REFCOCO.columns, strict=True)),
        (published.REFCOCO,),
        _refcoco_task,
    ),
    "lisa": Bench("LISA-Grounding", "lisa", _reasoning, (published.REASONING,), _lisa_task),
    "llmseg": Bench("LLMSeg-Grounding", "llmseg", _reasoning, (published.REASONING,), _named("llmseg")),
    "reasonvos": Bench("ReasonVOS-Grounding", "reasonvos", _reasoning, (published.REASONING,), _named("reasonvos")),
    "revos": Bench("ReVOS-Grounding", "revos", _reasoning, (published.REASONING,), _named("revos")),
    "mmiu": Bench("MMIU", published=(published.MMIU,), module=mmiu),
    "odinw": Bench("ODinW-13", published=(published.ODINW,), module=odinw),
}
