"""Arguments agree: what a caller learns from one public function holds for all of them."""

import inspect
from collections.abc import Iterator
from types import FunctionType, MethodType

import pytest
from helpers import rooms

import registerlens
from registerlens.results import Result

ORDER = ("vit", "images", "neurons")
OTHER_NAMES = {
    "generator": "seed",
    "rng": "seed",
    "model_seed": "seed",
    "detection_layer": "layer",
    "outliers": "detection",
}
BY_NAME = {"detection", "trace", "threshold", "batch_size"}


def signatures() -> Iterator[tuple[str, inspect.Signature]]:
    """Of public functions, and of what makes an object of a public class that is no result (results are not called)."""
    for room in (registerlens, *rooms()):
        for name in getattr(room, "__all__", ()):
            value = getattr(room, name)
            if isinstance(value, FunctionType):
                yield name, inspect.signature(value)
            elif isinstance(value, type) and not issubclass(value, Result):
                made = {way: getattr(value, way) for way in vars(value) if not way.startswith("_")}
                makers = {way: maker for way, maker in made.items() if isinstance(maker, MethodType)}
                yield from ((f"{name}.{way}", inspect.signature(maker)) for way, maker in makers.items())
                yield name, inspect.signature(value)


SIGNATURES = dict(signatures())


def test_what_is_walked_is_what_there_is():
    assert len(SIGNATURES) > 80 and {"trace", "Ablate.fit", "run_sweep", "synthetic_images"} <= SIGNATURES.keys()


@pytest.mark.parametrize("name", SIGNATURES)
def test_arguments_agree(name):
    parameters = SIGNATURES[name].parameters
    in_place = [one.name for one in parameters.values() if one.kind is not one.KEYWORD_ONLY]
    ordered = [one for one in in_place if one in ORDER]
    assert ordered == sorted(ordered, key=ORDER.index), f"{name}{SIGNATURES[name]}: the order is {ORDER}"
    assert "vit" not in in_place[1:], f"{name}{SIGNATURES[name]}: the model comes first"
    assert not (other := parameters.keys() & OTHER_NAMES.keys()), f"{name}: {[OTHER_NAMES[one] for one in other]}"
    if name.islower():
        assert not BY_NAME & {*in_place}, f"{name}{SIGNATURES[name]}: {BY_NAME} are given by name"
    for one in parameters.values():
        assert "Generator" not in str(one.annotation), f"{name}: what is drawn at random takes seed="
        if "Detection" in str(one.annotation):
            assert one.name == "detection", f"{name}: a given detection is detection="
        if "Trace" in str(one.annotation):
            assert one.name == "trace", f"{name}: a given trace is trace="
        if str(one.annotation) == "Threshold":
            assert one.name == "threshold", f"{name}: an outlier's cut-off is threshold="
