"""Parses command lines and YAML files into dataclasses of options; flags and `--help` derive from the fields.

A dataclass of options has the class attributes `choices`, the allowed values by field, and `ranges`, the interval of
each number by field: "[0, 1)" holds 0 and not 1.
"""

import argparse
import contextlib
import difflib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import field
from pathlib import Path
from typing import TypeVar, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser

from boxgrpo.trainer.effects import without_effect

T = TypeVar("T")
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", list[str]: "a list of texts"}


def option(default, help: str):
    """A dataclass field with a default and its flag's help text."""
    return field(default=default, metadata={"help": help})


class _Append(argparse.Action):
    """Append a value each time the flag is given. (transformers' nargs "+" would also take words without a flag.)"""

    def __init__(self, *names, nargs: str, **settings):
        super().__init__(*names, **settings)

    def __call__(self, parser, namespace, value, name=None):
        setattr(namespace, self.dest, [*getattr(namespace, self.dest), value])


@contextlib.contextmanager
def optional_import(needed: str, remedy: str) -> Iterator[None]:
    """Raise ValueError with the remedy where an import in the block fails; `needed` says which option needs it."""
    try:
        yield
    except ImportError as error:
        raise ValueError(f"{needed} and an import fails: {error}. {remedy}") from error


def repeated(help: str) -> dict:
    """Metadata of a list[str] field whose flag is given once for each value."""
    return {"help": help, "action": _Append}


class FlagParser(argparse.ArgumentParser):
    """A parser that refuses in one line, without the usage of all flags, and with exit status 2.

    The error for an unknown flag names the most similar one.
    """

    def parse_args(self, args=None, namespace=None):
        known, unknown = self.parse_known_args(args, namespace)
        if unknown and not unknown[0].startswith("-"):
            self.error(f"{unknown[0]!r} belongs to no flag; quote a value of several words.")
        if unknown:
            flags = [s for action in self._actions for s in action.option_strings]
            near = difflib.get_close_matches(unknown[0], flags, n=1)
            self.error(f"unknown flag {unknown[0]!r}" + (f"; did you mean {near[0]}?" if near else "; see --help."))
        return known

    def error(self, message):
        if wrong := re.fullmatch(r"argument --(\w+).*: invalid (int|float) value: (.*)", message):
            name, kind, value = wrong.groups()
            message = f"{name} is {value}; it must be {KINDS[{'int': int, 'float': float}[kind]]}. Change --{name}."
        elif wrong := re.fullmatch(r"argument --(\w+).*: invalid choice: (.*) \(choose from (.*)\)", message):
            message = "{0} is {1}; it must be one of {2}. Change --{0}.".format(*wrong.groups())
        elif wrong := re.fullmatch(r"argument (--\w+).*: expected .*", message):
            message = f"{wrong[1]} has no value. Give it one."
        elif wrong := re.fullmatch(r"the following arguments are required: (.*)", message):
            message = f"{wrong[1]} is missing. Name it; --help explains it."
        elif wrong := re.fullmatch(r"argument --(\w+).*: Truthy value expected: got (.*) but .*", message, re.DOTALL):
            message = "{0} is {1}; it must be true or false. Change --{0}.".format(*wrong.groups())
        self.exit(2, f"{self.prog}: {message}\n")


class _Parser(FlagParser, HfArgumentParser):
    """Flags from a dataclass."""


def parse(kind: type[T], args: list[str] | None = None, *, prog: str | None = None, positional: str = "") -> T:
    """Parse flags and `--config file.yaml` into a `kind`. A later file overrides an earlier one, flags override files.

    A word without a flag is the value of the field `positional`. With `prog`, a command's name, a warning on standard
    error names the options that have no effect with the others.

    Raises:
        ValueError: by `read_yaml` and `check_options`.
        SystemExit: 2, for a flag that is unknown, or a value that cannot be converted.
    """
    name = sys.argv[0] if sys.argv[0].startswith("boxgrpo ") else prog
    parser = _Parser(kind, prog=name, description=kind.__doc__, allow_abbrev=False)
    if positional:
        parser.add_argument(positional, nargs="?", default=argparse.SUPPRESS, help=f"The same as --{positional}.")
    parser.add_argument("--config", action="append", default=[], help="YAML file of these options; flags override it.")
    first, _ = parser.parse_known_args(args)
    for path in first.config:
        parser.set_defaults(**read_yaml(kind, path))
    values = vars(parser.parse_args(args))
    values.pop("config")
    options = kind(**values)
    check_options(options)
    words = sys.argv[1:] if args is None else args
    typed = {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    if prog and os.environ.get("RANK", "0") == "0" and (idle := without_effect(options, typed)):
        print(f"WARNING no effect: {', '.join(idle)}", file=sys.stderr)
    return options


def check_options(options) -> None:
    """Raise ValueError for a value of another type than its field's, not among its choices, or out of its range."""
    for name, kind in get_type_hints(type(options)).items():
        if name not in vars(options):  # `choices` and `ranges`
            continue
        value, (kind, *rest) = getattr(options, name), get_args(kind) if kind == float | None else (kind,)
        if value is None and rest:
            continue
        if not _is_a(value, kind):
            raise ValueError(f"{name} is {value!r}; it must be {KINDS[kind]}. Change --{name}.")
        if name in options.choices:
            check_choice(name, value, options.choices[name])
        elif kind in (int, float):
            check_range(name, value, options.ranges[name])


def check_choice(name: str, value: object, choices: Sequence) -> None:
    if value not in choices:
        known = ", ".join(str(choice) for choice in choices if choice != "")
        raise ValueError(f"{name} is {value!r}; it must be one of {known}. Change --{name}.")


def _is_a(value: object, kind: type) -> bool:
    if kind == list[str]:
        return isinstance(value, list) and all(isinstance(text, str) for text in value)
    if kind is float:
        return type(value) in (int, float) and value == value  # NaN is no number
    return isinstance(value, str | Path) if kind is str else type(value) is kind


def check_range(name: str, value: float, interval: str) -> None:
    """Raise ValueError for a number outside an interval such as "[0, 1)"."""
    low, high = interval[1:-1].split(", ")
    if value < float(low) or (value == float(low) and interval[0] == "("):
        rule = "at least" if interval[0] == "[" else "above"
        raise ValueError(f"{name} is {value}; it must be {rule} {low}. Raise --{name}.")
    if value > float(high) or (value == float(high) and interval[-1] == ")"):
        rule = "at most" if interval[-1] == "]" else "below"
        raise ValueError(f"{name} is {value}; it must be {rule} {high}. Lower --{name}.")


def read_yaml(kind: type, path: str | Path) -> dict:
    """The mapping in a YAML file, its keys and types checked against the dataclass.

    Raises:
        ValueError: the file is missing, no YAML or holds no mapping, a key is unknown, or a value has another type.
    """
    if not Path(path).is_file():
        raise ValueError(f"--config {path}: no such file.")
    try:
        values = yaml.safe_load(Path(path).read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML ({' '.join(str(error).split())}). Correct it.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; it must map option names to values.")
    defaults = vars(kind())
    for name, value in values.items():
        if name not in defaults:
            near = difflib.get_close_matches(name, defaults, n=1)
            hint = f"did you mean {near[0]}?" if near else "see --help."
            raise ValueError(f"{path}: unknown option {name!r}; {hint}")
        default = defaults[name]
        if isinstance(default, list):
            values[name] = [value] if isinstance(value, str) else value
            if not isinstance(values[name], list) or not all(isinstance(text, str) for text in values[name]):
                raise ValueError(f"{path}: {name} is {value!r}; it must be a string or a list of strings.")
        elif isinstance(default, float) and isinstance(value, str | int) and not isinstance(value, bool):
            try:
                values[name] = float(value)  # YAML reads 1e-6 as a string
            except ValueError:
                raise ValueError(f"{path}: {name} is {value!r}; it must be a number.") from None
        elif default is not None and type(value) is not type(default):
            raise ValueError(f"{path}: {name} is {value!r}; it must be of type {type(default).__name__}.")
    return values
