"""Ablations: what takes the place of neurons, heads and tokens, against direct computations on whole caches."""

import json
from inspect import unwrap

import numpy as np
import pytest
import torch
from edited_vits import NEURONS, build, pixels
from helpers import relative

import registerlens as rl
from registerlens.errors import ConfigError, ImageError, InterventionError, ShapeError
from registerlens.interventions import ablation

POST, Z, RESID = "blocks.1.mlp.hook_post", "blocks.1.attn.hook_z", "blocks.1.hook_resid_post"
NEURONS_1 = rl.RegisterNeurons.from_pairs([(1, 19), (1, 3)])
TARGETS = {
    "neurons": (NEURONS_1, POST, lambda x: x[:, :, [19, 3]]),
    "heads": (rl.Heads([(1, 2), (1, 0)]), Z, lambda x: x[:, :, [0, 2]].flatten(2)),
    "patches": (rl.Tokens(1, [0, 7]), RESID, lambda x: x),
    "cls": (rl.Tokens(1, "cls"), RESID, lambda x: x),
    "trained": (rl.Tokens(1, "trained_registers"), RESID, lambda x: x),
}
ABLATED = {"patches": [3, 10], "cls": [0], "trained": [1, 2]}  # positions; of neurons and heads, all
MODES = ["mean", "noise", "shuffle", "resample"]


@pytest.fixture(scope="module")
def vit():
    return build("clip")


def cache_of(vit, images, point, *chosen):
    with torch.no_grad(), vit.edit(*chosen):
        return vit.run_with_cache(images, names_filter=point)[1][point]


def rows_of(x):
    """Activations [batch, pos, feature] by kind of token: [CLS], two trained registers, all patches."""
    return [x[:, 0], x[:, 1], x[:, 2], x[:, 3:].flatten(0, 1)]


def split(name, before, after):
    """The ablated part before and after [batch, pos, feature], and whether all else is as it was."""
    _, _, read = TARGETS[name]
    if name == "neurons":
        rest = [n for n in range(20) if n not in (3, 19)]
        same = torch.equal(before[..., rest], after[..., rest])
    elif name == "heads":
        same = torch.equal(before[:, :, 1], after[:, :, 1])
    else:
        rest = [p for p in range(15) if p not in ABLATED[name]]
        same = torch.equal(before[:, rest], after[:, rest])
    at = ABLATED.get(name, slice(None))
    return read(before)[:, at], read(after)[:, at], same


@pytest.mark.parametrize("name", TARGETS)
def test_zero(vit, name):
    target, point, _ = TARGETS[name]
    images = pixels(2)
    old, new, same = split(name, cache_of(vit, images, point), cache_of(vit, images, point, rl.Ablate(target)))
    assert same and (new == 0).all() and (old != 0).any()


@pytest.mark.parametrize("name", TARGETS)
def test_mean_and_spread_equal_two_passes_however_batched(vit, name):
    target, point, read = TARGETS[name]
    images = pixels(11)
    rows = rows_of(read(cache_of(vit, images, point)).double())
    batches = {"tensor": images, "uneven": images.split([1, 5, 2, 3]), "stream": iter(images.split(4))}
    for fitted_on in batches.values():
        reference = rl.Ablate.fit(vit, fitted_on, target, "noise", batch_size=3).reference
        assert reference.n_images == 11 and list(reference.mean) == [point] and reference.bank == {}
        assert reference.mean[point].shape == (4, rows[0].shape[1])
        for kind, values in enumerate(rows):
            mean = values.sum(0) / len(values)
            spread = ((values - mean).square().sum(0) / len(values)).sqrt()
            assert relative(reference.mean[point][kind], mean) < 1e-5
            assert relative(reference.std[point][kind], spread) < 1e-4
    assert relative(reference.mean[point][0], rows[3].mean(0)) > 0.01  # [CLS] has a row of its own


@pytest.mark.parametrize("name", TARGETS)
def test_the_mean_takes_the_place_of_each_kind_of_token(vit, name):
    target, point, read = TARGETS[name]
    fitted, images = pixels(9, seed=3), pixels(2, (32, 40))
    means = [values.mean(0) for values in rows_of(read(cache_of(vit, fitted, point)))]
    before = cache_of(vit, images, point)
    chosen = rl.Ablate.fit(vit, fitted, target)
    _, new, same = split_sized(name, before, cache_of(vit, images, point, chosen))
    positions = ABLATED.get(name, range(before.shape[1]))
    expected = torch.stack([means[min(p, 3)] for p in positions]).expand_as(new)
    assert same and relative(new, expected) < 1e-5


def split_sized(name, before, after):
    old, new, _ = split(name, before, after)
    if name in ("neurons", "heads"):
        return split(name, before, after)
    rest = [p for p in range(before.shape[1]) if p not in ABLATED[name]]
    return old, new, torch.equal(before[:, rest], after[:, rest])


@pytest.mark.parametrize("name", TARGETS)
def test_noise_has_that_mean_and_spread(vit, name):
    target, point, _ = TARGETS[name]
    fitted = pixels(12, seed=3)
    chosen = rl.Ablate.fit(vit, fitted, target, "noise")
    images = pixels(300, (24, 32), seed=9)
    _, new, same = split(name, cache_of(vit, images, point), cache_of(vit, images, point, chosen))
    mean, spread = (getattr(chosen.reference, kind)[point] for kind in ("mean", "std"))
    kinds = [min(p, 3) for p in ABLATED.get(name, range(15))]
    z = (new - mean[kinds]) / spread[kinds]
    assert same and z.isfinite().all()
    assert z.mean(0).abs().max() < 5 / 300**0.5 and (z.std(0) - 1).abs().max() < 5 / 600**0.5
    assert abs(np.corrcoef(z[:, 0, 0], z[:, -1, -1])[0, 1]) < 0.25


@pytest.mark.parametrize("name", TARGETS)
def test_shuffle_takes_one_other_image_as_a_whole(vit, name):
    target, point, read = TARGETS[name]
    fitted = pixels(6, seed=3)
    bank = read(cache_of(vit, fitted, point))[:, ABLATED.get(name, slice(None))]
    chosen = rl.Ablate.fit(vit, fitted, target, "shuffle")
    images = pixels(40)
    _, new, same = split(name, cache_of(vit, images, point), cache_of(vit, images, point, chosen))
    distance = (new[:, None] - bank[None]).flatten(2).abs().amax(2)
    assert same and distance.amin(1).max() < 1e-5
    assert set(distance.argmin(1).tolist()) == set(range(6))  # every one is drawn
    again = cache_of(vit, images, point, rl.Ablate.fit(vit, fitted, target, "shuffle", seed=1))
    assert relative(split(name, again, again)[1], new) > 0.1


def test_shuffle_takes_the_same_image_everywhere(vit):
    fitted, images = pixels(6, seed=3), pixels(12)
    points = {f"blocks.{layer}.mlp.hook_post": list(listed) for layer, listed in NEURONS.by_layer().items()}
    donors = []
    chosen = rl.Ablate.fit(vit, fitted, NEURONS, "shuffle")
    for point, listed in points.items():
        bank = cache_of(vit, fitted, point)[..., listed]
        new = cache_of(vit, images, point, chosen)[..., listed]
        donors.append((new[:, None] - bank[None]).flatten(2).abs().amax(2).argmin(1).tolist())
    assert donors[0] == donors[1] and len(set(donors[0])) > 2


@pytest.mark.parametrize("name", TARGETS)
def test_resample_draws_every_value_on_its_own(vit, name):
    target, point, read = TARGETS[name]
    fitted = pixels(8, seed=3)
    pools = rows_of(read(cache_of(vit, fitted, point)))
    chosen = rl.Ablate.fit(vit, fitted, target, "resample")
    images = pixels(30)
    _, new, same = split(name, cache_of(vit, images, point), cache_of(vit, images, point, chosen))
    assert same
    for at, p in enumerate(ABLATED.get(name, range(15))):
        pool = pools[min(p, 3)]
        for feature in range(new.shape[2]):
            gap = (new[:, at, feature, None] - pool[None, :, feature]).abs()
            assert gap.amin(1).max() < 1e-5  # from the same kind of token, the same feature
            assert len(set(gap.argmin(1).tolist())) > 3


def test_a_point_has_draws_of_its_own(vit):
    """Two layers do not get the same noise."""
    fitted, images = pixels(12, seed=3), pixels(200)
    both = rl.RegisterNeurons.from_pairs([(1, 3), (2, 3)])
    chosen = rl.Ablate.fit(vit, fitted, both, "noise")
    drawn = [cache_of(vit, images, f"blocks.{layer}.mlp.hook_post", chosen)[:, 5, 3].numpy() for layer in (1, 2)]
    assert abs(np.corrcoef(*drawn)[0, 1]) < 0.3


def test_the_bank_is_a_sample_that_does_not_grow(vit, monkeypatch):
    monkeypatch.setattr(ablation, "BANK", 4)
    images = pixels(40)
    every = cache_of(vit, images, POST)[..., [19, 3]]
    counts = torch.zeros(40)
    for seed in range(60):
        bank = rl.Ablate.fit(vit, images.split([7, 1, 32]), NEURONS_1, "shuffle", seed=seed).reference.bank[POST]
        assert bank.shape == (4, 15, 2)
        whose = (bank[:, None] - every[None]).flatten(2).abs().amax(2)
        assert whose.amin(1).max() < 1e-5
        counts[whose.argmin(1)] += 1
    assert counts.sum() == 240 and counts.max() < 20 and (counts[:4].sum() < 60) and (counts[-4:].sum() > 5)


def test_heads_of_one_output_are_what_is_left(vit):
    """Zeroing all heads but one leaves that head's own result."""
    images = pixels(2)
    with torch.no_grad():
        result = cache_of(vit, images, "blocks.2.attn.hook_result")
        alone = cache_of(vit, images, "blocks.2.hook_attn_out", rl.Ablate(rl.Heads([(2, 0), (2, 2)])))
        assert relative(alone, result[:, :, 1] + vit.blocks[2].attn.b_O) < 1e-5


def test_inside_another_edit(vit):
    """Fitting sees what is in force, and a test-time register counts as one more patch."""
    images = pixels(5)
    with vit.edit(rl.Ablate(rl.Heads([(0, 0), (0, 1), (0, 2)]))):
        fitted = rl.Ablate.fit(vit, images, NEURONS_1)
        x = cache_of(vit, images, POST)[..., [19, 3]]
    assert relative(fitted.reference.mean[POST][3], x[:, 3:].mean((0, 1))) < 1e-5
    register = rl.TestTimeRegisters(rl.RegisterNeurons.from_pairs([]))
    got = cache_of(vit, images, POST, register, fitted)[:, -1][:, [19, 3]]
    assert relative(got, fitted.reference.mean[POST][3].expand(5, 2)) < 1e-6


@pytest.mark.parametrize("mode", ["zero", *MODES])
@pytest.mark.parametrize("name", TARGETS)
def test_saved_and_loaded_it_is_the_same_bit_for_bit(vit, tmp_path, name, mode):
    target, point, _ = TARGETS[name]
    images = pixels(3)
    plain = rl.Ablate(target)
    before = plain if mode == "zero" else rl.Ablate.fit(vit, pixels(5, seed=2), target, mode, seed=8)
    folder = before.save(tmp_path / "new")
    after = rl.Ablate.load(folder)
    assert (after.target, after.mode, after.seed) == (before.target, before.mode, before.seed)
    assert torch.equal(cache_of(vit, images, point, before), cache_of(vit, images, point, after))
    told = json.loads((folder / "result.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    if mode == "zero":
        assert after.reference is None and [p.name for p in folder.iterdir()] == ["result.json"]
        return
    assert told["values"]["reference"]["n_images"] == 5
    for kind in ("mean", "std", "bank"):
        ours, theirs = getattr(before.reference, kind), getattr(after.reference, kind)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_fitted_for_zero_it_is_zero(vit, tmp_path):
    fitted = rl.Ablate.fit(vit, pixels(3), NEURONS_1, "zero")
    assert (cache_of(vit, pixels(2), POST, fitted)[..., [3, 19]] == 0).all()
    assert (cache_of(vit, pixels(2), POST, rl.Ablate.load(fitted.save(tmp_path)))[..., [3, 19]] == 0).all()


def test_damaged_files_are_named(vit, tmp_path):
    folder = rl.Ablate.fit(vit, pixels(3), NEURONS_1).save(tmp_path)
    told = json.loads((folder / "result.json").read_text())
    for target in ({"class": "Layer"}, 3, None):
        (folder / "result.json").write_text(json.dumps(told | {"values": told["values"] | {"target": target}}))
        with pytest.raises(ConfigError, match=r"result\.json': 'target' must be of a known class"):
            rl.Ablate.load(folder)
    (folder / "result.json").write_text('{"mode": "zero"')
    with pytest.raises(ConfigError, match="may be truncated"):
        rl.Ablate.load(folder)


def test_errors(vit):
    with pytest.raises(ConfigError, match=r"mode='mean' needs reference activations\. Make it with rl\.Ablate\.fit"):
        rl.Ablate(NEURONS_1, "mean")
    with pytest.raises(ImageError, match="No image"):
        rl.Ablate.fit(vit, [], NEURONS_1)
    with pytest.raises(ImageError, match="batch_size"):
        rl.Ablate.fit(vit, pixels(2), NEURONS_1, batch_size=0)
    with pytest.raises(ConfigError, match="which must be 'cls', 'trained_registers' or patch indices, got 'patch'"):
        unwrap(rl.Tokens.__init__)(object.__new__(rl.Tokens), 1, "patch")
    for mode in ("shuffle", "resample"):
        with pytest.raises(ShapeError, match="Images of one size are needed"):
            rl.Ablate.fit(vit, [pixels(2), pixels(2, (32, 32))], NEURONS_1, mode)
    mixed = rl.Ablate.fit(vit, [pixels(2), pixels(2, (32, 32))], NEURONS_1, "noise")
    assert mixed.reference.n_images == 4
    assert not any(point.has_hooks() for point in vit.hook_dict.values())


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (rl.Tokens(1, [0, 12]), r"Patches \[12\] do not exist: there are 0 to 11"),
        (rl.Tokens(1, [-1]), r"Patches \[-1\] do not exist"),
        (rl.Tokens(1, []), "Nothing to ablate"),
        (rl.Tokens(9, "cls"), "Block 9 does not exist: there are 0 to 3"),
        (rl.Heads([(1, 3)]), r"Heads \[\(1, 3\)\] do not exist"),
    ],
)
def test_targets_that_do_not_exist_are_named(vit, target, message):
    with pytest.raises(InterventionError, match=message), vit.edit(rl.Ablate(target)):
        vit(pixels(1))


def test_tokens_that_the_model_lacks_are_named():
    plain = build("plain")
    for which in ("cls", "trained_registers"):
        with pytest.raises(InterventionError, match=f"the sequence has no tokens '{which}'"):
            rl.Ablate.fit(plain, pixels(2), rl.Tokens(1, which))


def test_a_reference_of_another_model_or_size_is_named(vit):
    other = build("plain")
    fitted = rl.Ablate.fit(other, pixels(3), NEURONS_1)
    with pytest.raises(InterventionError, match=r"reference for blocks\.1\.mlp\.hook_post has shape \[1, 2\]"):
        cache_of(vit, pixels(1), POST, fitted)
    elsewhere = rl.Ablate.fit(vit, pixels(3), rl.Heads([(1, 0)]))
    mixed = rl.Ablate(NEURONS_1, "mean", reference=elsewhere.reference)
    with pytest.raises(InterventionError, match=r"nothing for blocks\.1\.mlp\.hook_post"):
        cache_of(vit, pixels(1), POST, mixed)
    shuffled = rl.Ablate.fit(vit, pixels(3), NEURONS_1, "shuffle")
    with pytest.raises(InterventionError, match=r"have 15 tokens, this sequence has 19\. Fit on images of this size"):
        cache_of(vit, pixels(1, (32, 32)), POST, shuffled)
    resampled = rl.Ablate.fit(vit, pixels(3), NEURONS_1, "resample")
    assert cache_of(vit, pixels(1, (32, 32)), POST, resampled).isfinite().all()


def test_shuffle_beside_a_register_says_that_the_register_is_a_token(vit):
    images, register = pixels(2), rl.TestTimeRegisters(NEURONS)
    shuffled = rl.Ablate.fit(vit, pixels(5, seed=2), NEURONS_1, "shuffle")
    said = r"have 15 tokens, this sequence has 16, 1 of them test-time registers\. Fit .* inside the same vit\.edit"
    with pytest.raises(InterventionError, match=said):
        cache_of(vit, images, POST, register, shuffled)
    with vit.edit(register):  # as the message says
        inside = rl.Ablate.fit(vit, pixels(5, seed=2), NEURONS_1, "shuffle")
    drawn = cache_of(vit, images, POST, register, inside)[..., [19, 3]]
    assert all(any(torch.equal(row, one) for one in inside.reference.bank[POST]) for row in drawn)
