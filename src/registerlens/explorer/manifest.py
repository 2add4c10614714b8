"""What the explorer's JavaScript must know before it asks anything: pictures, names, where patches are, where to start.

All of it is plain JSON. Names are text and are put on the page as text.
"""

import base64
from typing import Any

from registerlens.explorer.codes import QUANTISATION
from registerlens.explorer.explorer import CLEAN, Explorer
from registerlens.pictures import colour_bar, photograph_uri


def manifest(explorer: Explorer) -> dict[str, Any]:
    """The description of an explorer, JSON-ready.

    Example:
        >>> import torch, registerlens as rl
        >>> from registerlens.explorer.explorer import explore
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> told = manifest(explore(vit, torch.rand(1, 3, 48, 48)))
        >>> told["grid"]["rows"], told["conditions"][0]["tokens"][7], told["reference"]
        (6, '(1,1)', 'average query')
    """
    vit, trace = explorer.vit, explorer.trace
    height, width = explorer.images.shape[2:]
    layout = vit.cfg.layout(height, width)
    patch_height, patch_width = vit.cfg.patch_size
    neurons = () if explorer.neurons is None else explorer.neurons.pairs
    return {
        "model": vit.source,
        "layers": vit.cfg.n_layers,
        "heads": vit.cfg.n_heads,
        "grid": {
            "rows": layout.grid_height,
            "columns": layout.grid_width,
            "first": layout.patches.start,
            "width": width,
            "height": height,
            "covered": [layout.grid_width * patch_width / width, layout.grid_height * patch_height / height],
        },
        "reference": "average query" if layout.cls is None else "[CLS]",
        "images": [
            {"name": name, "src": photograph_uri(pixels)}
            for name, pixels in zip(explorer.names, explorer.display, strict=True)
        ],
        "conditions": [
            {
                "name": name,
                "tokens": explorer.tokens(name),
                "n_tokens": len(explorer.tokens(name)) - sum(edit.n_keys for edit in edits),
            }
            for name, edits in explorer.conditions.items()
        ],
        "sublayers": [str(place) for place in trace.sublayers],  # notebooks send plain text only
        "neurons": [list(pair) for pair in neurons],
        "outliers": {
            "verdict": trace.verdict,
            "words": trace.describe(),
            "sublayer": str(trace.strongest),
            "threshold": explorer.threshold,
        },
        "colours": base64.b64encode(colour_bar(256, 1)[0].tobytes()).decode(),
        "quantisation": QUANTISATION,
        "start": start(explorer),
    }


def start(explorer: Explorer) -> dict[str, Any]:
    """What is shown first: the patch with the largest norm where norms are clearest, in the block that reads it.

    Where there are outliers that patch is asked who looks at it; else it looks itself.
    """
    trace = explorer.trace
    recording = explorer.attention(0, CLEAN).recording
    patch = int(recording.norms[explorer.place, recording.layout.patches].argmax())
    last = explorer.vit.cfg.n_layers - 1
    present = trace.verdict == "present"
    layer = last if not present else min(last, (trace.onset_layer if trace.onset_layer is not None else -1) + 1)
    others = list(explorer.conditions)[1:]
    return {
        "image": 0,
        "condition": CLEAN,
        "compare": next((name for name in ("test-time register", *others) if name in others), None),
        "layer": layer,
        "head": "mean",
        "token": explorer.tokens(CLEAN)[recording.layout.patches.start + patch],
        "role": "key" if present else "query",
    }
