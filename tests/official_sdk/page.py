"""docs/compatibility.md: several programs write it, each its own part between two comments."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"


def _frame(name: str) -> tuple[str, str]:
    return f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"


def part(name: str) -> str:
    """What stands between the comments of *name* now; "" if there are none."""
    begin, end = _frame(name)
    match = re.search(re.escape(begin) + "(.*?)" + re.escape(end), PAGE.read_text(), re.DOTALL)
    return match.group(1) if match else ""


def write(name: str, text: str) -> None:
    """Replace the part *name*; at the end of the page, where it is new."""
    begin, end = _frame(name)
    page = PAGE.read_text()
    if begin in page:
        before, rest = page.split(begin)
        page = before + begin + text + end + rest.split(end)[1]
    else:
        page = f"{page.rstrip()}\n\n{begin}{text}{end}"
    PAGE.write_text(page)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)
