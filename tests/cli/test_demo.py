"""
The demonstration's data: what is collected from a library of Python files.
"""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

from tinkex.cli import demo
from tinkex.data import files

MODULE = '''
def documented(a, *, b: int = 1) -> str:
    """Say what
    it does.

    A second paragraph is left out.
    """

class Some:
    async def method(self):
        r"""Old \\d escapes warn nobody."""

    def silent(self):
        pass
'''


def test_the_first_paragraph_goes_with_the_signature(tmp_path):
    (tmp_path / "module.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("def (:")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "skipped.py").write_text(MODULE)

    assert [
        ("def documented(a, *, b: int=1):\n", "Say what it does."),
        ("def method(self):\n", "Old \\d escapes warn nobody."),
    ] == list(demo.docstrings(tmp_path))


def test_what_is_very_long_is_left_out(tmp_path):
    (tmp_path / "module.py").write_text(f'def f():\n    """{"long " * 100}"""\n')

    assert [] == list(demo.docstrings(tmp_path))


def test_the_library_of_this_python_gives_thousands_of_good_lines(tmp_path):
    path = tmp_path / "docstrings.jsonl"

    count = demo.write(path, Path(sysconfig.get_path("stdlib")))

    assert count > 3000
    assert count == len(files.read(path).records)
    assert count == len({json.dumps(line) for line in path.read_text().splitlines()})
