"""The configuration of a sweep as a YAML file: what may stand in it, and what is read from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from registerlens.interventions.ablation import Mode
from registerlens.interventions.registers import Clear, Extreme
from registerlens.sweep.yaml_rules import (
    As,
    Document,
    Either,
    Key,
    ListOf,
    MapOf,
    Number,
    Record,
    Rule,
    Tagged,
    Text,
    one_of,
    some,
)

Pair = tuple[int, int]
How = Literal["all", "set", "each", "listed", "sets", "top_k", "cumulative", "random", "matched"]


@dataclass(frozen=True, kw_only=True)
class ImagesSpec:
    """A set of images, as it is named in the file."""

    kind: str
    """Where they come from: "files", "folder", "tensors", "dataset" or "webdataset"."""
    where: str | tuple[str, ...]
    """Files, folders and globs; a folder; a .npy or .safetensors file; the name of a dataset; a pattern of shards."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What else was said, such as the split of a dataset."""
    line: int = 1
    """Where it stands in the file."""


@dataclass(frozen=True, kw_only=True)
class NeuronsSpec:
    """Sets of neurons, as they are named in the file."""

    how: How
    """Every neuron alone; a list as one set, or each of it alone; pairs, each alone; named sets; the first k of a
    ranking; the first one, two and so on; random or activity-matched sets for a list."""
    source: str = ""
    """The list or ranking that is meant: "auto" (found on the images), "published:NAME" or a file."""
    pairs: tuple[Pair, ...] = ()
    """Of "listed"."""
    sets: Mapping[str, tuple[Pair, ...]] = field(default_factory=dict)
    """Of "sets"."""
    k: tuple[int, ...] = ()
    """Of "top_k"."""
    n: int = 0
    """How many sets are drawn."""


@dataclass(frozen=True, kw_only=True)
class ControlsSpec:
    """Controls of each condition of a grid."""

    n: int = 0
    """How many of each kind."""
    kinds: tuple[Literal["random", "matched"], ...] = ("random",)
    """Any other neurons of the same layers, or such that get about as active."""


@dataclass(frozen=True, kw_only=True)
class GridSpec:
    """One entry under `conditions`: a grid of one kind of edit."""

    kind: str
    """One of KINDS."""
    axes: Mapping[str, Any]
    """What it varies: neurons (NeuronsSpec), heads, tokens, layers, modes and so on, as in KINDS."""
    controls: ControlsSpec
    """Controls of each condition."""
    line: int = 1
    """Where it stands in the file."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A sweep as it is described in a file."""

    models: Mapping[str, str]
    """Name -> what to load."""
    images: Mapping[str, ImagesSpec]
    """Name -> where they come from."""
    conditions: tuple[GridSpec, ...]
    """Grids, one after the other."""
    metrics: tuple[str, ...]
    """Names of built-in metrics; none are the default ones."""
    labels: str
    """A .npy file of labels, or a .csv file of image names and labels; empty without."""
    reference_images: ImagesSpec | None
    """On which means and biases are fitted; None are the images themselves."""
    device: str
    """Where the models run."""
    batch_size: int
    """Images at once."""
    shard_size: int
    """Images of a part of the result."""
    seed: int
    """Of everything random."""
    path: Path = Path("sweep.yaml")
    """The file; names of files in it are relative to its folder."""

    @property
    def images_line(self) -> int:
        """Where the images are named."""
        return min(one.line for one in self.images.values())

    def place(self, name: str) -> str:
        """A file named in the configuration, from where the program runs; a URL stays as it is."""
        return name if "://" in name else str(self.path.parent / name)


# Pieces ---------------------------------------------------------------------------------------------------------------


def _pair(value: Any) -> Pair:
    first, second = value.replace(":", ".").split(".") if isinstance(value, str) else value
    return int(first), int(second)


def _layers(value: Any) -> tuple[int, ...] | None:
    """None stands for all."""
    if isinstance(value, tuple):
        return value
    first, _, last = value.partition("-")
    if value == "all":
        return None
    if last and int(last) < int(first):
        raise ValueError("A range goes from the lower layer to the higher one.")
    return tuple(range(int(first), int(last or first) + 1))


def _doses(value: Any) -> tuple[float, ...]:
    if isinstance(value, tuple):
        return value
    low, high, n = value["low"], value["high"], value["n"]
    return tuple(low + (high - low) * i / (n - 1) for i in range(n))


def _doubled(value: Any) -> tuple[int, ...]:
    if isinstance(value, tuple):
        return value
    most = value["up_to"]
    return tuple(dict.fromkeys([0, *(2**i for i in range(most.bit_length())), most]))


INDEX = Number("a whole number from 0", 0, whole=True)
COUNT = Number("a whole number from 1", 1, whole=True)
FACTOR = Number("a finite number")
_PAIR_WORDS = "a pair such as [9, 117] or 9.117 (layer, then neuron or head)"
PAIR = As(Either(_PAIR_WORDS, Text(_PAIR_WORDS, pattern=r"\d+[.:]\d+"), ListOf(INDEX, _PAIR_WORDS, 2, 2)), _pair)
PAIRS = ListOf(PAIR, f"a list of pairs, each {_PAIR_WORDS}")
_LAYER_WORDS = "'all', a layer, a range such as 9-11, or a list of layers"
LAYERS = As(Either(_LAYER_WORDS, Text(_LAYER_WORDS, pattern=r"all|\d+(-\d+)?"), ListOf(INDEX, _LAYER_WORDS)), _layers)
SOURCE = Text("'auto' (found on the images), 'published:NAME', or a file that `registerlens neurons --out` wrote")
PATH = Text("the path of a file")


def _set_of(value: Any) -> NeuronsSpec:
    if isinstance(value, str):
        return NeuronsSpec(how="all") if value == "all" else NeuronsSpec(how="set", source=value)
    return NeuronsSpec(how="listed", pairs=value)


def _neurons(top_k: Any, cumulative: Any, each: Any, random: Any, matched: Any, sets: Any, of: Any) -> NeuronsSpec:
    if top_k is not None:
        return NeuronsSpec(how="top_k", k=top_k, source=of)
    if sets is not None:
        return NeuronsSpec(how="sets", sets=sets)
    if random is not None or matched is not None:
        return NeuronsSpec(how="random" if matched is None else "matched", n=random or matched or 0, source=of)
    return NeuronsSpec(how="each" if cumulative is None else "cumulative", source=each or cumulative or "")


_NEURON_WORDS = (
    "'all', a list by name ('auto', 'published:NAME', a file), a list of pairs, or one of {top_k: [1, 2, 4], of: LIST}"
    ", {cumulative: LIST}, {each: LIST}, {random: N, of: LIST}, {matched: N, of: LIST}, {sets: {NAME: pairs}}"
)
_SETS = Record(
    {
        "top_k": Key(some(COUNT, "numbers of neurons, such as [1, 2, 4]"), None),
        "cumulative": Key(SOURCE, None),
        "each": Key(SOURCE, None),
        "random": Key(COUNT, None),
        "matched": Key(COUNT, None),
        "sets": Key(MapOf(PAIRS, "names, each with a list of pairs"), None),
        "of": Key(SOURCE, "auto"),
    },
    _NEURON_WORDS,
    (("top_k", "cumulative", "each", "random", "matched", "sets"),),
    _neurons,
)
NEURONS = Either(_NEURON_WORDS, As(SOURCE, _set_of), As(PAIRS, _set_of), _SETS)
_HEAD_WORDS = "'all', or a list of pairs such as [[9, 0], [9, 3]] (layer, head)"
HEADS = Either(_HEAD_WORDS, one_of("all"), PAIRS)
_TOKEN_WORDS = "'all', 'cls', 'trained_registers', a list of these, or names, each with patch indices"
TOKENS = Either(
    _TOKEN_WORDS,
    As(one_of("all", "cls", "trained_registers"), lambda value: (value,)),
    ListOf(one_of("cls", "trained_registers"), _TOKEN_WORDS),
    MapOf(ListOf(INDEX, "a list of patch indices"), _TOKEN_WORDS),
)
_SCALE_WORDS = "a number, a list of numbers, or {low: 0, high: 2, n: 5}"
_RANGE = {"low": Key(FACTOR), "high": Key(FACTOR), "n": Key(Number("a whole number from 2", 2, whole=True))}
SCALES = As(
    Either(
        _SCALE_WORDS,
        As(Number(_SCALE_WORDS), lambda value: (value,)),
        ListOf(FACTOR, _SCALE_WORDS),
        Record(_RANGE, _SCALE_WORDS),
    ),
    _doses,
)
_N_WORDS = "a number of registers, a list of them, or {up_to: 8} for 0, 1, 2, 4, 8"
REGISTERS = As(
    Either(
        _N_WORDS,
        As(Number(_N_WORDS, 0, whole=True), lambda value: (value,)),
        ListOf(INDEX, _N_WORDS),
        Record({"up_to": Key(COUNT)}, _N_WORDS),
    ),
    _doubled,
)
_CONTROL_WORDS = "a number of random controls, or {n: 3, kinds: [random, matched]}"
CONTROLS = Either(
    _CONTROL_WORDS,
    As(Number(_CONTROL_WORDS, 0, whole=True), lambda n: ControlsSpec(n=n)),
    mapping=Record(
        {"n": Key(COUNT), "kinds": Key(some(one_of("random", "matched"), "'random', 'matched' or both"), ("random",))},
        _CONTROL_WORDS,
        make=ControlsSpec,
    ),
)


def _words_of(*choices: str) -> Rule:
    return some(one_of(*choices), f"{one_of(*choices).words}, or a list of these")


# The file -------------------------------------------------------------------------------------------------------------

_TARGETS = {"neurons": Key(NEURONS, None), "heads": Key(HEADS, None), "tokens": Key(TOKENS, None)}
_WHERE = {"layers": Key(LAYERS, None)}
_OPTIONS = {"extreme": Key(_words_of(*get_args(Extreme)), None), "clear": Key(_words_of(*get_args(Clear)), None)}
KINDS: Mapping[str, tuple[Mapping[str, Key], tuple[tuple[str, ...], ...]]] = {
    "ablate": ({**_TARGETS, **_WHERE, "modes": Key(_words_of(*get_args(Mode)), None)}, (tuple(_TARGETS),)),
    "scale": ({**_TARGETS, **_WHERE, "scales": Key(SCALES)}, (tuple(_TARGETS),)),
    "registers": (
        {
            "neurons": Key(NEURONS),
            "n": Key(REGISTERS, None),
            "init": Key(_words_of("zero", "gaussian", "mean"), None),
            "assign": Key(_words_of("all", "random"), None),
            **_OPTIONS,
        },
        (),
    ),
    "move": (
        {
            "neurons": Key(NEURONS),
            "to": Key(MapOf(ListOf(INDEX, "a list of patch indices"), "names, each with a list of patch indices")),
            **_OPTIONS,
        },
        (),
    ),
    "attention_bias": ({"neurons": Key(NEURONS)}, ()),
    "interpolate": ({**_WHERE, "cutoff": Key(Number("a norm above 0", 1e-300), None)}, ()),
}
"""Kind of a grid -> its keys, and the groups of which exactly one key must be there. What is not said is left to the
intervention, and is no factor of the result."""


def _grid(kind: str) -> Record:
    keys, groups = KINDS[kind]
    common = {"kind": Key(one_of(kind)), "controls": Key(CONTROLS, ControlsSpec())}

    def make(line: int, controls: ControlsSpec, **axes: Any) -> GridSpec:
        told = {name: value for name, value in axes.items() if name != "kind" and value is not None}
        return GridSpec(kind=kind, axes=told, controls=controls, line=line)

    return Record({**common, **keys}, f"the keys of a grid of kind '{kind}'", groups, make, with_line=True)


_OPTIONS_OF: Mapping[str, tuple[str, ...]] = {
    "files": ("size",),
    "folder": ("size",),
    "tensors": (),
    "dataset": ("size", "split", "image_column", "label_column", "config", "revision", "shards"),
    "webdataset": ("size", "parts"),
}
"""Where images come from -> what else can be said of it."""


def _images(line: int, **values: Any) -> ImagesSpec:
    told = {name: value for name, value in values.items() if value is not None}
    [kind] = [name for name in _OPTIONS_OF if name in told]
    where = told.pop(kind)
    if strange := [name for name in told if name not in _OPTIONS_OF[kind]]:
        raise ValueError(f"'{strange[0]}' does not go with '{kind}'.")
    return ImagesSpec(kind=kind, where=where, options=told, line=line)  # type: ignore[arg-type]


_IMAGE_WORDS = (
    "image files, folders or globs, or one of {files: [...]}, {folder: DIR}, {tensors: FILE.npy}, {dataset: NAME, "
    "split: ...}, {webdataset: PATTERN}"
)
_PLACE = Text("a file, folder or glob")
IMAGES = Either(
    _IMAGE_WORDS,
    As(Text(_IMAGE_WORDS), lambda value: ImagesSpec(kind="files", where=(value,))),
    As(ListOf(_PLACE, _IMAGE_WORDS), lambda value: ImagesSpec(kind="files", where=value)),
    Record(
        {
            "files": Key(some(_PLACE, "a file, folder or glob, or a list of them"), None),
            "folder": Key(Text("a folder"), None),
            "tensors": Key(Text("a .npy file of preprocessed images"), None),
            "dataset": Key(Text("the name of a dataset on the Hugging Face Hub"), None),
            "webdataset": Key(Text("a pattern such as shards-{000..099}.tar"), None),
            "size": Key(Number("a side in pixels", 1, whole=True), None),
            "split": Key(Text("the split of a dataset"), None),
            "image_column": Key(Text("the column of the images"), None),
            "label_column": Key(Text("the column of the labels"), None),
            "config": Key(Text("a configuration of the dataset"), None),
            "revision": Key(Text("a branch, tag or commit of the dataset"), None),
            "shards": Key(COUNT, None),
            "parts": Key(COUNT, None),
        },
        _IMAGE_WORDS,
        (tuple(_OPTIONS_OF),),
        _images,
        with_line=True,
    ),
)
MODEL = Text("a model's name, as for the other commands (see `registerlens models`)")


def document(metrics: Iterable[str] = ()) -> Document:
    """The schema of the file.

    Args:
        metrics: names of the built-in metrics; without them any name is taken.

    Example:
        >>> text = "model: registerlens:tiny\\nimages: photos\\nconditions:\\n- {kind: ablate, heads: all}"
        >>> document().parse(text, "sweep.yaml").conditions[0].axes["heads"]
        'all'
    """
    names = tuple(metrics)
    metric = one_of(*names) if names else Text("the name of a metric")
    keys = {
        "model": Key(MODEL, None),
        "models": Key(MapOf(MODEL, "names, each with a model"), None),
        "images": Key(IMAGES, None),
        "image_sets": Key(MapOf(IMAGES, "names, each with images"), None),
        "labels": Key(PATH, ""),
        "reference_images": Key(IMAGES, None),
        "conditions": Key(ListOf(Tagged("kind", {kind: _grid(kind) for kind in KINDS}, "a grid"), "a list of grids")),
        "metrics": Key(some(metric, f"{metric.words}, or a list of these"), ()),
        "device": Key(Text("cpu, cuda, cuda:1 or mps"), "cpu"),
        "batch_size": Key(COUNT, 16),
        "shard_size": Key(COUNT, 256),
        "seed": Key(INDEX, 0),
    }
    return Document(Record(keys, "the keys of a sweep", (("model", "models"), ("images", "image_sets")), _config))


def read_config(path: Path, metrics: Iterable[str] = ()) -> SweepConfig:
    """The sweep that a file describes.

    Raises:
        ConfigError: it cannot be read, or something in it is wrong; every problem is named, with its line.
    """
    return replace(document(metrics).load(path), path=path)


def _config(model: Any, models: Any, images: Any, image_sets: Any, **values: Any) -> SweepConfig:
    return SweepConfig(
        models=models or {"model": model},
        images=image_sets or {"images": images},
        **values,
    )
