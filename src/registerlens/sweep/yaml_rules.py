"""Rules for what may stand in a YAML file: a schema as data, which reads a file and names everything wrong at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import yaml

from registerlens.errors import ConfigError, close_matches

MISSING = object()
"""Stands for a value that is wrong or absent, after its problem was noted."""
_KINDS = {"null": "nothing", "bool": "a truth value", "int": "a whole number", "float": "a number", "str": "text"}


@dataclass(frozen=True, order=True)
class Problem:
    """One thing that is wrong, and where."""

    line: int
    """Counting from 1."""
    column: int
    """Counting from 1."""
    text: str
    """What was got and what was expected."""


class Notes:
    """The problems met so far while a file is read."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def add(self, node: yaml.Node, text: str) -> Any:
        """Note a problem at a node; returns MISSING."""
        self.problems.append(Problem(line_of(node), node.start_mark.column + 1, text))
        return MISSING


@runtime_checkable
class Rule(Protocol):
    """What may stand at one place."""

    @property
    def words(self) -> str:
        """What is expected there, as it stands after "expected"."""
        ...

    def read(self, node: yaml.Node, name: str, notes: Notes) -> Any:
        """The value at a node called `name`, or MISSING after noting what is wrong."""
        ...


def line_of(node: yaml.Node) -> int:
    """The line of a node, counting from 1."""
    return node.start_mark.line + 1


def shown(node: yaml.Node) -> str:
    """What stands at a node, briefly."""
    if isinstance(node, yaml.MappingNode):
        return f"a mapping of {len(node.value)} keys"
    if isinstance(node, yaml.SequenceNode):
        return f"a list of {len(node.value)} items"
    kind = node.tag.rpartition(":")[2]
    return f"{node.value!r} ({_KINDS.get(kind, kind)})" if node.value else "nothing"


def _unfit(rule: Rule, node: yaml.Node, name: str, notes: Notes, hint: str = "") -> Any:
    what = f"'{name}'" if name else "The file"
    return notes.add(node, f"{what} is {shown(node)}, expected {rule.words}.{hint}")


@dataclass(frozen=True)
class Text:
    """Text, of certain words or of a certain form."""

    words: str = "text"
    choices: tuple[str, ...] = ()
    pattern: str = ""

    def read(self, node: yaml.Node, name: str, notes: Notes) -> Any:
        """The text."""
        fits = isinstance(node, yaml.ScalarNode) and node.value and not node.tag.endswith(":null")
        if fits and (not self.choices or node.value in self.choices) and re.fullmatch(self.pattern or ".*", node.value):
            return node.value
        hint = close_matches(node.value, self.choices) if fits and self.choices else ""
        return _unfit(self, node, name, notes, hint)


def one_of(*choices: str) -> Text:
    """One of these words.

    Example:
        >>> one_of("zero", "mean").words
        "'zero' or 'mean'"
    """
    return Text(" or ".join(map(repr, choices)), choices)


@dataclass(frozen=True)
class Number:
    """A number within limits, whole or not."""

    words: str
    low: int | float = float("-inf")
    high: int | float = float("inf")
    whole: bool = False

    def read(self, node: yaml.Node, name: str, notes: Notes) -> Any:
        """The number."""
        try:
            if not isinstance(node, yaml.ScalarNode) or node.style in ("'", '"'):
                raise ValueError
            value = int(node.value) if self.whole else float(node.value)
        except ValueError:
            return _unfit(self, node, name, notes)
        return (
            value if self.low <= value <= self.high and abs(value) != float("inf") else _unfit(self, node, name, notes)
        )


@dataclass(frozen=True)
class ListOf:
    """A list of things of one kind."""

    item: Rule
    words: str
    least: int = 1
    most: int | None = None

    def read(self, node: yaml.Node, name: str, notes: Notes) -> Any:
        """A tuple."""
        if not isinstance(node, yaml.SequenceNode):
            return _unfit(self, node, name, notes)
        if len(node.value) < self.least or (self.most is not None and len(node.value) > self.most):
            return _unfit(self, node, name, notes)
        values = [self.item.read(one, f"{name}[{i}]", notes) for i, one in enumerate(node.value)]
        return MISSING if any(value is MISSING for value in values) else tuple(values)


@dataclass(frozen=True)
class MapOf:
    """Names, each with a thing of one kind."""

    item: Rule
    words: str

    def read(self, node: yaml.Node, name: str, notes: Notes) -> Any:
        """A dict."""
        if not isinstance(node, yaml.MappingNode) or not node.value:
            return _unfit(self, node, name, notes)
        nodes = _children(node, name, notes)
        values = {key: self.item.read(value, f"{name}.{key}", notes) for key, (_, value) in nodes.items()}
        return MISSING if any(value is MISSING for value in values.values()) else values


@dataclass(frozen=True)
class Key:
    """One key of a record."""

    rule: Rule
    default: Any = MISSING
    """What it is where it is absent; without a default it must be there."""


@dataclass(frozen=True)
class Record:
    """Certain keys, each with its rule."""

    keys: Mapping[str, Key]
    words: str
    exactly_one: tuple[tuple[str, ...], ...] = ()
    """Of each of these groups of keys one must be there, and no second one."""
    make: Callable[..., Any] = dict
    """What becomes of the values; called with them by keyword, and with `line` where `with_line`. A ValueError from it
    says in a sentence what is wrong."""
    with_line: bool = False

    def read(self, node: yaml.Node, name: str, notes: Notes) -> Any:
        """What `make` makes of the values."""
        if not isinstance(node, yaml.MappingNode):
            return _unfit(self, node, name, notes)
        n_before = len(notes.problems)
        path = f"{name}." if name else ""
        values, meant = {}, set()
        nodes = _children(node, name, notes)
        for key, (at, value) in nodes.items():
            if key in self.keys:
                values[key] = self.keys[key].rule.read(value, f"{path}{key}", notes)
            else:
                meant.update(get_close_matches(key, list(self.keys), cutoff=0.5))
                known = f"{close_matches(key, self.keys)} Keys here: {', '.join(self.keys)}."
                notes.add(at, f"Unknown key '{path}{key}'.{known}")
        for group in self.exactly_one:
            there = [key for key in group if key in nodes]
            if len(there) > 1 or not (there or meant & set(group)):
                told = f"{' and '.join(map(repr, there))} are given" if there else "none of them is given"
                where = f"'{name}'" if name else "The file"
                notes.add(node, f"{where} takes exactly one of {', '.join(map(repr, group))}; {told}.")
        for key, told in self.keys.items():
            if key not in nodes and told.default is MISSING and key not in meant:
                notes.add(node, f"'{path}{key}' is missing: {told.rule.words}.")
            values.setdefault(key, told.default)
        if len(notes.problems) > n_before:
            return MISSING
        try:
            return self.make(**values, **({"line": line_of(node)} if self.with_line else {}))
        except ValueError as error:
            return notes.add(node, f"'{name}': {error}")


@dataclass(frozen=True)
class Tagged:
    """Records of several kinds, told apart by the value of one key."""

    key: str
    kinds: Mapping[str, Record]
    words: str

    def read(self, node: yaml.Node, name: str, notes: Notes) -> Any:
        """What the record of that kind gives."""
        if not isinstance(node, yaml.MappingNode):
            return _unfit(self, node, name, notes)
        n_before = len(notes.problems)
        nodes = _children(node, name, notes)
        if self.key not in nodes:
            near = [at for at, _ in nodes.values() if get_close_matches(at.value, [self.key], cutoff=0.5)]
            if near:
                notes.add(near[0], f"Unknown key '{name}.{near[0].value}'. Did you mean '{self.key}'?")
            elif len(notes.problems) == n_before:
                notes.add(node, f"'{name}.{self.key}' is missing: {one_of(*self.kinds).words}.")
            return MISSING
        kind = one_of(*self.kinds).read(nodes[self.key][1], f"{name}.{self.key}", notes)
        return MISSING if kind is MISSING else self.kinds[kind].read(node, name, notes)


@dataclass(frozen=True)
class Either:
    """One of several kinds of things, told apart by whether text, a list or a mapping stands there."""

    words: str
    text: Rule | None = None
    listed: Rule | None = None
    mapping: Rule | None = None
    wrap: bool = False
    """A single value stands for a list of one."""

    def read(self, node: yaml.Node, name: str, notes: Notes) -> Any:
        """What the rule for that kind of node gives."""
        kinds = {yaml.ScalarNode: self.text, yaml.SequenceNode: self.listed, yaml.MappingNode: self.mapping}
        rule = kinds[type(node)]  # type: ignore[index]
        if rule is None:
            return _unfit(self, node, name, notes)
        value = rule.read(node, name, notes)
        return (value,) if self.wrap and rule is self.text and value is not MISSING else value


def some(item: Rule, words: str) -> Either:
    """A list of things, or a single one."""
    return Either(words, text=item, listed=ListOf(item, words), wrap=True)


@dataclass(frozen=True)
class As:
    """A thing by its rule, turned into something else."""

    rule: Rule
    make: Callable[[Any], Any]
    """A ValueError from it says in a sentence what is wrong."""

    @property
    def words(self) -> str:
        """What is expected."""
        return self.rule.words

    def read(self, node: yaml.Node, name: str, notes: Notes) -> Any:
        """What `make` makes of the value."""
        value = self.rule.read(node, name, notes)
        try:
            return MISSING if value is MISSING else self.make(value)
        except ValueError as error:
            return _unfit(self, node, name, notes, f" {error}")


@dataclass(frozen=True)
class Document:
    """A YAML file that keeps to a rule."""

    rule: Rule
    what: str = "configuration"
    """What such a file is, for the head of the message."""

    def load(self, path: Path) -> Any:
        """What a file holds.

        Raises:
            ConfigError: it cannot be read, is no YAML, or is wrong; the message names every problem with its line.
        """
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"'{path}' cannot be read: {error}") from error
        return self.parse(text, str(path))

    def parse(self, text: str, name: str) -> Any:
        """What a text holds; `name` stands for it in messages.

        Raises:
            ConfigError: as `load`.
        """
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = (
                [] if mark is None else [Problem(mark.line + 1, mark.column + 1, f"No valid YAML: {error.problem}.")]
            )
            raise ConfigError(_message(name, self.what, where)) from error
        except yaml.YAMLError as error:  # such as a character that no YAML may have
            raise ConfigError(f"'{name}' is no valid YAML: {error}") from error
        if node is None:
            raise ConfigError(f"'{name}' is empty; expected {self.rule.words}.")
        notes = Notes()
        value = self.rule.read(node, "", notes)
        if notes.problems:
            raise ConfigError(_message(name, self.what, sorted(set(notes.problems))))
        return value


def _message(name: str, what: str, problems: Iterable[Problem]) -> str:
    lines = [f"line {one.line}, column {one.column}: {one.text}" for one in problems]
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    return "\n  ".join([f"'{name}' is no valid {what} ({count}):", *lines])


def _children(node: yaml.MappingNode, name: str, notes: Notes) -> dict[str, tuple[yaml.Node, yaml.Node]]:
    """From key to the nodes of key and value; a key that stands there twice, or is no text, is noted."""
    found: dict[str, tuple[yaml.Node, yaml.Node]] = {}
    for at, value in node.value:
        where = f" in '{name}'" if name else ""
        if not isinstance(at, yaml.ScalarNode):
            notes.add(at, f"A key{where} must be text, got {shown(at)}.")
        elif at.tag.endswith(":merge"):
            notes.add(at, f"'<<'{where} is not understood; write the keys out.")
        elif at.value in found:
            notes.add(at, f"'{at.value}' stands{where} twice, first in line {line_of(found[at.value][0])}.")
        else:
            found[at.value] = (at, value)
    return found
