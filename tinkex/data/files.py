"""Reads training data: files, folders, standard input, data sets of the hub, objects in memory.

A file's format is detected from its content, not its name. records.py parses the rows.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Union

import attrs

from tinkex import errors
from tinkex.data import records
from tinkex.text import hub

#: Bad lines listed in a message; the rest are only counted.
MAX_BAD_LINES_SHOWN = 20
#: Standard input, as the name of a file.
STDIN = "-"
#: Documents that a folder may hold beside the data.
NOT_DATA = ("README", "LICENSE", "NOTICE", "CHANGELOG")
#: A folder with one of these files was written by `save_to_disk` of datasets: one or several
#: splits.
SAVED = ("state.json", "dataset_dict.json")
#: Prefix of a data set on the hub: hf://org/name or hf://org/name/config, with an optional :split.
HUB = "hf://"

Source = Union[str, Path]
#: Rows with their positions ("line 3"), or the reason why a row cannot be read.
_Rows = Iterator[tuple[str, Union[dict[str, Any], ValueError]]]


@attrs.frozen
class BadLine:
    """An invalid row: its position ("line 3"), and the reason."""

    where: str
    reason: str


@attrs.frozen
class DataFile:
    """The content of one or several files.

    Attributes:
        name: name of the file; several are separated by ", ".
        sources: absolute paths, or other names, from which the same data can be read again.
        records: the valid rows, in order.
        bad: the invalid rows, without blank lines.
        sha256: of the content.
    """

    name: str
    sources: tuple[str, ...]
    records: list[records.Record] = attrs.field(repr=False)
    bad: list[BadLine]
    sha256: str


def read(
    source: Source | Sequence[Source],
    skip_bad_lines: bool = False,
    *,
    shape: str | None = None,
    renames: Mapping[str, str] | None = None,
) -> DataFile:
    """
    Read and check training data.

    Supports JSON Lines, a JSON array, CSV, TSV and Parquet; also compressed (gzip, zstd); in UTF-8
    or UTF-16.

    Args:
        source: a path, a folder, "-" (standard input), "hf://org/name", or a list of these.
        skip_bad_lines: omit bad lines instead of raising.
        shape: shape of the rows, a name in `records.SHAPES`. None detects it from each row's keys.
        renames: expected key -> key in the data: {"prompt": "question"}.

    Raises:
        ValueError: If lines are bad, listing the first 20 with their reasons; if there are no valid
            lines; or if the format is unknown.
        MissingExtraError: If the format needs a package that is not installed.
        OSError: If a file cannot be read.
    """
    sources = [source] if isinstance(source, (str, Path)) else list(source)
    named = [(name, part) for one in sources for name, part in _open(one)]
    found = _Collected(shape, renames)
    for name, (rows, digest) in named:
        found.add(rows, digest, f"{Path(name).name} " if len(named) > 1 else "")
    absolute = tuple(_absolute(one) for one in sources)
    return found.result(", ".join(map(str, sources)), absolute, skip_bad_lines)


def from_rows(
    rows: Any,
    skip_bad_lines: bool = False,
    *,
    shape: str | None = None,
    renames: Mapping[str, str] | None = None,
) -> DataFile:
    """As `read`, for rows in memory: a list of dicts, a DataFrame, or a `datasets.Dataset`."""
    found = _Collected(shape, renames)
    plain = plain_rows(rows)
    digest = hashlib.sha256(json.dumps(plain, default=repr).encode()).hexdigest()
    found.add(_numbered(plain, "row"), digest, "")
    return found.result("the data", (), skip_bad_lines)


def plain_rows(rows: Any) -> list[Any]:
    """
    Rows in memory as JSON values.

    Raises:
        TypeError: If they are not a list of dicts, a DataFrame, or a `datasets.Dataset`.
    """
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):  # a DataFrame
        rows = rows.to_dict("records")
    if isinstance(rows, (str, bytes, Mapping)) or not isinstance(rows, Iterable):
        raise TypeError(f"rows must be a list of dicts, got {type(rows).__name__}.")
    return [_plain(row) for row in rows]


def describe(name: str, bad: Sequence[BadLine]) -> str:
    """The first bad lines of a file, one per line."""
    lines = [f"{name} has {len(bad)} bad line{'s' if len(bad) > 1 else ''}:"]
    lines += [f"  {line.where}: {line.reason}" for line in bad[:MAX_BAD_LINES_SHOWN]]
    if len(bad) > MAX_BAD_LINES_SHOWN:
        lines.append(f"  ... and {len(bad) - MAX_BAD_LINES_SHOWN} more")
    return "\n".join(lines)


def refuse(name: str, bad: Sequence[BadLine]) -> ValueError:
    """The error that lists the bad lines and explains how to skip them."""
    return ValueError(describe(name, bad) + "\nFix them, or omit them: --skip-bad-lines.")


class _Collected:
    """Collects the records and bad lines of several files."""

    def __init__(self, shape: str | None, renames: Mapping[str, str] | None) -> None:
        if shape is not None and shape not in records.SHAPES:
            raise ValueError(f"format must be one of {', '.join(records.SHAPES)}, got {shape!r}.")
        self._shape, self._renames = shape, renames
        self._records: list[records.Record] = []
        self._bad: list[BadLine] = []
        self._digests: list[str] = []

    def add(self, rows: _Rows, digest: str, prefix: str) -> None:
        self._digests.append(digest)
        for where, row in rows:
            where = prefix + where
            try:
                if isinstance(row, ValueError):
                    raise row
                self._records.append(records.parse(row, self._shape, self._renames, where))
            except ValueError as exc:
                self._bad.append(BadLine(where, str(exc)))

    def result(self, name: str, sources: tuple[str, ...], skip_bad_lines: bool) -> DataFile:
        if self._bad and not skip_bad_lines:
            raise refuse(name, self._bad)
        if not self._records:
            why = describe(name, self._bad) if self._bad else "It is empty."
            raise ValueError(f"{name} holds no training example. {why}")
        digest = self._digests[0]
        if len(self._digests) > 1:
            digest = hashlib.sha256("".join(self._digests).encode()).hexdigest()
        return DataFile(name, sources, self._records, self._bad, digest)


# Sources


def _absolute(source: Source) -> str:
    name = str(source)
    return name if name == STDIN or name.startswith(HUB) else str(Path(name).absolute())


def _open(source: Source) -> Iterator[tuple[str, tuple[_Rows, str]]]:
    """The name, the rows and the hash of each file that *source* stands for."""
    name = str(source)
    if name.startswith(HUB):
        yield name, _from_hub(name)
    elif name == STDIN:
        yield "standard input", _from_bytes("standard input", sys.stdin.buffer.read())
    elif Path(name).is_dir() and any(Path(name, one).is_file() for one in SAVED):
        yield name, _from_saved(name)
    elif Path(name).is_dir():
        files = [path for path in sorted(Path(name).rglob("*")) if _is_data(Path(name), path)]
        if not files:
            raise ValueError(f"the folder {name} has no files with data.")
        for path in files:
            yield str(path), _from_bytes(str(path), path.read_bytes())
    else:
        yield name, _from_bytes(name, Path(name).read_bytes())


def _is_data(folder: Path, path: Path) -> bool:
    """False for hidden files, files in hidden folders, and documents about the data."""
    is_hidden = any(part[0] in "._" for part in path.relative_to(folder).parts)
    return path.is_file() and not is_hidden and path.stem.upper() not in NOT_DATA


def _datasets(name: str) -> Any:
    """Import the package datasets, which *name* needs."""
    try:
        import datasets  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError as exc:
        raise errors.MissingExtraError(
            f"{name} needs the package datasets, which is missing: pip install 'tinkex[data]'."
        ) from exc
    return datasets


def _from_hub(name: str) -> tuple[_Rows, str]:
    datasets = _datasets(name)
    path, _, split = name.removeprefix(HUB).removeprefix("datasets/").partition(":")
    parts = [part for part in path.split("/") if part]
    if not parts:
        raise ValueError(f"{name} names no data set; write {HUB}org/name or {HUB}org/name:split.")
    repository, config = "/".join(parts[:2]), "/".join(parts[2:]) or None
    kept = Path(datasets.config.HF_DATASETS_CACHE, repository.replace("/", "___"))
    try:
        if not kept.is_dir():
            hub.check_data_set(repository)
    except (OSError, ValueError) as exc:
        raise ValueError(
            f"{name} cannot be loaded from the hub: {exc}. Is this machine online, the name right, "
            "and (for a gated data set) HF_TOKEN set? Without a network, give a file or a folder."
        ) from exc
    try:
        found = datasets.load_dataset(repository, config, split=split or "train")
    except Exception as exc:  # the library's loaders raise anything
        raise ValueError(f"{name} cannot be loaded from the hub: {exc}") from exc
    return _from_dataset(found)


def _from_saved(name: str) -> tuple[_Rows, str]:
    """A folder written by `save_to_disk` of datasets; of several splits, the one named train."""
    datasets = _datasets(name)
    try:
        found = datasets.load_from_disk(name)
    except Exception as exc:
        raise ValueError(f"{name} is a saved data set that cannot be read: {exc}") from exc
    if isinstance(found, Mapping):
        if "train" not in found:
            splits = ", ".join(found)
            raise ValueError(f"{name} has no split train, but {splits}; give the folder of one.")
        found = found["train"]
    return _from_dataset(found)


def _from_dataset(found: Iterable[Any]) -> tuple[_Rows, str]:
    rows = [_plain(row) for row in found]
    digest = hashlib.sha256(json.dumps(rows, default=repr).encode()).hexdigest()
    return _numbered(rows, "row"), digest


def _from_bytes(name: str, content: bytes) -> tuple[_Rows, str]:
    return _rows(name, content), hashlib.sha256(content).hexdigest()


# Formats


def _rows(name: str, content: bytes) -> _Rows:
    for magic, read_format in _BINARY.items():
        if content.startswith(magic):
            return read_format(name, content)
    for mark, encoding in _ENCODINGS.items():
        if content.startswith(mark):
            # Converted to UTF-8, so that bad lines are reported as in other files.
            return _text_rows(name, content.decode(encoding, errors="replace").encode())
    if b"\0" in content[:1000]:
        raise ValueError(
            f"{name} is a binary file of an unknown format; give JSON lines, a JSON array, CSV, "
            "TSV or Parquet."
        )
    return _text_rows(name, content)


def _text_rows(name: str, content: bytes) -> _Rows:
    start = content.lstrip()[:1]
    if start == b"[":
        found = _as_json(content)
        if isinstance(found, list) and (not found or isinstance(found[0], dict)):
            return _numbered(found, "item")
    if start == b"{":
        if _as_json(content.lstrip().split(b"\n", 1)[0]) is None:
            found = _as_json(content)  # one object over several lines
            if isinstance(found, dict):
                return _numbered(_rows_of_object(found), "item")
        return _json_lines(content)
    header = content.lstrip().split(b"\n", 1)[0].decode(errors="replace")
    if (start and start not in b'["') or (start == b'"' and _as_json(header.encode()) is None):
        if any(mark in header for mark in "\t,;") or header.strip() in _COLUMNS:
            return _table(content)
        raise ValueError(
            f"{name} looks like plain text ({header.strip()[:40]!r}), not like JSON lines, a JSON "
            'array, CSV or TSV; write each example as {"text": ...} on a line.'
        )
    return _json_lines(content)


_COLUMNS = {key for shape in records.SHAPES.values() for key in shape.keys}


def _as_json(content: bytes) -> Any:
    """The value, or None if it is not JSON."""
    try:
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError):
        return None


def _rows_of_object(value: dict[str, Any]) -> list[Any]:
    """The rows of a single object: itself, or the list under its only key."""
    lists = [v for v in value.values() if isinstance(v, list)]
    is_row = bool(set(value) & _COLUMNS)
    return lists[0] if len(lists) == 1 and not is_row else [value]


def _numbered(rows: Iterable[Any], word: str) -> _Rows:
    return ((f"{word} {number}", row) for number, row in enumerate(rows, start=1))


def _json_lines(content: bytes) -> _Rows:
    # By newline only: str.splitlines would also split at U+2028, which JSON strings may contain.
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            yield f"line {number}", _json_line(line)


def _json_line(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as exc:
        return ValueError(f"not UTF-8 (byte {exc.start} of the line)")
    except json.JSONDecodeError as exc:
        return ValueError(f"not JSON: {exc.msg} (column {exc.colno})")
    except RecursionError:
        return ValueError("not JSON that makes sense: nested too deeply")


def _table(content: bytes) -> _Rows:
    text = content.decode("utf-8", errors="replace")
    header = text.lstrip().split("\n", 1)[0]
    delimiter = max("\t,;", key=header.count)
    # A field may hold a whole book.
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    width = len(reader.fieldnames or ())
    for row in reader:
        where = f"line {reader.line_num}"
        if None in row or None in row.values():
            yield where, ValueError(f"does not have {width} columns, as the first line has")
        else:
            yield where, dict(row)


def _parquet(name: str, content: bytes) -> _Rows:
    try:
        from pyarrow import parquet  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError as exc:
        raise errors.MissingExtraError(
            f"{name} is a Parquet file; reading it needs pyarrow, which is not installed: "
            "pip install 'tinkex[data]'."
        ) from exc
    try:
        rows = parquet.read_table(io.BytesIO(content)).to_pylist()
    except Exception as exc:  # pyarrow has many classes of errors
        raise ValueError(f"{name} is a Parquet file that cannot be read: {exc}") from exc
    return _numbered([_plain(row) for row in rows], "row")


def _gzip(name: str, content: bytes) -> _Rows:
    try:
        return _rows(name, gzip.decompress(content))
    except (OSError, EOFError) as exc:
        raise ValueError(f"{name} is a gzip file that cannot be read: {exc}") from exc


def _zstd(name: str, content: bytes) -> _Rows:
    try:
        import zstandard
    except ImportError as exc:
        raise errors.MissingExtraError(
            f"{name} is a zstd file; reading it needs zstandard, which is not installed: "
            "pip install 'tinkex[data]'."
        ) from exc
    try:
        with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(content)) as stream:
            return _rows(name, stream.read())
    except zstandard.ZstdError as exc:
        raise ValueError(f"{name} is a zstd file that cannot be read: {exc}") from exc


def _not_read(what: str) -> Callable[[str, bytes], _Rows]:
    def refuse_format(name: str, content: bytes) -> _Rows:
        raise ValueError(f"{name} is {what}")

    return refuse_format


#: The first bytes of binary formats, and their readers.
_BINARY: dict[bytes, Callable[[str, bytes], _Rows]] = {
    b"PAR1": _parquet,
    b"\x1f\x8b": _gzip,
    b"\x28\xb5\x2f\xfd": _zstd,
    b"PK\x03\x04": _not_read("a zip archive or an Excel file; unpack it, or save it as CSV."),
    b"ARROW1": _not_read("an Arrow file; save it as Parquet."),
    b"\xff\xff\xff\xff": _not_read("an Arrow stream; give its folder, or save it as Parquet."),
    b"%PDF": _not_read("a PDF; extract its text first."),
    b"SQLite format 3": _not_read("an SQLite database; export a table as CSV."),
    b"version https://git-lfs": _not_read("a git-lfs pointer; run `git lfs pull` there."),
}
_ENCODINGS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


def _plain(value: Any) -> Any:
    """A table row as JSON values: NaN and absent keys of structures become null."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)) or type(value).__module__ == "numpy":
        plain = value.tolist() if hasattr(value, "tolist") else value
        return [_plain(v) for v in plain] if isinstance(plain, (list, tuple)) else plain
    return None if isinstance(value, float) and value != value else value
