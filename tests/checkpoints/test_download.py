"""Downloading a checkpoint: streamed, resumed, verified, unpacked, moved into place."""

from __future__ import annotations

import base64
import builtins
import gzip
import hashlib
import io
import os
import tarfile
from contextlib import closing

import pytest

from tests.support.fake_server import (
    FakeServer,
    answer,
    cut,
    garbage,
    reset,
    status,
    timeout,
    transport,
)
from tinkex import errors
from tinkex.rest import RestClient
from tinkex.runtime.connection import Connection

PATH = "tinker://run/sampler_weights/final"
ARCHIVE = "training_runs/run/checkpoints/sampler_weights/final/archive"
URL = "https://files.test/archive?signature=abc"

FILES = {"adapter_config.json": b'{"r": 8}', "adapter_model.safetensors": os.urandom(300_000)}
PART = 1 << 16  # bytes; what is written at a time


def tar(files, mode="w", **members):
    """An archive of *files*; *members* are TarInfos of other kinds."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for member in members.values():
            archive.addfile(member)
    return buffer.getvalue()


def special(name, kind, target=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.fixture
def server():
    made = FakeServer()
    made.stored["GET", ARCHIVE] = (302, None, {"Location": URL, "Expires": "tomorrow"})
    made.files[URL] = tar(FILES)
    return made


@pytest.fixture
def rest(server):
    way = transport(server, api_key="tml-secret")
    with closing(Connection(way.config, transport=way)) as made:
        yield RestClient(connection=made)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


# The URL.


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_gives_the_url(rest, server, code):
    server.stored["GET", ARCHIVE] = (code, None, {"Location": URL, "Expires": "tomorrow"})
    found = rest.get_checkpoint_archive_url(PATH)

    assert (URL, "tomorrow") == (found.url, found.expires)


def test_a_json_body_gives_the_url(rest, server):
    server.stored["GET", ARCHIVE] = (200, {"url": URL, "expires": "tomorrow"})

    assert URL == rest.get_checkpoint_archive_url(PATH).url


def test_a_relative_url_is_on_the_server(rest, server):
    server.stored["GET", ARCHIVE] = (302, None, {"Location": "/files/a"})

    assert "http://training.test/files/a" == rest.get_checkpoint_archive_url(PATH).url


def test_a_redirect_without_location_is_an_error(rest, server):
    server.stored["GET", ARCHIVE] = (302, None)

    with pytest.raises(
        errors.APIResponseValidationError, match="redirects without a Location header"
    ):
        rest.get_checkpoint_archive_url(PATH)


def test_statement_28_a_server_that_is_still_packing_is_asked_again_every_30_s(
    rest, server, caplog
):
    """Generic retries would give up, or ask every second, for minutes. (statement 28)"""
    calls = []
    server.script(ARCHIVE, *[status(503)] * 5)
    found = rest.get_checkpoint_archive_url(PATH, on_wait=calls.append)

    assert URL == found.url
    assert [30.0] * 5 == server.clock.slept == calls
    assert f"the server is still packing {PATH}; next attempt in 30 s" in caplog.text


def test_statement_28_but_six_times_in_all(rest, server):
    """After that the server is broken, not packing. (statement 28)"""
    server.always(ARCHIVE, status(503, {"detail": "packing"}))

    with pytest.raises(errors.InternalServerError, match="packing"):
        rest.get_checkpoint_archive_url(PATH)
    assert [30.0] * 5 == server.clock.slept
    assert 6 == len(server.seen(ARCHIVE))


@pytest.mark.parametrize("fault", [reset(), timeout(), status(502), garbage()])
def test_other_failures_are_retried(rest, server, fault):
    server.script(ARCHIVE, fault)

    assert URL == rest.get_checkpoint_archive_url(PATH).url


def test_a_missing_checkpoint_is_an_error(rest, server):
    server.stored["GET", ARCHIVE] = (404, {"detail": "no such checkpoint"})

    with pytest.raises(errors.NotFoundError, match="no such checkpoint"):
        rest.get_checkpoint_archive_url(PATH)


# The download.


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "w:bz2"])
def test_a_checkpoint_becomes_a_folder(rest, server, out, mode):
    server.files[URL] = tar(FILES, mode)

    assert out == rest.download_checkpoint(PATH, out)
    assert contents(out) == FILES
    assert [out] == list(out.parent.iterdir())


def test_a_folder_on_the_server_s_disk_cannot_be_downloaded(rest, server, out):
    """TuFT gives a file:// URL. It is neither tried again nor read from this machine's disk."""
    server.stored["GET", ARCHIVE] = (302, None, {"Location": "file:///etc/passwd"})

    with pytest.raises(errors.DownloadError, match=r"file:///etc/passwd.*copy the checkpoint"):
        rest.download_checkpoint(PATH, out)
    assert not out.exists()


def test_progress_is_reported(rest, server, out):
    calls = []
    rest.download_checkpoint(PATH, out, progress=lambda *seen: calls.append(seen))
    total = len(server.files[URL])

    assert (total, total) == calls[-1]


def test_the_key_is_not_sent_to_another_host(rest, server, out):
    """The archive may be on a storage service."""
    rest.download_checkpoint(PATH, out)
    [seen] = server.seen(URL)

    assert "tml-secret" not in str(seen.headers)
    assert "tml-secret" == server.seen(ARCHIVE)[0].headers["X-API-Key"]


def test_the_key_is_sent_to_the_server_itself(rest, server, out):
    server.stored["GET", ARCHIVE] = (302, None, {"Location": "/files/a"})
    server.stored["GET", "/files/a"] = (200, tar(FILES))
    rest.download_checkpoint(PATH, out)

    assert "tml-secret" == server.seen("/files/a")[0].headers["X-API-Key"]


def test_a_broken_download_is_resumed(rest, server, out):
    server.script(URL, cut(PART), cut(2 * PART + 500), reset(), cut(0))
    rest.download_checkpoint(PATH, out)

    assert contents(out) == FILES
    begins = [None, PART, 3 * PART, 3 * PART, 3 * PART]
    assert [n and f"bytes={n}-" for n in begins] == [
        seen.headers.get("Range") for seen in server.seen(URL)
    ]


def test_a_server_without_ranges_starts_again(rest, server, out):
    """It answers 200 with the whole archive."""
    whole = server.files[URL]
    server.script(URL, cut(PART), answer(whole))
    rest.download_checkpoint(PATH, out)

    assert contents(out) == FILES


def test_a_different_part_is_discarded(rest, server, out):
    """Otherwise the file would have the right size and the wrong content."""
    whole = server.files[URL]
    wrong = status(206, whole[500:], **{"Content-Range": f"bytes 500-{len(whole) - 1}/*"})
    server.script(URL, cut(PART), wrong)
    rest.download_checkpoint(PATH, out)

    assert contents(out) == FILES


def test_an_archive_that_has_changed_is_fetched_from_the_start(rest, server, out):
    server.script(URL, cut(PART), status(416))
    rest.download_checkpoint(PATH, out)

    assert contents(out) == FILES


@pytest.mark.parametrize("code", [403, 410, 503])
def test_an_expired_url_is_requested_again(rest, server, out, code):
    server.script(URL, cut(PART), status(code))
    rest.download_checkpoint(PATH, out)

    assert contents(out) == FILES
    assert 2 == len(server.seen(ARCHIVE))


def test_a_connection_that_breaks_again_and_again_is_an_error_with_the_progress(rest, server, out):
    server.script(URL, cut(PART), *[reset()] * 8)

    with pytest.raises(errors.DownloadError, match="broke off after 65536 bytes, 8 times in a row"):
        rest.download_checkpoint(PATH, out)
    assert not out.exists()


def test_a_refusal_is_an_error(rest, server, out):
    server.always(URL, status(404, b"<Error>NoSuchKey</Error>"))

    with pytest.raises(errors.NotFoundError, match="NoSuchKey"):
        rest.download_checkpoint(PATH, out)


# Full disks.


def test_a_download_that_cannot_fit_fails_before_it_begins(rest, server, out, monkeypatch):
    """The archive and the unpacked files are on the disk at the same time."""
    whole = len(server.files[URL])
    usage = type("Usage", (), {"free": 2 * whole - 1})
    monkeypatch.setattr("tinkex.checkpoints.download.shutil.disk_usage", lambda path: usage)

    message = f"needs {2 * whole} bytes, but only {2 * whole - 1} are free in {out.parent}"
    with pytest.raises(errors.DownloadError, match=message):
        rest.download_checkpoint(PATH, out)
    assert [] == list(out.parent.iterdir())


def test_an_archive_without_an_announced_size_takes_at_most_half_of_the_disk(
    rest, server, out, monkeypatch
):
    """It might never end."""
    whole = server.files[URL]
    server.always(URL, status(200, whole))
    usage = type("Usage", (), {"free": 2 * len(whole) - 2})
    monkeypatch.setattr("tinkex.checkpoints.download.shutil.disk_usage", lambda path: usage)

    with pytest.raises(errors.DownloadError, match="the server announced no size and has sent"):
        rest.download_checkpoint(PATH, out)
    assert [] == list(out.parent.iterdir())


def test_a_disk_that_fills_up_is_named_and_leaves_nothing(rest, server, out, monkeypatch):
    """Writing to /dev/full fails like that."""

    def open_full(path, mode):
        return builtins.open("/dev/full", "r+b", 0)

    monkeypatch.setattr("tinkex.checkpoints.download.open", open_full, raising=False)

    with pytest.raises(errors.DownloadError, match=r"cannot be written \(No space left on device"):
        rest.download_checkpoint(PATH, out)
    assert [] == list(out.parent.iterdir())


# Verification.


@pytest.mark.parametrize("form", ["Repr-Digest", "X-Content-SHA256"])
@pytest.mark.parametrize("right", [True, False])
def test_the_announced_hash_is_verified(rest, server, out, form, right):
    whole = server.files[URL]
    announced = whole if right else b"another"
    value = hashlib.sha256(announced).hexdigest()
    if form == "Repr-Digest":
        value = f"sha-256=:{base64.b64encode(bytes.fromhex(value)).decode()}:"
    server.always(URL, answer(whole, **{form: value}))
    if right:
        rest.download_checkpoint(PATH, out)
        assert contents(out) == FILES
        return

    with pytest.raises(errors.DownloadError, match="does not have the hash that the server"):
        rest.download_checkpoint(PATH, out)
    assert not out.exists()


def damaged(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not an archive",
        tar(FILES)[:700],
        gzip.compress(tar(FILES))[:-500],
        damaged(gzip.compress(tar(FILES))),
        damaged(tar(FILES, "w:xz")),
        damaged(tar(FILES, "w:bz2")),
    ],
    ids=["empty", "text", "cut", "cut gz", "damaged gz", "damaged xz", "damaged bz2"],
)
def test_a_damaged_archive_is_a_download_error_and_leaves_nothing(rest, server, out, content):
    server.files[URL] = content

    with pytest.raises(errors.DownloadError, match="cannot be unpacked"):
        rest.download_checkpoint(PATH, out)
    assert [] == list(out.parent.iterdir())


# Unpacking.


@pytest.mark.parametrize(
    "archive",
    [
        tar({"/etc/cron.d/x": b"x"}),
        tar({"../outside": b"x"}),
        tar({"a/../../outside": b"x"}),
        tar({"\\windows\\x": b"x"}),
        tar({"C:evil": b"x"}),
        tar({}, link=special("a", tarfile.SYMTYPE, "/etc/passwd")),
        tar({}, link=special("a", tarfile.LNKTYPE, "/etc/passwd")),
        tar({}, pipe=special("a", tarfile.FIFOTYPE)),
        tar({}, device=special("a", tarfile.CHRTYPE)),
    ],
    ids=["absolute", "..", "a/..", "backslash", "drive", "symlink", "hardlink", "fifo", "device"],
)
def test_an_unsafe_member_is_refused(rest, server, out, archive):
    server.files[URL] = archive

    with pytest.raises(errors.DownloadError, match="a member that is not safe to unpack"):
        rest.download_checkpoint(PATH, out)
    assert [] == list(out.parent.iterdir())


def test_folders_in_an_archive_are_created(rest, server, out):
    folders = {name: special(name, tarfile.DIRTYPE) for name in (".", "./empty")}
    server.files[URL] = tar({"./a/b.txt": b"x"}, **folders)
    rest.download_checkpoint(PATH, out)

    assert {"a/b.txt": b"x"} == contents(out)
    assert (out / "empty").is_dir()


def test_a_duplicate_member_is_refused(rest, server, out):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for content in (b"one", b"two"):
            member = tarfile.TarInfo("a.txt")
            member.size = 3
            archive.addfile(member, io.BytesIO(content))
    server.files[URL] = buffer.getvalue()

    with pytest.raises(errors.DownloadError, match="cannot be unpacked"):
        rest.download_checkpoint(PATH, out)


# Moving into place.


@pytest.mark.parametrize("there", ["folder", "file"])
def test_an_existing_folder_is_not_replaced_without_force(rest, server, out, there):
    if there == "folder":
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    else:
        out.write_text("mine")

    with pytest.raises(
        FileExistsError,
        match="already exists; choose another folder",
    ):
        rest.download_checkpoint(PATH, out)
    assert [] == server.seen(ARCHIVE)


def test_an_empty_folder_is_used(rest, out):
    out.mkdir()
    rest.download_checkpoint(PATH, out)

    assert contents(out) == FILES


def test_with_force_it_is_replaced_when_the_new_one_is_complete(rest, out):
    out.mkdir()
    (out / "old.txt").write_text("old")
    rest.download_checkpoint(PATH, out, force=True)

    assert contents(out) == FILES
    assert [out] == list(out.parent.iterdir())


def test_nothing_is_deleted_before_the_new_one_is_complete(rest, server, out):
    """The official SDK deletes first and then downloads."""
    out.mkdir()
    (out / "old.txt").write_text("old")
    server.files[URL] = b"damaged"

    with pytest.raises(errors.DownloadError):
        rest.download_checkpoint(PATH, out, force=True)
    assert {"old.txt": b"old"} == contents(out)


def test_ctrl_c_leaves_nothing(rest, out):
    def interrupt(*seen):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rest.download_checkpoint(PATH, out, progress=interrupt)
    assert [] == list(out.parent.iterdir())


def test_parent_folders_are_created(rest, tmp_path):
    deep = tmp_path / "a" / "b" / "c"
    rest.download_checkpoint(PATH, str(deep))

    assert contents(deep) == FILES
