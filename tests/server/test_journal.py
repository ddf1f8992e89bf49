"""The journal: what is written is read back, what is not needed is dropped, errors are reported."""

from __future__ import annotations

import sqlite3
import time

import attrs
import pytest

from tinkex.server.home import HomeError
from tinkex.server.journal import Journal, OperationRow
from tinkex.server.results import Answer

ROW = OperationRow(
    request_id="m:1",
    name="ForwardBackward",
    owner="local",
    session_id="s",
    target="m",
    seq=1,
    in_line=True,
    changes_model=True,
    content_type="application/json",
    body=b"{}",
    extra='{"seed": 5}',
    fingerprint=b"f" * 16,
)


def row(seq, **changes):
    return attrs.evolve(ROW, request_id=f"m:{seq}", seq=seq, **changes)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal.sqlite"


def reopened(journal, path):
    journal.close()
    return Journal(path)


def test_what_was_accepted_is_read_back_in_its_order(path):
    journal = Journal(path)
    rows = [row(0, name="CreateModel"), row(2), row(1), row(3, name="Forward", in_line=True)]
    journal.accept(rows[0], new_model="{}").result(5)
    for later in rows[1:]:
        journal.accept(later).result(5)
    journal = reopened(journal, path)

    assert rows == journal.operations()
    assert ["m"] == [model.model_id for model in journal.models()]
    journal.close()


def test_an_answer_is_kept_and_a_body_goes_where_nothing_must_run_again(path):
    journal = Journal(path)
    kept, gone = row(1), row(2, name="Forward", changes_model=False)
    for each in (kept, gone):
        journal.accept(each)
        journal.finish(each.request_id, Answer("json", b"[]"))
    journal = reopened(journal, path)
    [first, second] = journal.operations()
    journal.close()

    assert (b"{}", None) == (first.body, second.body)
    assert Answer("json", b"[]") == first.answer == second.answer


def test_what_is_forgotten_keeps_its_place_until_a_snapshot_holds_it(path, tmp_path):
    """The server would wait for a gap in a model's numbers."""
    journal = Journal(path)
    journal.accept(row(0), new_model="{}")
    for seq in (1, 2, 3):
        journal.accept(row(seq, changes_model=seq != 2))
        journal.finish(f"m:{seq}", Answer("json", b"[]"))
    journal.forget(["m:1", "m:2"])
    journal = reopened(journal, path)
    before = {each.seq: (each.forgotten, each.body) for each in journal.operations()}
    journal.snapshot("m", "{}", tmp_path / "snap", 2, None, None)
    journal = reopened(journal, path)
    after = {each.seq: (each.forgotten, each.body) for each in journal.operations()}
    [model] = journal.models()
    journal.close()

    assert {0: (False, b"{}"), 1: (True, b"{}"), 2: (True, None), 3: (False, b"{}")} == before
    assert {0: (False, None), 3: (False, b"{}")} == after
    assert (str(tmp_path / "snap"), 2) == (model.snapshot, model.snapshot_seq)


def test_a_snapshot_replaces_the_one_before(path, tmp_path):
    journal = Journal(path)
    journal.accept(row(0), new_model="{}")
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    new.mkdir()
    journal.snapshot("m", "{}", old, 1, None, None)
    journal.snapshot("m", "{}", new, 2, "failed", old)
    journal = reopened(journal, path)
    [model] = journal.models()
    journal.remove_model("m", new)
    journal = reopened(journal, path)

    assert ("failed", str(new)) == (model.gradient_failure, model.snapshot)
    assert [] == journal.models()
    assert not old.exists()
    assert not new.exists()
    journal.close()


def test_a_failure_keeps_its_sentence_when_it_is_forgotten(path):
    """After a restart the gradients are incomplete again, with the same message."""
    journal = Journal(path)
    journal.accept(row(0), new_model="{}")
    journal.accept(row(1))
    journal.finish("m:1", Answer("failure", b'{"error": "why"}'))
    journal.forget(["m:1"])
    journal = reopened(journal, path)
    [_, failed] = journal.operations()
    journal.close()

    assert "why" == failed.answer.sentence
    assert failed.forgotten


def test_what_cannot_be_written_is_told_and_the_rest_is_tried_again(path, caplog):
    """On a full disk nothing is accepted; results are written later."""
    journal = Journal(path)
    journal.accept(row(0), new_model="{}").result(5)
    pages = journal._db.execute("PRAGMA page_count").fetchone()[0]
    journal._db.execute(f"PRAGMA max_page_count={pages + 2}")
    refused = journal.accept(row(1, body=b"x" * 100_000))
    with pytest.raises(sqlite3.OperationalError, match="full"):
        refused.result(5)
    journal.finish("m:0", Answer("json", b"y" * 100_000))
    journal._db.execute("PRAGMA max_page_count=100000")
    journal.accept(row(1)).result(5)
    journal = reopened(journal, path)
    [first, second] = journal.operations()
    journal.close()

    assert b"y" * 100_000 == first.answer.body
    assert b"{}" == second.body


def test_a_journal_of_another_version_is_not_touched(path):
    journal = Journal(path)
    journal._db.execute("PRAGMA user_version=99")
    journal.close()

    with pytest.raises(HomeError, match="another version"):
        Journal(path)


def test_a_result_that_cannot_be_written_is_written_later(path, monkeypatch, caplog):
    """No request waits for it, so it is tried again until there is room, in its order."""
    monkeypatch.setattr("tinkex.server.journal._RETRY_SECONDS", 0.01)
    journal = Journal(path)
    journal.accept(row(0), new_model="{}").result(5)
    pages = journal._db.execute("PRAGMA page_count").fetchone()[0]
    journal._db.execute(f"PRAGMA max_page_count={pages + 2}")
    journal.finish("m:0", Answer("json", b"y" * 100_000))
    while "The journal cannot be written" not in caplog.text:
        time.sleep(0.005)
    journal._db.execute("PRAGMA max_page_count=100000")
    journal.accept(row(1)).result(5)
    journal = reopened(journal, path)
    first, _ = journal.operations()
    journal.close()

    assert b"y" * 100_000 == first.answer.body


def test_a_body_that_is_not_there_is_an_error_of_the_disk(path):
    """Not None, which would be taken for an operation without a body."""
    journal = Journal(path)
    journal.accept(row(0), new_model="{}").result(5)

    assert b"{}" == journal.body("m:0")
    with pytest.raises(OSError, match="the journal has no body of m:7"):
        journal.body("m:7")
    journal.close()
