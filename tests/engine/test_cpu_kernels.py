"""The compiler of the decoding step: what is compiled when, and what happens without one."""

from __future__ import annotations

import logging
import os
import re
import stat
import sys
import threading

import pytest

from tinkex.engine import cpu_kernels

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the step is compiled on Linux only"
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cpu_kernels, "SOURCE", tmp_path / "step.c")
    (tmp_path / "step.c").write_text("int tinkex_decode_step(const void *s) { return s == 0; }\n")
    cpu_kernels._load.cache_clear()
    yield tmp_path / "cache" / "tinkex" / "kernels"
    cpu_kernels._load.cache_clear()


def _program(folder, text):
    """A program *cc* that is the only one in the folder."""
    folder.mkdir()
    path = folder / "cc"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(folder)


def test_it_is_compiled_once(cache, monkeypatch):
    first = cpu_kernels.load()
    [library] = cache.iterdir()
    made = library.stat().st_mtime_ns
    cpu_kernels._load.cache_clear()

    again = cpu_kernels.load()

    assert None is not first is not again is not None
    assert [library] == list(cache.iterdir())
    assert made == library.stat().st_mtime_ns


def test_another_source_is_another_library(cache):
    """A newer version of the package does not run what an older one has left."""
    cpu_kernels.load()
    cpu_kernels.SOURCE.write_text(cpu_kernels.SOURCE.read_text() + "\n")
    cpu_kernels._load.cache_clear()
    cpu_kernels.load()

    assert 2 == len(list(cache.iterdir()))


def test_several_threads_wait_for_one_compilation(cache):
    found = []
    threads = [threading.Thread(target=lambda: found.append(cpu_kernels.load())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert 1 == len(set(map(id, found)))
    assert found[0] is not None


def test_without_a_compiler_torch_decodes_and_the_log_names_the_reason(
    cache, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    caplog.set_level(logging.INFO, "tinkex")

    assert cpu_kernels.load() is None
    assert (
        "PyTorch alone computes a decoding step: there is no C compiler (cc, gcc or clang) in PATH."
        in caplog.text
    )


@pytest.mark.parametrize(
    "text, reason",
    [
        ('[ "$1" = --version ] || { echo "step.c: bad news" >&2; exit 3; }', "bad news"),
        ("exit 0", "cannot open shared object|No such file"),
    ],
    ids=["fails", "writes-nothing"],
)
def test_a_compiler_that_fails_leaves_nothing_behind(
    cache, tmp_path, monkeypatch, caplog, text, reason
):
    monkeypatch.setenv("PATH", _program(tmp_path / "bin", text))
    caplog.set_level(logging.INFO, "tinkex")

    assert cpu_kernels.load() is None
    assert re.search(reason, caplog.text)
    assert [] == list(cache.iterdir())


def test_a_cache_that_cannot_be_written_is_no_failure(cache, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    caplog.set_level(logging.INFO, "tinkex")

    assert cpu_kernels.load() is None
    assert os.strerror(20) in caplog.text  # Not a directory


def test_too_little_memory_is_a_memory_error(cache):
    cpu_kernels.SOURCE.write_text("int tinkex_decode_step(const void *s) { return -1; }\n")
    run = cpu_kernels.load()

    with pytest.raises(MemoryError, match="a decoding step"):
        run(cpu_kernels.np.zeros(1, cpu_kernels.STEP))


def test_the_source_travels_with_the_package():
    """It is compiled where the package is installed."""
    assert cpu_kernels.SOURCE.is_file() and cpu_kernels.ATTENTION_SOURCE.is_file()
