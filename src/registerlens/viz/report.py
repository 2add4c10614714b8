"""One self-contained HTML page: the verdict in words, norms and sinks per layer, maps beside the images."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from registerlens.analysis.maps import PatchMaps, patch_maps
from registerlens.analysis.trace import Trace
from registerlens.files import whole_file
from registerlens.model.vit import HookedViT
from registerlens.viz.curves import trace_figure
from registerlens.viz.maps import colour, colour_bar, data_uri

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } .sub { color: #57606a; margin-top: .2rem; }
.verdict { border-left: 6px solid; padding: .6rem 1rem; margin: 1.2rem 0; background: #f6f8fa; }
.present { border-color: #D55E00; } .absent { border-color: #0072B2; }
.verdict strong { font-size: 1.25rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #e3e6ea; }
th:first-child, td:first-child { text-align: left; } tr.onset td { background: #fff1e0; font-weight: 600; }
.maps { display: grid; gap: .5rem .8rem; align-items: start; margin: 1rem 0 2rem; }
.maps figure { margin: 0; } .maps img { width: 100%; display: block; border-radius: 3px; }
.maps .map { image-rendering: pixelated; } figcaption { font-size: 12px; color: #57606a; }
.bar { height: 8px; width: 100px; vertical-align: middle; }
footer { color: #57606a; font-size: 13px; border-top: 1px solid #e3e6ea; margin-top: 2rem; padding-top: .6rem; }
"""


def map_layers(trace: Trace) -> tuple[int, ...]:
    """The blocks whose maps are shown: the onset, the next one (where sinks follow), and the last.

    Without outliers there is no onset: the first, the middle and the last block.
    """
    last = trace.n_layers - 1
    onset = trace.onset_layer
    chosen = {0, last // 2, last} if onset is None else {onset, min(onset + 1, last), last}
    return tuple(sorted(chosen))


def write_report(
    path: str | Path,
    vit: HookedViT,
    images: Float[Tensor, "image channel height width"],
    display: UInt8[np.ndarray, "image height width rgb"],
    trace: Trace,
    *,
    names: Sequence[str],
    title: str,
    note: str = "",
) -> Path:
    """Write the page, whole or not at all; it opens from disk without a network.

    Args:
        path: the HTML file.
        vit: the model.
        images: the images whose maps are shown, preprocessed; all of one size.
        display: the same images to look at.
        trace: of the model, usually over more images.
        names: one caption an image.
        title, note: heading, and a sentence that says what kind of model this is.

    Returns:
        the path.

    Example:
        >>> import tempfile, torch, registerlens as rl
        >>> vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), torch.rand(1, 3, 48, 48)
        >>> page = Path(tempfile.mkdtemp()) / "report.html"
        >>> write_report(page, vit, images, np.zeros((1, 48, 48, 3), np.uint8), rl.trace(vit, images),
        ...              names=["noise"], title="tiny").exists()
        True
    """
    path = Path(path)
    found = patch_maps(vit, images, map_layers(trace))
    layout, (patch_height, patch_width) = vit.layout(images), vit.cfg.patch_size
    # Pixels beyond the last whole patch are not seen by the model; without them picture and maps coincide.
    display = display[:, : layout.grid_height * patch_height, : layout.grid_width * patch_width]
    figure = trace_figure(trace).to_html(full_html=False, include_plotlyjs="inline", config={"displaylogo": False})
    heads = f"{vit.cfg.n_heads} head{'s' if vit.cfg.n_heads > 1 else ''}"
    facts = [trace.model, f"{trace.n_images} images", f"{vit.cfg.n_layers} blocks", heads, f"width {vit.cfg.d_model}"]
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<p class="sub">{html.escape(" · ".join([*facts, note] if note else facts))}</p>
<div class="verdict {trace.verdict}"><strong>Outlier tokens: {trace.verdict}</strong><br>{_in_words(trace)}</div>
<h2>Which norm, which layer?</h2>
{figure}
<h2>The images</h2>
<p>{_legend(trace, found)}</p>
{"".join(_maps(found, display[i], names[i], i) for i in range(len(display)))}
<h2>Numbers</h2>
{_table(trace)}
<footer>Norms are of the residual stream, patches only ([CLS] and registers excluded). "Ratio" is the largest patch norm
over the image's median, averaged over images. Outliers are called present only where these ratios form a mode of their
own, separated by a gap. Method: Jiang et al. 2025, "Vision Transformers Don't Need Trained Registers", figures 2 and
26. Made with RegisterLens.</footer>
</body></html>
"""
    with whole_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _in_words(trace: Trace) -> str:
    words = html.escape(trace.explain())
    if trace.verdict == "absent":
        return words
    follow = trace.sink_is_outlier
    last = trace.n_layers - 1
    nxt = min((trace.onset_layer if trace.onset_layer is not None else -1) + 1, last)
    return (
        f"{words}<br>In block {nxt}, the most attended patch is an outlier in {follow[nxt]:.0%} of images; in the last "
        f"block, in {follow[last]:.0%}."
    )


def _legend(trace: Trace, maps: PatchMaps) -> str:
    query = "the [CLS] token's attention" if maps.sink_query == "cls" else "the average query's attention"
    which = ", ".join(str(layer) for layer in maps.layers)
    reason = "the onset, the next block and the last" if trace.onset_layer is not None else "first, middle and last"
    bar = f'<img class="bar" alt="colour scale" src="{data_uri(colour_bar())}">'
    return (
        f"Blocks {which} ({reason}). For each: the norm of every patch after the block, and {query} to it, mean over "
        f"heads. Colours run {bar} from 0 to the largest value of the map, written below it."
    )


def _maps(maps: PatchMaps, display: np.ndarray, name: str, i: int) -> str:
    height, width = display.shape[:2]
    ratio = f"aspect-ratio:{width}/{height}"
    figures = [_figure(data_uri(np.ascontiguousarray(display)), html.escape(Path(name).name), ratio, "")]
    for row, layer in enumerate(maps.layers):
        for kind, values in (("norm", maps.norms[row, i]), ("attention", maps.attention[row, i])):
            picture = data_uri(colour(values, 0.0, float(values.max())))
            caption = f"block {layer} · {kind}<br>max {values.max():.3g}<br>median {np.median(values):.2g}"
            figures.append(_figure(picture, caption, ratio, "map"))
    columns = f"grid-template-columns:repeat({len(figures)},1fr)"
    return f'<div class="maps" style="{columns}">{"".join(figures)}</div>'


def _figure(source: str, caption: str, style: str, kind: str) -> str:
    return (
        f'<figure><img class="{kind}" style="{style}" src="{source}" alt=""><figcaption>{caption}</figcaption></figure>'
    )


def _table(trace: Trace) -> str:
    frame = trace.to_dataframe()
    rows = []
    for row in frame.to_dict("records"):
        mark = ' class="onset"' if row["sublayer"] == trace.onset else ""
        sink = f"{row['sink_largest_head']:.3f}" if row["after"] == "attn" else ""
        rows.append(
            f"<tr{mark}><td>{row['sublayer']}</td><td>{row['largest_norm']:.2f}</td><td>{row['median_norm']:.2f}</td>"
            f"<td>{row['largest_over_median']:.2f}</td><td>{row['gap']:.2f}</td><td>{row['verdict']}</td>"
            f"<td>{row['share_of_patches'] if row['verdict'] == 'present' else 0:.2%}</td><td>{sink}</td></tr>"
        )
    head = "<tr><th>after</th><th>largest norm</th><th>median</th><th>ratio</th><th>gap</th><th>outliers</th>"
    return f"<table>{head}<th>of patches</th><th>strongest sink</th></tr>{''.join(rows)}</table>"
