"""The page's sections on theory and mechanism: every result with words and picture, or the reason for none."""

import html
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from markupsafe import escape

import registerlens as rl
from registerlens.analysis.sink_events import PLACES
from registerlens.data.synthetic import synthetic_images
from registerlens.errors import ConfigError, InterventionError, NoOutliersError, RegisterLensError
from registerlens.viz import report, study
from registerlens.viz.reconcile import reconcile
from registerlens.viz.sections import mechanism_answer, mechanism_sections
from registerlens.viz.study import Mechanism, study_mechanism

NEURONS = rl.RegisterNeurons.from_pairs([(1, n) for n in (183, 103, 219, 125, 55, 128, 177)])
RESULTS = [name for name in Mechanism.__dataclass_fields__ if not name.startswith("n_")]


@pytest.fixture(scope="module")
def tiny():
    return rl.from_pretrained("registerlens:tiny"), synthetic_images(24, 2).images


@pytest.fixture(scope="module")
def found(tiny):
    return study_mechanism(*tiny, NEURONS)


@pytest.fixture(scope="module")
def plain():
    """A model with [CLS] and without outliers."""
    torch.manual_seed(0)
    cfg = rl.ViTConfig(n_layers=2, d_model=24, n_heads=2, d_mlp=32, image_size=(32, 32), patch_size=(8, 8), d_out=5)
    return study_mechanism(rl.HookedViT(cfg), torch.randn(10, 3, 32, 32), None)


def plain_text(page):
    """Without tags, so that words stand as a reader sees them."""
    return html.unescape(re.sub(r"<script.*?</script>|<[^>]+>", " ", page, flags=re.DOTALL))


def squeezed(text):
    return " ".join(text.split())


def test_every_result_is_there_or_says_why(found):
    reasons = {name for name in RESULTS if isinstance(getattr(found, name), RegisterLensError)}
    assert reasons == {"faithfulness", "order"}
    assert isinstance(found.faithfulness, ConfigError) and isinstance(found.order, InterventionError)
    assert (found.n_images, found.n_few) == (24, study.FEW)
    assert found.kernels.n_images == found.overlap.n_images == found.distributions.n_images == 24
    assert found.effects.n_images + found.effects.n_reference == study.FEW
    assert found.defects.n_images == 24  # outliers are there, so their angles are measured


def test_the_page_tells_every_result_in_words_and_draws_it(found):
    page = "".join(part.to_html() for part in mechanism_sections(found))
    text = squeezed(plain_text(page))
    for name in RESULTS:
        result = getattr(found, name)
        if isinstance(result, RegisterLensError):
            assert squeezed(f"Not shown: {result}") in text
        elif name not in ("kernels", "published_sinks", "sinks"):  # tables, see below
            assert squeezed(result.describe()) in text, name
    # Two of kernels, one of each other result but published_sinks, which shares its map.
    drawn = len(RESULTS) - 2 - 1 + 1
    assert page.count('class="plotly-graph-div"') == drawn


def test_the_kernel_section_has_each_condition_with_number_nulls_and_verdict(found):
    section = mechanism_sections(found)[0].body
    report = found.kernels
    text = squeezed(plain_text(section))
    assert report.conclusion() in text
    rows = re.findall(r"<tr(?: class=\"marked\")?>(.*?)</tr>", section)[1:]
    assert len(rows) == len(report.findings)
    for row, one in zip(rows, report.findings, strict=True):
        cells = re.findall("<t[dh][^>]*>(.*?)</t[dh]>", row)
        assert cells[-1] == one.verdict and cells[1].startswith(f"{one.value:.3g}<small>")
        assert f"p = {one.neurons_p:.2g}" in cells[3]
        assert squeezed(one.words) not in text  # the table says it once
    marked = section.count('<tr class="marked">')
    assert marked == sum(one.verdict == "holds" for one in report.findings) > 0


def test_the_sinks_are_one_table_by_share_of_the_queries_and_threshold(found):
    section = mechanism_sections(found)[1].body
    rows = [re.findall("<t[dh][^>]*>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", section)[1:]]
    swept = [(sinks, threshold) for sinks in (found.published_sinks, found.sinks) for threshold in sinks.thresholds]
    assert [row[:2] for row in rows] == [[f"{sinks.queries:.0%}", f"{threshold:g}"] for sinks, threshold in swept]
    for row, (sinks, threshold) in zip(rows, swept, strict=True):
        counts = sinks.counts(threshold)
        total = sum(counts.values())
        assert row[2] == f"{total / (sinks.n_images * sinks.gu_rate.size):.1%}"
        assert row[3:6] == [f"{n / total:.0%}" if total else "-" for n in counts.values()]
        assert row[7:] == (
            [f"{sinks.mean('stable_rank', threshold):.2f}", "outlier patch 100%"] if total else ["-"] * 2
        )
    assert {row[2] == "0.0%" for row in rows} == {True, False}


def test_the_few_heads_whose_sink_is_edited_are_those_that_have_one_most_often(tiny, found, monkeypatch):
    vit, images = tiny
    assert f"in the {study.HEADS} heads at most" in squeezed(plain_text(mechanism_sections(found)[1].body))
    places, detection = found.sinks.places.copy(), rl.find_outliers(vit, images).detection
    # What stands in block 0 or 1 is not after the onset, and sinks at other patches are not at outliers.
    places[:, found.sinks.index(study.THRESHOLD), :, 0] = 0
    places[PLACES.index("outlier_patch"), found.sinks.index(study.THRESHOLD), :, 0] = [9, 9, 1, 5, 0, 7]
    places[PLACES.index("other_patch"), found.sinks.index(study.THRESHOLD), :, 0] = [0, 0, 9, 0, 9, 0]
    monkeypatch.setattr(study, "HEADS", 2)
    edited = study._effects(vit, images[:8], replace(found.sinks, places=places), detection)
    np.testing.assert_array_equal(edited.events[:, 0] > 0, [False, False, False, True, False, True])
    assert (edited.threshold, edited.queries, edited.n_reference) == (study.THRESHOLD, study.HALF, 2)


def test_without_outliers_the_reason_stands_in_place_of_the_figures(plain):
    for name in ("kernels", "value_update", "overlap", "distributions", "updates", "weights", "order"):
        assert isinstance(getattr(plain, name), NoOutliersError), name
    assert plain.defects.n_images == 0 and plain.faithfulness.restrictions == ("patches", "cls")
    kernels, sinks, observables, evidence = (part.body for part in mechanism_sections(plain))
    reason = escape(str(plain.kernels))
    assert reason in kernels and "plotly" not in kernels
    assert evidence.count("Not shown") == 1 and escape(str(plain.distributions)) in evidence
    assert escape(plain.defects.describe()) in observables and "output cosine" in sinks
    assert "not asked" in mechanism_answer(plain, None)


def test_the_answer_at_the_top_is_the_verdict(found):
    assert found.kernels.no_op == "holds approximately"
    assert "Sinks as no-ops, by the weights: in part" in mechanism_answer(found, None)
    assert escape(found.kernels.conclusion()) in mechanism_answer(found, None)


def test_weights_edits_and_circuit_are_reconciled_in_one_paragraph(tiny, found, plain):
    vit, images = tiny
    circuit = rl.attention_circuit(vit, images[:4], NEURONS, check=False)
    words = reconcile(found, circuit)
    nop = found.sinks.counts(study.THRESHOLD)["nop"] / sum(found.sinks.counts(study.THRESHOLD).values())
    for number in (f"{nop:.0%}", f"{found.effects.mean('output', 'zero'):.1%}", "heads pass on little"):
        assert number in words
    assert words.endswith("heads do read.") and escape(words) in mechanism_answer(found, circuit)
    assert reconcile(plain, circuit) == reconcile(found, None) == ""


def test_reasons_are_given_as_they_are(tiny):
    vit, images = tiny
    refused = study_mechanism(vit, images[:4], NoOutliersError("too <few> images"))
    text = "".join(part.body for part in mechanism_sections(refused))
    assert "too &lt;few&gt; images" in text and "too <few> images" not in text
    one = study_mechanism(vit, images[:1], NEURONS)
    assert "there is only one" in str(one.effects)


def test_batches_give_what_a_tensor_gives(tiny, found):
    vit, images = tiny
    streamed = study_mechanism(vit, list(images.split(5)), NEURONS)
    assert (streamed.n_images, streamed.n_few) == (found.n_images, found.n_few)
    np.testing.assert_array_equal(streamed.sinks.mechanisms, found.sinks.mechanisms)
    np.testing.assert_allclose(streamed.effects.effects, found.effects.effects, rtol=1e-3, atol=1e-5)


def test_the_page_has_the_sections_only_where_they_were_studied(tiny, found, tmp_path):
    vit, images = tiny
    trace, shown = rl.trace(vit, images), np.zeros((1, 48, 48, 3), np.uint8)
    texts = []
    for mechanism in (None, found):
        path = tmp_path / "p.html"
        page = report.write_report(path, vit, images[:1], shown, trace, names=["a"], title="t", mechanism=mechanism)
        texts.append(page.read_text())
    ids = [f'id="{name}"' for name in ("kernels", "sinks", "observables", "evidence")]
    assert not any(name in texts[0] for name in ids)
    places = [texts[1].index(name) for name in ids]
    assert places == sorted(places) and places[-1] < texts[1].index('<h2 id="numbers">')
    assert texts[1].index("Sinks as no-ops") < texts[1].index('<h2 id="norms">')
    assert len(texts[1]) - len(texts[0]) < 400_000
