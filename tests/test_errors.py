"""Every error has a page, points to it in a note, and goes unchanged from process to process."""

import pickle
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from test_cli import run

import registerlens as rl
from registerlens import errors
from registerlens.analysis.outliers import OutlierEvidence


def made(kind):
    """An error of this class."""
    if kind is errors.MissingExtraError:
        return kind("timm", "timm", "Loading 'timm:x'")
    return kind("Got 1, expected 2. Give 2.")


@pytest.mark.parametrize("kind", errors.kinds(), ids=lambda kind: kind.__name__)
def test_every_error_has_a_page_and_says_where(kind):
    error = made(kind)
    note = f"The usual causes, and what to do: registerlens help {kind.__name__}"
    assert error.__notes__ == [note] and "help" not in str(error)
    lines = errors.page_of(kind).read_text().splitlines()
    assert lines[0] == f"# {kind.__name__}"
    assert {"## What to do"} <= {*lines} and ("## Usual causes" in lines or kind is errors.RegisterLensError)


def test_no_page_is_about_an_error_that_is_not_there():
    pages = {path.stem for path in errors.page_of(errors.ShapeError).parent.glob("*.md")}
    assert pages == {kind.__name__ for kind in errors.kinds()}


@pytest.mark.parametrize("kind", errors.kinds(), ids=lambda kind: kind.__name__)
def test_pickling_keeps_message_and_notes(kind):
    error = made(kind)
    error.add_note("In task 3.")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind and str(again) == str(error) and again.__notes__ == error.__notes__


def test_pickling_keeps_the_evidence():
    numbers = dict.fromkeys(
        ("largest_over_median", "gap", "threshold", "typical", "share_of_images", "share_of_patches"), 1.0
    )
    evidence = OutlierEvidence(verdict="too few images", reason="none", more_images=3, **numbers)
    assert pickle.loads(pickle.dumps(errors.NoOutliersError("None.", evidence))).evidence == evidence


def fail():
    raise errors.MissingExtraError("timm", "timm", "Loading this")


@pytest.mark.slow
def test_an_error_comes_back_whole_from_another_process():
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        error = pool.submit(fail).exception(timeout=120)
    assert isinstance(error, errors.MissingExtraError) and "pip install" in str(error)
    assert [note for note in error.__notes__ if "registerlens help" in note] == made(type(error)).__notes__


def test_a_class_of_a_user_points_to_the_page_of_its_parent():
    class Mine(errors.ShapeError):
        pass

    assert Mine("x").__notes__ == errors.ShapeError("x").__notes__


def test_raised_errors_have_the_note_once():
    vit = rl.HookedViT.from_pretrained("registerlens:tiny")
    images = torch.rand(1, 3, 48, 48)
    wrong = {
        errors.HookNameError: lambda: vit.run_with_cache(images, names_filter="nothing"),
        errors.ShapeError: lambda: vit(images[0]),
        errors.ConfigError: lambda: rl.find_outliers(vit, images, threshold=-1.0),
        errors.ModelNotFoundError: lambda: rl.from_pretrained("registerlens:none"),
        errors.ImageError: lambda: rl.load_images("nowhere/", vit),
        errors.NonFiniteError: lambda: rl.trace(vit, images * float("nan")),
        errors.InterventionError: lambda: vit.edit(rl.Ablate(rl.RegisterNeurons.from_pairs([(9, 9)]))).__enter__(),
        errors.StoreError: lambda: rl.sweep.read_sweep("nowhere"),
        errors.UnsupportedArchitectureError: lambda: rl.from_module(torch.nn.Linear(1, 1)),
    }
    for kind, call in wrong.items():
        with pytest.raises(kind) as caught:
            call()
        assert type(caught.value) is kind and len(caught.value.__notes__) == 1


def test_a_notebook_shows_the_note_last(capsys):
    shell = InteractiveShell.instance()
    try:
        shell.run_cell("from registerlens.errors import HookNameError\nraise HookNameError('No hook.')")
        shown = capsys.readouterr().out
    finally:
        InteractiveShell.clear_instance()
    assert shown.rstrip().endswith("registerlens help HookNameError") and "No hook." in shown


def test_a_traceback_shows_the_note_and_the_command_line_does_not(monkeypatch, capsys):
    code = "from registerlens.errors import ShapeError\nraise ShapeError('Wrong.')"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stderr
    assert told.splitlines()[-2:] == [
        "registerlens.errors.ShapeError: Wrong.",
        "The usual causes, and what to do: registerlens help ShapeError",
    ]
    code, _, err = run(monkeypatch, capsys, "trace", "registerlens:none", "nowhere")
    assert code == 1 and "There is no embedded model" in err and "registerlens help" not in err


def test_the_command_prints_the_page(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "help", "ShapeError")
    assert (code, out.rstrip()) == (0, errors.page_of(errors.ShapeError).read_text().rstrip())
    code, out, _ = run(monkeypatch, capsys, "help")
    assert code == 0 and all(kind.__name__ in out for kind in errors.kinds())
    code, _, err = run(monkeypatch, capsys, "help", "ShapError")
    assert code == 2 and "ShapeError" in err
