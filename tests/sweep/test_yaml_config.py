"""The configuration of a sweep: what is right is read, and everything wrong is named with its line."""

from pathlib import Path

import pytest

from registerlens.errors import ConfigError
from registerlens.sweep.yaml_config import ControlsSpec, NeuronsSpec, SweepConfig

GRID = "conditions: [{kind: ablate, heads: all}]"

FULL = """\
# A comment.
models: {small: registerlens:tiny, other: timm:vit_tiny_patch16_224}
image_sets:
  photos: photos/*.png
  listed: [a.png, b]
  hub: {dataset: user/name, split: test, image_column: img, shards: 100}
reference_images: {folder: reference}
labels: labels.csv
metrics: [largest_norm, outliers]
batch_size: 8
shard_size: 64
seed: 3
device: cuda:1
conditions:
  - kind: ablate
    neurons: all
    layers: 2-4
    modes: [zero, mean]
    controls: 2
  - kind: ablate
    heads: all
  - {kind: ablate, heads: [[1, 0], 1.5, 2:3], modes: mean}
  - {kind: ablate, tokens: [cls, trained_registers], layers: 3}
  - {kind: ablate, tokens: {corner: [0, 7]}, layers: [0, 5]}
  - {kind: scale, neurons: "published:dinov2_vitl14", scales: {low: 0, high: 1, n: 3}}
  - {kind: scale, neurons: {top_k: [1, 2, 4], of: neurons.json}, scales: [0, 1e-1]}
  - {kind: ablate, neurons: {cumulative: auto}}
  - {kind: ablate, neurons: {each: auto}}
  - {kind: ablate, neurons: {random: 5, of: auto}}
  - {kind: ablate, neurons: {matched: 2}, controls: {n: 1, kinds: [random, matched]}}
  - {kind: ablate, neurons: {sets: {mine: [[1, 3], [2, 4]], yours: [1.9]}}}
  - {kind: ablate, neurons: [[1, 183], [1, 103]]}
  - {kind: registers, neurons: auto, n: {up_to: 6}, init: [zero, mean]}
  - {kind: registers, neurons: auto, n: 2}
  - {kind: move, neurons: auto, to: {corner: [0]}}
  - {kind: attention_bias, neurons: auto}
  - {kind: interpolate, layers: 5, cutoff: 75.5}
"""


def problems(text):
    """The lines of the message, without its head."""
    with pytest.raises(ConfigError) as caught:
        SweepConfig.from_text(text, "sweep.yaml")
    head, *lines = str(caught.value).split("\n  ")
    assert head.startswith("'sweep.yaml' is no valid configuration") and f"({len(lines)} problem" in head
    return lines


def small(conditions, more=""):
    return f"model: registerlens:tiny\nimages: photos\nconditions:\n{conditions}\n{more}"


def test_everything_that_may_be_said_is_read(tmp_path):
    (tmp_path / "sweep.yaml").write_text(FULL)
    config = SweepConfig.from_file(tmp_path / "sweep.yaml")
    assert config.named_models == {"small": "registerlens:tiny", "other": "timm:vit_tiny_patch16_224"}
    assert [(one.kind, one.where) for one in config.named_images.values()] == [
        ("files", ("photos/*.png",)), ("files", ("a.png", "b")), ("dataset", "user/name")
    ]  # fmt: skip
    assert config.named_images["hub"].options == {"split": "test", "image_column": "img", "shards": 100}
    assert config.reference_images.kind == "folder" and config.labels == "labels.csv"
    assert (config.batch_size, config.shard_size, config.seed, config.device) == (8, 64, 3, "cuda:1")
    assert config.metrics == ("largest_norm", "outliers")
    assert config.place("labels.csv") == str(tmp_path / "labels.csv")
    grids = config.conditions
    assert [config.line("conditions", i) for i in range(3)] == [15, 20, 22] and config.line("image_sets") == 3
    assert grids[0].axes == {"neurons": NeuronsSpec(each="all"), "layers": (2, 3, 4), "modes": ("zero", "mean")}
    assert grids[0].controls == ControlsSpec(n=2) and grids[1].controls.n == 0
    assert grids[1].axes == {"heads": "all"}
    assert grids[2].axes == {"heads": ((1, 0), (1, 5), (2, 3)), "modes": ("mean",)}
    assert grids[3].axes == {"tokens": ("cls", "trained_registers"), "layers": (3,)}
    assert grids[4].axes == {"tokens": {"corner": (0, 7)}, "layers": (0, 5)}
    assert grids[5].axes == {"neurons": NeuronsSpec(set="published:dinov2_vitl14"), "scales": (0, 0.5, 1)}
    assert grids[6].axes["neurons"] == NeuronsSpec(top_k=(1, 2, 4), of="neurons.json")
    assert grids[6].axes["scales"] == (0.0, 0.1)
    assert [grids[i].axes["neurons"].given[0] for i in (7, 8, 9, 10)] == ["cumulative", "each", "random", "matched"]
    assert (grids[9].axes["neurons"].random, grids[10].axes["neurons"].of) == (5, "auto")
    assert grids[10].controls == ControlsSpec(n=1, kinds=("random", "matched"))
    assert grids[11].axes["neurons"].sets == {"mine": ((1, 3), (2, 4)), "yours": ((1, 9),)}
    assert grids[12].axes["neurons"] == NeuronsSpec(each=((1, 183), (1, 103)))
    assert grids[13].axes["n"] == (0, 1, 2, 4, 6) and grids[13].axes["init"] == ("zero", "mean")
    assert grids[14].axes == {"neurons": NeuronsSpec(set="auto"), "n": (2,)}
    assert grids[15].axes["to"] == {"corner": (0,)}
    assert grids[17].axes == {"layers": (5,), "cutoff": 75.5}
    assert {one.kind for one in grids} == {"ablate", "scale", "registers", "move", "attention_bias", "interpolate"}


def test_what_is_not_said_has_a_default():
    config = SweepConfig.from_text(small("- {kind: ablate, heads: all}"), "x")
    assert config.named_models == {"model": "registerlens:tiny"} and list(config.named_images) == ["images"]
    assert (config.batch_size, config.shard_size, config.seed, config.metrics, config.labels) == (16, 256, 0, (), None)


def test_all_problems_are_named_at_once_in_order_with_line_got_expected_and_suggestion():
    text = """\
modle: registerlens:tiny
images: photos
batch_size: none
metrics: [largest_norm, outlers]
conditions:
  - kind: ablat
    heads: all
  - kind: ablate
    heads: [[1]]
    modes: [zero, men]
  - kind: scale
    neurons: all
    layer: 3
    scales: [0, big]
sed: 4
shard_size: 0
"""
    found = problems(text)
    assert [line.split(",")[0] for line in found] == [f"line {n}" for n in (1, 3, 4, 6, 9, 10, 13, 14, 15, 16)]
    told = dict(
        zip(("model", "batch", "metric", "kind", "heads", "mode", "layer", "scale", "sed", "shard"), found, strict=True)
    )
    assert "Unknown key 'modle'. Did you mean 'model'" in told["model"]
    assert told["batch"] == "line 3, column 1: 'batch_size' is 'none', expected a whole number from 1."
    assert "'metrics[1]' is 'outlers'" in told["metric"] and "Did you mean 'outliers'" in told["metric"]
    assert "'conditions[0].kind' is 'ablat'" in told["kind"] and "Did you mean 'ablate'?" in told["kind"]
    assert "'conditions[1].heads[0]' is a list of 1 items, expected a pair such as [9, 117]" in told["heads"]
    assert "Did you mean 'zero'" not in told["mode"] and "'mean'" in told["mode"]
    assert "Unknown key 'conditions[2].layer'. Did you mean 'layers'" in told["layer"]
    assert "'big', expected a finite number" in told["scale"]
    assert "Did you mean 'seed'" in told["sed"]
    assert "'shard_size' is 0, expected a whole number from 1" in told["shard"]


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("images: photos\n" + GRID, 1, "exactly one of 'model', 'models'; none"),
        ("model: a\nmodels: {b: c}\nimages: p\n" + GRID, 1, "'model' and 'models' are given"),
        ("model: a\nimages: p", 1, "'conditions' is missing: a list of grids"),
        ("model: a\nimages: p\nconditions: []", 3, "'conditions' is a list of 0 items"),
        ("model: a\nimages: p\nconditions: 5", 3, "expected a list of grids"),
        ("model: a\nimages: p\nseed: -1\n" + GRID, 3, "a whole number from 0"),
        ("model: a\nimages: p\nseed: 1.5\n" + GRID, 3, "a whole number from 0"),
        ("model: a\nimages: p\nseed: '1'\n" + GRID, 3, "'1', expected a whole number"),
        ("model: a\nimages:\n" + GRID, 2, "'images' is nothing, expected image files"),
        ("model: a\nimages: {folder: p, files: q}\n" + GRID, 2, "'files' and 'folder' are given"),
        ("model: a\nmodel: b\nimages: p\n" + GRID, 2, "'model' stands twice, first in line 1"),
        ("model: a\nimages: {folder: p, split: test}\n" + GRID, 2, "'images': 'split' does not go with 'folder'"),
        (small("- kind: ablate"), 4, "exactly one of 'neurons', 'heads', 'tokens'; none"),
        (small("- {kind: ablate, heads: all, neurons: all}"), 4, "'neurons' and 'heads' are given"),
        (small("- heads: all"), 4, "'conditions[0].kind' is missing: 'ablate' or"),
        (small("- knd: ablate\n  heads: all"), 4, "Unknown key 'conditions[0].knd'. Did you mean 'kind'?"),
        (small("- ablate"), 4, "'conditions[0]' is 'ablate', expected a grid"),
        (small("- {kind: scale, neurons: all}"), 4, "'conditions[0].scales' is missing: a number, a list"),
        (small("- {kind: scale, neurons: all, scales: .inf}"), 4, "'.inf', expected a finite number"),
        (small("- {kind: scale, neurons: all, scales: {low: 0, high: 1, n: 1}}"), 4, "expected a whole number from 2"),
        (small("- {kind: ablate, neurons: {topk: [1]}}"), 4, "'conditions[0].neurons.topk'. Did you mean 'top_k'?"),
        (small("- {kind: ablate, neurons: {top_k: [1], cumulative: auto}}"), 4, "'cumulative' and 'top_k' are given"),
        (small("- {kind: ablate, neurons: {top_k: [0]}}"), 4, "'conditions[0].neurons.top_k[0]' is 0"),
        (small("- {kind: ablate, heads: some}"), 4, "heads' is 'some', expected 'all', or a list of pairs"),
        (small("- {kind: ablate, heads: all, layers: 3-x}"), 4, "'3-x', expected 'all', a layer, a range"),
        (small("- {kind: ablate, heads: all, layers: 4-2}"), 4, "A range goes from the lower"),
        (small("- {kind: ablate, heads: [[1, 2], [1, -2]]}"), 4, "'conditions[0].heads[1][1]' is -2"),
        (small("- {kind: ablate, tokens: [cls, patches]}"), 4, "expected 'all', 'cls' or 'trained_registers'"),
        (small("- {kind: registers, neurons: auto, modes: zero}"), 4, "Unknown key 'conditions[0].modes'"),
        (small("- {kind: interpolate, cutoff: 0}"), 4, "a number above 0"),
        (small("- {kind: ablate, heads: all, controls: many}"), 4, "controls' is 'many', expected a whole number"),
        (small("- {kind: ablate, heads: all, controls: {n: 1, kinds: [randm]}}"), 4, "Did you mean 'random'?"),
        ("- a\n- b", 1, "The file is a list of 2 items"),
        ("model: a\n  images: p", 2, "No valid YAML"),
        ("model: [a\nimages: p", 2, "No valid YAML"),
        ("model: a\n? [x]\n: b\nimages: p\n" + GRID, 2, "A key must be text"),
        (f"{small('- &g {kind: ablate, heads: all}')}more: {{<<: *g}}", 5, "Unknown key 'more'"),
        (small("- &g {kind: ablate, heads: all}\n- {<<: *g, modes: mean}"), 5, "'<<' is not understood"),
    ],
)  # fmt: skip
def test_each_mistake_is_named_at_its_line(text, line, said):
    found = [one for one in problems(text) if said in one]
    assert found, problems(text)
    assert found[0].startswith(f"line {line}, column "), found


def test_an_anchor_is_read_where_it_is_used():
    config = SweepConfig.from_text(
        small("- {kind: ablate, heads: &h [[1, 2]]}\n- {kind: scale, heads: *h, scales: 2}"), "x"
    )
    assert config.conditions[1].axes["heads"] == ((1, 2),)


def test_an_empty_or_unreadable_file(tmp_path):
    with pytest.raises(ConfigError, match="'conditions' is missing"):
        SweepConfig.from_text("# nothing\n", "x")
    with pytest.raises(ConfigError, match="cannot be read"):
        SweepConfig.from_file(tmp_path / "missing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00model")
    with pytest.raises(ConfigError, match=r"cannot be read|no valid"):
        SweepConfig.from_file(tmp_path / "binary.yaml")
    with pytest.raises(ConfigError, match="No valid YAML"):
        SweepConfig.from_text("model: \x07", "x")


def test_nothing_that_a_file_says_is_run():
    found = problems("model: !!python/object/apply:os.system ['true']\nimages: p\n" + GRID)
    assert len(found) == 1 and found[0].startswith("line 1")


def test_the_example_of_the_documentation_is_valid():
    example = Path(__file__).parents[2] / "tutorials" / "sweep.yaml"
    config = SweepConfig.from_file(example)
    assert len(config.conditions) >= 3
