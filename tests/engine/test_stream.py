"""One pass for any number of reducers: no deeper than asked, nothing left behind, and shards that add up."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import registerlens as rl
from registerlens.analysis.detection import detect
from registerlens.analysis.massive import MassiveSums
from registerlens.analysis.overlap import OverlapSums
from registerlens.analysis.scores import ScoreSums
from registerlens.analysis.sink_events import SinkSums
from registerlens.analysis.trace import TraceSums
from registerlens.data.synthetic import synthetic_images
from registerlens.engine.stream import Sums, batches, stream
from registerlens.errors import HookNameError, ImageError, ShapeError
from registerlens.model.names import match_names


class At(Sums):
    """How large the activation at some hook points is, and which batches came by."""

    def __init__(self, *points):
        super().__init__()
        self.points, self.batches = points, []

    def hooks(self, vit, layout):
        return [(point, lambda x, hook: self.add(**{hook.name: x.sum()})) for point in self.points]

    def update(self, batch):
        self.batches.append(batch)
        self.add(n_images=len(batch))

    def result(self):
        return self.totals


@pytest.fixture(scope="module")
def vit():
    return rl.HookedViT.from_pretrained("registerlens:tiny")


@pytest.fixture(scope="module")
def images():
    return torch.rand(7, 3, 48, 48, generator=torch.Generator().manual_seed(0))


def blocks_run(vit, run):
    """Every sublayer's output that came by."""
    seen = []
    with vit.hooks([("blocks.*.hook_*_out", lambda x, hook: seen.append(hook.name))]):
        run()
    return seen


def test_each_reducer_gets_what_it_would_get_alone(vit, images):
    def both():
        return At("blocks.0.hook_resid_pre", "blocks.*.hook_mlp_out"), At("blocks.2.attn.hook_z")

    together = stream(vit, images, both(), batch_size=3, description="looking")
    alone = [stream(vit, images, [one], batch_size=3, description="looking")[0] for one in both()]
    assert together == alone
    assert len(together[0]) == 1 + 1 + vit.cfg.n_layers


@pytest.mark.parametrize(
    ("points", "last"),
    [
        (("blocks.1.hook_resid_mid", "blocks.0.mlp.hook_post"), ["0.attn", "0.mlp", "1.attn"]),
        (("blocks.1.hook_resid_post",), ["0.attn", "0.mlp", "1.attn", "1.mlp"]),
        (("hook_patch_embed",), []),
        (("ln_final.hook_normalized",), None),
    ],
)
def test_a_pass_ends_with_the_last_point_that_anyone_asked_for(vit, images, points, last):
    every = [f"{layer}.{kind}" for layer in range(vit.cfg.n_layers) for kind in ("attn", "mlp")]
    reducers = [At(point) for point in points]
    run = blocks_run(vit, lambda: stream(vit, images, reducers, batch_size=8, description="looking"))
    assert run == [f"blocks.{at.split('.')[0]}.hook_{at.split('.')[1]}_out" for at in (every if last is None else last)]
    assert all(one.n_images == 7 for one in reducers)


def test_batches_say_where_they_are_and_carry_their_labels(vit, images):
    one = At("hook_embed")
    stream(vit, images, [one], batch_size=3, labels=torch.arange(7), description="looking")
    assert [(batch.start, len(batch)) for batch in one.batches] == [(0, 3), (3, 3), (6, 1)]
    assert torch.equal(torch.cat([batch.images for batch in one.batches]), images)
    assert [batch.labels.tolist() for batch in one.batches] == [[0, 1, 2], [3, 4, 5], [6]]


def test_layouts_follow_sizes_and_edits(vit, images):
    one = At("hook_embed")
    with vit.edit(rl.TestTimeRegisters(rl.RegisterNeurons.from_pairs([(0, 1)]))):
        with vit.hooks([("blocks.0.mlp.hook_post", lambda x, hook: None)]):
            vit(images)  # so that the edit fires
        stream(vit, [images, images[..., :40]], [one], description="looking")
    assert [batch.layout.grid for batch in one.batches] == [(6, 6), (6, 5)]
    assert all(batch.layout.n_test_time_registers == 1 for batch in one.batches)


REDUCERS = {
    "trace": lambda vit, found: TraceSums(vit),
    "massive": lambda vit, found: MassiveSums(vit),
    "overlap": lambda vit, found: OverlapSums(vit, found, sink_layers=range(2, 6)),
    "scores": lambda vit, found: ScoreSums(vit, found, range(3), early_stop=True),
    "sinks": lambda vit, found: SinkSums(vit, (0.3, 0.1), queries=0.5),
}


@pytest.mark.parametrize("kind", REDUCERS)
def test_shards_merge_to_what_one_pass_sees(vit, kind):
    images = synthetic_images(14, 0).images
    found = detect(vit, images)
    whole, one, other = (REDUCERS[kind](vit, found) for _ in range(3))
    for reducer, part in ((whole, images), (one, images[:8]), (other, images[8:])):
        stream(vit, part, [reducer], batch_size=4, description="looking")
    assert one.n_images == 8
    one.merge(other)
    assert one.n_images == 14 and one.totals.keys() == whole.totals.keys()
    for name, total in whole.totals.items():
        # Whole numbers exactly; of the others only the order of summation differs.
        tolerance = {"rtol": 1e-12, "atol": 1e-12} if total.is_floating_point() else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(one.totals[name], total, **tolerance)
    one.result()


def test_recorded_activations_do_as_well(vit, images):
    live, fed = TraceSums(vit), TraceSums(vit)
    stream(vit, images, [live], description="tracing")
    hooks = fed.hooks(vit, vit.layout(images))
    wanted = [(name, hook) for names, hook in hooks for name in match_names(names, vit.hook_dict)]
    recorded = vit.run_with_cache(images, names_filter=[name for name, _ in wanted])[1]
    for at, activation in recorded.items():  # in the order of a pass
        for name, hook in wanted:
            if name == at:
                hook(activation, SimpleNamespace(name=name))
    fed.update(*batches(vit, images, len(images), "looking"))
    for name, value in live.means().items():
        np.testing.assert_array_equal(fed.means()[name], value)


def test_hooks_are_gone_after_an_error(vit, images):
    class Refuses(At):
        def hooks(self, vit, layout):
            def refuse(x, hook):
                raise ZeroDivisionError

            return [("blocks.3.hook_resid_post", refuse)]

    with pytest.raises(ZeroDivisionError):
        stream(vit, images, [At("blocks.*.hook_resid_post"), Refuses()], description="looking")
    assert not any(point.fwd_hooks for point in vit.hook_dict.values())
    with pytest.raises(HookNameError, match="resid_past"):
        stream(vit, images, [At("blocks.3.hook_resid_past")], description="looking")


@pytest.mark.parametrize("nothing", [torch.zeros(0, 3, 48, 48), [], iter([])])
def test_no_image_is_refused_and_the_purpose_named(vit, nothing):
    with pytest.raises(ImageError, match=r"No image came for looking.*iterated only once\. Give a tensor"):
        stream(vit, nothing, [At("hook_embed")], description="looking")


@pytest.mark.parametrize(
    ("images", "n", "text"),
    [
        (torch.rand(7, 3, 48, 48), 6, "6 labels for 7 images; one for each"),
        (list(torch.rand(7, 3, 48, 48).split(4)), 6, "6 labels for 7 images or more"),
        (list(torch.rand(7, 3, 48, 48).split(4)), 8, "8 labels for 7 images; one for each"),
    ],
)
def test_labels_that_do_not_fit_are_refused(vit, images, n, text):
    with pytest.raises(ShapeError, match=text):
        stream(vit, images, [At("hook_embed")], labels=torch.zeros(n, dtype=torch.long), description="looking")


@pytest.mark.parametrize("layer", [0, 5])
def test_an_edit_behind_what_is_watched_fires_all_the_same(layer):
    """Also in the MLP of the last block, which nobody watches: else leaving the edit would say that it never fired."""
    vit, images = rl.from_pretrained("registerlens:tiny"), torch.rand(3, 3, 48, 48)
    neurons = rl.RegisterNeurons.from_pairs([(layer, 3)])
    with vit.edit(rl.TestTimeRegisters(neurons)):
        rl.analysis.classify_sinks(vit, images)
        rl.Ablate.fit(vit, images, rl.RegisterNeurons.from_pairs([(0, 1)]), "mean")
    assert rl.AttentionBias.fit(vit, images, neurons).n_keys == 1
