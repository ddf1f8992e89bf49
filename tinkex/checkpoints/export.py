"""Exports a checkpoint for other programs: as a PEFT adapter, or merged into its base model.

Merging needs the engine (extra `local`), which is imported only then. Does not know how archives
are downloaded.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import attrs

from tinkex import errors, types
from tinkex.checkpoints import card, download
from tinkex.checkpoints.formats import FORMATS
from tinkex.runtime.connection import Connection
from tinkex.text import gguf, hub

#: The files of a PEFT adapter.
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

#: Our record of a fetched base model's source, and the model card.
ORIGIN, CARD = "origin.json", "README.md"

#: The built-in base model, which needs no directory.
TINY = "tiny"

#: The files of a base model on Hugging Face that merging needs.
_BASE_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]


def export(
    connection: Connection,
    path: types.ParsedCheckpointTinkerPath,
    output_dir: Path,
    base_model: str | None,
    *,
    merge: bool,
    force: bool,
    progress: download.Progress | None,
) -> Path:
    """See `RestClient.export_checkpoint`; a *base_model* of None uses the adapter's."""
    if merge:  # fail before the download if a package is missing
        merge_adapter = _merger()
        base = base_model and resolve(base_model)
    with download.new_folder(output_dir, force) as scratch:
        archive, result = scratch / "archive", scratch / download.RESULT
        download.fetch_folder(connection, path, archive, progress)
        adapter = _adapter_in(archive, path.tinker_path)
        named = _name_base(adapter / ADAPTER_CONFIG, base_model)
        if merge:
            _merge(merge_adapter, base or resolve(named), adapter, result, scratch)
        else:
            _keep_adapter(adapter, result)
    return output_dir


def export_adapter(
    adapter: Path,
    base_model: str,
    output_dir: Path,
    form: str,
    *,
    name: str,
    gguf_type: str = "F16",
    training: card.Training | None = None,
    force: bool = False,
) -> Path:
    """
    Write an adapter for other programs, with a model card (README.md).

    Args:
        adapter: a folder with a PEFT adapter, such as those of `tinkex train`.
        base_model: the adapter's base model: a known name, directory, GGUF file or hub id.
        form: a name in `formats.FORMATS`: "peft" (the adapter), "hf" (merged, a Hugging Face
            directory) or "gguf" (merged).
        name: of the model, in the card and of the GGUF file.
        gguf_type: of the matrices in a GGUF file: "F16", "Q8_0" or "F32".
        training: for the model card.
        force: replace an existing folder, once the new one is complete.

    Returns:
        *output_dir*.

    Raises:
        FileExistsError: If *output_dir* is not empty, without *force*.
        ValueError: If *form* is unknown, the base model cannot be found, or the adapter does not
            belong to it.
        MissingExtraError: If merging is needed and the engine is not installed.
    """
    if form not in FORMATS:
        raise ValueError(f"form must be one of {', '.join(FORMATS)}, got {form!r}.")
    merge_adapter = _merger()
    base = resolve(base_model)
    with download.new_folder(output_dir, force) as scratch:
        result = scratch / download.RESULT
        model = _Trained(name, gguf_type, adapter, base, scratch, merge_adapter)
        FORMATS[form].write(model, result)
        text = card.text(name, _hub_name(base_model), form, training)
        (result / CARD).write_text(text, encoding="utf-8")
    return output_dir


@attrs.frozen
class _Trained:
    """The source of an export, see `formats.Source`."""

    name: str
    gguf_type: str
    adapter: Path
    base: str
    scratch: Path
    merge_adapter: Any

    def write_adapter(self, folder: Path) -> None:
        copied = self.scratch / "adapter"
        shutil.copytree(self.adapter, copied)
        # PEFT loads the base model by this name, so PEFT must be able to find it.
        _name_base(copied / ADAPTER_CONFIG, self.base)
        _keep_adapter(copied, folder)

    def write_merged(self, folder: Path) -> None:
        _merge(self.merge_adapter, self.base, self.adapter, folder, self.scratch)


def _hub_name(base_model: str) -> str:
    from tinkex.text import registry

    known = registry.KNOWN.get(base_model)
    return known.hub_id if known else base_model


def _merge(merge_adapter: Any, base: str, adapter: Path, result: Path, scratch: Path) -> None:
    if gguf.is_gguf(base):
        from tinkex.engine.gguf import write_directory

        directory = scratch / "base"
        directory.mkdir()
        write_directory(Path(base).expanduser(), directory)
        base = str(directory)
    merge_adapter(base, adapter, result)
    (result / ORIGIN).unlink(missing_ok=True)  # it describes the base model only
    for file in result.iterdir():  # safetensors creates files with mode 0600
        shutil.copymode(result / "config.json", file)


def _merger() -> Any:
    try:
        from tinkex.engine.checkpoints import merge_adapter
    except ImportError as exc:
        raise errors.MissingExtraError(
            f"merging needs {exc.name}, which is not installed. "
            "Install it with: pip install 'tinkex[local]'"
        ) from exc
    return merge_adapter


def resolve(base_model: str) -> str:
    """The directory or GGUF file of *base_model* (or "tiny"); a known name or hub id is downloaded.

    Raises:
        ValueError: If the model exists neither on this machine nor on Hugging Face.
    """
    if base_model == TINY or (base_model and Path(base_model).expanduser().is_dir()):
        return base_model
    if gguf.is_gguf(base_model):
        return base_model
    from tinkex.engine import fetch
    from tinkex.text import registry

    if base_model in registry.KNOWN:
        return str(fetch.ensure(base_model))
    if not base_model or base_model.startswith(("/", ".", "~")) or base_model.count("/") > 1:
        raise ValueError(
            f"the base model {base_model!r} is not a directory on this machine; give its directory "
            "as base_model (--base-model)."
        )
    import huggingface_hub

    try:
        if not hub.is_cached(base_model, "config.json"):
            hub.check_file(base_model, "config.json")
        return str(huggingface_hub.snapshot_download(base_model, allow_patterns=_BASE_FILES))
    except (OSError, ValueError) as exc:  # from the hub, the network or the cache
        reason = " ".join(str(exc).split())[:200]
        raise ValueError(
            f"the base model {base_model!r} is not a directory on this machine and cannot be "
            f"downloaded from Hugging Face ({reason}); give its directory as base_model "
            "(--base-model)."
        ) from exc


def _adapter_in(folder: Path, tinker_path: str) -> Path:
    """The folder of the adapter in an unpacked archive; some servers add a folder around it."""
    found = sorted(folder.rglob(ADAPTER_CONFIG), key=lambda path: len(path.parts))
    if not found or not any((found[0].parent / name).is_file() for name in ADAPTER_WEIGHTS):
        names = ", ".join(sorted(p.name for p in folder.rglob("*") if p.is_file())) or "nothing"
        raise errors.DownloadError(
            f"{tinker_path} is not a PEFT adapter ({ADAPTER_CONFIG} and {ADAPTER_WEIGHTS[0]}); it "
            f"contains {names}. `tinkex checkpoint download` fetches these files."
        )
    return found[0].parent


def _name_base(config: Path, base_model: str | None) -> str:
    """Write the name of the base model into adapter_config.json, for PEFT.

    Returns:
        The name; "" if neither *base_model* nor the file has one.
    """
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
        named = base_model or str(content.get("base_model_name_or_path") or "")
        content["base_model_name_or_path"] = named
    except (ValueError, TypeError, AttributeError) as exc:
        raise errors.DownloadError(
            f"{config.name} is not the configuration of an adapter: {exc}"
        ) from exc
    config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return named


def _keep_adapter(adapter: Path, result: Path) -> None:
    """Move only the files of the adapter: no optimizer state, no files of the server."""
    result.mkdir()
    for name in (ADAPTER_CONFIG, *ADAPTER_WEIGHTS):
        if (adapter / name).is_file():
            (adapter / name).rename(result / name)
