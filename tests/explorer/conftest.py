"""An explorer of the tiny ViT with every usual condition, shared by all tests of this folder; not to be changed."""

import pytest

import registerlens as rl
from registerlens.data.synthetic import synthetic_images
from registerlens.explorer.explorer import explore

NASTY = "<img src=x onerror=alert(1)></script><script>alert(2)</script>&.jpg"


@pytest.fixture(scope="session")
def vit():
    return rl.HookedViT.from_pretrained("registerlens:tiny")


@pytest.fixture(scope="session")
def images():
    return synthetic_images(2, 0).images


@pytest.fixture(scope="session")
def neurons():
    return rl.RegisterNeurons.from_pairs([(1, n) for n in (183, 103, 219, 125, 55, 128, 177)])


@pytest.fixture(scope="session")
def explorer(vit, images, neurons):
    return explore(vit, images, neurons, names=["first", NASTY])
