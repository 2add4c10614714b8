"""A tiny architecture that open_clip knows by name."""

import json

import open_clip
import pytest
from families import TINY_CLIP


@pytest.fixture
def tiny_clip(tmp_path, monkeypatch):
    """A tiny architecture that open_clip knows by name."""
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny-clip.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(tmp_path / "configs")
    return "tiny-clip"
