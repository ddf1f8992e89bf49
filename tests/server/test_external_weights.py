"""External weights: files by signed URLs, encrypted to their readers if they ask for it."""

from __future__ import annotations

import json
import sys
import threading
import time
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import pyrage
import pytest
from safetensors.numpy import load

import tinkex
from tinkex import errors, types
from tinkex.server import encryption
from tinkex.server.app import LocalServer
from tinkex.server.routes import external

DATUM = types.Datum(types.ModelInput.from_ints([5, 6, 7]), {"target_tokens": [6, 7, 8]})


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with LocalServer(tmp_path_factory.mktemp("home")) as running:
        yield running


@pytest.fixture(scope="module")
def training(server):
    with tinkex.ServiceClient(server.url, "tml-any") as service:
        client = service.create_lora_training_client("tiny", rank=2, seed=1)
        client.forward_backward([DATUM], "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=0.1)).result()
        yield client


@pytest.fixture(scope="module")
def rest(server):
    with tinkex.RestClient(server.url, "tml-any") as client:
        yield client


def fetched(url):
    with urllib.request.urlopen(url, timeout=30) as answer:
        return answer.read()


def refused(url):
    with pytest.raises(urllib.error.HTTPError) as caught:
        fetched(url)
    return caught.value.code, json.loads(caught.value.read())["error"]


def test_the_files_are_those_of_the_archive_and_need_no_header(training, rest, tmp_path):
    saved = training.save_weights_external("plain").result()
    sampler = training.save_weights_for_sampler("same").result().path
    archive = rest.download_checkpoint(sampler, tmp_path / "adapter")
    answer = rest.get_external_weights_urls(saved.path).result()

    assert saved.path == f"tinker://{training.model_id}/external_weights/plain"
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(answer.urls)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (archive / name).read_bytes() == fetched(answer.urls[name])
    assert saved.size_bytes == sum(len(fetched(url)) for url in answer.urls.values())
    seconds = answer.expires.timestamp() - time.time()
    assert 0 < seconds <= external.URL_SECONDS
    [listed] = [
        c for c in rest.list_checkpoints(training.model_id).checkpoints if "plain" in c.tinker_path
    ]
    assert "external" == listed.checkpoint_type


def test_a_download_can_be_resumed(training, rest):
    path = training.save_weights_external("ranges").result().path
    url = rest.get_external_weights_urls(path).urls["adapter_config.json"]
    request = urllib.request.Request(url, headers={"Range": "bytes=10-19"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        part, status = answer.read(), answer.status

    assert (206, fetched(url)[10:20]) == (status, part)


def test_every_file_is_encrypted_to_each_reader_and_to_nobody_else(training, rest):
    readers = [pyrage.x25519.Identity.generate() for _ in range(2)]
    keys = [str(reader.to_public()) for reader in readers]
    path = training.save_weights_external("secret", 3600, keys).result().path
    urls = rest.get_external_weights_urls(path).urls

    assert urls
    assert all(name.endswith(".age") for name in urls)
    body = fetched(urls["adapter_model.safetensors.age"])
    opened = {len(load(pyrage.decrypt(body, [reader]))) for reader in readers}
    assert len(opened) == 1
    with pytest.raises(pyrage.DecryptError):
        pyrage.decrypt(body, [pyrage.x25519.Identity.generate()])
    config = json.loads(pyrage.decrypt(fetched(urls["adapter_config.json.age"]), readers))
    assert 2 == config["r"]


SSH_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl someone"


def test_an_ssh_key_is_a_reader_too():
    assert 2 == len(
        encryption.recipients_of([SSH_KEY, str(pyrage.x25519.Identity.generate().to_public())])
    )


@pytest.mark.parametrize("key", ["age1nokey", "ssh-ed25519 AAAA", "age1" + "q" * 58])
def test_a_wrong_key_is_refused_before_anything_is_saved(training, rest, key):
    """The number of the refused operation is used up, and the model trains on."""
    with pytest.raises(errors.TinkexError, match="is not a public key of age or SSH"):
        training.save_weights_external("never", None, [key]).result()
    with pytest.raises(errors.NotFoundError):
        rest.get_external_weights_urls(f"tinker://{training.model_id}/external_weights/never")
    assert training.forward([DATUM], "cross_entropy").result().loss > 0


@pytest.mark.parametrize(
    "recipients, match",
    [
        ([], "1 to 10"),
        (["age1x"] * 11, "got 11"),
        ("age1x", "a list of str"),
        (["pgp"], "'pgp', which is not a public key"),
        ([5], "5, which is not a public key"),
    ],
)
def test_recipients_that_cannot_be_are_refused_by_the_call(training, recipients, match):
    with pytest.raises((TypeError, ValueError), match=match):
        training.save_weights_external("never", None, recipients)


def test_a_server_without_the_package_says_what_to_install(training, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyrage", None)
    with pytest.raises(errors.TinkexError, match=r"pip install 'tinkex\[age\]'"):
        training.save_weights_external("never", None, ["age1x"]).result()


def test_a_tampered_url_is_refused(training, rest):
    """Another file, another time, another signature: nothing of it can be changed."""
    path = training.save_weights_external("signed").result().path
    urls = rest.get_external_weights_urls(path).urls
    url, other = urls["adapter_config.json"], urls["adapter_model.safetensors"]
    later = url.replace("expires=", "expires=9")
    for wrong in (
        later,
        url.replace("signature=", "signature=0"),
        url.split("?")[0],
        f"{urlsplit(other)._replace(query=urlsplit(url).query).geturl()}",
        url.replace("adapter_config.json", "..%2F..%2Fsecret"),
        url.replace("expires=", "expires=x"),
    ):
        status, sentence = refused(wrong)
        assert 403 == status
        assert "not one that this server gave" in sentence


def test_an_expired_url_is_refused(training, rest, monkeypatch):
    path = training.save_weights_external("short").result().path
    monkeypatch.setattr(external, "URL_SECONDS", -1)
    url = rest.get_external_weights_urls(path).urls["adapter_config.json"]

    assert (403, True) == (lambda status, text: (status, "has expired" in text))(*refused(url))


def test_a_url_ends_with_its_checkpoint(training, rest):
    """Also if the name is used again: the URL is of what was saved then."""
    path = training.save_weights_external("gone").result().path
    url = rest.get_external_weights_urls(path).urls["adapter_config.json"]
    rest.delete_checkpoint_from_tinker_path(path)

    assert 403 == refused(url)[0]
    training.save_weights_external("gone").result()
    assert 403 == refused(url)[0]


def test_other_checkpoints_have_no_urls_and_external_weights_no_model(training, rest, server):
    state = training.save_state("state").result().path
    path = training.save_weights_external("files").result().path

    with pytest.raises(ValueError, match="only external weights have"):
        rest.get_external_weights_urls(state)
    answer = rest._connection.transport  # the server's own answer, past the client's check
    with pytest.raises(errors.BadRequestError, match="tinkex checkpoint download"):
        answer.call(
            tinkex.wire.EXTERNAL_WEIGHTS_URLS,
            run_id=training.model_id,
            checkpoint_id="weights/state",
        )
    with pytest.raises(errors.TinkexError, match="only there to be fetched"):
        training.load_state(path).result()
    with (
        tinkex.ServiceClient(server.url, "tml-any") as service,
        pytest.raises(errors.BadRequestError, match="only there to be fetched"),
    ):
        service.create_sampling_client(path)


def test_a_name_is_taken_only_once(training):
    training.save_weights_external("once").result()
    with pytest.raises(errors.RequestFailedError, match="exists already"):
        training.save_weights_external("once").result()


def test_urls_hold_over_a_restart_and_for_many_readers_at_once(tmp_path):
    with LocalServer(tmp_path / "home") as first:
        with tinkex.ServiceClient(first.url, "tml-any") as service:
            client = service.create_lora_training_client("tiny", rank=2)
            path = client.save_weights_external("kept").result().path
        with tinkex.RestClient(first.url, "tml-any") as rest:
            url = rest.get_external_weights_urls(path).urls["adapter_model.safetensors"]
        expected = fetched(url)
    with LocalServer(tmp_path / "home") as second:
        moved = urlsplit(url)._replace(netloc=urlsplit(second.url).netloc).geturl()
        bodies = []
        threads = [threading.Thread(target=lambda: bodies.append(fetched(moved))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert [expected] * 8 == bodies
