"""Shared by the benchmarks: names and published scores, questions made from records, and the rows of answers."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from boxgrpo.trainer.data.example import Example, Fault, Refused, plain_text

# Names of tasks and sets. `columns` and `tables` are those of the UniVG-R1 paper (Bai et al. 2025): a column by task,
# and a row for each model, Acc@0.5 in %. A row's last number is the average that the paper prints, even where the mean
# of the row differs (UniVG-R1 on MIG-Bench: 72.62).
FACTS = json.loads(Path(__file__).with_name("benchmarks.json").read_text())


def read_each(records: Iterable, read: Callable[[dict, str], object], source: str) -> tuple[list, list[Fault]]:
    """The results of `read(record, "source#12")`, and a `Fault` for each record that is refused or no JSON object."""
    made, faults = [], []
    for index, record in enumerate(records):
        name = f"{source}#{index}"
        try:
            if not isinstance(record, dict):
                raise Refused("not_a_record", f"{record!r:.80} is no JSON object. Drop it.")
            made.append(read(record, name))
        except Refused as refused:
            faults.append(refused.fault(name))
    return made, faults


def user_turn(text: str) -> dict:
    """Fields of an Example whose `turns` hold only the user's turn: a prompt adds no suffix. All images stand first."""
    return {"question": (plain := plain_text(text)), "turns": (("user", plain),), "gold": None}


def answer_row(example: Example, text: str, **found) -> dict:
    """An answer for results.json: the example's source, id, task and question, the text, and what was found in it."""
    names = ("source", "id", "task", "question")
    return {name: getattr(example, name) for name in names} | {"answer": text} | found
