"""Settings from a YAML or JSON file or from Python: declared with pydantic, and everything wrong is named at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

from registerlens.errors import ConfigError, close_matches

Thing = TypeVar("Thing")
Kind = TypeVar("Kind", bound="Settings")


class Settings(BaseModel):
    """What may be set: base class of everything that is read from a configuration, frozen and checked when it is made.

    Example:
        >>> class Walk(Settings):
        ...     steps: Count
        >>> Walk.from_text("steps: 0\\nstep: 2", "walk.yaml")
        Traceback (most recent call last):
        registerlens.errors.ConfigError: 'walk.yaml' is no valid configuration (2 problems):
          line 1, column 1: 'steps' is 0, expected a whole number from 1.
          line 2, column 1: Unknown key 'step'. Did you mean 'steps'? Keys here: ...
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    exactly_one: ClassVar[tuple[tuple[str, ...], ...]] = ()
    """Groups of keys of which exactly one must be given."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError("\n".join(text for *_, text in _problems(error, values))) from None

    # Settings inside of others are then checked by the outermost ones, which alone know where they stand.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def from_file(cls: type[Kind], path: str | Path) -> Kind:
        """What a file sets.

        Raises:
            ConfigError: it cannot be read, is no YAML, or is wrong; the message names every problem with its line.
        """
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"'{path}' cannot be read: {error}") from error
        return cls.from_text(text, str(path))

    @classmethod
    def from_text(cls: type[Kind], text: str, name: str) -> Kind:
        """What a text sets; `name` stands for it in messages.

        Raises:
            ConfigError: as `from_file`.
        """
        data, problems = None, list[tuple[int, int, str]]()
        try:
            loader = _Loader(text)
            data, problems = loader.get_single_data(), loader.problems
            settings = cls.model_validate(_Mapping() if data is None else data, context=(name, data))
        except yaml.MarkedYAMLError as error:
            problems.append((*_at(error.problem_mark or error.context_mark), f"No valid YAML: {error.problem}."))
        except (yaml.YAMLError, RecursionError) as error:  # a character that no YAML may have; too many brackets
            problems.append((1, 1, f"No valid YAML: {error}"))
        except ValidationError as error:
            problems += _problems(error, data)
        else:
            if not problems:
                return settings
        lines = [f"line {line}, column {column}: {problem}" for line, column, problem in sorted(set(problems))]
        count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
        raise ConfigError("\n  ".join([f"'{name}' is no valid configuration ({count}):", *lines])) from None

    def changed(self: Kind, **values: Any) -> Kind:
        """The same settings with other values for some of them, checked anew."""
        return type(self)(**dict(self) | values)

    @model_validator(mode="wrap")
    @classmethod
    def _check_keys(cls, values: Any, handler: Callable[[Any], Any]) -> Any:
        """Say what unknown keys may have meant, and hold to `exactly_one`."""
        if isinstance(values, cls):
            return values
        known = cls.model_fields
        if not isinstance(values, Mapping):
            raise _error("no_keys", f"expected keys with values: {', '.join(known)}")
        meant = {
            match for key in values if key not in known for match in get_close_matches(str(key), known, cutoff=0.5)
        }
        problems = [_exactly_one(group, values) for group in cls.exactly_one if not meant & set(group)]
        details = [_detail(problem, values) for problem in problems if problem]
        settings = None
        try:
            settings = handler(values)
        except ValidationError as error:
            for wrong in _errors(error):
                key = wrong["loc"][0] if len(wrong["loc"]) == 1 else None
                if wrong["type"] == "extra_forbidden" and key is not None:
                    hint = f"{close_matches(str(key), known)} Keys here: {', '.join(known)}."
                    details.append(_detail(f"Unknown key '{{path}}'.{hint}", values, key))
                elif wrong["type"] != "missing" or key is None:
                    details.append(_detail(_text(wrong), wrong["input"], *wrong["loc"]))
                elif key not in meant:
                    details.append(_detail(f"'{{inside}}{key}' is missing: {_words(known[str(key)])}.", values))
        if details:
            raise ValidationError.from_exception_data(cls.__name__, details)
        return settings


@dataclass(frozen=True)
class Expected:
    """In `Annotated`: how to say what is expected, where it takes more words than pydantic has for it."""

    words: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def check(value: Any, handler: Callable[[Any], Any]) -> Any:
            try:
                return handler(value)
            except ValidationError as error:
                if any(_is_of_form(wrong) for wrong in _errors(error)):
                    text = f"{{what}} is {_shown(value)}, expected {self.words}."
                    raise _error(_OF_FORM, text) from None
                raise

        return core_schema.no_info_wrap_validator_function(check, handler(source))


# Kinds of values ------------------------------------------------------------------------------------------------------


class Unquoted(str):
    """Text without quotation marks: where a number or a truth value is expected, it may stand for one."""


def _meaning(value: Any) -> Any:
    if not isinstance(value, Unquoted):
        return value
    for kind in (int, float):
        with suppress(ValueError):
            return kind(value)
    return yaml.SafeLoader.bool_values.get(value.lower(), value or None)


def _listed(value: Any) -> Any:
    return [value] if _form(value) == "<text>" else value


_FORMS = "<text>", "<list>", "<mapping>"


def _form(value: Any) -> str:
    kinds = (str, Sequence, Mapping)
    return next((form for form, kind in zip(_FORMS, kinds, strict=True) if isinstance(value, kind)), _FORMS[0])


READ = BeforeValidator(_meaning)
Count = Annotated[int, Field(strict=True, ge=1), READ, Expected("a whole number from 1")]
Index = Annotated[int, Field(strict=True, ge=0), READ, Expected("a whole number from 0")]
Whole = Annotated[int, Field(strict=True), READ, Expected("a whole number")]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False), READ, Expected("a finite number")]
AtLeastZero = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False), READ, Expected("a number from 0")]
AboveZero = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False), READ, Expected("a number above 0")]
Flag = Annotated[bool, Field(strict=True), READ, Expected("true or false")]
Text = Annotated[str, Field(min_length=1)]
LISTED = BeforeValidator(_listed)
"""A single thing stands for a list of one."""
Many = Annotated[tuple[Thing, ...], Field(min_length=1), Expected("a list with something in it")]
Some = Annotated[Many[Thing], LISTED]
Named = Annotated[dict[Text, Thing], Field(min_length=1), Expected("names, each with what it stands for")]
AS_TEXT, AS_LIST, AS_MAPPING = map(Tag, _FORMS)
BY_FORM = Discriminator(_form)
"""With the tags before: which of several kinds of values is meant depends on how it is written."""


# Problems -------------------------------------------------------------------------------------------------------------

_COMPLETE, _OF_FORM = "said", "of_form"
"""Types of errors whose text is complete but for the names that `_problems` fills in; the second kind is `Expected`'s,
of which only the outermost is reported."""


def _errors(error: ValidationError) -> list[Any]:
    """Without those that say of a list whose items are wrong that it is too short of right ones."""
    errors: list[Any] = [*error.errors(include_url=False)]
    return [each for each in errors if each["type"] != "too_short" or len(each["input"]) < each["ctx"]["min_length"]]


def _error(kind: str, text: str) -> PydanticCustomError:
    return PydanticCustomError(kind, text)  # type: ignore[arg-type]  (which wants literals, as it fills in no names)


def _detail(text: str, value: Any, *loc: int | str) -> InitErrorDetails:
    return InitErrorDetails(type=_error(_COMPLETE, text), loc=loc, input=value)


def _is_of_form(error: Any) -> bool:
    """Whether something of another form was expected, and not only something else inside of it."""
    inside = [part for part in error["loc"] if part not in _FORMS]
    if error["type"] == "missing":  # of a pair
        return len(inside) == 1
    return not inside and error["type"] not in (_COMPLETE, "value_error")


def _exactly_one(group: Sequence[str], values: Mapping[str, Any]) -> str:
    there = [key for key in group if key in values]
    if len(there) == 1:
        return ""
    complaint = f"{' and '.join(map(repr, there))} are given" if there else "none of them is given"
    return f"{{what}} takes exactly one of {', '.join(map(repr, group))}; {complaint}."


def _words(field: Any) -> str:
    choices = " or ".join(map(repr, get_args(field.annotation)))
    return next((expected.words for expected in reversed(field.metadata) if isinstance(expected, Expected)), choices)


def _text(error: Any) -> str:
    """One of pydantic's errors in our words, with room for names."""
    if error["type"] in (_COMPLETE, _OF_FORM):
        return error["msg"]
    if error["type"] == "value_error":
        return f"{{at}}{error['ctx']['error']}"
    hint = ""
    if error["type"] == "literal_error":
        hint = close_matches(str(error["input"]), re.findall("'([^']*)'", error["ctx"]["expected"]))
    return f"{{what}} is {_shown(error['input'])}, {error['msg'].replace('Input should be', 'expected')}.{hint}"


def _problems(error: ValidationError, data: Any) -> list[tuple[int, int, str]]:
    """Line, column and text of everything that is wrong."""
    problems = []
    for wrong in _errors(error):
        path, mark = _place(data, wrong["loc"])
        text = _text(wrong).replace("{path}", path).replace("{what}", f"'{path}'" if path else "The file")
        text = text.replace("{at}", f"'{path}': " if path else "").replace("{inside}", f"{path}." if path else "")
        problems.append((*_at(mark), text))
    return problems


def _place(data: Any, loc: Sequence[int | str]) -> tuple[str, yaml.Mark | None]:
    """The path of a place in what was read, and where it stands; what only the models know of is passed over."""
    path, mark = "", None
    for part in loc:
        held = range(len(data)) if isinstance(data, list | tuple) else data if isinstance(data, Mapping) else ()
        if part in held:
            mark = getattr(data, "marks", {}).get(part)
            path += f"[{part}]" if isinstance(part, int) else f".{part}"
            data = data[part]  # type: ignore[index]
    return path.removeprefix("."), mark


def line_of(data: Any, loc: Sequence[int | str]) -> int:
    """In which line of a file something stands; `data` is what `from_text` gives as context."""
    return _at(_place(data, loc)[1])[0]


def _at(mark: yaml.Mark | None) -> tuple[int, int]:
    return (1, 1) if mark is None else (mark.line + 1, mark.column + 1)


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a mapping of {len(value)} keys"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)} items"
    return "nothing" if value in ("", None) else repr(_meaning(value))


# YAML -----------------------------------------------------------------------------------------------------------------


class _Mapping(dict[str, Any]):
    """Keys with values, and where each stands."""

    def __init__(self) -> None:
        self.marks: dict[str, yaml.Mark] = {}


class _List(list[Any]):
    """Items, and where each stands."""

    def __init__(self) -> None:
        self.marks: dict[int, yaml.Mark] = {}


def _construct(loader: _Loader, node: yaml.Node) -> Any:
    if isinstance(node, yaml.ScalarNode):
        text = "" if node.tag.endswith(":null") else node.value
        return Unquoted(text) if node.style is None else text
    if isinstance(node, yaml.SequenceNode):
        items = _List()
        for i, item in enumerate(node.value):
            items.marks[i] = item.start_mark
            items.append(loader.construct_object(item))
        return items
    mapping = _Mapping()
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            problem = "A key must be text."
        elif key.tag.endswith(":merge"):
            problem = "'<<' is not understood; write the keys out."
        elif key.value in mapping:
            problem = f"'{key.value}' stands twice, first in line {_at(mapping.marks[key.value])[0]}."
        else:
            mapping.marks[key.value] = key.start_mark
            mapping[key.value] = loader.construct_object(value)
            continue
        loader.problems.append((*_at(key.start_mark), problem))
    return mapping


class _Loader(yaml.SafeLoader):
    """Reads nothing but text, lists and mappings, whatever the tags say."""

    yaml_constructors: ClassVar = {None: _construct}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.problems: list[tuple[int, int, str]] = []
        """Keys that are left out, and why."""
