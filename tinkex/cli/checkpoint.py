"""`tinkex checkpoint`: list, download, export, publish, expire and delete checkpoints.

Imports happen when a command runs, so that `tinkex --help` is fast.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import click

from tinkex.cli import export as hub
from tinkex.cli import formatting
from tinkex.cli.listing import (
    PAGE,
    first,
    limit_option,
    lora,
    metadata_rows,
    open_rest,
    page_for,
    print_count,
)
from tinkex.cli.options import Command, Duration, format_option, is_quiet, server_options
from tinkex.cli.selection import Selection, is_pattern

if TYPE_CHECKING:  # only annotations need these: --help must not import numpy and requests
    from tinkex import types
    from tinkex.rest import RestClient


@click.group()
def checkpoint() -> None:
    """List, download, publish and delete checkpoints.

    A PATH is tinker://RUN/weights/NAME, to resume training from, or
    tinker://RUN/sampler_weights/NAME, to sample from.

    Commands that take several paths also accept patterns with * ? [...]. A pattern with tinker://
    must match the whole path, any other its end: 'weights/step-*' or 'step-*'. Quote patterns.
    """


def selection_options(command: Command) -> Command:
    """--run-id, --type (received as *kind*) and --older-than (in seconds)."""
    for option in (
        click.option(
            "--older-than",
            type=Duration(),
            metavar="TIME",
            help="Only checkpoints older than this, such as 12h, 30d or 8w.",
        ),
        click.option(
            "--type",
            "kind",
            type=click.Choice(["training", "sampler"]),
            help="Only checkpoints of this type.",
        ),
        click.option("--run-id", metavar="RUN", help="Only checkpoints of this training run."),
    ):
        command = option(command)
    return command


paths_argument = click.argument("patterns", metavar="PATH...", nargs=-1, required=True)
yes_option = click.option("--yes", "-y", is_flag=True, help="Do not ask for confirmation.")


@checkpoint.command("list")
@click.argument("patterns", metavar="[PATH]...", nargs=-1)
@selection_options
@limit_option
@format_option
@server_options
def list_checkpoints(
    patterns: tuple[str, ...],
    run_id: str | None,
    kind: str | None,
    older_than: int | None,
    limit: int,
    as_json: bool,
    **server: str | None,
) -> None:
    """List all checkpoints, or those that match, newest first."""
    selection = Selection(patterns, run_id, kind, older_than)
    page = PAGE if patterns or selection.is_filtered else page_for(limit)
    with open_rest(**server) as rest:
        found, more = first(selection.listed(rest, page), limit)
    if as_json:
        formatting.say_json({"checkpoints": [attrs.asdict(one) for one in found], "more": more})
        return
    print_count("checkpoint", len(found), more)
    if found:
        formatting.say(checkpoint_table(found))


def checkpoint_table(checkpoints: Sequence[types.Checkpoint]) -> str:
    rows = [
        (
            one.tinker_path,
            one.checkpoint_type,
            formatting.size(one.size_bytes),
            "yes" if one.public else "no",
            formatting.when(one.time),
            formatting.when(one.expires_at, "never"),
        )
        for one in checkpoints
    ]
    return formatting.table(("Path", "Type", "Size", "Public", "Created", "Expires"), rows)


@checkpoint.command("info")
@click.argument("path")
@format_option
@server_options
def checkpoint_info(path: str, as_json: bool, **server: str | None) -> None:
    """Show the details of a checkpoint."""
    with open_rest(**server) as rest:
        entry, info = _look_up(rest, path)
    if as_json:
        known = [attrs.asdict(part) for part in (entry, info) if part is not None]
        formatting.say_json(
            {"tinker_path": path, **{k: v for part in known for k, v in part.items()}}
        )
        return
    rows = [("Path", path)]
    if entry is not None:
        rows += [
            ("Type", entry.checkpoint_type),
            ("Size", formatting.size(entry.size_bytes)),
            ("Public", "yes" if entry.public else "no"),
            ("Created", formatting.when(entry.time)),
            ("Expires", formatting.when(entry.expires_at, "never")),
            *metadata_rows(entry.user_metadata),
        ]
    if info is not None:
        rows += [("Base model", info.base_model), ("LoRA", lora(info))]
        for name in ("attn", "mlp", "unembed"):
            trained = getattr(info, f"train_{name}")
            rows += [] if trained is None else [(f"Train {name}", "yes" if trained else "no")]
    formatting.say(formatting.facts(rows))


def _look_up(
    rest: RestClient, path: str
) -> tuple[types.Checkpoint | None, types.WeightsInfoResponse | None]:
    """The list entry of a checkpoint and the info of its weights; None if not offered.

    Raises:
        NotFoundError: If the checkpoint does not exist, or the server offers neither.
    """
    from tinkex import errors, types

    parsed = types.ParsedCheckpointTinkerPath.from_tinker_path(path)
    info: types.WeightsInfoResponse | None = None
    entry: types.Checkpoint | None = None
    refusal: errors.NotFoundError | None = None
    try:
        info = rest.get_weights_info_by_tinker_path(path)
    except errors.NotOfferedError as exc:
        refusal = exc
    try:
        listed = rest.list_checkpoints(parsed.training_run_id).checkpoints
        entry = next((one for one in listed if one.checkpoint_id == parsed.checkpoint_id), None)
    except errors.NotFoundError as exc:
        refusal = refusal or exc
    if info is None and entry is None:
        raise refusal or errors.NotFoundError(f"there is no checkpoint {path}.", status=404)
    return entry, info


@checkpoint.command()
@click.argument("path")
@click.argument("folder", type=click.Path(path_type=Path), required=False)
@click.option(
    "--force", is_flag=True, help="Replace an existing FOLDER, once the new one is complete."
)
@format_option
@server_options
def download(
    path: str, folder: Path | None, force: bool, as_json: bool, **server: str | None
) -> None:
    """Download the files of a checkpoint into FOLDER.

    The default FOLDER is a new one with the name of the checkpoint.
    """
    from tinkex import types

    parsed = types.ParsedCheckpointTinkerPath.from_tinker_path(path)
    if folder is None:
        folder = Path(re.sub(r"[^\w.-]+", "_", f"{parsed.training_run_id}_{parsed.checkpoint_id}"))
    with open_rest(**server) as rest, _download_bar() as progress:
        rest.download_checkpoint(path, folder, force, progress)
    _print_folder(path, folder, as_json)


@checkpoint.command()
@click.argument("path")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--merge",
    is_flag=True,
    help="Write a complete Hugging Face model: the base model with the adapter merged in. Needs "
    "the base model, and pip install 'tinkex[local]'.",
)
@click.option(
    "--base-model", help="Directory or Hugging Face id. Default: the name in the checkpoint."
)
@click.option(
    "--force", is_flag=True, help="Replace an existing FOLDER, once the new one is complete."
)
@format_option
@server_options
def export(
    path: str,
    folder: Path,
    merge: bool,
    base_model: str | None,
    force: bool,
    as_json: bool,
    **server: str | None,
) -> None:
    """Write a PEFT adapter, or with --merge a complete model, into FOLDER."""
    with open_rest(**server) as rest, _download_bar() as progress:
        rest.export_checkpoint(
            path, folder, merge, base_model=base_model, force=force, progress=progress
        )
    _print_folder(path, folder, as_json)


@checkpoint.command("push-hf")
@click.argument("path")
@click.option("-r", "--repo", required=True, metavar="ORG/NAME", help="Repository on the hub.")
@click.option("--public", is_flag=True, help="Make a new repository public. Default: private.")
@click.option("--revision", help="Branch to upload to. Default: the main one.")
@click.option("--commit-message", default="Upload by tinkex checkpoint push-hf", show_default=True)
@click.option("--create-pr", is_flag=True, help="Propose the upload as a pull request.")
@server_options
def push_hf(
    path: str,
    repo: str,
    public: bool,
    revision: str | None,
    commit_message: str,
    create_pr: bool,
    **server: str | None,
) -> None:
    """Upload the adapter at PATH to the Hugging Face hub.

    Uses the token of `hf auth login`, or HF_TOKEN. To upload a merged model or a GGUF file, use
    `tinkex push`.
    """
    with tempfile.TemporaryDirectory(prefix="tinkex-push-") as scratch:
        folder = Path(scratch) / hub.name_of(repo)
        with open_rest(**server) as rest, _download_bar() as progress:
            rest.export_checkpoint(path, folder, progress=progress)
        url = hub.upload(
            folder,
            repo,
            private=not public,
            message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )
    formatting.say(url)


@contextmanager
def _download_bar() -> Iterator[Callable[[int, int | None], None]]:
    """A progress bar on stderr, if that is a terminal."""
    from tqdm.auto import tqdm

    disable = True if is_quiet() else None
    with tqdm(
        unit="B", unit_scale=True, unit_divisor=1024, disable=disable, file=sys.stderr
    ) as bar:

        def progress(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def _print_folder(path: str, folder: Path, as_json: bool) -> None:
    if as_json:
        formatting.say_json({"tinker_path": path, "folder": str(folder.absolute())})
    else:
        formatting.say(str(folder))


@checkpoint.command()
@paths_argument
@yes_option
@format_option
@server_options
def publish(patterns: tuple[str, ...], yes: bool, as_json: bool, **server: str | None) -> int:
    """Make checkpoints readable for all users of the server."""
    with open_rest(**server) as rest:
        change = Change("Publish {}?", "Published {}", rest.publish_checkpoint_from_tinker_path)
        return change.apply(rest, Selection(patterns), yes, as_json)


@checkpoint.command()
@paths_argument
@yes_option
@format_option
@server_options
def unpublish(patterns: tuple[str, ...], yes: bool, as_json: bool, **server: str | None) -> int:
    """Make published checkpoints private again."""
    with open_rest(**server) as rest:
        action = rest.unpublish_checkpoint_from_tinker_path
        change = Change("Make {} private?", "Unpublished {}", action)
        return change.apply(rest, Selection(patterns), yes, as_json)


@checkpoint.command("set-ttl")
@paths_argument
@click.option(
    "--ttl",
    type=Duration(),
    metavar="TIME",
    help="Time until they expire, such as 3600, 12h or 30d.",
)
@click.option("--remove", is_flag=True, help="Remove the expiry.")
@yes_option
@format_option
@server_options
def set_ttl(
    patterns: tuple[str, ...],
    ttl: int | None,
    remove: bool,
    yes: bool,
    as_json: bool,
    **server: str | None,
) -> int:
    """Set when checkpoints expire."""
    if (ttl is None) is not remove:
        raise click.UsageError("Give either --ttl TIME or --remove.")
    when = "never" if ttl is None else f"in {formatting.duration(ttl)}"
    with open_rest(**server) as rest:
        change = Change(
            f"Set {{}} to expire {when}?",
            f"Expires {when}: {{}}",
            lambda path: rest.set_checkpoint_ttl_from_tinker_path(path, ttl),
        )
        return change.apply(rest, Selection(patterns), yes, as_json)


@checkpoint.command()
@click.argument("patterns", metavar="[PATH]...", nargs=-1)
@selection_options
@yes_option
@format_option
@server_options
def delete(
    patterns: tuple[str, ...],
    run_id: str | None,
    kind: str | None,
    older_than: int | None,
    yes: bool,
    as_json: bool,
    **server: str | None,
) -> int:
    """Delete the checkpoints that match a PATH (if given) and the options.

    `tinkex checkpoint list` with the same arguments shows them. Asks once, with all names.
    """
    selection = Selection(patterns, run_id, kind, older_than)
    if not patterns and not selection.is_filtered:
        raise click.UsageError(
            "Give a PATH, --run-id, --type or --older-than ('tinker://*' means all)."
        )
    with open_rest(**server) as rest:
        action = rest.delete_checkpoint_from_tinker_path
        change = Change("Delete {}?", "Deleted {}", action, is_final=True)
        return change.apply(rest, selection, yes, as_json)


@attrs.frozen
class Change:
    """One action on each of several checkpoints.

    Args:
        question: asked once; {} stands for the number of checkpoints.
        done: printed for each; {} stands for its path.
        action: changes one path.
        is_final: True if it cannot be undone; then even a single path must be confirmed.
    """

    question: str
    done: str
    action: Callable[[str], object]
    is_final: bool = False

    def apply(self, rest: RestClient, selection: Selection, yes: bool, as_json: bool) -> int:
        """Select, confirm, change each and print the result; returns the exit status."""
        paths, known = _chosen(rest, selection)
        if not paths:
            click.echo("No checkpoint matches.", err=True)
        is_exact = not any(map(is_pattern, selection.patterns))
        must_ask = bool(paths) and not yes and (self.is_final or not is_exact)
        if must_ask and not self._is_confirmed(paths, known):
            click.echo("Nothing was changed.", err=True)
            return 1
        done: list[str] = []
        failures: list[dict[str, str]] = []
        try:
            _each(self.action, paths, done, failures)
        finally:  # also after an exception, print what was changed
            self._say(done, failures, as_json)
        # If no checkpoint is old enough, that is a success; a name without a match is a failure.
        found = bool(paths) or selection.is_filtered
        return 0 if found and not failures else 1

    def _is_confirmed(self, paths: Sequence[str], known: Sequence[types.Checkpoint]) -> bool:
        """Ask on stderr; no answer means no."""
        others = set(paths) - {one.tinker_path for one in known}
        listing = [checkpoint_table(known)] if known else []
        click.echo("\n".join([*listing, *sorted(others)]), err=True)
        what = formatting.plural(len(paths), "checkpoint")
        bytes_known = [one.size_bytes for one in known if one.size_bytes is not None]
        if bytes_known:
            what += f" ({formatting.size(sum(bytes_known))})"
        click.echo(f"{self.question.format(what)} [y/N] ", nl=False, err=True)
        answer = sys.stdin.readline()
        if not answer:
            click.echo("\nNo answer; give --yes to confirm without a question.", err=True)
        return answer.strip().lower() in ("y", "yes")

    def _say(self, done: list[str], failures: list[dict[str, str]], as_json: bool) -> None:
        for failure in failures:
            click.echo(f"error: {failure['tinker_path']}: {failure['error']}", err=True)
        if as_json:
            formatting.say_json({"done": done, "failures": failures})
        else:
            for path in done:
                formatting.say(self.done.format(path))


def _chosen(rest: RestClient, selection: Selection) -> tuple[list[str], list[types.Checkpoint]]:
    """The selected paths, and their list entries if these were fetched.

    Raises:
        ValueError: If a path is not valid.
    """
    from tinkex import types

    exact = [path for path in selection.patterns if not is_pattern(path)]
    for path in exact:
        types.ParsedCheckpointTinkerPath.from_tinker_path(path)
    if selection.patterns and len(exact) == len(selection.patterns) and not selection.is_filtered:
        return list(dict.fromkeys(exact)), []
    known = list(selection.listed(rest))
    paths = [one.tinker_path for one in known]
    # A pattern may match nothing; an exact path that does not exist is an error of its action.
    missing = [] if selection.is_filtered else [path for path in exact if path not in paths]
    return [*paths, *missing], known


def _each(
    action: Callable[[str], object],
    paths: Sequence[str],
    done: list[str],
    failures: list[dict[str, str]],
) -> None:
    """Apply *action* to each path; a refusal of one does not stop the others."""
    from tinkex import errors

    for path in paths:
        try:
            action(path)
            done.append(path)
        except errors.NotOfferedError:
            raise  # the server does not offer it for any path
        except errors.APIStatusError as exc:
            failures.append({"tinker_path": path, "error": exc.detail or str(exc)})


COMMANDS = (checkpoint,)
