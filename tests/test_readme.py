"""The README's first Python example runs as written, and says the truth."""

import re
from pathlib import Path

import pytest
from readme import with_families

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()


def test_the_first_example_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(.*?)```", README, flags=re.S)[0]
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "present. They arise in block 1, after its MLP" in printed
    assert "\nabsent\n" in printed
    assert "TestTimeRegisters: Worked" in printed
    assert (tmp_path / "register_neurons.json").is_file()


@pytest.mark.slow
def test_the_examples_that_need_no_other_model_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", README, flags=re.S)[:5]:
        exec(compile(code, "README.md", "exec"), names)
    assert names["result"].n_images == 64 and (tmp_path / "results" / "manifest.json").is_file()
    assert (tmp_path / "explorer.html").is_file() and (tmp_path / "figure_2.html").is_file()


def test_the_pages_for_contributors_say_what_is_there():
    source = ROOT / "src" / "registerlens"
    for code in re.findall(r"```python\n(.*?)```", CONTRIBUTING, flags=re.S):
        exec(compile(code, "CONTRIBUTING.md", "exec"), {})
    for path in re.findall(r"`(tests/[\w/]+\.py)`", CONTRIBUTING):
        assert (ROOT / path).is_file(), path
    for path in re.findall(r"`([a-z]+/\w+\.py|\w+\.py)`", CONTRIBUTING):
        assert (source / path).is_file() or (ROOT / path).is_file(), path
    family = re.findall(r"```text\n(.*?)```", CONTRIBUTING, flags=re.S)[0]
    assert family in (source / "loading" / "hf_vit.py").read_text()
    rooms = {path.name for path in source.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert rooms <= set(re.findall(r"`(\w+)/`", ARCHITECTURE))


def test_make_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:`|^)make ([\w-]+)", README + CONTRIBUTING, flags=re.M)):
        assert f"\n{target}:" in makefile, target


def test_the_list_of_families_is_the_registrys():
    assert with_families(README) == README, "run: make readme"
