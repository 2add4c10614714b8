"""The criteria reproduce the table of the experiment behind registerlens:tiny, which its own script measured."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import registerlens as rl
from registerlens.emergence.config import TrainingConfig
from registerlens.emergence.criteria import emergence_criteria
from registerlens.emergence.run import held_out_images, labels_of

FOLDER = Path(__file__).parent / "experiment"
N = 96
LARGER = {
    "task": {"grid": 8, "n_triggers": 10, "flats": [1, 4]},
    "model": {"d_model": 96, "n_heads": 2, "d_mlp": 384},
}
RENAMED = {
    "pe.": "embed.patch.",
    "bl.": "blocks.",
    ".n1.": ".ln1.",
    ".a.qkv.": ".attn.qkv.",
    ".a.o.": ".attn.out.",
    ".n2.": ".ln2.",
    ".f1.": ".mlp.up.",
    ".f2.": ".mlp.out.",
    "head.": "head.linear.",
}
# Outliers an image, largest over median before and after the onset's MLP, 99.9th percentile of normal patches and 1st
# of outliers, neurons moved (chosen there by hand, here from data), the register's norm, accuracy with them zeroed.
TABLE = {
    "h0": ({}, "2.mlp", 1.97, (2.6, 17.4), (1.7, 9.4), 12, 16.1, 0.9999),
    "h3": ({}, "1.mlp", 1.97, (2.2, 8.9), (2.1, 7.6), 3, 8.6, 0.990),
    "b1": (LARGER, "2.mlp", 2.47, (2.0, 21.1), (1.8, 9.4), 5, 20.8, 0.9996),
}


def experiments_model(name, config):
    """A file of the experiment, its names changed to ours; it has a head for colours that nothing uses."""
    state = {"embed.prefix": torch.zeros(0, config.model.d_model)}
    for name_there, tensor in load_file(FOLDER / f"{name}.safetensors").items():
        ours = name_there if name_there[:2] != "n." else f"ln_final.{name_there[2:]}"
        for theirs, new in RENAMED.items():
            ours = ours.replace(theirs, new) if theirs[0] == "." or ours.startswith(theirs) else ours
        state[ours] = tensor
    state["embed.W_pos"] = state.pop("pos")[0]
    vit = rl.HookedViT(config.vit_config, source=name)
    vit.load_state_dict({key: tensor for key, tensor in state.items() if not key.startswith("ch.")})
    return vit.eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_the_experiments_table(name):
    settings, onset, per_image, jump, quantiles, n_neurons, register_norm, zeroed = TABLE[name]
    config = TrainingConfig(**settings)
    vit, batch = experiments_model(name, config), held_out_images(config, 2 * N, part=1)
    # The experiment's 12 neurons of h0 leave a mode at 2.8 times the median; from data we take 16, which leave none.
    top_k = n_neurons if name == "h0" else "auto"
    found = emergence_criteria(vit, batch.images, labels_of(batch, vit.layout(batch.images)), top_k=top_k)
    failing = [row["criterion"] for row in found.to_dataframe().to_dict("records") if not row["holds"]]
    assert failing == ([] if name == "h3" else ["zeroing: accuracy"])  # "zeroing alone hurts clearly on one seed only"
    assert found.onset == onset
    at = 2 * int(onset[0]) + 2
    assert found.largest_over_median[[at - 1, at]] == pytest.approx(jump, rel=0.05)
    assert found.quantiles == pytest.approx(quantiles, rel=0.2)  # tails of a hundred images against those of 512
    assert len(found.neurons) == pytest.approx(n_neurons, abs=2)
    conditions = found.conditions().set_index("condition")
    outliers, accuracy = conditions["outliers"], conditions["accuracy"]
    assert outliers["clean"] == pytest.approx(per_image, abs=0.15)
    assert outliers["register"] <= 0.07 and accuracy["register"] > 0.9995
    assert conditions["register_norm"]["register"] == pytest.approx(register_norm, rel=0.1)
    assert accuracy["zeroing"] == pytest.approx(zeroed, abs=0.003)
    assert outliers.filter(like="random").min() == pytest.approx(outliers["clean"], abs=0.02)
