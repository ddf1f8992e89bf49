"""
The map in docs/architecture.md: it names every module, and no other.

Run as a program with --write, it brings the map up to date.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tinkex"
PAGE = ROOT / "docs" / "architecture.md"
MAP = re.compile(r"^```map\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def on_the_map() -> dict[str, dict[str, str]]:
    """Heading of a folder -> module -> description, as docs/architecture.md has them."""
    [text] = MAP.findall(PAGE.read_text())
    found: dict[str, dict[str, str]] = {}
    for line in text.splitlines():
        name, _, description = line.strip().partition(" ")
        if line and not line.startswith(" "):
            found[line] = room = {}
        elif name:
            room[name] = description.strip()
    return found


def path_of(heading: str, module: str = "") -> str:
    folder = heading.split(" ")[0]
    return ("" if folder == "tinkex/" else folder) + module


def modules_that_stand() -> set[str]:
    """Except `__init__.py` and `__main__.py` of folders: the folder's line describes them."""
    return {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if not path.name.startswith("__") or path.parent == PACKAGE
    }


def test_the_map_names_every_module_and_no_other():
    """To update it: python tests/test_map.py --write"""
    named = {path_of(heading, m) for heading, room in on_the_map().items() for m in room}

    assert modules_that_stand() == named


def test_paths_named_on_the_architecture_page_exist():
    """`engine/losses.py` and `types/` below tinkex/, `tests/...` below the root."""
    named = set(re.findall(r"`([\w./]+(?:\.py|/))`", PAGE.read_text())) - {"tests/"}
    missing = {p for p in named if not any((root / p).exists() for root in (PACKAGE, ROOT))}

    assert set() == missing


def write_map() -> None:
    """Adds new modules with the first line of their docstring, removes those that are gone."""
    stands, rooms = modules_that_stand(), on_the_map()
    headings = {path_of(heading): heading for heading in rooms}
    lines: dict[str, dict[str, str]] = {
        heading: {m: text for m, text in room.items() if path_of(heading, m) in stands}
        for heading, room in rooms.items()
    }
    for path in sorted(stands):
        folder = path.rpartition("/")[0]
        folder = f"{folder}/" if folder else ""
        heading = headings.setdefault(folder, folder)
        described = ast.get_docstring(ast.parse((PACKAGE / path).read_text())) or ""
        first = described.splitlines()[0].removesuffix(".") if described else ""
        lines.setdefault(heading, {}).setdefault(path.rpartition("/")[2], first)
    text = "\n".join(
        "\n".join([heading, *(f"  {m:<22} {text}".rstrip() for m, text in room.items())]) + "\n"
        for heading, room in lines.items()
    )
    PAGE.write_text(MAP.sub(lambda _: f"```map\n{text}```", PAGE.read_text()))


if __name__ == "__main__" and "--write" in sys.argv:
    write_map()
