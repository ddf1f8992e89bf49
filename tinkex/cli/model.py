"""`tinkex model`: the base models on this machine, and fetching them.

Imports happen when a command runs, so that `tinkex --help` is fast.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import click

from tinkex.cli import formatting
from tinkex.cli.options import format_option

if TYPE_CHECKING:
    from tinkex.engine.fetch import Progress


#: The two paths that compute models, as in docs/models.md.
FAST, GENERIC = "fast path", "generic path"

#: Suffixes of class names of causal language models, or of models with one inside.
_CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


@attrs.frozen
class Row:
    """A row of `tinkex model list`; None is unknown."""

    name: str
    path: str | None
    size: int | None = None
    architecture: str | None = None
    computed_by: str | None = None
    context: int | None = None
    dtype: str | None = None


@click.group()
def model() -> None:
    """List, fetch and remove base models.

    NAME is a known model (`tinkex model list` shows these), or a hub id such as org/name.
    """


@model.command("list")
@click.argument("directories", nargs=-1, metavar="[DIRECTORY|FILE.gguf]...")
@format_option
def list_models(directories: Sequence[str], as_json: bool) -> None:
    """List known models, those in the hub's cache, and the given directories and GGUF files."""
    rows = [*_known(), *_in_hub_cache(), *(_local(name) for name in directories)]
    if as_json:
        formatting.say_json({"models": [attrs.asdict(row) for row in rows]})
        return
    headings = ("Name", "Size", "Architecture", "Computed by", "Context", "Dtype", "Where")
    formatting.say(formatting.table(headings, [_cells(row) for row in rows]))


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        "-" if row.size is None else formatting.size(row.size),
        row.architecture or "-",
        row.computed_by or "-",
        "-" if row.context is None else str(row.context),
        row.dtype or "-",
        row.path or f"not fetched: tinkex model pull {row.name}",
    )


@model.command()
@click.argument("name")
def pull(name: str) -> None:
    """Fetch the base model NAME, unless it is here already, and print its directory."""
    formatting.say(str(_pull(name)))


@model.command()
@click.argument("name")
def path(name: str) -> None:
    """Print the directory of the base model NAME, which has been fetched before."""
    found = _find(name)
    if found is None:
        raise click.ClickException(f"{name} is not here; fetch it: tinkex model pull {name}")
    formatting.say(str(found))


@model.command()
@click.argument("name")
def rm(name: str) -> None:
    """Remove the fetched base model NAME from this machine."""
    from tinkex.engine import fetch
    from tinkex.text import registry

    if name in registry.KNOWN:
        is_gone = fetch.remove(name)
    else:
        is_gone = _remove_from_hub_cache(name)
    if not is_gone:
        raise click.ClickException(f"{name} is not here; `tinkex model list` shows what is.")
    formatting.say(f"Removed {name}.")


def fetched(base_model: str, base_url: str | None, api_key: str | None) -> str:
    """
    *base_model*, or the directory of a known one, fetched first with a progress bar.

    Only for the embedded engine: other servers fetch their own models.
    """
    from tinkex import config
    from tinkex.text import registry

    if base_model in registry.KNOWN and config.wants_embedded(base_url, api_key):
        return str(_pull(base_model))
    return base_model


def _pull(name: str) -> Path:
    from tinkex import errors
    from tinkex.text import registry

    if name in registry.KNOWN:
        found = registry.find(name)
        if found is not None:
            return found
        try:
            import torch  # noqa: F401 - before 93 MB are downloaded

            from tinkex.engine import fetch
        except ImportError as exc:
            raise errors.MissingExtraError(
                f"converting {name} needs {exc.name}, which is not installed. Install it with: "
                "pip install 'tinkex[local]'"
            ) from exc
        with _bar(name) as progress:
            return fetch.ensure(name, progress)
    if Path(name).exists():
        raise click.UsageError(f"{name} is here already: use it as it is.")
    from tinkex.checkpoints import export

    return Path(export.resolve(name))


@contextlib.contextmanager
def _bar(name: str) -> Iterator[Progress]:
    """A progress bar on stderr."""
    from tqdm import tqdm

    with tqdm(desc=f"Fetching {name}", unit="B", unit_scale=True, unit_divisor=1000) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(max(0, done - bar.n))
            if done == total:
                bar.set_postfix_str("converting")

        yield progress


def _find(name: str) -> Path | None:
    from tinkex.text import registry

    if name in registry.KNOWN:
        return registry.find(name)
    cached = next((row for row in _in_hub_cache() if row.name == name), None)
    return Path(cached.path) if cached and cached.path else None


def _known() -> list[Row]:
    from tinkex.text import registry

    rows = []
    for known in registry.KNOWN.values():
        found = registry.find(known.name)
        rows.append(Row(known.name, None) if found is None else _directory(known.name, found))
    return rows


def _local(name: str) -> Row:
    from tinkex.text import gguf

    place = Path(name).expanduser()
    if gguf.is_gguf(name):
        file = gguf.read(place)
        context = file.metadata.get(f"{file.architecture}.context_length")
        path = str(place.resolve())
        return Row(name, path, place.stat().st_size, file.architecture, FAST, context, "GGUF")
    if not (place / "config.json").is_file():
        raise click.UsageError(
            f"{name} is neither a model directory (config.json) nor a GGUF file."
        )
    return _directory(name, place.resolve())


def _directory(name: str, place: Path) -> Row:
    """A row from config.json and the files of a Hugging Face directory."""
    content: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        content = json.loads((place / "config.json").read_text(encoding="utf-8"))
    size = sum(path.stat().st_size for path in place.glob("*") if path.is_file())
    return Row(
        name,
        str(place),
        size,
        (content.get("architectures") or [content.get("model_type")])[0],
        _computed_by(content),
        content.get("max_position_embeddings"),
        content.get("dtype") or content.get("torch_dtype"),
    )


def _computed_by(content: Mapping[str, Any]) -> str:
    """The path that computes a model with this config.json; "-" if it is not a causal model."""
    from tinkex.engine.families import FAMILIES

    if content.get("model_type") in FAMILIES:
        return FAST
    names = map(str, content.get("architectures") or ())
    is_causal = any(name.endswith(_CAUSAL) for name in names)
    return GENERIC if is_causal and not content.get("is_encoder_decoder") else "-"


def _in_hub_cache() -> list[Row]:
    """Models in the cache of huggingface_hub that have a configuration."""
    rows = []
    for repository in _hub_cache():
        for revision in sorted(repository.revisions, key=lambda r: -r.last_modified)[:1]:
            place = Path(revision.snapshot_path)
            if (place / "config.json").is_file():
                rows.append(_directory(repository.repo_id, place))
    return sorted(rows, key=lambda row: row.name)


def _hub_cache() -> list[Any]:
    try:
        import huggingface_hub
    except ImportError:
        return []
    try:
        cache = huggingface_hub.scan_cache_dir()
    except huggingface_hub.errors.CacheNotFound:
        return []
    return [repository for repository in cache.repos if repository.repo_type == "model"]


def _remove_from_hub_cache(name: str) -> bool:
    for repository in _hub_cache():
        if repository.repo_id == name:
            shutil.rmtree(repository.repo_path)
            return True
    return False


COMMANDS = (model,)
