"""The folder of a run: its state, metrics and lock.

config.yaml         settings and data, for `tinkex train --config` (see recipes/config_file.py)
metrics.jsonl       one object a step, from step 0, the evaluation before training
samples.jsonl       samples taken during training: step, prompt and text state.json          the
settings, and the last checkpoint (replaced as a whole) lock                exists while a process
works on the run: its host and process id rendered-*.npz      the data as tokens, so that resuming
does not render it again adapter/            at the end: adapter_config.json and
adapter_model.safetensors, in PEFT's format
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import attrs

from tinkex.data import files
from tinkex.recipes.settings import FREE, GROWING, Settings, of_values

#: Bytes that must be free in the folder when a run starts.
MIN_FREE = 64 << 20


@attrs.frozen
class State:
    """The state of a run: the content of state.json.

    Attributes:
        data: the training data for `files.read`: one source a line.
        data_sha256: of its content.
        eval_data, eval_sha256: the same for separate held-out data; None if there is none.
        checkpoint: path on the server of the last checkpoint; None before the first.
        step: after which it was saved.
        before: the untrained model's completions of the shown prompts; None until they are sampled.
        sampler_path: path on the server of the final weights; None until the run is finished.
        checkpoints: step and path of the checkpoints kept on the server, oldest first.
        best: step, path and eval_loss of the checkpoint with the lowest held-out loss.
        prompts, after: the shown prompts, and the trained model's completions.
        counts: of the data: examples, held_out, tokens, and what was omitted.
    """

    settings: Settings
    data: str
    data_sha256: str
    total_steps: int = 0
    step: int = 0
    checkpoint: str | None = None
    before: list[str] | None = None
    sampler_path: str | None = None
    eval_data: str | None = None
    eval_sha256: str | None = None
    checkpoints: list[list[Any]] = attrs.field(factory=list)
    best: dict[str, Any] | None = None
    prompts: list[str] = attrs.field(factory=list)
    after: list[str] = attrs.field(factory=list)
    counts: dict[str, int] = attrs.field(factory=dict)

    @property
    def has_begun(self) -> bool:
        """True if the server has created a model, which can be resumed."""
        return self.total_steps > 0

    def goes_further(self, settings: Settings) -> bool:
        """True if *settings* have more epochs or steps than the run so far."""
        return any(getattr(settings, n) != getattr(self.settings, n) for n in GROWING)

    @property
    def is_finished(self) -> bool:
        return self.sampler_path is not None

    @property
    def progress(self) -> str:
        """The progress of the run, for a message: finished, or the step of its last checkpoint."""
        if self.is_finished:
            return "finished"
        return f"saved after step {self.step} of {self.total_steps or '?'}"


LOCK = "lock"
#: Files that are written before a run begins.
REPLACED = ("config.yaml", "state.json", "data.jsonl", "eval-data.jsonl")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """
    Lock *folder* for a run. It is created if it does not exist.

    The lock is released when the process ends, however it ends, so there are no stale locks. If the
    run is refused (ValueError, TypeError) before it has begun, the folder is restored.

    Raises:
        ValueError: If another process is using the folder, naming the process.
        OSError: If the folder cannot be made or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = _open_locked(folder / LOCK)
    before = None if _has_begun(folder) else _files(folder)
    try:
        yield
    except (ValueError, TypeError):
        if before is not None and not _has_begun(folder):
            _restore(folder, before)
        raise
    finally:
        with contextlib.suppress(OSError):
            os.unlink(folder / LOCK)
            folder.rmdir()  # if nothing else was written to it
        file.close()


def _files(folder: Path) -> dict[Path, bytes | None]:
    """The files in *folder*, with the content of those that a refused run may have replaced."""
    return {
        path: path.read_bytes() if path.name in REPLACED and path.is_file() else None
        for path in folder.iterdir()
    }


def _has_begun(folder: Path) -> bool:
    try:
        state = load_state(folder)
    except ValueError:
        return True  # not ours to touch
    return state is not None and state.has_begun


def _restore(folder: Path, before: dict[Path, bytes | None]) -> None:
    for path in set(folder.iterdir()) - before.keys():
        if path.is_file():
            path.unlink()
    for path, content in before.items():
        if content is not None:
            path.write_bytes(content)


def _open_locked(path: Path) -> TextIO:
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise ValueError(
                f"{path.parent} is in use by {holder}; wait until that has ended, or use another "
                "--output."
            ) from None
        with contextlib.suppress(FileNotFoundError):
            # The previous holder removes the file, so check that the path is still this file.
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
        file.close()
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file


def check_space(folder: Path) -> None:
    """Fail before training, not at its end, if the disk of *folder* is nearly full.

    Raises:
        OSError: If less than `MIN_FREE` bytes are free there.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < MIN_FREE:
        raise OSError(
            f"only {free >> 20} MB are free in {folder}, and a run needs at least "
            f"{MIN_FREE >> 20} MB for its metrics and adapter; free some space, or use another "
            "--output."
        )


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Add *path* to an OSError without one: write() on a full disk does not name the file."""
    try:
        yield
    except OSError as exc:
        if exc.filename is None and exc.errno is not None:
            raise OSError(exc.errno, exc.strerror, str(path)) from exc
        raise


def load_state(folder: Path) -> State | None:
    """
    The state of the run in *folder*, or None if there is none.

    Raises:
        ValueError: If state.json is not what this version writes.
    """
    path = folder / "state.json"
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return State(**{**value, "settings": of_values(value["settings"])})
    except (ValueError, TypeError, KeyError) as exc:
        raise ValueError(
            f"{path} is not a run's state that this version of tinkex can read ({exc}); "
            "use a different --output, or remove it to start again."
        ) from exc


def save_state(folder: Path, state: State) -> None:
    """Replace state.json as a whole."""
    replace_json(folder / "state.json", attrs.asdict(state))


def replace_json(path: Path, value: Any) -> None:
    """Write *value* into the file as a whole: a crash leaves the old content or the new one."""
    new = path.with_name(f"{path.name}.new")
    with _naming(new), new.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


#: Options of the command line that are not called like their setting.
_FLAGS = {"data_format": "--format", "data_map": "--map", "start_from": "--from"}


def check_same(
    state: State,
    settings: Settings,
    data: files.DataFile,
    eval_data: files.DataFile | None = None,
) -> None:
    """Raise ValueError, naming the flag, if resuming from *state* would not be the same run."""
    for field in attrs.fields(type(state.settings)):
        was, now = getattr(state.settings, field.name), getattr(settings, field.name)
        if field.name == "date" and now is None:
            continue  # the date of the start is kept
        if field.name in GROWING and was is not None and (now is None or now > was):
            continue
        if was != now and field.name not in FREE:
            more = "give a larger one, " if field.name in GROWING else ""
            flag = f"--{field.name.replace('_', '-')}"
            raise ValueError(
                f"{_FLAGS.get(field.name, flag)} is {now}, but the run to resume has {was}; "
                f"omit it, {more}or start a new run with a different --output."
            )
    for file, path, digest in (
        (data, state.data, state.data_sha256),
        (eval_data, state.eval_data, state.eval_sha256),
    ):
        if (file.sha256 if file else None) != digest:
            raise ValueError(
                f"{file.name if file else 'nothing'} is not the data that the run to resume was "
                f"started with ({path}); give the same data, or start a new run with a different "
                "--output."
            )


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in *path*, or None if the file is not there.

    Raises:
        ValueError: If it holds no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as exc:
        raise ValueError(f"{path} cannot be read: {exc}") from exc
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object.")
    return value


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file up to the first broken line."""
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break  # the run was killed in the middle of this line
    return rows


class RowFile:
    """A JSON Lines file: rows are appended in the order of their steps and flushed at once.

    Args:
        upto: rows of later steps are removed; `rows` has the remaining ones.
    """

    def __init__(self, folder: Path, upto: int, name: str = "metrics.jsonl") -> None:
        self._path = folder / name
        self.rows = [row for row in read_rows(self._path) if row["step"] <= upto]
        self._file = self._rewritten()

    def append(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with _naming(self._path):
            print(json.dumps(row), file=self._file, flush=True)

    def pop(self) -> dict[str, Any]:
        """Remove and return the last row, to append it again with more values."""
        row = self.rows.pop()
        self._file.close()
        self._file = self._rewritten()
        return row

    def close(self) -> None:
        self._file.close()

    def _rewritten(self) -> TextIO:
        """Replace the file by one that holds `rows`, and open it for appending."""
        new = self._path.with_name(f"{self._path.name}.new")
        with _naming(new):
            text = "".join(json.dumps(row) + "\n" for row in self.rows)
            new.write_text(text, encoding="utf-8")
        os.replace(new, self._path)
        return self._path.open("a", encoding="utf-8")
