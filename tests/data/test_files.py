"""Reading training data: formats recognized by their content, bad lines named by their number."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import zstandard

from tests.support.fake_service import ByteTokenizer
from tinkex import errors
from tinkex.data import datums, files, records
from tinkex.text import hub

CASES = Path(__file__).parent / "cases"


@pytest.fixture
def write(tmp_path):
    """A JSONL file of values (or of bytes, as they are)."""

    def write(*lines):
        path = tmp_path / "data.jsonl"
        encoded = [v if isinstance(v, bytes) else json.dumps(v).encode() for v in lines]
        path.write_bytes(b"\n".join(encoded))
        return path

    return write


# Formats

ROWS = [{"prompt": f"q{i}", "completion": "a\nb, c"} for i in range(3)]
EXPECTED = [records.Completion(f"q{i}", "a\nb, c") for i in range(3)]
LINES = "\n".join(json.dumps(row) for row in ROWS)
CSV = "prompt,completion\n" + "".join(f'q{i},"a\nb, c"\n' for i in range(3))


@pytest.mark.parametrize(
    "content",
    [
        LINES.encode(),
        ("\ufeff" + LINES).encode(),
        LINES.encode("utf-16"),
        ("\ufeff" + LINES).encode("utf-16-be"),
        json.dumps(ROWS, indent=2).encode(),
        json.dumps({"data": ROWS}, indent=2).encode(),
        CSV.encode(),
        CSV.replace(",", "\t").replace("b\t", "b,").encode(),
        ("\ufeff" + CSV).encode(),
        gzip.compress(LINES.encode()),
        zstandard.compress(LINES.encode()),
        zstandard.compress(CSV.encode()),
    ],
    ids="jsonl bom utf16 utf16be array object csv tsv csvbom gz zst csvzst".split(),
)
def test_a_format_is_told_by_its_content(tmp_path, content):
    """Names lie: people rename, compress, and export with whatever they have."""
    path = tmp_path / "data"
    path.write_bytes(content)

    assert EXPECTED == files.read(path).records


def test_parquet_is_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "data.jsonl")

    assert EXPECTED == files.read(tmp_path / "data.jsonl").records


def test_without_pyarrow_parquet_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)

    with pytest.raises(errors.MissingExtraError, match=r"is a Parquet file.*tinkex\[data\]"):
        files.read(CASES / "ok.parquet")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"PK\x03\x04....", "a zip archive or an Excel file"),
        (b"version https://git-lfs.github.com/spec/v1", "a git-lfs pointer"),
        (b"\x01\x02\0\x03", "a binary file of an unknown format"),
        (b"Once upon a time", "looks like plain text ('Once upon a time')"),
        (b"\x1f\x8b broken", "a gzip file that cannot be read"),
        (b"PAR1 broken", "a Parquet file that cannot be read"),
    ],
)
def test_what_is_not_understood_is_called_what_it_looks_like(tmp_path, content, what):
    (tmp_path / "data").write_bytes(content)

    with pytest.raises(ValueError) as caught:
        files.read(tmp_path / "data")
    assert what in str(caught.value)


def test_standard_input_is_read(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(LINES.encode())))

    assert EXPECTED == files.read("-").records


def test_several_files_and_folders_are_one_data_set(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.csv").write_text(CSV)
    (tmp_path / "b" / "c.jsonl").write_text(LINES)

    assert EXPECTED * 2 == files.read(tmp_path).records
    assert EXPECTED * 2 == files.read([tmp_path / "a.csv", tmp_path / "b"]).records


def test_of_several_files_a_bad_line_is_named_with_its_file(tmp_path):
    (tmp_path / "a.jsonl").write_text(LINES)
    (tmp_path / "b.jsonl").write_text(LINES + "\n{}")

    with pytest.raises(ValueError, match=r"b\.jsonl line 4: has no keys"):
        files.read(tmp_path)


def test_of_a_folder_documents_and_hidden_files_are_not_read(tmp_path):
    """What a download of a data set leaves beside the data."""
    (tmp_path / "data.jsonl").write_text(LINES)
    (tmp_path / "README.md").write_text("# Questions")
    (tmp_path / "LICENSE").write_text("MIT")
    for hidden in (".gitattributes", ".cache/huggingface/data.jsonl.metadata", "_SUCCESS"):
        (tmp_path / hidden).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / hidden).write_text("not data")

    assert EXPECTED == files.read(tmp_path).records


def test_a_folder_without_data_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("# Questions")

    with pytest.raises(ValueError, match="has no files with data"):
        files.read(tmp_path)


def test_a_data_set_that_was_saved_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(tmp_path / "several")
    datasets.DatasetDict({"test": one}).save_to_disk(tmp_path / "other")

    assert EXPECTED == files.read(tmp_path / "one").records
    assert EXPECTED == files.read(tmp_path / "several").records
    with pytest.raises(ValueError, match="has no split train, but test; give the folder of one"):
        files.read(tmp_path / "other")
    with pytest.raises(ValueError, match="is an Arrow stream; give its folder"):
        files.read(next((tmp_path / "one").glob("*.arrow")))


def test_a_data_set_of_the_hub_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)

    with pytest.raises(errors.MissingExtraError, match=r"tinkex\[data\]"):
        files.read("hf://org/name")


@pytest.mark.parametrize("name", ["hf://", "hf:///", "hf://:train"])
def test_a_name_of_the_hub_that_names_nothing_is_refused(name):
    pytest.importorskip("datasets")

    with pytest.raises(ValueError, match=f"{name} names no data set; write hf://org/name"):
        files.read(name)


def test_without_a_network_the_hub_is_asked_once(monkeypatch):
    """The package datasets would try for half a minute, then name its own exception only."""
    datasets = pytest.importorskip("datasets")
    asked = []

    def unreachable(repository):
        asked.append(repository)
        raise OSError("the hub cannot be reached: Name or service not known")

    monkeypatch.setattr(hub, "check_data_set", unreachable)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **_: asked.append(args))

    with pytest.raises(ValueError, match=r"hf://org/name cannot .* Name or .* machine online"):
        files.read("hf://org/name")
    assert ["org/name"] == asked


def test_a_data_set_of_the_hub_that_is_kept_needs_no_network(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "org___name").mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "check_data_set", None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: ROWS)

    assert EXPECTED == files.read("hf://org/name").records


def test_a_data_set_of_the_hub_is_read_through_datasets(monkeypatch):
    """The name's parts: repository, configuration, split."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(hub, "check_data_set", lambda repository: None)
    asked = []

    def load_dataset(path, name, split):
        asked.append((path, name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    assert EXPECTED == files.read("hf://org/name/config:test").records
    assert [("org/name", "config", "test")] == asked


def test_rows_in_memory_are_read():
    pandas = pytest.importorskip("pandas")
    datasets = pytest.importorskip("datasets")

    assert EXPECTED == files.from_rows(ROWS).records
    assert EXPECTED == files.from_rows(pandas.DataFrame(ROWS)).records
    assert EXPECTED == files.from_rows(datasets.Dataset.from_list(ROWS)).records


def test_columns_that_only_other_rows_use_are_absent():
    """A table has every column in every row."""
    pandas = pytest.importorskip("pandas")
    rows = [{"text": "a"}, {"prompt": "b", "completion": "c"}]

    found = files.from_rows(pandas.DataFrame(rows)).records

    assert [records.Text("a"), records.Completion("b", "c")] == found


# Lines


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "not JSON: Expecting ',' delimiter"),
        (b'{"text": "\xff"}', "not UTF-8 (byte 10 of the line)"),
        (b'{"a":' * 100_000, "not JSON"),
        ([1], "a JSON list, not an object"),
    ],
)
def test_a_bad_line_is_named_by_its_number_and_reason(write, line, reason):
    path = write({"text": "good"}, b"", line)

    with pytest.raises(ValueError, match="1 bad line:\n  line 3: ") as caught:
        files.read(path)
    assert reason in str(caught.value)


def test_bad_lines_are_reported_together(write):
    """Fixing them one run at a time would be a punishment; but a screen has an end."""
    path = write(*[{"text": ""}] * 25)

    with pytest.raises(ValueError, match="25 bad lines") as caught:
        files.read(path)
    assert 20 == str(caught.value).count("text is empty")
    assert "... and 5 more" in str(caught.value)


def test_bad_lines_can_be_left_out_and_are_counted(write):
    data = files.read(write({"text": ""}, {"text": "good"}), skip_bad_lines=True)

    assert [records.Text("good")] == data.records
    assert [files.BadLine("line 1", "text is empty: nothing to learn")] == data.bad


@pytest.mark.parametrize("lines", [[], [b"\n\n"], [{"text": ""}]])
def test_a_file_without_a_good_line_is_refused(write, lines):
    with pytest.raises(ValueError, match="holds no training example"):
        files.read(write(*lines), skip_bad_lines=True)


def test_a_line_ends_at_a_newline_only(write):
    """JSON strings may hold other line separators unescaped."""
    data = files.read(write('{"text": "a\u2028b"}'.encode()))

    assert [records.Text("a\u2028b")] == data.records


def test_a_table_with_a_short_row_names_it(tmp_path):
    (tmp_path / "data.csv").write_text("prompt,completion\na,b\nc\n")

    with pytest.raises(ValueError, match="line 3: does not have 2 columns"):
        files.read(tmp_path / "data.csv")


# Inputs of public reports

TRAINED = """alpaca.json csv.csv first_assistant.jsonl messages_array.json multi_turn.jsonl
    ok.jsonl.gz ok.parquet openai_parts.jsonl pc.jsonl sharegpt.jsonl sys_train.jsonl
    system_first.jsonl trl_conv_prompt_completion.jsonl two_users.jsonl utf16.jsonl""".split()


@pytest.mark.parametrize("name", TRAINED)
def test_a_common_format_is_trained_on(name):
    """Each was refused by some trainer, or read as something else."""
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    data = files.read(CASES / name)

    rendered = datums.render(data.records, ByteTokenizer(), datums.Options(1000))

    assert [] == data.bad
    assert len(data.records) == len(rendered.examples)


@pytest.mark.parametrize("name", ["trl_dpo_conv.jsonl", "openai_dpo.jsonl"])
def test_preference_pairs_are_read_but_not_trained_on(name):
    data = files.read(CASES / name)

    rendered = datums.render(data.records, ByteTokenizer(), datums.Options(1000))

    assert {records.Preference} == {type(record) for record in data.records}
    assert len(data.records) == len(rendered.bad)
    assert "--method dpo" in rendered.bad[0].reason


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("question_answer.jsonl", "--map prompt=question,completion=answer"),
        ("nested_conversation.jsonl", "--map messages=conversation"),
        ("kto.jsonl", "--format prompt-completion"),
        ("input_output_axolotl.jsonl", '"prompt" and "completion"'),
    ],
)
def test_other_columns_are_refused_with_what_would_help(name, hint):
    with pytest.raises(ValueError) as caught:
        files.read(CASES / name)
    assert hint in str(caught.value)


def test_the_hint_helps(tmp_path):
    shutil.copy(CASES / "nested_conversation.jsonl", tmp_path / "data")

    assert files.read(tmp_path / "data", renames={"messages": "conversation"}).records
