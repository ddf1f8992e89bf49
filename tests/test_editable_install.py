"""An editable install (`pip install -e .`) shows the package's types to type checkers."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent

SCRIPT = """
import tinkex

service = tinkex.ServiceClient()
reveal_type(service.create_sampling_client(base_model="tiny"))
"""


def test_mypy_finds_the_types_of_an_editable_install(tmp_path):
    """The script is outside the project and the interpreter has nothing but the editable wheel."""
    build = "import sys, setuptools.build_meta as backend; backend.build_editable(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=ROOT, check=True, capture_output=True
    )
    venv.create(tmp_path / "venv", with_pip=False)
    [site_packages] = (tmp_path / "venv").glob("lib/python*/site-packages")
    [wheel] = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site_packages)
    (tmp_path / "script.py").write_text(SCRIPT)

    done = subprocess.run(
        [
            *(
                sys.executable,
                "-I",
                "-m",
                "mypy",
                "--config-file=",
                f"--cache-dir={tmp_path / 'c'}",
            ),
            *("--python-executable", str(tmp_path / "venv" / "bin" / "python"), "script.py"),
        ],
        cwd=tmp_path,
        text=True,
        capture_output=True,
    )

    assert 'Revealed type is "tinkex.sampling.SamplingClient"' in done.stdout, done.stdout
    assert "py.typed" not in done.stdout
