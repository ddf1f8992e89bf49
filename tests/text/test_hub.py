"""The hub is asked once: offline, its own library would try for half a minute."""

from __future__ import annotations

import pytest

from tinkex import errors
from tinkex.text import hub, tokenizer


@pytest.fixture
def asked(monkeypatch):
    """No network; the addresses that were asked for."""
    asked = []

    def unreachable(address, timeout):
        asked.append(address)
        raise RuntimeError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    return asked


def test_without_a_network_one_request_is_made(asked):
    with pytest.raises(OSError, match=r"org/model/.* cannot be reached: Name or service not known"):
        hub.check_file("org/model", "config.json")

    assert 1 == len(asked)


def test_a_data_set_is_asked_for_once(monkeypatch):
    asked = []

    def unreachable(self, repository, timeout):
        asked.append(repository)
        raise RuntimeError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)

    with pytest.raises(OSError, match="the hub cannot be reached: Name or service not known"):
        hub.check_data_set("org/data")
    assert ["org/data"] == asked


def test_a_tokenizer_is_asked_for_once(asked):
    with pytest.raises(errors.TokenizerError, match="Is this machine online"):
        tokenizer.load("org/not-on-this-machine")

    assert 1 == len(asked)


def test_what_is_cached_is_not_asked_for(asked, monkeypatch, tmp_path):
    """So that a model fetched yesterday loads without a network today."""
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda *_, **__: str(tmp_path / "config.json")
    )

    assert hub.is_cached("org/model", "config.json")
    assert [] == asked
