"""Write the built-in model's tokenizer files beside this module."""

from __future__ import annotations

from tinkex.engine import tiny

tiny.write_tokenizer(tiny.DIRECTORY)
