"""A circuit's figure as a person sees it, in Chromium: nothing asked of the network, numbers on hovering."""

import pytest
from browser import opened

import registerlens as rl
from registerlens.circuits.attention_circuit import attention_circuit
from registerlens.data.synthetic import synthetic_images


@pytest.mark.slow
def test_the_figure_shows_every_node_and_tells_numbers_on_hovering(tmp_path):
    vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), synthetic_images(8, 0).images
    circuit = attention_circuit(vit, images, rl.RegisterNeurons.from_pairs([(1, 183), (1, 103)]))
    page = tmp_path / "circuit.html"
    circuit.plot("dark").write_html(page, include_plotlyjs=True)
    with opened(f"file://{page}", width=1000, height=560) as watched:
        watched.page.wait_for_selector(".main-svg")
        points = watched.page.locator("path.point")
        assert points.count() >= len(circuit.nodes)
        heads = watched.page.get_by_text("2.0 (", exact=False)
        assert heads.count() == 1
        dots = [box for box in (points.nth(i).bounding_box() for i in range(points.count())) if box]
        # The leftmost node is a neuron: its hover text names it.
        neuron = min(dots, key=lambda box: box["x"] if box["y"] < 450 else 1e6)
        watched.page.mouse.move(neuron["x"] + neuron["width"] / 2, neuron["y"] + neuron["height"] / 2)
        watched.page.wait_for_selector(".hovertext")
        assert "neuron 1:" in watched.page.locator(".hovertext").first.text_content()
        assert watched.errors == [] and watched.requests == []
