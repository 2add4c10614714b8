"""Every tutorial runs from top to bottom, says what its text says, and is stored without output."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def run(path):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}}).execute()
    printed = [out.text for cell in notebook.cells for out in cell.get("outputs", []) if out.output_type == "stream"]
    return "".join(printed)


def test_there_are_tutorials():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_output_is_stored(path):
    cells = nbformat.read(path, as_version=4).cells
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in cells)


@pytest.mark.slow
def test_the_second_tutorial_finds_what_it_says():
    printed = run(FOLDER / "02_register_neurons.ipynb")
    assert "they are exactly the flat patches: True" in printed
    assert "7 neurons in blocks 0 to 1 (the elbow of the scores says 7" in printed
    assert "register: Worked" in printed and "bias: Worked" in printed
    assert "torch.Size([1, 17, 48])" in printed
    heart = printed[printed.index("[[") : printed.index("]]")]
    norms = [float(number) for number in re.findall(r"[\d.]+", heart)]
    assert len(norms) == 36 and sum(norm > 5 * sorted(norms)[12] for norm in norms) == 12


@pytest.mark.slow
def test_the_first_tutorial_finds_what_it_says():
    printed = run(FOLDER / "01_which_norm_which_layer.ipynb")
    assert "Outlier tokens: present. They arise in block 1, after its MLP" in printed
    assert "flat patches that are outliers: 1.0" in printed and "other patches that are outliers: 0.0" in printed
    top_seven = [int(line.split(":")[0].split()[1]) for line in printed.splitlines() if line.startswith("neuron")][:7]
    assert set(top_seven) == {183, 103, 219, 125, 55, 128, 177}
    assert "Outlier tokens: absent" in printed
    assert "seven other neurons silenced: present 1.mlp" in printed
    assert "untrained twin:               absent" in printed
