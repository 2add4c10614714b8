"""What the live widget is told: its question as it came from the browser, checked, and the answer as bytes."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, cast

import numpy as np

from registerlens.errors import RegisterLensError, ShapeError
from registerlens.explorer.attention import Role
from registerlens.explorer.codes import encode
from registerlens.explorer.explorer import CLEAN, Explorer
from registerlens.explorer.shown import patch_medians, shown

Answer = tuple[dict[str, Any], list[bytes]]
"""A message of plain JSON, and the buffers it speaks of: for each panel the codes of its two maps."""


def answer(explorer: Explorer, question: dict[str, Any]) -> Answer:
    """The answer to a question, or a message with the error in words.

    Args:
        explorer: what is asked about.
        question: "id"; "image" by number, "conditions" by name, "layer", "head" (a number, "mean" or "rollout"),
            "token" by name, "role" ("query" or "key").

    Example:
        >>> import torch, registerlens as rl
        >>> from registerlens.explorer.explorer import explore
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> asked = {"id": 7, "image": 0, "conditions": ["clean"], "layer": 3, "head": "mean"}
        >>> told, buffers = answer(explore(vit, torch.rand(1, 3, 48, 48)), asked | {"token": "(2,2)", "role": "key"})
        >>> told["id"], len(told["panels"]), [len(buffer) for buffer in buffers]
        (7, 1, [36, 36])
    """
    try:
        panels, buffers = [], []
        for condition in question["conditions"]:
            panel, codes = _panel(explorer, question, condition)
            panels.append(panel)
            buffers += codes
    except (RegisterLensError, KeyError, TypeError, ValueError) as error:
        return {"id": question.get("id"), "error": str(error)}, []
    return {"id": question.get("id"), "panels": panels}, buffers


def _panel(explorer: Explorer, question: dict[str, Any], condition: str) -> tuple[dict[str, Any] | None, list[bytes]]:
    """One condition; None where it has no such token, such as a test-time register without the intervention."""
    if question["role"] not in ("query", "key"):
        raise ShapeError(f"A token is a 'query' or a 'key', not {question['role']!r}.")
    attention = explorer.attention(question["image"], condition)
    names = explorer.tokens(condition)
    if question["token"] not in names:
        return None, []
    index, role = names.index(question["token"]), cast(Role, question["role"])
    if role == "query" and index >= attention.recording.layout.n_tokens:
        return None, []  # the key of an attention bias is looked at and looks at nothing
    about = shown(attention, index, role, question["layer"], question["head"])
    maps = [encode(values[None].numpy()) for values in (about.attention, about.reference)]
    told = {
        "largest": [float(largest[0]) for _, largest in maps],
        "norms": about.norms.tolist(),
        "medians": about.medians.tolist(),
        "cutoff": cutoff(explorer, question["image"]),
        "neurons": [asdict(neuron) for neuron in about.strongest],
        "chosen": about.chosen.tolist(),
    }
    return told, [np.ascontiguousarray(codes).tobytes() for codes, _ in maps]


def cutoff(explorer: Explorer, image: int) -> float | None:
    """The norm above which a patch of an image is an outlier where that is judged; None where the model has none.

    It follows the clean model's median, so that an intervention does not move it.
    """
    if explorer.threshold is None:
        return None
    return explorer.threshold * float(patch_medians(explorer.attention(image, CLEAN))[explorer.place])
