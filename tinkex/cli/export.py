"""`tinkex export` and `tinkex push`: write a trained model for inference programs, or upload it.

Imports happen when a command runs, so that `tinkex --help` is fast.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import click

from tinkex.checkpoints.formats import FORMATS
from tinkex.cli import formatting
from tinkex.cli.listing import open_rest
from tinkex.cli.options import option, server_options, together

#: Options of the output format.
form_options = together(
    click.option(
        "--to",
        "form",
        type=click.Choice(list(FORMATS)),
        default="hf",
        show_default=True,
        help=" ".join(f"{name}: {kind.help}." for name, kind in FORMATS.items()),
    ),
    option(
        "--gguf-type",
        click.Choice(["F16", "Q8_0", "F32"]),
        "F16",
        "How matrices are stored in a GGUF file.",
    ),
    click.option(
        "--base-model",
        help="Directory, GGUF file or Hugging Face id. Default: what the run was trained on.",
    ),
)


@click.command()
@click.argument("run")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@form_options
@click.option(
    "--force", is_flag=True, help="Replace an existing FOLDER, once the new one is complete."
)
@server_options
def export(run: str, folder: Path, force: bool, **options: Any) -> None:
    """Write RUN into FOLDER for other programs, with a model card.

    RUN is the --output folder of a finished `tinkex train`, or a tinker:// path of weights saved
    for sampling.
    """
    _export(run, folder, folder.resolve().name, force=force, **options)
    for path in sorted(folder.iterdir()):
        formatting.say(f"{formatting.size(path.stat().st_size):>10}  {path}")


@click.command()
@click.argument("run")
@click.argument("repository", metavar="ORG/NAME")
@form_options
@click.option("--private", is_flag=True, help="Make a new repository private.")
@server_options
def push(run: str, repository: str, private: bool, **options: Any) -> None:
    """Export RUN and upload it to the Hugging Face hub as ORG/NAME.

    Uses the token of `hf auth login`, or HF_TOKEN. RUN is as for `tinkex export`.
    """
    with tempfile.TemporaryDirectory(prefix="tinkex-push-") as scratch:
        folder = Path(scratch) / name_of(repository)
        _export(run, folder, folder.name, force=False, **options)
        url = upload(folder, repository, private=private or None, message="Upload by tinkex push")
    formatting.say(url)


def name_of(repository: str) -> str:
    """The second part of ORG/NAME; UsageError if it has another form."""
    parts = repository.split("/")
    if len(parts) != 2 or not all(parts):
        raise click.UsageError(f"{repository!r} is not like ORG/NAME.")
    return parts[1]


def upload(
    folder: Path,
    repository: str,
    *,
    private: bool | None,
    message: str,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload *folder* to the Hugging Face hub, into a new repository if there is none; its URL.

    Args:
        private: of a new repository; None is the organization's default.
        revision: the branch; None is the main one.
        create_pr: True to propose the upload as a pull request.
    """
    import huggingface_hub

    hub = huggingface_hub.HfApi()
    try:
        url = hub.create_repo(repository, private=private, exist_ok=True)
        done = hub.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=message,
            revision=revision,
            create_pr=create_pr or None,
        )
    except (huggingface_hub.errors.HfHubHTTPError, OSError) as exc:
        reason = " ".join(str(exc).split())[:300]
        raise click.ClickException(
            f"{repository} cannot be uploaded: {reason}. Check the name, the network and the "
            "token (`hf auth login`, or HF_TOKEN with write access)."
        ) from exc
    return str(done.pr_url or url) if create_pr else str(url)


def _export(
    run: str,
    folder: Path,
    name: str,
    *,
    form: str,
    gguf_type: str,
    base_model: str | None,
    force: bool,
    base_url: str | None,
    api_key: str | None,
) -> None:
    from tinkex.checkpoints import export as exporting
    from tinkex.recipes import run_folder
    from tinkex.recipes.run import Run

    more: dict[str, Any] = {"name": name, "gguf_type": gguf_type, "force": force}
    if not run.startswith("tinker://"):
        state = run_folder.load_state(Path(run))
        if state is None:
            raise click.UsageError(f"{run} is neither the folder of a run nor a tinker:// path.")
        if not state.is_finished:
            raise click.UsageError(
                f"The run in {run} is not finished ({state.progress}); continue it first: "
                f"tinkex train --resume --output {run}"
            )
        base = base_model or state.settings.base_model
        training = Run(run).training
        exporting.export_adapter(
            Path(run) / "adapter", base, folder, form, training=training, **more
        )
        return
    with (
        open_rest(base_url=base_url, api_key=api_key) as rest,
        tempfile.TemporaryDirectory(prefix="tinkex-export-") as scratch,
    ):
        adapter = rest.export_checkpoint(run, Path(scratch) / "adapter", base_model=base_model)
        config = json.loads((adapter / exporting.ADAPTER_CONFIG).read_text(encoding="utf-8"))
        base = base_model or config["base_model_name_or_path"]
        exporting.export_adapter(adapter, base, folder, form, **more)


COMMANDS = (export, push)
