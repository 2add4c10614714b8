"""Lines of code (without blanks, comments and docstrings) and modules of the package, room by room: `make count`."""

import ast
import pathlib
from collections import Counter

SOURCE = pathlib.Path(__file__).parents[1] / "src" / "registerlens"


def lines_of_code(text):
    """Lines that are no blank, no comment and no string that stands alone.

    Example:
        >>> lines_of_code('"What it is."' + chr(10) + "# why" + chr(10) * 2 + "x = 1  # how" + chr(10))
        1
    """
    said = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            said |= set(range(node.lineno, node.end_lineno + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(bool(line.strip()) and not line.strip().startswith("#") and at not in said for at, line in lines)


def main():
    """Print a line for each room, and the sum."""
    lines, modules = Counter(), Counter()
    for path in SOURCE.rglob("*.py"):
        room = path.relative_to(SOURCE).parts[0] if path.parent != SOURCE else "(top level)"
        lines[room] += lines_of_code(path.read_text())
        modules[room] += 1
    for room in sorted(lines):
        print(f"{room:<15}{modules[room]:>5} modules{lines[room]:>8,} lines of code")
    print(f"{'all':<15}{modules.total():>5} modules{lines.total():>8,} lines of code")


if __name__ == "__main__":
    main()
