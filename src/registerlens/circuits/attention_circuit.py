"""`attention_circuit`: the exact path from register neurons over outlier tokens and sinking heads to [CLS]."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from registerlens.analysis.detection import Detection, Threshold, detect, require_outliers
from registerlens.analysis.neurons import RegisterNeurons
from registerlens.analysis.top_outliers import check_neurons
from registerlens.circuits import graph
from registerlens.circuits.contributions import (
    Node,
    OutlierRun,
    contributions,
    locate,
    look,
    reads_by_cls,
)
from registerlens.circuits.edge_checks import Collected, check_edges
from registerlens.circuits.readings import check_output, output_words, why_no_output
from registerlens.circuits.records import AttentionCircuit
from registerlens.data.batches import Images
from registerlens.engine.stream import batches
from registerlens.errors import ConfigError, ImageError, InterventionError
from registerlens.interventions.targets import Heads
from registerlens.model.block import require_linear_output, require_softmax
from registerlens.model.parts import at_least_float32
from registerlens.model.vit import HookedViT

LOOKS = 0.01
"""A head looks at the outliers if the reader pays them this much of its attention."""
TOLERANCE = 1e-4
"""Parts add up to the whole within this share of it."""


def attention_circuit(
    vit: HookedViT,
    images: Images,
    neurons: RegisterNeurons,
    *,
    min_share: float = 0.01,
    check: bool = True,
    block: int | None = None,
    target: int | None = None,
    detection: Detection | None = None,
    threshold: Threshold = "auto",
    batch_size: int = 16,
) -> AttentionCircuit:
    """The path from register neurons to [CLS], as contributions that add up, each edge cut once to see its effect.

    Neurons write (activation x their row of W_out) into the stream of the outlier tokens: their parts, with all other
    writers', add up to its norm. Later heads read that stream as keys: the parts of the reader's score with the
    outliers (q . W_K of each writer under the frozen LayerNorm) add up to the score. Heads write attention x value x
    W_O into the reader, apart for each group of key tokens: with MLPs, embedding and biases these add up to the norm of
    the reader's final stream, and under the frozen final norm to the output.

    The reader is [CLS]; where there is none, or the output is a mean of other tokens, it is the mean over ordinary
    patches. Where an image has several outliers, numbers are means over them (attention and writes: sums). Rotary
    positions and norms on queries and keys are exact: their scales and angles are frozen too.

    Args:
        vit: the model, edited or not.
        images: preprocessed [image, channel, height, width], or batches that can be iterated twice or more.
        neurons: register neurons.
        min_share: a neuron is shown if it has this share of all magnitudes in the outlier stream; a head, if it pays
            this share of all attention to outliers, or writes this share of the reader's stream from them.
        check: cut every shown edge alone and measure what its receiver computes then, norms and softmax included.
            Costs two more passes, and the last norm and the head twice for every shown attention head.
        block: the outliers' stream is taken after this block; default: the onset's, or the last neuron's if later.
        target: which output (a class); default: the projection on the output's own direction.
        detection: which patches are outliers; default: found here.
        threshold: how they are found, as for `find_outliers`.
        batch_size: images at once when a tensor is given.

    Raises:
        ConfigError: an option is out of range.
        ImageError: there are no images, or none has an outlier.
        InterventionError: no neuron, or one that does not exist or comes after `block`; no head after it looks
            at outliers; parts do not add up because an edit in force changes what the weights say.
        NoOutliersError: the model has no outliers on these images.
        ShapeError: images are no batch, or smaller than a patch, or there is no such output.
        UnsupportedArchitectureError: attention is no softmax, or a norm stands after the sublayers.

    Source: Elhage et al. 2021 (frozen norms, direct contributions); Jiang et al. 2025, section 3 (the path); Wang et
        al. 2022 (2211.00593; path patching).

    Example:
        >>> import registerlens as rl
        >>> from registerlens.data.synthetic import synthetic_images
        >>> vit, images = rl.HookedViT.from_pretrained("registerlens:tiny"), synthetic_images(16, 0).images
        >>> neurons = rl.RegisterNeurons.from_pairs([(1, n) for n in (183, 103, 219, 125, 55, 128, 177)])
        >>> circuit = attention_circuit(vit, images, neurons)
        >>> circuit.reader, circuit.block, round(circuit.onset_share, 2), circuit.sum_error < 1e-5
        ('mean patch', 1, 1.0, True)
    """
    require_softmax(vit.cfg, "A circuit")
    require_linear_output(vit.cfg, "A circuit")
    if not 0 <= min_share < 1:
        raise ConfigError(f"min_share is a share from 0 to below 1, got {min_share}.")
    check_neurons(vit, neurons)
    if target is not None:
        check_output(vit, target)
    detection = detection or detect(vit, images, threshold=threshold, batch_size=batch_size)
    require_outliers(detection, "A circuit from neurons over outlier tokens to [CLS]")
    block = _block(vit, neurons, detection, block)
    no_output = why_no_output(vit.cfg)
    options: dict[str, Any] = {"with_output": no_output is None}
    collected, n = Collected(), 0
    with torch.inference_mode():
        for n_here, _, run in _runs(vit, images, detection, block, batch_size, "measuring contributions"):
            n += n_here
            if run is not None:
                collected.add(contributions(vit, run, neurons, target, **options))
        if "stream" not in collected:
            raise ImageError(
                f"None of the {n} images has an outlier patch above {detection.cutoff} at {detection.sublayer} beside "
                f"an ordinary one. Give more images, or another threshold."
            )
        _check_sums(vit, collected.error)
        reader = "[CLS]" if reads_by_cls(vit.cfg) else "mean patch"
        measured = graph.Measured(vit.cfg, neurons, block, reader, collected)
        _check_looks(measured)
        nodes = graph.select(measured, min_share)
        effects = None
        if check:
            effects, some = Collected(), RegisterNeurons.from_pairs([neurons.pairs[i] for i in nodes.neurons])
            for _, batch, run in _runs(vit, images, detection, block, batch_size, "cutting edges"):
                if run is not None:
                    effects.add(check_edges(vit, batch, run, some, Heads(nodes.heads), target, **options))
    parts = graph.parts_table(measured, nodes)
    edges = graph.edges_table(measured, nodes, parts, effects, min_share)
    return AttentionCircuit(
        **vit.identity,
        detection=detection,
        neurons=neurons,
        block=block,
        reader=reader,
        output=output_words(vit.cfg, target) if no_output is None else None,
        min_share=float(min_share),
        n_images=n,
        n_used=measured.n_images,
        checked=check,
        sum_error=collected.error,
        neuron_share=_neuron_share(measured, range(block + 1)),
        onset_share=_neuron_share(measured, [_onset(detection, block)]),
        notes=() if no_output is None else (no_output,),
        nodes=graph.nodes_table(measured, nodes, edges, effects),
        edges=edges,
        paths=graph.paths_table(measured, nodes, effects),
        parts=parts,
    )


def _onset(detection: Detection, block: int) -> int:
    """The block where outliers arise, as far as that is known and not after `block`."""
    onset = -1 if detection.onset is None else detection.onset.layer
    return onset if 0 <= onset <= block else block


def _block(vit: HookedViT, neurons: RegisterNeurons, detection: Detection, block: int | None) -> int:
    last = max(layer for layer, _ in neurons.pairs)
    if block is None:
        onset = -1 if detection.onset is None else detection.onset.layer
        block = max(last, min(onset, vit.cfg.n_layers - 2))  # some head must come after it
    if block < last:
        late = [pair for pair in neurons.pairs if pair[0] > block]
        raise InterventionError(
            f"Neurons {late[:5]} come after block {block}, where the outliers' stream is taken. Give a later block, or "
            f"leave these neurons out with neurons.filter(layers=range({block + 1}))."
        )
    if block >= vit.cfg.n_layers - 1:
        raise InterventionError(
            f"No head comes after block {block}, the last of {vit.cfg.n_layers}, so that nothing reads the outliers' "
            f"stream there. Give an earlier block, or neurons of earlier blocks."
        )
    return block


def _runs(
    vit: HookedViT, images: Images, detection: Detection, block: int, batch_size: int, doing: str
) -> Iterator[tuple[int, Tensor, OutlierRun | None]]:
    """Of each batch: how many images, those with an outlier and an ordinary patch, and what their run left, if any."""
    for batch in batches(vit, images, batch_size, doing):
        used, tokens = locate(vit, batch.images, detection)
        some = batch.images[used]
        yield len(batch), some, None if tokens is None else look(vit, some, tokens, block)


def _check_looks(measured: graph.Measured) -> None:
    most = float(measured.mean("attention")[..., 0].max())
    if most < LOOKS:
        raise InterventionError(
            f"No head after block {measured.block} looks at the outliers: the most that one of them pays these is "
            f"{most:.2%} of its attention, so that there is no path to {measured.reader} to follow. "
            f"rl.diagnose(vit, images) says whether the images are of the model's kind."
        )


def _check_sums(vit: HookedViT, error: float) -> None:
    """Half precision rounds the stream at every block: there the difference is part of the rest, and reported."""
    if at_least_float32(vit.dtype) == vit.dtype and not error <= TOLERANCE:
        raise InterventionError(
            f"Contributions differ from what the model computes by {error:.2g} of it (allowed: {TOLERANCE:g}), so that "
            f"they would explain nothing. Does an edit or hook in force change queries, keys, values or the stream? "
            f"Measure the circuit without it."
        )


def _neuron_share(measured: graph.Measured, blocks: Any) -> float:
    """Share of the given neurons in what all neurons of these blocks contribute to the outlier stream."""
    stream = dict(zip(measured.written, measured.mean("stream"), strict=True))
    part = sum(stream[Node.neuron(*pair)] for pair in measured.neurons.pairs if pair[0] in blocks)
    every = part + sum(stream[f"other neurons of block {layer}"] for layer in blocks)
    return float(part / every) if every else 0.0
