"""`python tests/readme.py` writes the registry's list of families into the README, which a test compares with it."""

from pathlib import Path

from registerlens.loading.registry import families_markdown

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- families: make readme -->\n", "<!-- end of families -->"


def with_families(readme: str) -> str:
    """The README with the registry's list between its marks."""
    before, _, rest = readme.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"README.md lacks the marks {BEGIN!r} and {END!r}.")
    return f"{before}{BEGIN}\n{families_markdown()}\n\n{END}{after}"


if __name__ == "__main__":
    README.write_text(with_families(README.read_text()))
