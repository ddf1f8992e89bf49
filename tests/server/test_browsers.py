"""Web pages and proxies: what a browser of this machine sends for another's page is refused."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

import pytest

from tests.support.wire_client import WireClient

FOREIGN = [
    {"Origin": "http://localhost:3000"},
    {"Origin": "http://127.0.0.1:1"},
    {"Origin": "https://evil.example"},
    {"Origin": "null"},
    {"Origin": ""},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "unheard-of"},
    {"Host": "evil.example"},
    {"Host": "localhost.evil.example:80"},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_another_s_page_is_kept_out_of_a_server_without_a_key(client, headers):
    status, sentence = client.refused("create_session", {}, headers=headers)

    assert 403 == status
    assert "--api-key" in sentence
    assert [] == client.get("sessions")["sessions"]


def test_the_server_s_own_pages_and_programs_are_let_in(served):
    client = served.client
    host = urlsplit(served.server.url).netloc
    for headers in (
        {"Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none"},
        {"Host": "localhost", "Origin": "http://localhost"},
    ):
        assert client.post("create_session", {}, headers=headers)["session_id"]


def test_a_key_lets_any_page_in(serve):
    """The browser does not know the key by itself."""
    from tinkex.server.auth import Keys

    served = serve(keys=lambda home: Keys.of_one("secret"))
    client = served.client_with("secret")

    assert client.post("create_session", {}, headers=FOREIGN[0])["session_id"]


@pytest.mark.parametrize(
    "path, method",
    [("create_session", "POST"), ("optim_step", "POST"), ("forward_backward", "POST"),
     ("asample", "POST"), ("sessions/x/project", "PUT")],
)  # fmt: skip
@pytest.mark.parametrize("content_type", [None, "text/plain"])
def test_a_body_must_say_that_it_is_json(client, path, method, content_type):
    """A page may send a body without a type, or as text, to any server without asking first."""
    headers = {} if content_type is None else {"Content-Type": content_type}
    answer = client.http.request(method, client.url + path, data=b"{}", headers=headers)

    assert 415 == answer.status_code
    assert "Content-Type" in answer.json()["error"]


def raw(url, request):
    """The answer to bytes, up to the end of the connection."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=10) as connection:
        connection.sendall(request)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    return answer


def test_a_body_of_two_lengths_is_refused(served):
    """A proxy may take one and the server the other: the rest would be another's request."""
    smuggled = b"GET /api/v1/sessions HTTP/1.1\r\nHost: localhost\r\n\r\n"
    answer = raw(
        served.server.url,
        b"POST /api/v1/create_session HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nContent-Length: 40\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n" + smuggled,
    )

    assert answer.startswith(b"HTTP/1.1 400 ")
    assert 1 == answer.count(b"HTTP/1.1")
    assert b"both Content-Length and Transfer-Encoding" in answer
    assert [] == served.client.get("sessions")["sessions"]


def test_a_download_link_does_not_repeat_a_foreign_host(serve, monkeypatch):
    """Else whoever forges a Host sends the download elsewhere."""
    from tinkex.server.auth import Keys

    def link(served, host):
        client = served.client_with("key")
        model = client.model()
        client.result(client.save(model, 1, "a"))
        answer = client.send(
            "GET",
            f"training_runs/{model}/checkpoints/weights/a/archive",
            headers={"Host": host} if host else {},
            allow_redirects=False,
        )
        client.http.close()
        assert answer.headers["Location"] == answer.json()["url"]
        return answer.headers["Location"]

    served = serve(keys=lambda home: Keys.of_one("key"))
    own = link(served, None)
    foreign = [link(served, host) for host in ("evil.example", 'local"host', "localhost@evil")]
    monkeypatch.setenv("TINKEX_PUBLIC_URL", "https://train.example.org/tinker/")
    behind_a_proxy = link(serve(keys=lambda home: Keys.of_one("key")), "10.0.0.1")

    assert own.startswith(served.server.url)
    assert all(url.startswith("/api/v1/archives/") for url in foreign)
    assert behind_a_proxy.startswith("https://train.example.org/tinker/api/v1/archives/")


def test_a_relative_link_is_followed(serve):
    served = serve()
    client = WireClient(served.server.url)
    model = client.model()
    client.result(client.save(model, 1, "a"))
    answer = client.send("GET", f"training_runs/{model}/checkpoints/weights/a/archive")
    client.http.close()

    assert 200 == answer.status_code
    assert 'filename="weights-a.tar"' in answer.headers["Content-Disposition"]
