"""The set of register neurons: making, combining, checking, and files that come back as they went."""

import json
import math
from inspect import unwrap

import numpy as np
import pytest
import torch

import registerlens as rl
from registerlens.errors import ConfigError, InterventionError

CFG = rl.ViTConfig(n_layers=3, d_model=8, n_heads=1, d_mlp=16, image_size=(16, 16), patch_size=(8, 8))
FOUND = {"model": "somewhere", "detection": {"sublayer": "1.mlp", "cutoff": None}, "sweep_curve": [[0, 1.5], [1, 0.0]]}


def scored(*triples, **options):
    return rl.RegisterNeurons(
        pairs=tuple((layer, neuron) for layer, neuron, _ in triples),
        scores=tuple(float(score) for *_, score in triples),
        **options,
    )


A = scored((2, 5, 9.0), (0, 3, 8.0), (2, 1, 7.0), (1, 5, 6.0), source="a", found=FOUND)
B = scored((2, 1, 70.0), (1, 6, 60.0), (2, 5, 50.0), source="b")


def test_it_iterates_in_order():
    assert list(A) == [(2, 5, 9.0), (0, 3, 8.0), (2, 1, 7.0), (1, 5, 6.0)]
    assert len(A) == 4 and (0, 3) in A and (3, 0) not in A and (0, 3, 8.0) not in A
    assert A.by_layer() == {0: (3,), 1: (5,), 2: (5, 1)} and list(A.by_layer()) == [0, 1, 2]
    assert repr(A) == "RegisterNeurons(4 neurons: 0: 3; 1: 5; 2: 5 1; a)"
    assert repr(rl.RegisterNeurons.from_pairs([])) == "RegisterNeurons(0 neurons: none; given)"
    table = A.to_dataframe()
    assert table.to_dict("list") == {
        "rank": [0, 1, 2, 3],
        "layer": [2, 0, 2, 1],
        "neuron": [5, 3, 1, 5],
        "score": [9.0, 8.0, 7.0, 6.0],
    }
    assert list(rl.RegisterNeurons.from_pairs([]).to_dataframe().columns) == ["rank", "layer", "neuron", "score"]


def test_set_operations_keep_the_order_and_scores_of_the_first():
    assert list(A | B) == [*A, (1, 6, 60.0)] and (A | B).source == "a | b"
    assert list(B | A) == [*B, (0, 3, 8.0), (1, 5, 6.0)]
    assert list(A & B) == [(2, 5, 9.0), (2, 1, 7.0)] and (A & B).source == "a"
    assert list(B & A) == [(2, 1, 70.0), (2, 5, 50.0)]
    assert list(A - B) == [(0, 3, 8.0), (1, 5, 6.0)]
    assert (
        list(A - A) == [] and A & A == A and rl.RegisterNeurons(pairs=A.pairs, scores=A.scores, source="a | a") == A | A
    )
    assert (A | B).found == FOUND


def test_filters():
    assert A.filter(layers=[2]).pairs == ((2, 5), (2, 1))
    assert A.filter(layers=range(1, 3), top=2).pairs == ((2, 5), (2, 1))
    assert A.filter(top=0).pairs == () and A.filter(top=99) == A == A.filter()
    assert list(A.filter(where=lambda layer, neuron, score: neuron == 5 and score < 7)) == [(1, 5, 6.0)]
    assert A.filter(layers=[0, 2], where=lambda layer, neuron, score: score < 9, top=1).pairs == ((0, 3),)


def test_published_lists():
    dinov2 = rl.RegisterNeurons.published("dinov2_vitl14")
    assert len(dinov2) == 45
    counts = {layer: len(neurons) for layer, neurons in dinov2.by_layer().items()}
    assert counts == {12: 1, 13: 1, 14: 8, 15: 9, 16: 9, 17: 17}
    assert dinov2.pairs[:3] == ((17, 884), (17, 133), (17, 1427))  # as figures 3, 19 and 28 name them
    assert dinov2.by_layer()[12] == (3168,) and dinov2.by_layer()[13] == (2400,)
    sums = {layer: sum(neurons) for layer, neurons in dinov2.by_layer().items()}  # of the list as printed
    assert sums == {12: 3168, 13: 2400, 14: 11148, 15: 20430, 16: 22065, 17: 35617}
    dinov2.check(
        rl.ViTConfig(n_layers=24, d_model=1024, n_heads=16, d_mlp=4096, image_size=(518, 518), patch_size=(14, 14))
    )
    clip = rl.RegisterNeurons.published("openclip_vitb16")
    assert clip.by_layer() == {3: (1074,), 4: (1468,), 5: (599, 1869, 1419, 846), 6: (980, 61, 2372)}
    assert all(math.isnan(score) for score in (*dinov2.scores, *clip.scores)) and "Jiang" in clip.source
    with pytest.raises(ConfigError, match=r"No published list 'dinov2_vitl'. Did you mean 'dinov2_vitl14'\? There are"):
        rl.RegisterNeurons.published("dinov2_vitl")


def test_equal_lists_are_equal_though_their_scores_are_unknown():
    one, other = (rl.RegisterNeurons.from_pairs([(1, 2), (0, 3)]) for _ in range(2))
    assert one == other and hash(one) == hash(other) and len({one, other}) == 1
    assert one != rl.RegisterNeurons.from_pairs([(0, 3), (1, 2)])
    assert scored((1, 2, float("nan")), (0, 3, np.nan)) == one
    assert rl.TestTimeRegisters(one) == rl.TestTimeRegisters(other) != rl.TestTimeRegisters(one, n=2)
    with pytest.raises(AttributeError):
        one.pairs = ()


@pytest.mark.parametrize(
    "pairs", [[(1, 2.5)], [(1.0, 2)], ["17"], [(1,)], [(1, 2, 3)], [1, 2], [("1", "2")], [(None, 1)], 7]
)
def test_what_is_no_list_of_pairs_is_refused(pairs):
    with pytest.raises((ConfigError, TypeError), match=r"Expected \(layer, neuron\) pairs|not iterable"):
        unwrap(rl.RegisterNeurons.from_pairs.__func__)(rl.RegisterNeurons, pairs)


def test_numpy_and_tensor_indices_are_integers():
    make = unwrap(rl.RegisterNeurons.from_pairs.__func__)
    for pairs in (np.array([[1, 2], [0, 3]]), torch.tensor([[1, 2], [0, 3]]), [[1, 2], [0, 3]], iter([(1, 2), (0, 3)])):
        got = make(rl.RegisterNeurons, pairs)
        assert got.pairs == ((1, 2), (0, 3)) and {type(i) for pair in got.pairs for i in pair} == {int}


def test_inconsistent_lists_are_named():
    with pytest.raises(ConfigError, match=r"Neurons \[\(1, 2\)\] are listed more than once"):
        rl.RegisterNeurons.from_pairs([(1, 2), (0, 0), (1, 2)])
    with pytest.raises(ConfigError, match=r"count from 0, got \[\(-1, 2\), \(0, -5\)\]"):
        rl.RegisterNeurons.from_pairs([(-1, 2), (0, -5), (1, 1)])
    with pytest.raises(ConfigError, match="2 neurons with 1 scores"):
        rl.RegisterNeurons(pairs=((1, 2), (1, 3)), scores=(1.0,))


def test_a_model_has_them_or_it_is_said():
    assert A.check(CFG) is A
    with pytest.raises(InterventionError, match=r"\[\(3, 0\), \(2, 16\)\] do not exist: .*0 to 2 with neurons 0 to 15"):
        rl.RegisterNeurons.from_pairs([(3, 0), (2, 15), (2, 16)], source="elsewhere").check(CFG)


def test_without_a_search_there_is_no_curve():
    with pytest.raises(ConfigError, match=r"\(a\) come without the scores of a search"):
        A.plot()


@pytest.mark.parametrize("where", ["folder", "new/folder", "my neurons.json"])
def test_saved_and_loaded_they_are_the_same(tmp_path, where):
    mixed = scored((2, 5, 0.1 + 0.2), (0, 3, float("nan")), (1, 1, -1e-30), source="ä", found=FOUND)
    path = mixed.save(tmp_path / where)
    assert path == (tmp_path / where if where.endswith(".json") else tmp_path / where / "register_neurons.json")
    back = rl.RegisterNeurons.load(tmp_path / where)
    assert back == mixed and back.found == mixed.found
    assert rl.RegisterNeurons.load(path) == mixed
    told = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert told["versions"]["registerlens"] == rl.__version__ and told["neurons"][1] == [0, 3, None]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_plain_list_is_read_too(tmp_path):
    path = tmp_path / "list.json"
    path.write_text('{"neurons": [[17, 884], [16, 2301, 3.5], [15, 1, null]]}')
    got = rl.RegisterNeurons.load(path)
    assert got.pairs == ((17, 884), (16, 2301), (15, 1)) and got.source == "given"
    assert got.scores[1] == 3.5 and math.isnan(got.scores[0]) and math.isnan(got.scores[2])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("", "may be truncated"),
        ("[[1, 2]]", "holds list instead of an object"),
        ('{"pairs": []}', "Not a list of register neurons: expected"),
        ('{"neurons": 3}', "Not a list of register neurons"),
        ('{"neurons": [[1]]}', "Not a list of register neurons"),
        ('{"neurons": [[1, 2.5]]}', "Not a list of register neurons"),
        ('{"neurons": ["17"]}', "Not a list of register neurons"),
        ('{"neurons": [[1, 2, "high"]]}', "Not a list of register neurons"),
        ('{"neurons": [[1, -2]]}', "count from 0"),
    ],
)
def test_damaged_files_are_named(tmp_path, text, message):
    path = tmp_path / "register_neurons.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        rl.RegisterNeurons.load(tmp_path)


def test_a_truncated_file_is_named(tmp_path):
    path = A.save(tmp_path)
    whole = path.read_text()
    for length in (1, len(whole) // 2, len(whole.rstrip()) - 1):
        path.write_text(whole[:length])
        with pytest.raises(ConfigError, match=r"register_neurons\.json' is not valid JSON; it may be truncated"):
            rl.RegisterNeurons.load(tmp_path)
