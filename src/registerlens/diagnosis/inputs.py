"""Images that do not fit the model: of another kind than it was trained on, or with other pixel values."""

from typing import Literal

import numpy as np

from registerlens.data.examples import is_embedded
from registerlens.diagnosis.findings import CauseFinding
from registerlens.diagnosis.symptoms import Pixels, Symptoms
from registerlens.model.vit import HookedViT

Kind = Literal["photographs", "synthetic images"]

NORMALISATIONS = {
    "pixels from 0 to 1, not normalised": ((0.0,) * 3, (1.0,) * 3),
    "pixels from 0 to 255, not normalised": ((0.0,) * 3, (1 / 255,) * 3),
    "normalised with mean and std 0.5": ((0.5,) * 3, (0.5,) * 3),
    "normalised as for ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "normalised as for CLIP": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
"""Mean and standard deviation of what photographs may have gone through."""
FOR_PHOTOGRAPHS = list(NORMALISATIONS)[2:]
"""Those by which a model shows that it was trained on photographs."""
RELATED = 0.5
"""Neighbouring pixels of a photograph correlate more than this (0.8 to 0.98 are seen), those of noise and of the
synthetic images less (0.02 to 0.1)."""
OVERFLOW = 0.25
"""Pixels, their normalisation undone, reach at most so far beyond 0 to 1."""
BETTER = 0.25
"""Another normalisation explains the pixels' range better if it misses less of it by so much."""
SYNTHETIC_STD = 1.11
"""Standard deviation of the images that `registerlens:tiny` was trained on."""


def trained_on(vit: HookedViT) -> Kind | None:
    """What a model was trained on, where its source or its preprocessing tells; None where nothing does.

    Example:
        >>> import registerlens as rl
        >>> trained_on(rl.HookedViT.from_pretrained("registerlens:tiny"))
        'synthetic images'
    """
    if is_embedded(vit):
        return "synthetic images"
    own = np.array([vit.preprocess.mean, vit.preprocess.std])
    known = (np.array(NORMALISATIONS[name]) for name in FOR_PHOTOGRAPHS)
    return "photographs" if any(own.shape == one.shape and np.allclose(own, one, atol=1e-3) for one in known) else None


def other_images(found: Symptoms) -> CauseFinding | None:
    """Images of another kind, or blank ones."""
    return kind_of_images(found.vit, found.pixels)


def kind_of_images(vit: HookedViT, pixels: Pixels) -> CauseFinding | None:
    """Whether images are of another kind than the model's: neighbouring pixels tell photographs from synthetic ones."""
    wanted, neighbours = trained_on(vit), float(pixels["neighbours"].mean())
    photographs = neighbours > RELATED
    if wanted is None or photographs == (wanted == "photographs"):
        return None
    given = "look like photographs" if photographs else "are noise, synthetic or blank"
    advice = (
        "Give it its own: `registerlens diagnose MODEL synthetic`, or rl.data.example_images(vit)."
        if wanted == "synthetic images"
        else "Give photographs, as rl.load_images reads them; rl.data.example_images(vit) has some."
    )
    return CauseFinding(
        cause="other images",
        words=(
            f"The model was trained on {wanted}, and these images {given}: neighbouring pixels correlate by "
            f"{neighbours:.2f}. What it does on them says little about the model."
        ),
        evidence={"correlation of neighbouring pixels": neighbours},
        advice=advice,
    )


def wrong_preprocessing(found: Symptoms) -> CauseFinding | None:
    """Pixel values that the model's mean and standard deviation do not make of images of its kind."""
    wanted = trained_on(found.vit)
    if wanted is None or other_images(found) is not None:
        return None
    return _of_photographs(found) if wanted == "photographs" else _of_synthetic(found)


def _of_photographs(found: Symptoms) -> CauseFinding | None:
    preprocess = found.vit.preprocess
    missed, low, high = _missed(found, preprocess.mean, preprocess.std)
    others = {name: _missed(found, *values)[0] for name, values in NORMALISATIONS.items()}
    best = min(others, key=lambda name: others[name])
    overflow = max(-low, high - 1)
    if overflow <= OVERFLOW and missed - others[best] <= BETTER:
        return None
    looks = f"They look like {best}." if others[best] < BETTER else "They may have been normalised twice."
    return _wrong(found, f"undone, the pixels go from {low:.2f} to {high:.2f} instead of from 0 to 1. {looks}")


def _of_synthetic(found: Symptoms) -> CauseFinding | None:
    std = float((found.pixels["square"] - found.pixels["mean"] ** 2).mean() ** 0.5)
    if SYNTHETIC_STD / 1.5 < std < SYNTHETIC_STD * 1.5:
        return None
    return _wrong(found, f"the pixels have a standard deviation of {std:.3g} instead of {SYNTHETIC_STD}.")


def _missed(found: Symptoms, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[float, float, float]:
    """How much of 0 to 1 the pixels miss or overrun once this normalisation is undone; their lowest and highest."""
    low, high = (
        getattr(np, name)(found.pixels[of] * np.array(std) + np.array(mean))
        for name, of in (("min", "lowest"), ("max", "highest"))
    )
    return float(abs(low) + abs(high - 1)), float(low), float(high)


def _wrong(found: Symptoms, what: str) -> CauseFinding:
    preprocess = found.vit.preprocess
    return CauseFinding(
        cause="wrong preprocessing",
        words=f"The model subtracts {_brief(preprocess.mean)} and divides by {_brief(preprocess.std)}; {what}",
        evidence={
            f"{name}, channel {channel}": float(value)
            for name in ("mean", "lowest", "highest")
            for channel, value in enumerate(found.pixels[name])
        },
        advice="Load the images with rl.load_images(paths, vit), once; what follows holds for wrong pixels.",
    )


def _brief(values: tuple[float, ...]) -> str:
    return f"({', '.join(f'{value:.3g}' for value in values)})"
