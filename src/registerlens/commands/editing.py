"""Commands that change the model: ablate and register measure what follows, bake saves it with a register in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from registerlens.commands import options, shared
from registerlens.commands.printing import print_evaluation, print_words

if TYPE_CHECKING:
    from registerlens.analysis.neurons import RegisterNeurons
    from registerlens.data.examples import OwnImages
    from registerlens.data.images import ImageStream
    from registerlens.evaluation.effects import Evaluation
    from registerlens.interventions.base import Intervention
    from registerlens.model.vit import HookedViT

NoControls = Annotated[bool, typer.Option("--no-controls", help="Leave the controls out: faster, proves less")]
ABLATED = "ablated"
"""Name of the condition."""


def ablate(
    model: options.Model,
    images: options.Images,
    neurons: options.NeuronsText = "auto",
    heads: Annotated[
        str | None, typer.Option(metavar="LAYER.HEAD,...", help="Attention heads in place of neurons")
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(metavar="LAYER:cls|trained_registers|PATCH,...", help="Tokens after a block in place of neurons"),
    ] = None,
    mode: Annotated[
        Literal["zero", "mean", "noise", "shuffle", "resample"], typer.Option(help="What they are set to")
    ] = "zero",
    threshold: options.ThresholdText = "auto",
    layer: options.LayerText = "auto",
    no_controls: NoControls = False,
    out: Annotated[Path | None, typer.Option(help="Write the evaluation, its figure and the ablation here")] = None,
    size: options.Size = None,
    batch_size: options.BatchSize = 16,
    device: options.Device = "cpu",
    debug: options.Debug = False,
) -> None:
    """Ablate register neurons, heads or tokens of MODEL and measure on IMAGES what that does, beside controls.

    A model without outliers needs --threshold NUMBER: the residual norm above which patches are counted.
    """
    if sum((neurons != "auto", heads is not None, tokens is not None)) > 1:
        raise typer.BadParameter("give one of --neurons, --heads and --tokens.", param_hint="--heads")
    where = {"threshold": options.read_threshold(threshold), "layer": options.read_layer(layer)}
    pairs = [] if heads is None else options.read_heads(heads)
    place = None if tokens is None else options.read_tokens(tokens)
    shared.look_ahead(model, where["layer"], blocks=[place[0]] if place else [], heads=pairs)
    known = options.read_neurons(neurons)
    options.make_folder(out)
    vit, stream = shared.load(model, images, size, batch_size, device)
    from registerlens.analysis.neurons import RegisterNeurons
    from registerlens.interventions.ablation import Ablate, Heads, Tokens

    with shared.skips_named(stream):
        asked = Heads(pairs) if pairs else Tokens(*place) if place else None
        target = asked or shared.chosen_neurons(vit, stream, known, where)
        ablation = Ablate(target) if mode == "zero" else Ablate.fit(vit, stream, target, mode)
        done = _evaluate(vit, stream, {ABLATED: ablation}, where, no_controls)
    print_words(f"Ablated: {target}")
    of_neurons = isinstance(target, RegisterNeurons)
    samples = shared.on_which_images(target, done.n_images, known is None) if of_neurons else ""
    print_evaluation(done, samples)
    if out is not None:
        shared.write_evaluation(done, out)
        ablation.save(out / "ablation")
        typer.echo(f"Wrote evaluation and ablation (folders), evaluation.parquet and figure.html to {out}")


def register(
    model: options.Model,
    images: options.Images,
    neurons: options.NeuronsText = "auto",
    n: Annotated[int, typer.Option(min=1, help="How many test-time registers")] = 1,
    init: Annotated[Literal["zero", "gaussian", "mean"], typer.Option(help="What they are before block 0")] = "zero",
    assign: Annotated[
        Literal["all", "random"], typer.Option(help="Each neuron to all of them, or to one at random")
    ] = "all",
    extreme: Annotated[
        Literal["per_neuron", "shared"], typer.Option(help="Each neuron's own maximum, or a layer's one")
    ] = "per_neuron",
    clear: Annotated[
        Literal["all", "patches", "outliers", "none"], typer.Option(help="Which tokens lose the activation")
    ] = "all",
    bias: Annotated[bool, typer.Option("--bias", help="Use the attention bias fitted on IMAGES instead")] = False,
    threshold: options.ThresholdText = "auto",
    layer: options.LayerText = "auto",
    no_controls: NoControls = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Write the page with maps before and after, the evaluation and the neurons here"),
    ] = None,
    size: options.Size = None,
    batch_size: options.BatchSize = 16,
    device: options.Device = "cpu",
    debug: options.Debug = False,
) -> None:
    """Give MODEL a test-time register that takes its outliers over, and measure before and after on IMAGES."""
    if bias and n != 1:
        raise typer.BadParameter(f"--bias stands for one test-time register, not for {n}.", param_hint="--n")
    where = {"threshold": options.read_threshold(threshold), "layer": options.read_layer(layer)}
    shared.look_ahead(model, where["layer"])
    known = options.read_neurons(neurons)
    options.make_folder(out)
    vit, stream = shared.load(model, images, size, batch_size, device)
    from registerlens.diagnosis.cure import BIAS, REGISTER
    from registerlens.interventions.attention_bias import AttentionBias
    from registerlens.interventions.registers import TestTimeRegisters

    with shared.skips_named(stream):
        chosen = shared.chosen_neurons(vit, stream, known, where)
        edit: Any = TestTimeRegisters(chosen, n, init=init, assign=assign, extreme=extreme, clear=clear)
        edit = AttentionBias.fit(vit, stream, chosen, register=edit) if bias else edit
        name = BIAS if bias else REGISTER if n == 1 else f"{n} {REGISTER}s"
        done = _evaluate(vit, stream, {name: edit}, where, no_controls)
    samples = shared.on_which_images(chosen, done.n_images, known is None)
    if bias:
        samples += f" The bias was fitted on these {done.n_images} images, too."
    print_words(str(chosen))
    print_evaluation(done, samples)
    if out is not None:
        _write_register(out, vit, stream, chosen, edit, name, done, samples, size)


def bake(
    model: options.Model,
    out: Annotated[Path, typer.Option(help="A new folder for the model")],
    neurons: Annotated[
        str | None,
        typer.Option(metavar="FILE|published:NAME", help="Register neurons, for a test-time register"),
    ] = None,
    bias: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="A fitted attention bias instead (`register --bias --out`)",
        ),
    ] = None,
    n: Annotated[int, typer.Option(min=1, help="How many test-time registers")] = 1,
    debug: options.Debug = False,
) -> None:
    """Save MODEL, of transformers, timm or open_clip, with a test-time register in it, and a small loader.

    The folder is an ordinary model folder of that library; its load.py loads the model with the edit in place.
    """
    if (neurons is None) == (bias is None):
        raise typer.BadParameter("give one of --neurons and --bias.", param_hint="--neurons")
    if neurons == "auto":
        raise typer.BadParameter("give a file or a published list; `neurons --out` makes one.", param_hint="--neurons")
    shared.look_ahead(model)
    known = None if neurons is None else options.read_neurons(neurons)
    from registerlens.interventions.attention_bias import AttentionBias
    from registerlens.interventions.bake import bake as save
    from registerlens.interventions.registers import TestTimeRegisters

    if known is not None:
        folder = save(model, TestTimeRegisters(known, n=n), out)
    else:
        folder = save(model, AttentionBias.load(bias), out)  # type: ignore[arg-type]
    typer.echo(
        f"Wrote {folder}. In Python: from load import load_model (in that folder), or load_baked({str(folder)!r})"
    )


def _evaluate(
    vit: HookedViT,
    stream: ImageStream | OwnImages,
    tested: dict[str, Intervention],
    where: dict[str, Any],
    no_controls: bool,
) -> Evaluation:
    from registerlens.evaluation.effects import evaluate_intervention

    return evaluate_intervention(vit, stream, tested, controls=not no_controls, **where)


def _write_register(
    out: Path,
    vit: HookedViT,
    stream: ImageStream | OwnImages,
    neurons: RegisterNeurons,
    edit: Any,
    name: str,
    done: Evaluation,
    samples: str,
    size: int | None,
) -> None:
    from registerlens.diagnosis.cure import BIAS
    from registerlens.diagnosis.diagnose import conclude
    from registerlens.diagnosis.symptoms import measure
    from registerlens.viz.report import FEW, write_report
    from registerlens.viz.study import RegisterStudy, remedy_of

    study = RegisterStudy(neurons=neurons, intervention=edit, condition=name, evaluation=done, samples=samples)
    names, pixels, display = shared.shown_images(vit, stream, FEW, size)
    symptoms = measure(vit, stream, stream.batch_size)
    write_report(
        out / "report.html",
        vit,
        pixels,
        display,
        symptoms.trace,
        names=names,
        title=vit.source,
        diagnosis=conclude(symptoms, remedy_of(study)),
        study=study,
    )
    shared.write_evaluation(done, out)
    neurons.save(out)
    files = "report.html, evaluation (a folder), evaluation.parquet, figure.html, register_neurons.json"
    if name == BIAS:
        edit.save(out / "attention_bias")
        files += ", attention_bias (a folder)"
    typer.echo(f"Wrote {files} to {out}")
