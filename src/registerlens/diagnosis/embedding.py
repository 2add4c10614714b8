"""Outliers that are there before any block: in the position embedding, or in the patch embedding."""

import numpy as np

from registerlens.analysis.outliers import MIN_GAP, MIN_TYPICAL
from registerlens.diagnosis.findings import CauseFinding
from registerlens.diagnosis.symptoms import Symptoms

SAME_PLACES = 0.5
"""Outliers belong to the place in the image where at least this share of the norms' variance lies between places."""


def embedding_outliers(found: Symptoms) -> CauseFinding | None:
    """A mode of outlier norms in what enters block 0."""
    evidence, by_place = found.trace.evidence[0], float(found.trace.share_by_place[0])
    # The same limits as for the verdict; what blocks must add to the embedding does not count here.
    if not (evidence.gap >= MIN_GAP and evidence.typical >= MIN_TYPICAL):
        return None
    what = f"{evidence.share_of_patches:.1%} of patches enter block 0 at {evidence.typical:.1f} x the median norm"
    numbers: dict[str, float | str] = {
        "norm over the median": evidence.typical,
        "share of patches": evidence.share_of_patches,
        "share of variance between places": by_place,
    }
    words, more = _in_positions(found)
    # One image does not tell; the position embedding itself may.
    if by_place >= SAME_PLACES or (np.isnan(by_place) and float(more.get("position over the mean", 0)) >= MIN_TYPICAL):
        return CauseFinding(
            cause="position embedding",
            words=f"{what}, at the same places in every image{words}. No neuron makes these outliers.",
            evidence=numbers | more,
            advice=(
                "Shrink those positions, or overwrite them by their neighbours' mean (vit.embed.W_pos), and check the "
                "output; a test-time register cannot take them over."
            ),
        )
    return CauseFinding(
        cause="patch embedding",
        words=f"{what}, not at the same places in every image: it is what they show. No neuron makes these outliers.",
        evidence=numbers,
        advice=(
            "Look at these patches (rl.find_outliers(vit, images, layer='embed', threshold=...)): a filter of the "
            "patch embedding answers to them. A test-time register cannot take them over."
        ),
    )


def _in_positions(found: Symptoms) -> tuple[str, dict[str, float | str]]:
    """Which position it is, where positions are learned."""
    W_pos, first = found.vit.embed.W_pos, found.vit.cfg.layout().patches.start
    if W_pos is None:
        return "", {}
    rows = W_pos.detach().float()[first:]
    norms = rows.norm(dim=1)
    at = int(norms.argmax())
    ratio, channel = float(norms[at] / norms.mean()), int(rows[at].abs().argmax())
    share = float(rows[at, channel] ** 2 / norms[at] ** 2)
    row, column = divmod(at, found.vit.cfg.grid[1])
    words = (
        f": position {at} (row {row}, column {column}) has {ratio:.1f} x the mean norm of position embeddings, "
        f"{share:.0%} of it in dimension {channel}"
    )
    numbers: dict[str, float | str] = {"position": float(at), "position over the mean": ratio}
    return words, numbers | {"dimension": float(channel), "share in that dimension": share}
