"""Names that people read for the tokens of a sequence, and back from a name or a grid position to the token."""

from operator import index
from typing import SupportsIndex

from registerlens.config import TokenLayout
from registerlens.errors import ShapeError, close_matches

TokenName = tuple[SupportsIndex, SupportsIndex] | SupportsIndex | str
"""A patch as (row, column) or by index (row by row), or the name of any token, such as "[CLS]"."""

BIAS = "attention bias"
"""The key of an attention bias, which has no token."""


def token_names(layout: TokenLayout, n_keys: int | None = None) -> list[str]:
    """The name of every token, in their order; with more keys than tokens, those of attention biases at the end.

    Args:
        layout: of the sequence.
        n_keys: keys that attention has; default: one a token.

    Example:
        >>> token_names(TokenLayout(grid=(1, 2), n_prefix=1, n_trained_registers=1, n_test_time_registers=1), 6)
        ['[CLS]', 'trained register 0', '(0,0)', '(0,1)', 'test-time register 0', 'attention bias']
    """
    names = [f"prefix {i}" for i in range(layout.n_prefix)]
    for position, name in ((layout.cls, "[CLS]"), (layout.distillation, "[DIST]")):
        if position is not None:
            names[position] = name
    names += [f"trained register {i}" for i in range(layout.n_trained_registers)]
    names += [f"({row},{column})" for row in range(layout.grid_height) for column in range(layout.grid_width)]
    names += [f"test-time register {i}" for i in range(layout.n_test_time_registers)]
    n_biases = 0 if n_keys is None else n_keys - layout.n_tokens
    return names + ([BIAS] if n_biases == 1 else [f"{BIAS} {i}" for i in range(n_biases)])


def token_index(layout: TokenLayout, token: TokenName, n_keys: int | None = None) -> int:
    """The position of a token.

    Args:
        layout: of the sequence.
        token: (row, column), a patch index, or a name as `token_names` gives it; "cls" is understood too.
        n_keys: as for `token_names`.

    Raises:
        ShapeError: there is no such token.

    Example:
        >>> layout = TokenLayout(grid=(2, 3), n_prefix=1)
        >>> token_index(layout, (1, 2)), token_index(layout, "cls"), token_index(layout, 0)
        (6, 0, 1)
    """
    if isinstance(token, str):
        names = token_names(layout, n_keys)
        wanted = "[CLS]" if token.lower() == "cls" else token.replace(" ", "") if token.startswith("(") else token
        if wanted in names:
            return names.index(wanted)
        others = [name for name in names if not name.startswith("(")]
        known = f"{', '.join(others)} and the patches" if others else "the patches"
        raise ShapeError(
            f"There is no token {token!r}.{close_matches(token, others)} There are {known} (0,0) to "
            f"({layout.grid_height - 1},{layout.grid_width - 1})."
        )
    if isinstance(token, SupportsIndex):  # NumPy's integers too
        token = index(token)
        if not 0 <= token < layout.n_patches:
            raise ShapeError(f"Patch {token} does not exist: patches count 0 to {layout.n_patches - 1}, row by row.")
        return layout.patches.start + token
    row, column = map(index, token)
    if not (0 <= row < layout.grid_height and 0 <= column < layout.grid_width):
        raise ShapeError(
            f"The patch ({row},{column}) lies outside the grid of {layout.grid_height} x {layout.grid_width} patches: "
            f"rows count 0 to {layout.grid_height - 1}, columns 0 to {layout.grid_width - 1}."
        )
    return layout.patches.start + row * layout.grid_width + column
