"""The training loop: against a plain one, killed and continued, refused, and gone astray."""

import json
import math
import time
from multiprocessing import forkserver

import pytest
import torch
import torch.nn.functional as F
from small_runs import MODEL, small, victim
from torch import nn

from registerlens import HookedViT
from registerlens.config import TokenLayout
from registerlens.data.synthetic import FLAT, synthetic_images
from registerlens.emergence import training
from registerlens.emergence.config import ModelShape
from registerlens.emergence.run import TRAINING, TrainingRun, labels_of, seed_of
from registerlens.emergence.training import DivergedError, initial_vit, task_loss, train
from registerlens.engine.processes import _context
from registerlens.errors import ConfigError, WeightsError

CLOCKS = ["seconds", "cpu_seconds"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing disturbed."""
    return train(small(), tmp_path_factory.mktemp("runs") / "whole")


def same(first, second):
    """Whether two runs' last weights, states and metrics are equal, bit for bit."""
    ours, theirs = (run.vit().state_dict() for run in (first, second))
    assert ours.keys() == theirs.keys()
    metrics = [run.metrics().drop(columns=CLOCKS) for run in (first, second)]
    return all(torch.equal(ours[key], theirs[key]) for key in ours) and metrics[0].equals(metrics[1])


def test_a_run_leaves_what_it_says(whole):
    assert whole.finished and whole.checkpoints == (0, 4, 8) and whole.diverged is None
    assert whole.metrics()["step"].tolist() == [0, 4, 8]
    assert TrainingRun.open(whole.folder).config == small()
    assert isinstance(HookedViT.from_pretrained(whole.checkpoint(8)), HookedViT)
    first = whole.vit(0).state_dict()
    assert all(torch.equal(first[key], value) for key, value in initial_vit(small()).state_dict().items())
    with pytest.raises(ConfigError, match=r"no checkpoint of step 5. There are: \[0, 4, 8\]"):
        whole.vit(5)


def test_equal_seeds_give_equal_bits_whatever_is_logged(whole, tmp_path):
    state = torch.get_rng_state()
    again = train(small(), tmp_path / "again")
    assert same(whole, again) and torch.equal(state, torch.get_rng_state())
    torch.manual_seed(99)  # the global generator has no say
    rarely = train(small(log_every=8, checkpoint_every=8), tmp_path / "rarely")
    weights, others = rarely.vit().state_dict(), whole.vit().state_dict()
    assert all(torch.equal(weights[key], others[key]) for key in weights)
    other = train(small(seed=2), tmp_path / "other").vit().state_dict()
    assert not torch.equal(other["embed.W_pos"], others["embed.W_pos"])


def test_the_loop_is_a_plain_one(whole):
    """Written again: loss by loops over patches, decay and clipping by hand, AdamW by its formula."""
    config, vit = small(), initial_vit(small())
    names = dict(vit.named_parameters())
    first, second = ({name: torch.zeros_like(p) for name, p in names.items()} for _ in range(2))
    for step in range(config.steps):
        batch = synthetic_images(4, seed_of(TRAINING, 1, step), config.task)
        logits, total, weights = vit(batch.images).view(4, 16, 2, 5), 0.0, 0.0
        for i in range(4):
            for p in range(16):
                weight = max(0.0, 1 - step / 5) if batch.roles[i, p] == FLAT else 1.0
                for k in range(2):
                    total = total - weight * logits[i, p, k].log_softmax(0)[batch.labels[i, p, k]]
                    weights += weight
        gradients = torch.autograd.grad(total / weights, list(names.values()))
        length = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        rate = config.learning_rate_at(step)
        with torch.no_grad():
            for (name, p), g in zip(names.items(), gradients, strict=True):
                clipped = g * min(1.0, 1.0 / (length + 1e-6))
                first[name] += 0.1 * (clipped - first[name])
                second[name] += 0.05 * (clipped.square() - second[name])
                p *= 1 - rate * (0.05 if p.ndim >= 2 else 0.0)
                corrected = (second[name] / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8
                p -= rate * first[name] / (1 - 0.9 ** (step + 1)) / corrected
    trained = whole.vit().state_dict()
    for name, p in names.items():
        torch.testing.assert_close(trained[name], p.detach(), rtol=1e-3, atol=2e-5)


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.parametrize(("moment", "nth"), [("_update", 6), ("save", 0), ("_save_state", 1)])
def test_a_run_goes_on_wherever_it_was_stopped(whole, moment, nth, tmp_path, monkeypatch):
    original, calls = getattr(training, moment), []

    def stop(*arguments, **options):
        calls.append(moment)
        if len(calls) == nth + 1:
            raise Killed
        return original(*arguments, **options)

    monkeypatch.setattr(training, moment, stop)
    with pytest.raises(Killed):
        train(small(), tmp_path)
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    (tmp_path / "checkpoints" / ".half.x").write_text("written")  # what a kill within a write leaves
    monkeypatch.setattr(training, moment, original)
    assert same(whole, train(small(), tmp_path))
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_with_the_same_bits(tmp_path):
    context = _context()
    forkserver.ensure_running()
    config = small(steps=60)
    for n_files in (3, 11, 25):  # killed when so many files are there
        mine, its = context.Pipe()
        process = context.Process(target=victim, args=(tmp_path / "killed", its, 60))
        process.start()
        assert mine.poll(200) and mine.recv() == "started"
        until = time.monotonic() + 120
        while len(list((tmp_path / "killed").rglob("*.*"))) < n_files:
            assert time.monotonic() < until and not mine.poll(), "it finished before it could be killed"
            time.sleep(0.002)
        process.kill()
        process.join()
        assert process.exitcode == -9
        assert not TrainingRun.open(tmp_path / "killed").finished
    assert same(train(config, tmp_path / "killed"), train(config, tmp_path / "whole"))


def test_other_runs_are_refused(whole, tmp_path):
    with pytest.raises(ConfigError, match=r"another configuration: task.noise is 0.6 there, 0.5 here"):
        train(small(task=small().task.changed(noise=0.5)), whole.folder)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty, and holds no training run"):
        train(small(), tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        TrainingRun.open(tmp_path)
    with pytest.raises(ConfigError, match="no metrics yet"):
        TrainingRun.make(tmp_path / "new", small()).metrics()


def test_hidden_files_of_others_stay(tmp_path):
    run = TrainingRun.make(tmp_path / "run", small())
    (run.folder / ".gitignore").write_text("checkpoints")
    (run.folder / ".ipynb_checkpoints").mkdir()
    (run.folder / ".state.safetensors.ab12").write_text("half")
    run.forget_after(-1)
    assert sorted(path.name for path in run.folder.iterdir()) == [".gitignore", ".ipynb_checkpoints", "config.json"]


def test_a_damaged_or_foreign_state_is_refused(whole, tmp_path):
    run = TrainingRun.make(tmp_path, small(steps=20))
    run.state_file.write_bytes(whole.state_file.read_bytes())
    with pytest.raises(ConfigError, match="a checkpoint of another configuration"):
        train(small(steps=20), tmp_path)
    run.state_file.write_bytes(whole.state_file.read_bytes()[:1000])
    with pytest.raises(WeightsError, match="is damaged"):
        train(small(steps=20), tmp_path)


@pytest.mark.parametrize(
    "settings", [{"learning_rate": 1e4, "clip_norm": 1e9, "optimiser": "sgd"}, {"learning_rate": 30.0}]
)
def test_a_diverged_run_is_stopped_and_its_last_checkpoint_kept(settings, tmp_path):
    config = small(log_every=1, checkpoint_every=1, warm_up=0, **settings)
    with pytest.raises(DivergedError, match=r"diverged at step \d+: loss .* Kept: the checkpoint of step"):
        train(config, tmp_path)
    run = TrainingRun.open(tmp_path)
    seen = run.diverged
    assert seen["last_checkpoint"] == run.checkpoints[-1] == seen["step"] and not run.finished
    assert not float(seen["losses"][-1]) <= 3 * math.log(5) or not math.isfinite(float(seen["gradient_norms"][-1]))
    assert all(p.isfinite().all() for p in run.vit().parameters())
    json.loads(run.diverged_file.read_text())


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path, monkeypatch):
    def broken(output, *arguments):
        return (output * 0).sum().sqrt()  # the loss is 0, its gradient NaN

    monkeypatch.setattr(training, "task_loss", broken)
    with pytest.raises(DivergedError, match=r"loss 0 .* gradient norm nan"):
        train(small(), tmp_path)
    kept = TrainingRun.open(tmp_path).vit()
    assert all(torch.equal(p, q) for p, q in zip(kept.parameters(), initial_vit(small()).parameters(), strict=True))


def test_the_loss_counts_patches_and_cls_by_hand():
    task = small().task
    batch = synthetic_images(3, 0, task)
    layout = TokenLayout(grid=(4, 4), n_prefix=1, n_trained_registers=2)
    logits = torch.randn(3, 19, 10, generator=torch.Generator().manual_seed(0))
    each = [[], [], []]  # labelled patches, flat ones, [CLS]
    for i in range(3):
        for k in range(2):
            of = lambda at, label: float(F.cross_entropy(logits[i, at, 5 * k : 5 * k + 5], label))  # noqa: B023, E731
            each[2].append(of(0, batch.image_labels[i, k]))
            for p in range(16):
                each[int(batch.roles[i, p] == FLAT)].append(of(3 + p, batch.labels[i, p, k]))
    weights = len(each[0]) + 0.3 * len(each[1])
    expected = (sum(each[0]) + 0.3 * sum(each[1])) / weights + 0.7 * sum(each[2]) / len(each[2])
    assert float(task_loss(logits, batch, layout, 0.3, 0.7)) == pytest.approx(expected, rel=1e-5)
    labels = labels_of(batch, layout)
    assert torch.equal(labels[:, layout.patches] < 0, (batch.roles == FLAT)[..., None].expand(-1, -1, 2))
    assert (labels[:, layout.trained_registers] == -1).all()


def test_cls_and_trained_registers_and_sgd_train(tmp_path):
    shape = MODEL.changed(class_token=True, n_trained_registers=2)
    run = train(small(model=shape, optimiser="sgd", learning_rate=0.05, steps=8, warm_up=0), tmp_path)
    last = run.metrics().iloc[-1]
    assert 0 <= last["accuracy_image"] <= 1 and last["loss"] < run.metrics()["loss"].iloc[1]
    changed = run.vit(0).embed.prefix - run.vit().embed.prefix
    assert changed.shape == (3, 16) and (changed.abs().sum(1) > 0).all()


def test_initial_weights_are_the_recipes():
    vit = initial_vit(small(model=ModelShape()))
    for name, module in vit.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1), name
            assert not module.bias.any(), name
    assert vit.embed.W_pos.std().item() == pytest.approx(0.02, rel=0.1)


def test_weights_that_overflow_before_the_next_update_are_seen_too(tmp_path):
    config = small(learning_rate=1e9, clip_norm=1e9, optimiser="sgd", warm_up=0, log_every=1, checkpoint_every=1)
    with pytest.raises(
        DivergedError, match=r"diverged at step 1: .* NaN or infinite .* Kept: the checkpoint of step 0"
    ):
        train(config, tmp_path)
    run = TrainingRun.open(tmp_path)
    assert run.checkpoints == (0,) and run.diverged["last_checkpoint"] == 0 and not run.finished
