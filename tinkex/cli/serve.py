"""`tinkex serve`: run the training server in this process.

Contains only the options; the server is imported when the command runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tinkex.cli.options import SAMPLING_DTYPES, Size, dtype_option, option


@click.command(context_settings={"auto_envvar_prefix": "TINKEX_SERVE"})
@option("--host", None, "127.0.0.1", "Address to listen on.")
@option("--port", click.IntRange(0, 65535), 0, "Port; 0 picks a free one.")
@click.option(
    "--base-model",
    "base_models",
    multiple=True,
    envvar="TINKEX_SERVE_BASE_MODEL",
    help="Load this model at the start: a name, a directory, or NAME=DIRECTORY, which serves the "
    "directory under the name (org/model). May be repeated; other models are loaded when first "
    "used.",
)
@click.option(
    "--tiny/--no-tiny",
    "with_tiny",
    envvar="TINKEX_SERVE_TINY",
    default=True,
    help="Offer the built-in model 'tiny', too. Default: it is offered, after the others.",
)
@click.option(
    "--home",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of runs and checkpoints. Default: TINKEX_HOME, or ~/.tinkex.",
)
@click.option(
    "--api-key",
    "api_keys",
    multiple=True,
    envvar="TINKEX_SERVE_KEYS",
    show_envvar=True,
    help="Key of a user, who sees only their own work, as NAME=KEY; a name may have several keys. "
    "A KEY alone is a user, too, whose work no other key can reach. May be repeated. Without keys, "
    "everyone on loopback has access, and for any other --host a key is generated and printed.",
)
@option(
    "--dialect", click.Choice(["both", "json"]), "both", "Accept JSON and protobuf, or JSON only."
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    envvar="TINKEX_DEVICE",
    show_envvar=True,
    help="Device that computes: auto (an NVIDIA GPU if there is one, else the CPU), cpu, cuda, "
    "cuda:1 or mps. Only the CPU has been measured.",
)
@dtype_option(
    "Number type of base weights. auto is float32 on a CPU and bfloat16 on an accelerator; "
    "bfloat16 on a CPU halves the memory; int8 halves it again and is for sampling on a CPU only: "
    "such a server trains nothing.",
    choices=SAMPLING_DTYPES,
    default="auto",
)
@click.option(
    "--weights-on-disk",
    is_flag=True,
    envvar="TINKEX_WEIGHTS_ON_DISK",
    show_envvar=True,
    help="Keep base weights that do not fit in memory on disk, in the server's home, and read them "
    "in every step, which is slow. Default: such a model is refused. On a CPU only.",
)
@click.option(
    "--compiled/--no-compiled",
    default=True,
    envvar="TINKEX_COMPILED",
    show_envvar=True,
    help="Decode tokens and attend on a CPU with code that the machine's C compiler compiles once, "
    "or with PyTorch alone, which is slower. Without a compiler it is always PyTorch.",
)
@click.option(
    "--user-models", type=click.IntRange(1), metavar="N", help="Live models that a user may have."
)
@click.option(
    "--user-queue",
    type=click.IntRange(1),
    metavar="N",
    help="Requests that a user may have waiting; more are answered with 429.",
)
@click.option(
    "--user-disk",
    type=Size(),
    help="What a user's checkpoints and sampler weights may take, such as 20GB. Default: no limit, "
    "as for the two above.",
)
@click.option(
    "--drain",
    type=click.FloatRange(0),
    metavar="SECONDS",
    help="After SIGTERM, accept nothing new and work for up to this time on what was accepted. "
    "Default: 0; with a fixed port, what is left continues after a restart.",
)
@click.option(
    "--ssl-certfile",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Serve HTTPS with this certificate chain (PEM).",
)
@click.option(
    "--ssl-keyfile",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Its private key, unencrypted (PEM). Default: it is in the file of the certificate.",
)
@click.option(
    "--session-timeout",
    type=click.FloatRange(min=1),
    metavar="SECONDS",
    help="End a session whose client has been silent for this time, and free its models. Default: "
    "900; clients send a heartbeat every 10 seconds.",
)
@click.option("--announce", type=click.Path(path_type=Path), hidden=True)
@click.option("--parent-pid", type=int, hidden=True)
def serve(**options: Any) -> int:
    """Run the training server.

    Serves the Tinker API to other processes, other machines (with --api-key) and the official SDK
    until it is stopped. Prints its address.

    Options without their own variable can be set in the environment as TINKEX_SERVE_ and
    their name: TINKEX_SERVE_PORT=8000, TINKEX_SERVE_BASE_MODEL="smollm2 org/model=/models/x".
    """
    from tinkex import errors

    try:
        from tinkex.server import app
    except ImportError as exc:
        raise errors.MissingExtraError(
            f"the training server needs {exc.name}, which is not installed. "
            "Install it with: pip install 'tinkex[local]'"
        ) from exc
    status: int = app.main(**options)
    return status


COMMANDS = (serve,)
