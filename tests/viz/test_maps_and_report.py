"""Maps put every value at its patch; the page holds them, whole or not at all."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from markupsafe import escape
from PIL import Image
from plotly.subplots import make_subplots

import registerlens as rl
from registerlens.analysis.maps import neuron_maps, patch_maps
from registerlens.data.synthetic import FLAT, synthetic_images
from registerlens.errors import InterventionError, NoOutliersError, RegisterLensError, ShapeError
from registerlens.pictures import colour, colour_bar, data_uri
from registerlens.viz import report, sections
from registerlens.viz.page import in_words
from registerlens.viz.study import explore_few, study_circuit, study_registers

REGISTER_NEURONS = [(1, n) for n in (183, 103, 219, 125, 55, 128, 177)]


def decode(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))


def test_colours_run_from_low_to_high_and_clip():
    values = np.array([[-1.0, 0.0], [1.0, 2.0]])
    painted = colour(values, 0.0, 1.0)
    assert (painted[0, 0] == painted[0, 1]).all() and (painted[1, 0] == painted[1, 1]).all()
    assert (painted[0, 0] != painted[1, 1]).any()
    np.testing.assert_array_equal(colour_bar(7, 2)[0, 0], painted[0, 0])
    np.testing.assert_array_equal(colour_bar(7, 2)[0, -1], painted[1, 1])


def test_a_picture_survives_the_page():
    pixels = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    np.testing.assert_array_equal(decode(data_uri(pixels)), pixels)


@pytest.mark.parametrize("class_token", [True, False])
def test_maps_equal_the_cache(class_token):
    torch.manual_seed(0)
    cfg = rl.ViTConfig(
        n_layers=3,
        d_model=24,
        n_heads=2,
        d_mlp=32,
        image_size=(32, 48),
        patch_size=(8, 8),
        class_token=class_token,
        n_trained_registers=2,
        pooling=(),
    )
    vit, images = rl.HookedViT(cfg), torch.randn(2, 3, 40, 24)
    layout = vit.layout(images)
    maps = patch_maps(vit, images, [2, 0])
    _, cache = vit.run_with_cache(images)
    for row, layer in enumerate(maps.layers):
        norms = cache[f"blocks.{layer}.hook_resid_post"].norm(dim=-1)
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"].mean(1)
        drawn = pattern[:, 0] if class_token else pattern.mean(1)
        for mine, theirs in ((maps.norms[row], norms), (maps.attention[row], drawn)):
            expected = layout.to_grid(theirs).detach().numpy()
            assert mine.shape == (2, 5, 3)
            np.testing.assert_allclose(mine, expected, rtol=1e-4, atol=1e-6)


def test_maps_of_an_edited_model_leave_registers_and_bias_out(tiny):
    vit, batch, _ = tiny
    neurons, images = rl.RegisterNeurons.from_pairs(REGISTER_NEURONS), batch.images[:3]
    clean = patch_maps(vit, images, [1, 5])
    assert np.isnan(clean.register_norm).all() and np.isnan(clean.register_attention).all()
    with vit.edit(rl.TestTimeRegisters(neurons, n=2)):
        register = patch_maps(vit, images, [1, 5])
        _, cache = vit.run_with_cache(images)
    np.testing.assert_allclose(
        register.register_norm[1], cache["blocks.5.hook_resid_post"][:, -2:].norm(dim=-1).amax(-1), rtol=1e-4
    )
    drawn = cache["blocks.5.attn.hook_pattern"].mean((1, 2))[:, -2:].sum(-1)
    np.testing.assert_allclose(register.register_attention[1], drawn.detach(), rtol=1e-4)
    with vit.edit(rl.AttentionBias.fit(vit, images, neurons)):
        bias = patch_maps(vit, images, [1, 5])
    for edited in (register, bias):
        assert edited.norms.shape == edited.attention.shape == (2, 3, 6, 6)
        assert edited.norms[1].max() < clean.norms[1].max() / 5
        total = edited.attention[1].sum((1, 2)) + edited.register_attention[1]
        np.testing.assert_allclose(total, 1, atol=1e-4)  # no [CLS] in this model: patches and the extra keys are all
    assert np.isnan(bias.register_norm).all()


def test_a_layer_given_twice_counts_once(tiny):
    vit, batch, _ = tiny
    assert patch_maps(vit, batch.images[:1], [5, 5, 1]).layers == (5, 1)


def test_neuron_maps_equal_the_cache_in_the_order_given(tiny):
    vit, batch, _ = tiny
    pairs = [(1, 183), (0, 7), (1, 103)]
    maps = neuron_maps(vit, batch.images, pairs)
    _, cache = vit.run_with_cache(batch.images)
    layout = vit.layout(batch.images)
    for row, (layer, neuron) in enumerate(pairs):
        expected = layout.to_grid(cache[f"blocks.{layer}.mlp.hook_post"])[..., neuron].detach()
        np.testing.assert_allclose(maps.activations[row], expected, rtol=1e-4, atol=1e-5)
    assert maps.pairs == tuple(pairs) and maps.activations.shape == (3, 16, 6, 6)


def test_neuron_maps_show_what_an_edit_does(tiny):
    vit, batch, _ = tiny
    neurons = rl.RegisterNeurons.from_pairs(REGISTER_NEURONS)
    with vit.edit(rl.MoveOutliers(neurons, 8)):
        moved = neuron_maps(vit, batch.images[:2], [(1, 183)]).activations[0].reshape(2, -1)
    assert (moved.argmax(1) == 8).all() and (np.delete(moved, 8, 1) == 0).all()


@pytest.mark.parametrize("pairs", [[], [(6, 0)], [(1, 256)]])
def test_neuron_maps_refuse_neurons_that_do_not_exist(pairs):
    with pytest.raises(InterventionError, match=r"No neuron was given|do not exist"):
        neuron_maps(rl.from_pretrained("registerlens:tiny"), torch.rand(1, 3, 48, 48), pairs)


def test_maps_refuse_layers_that_do_not_exist():
    vit = rl.from_pretrained("registerlens:tiny")
    with pytest.raises(ShapeError, match=r"\[6\].*0 to 5"):
        patch_maps(vit, torch.rand(1, 3, 48, 48), [0, 6])


@pytest.fixture(scope="module")
def tiny():
    vit, batch = rl.from_pretrained("registerlens:tiny"), synthetic_images(16, 2)
    return vit, batch, rl.trace(vit, batch.images)


def test_the_page_shows_the_outliers_where_they_are(tiny, tmp_path):
    vit, batch, found = tiny
    display = batch.images[:1].clamp(0, 1).mul(255).byte().permute(0, 2, 3, 1).contiguous().numpy()
    page = report.write_report(
        tmp_path / "new" / "page.html", vit, batch.images[:1], display, found, names=["<one>.png"], title="T & U"
    )
    text = page.read_text()
    assert "T &amp; U" in text and "&lt;one&gt;.png" in text and "block 1, after its MLP" in text
    pictures = re.findall(r'<img class="map"[^>]*src="([^"]+)"', text)
    assert len(pictures) == 6  # norm and attention at the onset, the next block and the last
    norm_after_onset = decode(pictures[0]).astype(int)
    bright = (norm_after_onset[..., 1] > 150).reshape(-1)  # the bright end of viridis is green
    np.testing.assert_array_equal(bright, (batch.roles[0] == FLAT).numpy())


def test_map_layers_without_outliers_are_first_middle_last(tiny):
    vit, batch, found = tiny
    assert report.map_layers(found) == (1, 2, 5)
    torch.manual_seed(0)
    assert report.map_layers(rl.trace(rl.HookedViT(vit.cfg), batch.images)) == (0, 2, 5)


def test_an_interrupted_page_leaves_nothing(tiny, tmp_path, monkeypatch):
    vit, batch, found = tiny
    display = np.zeros((1, 48, 48, 3), np.uint8)

    def broken(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(sections, "numbers_section", broken)
    with pytest.raises(KeyboardInterrupt):
        report.write_report(tmp_path / "p.html", vit, batch.images[:1], display, found, names=["x"], title="t")
    assert list(tmp_path.iterdir()) == []


def shown(batch, n):
    return batch.images[:n].clamp(0, 1).mul(255).byte().permute(0, 2, 3, 1).contiguous().numpy()


@pytest.fixture(scope="module")
def studied(tiny, tmp_path_factory):
    vit, batch, found = tiny
    study = study_registers(vit, synthetic_images(64, 0).images, batch.images, "Found on <64>, evaluated on 16.")
    path = tmp_path_factory.mktemp("page") / "page.html"
    names = [f"{i}.png" for i in range(6)]
    report.write_report(path, vit, batch.images[:6], shown(batch, 6), found, names=names, title="t", study=study)
    return study, path.read_text()


def test_the_answers_come_first(studied):
    _, text = studied
    top = text[text.index("<main") : text.index('<h2 id="norms">')]
    assert "Outlier tokens: present" in top and "Register neurons: 7" in top and "Test-time register: worked" in top
    assert text.count("* plotly.js v") == 1 and 'src="http' not in text  # the script once, and inside


def test_the_page_lists_the_neurons_with_their_scores_and_maps(studied):
    study, text = studied
    section = text[text.index('<h2 id="neurons">') : text.index('<h2 id="register">')]
    for layer, neuron, score in study.neurons:
        assert f"</th><td>{layer}:{neuron}</td><td>{score:.3g}</td>" in section
    for score in ("mean", "mean_abs", "contrast", "auc"):
        assert f'<th scope="col">{score}</th>' in section
    pictures = re.findall(r'<img class="map"[^>]*src="([^"]+)"', section)
    assert len(pictures) == 4 * (1 + 4)  # four images: the norm, and four neurons
    first_neuron = decode(pictures[1]).astype(int)
    np.testing.assert_array_equal((first_neuron[..., 1] > 150).reshape(-1), study_outliers(0))


def study_outliers(image):
    return (synthetic_images(16, 2).roles[image] == FLAT).numpy()


def test_before_and_after_share_a_scale(studied):
    _, text = studied
    section = text[text.index('<h2 id="register">') : text.index('<h3 id="register-before')]
    assert "Found on &lt;64&gt;, evaluated on 16." in section and "share their scale" in section
    before, after, own = re.findall(r'<img class="map"[^>]*src="([^"]+)"', section)[:3]
    bright = [(decode(picture).astype(int)[..., 1] > 150).reshape(-1) for picture in (before, after, own)]
    np.testing.assert_array_equal(bright[0], study_outliers(0))
    assert not bright[1].any() and bright[2].any()  # dark on the common scale; on its own it has a maximum
    assert re.search(r"register \d+", section) and "register or bias 0." in section


def test_the_table_has_every_condition_with_intervals(studied):
    study, text = studied
    table = text[text.index('<h3 id="register-before') :]
    for condition in study.evaluation.conditions:
        assert re.search(f'<tr( class="marked")?><th scope="row">{re.escape(condition)}</th>', table)
    clean = study.evaluation.to_dataframe().set_index(["condition", "metric"]).loc[("clean", "outliers")]
    assert f"<td>{clean['mean']:.3f}<small>{clean['low']:.3f} to {clean['high']:.3f}</small></td>" in table
    assert "over 16 images" in table


def test_without_outliers_the_page_says_that_there_is_nothing_to_look_for(tiny, tmp_path):
    vit, batch, _ = tiny
    torch.manual_seed(0)
    plain = rl.HookedViT(vit.cfg)
    found = rl.trace(plain, batch.images)
    study = study_registers(plain, batch.images, batch.images, "")
    assert isinstance(study, NoOutliersError)
    page = report.write_report(
        tmp_path / "p.html", plain, batch.images[:1], shown(batch, 1), found, names=["a"], title="t", study=study
    )
    text = page.read_text()
    assert "Register neurons: nothing to look for" in text and "There is nothing to look for" in text
    evidence = found.evidence[found.sublayers.index(found.strongest)]
    assert f"{evidence.largest_over_median:.1f} x the image" in text and evidence.reason.split(" (")[0] in text
    assert 'id="register"' not in text
    assert "There is no path to follow: on these 16 images" in text  # the circuit's section


def test_a_search_that_finds_nothing_is_said_at_the_top(tiny, tmp_path):
    vit, batch, found = tiny
    page = report.write_report(
        tmp_path / "p.html",
        vit,
        batch.images[:1],
        shown(batch, 1),
        found,
        names=["a"],
        title="t",
        study=NoOutliersError("too <few> images"),
    )
    text = page.read_text()
    assert "not looked for" in text and "too &lt;few&gt; images" in text and 'id="neurons"' not in text
    assert 'id="circuit"' not in text  # nobody asked for one


def test_the_page_has_the_circuit_or_the_reason_for_none(tiny, studied, tmp_path):
    vit, batch, found = tiny
    circuit = study_circuit(vit, batch.images, studied[0])
    assert circuit.neurons.pairs == studied[0].neurons.pairs and circuit.n_used == 16
    assert circuit.detection == studied[0].evaluation.detection
    cases = (
        (circuit, escape(circuit.describe().splitlines()[0])),
        (NoOutliersError("too <few>"), "too &lt;few&gt;"),
    )
    for given, said in cases:
        about = {"names": ["a"], "title": "t", "circuit": given}
        page = report.write_report(tmp_path / "p.html", vit, batch.images[:1], shown(batch, 1), found, **about)
        section = page.read_text().partition('<h2 id="circuit">')[2].partition("</section>")[0]
        assert said in section and ("plotly-graph-div" in section) == (given is circuit)


def test_what_cannot_be_followed_gives_its_reason(tiny, studied):
    vit, batch, _ = tiny
    assert study_circuit(vit, batch.images, None) is None
    assert isinstance(study_circuit(vit, torch.zeros(2, 3, 48, 48), studied[0]), RegisterLensError)


def test_images_to_explore_are_the_first_with_the_register_beside_the_clean_model(tiny, studied):
    vit, batch, found = tiny
    explorer = explore_few(vit, batch.images, shown(batch, 16), found, studied[0], names=[f"{i}" for i in range(16)])
    assert explorer.names == ("0", "1", "2") and list(explorer.conditions) == ["clean", "test-time register"]
    assert explorer.neurons is studied[0].neurons and torch.equal(explorer.images, batch.images[:3])
    assert explorer.attention(0, "test-time register").recording.n_keys == 37


def test_words_on_a_figure_name_its_axes_from_the_first_to_the_last():
    figure, names = make_subplots(1, 12), [f"axis {i}" for i in range(12)]
    for column, name in enumerate(names, start=1):
        figure.update_xaxes(title_text=name, row=1, col=column)
    assert in_words(figure) == f"x: {', '.join(names)}."
