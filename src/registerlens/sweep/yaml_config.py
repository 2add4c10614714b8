"""A sweep as a YAML file describes it: what may stand in the file, and what is read from it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from registerlens.errors import ConfigError, RegisterLensError
from registerlens.interventions.choices import Assign, Clear, Extreme, Mode, Start
from registerlens.settings import (
    AS_LIST,
    AS_MAPPING,
    AS_TEXT,
    BY_FORM,
    LISTED,
    READ,
    AboveZero,
    Count,
    Expected,
    Index,
    Many,
    Named,
    Number,
    Settings,
    Some,
    Text,
    Unquoted,
    line_of,
)

MetricName = Literal[
    "largest_norm", "outliers", "sink_outliers", "sink_patch", "cos_cls", "cos_patches", "cos_output", "kl",
    "agreement", "cross_entropy", "accuracy",
]  # fmt: skip

# Neurons, heads, tokens, layers ---------------------------------------------------------------------------------------


def _pair(value: Any) -> Any:
    return [Unquoted(part) for part in re.split("[.:]", value)] if isinstance(value, str) else value


def _layers(value: Any) -> Any:
    bounds = re.fullmatch(r"(\d+)(?:-(\d+))?", value) if isinstance(value, str) else None
    if bounds is None:
        return None if value == "all" else value
    first, last = int(bounds[1]), int(bounds[2] or bounds[1])
    if last < first:
        raise ValueError(f"A range goes from the lower layer to the higher one, not {value}.")
    return range(first, last + 1)


Pair = Annotated[
    tuple[Index, Index],
    BeforeValidator(_pair),
    Expected("a pair such as [9, 117] or 9.117 (layer, then neuron or head)"),
]
Layers = Annotated[
    Many[Index] | None, BeforeValidator(_layers), Expected("'all', a layer, a range such as 9-11, or a list of layers")
]
"""None stands for all."""
Places = Named[Many[Index]]
"""Patch indices by name."""
Source = Text
"""A list of neurons: "auto" (found on the images), "published:NAME", or a file."""
Heads = Annotated[
    Annotated[Literal["all"], AS_TEXT] | Annotated[Many[Pair], AS_LIST],
    BY_FORM,
    Expected("'all', or a list of pairs such as [[9, 0], [9, 3]] (layer, head)"),
]
Tokens = Annotated[
    Annotated[Many[Literal["all", "cls", "trained_registers"]], AS_LIST] | Annotated[Places, AS_MAPPING],
    BY_FORM,
    LISTED,
    Expected("'all', 'cls', 'trained_registers', a list of these, or names, each with patch indices"),
]


class NeuronsSpec(Settings):
    """Sets of neurons: one of these keys; all stands for {each: all}, PAIRS for {each: PAIRS}, NAME for {set: NAME}."""

    set: Source | None = None
    """A list of neurons as one set."""
    each: Annotated[Annotated[Source, AS_TEXT] | Annotated[Many[Pair], AS_LIST], BY_FORM] | None = None
    """Each neuron of a list alone; "all" are those of the model."""
    cumulative: Source | None = None
    """The first one of a ranking, the first two, and so on."""
    top_k: Some[Count] | None = None
    """The first k of a ranking."""
    random: Count | None = None
    """So many random sets, each as large as a list and in its layers."""
    matched: Count | None = None
    """The same of neurons about as active."""
    sets: Named[Many[Pair]] | None = None
    """Sets by name."""
    of: Source = "auto"
    """The list that top_k, random and matched refer to."""

    exactly_one: ClassVar = (("set", "each", "cumulative", "top_k", "random", "matched", "sets"),)

    @property
    def given(self) -> tuple[str, Any]:
        """The key that is there, and its value."""
        return next((name, value) for name, value in self if name != "of" and value is not None)


def _neurons(value: Any) -> Any:
    if isinstance(value, str) and value:
        return {"each" if value == "all" else "set": value}
    return {"each": value} if isinstance(value, list | tuple) else value


Neurons = Annotated[
    NeuronsSpec,
    BeforeValidator(_neurons),
    Expected(
        "'all', a list by name ('auto', 'published:NAME', a file), a list of pairs, or one of {top_k: [1, 2, 4], of: "
        "LIST}, {cumulative: LIST}, {each: LIST}, {random: N, of: LIST}, {matched: N, of: LIST}, {sets: {NAME: pairs}}"
    ),
]

# Numbers --------------------------------------------------------------------------------------------------------------


class _Range(Settings):
    low: Number
    high: Number
    n: Annotated[int, Field(strict=True, ge=2), READ, Expected("a whole number from 2")]


class _UpTo(Settings):
    up_to: Count


class ControlsSpec(Settings):
    """Controls of each condition of a grid."""

    n: Index
    """How many of each kind."""
    kinds: Some[Literal["random", "matched"]] = ("random",)
    """Any other neurons of the same layers, or such that get about as active."""


def _doses(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    span = _Range.model_validate(value)
    return tuple(span.low + (span.high - span.low) * i / (span.n - 1) for i in range(span.n))


def _doubled(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    most = _UpTo.model_validate(value).up_to
    return tuple(dict.fromkeys([0, *(2**i for i in range(most.bit_length())), most]))


Scales = Annotated[
    Some[Number], BeforeValidator(_doses), Expected("a number, a list of numbers, or {low: 0, high: 2, n: 5}")
]
Registers = Annotated[
    Some[Index],
    BeforeValidator(_doubled),
    Expected("a number of registers, a list of them, or {up_to: 8} for 0, 1, 2, 4, 8"),
]
Controls = Annotated[
    ControlsSpec,
    BeforeValidator(lambda value: {"n": value} if isinstance(value, str) and value else value),
    Expected("a number of random controls, or {n: 3, kinds: [random, matched]}"),
]

# Grids ----------------------------------------------------------------------------------------------------------------


class GridSpec(Settings):
    """One entry under `conditions`: a grid of one kind of edit. What is left out is left to the intervention, and is no
    factor of the result."""

    controls: Controls = ControlsSpec(n=0)
    """Controls of each condition."""

    @property
    def axes(self) -> dict[str, Any]:
        """The axes and their values: every key but kind and controls."""
        return {name: value for name, value in self if name not in ("kind", "controls") and value is not None}


class _OnTargets(GridSpec):
    neurons: Neurons | None = None
    heads: Heads | None = None
    tokens: Tokens | None = None
    layers: Layers = None

    exactly_one: ClassVar = (("neurons", "heads", "tokens"),)


class AblateSpec(_OnTargets):
    """Features are replaced."""

    kind: Literal["ablate"]
    modes: Some[Mode] | None = None


class ScaleSpec(_OnTargets):
    """Features are multiplied."""

    kind: Literal["scale"]
    scales: Scales


class RegistersSpec(GridSpec):
    """Test-time registers."""

    kind: Literal["registers"]
    neurons: Neurons
    n: Registers | None = None
    init: Some[Start] | None = None
    assign: Some[Assign] | None = None
    extreme: Some[Extreme] | None = None
    clear: Some[Clear] | None = None


class MoveSpec(GridSpec):
    """Outliers are moved."""

    kind: Literal["move"]
    neurons: Neurons
    to: Places
    extreme: Some[Extreme] | None = None
    clear: Some[Clear] | None = None


class AttentionBiasSpec(GridSpec):
    """Attention biases in the neurons' place."""

    kind: Literal["attention_bias"]
    neurons: Neurons


class InterpolateSpec(GridSpec):
    """Outliers are replaced by their neighbours."""

    kind: Literal["interpolate"]
    layers: Layers = None
    cutoff: AboveZero | None = None


class _Kind(Settings):
    kind: Literal["ablate", "scale", "registers", "move", "attention_bias", "interpolate"]


def _with_kind(value: Any) -> Any:
    """Refuse an entry with no kind, or a wrong one, before its other keys are looked at."""
    if isinstance(value, Mapping):
        _Kind.model_validate({key: value[key] for key in get_close_matches("kind", value, n=1, cutoff=0.5)})
    return value


Grid = Annotated[
    AblateSpec | ScaleSpec | RegistersSpec | MoveSpec | AttentionBiasSpec | InterpolateSpec,
    Field(discriminator="kind"),
    BeforeValidator(_with_kind),
    Expected("a grid such as {kind: ablate, heads: all}"),
]

# The file -------------------------------------------------------------------------------------------------------------


class ImagesSpec(Settings):
    """A set of images; for short, text or a list of it are files."""

    files: Some[Text] | None = None
    """Files, folders and globs."""
    folder: Text | None = None
    """A folder."""
    tensors: Text | None = None
    """A .npy file of preprocessed images."""
    dataset: Text | None = None
    """The name of a dataset on the Hugging Face Hub."""
    webdataset: Text | None = None
    """A pattern such as shards-{000..099}.tar."""
    size: Count | None = None
    """A side in pixels."""
    split: Text | None = None
    image_column: Text | None = None
    label_column: Text | None = None
    config: Text | None = None
    revision: Text | None = None
    shards: Count | None = None
    parts: Count | None = None

    exactly_one: ClassVar = (("files", "folder", "tensors", "dataset", "webdataset"),)

    @property
    def kind(self) -> str:
        """Where they come from: "files", "folder", "tensors", "dataset" or "webdataset"."""
        return next(name for name, value in self if value is not None)

    @property
    def where(self) -> Any:
        """The files, the folder, or whatever it is."""
        return getattr(self, self.kind)

    @property
    def options(self) -> dict[str, Any]:
        """Further keys, such as the split of a dataset."""
        return {name: value for name, value in self if name != self.kind and value is not None}

    @model_validator(mode="after")
    def _check_options(self) -> ImagesSpec:
        of_dataset = ("size", "split", "image_column", "label_column", "config", "revision", "shards")
        known = {"tensors": (), "dataset": of_dataset, "webdataset": ("size", "parts")}.get(self.kind, ("size",))
        if strange := [name for name in self.options if name not in known]:
            raise ValueError(f"'{strange[0]}' does not go with '{self.kind}'.")
        return self


Images = Annotated[
    ImagesSpec,
    BeforeValidator(lambda value: {"files": value} if isinstance(value, str | list) and value else value),
    Expected(
        "image files, folders or globs, or one of {files: [...]}, {folder: DIR}, {tensors: FILE.npy}, {dataset: NAME, "
        "split: ...}, {webdataset: PATTERN}"
    ),
]


class SweepConfig(Settings):
    """A sweep as a file describes it.

    Example:
        >>> text = "model: registerlens:tiny\\nimages: photos\\nconditions:\\n- {kind: ablate, heads: all}"
        >>> SweepConfig.from_text(text, "sweep.yaml").conditions[0].axes
        {'heads': 'all'}
    """

    model: Text | None = None
    """What to load, as for the other commands (see `registerlens models`)."""
    models: Named[Text] | None = None
    """Several, by name."""
    images: Images | None = None
    """Where they come from."""
    image_sets: Named[Images] | None = None
    """Several, by name."""
    labels: Text | None = None
    """A .npy file of labels, or a .csv file of image names and labels."""
    reference_images: Images | None = None
    """On which means and biases are fitted; without, on the images themselves."""
    conditions: Annotated[tuple[Grid, ...], Field(min_length=1), Expected("a list of grids")]
    """Grids, one after the other."""
    metrics: Some[MetricName] = ()
    """The default ones, if none is named."""
    device: Text = "cpu"
    """Where the models run: cpu, cuda, cuda:1 or mps."""
    batch_size: Count = 16
    """Images at once."""
    shard_size: Count = 256
    """Images of a part of the result."""
    seed: Index = 0
    """Seed of everything random."""

    exactly_one: ClassVar = (("model", "models"), ("images", "image_sets"))
    _file: tuple[str, Any] = PrivateAttr(("sweep.yaml", None))

    def model_post_init(self, context: Any) -> None:
        """Keep where it was read."""
        self._file = context or self._file

    @property
    def named_models(self) -> dict[str, str]:
        """Name -> what to load."""
        return self.models or {"model": self.model or ""}

    @property
    def named_images(self) -> dict[str, ImagesSpec]:
        """Name -> where they come from."""
        return self.image_sets or {"images": self.images or ImagesSpec()}

    @property
    def path(self) -> Path:
        """The file; names of files in it are relative to its folder."""
        return Path(self._file[0])

    def place(self, name: str) -> str:
        """A file named in the configuration, from where the program runs; a URL stays as it is."""
        return name if "://" in name else str(self.path.parent / name)

    def line(self, *keys: str | int) -> int:
        """Where something stands in the file."""
        return line_of(self._file[1], keys)

    @contextmanager
    def at(self, *keys: str | int) -> Iterator[None]:
        """Add to an error raised inside which line of the file it comes from.

        Raises:
            ConfigError: something went wrong.
        """
        try:
            yield
        except RegisterLensError as error:
            raise ConfigError(f"'{self.path}', line {self.line(*keys)}: {error}") from error
