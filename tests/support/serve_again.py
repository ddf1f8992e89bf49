"""
`PYTHON tests/support/serve_again.py PIDFILE LIMITS OPTION...`: kill -9 the server whose process id
is in PIDFILE, if there is one, and start `tinkex serve` again with options and limits (in JSON).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

#: `tinkex serve` with other limits, which the command line has no options for.
PROGRAM = """
import json, sys
from tinkex import cli
from tinkex.server import app, limits
main, chosen = app.main, limits.Limits(**json.loads(sys.argv.pop(1)))
app.main = lambda **options: main(limits=chosen, **options)
cli.main()
"""


def kill(pidfile: Path) -> None:
    if pidfile.exists():
        os.kill(int(pidfile.read_text()), signal.SIGKILL)
        pidfile.unlink()


def main(pidfile: Path, limits: str, *options: str) -> None:
    kill(pidfile)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TINKER_", "TINKEX_"))}
    with open(pidfile.with_suffix(".log"), "ab") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, limits, "serve", *options],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            cwd=ROOT,
            start_new_session=True,
        )
    pidfile.write_text(str(server.pid))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
