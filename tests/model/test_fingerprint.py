"""The fingerprint of a model's weights: what it tells apart, what it does not, and where results keep it."""

import copy

import torch
from torch import Tensor

import registerlens as rl
from registerlens.data.synthetic import synthetic_images


def tiny():
    return rl.HookedViT.from_pretrained("registerlens:tiny")


def test_equal_weights_have_equal_fingerprints():
    vit = tiny()
    same = [copy.deepcopy(vit), copy.deepcopy(vit).double(), copy.deepcopy(vit).bfloat16()]
    other = rl.HookedViT(vit.cfg)
    assert other.fingerprint != vit.fingerprint
    other.load_state_dict(vit.state_dict())
    assert {one.fingerprint for one in (*same, other)} == {vit.fingerprint}


def test_one_edited_number_of_any_weight_gives_another_and_back():
    vit = tiny()
    before = vit.fingerprint
    for tensor in filter(Tensor.numel, vit.state_dict().values()):
        number = tensor.view(-1)[-1]
        kept = number.clone()
        with torch.inference_mode():
            number += 0.01 + abs(float(number)) / 50
        assert vit.fingerprint != before
        with torch.no_grad():
            number.copy_(kept)
        assert vit.fingerprint == before


def test_the_hash_is_kept_until_a_weight_changes(monkeypatch):
    vit = tiny()
    hashed = []
    monkeypatch.setattr("registerlens.model.browsing.tensor_hash", lambda tensor: hashed.append(1) or "0")
    first = vit.fingerprint
    n = len(hashed)
    assert (
        vit.fingerprint == first and vit.identity["fingerprint"] == first and len(hashed) == n == len(vit.state_dict())
    )
    vit.half().float()  # the memory may be the same one again
    assert vit.fingerprint and len(hashed) == 2 * n
    vit.ln_final.w = torch.nn.Parameter(vit.ln_final.w.detach().clone())
    assert vit.fingerprint and len(hashed) == 3 * n


def test_results_and_neurons_keep_it_and_edits_do_not_change_it(tmp_path):
    vit, images = tiny(), synthetic_images(8, 0).images
    with vit.edit(rl.Ablate(rl.Heads([(2, 0)]))):
        trace = rl.trace(vit, images)
    assert rl.analysis.Trace.load(trace.save(tmp_path / "trace")).fingerprint == vit.fingerprint
    neurons = rl.find_register_neurons(vit, images, top_k=2)
    assert neurons.found["fingerprint"] == neurons.search.fingerprint == vit.fingerprint
    assert rl.RegisterNeurons.load(neurons.save(tmp_path)).found["fingerprint"] == vit.fingerprint
