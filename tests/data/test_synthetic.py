"""The synthetic task against naive loops, and the embedded model against the experiment's own numbers."""

import pytest
import torch

import registerlens as rl
from registerlens.data.synthetic import FLAT, KEY, NORMAL, TRIGGER, _banks, _place, synthetic_images
from registerlens.data.synthetic_task import SyntheticTask


@pytest.fixture(scope="module")
def tiny():
    return rl.HookedViT.from_pretrained("registerlens:tiny")


@pytest.fixture(scope="module")
def batch():
    return synthetic_images(512, 2002)


@pytest.fixture(scope="module")
def traced(tiny, batch):
    return rl.trace(tiny, batch.images)


@pytest.fixture(scope="module")
def run(tiny, batch):
    with torch.inference_mode():
        return tiny.run_with_cache(batch.images, names_filter=["blocks.*.attn.hook_v", "blocks.*.hook_resid_post"])


def relative_norms(cache, layer):
    norms = cache[f"blocks.{layer}.hook_resid_post"].norm(dim=-1)
    return norms / norms.median(dim=1, keepdim=True).values


def test_equal_seeds_give_equal_bits_and_others_do_not():
    first, again, other = synthetic_images(8, 3), synthetic_images(8, 3), synthetic_images(8, 4)
    for name in ("images", "labels", "roles", "types"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.images, other.images)
    state = torch.get_rng_state()
    synthetic_images(2, 0)
    assert torch.equal(state, torch.get_rng_state())  # the global generator is left alone


@pytest.mark.parametrize(
    "task", [SyntheticTask(), SyntheticTask(grid=5, n_triggers=3, n_types=2, n_attributes=2, flats=(2, 2))]
)
def test_roles_have_their_counts_in_every_image(task):
    batch = synthetic_images(200, 0, task)
    for roles, types in zip(batch.roles.tolist(), batch.types.tolist(), strict=True):
        of = {role: [t for r, t in zip(roles, types, strict=True) if r == role] for role in range(4)}
        assert sorted(of[KEY]) == list(range(task.n_types))
        assert len(of[TRIGGER]) == task.n_triggers
        assert task.flats[0] <= len(of[FLAT]) <= task.flats[1]
        assert set(of[TRIGGER]) <= set(range(task.n_types))
        assert set(of[NORMAL] + of[FLAT]) <= {0}
    counts = (batch.roles == FLAT).sum(1)
    assert set(counts.tolist()) == set(range(task.flats[0], task.flats[1] + 1))  # each number does occur
    asked = batch.types[batch.roles == TRIGGER].bincount(minlength=task.n_types) / (200 * task.n_triggers)
    assert (asked - 1 / task.n_types).abs().max() < 0.06
    assert (batch.roles == FLAT).any(0).all()  # at any position


def test_labels_follow_the_rule_naively():
    task = SyntheticTask()
    batch = synthetic_images(64, 11, task)
    # The textures of normal and key patches are their own labels; those of triggers are looked up.
    for roles, types, labels in zip(batch.roles.tolist(), batch.types.tolist(), batch.labels.tolist(), strict=True):
        keys = {types[i]: i for i in range(36) if roles[i] == KEY}
        for i in range(36):
            if roles[i] == FLAT:
                assert labels[i] == [12] * 4
            elif roles[i] == TRIGGER:
                assert labels[i] == [labels[keys[(types[i] + k) % 4]][k] for k in range(4)]
            else:
                assert all(0 <= label < 12 for label in labels[i])


def test_placing_uses_the_generator_it_is_given():
    roles, types, keys = _place(3, SyntheticTask(), torch.Generator().manual_seed(0))
    assert torch.equal(roles.gather(1, keys), torch.full((3, 4), KEY))
    assert torch.equal(types.gather(1, keys), torch.arange(4).expand(3, -1))


def test_pixels_show_what_the_labels_say():
    batch = synthetic_images(16, 5, SyntheticTask(noise=0.0, flat_noise=0.0))
    textures, triggers, keys = _banks(SyntheticTask())
    for n in range(16):
        for i in range(36):
            y, x = divmod(i, 6)
            patch = batch.images[n, :, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
            role, kind = batch.roles[n, i].item(), batch.types[n, i].item()
            expected = torch.zeros(3, 8, 8)
            if role in (NORMAL, KEY):
                expected = sum(textures[k, batch.labels[n, i, k]] for k in range(4))
            if role == KEY:
                expected = expected + keys[kind]
            if role == TRIGGER:
                expected = triggers[kind]
            rest = patch - expected
            assert (rest - rest.mean((1, 2), keepdim=True)).abs().max() < 1e-5
            brightness = rest.mean((1, 2))
            assert (brightness.abs() < 1e-5).all() if role == TRIGGER else (brightness.max() > 0.2 - 1e-5)
    assert triggers[0].abs().max() == 0


def test_noise_has_the_strength_of_its_role():
    clean = synthetic_images(64, 6, SyntheticTask(noise=0.0, flat_noise=0.0))
    noisy = synthetic_images(64, 6)
    assert torch.equal(clean.labels, noisy.labels)
    difference = (noisy.images - clean.images).unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
    assert difference[noisy.roles == FLAT].std().item() == pytest.approx(0.1, rel=0.03)
    assert difference[noisy.roles != FLAT].std().item() == pytest.approx(0.6, rel=0.03)


def test_tiny_reports_every_labelled_patch(batch, run):
    predicted = run[0].unflatten(-1, (4, 13)).argmax(-1)
    labelled = batch.roles != FLAT
    assert (predicted == batch.labels)[labelled].float().mean().item() >= 0.9999


def test_tiny_has_the_experiments_outliers_exactly_on_flat_patches(batch, run, traced):
    flat = batch.roles == FLAT
    assert traced.verdict == "present"
    assert traced.onset == "1.mlp"
    for layer in range(2, 6):
        threshold = traced.evidence[traced.sublayers.index(f"{layer}.mlp")].threshold
        outlier = relative_norms(run[1], layer) > threshold
        assert torch.equal(outlier, flat)
        assert outlier.sum(1).float().mean().item() == pytest.approx(1.97, abs=0.1)
    # Right after the onset at most one patch in a thousand flat ones still lies in the gap.
    onset = relative_norms(run[1], 1) > traced.evidence[traced.sublayers.index("1.mlp")].threshold
    assert (onset != flat).sum() <= 2
    assert (relative_norms(run[1], 0)[flat] < 2).all()


def test_tiny_norms_are_the_experiments(traced):
    at = dict(zip(traced.sublayers, traced.largest_over_median, strict=True))
    assert at["1.attn"] == pytest.approx(1.70, rel=0.03)
    assert at["1.mlp"] == pytest.approx(18.8, rel=0.03)


def test_tiny_outliers_have_small_values_after_onset(batch, run):
    flat = batch.roles == FLAT
    for layer, expected in zip((2, 3, 4, 5), (0.42, 0.20, 0.20, 0.30), strict=True):
        norms = run[1][f"blocks.{layer}.attn.hook_v"].norm(dim=-1).squeeze(-1)
        assert (norms[flat].mean() / norms[~flat].mean()).item() == pytest.approx(expected, abs=0.02)


def test_tiny_attends_to_outliers_where_nothing_is_needed(tiny, batch):
    some = slice(0, 64)
    with torch.inference_mode():
        _, cache = tiny.run_with_cache(batch.images[some], names_filter="blocks.*.attn.hook_pattern")
    flat, trigger = batch.roles[some] == FLAT, batch.roles[some] == TRIGGER
    for layer in range(2, 6):
        received = (cache[f"blocks.{layer}.attn.hook_pattern"][:, 0] * flat[:, None]).sum(-1)
        assert received[~trigger & ~flat].mean() > 0.9
        assert received[trigger].mean() < 0.05
