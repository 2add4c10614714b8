"""The explorer as an anywidget: the browser asks, this process answers from what it recorded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from registerlens.errors import MissingExtraError
from registerlens.explorer.answers import answer
from registerlens.explorer.explorer import Explorer
from registerlens.explorer.manifest import manifest
from registerlens.explorer.page import script, style

if TYPE_CHECKING:
    from anywidget import AnyWidget


def make_widget(explorer: Explorer) -> AnyWidget:
    """What `Explorer.widget` does; see there.

    Raises:
        MissingExtraError: anywidget is not installed.

    Example:
        >>> import torch, registerlens as rl
        >>> from registerlens.explorer.explorer import explore
        >>> vit = rl.HookedViT.from_pretrained("registerlens:tiny")
        >>> make_widget(explore(vit, torch.rand(1, 3, 48, 48))).manifest["layers"]
        6
    """
    try:
        import anywidget  # noqa: PLC0415
        import traitlets  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtraError("anywidget", "notebooks", "The live explorer") from error

    class ExplorerWidget(anywidget.AnyWidget):
        _esm = script()
        _css = style()
        manifest = traitlets.Dict().tag(sync=True)

    widget = ExplorerWidget(manifest=manifest(explorer))

    def asked(_: Any, question: dict[str, Any], __: Any) -> None:
        told, buffers = answer(explorer, question)
        widget.send(told, buffers)

    widget.on_msg(asked)
    return widget
