"""Algorithm 2 against its definition, number by number, and the table of the embedded model."""

import itertools
from inspect import unwrap

import pytest
import torch
from edited_vits import NEURONS, ODD, ONE_LAYER, OTHERS, build, naive_run, naive_shift, pixels
from helpers import relative

import registerlens as rl
from registerlens.analysis.maps import patch_maps
from registerlens.data.synthetic import FLAT, NORMAL, synthetic_images
from registerlens.errors import ConfigError, InterventionError
from registerlens.interventions.registers import Shift

POST = "blocks.1.mlp.hook_post"
LISTED = [3, 19, 8]  # of ONE_LAYER


def edited(vit, images, chosen, names=POST):
    with torch.no_grad(), vit.edit(chosen):
        return vit.run_with_cache(images, names_filter=names)


def zeros(n):
    return lambda tokens: torch.zeros(n, tokens.shape[1])


def cleared(clear, layout):
    """Which positions (or, for "outliers", which values) lose their activation."""
    if clear == "outliers":
        return lambda column, p: column[p] > max(column[layout.patches].max(), 0) / 2
    every, patches = range(layout.n_tokens), range(layout.patches.start, layout.patches.stop)
    return {"all": every, "patches": patches, "none": ()}[clear]


def assert_shifted(vit, images, chosen, layout, target, start, maxima_of=None):
    """Activations, and the model's output, equal the definition applied to the unedited ones, image by image."""
    source = range(layout.patches.start, layout.patches.stop) if chosen.source == "patches" else range(layout.n_tokens)
    options = {"extreme": chosen.extreme, "fill": chosen.fill, "clear": cleared(chosen.clear, layout)}
    out, cache = edited(vit, images, chosen, "blocks.*.mlp.hook_post")
    by_layer, givers = chosen.neurons.by_layer(), maxima_of.by_layer() if maxima_of else {}

    for i, image in enumerate(images):

        def shift(layer, post, i=i):
            if layer not in by_layer:
                return post
            return naive_shift(
                post, by_layer[layer], target(i, layer), source=source, maxima_of=givers.get(layer), **options
            )

        with torch.no_grad():
            naive, activations = naive_run(vit, image, shift, start, names="blocks.*.mlp.hook_post")
        for name, value in activations.items():
            assert relative(cache[name][i], value) < 1e-5, name
        assert relative(out[i], naive) < 1e-5


@pytest.mark.parametrize("name", ["clip", "plain"])
@pytest.mark.parametrize("size", [(24, 32), ODD])
def test_the_extra_token_has_every_maximum_and_all_others_nothing(name, size):
    """Straight from the unedited activations of a model with one extra, unedited token."""
    vit, images = build(name), pixels(3, size)
    _, before = edited(vit, images, rl.TestTimeRegisters(rl.RegisterNeurons.from_pairs([])))
    _, after = edited(vit, images, rl.TestTimeRegisters(ONE_LAYER))
    before, after = before[POST], after[POST]
    n = vit.layout(images).n_tokens
    assert after.shape == before.shape == (3, n + 1, 20)
    for neuron in range(20):
        if neuron not in LISTED:
            torch.testing.assert_close(after[..., neuron], before[..., neuron])
            continue
        assert (after[:, :n, neuron] == 0).all()  # [CLS] and trained registers included
        for i in range(3):
            assert after[i, n, neuron] == pytest.approx(max(before[i, :, neuron].tolist()), rel=1e-5)


OPTIONS = [
    {"extreme": extreme, "source": source, "clear": clear, "fill": fill}
    for extreme, source, (clear, fill) in itertools.product(
        ("per_neuron", "shared"),
        ("all", "patches"),
        (
            ("all", "zero"),
            ("patches", "zero"),
            ("outliers", "zero"),
            ("none", "zero"),
            ("all", "mean"),
            ("patches", "mean"),
        ),
    )
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options.values()))
def test_every_option_in_two_layers(options):
    vit, images = build("clip"), pixels(2)
    layout = vit.cfg.layout(24, 32, 1)
    by_layer, last = NEURONS.by_layer(), layout.n_tokens - 1
    assert_shifted(
        vit,
        images,
        rl.TestTimeRegisters(NEURONS, **options),
        layout,
        lambda i, layer: {last: by_layer[layer]},
        zeros(1),
    )
    layout = vit.cfg.layout(24, 32)
    chosen = rl.MoveOutliers(NEURONS, 5, **options)
    assert_shifted(vit, images, chosen, layout, lambda i, layer: {3 + 5: by_layer[layer]}, None)


def test_the_shared_extreme_keeps_its_sign():
    vit, images = build("clip"), pixels(6)
    _, before = edited(vit, images, rl.TestTimeRegisters(rl.RegisterNeurons.from_pairs([])))
    # The smallest value of a gated unit is about -0.17: make one neuron's activations large and negative.
    down = [("blocks.1.mlp.hook_post", lambda post, hook: post.index_fill(-1, torch.tensor([8]), -50.0))]
    with vit.hooks(down):
        _, after = edited(vit, images, rl.TestTimeRegisters(ONE_LAYER, extreme="shared"))
    assert (before[POST][..., LISTED].amax((1, 2)) > 0).all()
    assert (after[POST][:, -1][:, LISTED] == -50).all()


def test_maxima_of_other_neurons():
    vit, images = build("clip"), pixels(2)
    layout = vit.cfg.layout(24, 32, 1)
    by_layer = NEURONS.by_layer()
    for extreme in ("per_neuron", "shared"):
        chosen = rl.TestTimeRegisters(NEURONS, maxima_of=OTHERS, extreme=extreme)
        assert_shifted(vit, images, chosen, layout, lambda i, layer: {15: by_layer[layer]}, zeros(1), OTHERS)
    with pytest.raises(ConfigError, match=r"as many neurons in each layer: \{1: 3\} for \{1: 2, 2: 2\}"):
        rl.TestTimeRegisters(NEURONS, maxima_of=ONE_LAYER)
    with pytest.raises(ConfigError, match="as many neurons in each layer"):
        rl.MoveOutliers(ONE_LAYER, 3, maxima_of=NEURONS)


@pytest.mark.parametrize("assign", ["all", "random"])
def test_several_registers(assign):
    vit, images = build("clip"), pixels(2)
    layout = vit.cfg.layout(24, 32, 3)
    chosen = rl.TestTimeRegisters(NEURONS, n=3, assign=assign, seed=2)
    _, cache = edited(vit, images, chosen, "blocks.*.mlp.hook_post")
    by_layer, owners = NEURONS.by_layer(), {}
    for layer, listed in by_layer.items():
        registers = cache[f"blocks.{layer}.mlp.hook_post"][:, layout.test_time_registers][..., list(listed)] != 0
        assert torch.equal(registers[0], registers[1])
        owners[layer] = {
            layout.patches.stop + r: [n for j, n in enumerate(listed) if registers[0, r, j]] for r in range(3)
        }
        assert registers[0].sum(0).tolist() == [3 if assign == "all" else 1] * len(listed)
    assert_shifted(vit, images, chosen, layout, lambda i, layer: owners[layer], zeros(3))


def test_the_random_assignment_reaches_every_register():
    many = rl.RegisterNeurons.from_pairs([(1, n) for n in range(20)])
    shares = []
    for seed in range(5):
        _, cache = edited(build(), pixels(1), rl.TestTimeRegisters(many, n=4, assign="random", seed=seed))
        owner = cache[POST][0, -4:].ne(0).float().argmax(0).tolist()
        assert set(owner) == {0, 1, 2, 3}
        shares.append(tuple(owner))
    assert len(set(shares)) == 5


@pytest.mark.parametrize("name", ["clip", "plain"])
@pytest.mark.parametrize("size", [(24, 32), ODD])
def test_what_the_token_starts_as(name, size):
    vit, images = build(name), pixels(2, size)
    none, point = rl.RegisterNeurons.from_pairs([]), "hook_tokens"
    _, plain = vit.run_with_cache(images, names_filter=point)
    patches = plain[point][:, vit.layout(images).patches]
    n = plain[point].shape[1]
    for init in ("zero", "mean", "gaussian"):
        _, cache = edited(vit, images, rl.TestTimeRegisters(none, n=400, init=init, seed=1), point)
        tokens = cache[point]
        assert torch.equal(tokens[:, :n], plain[point])
        extra = tokens[:, n:]
        if init == "zero":
            assert (extra == 0).all()
        elif init == "mean":
            for i in range(2):
                expected = sum(patches[i]) / len(patches[i])
                assert relative(extra[i], expected.expand(400, -1)) < 1e-5
        else:
            spread = (patches - patches.mean(1, keepdim=True)).square().mean(1).sqrt()
            z = (extra - patches.mean(1, keepdim=True)) / spread[:, None]
            assert z.mean(1).abs().max() < 5 / 400**0.5 and (z.std(1) - 1).abs().max() < 5 / 800**0.5
            assert z.mean().abs() < 0.03 and abs(z.std() - 1) < 0.03
            assert relative(extra[0], extra[1]) > 0.1


def test_a_gaussian_start_of_a_single_patch_is_that_patch():
    vit = build("plain")
    with torch.no_grad(), vit.edit(rl.TestTimeRegisters(NEURONS, init="gaussian")):
        assert vit(pixels(2, (8, 8))).isfinite().all()


def test_before_ln_pre_equals_a_zero_token_before_that_norm():
    vit, images = build("clip"), pixels(2)
    chosen = rl.TestTimeRegisters(NEURONS, n=2, before_ln_pre=True)
    layout = vit.cfg.layout(24, 32, 2)

    def appended(tokens):
        raw = torch.zeros(2, tokens.shape[1])  # LayerNorm by hand
        centred = raw - raw.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + vit.ln_pre.eps).sqrt() * vit.ln_pre.w + vit.ln_pre.b

    by_layer = NEURONS.by_layer()
    target = {13 + 2: by_layer, 16: by_layer}
    assert_shifted(vit, images, chosen, layout, lambda i, layer: {p: v[layer] for p, v in target.items()}, appended)
    # By appending before the norm itself: the embedding's sum, then a norm over all tokens.
    with torch.no_grad():
        raw = vit.embed.sequence(vit.embed.patches(images)) + vit.embed.positions(vit.layout(images))
        expected = vit.ln_pre(torch.cat([raw, torch.zeros(2, 2, 24)], 1))
        _, cache = edited(vit, images, chosen, None)
    assert relative(cache["blocks.0.hook_resid_pre"], expected) < 1e-5
    assert cache["ln_pre.hook_normalized"].shape == (2, 15, 24)  # the extra tokens do not pass for the model's own
    with pytest.raises(InterventionError, match="before_ln_pre is for CLIP models"), build("plain").edit(chosen):
        pass
    with pytest.raises(ConfigError, match="needs init='zero'"):
        rl.TestTimeRegisters(NEURONS, before_ln_pre=True, init="mean")


# Positions -----------------------------------------------------------------------------------------------------------

HEART = torch.tensor([[0, 1, 0, 1], [1, 1, 1, 1], [0, 1, 1, 0]], dtype=torch.bool)


@pytest.mark.parametrize(
    ("positions", "patches"),
    [
        (0, [0]),
        (11, [11]),
        ([3, 7, 3], [3, 7]),
        (HEART, [1, 3, 4, 5, 6, 7, 9, 10]),
    ],
)
def test_outliers_move_to_the_positions_given(positions, patches):
    vit, images = build("clip"), pixels(2)
    by_layer = NEURONS.by_layer()
    chosen = rl.MoveOutliers(NEURONS, positions)
    assert_shifted(
        vit, images, chosen, vit.cfg.layout(24, 32), lambda i, layer: {3 + p: by_layer[layer] for p in patches}, None
    )


FUNCTIONS = {
    "an index": (lambda x: torch.arange(1, len(x) + 1), [[1], [2], [3]]),
    "indices": (lambda x: torch.tensor([[0, 4], [5, 5], [11, 2]])[: len(x)], [[0, 4], [5], [11, 2]]),
    "a grid": (lambda x: torch.stack([HEART, HEART.flip(0), torch.zeros_like(HEART)])[: len(x)], None),
    "patches": (lambda x: (torch.arange(12) == torch.tensor([[1], [-1], [4]]))[: len(x)], [[1], [], [4]]),
    "nothing": (lambda x: torch.zeros(len(x), 0, dtype=torch.long), [[], [], []]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_positions_as_a_function_of_the_images(name):
    vit, images = build("clip"), pixels(3)
    function, patches = FUNCTIONS[name]
    patches = patches or [row.flatten().nonzero()[:, 0].tolist() for row in function(images)]
    chosen = rl.MoveOutliers(NEURONS, lambda x: function(x) if torch.equal(x, images) else pytest.fail("other images"))
    out, cache = edited(vit, images, chosen, "blocks.*.mlp.hook_post")
    with torch.no_grad():
        plain, unedited = vit.run_with_cache(images, names_filter="blocks.*.mlp.hook_post")
    for i, row in enumerate(patches):
        if not row:  # such an image is left as it is
            assert torch.equal(out[i], plain[i]) or relative(out[i], plain[i]) < 1e-6
            assert relative(cache[POST][i], unedited[POST][i]) < 1e-6
            continue
        for layer, listed in NEURONS.by_layer().items():
            post = cache[f"blocks.{layer}.mlp.hook_post"][i][:, list(listed)]
            assert (post != 0).any(1).nonzero()[:, 0].tolist() == sorted(3 + p for p in set(row))
        expected = unedited[POST][i][:, list(NEURONS.by_layer()[1])].amax(0)
        assert relative(cache[POST][i][3 + row[0], list(NEURONS.by_layer()[1])], expected) < 1e-5


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (-1, r"Patches \[-1\] do not exist: patches count from 0"),
        ([3, -2], r"Patches \[-2\] do not exist"),
        (torch.zeros(3, 4, dtype=torch.bool), "no patch set"),
    ],
)
def test_positions_that_can_be_nowhere_are_refused_at_once(positions, message):
    with pytest.raises(InterventionError, match=message):
        rl.MoveOutliers(NEURONS, positions)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (12, r"Patches \[12\] do not exist: patches count 0 to 11 for these images, row by row"),
        ([2, 40], r"\[40\] do not exist"),
        (HEART.T, r"shape \[4, 3\]; these images have 3 x 4 patches"),
        (torch.ones(2, 2, dtype=torch.bool), r"shape \[2, 2\]"),
        (lambda x: torch.full((len(x), 1), 12), r"Patches \[12, 12\] do not exist"),
        (lambda x: torch.ones(len(x), 4, 3, dtype=torch.bool), r"shape \[2, 4, 3\]; these images have 3 x 4"),
        (lambda x: torch.rand(len(x), 12), "patch indices, a grid of booleans or a function"),
        (
            lambda x: torch.zeros(len(x) + 1, 1, dtype=torch.long),
            r"a row of positions for each of them, .* for 2 images",
        ),
        (lambda x: torch.zeros(12, dtype=torch.bool), "a row of positions for each"),
    ],
)
def test_positions_that_the_images_lack_are_named(positions, message):
    vit = build("clip")
    with pytest.raises(InterventionError, match=message), vit.edit(rl.MoveOutliers(NEURONS, positions)):
        vit(pixels(2))
    assert not any(point.has_hooks() for point in vit.hook_dict.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extreme": "largest"}, r"extreme must be one of \['per_neuron', 'shared'\], got 'largest'"),
        ({"source": "cls"}, "source must be one of"),
        ({"clear": "some"}, r"clear must be one of \['all', 'patches', 'outliers', 'none'\]"),
        ({"fill": "one"}, "fill must be one of"),
        ({"n": -1}, "must be at least 0, got -1"),
        ({"init": "ones"}, r"init must be one of \['zero', 'gaussian', 'mean'\], got 'ones'"),
        ({"assign": "even"}, "assign must be one of"),
    ],
)
def test_options_that_do_not_exist_are_named(monkeypatch, options, message):
    for checked in (Shift, rl.TestTimeRegisters, rl.MoveOutliers):  # beartype would be first
        monkeypatch.setattr(checked, "__init__", unwrap(checked.__init__))
    with pytest.raises(ConfigError, match=message):
        rl.TestTimeRegisters(NEURONS, **options)
    if not {"n", "init", "assign"} & set(options):
        with pytest.raises(ConfigError, match=message):
            rl.MoveOutliers(NEURONS, 0, **options)


# The embedded model --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table():
    """Neurons chosen on 512 images; another 512 to measure on, and the unedited model's norms and threshold there."""
    tiny = rl.HookedViT.from_pretrained("registerlens:tiny")
    neurons = rl.find_register_neurons(tiny, synthetic_images(512, 1001).images, batch_size=64)
    batch = synthetic_images(512, 2002)
    found = rl.find_outliers(tiny, synthetic_images(512, 1001).images, layer=1, batch_size=64)
    return tiny, neurons, batch, found


def measure(table, *chosen):
    """Accuracy apart from flat patches (%), patch and register norms after block 1 over the unedited median, outliers
    an image, and the mean attention of all patches to the register in each block after the onset."""
    tiny, _, batch, found = table
    with torch.inference_mode():
        median = tiny(batch.images, stop_at_layer=2).norm(dim=-1).quantile(0.5, dim=1, keepdim=True)
        drawn = []
        pattern = ("blocks.[2-5].attn.hook_pattern", lambda p, hook: drawn.append(p[:, 0, :36].mean((0, 1))))
        with tiny.edit(*chosen):
            norms = tiny(batch.images, stop_at_layer=2).norm(dim=-1) / median
            with tiny.hooks([pattern]):
                logits = tiny(batch.images)
    right = logits.unflatten(-1, (4, 13)).argmax(-1) == batch.labels
    accuracy = right[batch.roles != FLAT].float().mean().item() * 100
    patches, registers = norms[:, :36], norms[:, 36:]
    return {
        "accuracy": accuracy,
        "outliers": (patches > found.threshold).sum().item() / 512,
        "patches": patches,
        "register": registers.mean().item(),
        "attention": [row[36:].sum().item() for row in drawn],
    }


def test_the_table_unedited(table):
    _, neurons, batch, found = table
    assert set(neurons.pairs) == {(1, n) for n in (183, 103, 219, 125, 55, 128, 177)}
    plain = measure(table)
    assert plain["outliers"] == pytest.approx(1.97, abs=0.06)
    assert plain["accuracy"] > 99.9
    assert ((plain["patches"] > found.threshold) != (batch.roles == FLAT)).float().mean() < 5e-4
    assert plain["patches"].amax(1).mean() == pytest.approx(18.8, rel=0.05)


def test_the_table_with_a_test_time_register(table):
    got = measure(table, rl.TestTimeRegisters(table[1]))
    assert got["outliers"] == 0 and got["patches"].max() < 3
    assert got["register"] == pytest.approx(19.1, rel=0.05)
    assert len(got["attention"]) == 4 and max(got["attention"]) == pytest.approx(0.77, abs=0.03)
    assert min(got["attention"]) > 0.6 and got["accuracy"] > 99.9


def test_the_table_zeroed_without_a_register(table):
    got = measure(table, rl.Ablate(table[1]))
    assert got["outliers"] == 0 and got["accuracy"] == pytest.approx(92.8, abs=1.0)


def test_the_table_with_an_unedited_token(table):
    got = measure(table, rl.TestTimeRegisters(rl.RegisterNeurons.from_pairs([])))
    assert got["register"] == pytest.approx(1.65, abs=0.1) and max(got["attention"]) < 0.02
    assert got["outliers"] == pytest.approx(1.97, abs=0.06) and got["accuracy"] > 99.9


def test_the_table_moved_onto_a_normal_patch(table):
    roles = table[2].roles
    weights = (roles == NORMAL).float()
    chosen = torch.multinomial(weights, 1, generator=torch.Generator().manual_seed(5))
    got = measure(table, rl.MoveOutliers(table[1], lambda images: chosen[: len(images)]))
    assert torch.equal(got["patches"].argmax(1), chosen[:, 0])
    assert got["outliers"] == 1
    assert got["patches"].gather(1, chosen).mean() == pytest.approx(19.1, rel=0.1)


def test_the_table_with_random_neurons(table):
    neurons = table[1]
    for seed in range(2):
        order = torch.randperm(256, generator=torch.Generator().manual_seed(seed)).tolist()
        random = rl.RegisterNeurons.from_pairs([(1, n) for n in order if (1, n) not in neurons][:7])
        for chosen in (rl.TestTimeRegisters(random), rl.TestTimeRegisters(random, maxima_of=neurons)):
            got = measure(table, chosen)
            assert got["outliers"] == pytest.approx(1.97, abs=0.06)


def test_one_outlier_patch_in_the_map_of_norms(table):
    tiny, neurons, batch, _ = table
    with tiny.edit(rl.MoveOutliers(neurons, [8, 20])):
        maps = patch_maps(tiny, batch.images[:4], [1])
    highest = torch.as_tensor(maps.norms).reshape(-1, 4, 36)[-1].topk(2, dim=1).indices.sort(1).values
    assert highest.tolist() == [[8, 20]] * 4
