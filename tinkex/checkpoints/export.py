"""A checkpoint as others want it: a PEFT adapter folder, or merged into its base model.

The merging itself is the local server's (extra `local`), and imported when it is asked for. Knows
nothing of how an archive comes: that is download.py's.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tinkex import errors, types
from tinkex.checkpoints import download
from tinkex.runtime.session import Connection

#: The files of an adapter folder, as PEFT has them.
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

#: The built-in base model, which needs no directory.
TINY = "tiny"

#: What merging needs of a base model on a hub.
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
    """See `RestClient.export_checkpoint`; *base_model* None is the one that the adapter names."""
    if merge:  # what is missing is said before anything is fetched
        merge_adapter = _merger()
        base = base_model and resolve(base_model)
    with download.new_folder(output_dir, force) as scratch:
        archive, result = scratch / "archive", scratch / download.RESULT
        download.fetch_folder(connection, path, archive, progress)
        adapter = _adapter_in(archive, path.tinker_path)
        named = _name_base(adapter / ADAPTER_CONFIG, base_model)
        if merge:
            merge_adapter(base or resolve(named), adapter, result)
            for file in result.iterdir():  # safetensors makes its files the user's alone
                shutil.copymode(result / "config.json", file)
        else:
            _keep_adapter(adapter, result)
    return output_dir


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
    """*base_model* as a directory of this machine (or "tiny"); a hub id is fetched.

    Raises:
        ValueError: If there is no such model here, nor on the hub.
    """
    if base_model == TINY or (base_model and Path(base_model).expanduser().is_dir()):
        return base_model
    if not base_model or base_model.startswith(("/", ".", "~")) or base_model.count("/") > 1:
        raise ValueError(
            f"the base model {base_model!r} is no directory of this machine; say where it is: "
            "base_model (--base-model)."
        )
    import huggingface_hub

    try:
        return str(huggingface_hub.snapshot_download(base_model, allow_patterns=_BASE_FILES))
    except (OSError, ValueError) as exc:  # of the hub, of the network, of the cache
        reason = " ".join(str(exc).split())[:200]
        raise ValueError(
            f"the base model {base_model!r} is no directory of this machine and cannot be had from "
            f"the hub ({reason}); say where it is: base_model (--base-model)."
        ) from exc


def _adapter_in(folder: Path, tinker_path: str) -> Path:
    """Where in an unpacked archive the adapter is; some servers pack a folder around it."""
    found = sorted(folder.rglob(ADAPTER_CONFIG), key=lambda path: len(path.parts))
    if not found or not any((found[0].parent / name).is_file() for name in ADAPTER_WEIGHTS):
        names = ", ".join(sorted(p.name for p in folder.rglob("*") if p.is_file())) or "nothing"
        raise errors.DownloadError(
            f"{tinker_path} holds no PEFT adapter ({ADAPTER_CONFIG} and {ADAPTER_WEIGHTS[0]}), but "
            f"{names}. `tinkex checkpoint download` fetches it as it is."
        )
    return found[0].parent


def _name_base(config: Path, base_model: str | None) -> str:
    """Say in adapter_config.json of which model the adapter is: PEFT loads that by this name.

    Returns:
        What it says in the end; "" if neither it nor *base_model* says anything.
    """
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
        named = base_model or str(content.get("base_model_name_or_path") or "")
        content["base_model_name_or_path"] = named
    except (ValueError, TypeError, AttributeError) as exc:
        raise errors.DownloadError(f"{config.name} is no adapter's configuration: {exc}") from exc
    config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return named


def _keep_adapter(adapter: Path, result: Path) -> None:
    """The adapter and nothing else: no optimizer's state, no notes of the server's own."""
    result.mkdir()
    for name in (ADAPTER_CONFIG, *ADAPTER_WEIGHTS):
        if (adapter / name).is_file():
            (adapter / name).rename(result / name)
