"""The photographs that come inside scikit-image, scikit-learn and matplotlib: real images without a network."""

from importlib.util import find_spec
from pathlib import Path

# Package, folder inside it, files. Only real photographs: no drawings, masks or test charts.
_SHIPPED = (
    (
        "skimage",
        "data",
        ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg"),
    ),
    ("sklearn", "datasets/images", ("china.jpg", "flower.jpg")),
    ("matplotlib", "mpl-data/sample_data", ("grace_hopper.jpg",)),
)


def shipped_photographs() -> list[Path]:
    """Paths of those that are installed; the packages are not imported. The list may be empty.

    Example:
        >>> all(path.suffix in (".png", ".jpg") for path in shipped_photographs())
        True
    """
    photographs = []
    for package, folder, names in _SHIPPED:
        spec = find_spec(package)
        for root in (spec.submodule_search_locations or []) if spec else []:
            photographs += [path for name in names if (path := Path(root) / folder / name).is_file()]
    return photographs
