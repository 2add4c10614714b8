"""Photographs that come with other packages."""

import sys

import numpy as np
from PIL import Image

from registerlens.data import photographs


def test_there_are_real_photographs_of_distinct_content():
    paths = photographs.shipped_photographs()
    assert len(paths) >= 9  # scikit-image, scikit-learn and matplotlib are installed for the tests
    assert len(set(paths)) == len(paths)
    for path in paths:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L"))
        assert min(pixels.shape) >= 200
        assert len(np.unique(pixels)) > 100  # neither a mask nor a drawing


def test_no_package_is_imported(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] in ("skimage", "sklearn", "matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    photographs.shipped_photographs()
    assert not {"skimage", "sklearn", "matplotlib"} & set(sys.modules)


def test_what_is_not_installed_is_left_out(monkeypatch, tmp_path):
    package = tmp_path / "some_photos"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "data" / "one.png").touch()
    monkeypatch.syspath_prepend(tmp_path)
    listed = (("not_there_at_all", "data", ("a.png",)), ("some_photos", "data", ("one.png", "lost.png")))
    monkeypatch.setattr(photographs, "_SHIPPED", listed)
    assert photographs.shipped_photographs() == [package / "data" / "one.png"]
