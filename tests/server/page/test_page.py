"""The web page: who gets in, what is shown to whom, and what a browser is allowed to do."""

from __future__ import annotations

import asyncio
import json
import time
import tracemalloc
from collections import Counter
from types import SimpleNamespace

import pytest
import requests

from tinkex.server.auth import Keys
from tinkex.server.http_errors import Refusal
from tinkex.server.page import endpoints
from tinkex.server.page.sign_in import COOKIE_SECONDS, TOKEN_SECONDS, SignIns

HTML = {"Accept": "text/html,*/*"}


class Browser(requests.Session):
    """Keeps cookies, and sends what browsers send with a page's own requests."""

    def __init__(self, url):
        super().__init__()
        self.trust_env = False
        self.url = url
        self.headers["Sec-Fetch-Site"] = "same-origin"

    def request(self, method, path, **kwargs):
        return super().request(method, self.url + path, timeout=30, **kwargs)

    def ask(self, path):
        answer = self.get(path)
        assert 200 == answer.status_code, answer.text
        return answer.json()


@pytest.fixture
def users(serve):
    """A server with two users, "tml-a" and "tml-b"."""
    return serve(
        keys=lambda home: Keys.of_users(["tml-a", "tml-b"], b"secret"),
        limits={"page_seconds": 0.02},
    )


@pytest.fixture
def signed_in(users):
    """A browser that `tinkex ui` has opened for "tml-a"."""
    browser = Browser(users.server.url)
    told = requests.post(f"{browser.url}/ui/token", headers={"X-API-Key": "tml-a"}, timeout=30)
    answer = browser.get(told.json()["path"])
    assert 200 == answer.status_code
    with browser:
        yield browser


# Signing in.


def test_the_page_is_for_browsers_and_programs_still_get_json(served):
    page = requests.get(served.server.url, headers=HTML, timeout=30)
    about = requests.get(served.server.url, timeout=30)

    assert "<title>tinkex</title>" in page.text
    assert "tinkex" == about.json()["name"]


def test_no_script_runs_but_the_page_s_own(served):
    """Whatever a name or a prompt holds: nothing inline, nothing from elsewhere, no frame."""
    page = requests.get(served.server.url, headers=HTML, timeout=30)
    policy = page.headers["Content-Security-Policy"]

    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert (
        "<script>" not in page.text and " on" not in page.text.partition("<body")[2].split(">")[0]
    )


def test_every_file_of_the_page_is_served_and_no_other(served):
    page = requests.get(served.server.url, headers=HTML, timeout=30).text
    names = {part.split('"')[0] for part in page.split("/ui/files/")[1:]} | {"charts.js", "chat.js"}
    for name in names:
        answer = requests.get(f"{served.server.url}/ui/files/{name}", timeout=30)
        assert 200 == answer.status_code and "nosniff" in answer.headers["X-Content-Type-Options"]
    for name in ("state.py", "..%2Fstate.py", "", "x"):
        assert 404 == requests.get(f"{served.server.url}/ui/files/{name}", timeout=30).status_code


def test_a_link_signs_in_once(users):
    told = requests.post(
        f"{users.server.url}/ui/token", headers={"X-API-Key": "tml-a"}, timeout=30
    ).json()
    first, second = Browser(users.server.url), Browser(users.server.url)
    first.get(told["path"])
    answer = second.get(told["path"])

    assert 200 == first.get("/ui/state").status_code
    assert 401 == answer.status_code and "tinkex ui" in answer.json()["error"]
    assert 401 == second.get("/ui/state").status_code


def test_a_typed_key_signs_in_and_out(users):
    browser = Browser(users.server.url)
    wrong = browser.post("/ui/sign-in", json={"key": "tml-x"})
    right = browser.post("/ui/sign-in", json={"key": "tml-a"})
    inside = browser.get("/ui/state").status_code
    cookie = dict(browser.cookies)
    browser.post("/ui/sign-out", json={})
    browser.cookies.update(cookie)  # kept by another client

    assert (401, 200, 200) == (wrong.status_code, right.status_code, inside)
    assert 401 == browser.get("/ui/state").status_code
    assert "HttpOnly" in right.headers["Set-Cookie"] and "strict" in right.headers["Set-Cookie"]
    assert "tml-a" not in right.headers["Set-Cookie"]


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "same-site"},  # another port of this machine, which gets the cookie
        {"Sec-Fetch-Site": "cross-site"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "null"},
    ],
    ids=str,
)
@pytest.mark.parametrize("method, path", [("GET", "/ui/state"), ("POST", "/ui/chat/completions")])
def test_another_page_cannot_use_the_cookie(signed_in, method, path, headers):
    answer = signed_in.request(method, path, headers=headers, json={})

    assert 403 == answer.status_code


def test_the_cookie_opens_nothing_but_the_page(signed_in):
    """The API itself takes keys alone."""
    assert 401 == signed_in.get("/api/v1/sessions").status_code
    assert 401 == signed_in.get("/v1/models").status_code


def test_tokens_and_cookies_expire():
    now = [0.0]
    sign_ins = SignIns(lambda: now[0])
    old = sign_ins.give_token("k")
    now[0] = TOKEN_SECONDS + 1
    with pytest.raises(Refusal, match="older than two minutes"):
        sign_ins.exchange(old)
    cookie = sign_ins.exchange(sign_ins.give_token("k"))
    assert "k" == sign_ins.key_of(cookie)
    now[0] += COOKIE_SECONDS + 1
    assert sign_ins.key_of(cookie) is None


def test_neither_tokens_nor_cookies_pile_up():
    sign_ins = SignIns()
    first = sign_ins.give_token("k")
    for _ in range(1000):
        sign_ins.give_token("k")
    with pytest.raises(Refusal):
        sign_ins.exchange(first)


# What is shown.


def train(client, model, *, steps=1):
    for step in range(steps):
        client.result(client.forward_backward(model, 2 * step + 1, [1, 2, 3]))
        body = {"model_id": model, "seq_id": 2 * step + 2, "adam_params": {"learning_rate": 0.1}}
        client.result(client.post("optim_step", body))


def test_users_see_their_own_runs_alone(users, signed_in):
    mine, other = users.client_with("tml-a").model(), users.client_with("tml-b").model()
    train(users.client_with("tml-a"), mine)
    state = signed_in.ask("/ui/state")

    assert [mine] == [run["id"] for run in state["runs"]]
    assert 3 == state["usage"]["tokens_trained"]
    assert 1 == state["runs"][0]["latest"]["step"]
    assert 404 == signed_in.get(f"/ui/runs/{other}").status_code
    assert 404 == signed_in.get(f"/ui/events?run={other}").status_code
    assert other not in json.dumps(state)


def test_settings_and_checkpoints_of_a_run(users, signed_in):
    client = users.client_with("tml-a")
    model = client.model(rank=4)
    client.result(client.post("save_weights", {"model_id": model, "seq_id": 1, "path": "a"}))
    told = signed_in.ask(f"/ui/runs/{model}")

    assert 4 == told["settings"]["LoRA rank"]
    (checkpoint,) = told["checkpoints"]
    assert ("weights/a", "training", False) == tuple(
        checkpoint[name] for name in ("id", "kind", "public")
    )


def events(browser, path):
    """(name, payload) of each event as it comes."""
    with browser.get(path, stream=True) as answer:
        assert "text/event-stream" in answer.headers["Content-Type"]
        name = ""
        for line in answer.iter_lines(chunk_size=1):
            field, _, value = line.decode().partition(": ")
            if field == "event":
                name = value
            elif field == "data":
                yield name, json.loads(value)


def test_steps_arrive_while_the_page_is_open(users, signed_in):
    client = users.client_with("tml-a")
    model = client.model()
    told = events(signed_in, f"/ui/events?run={model}")
    assert "state" == next(told)[0]
    train(client, model, steps=2)
    seen = []
    while len(seen) < 2:
        name, payload = next(told)
        if name == "points":
            seen += [point["step"] for point in payload["points"]]

    assert [1, 2] == seen
    told.close()


def test_an_open_page_is_told_no_more_after_signing_out(users, signed_in):
    told = events(signed_in, "/ui/events")
    next(told)
    second = Browser(users.server.url)
    second.cookies.update(signed_in.cookies)
    second.post("/ui/sign-out", json={})

    assert [] == [name for name, _ in told if name != "state"]  # and it ends


def test_an_open_page_does_not_hold_up_the_server_s_end(users, signed_in):
    told = events(signed_in, "/ui/events")
    next(told)
    users.close()

    assert {"state"} >= {name for name, _ in told}  # and it ends


# What can be done.


def test_a_checkpoint_is_published_downloaded_and_deleted(users, signed_in):
    client = users.client_with("tml-a")
    model = client.model()
    client.result(client.post("save_weights", {"model_id": model, "seq_id": 1, "path": "a"}))
    path = f"/ui/training_runs/{model}/checkpoints/weights/a"

    assert 200 == signed_in.post(f"{path}/publish", json={}).status_code
    assert signed_in.ask(f"/ui/runs/{model}")["checkpoints"][0]["public"]
    ticket = signed_in.get(f"{path}/archive", allow_redirects=False)
    archive = requests.get(ticket.json()["url"], timeout=30)
    assert b"adapter_config.json" in archive.content
    assert 200 == signed_in.delete(path).status_code
    assert [] == signed_in.ask(f"/ui/runs/{model}")["checkpoints"]


def test_names_come_through_as_they_are(serve):
    """The page shows them as text; nothing is changed on the way."""
    served = serve()
    name = "<img src=x onerror=alert(1)>"
    session = served.client.session(user_metadata={"a": name}, display_name=name)
    served.client.model(session=session, user_metadata={"name": name})
    state = Browser(served.server.url).ask("/ui/state")

    assert name == state["runs"][0]["metadata"]["name"] == state["sessions"][0]["name"]


def test_a_server_without_keys_needs_no_signing_in(served):
    browser = Browser(served.server.url)
    assert {"path": "/"} == browser.post("/ui/token").json()
    assert "local" == browser.ask("/ui/state")["owner"]


def test_samples_of_a_run_are_shown_newest_first(users, signed_in):
    client = users.client_with("tml-a")
    model = client.model()
    before = signed_in.ask("/ui/state")["runs"][0]["samples"]
    for step in (1, 2):
        said = [{"step": step, "prompt": "Who?", "text": f"answer {step}"}]
        client.post(f"runs/{model}/metrics", {"points": [], "samples": said})
    time.sleep(0.03)  # what pages of a user share is read again after page_seconds / 2
    after = signed_in.ask("/ui/state")["runs"][0]["samples"]

    assert before != after  # by which the page knows that there is something new
    samples = signed_in.ask(f"/ui/runs/{model}")["samples"]
    assert ["answer 2", "answer 1"] == [sample["text"] for sample in samples]


def test_a_stream_that_is_open_for_a_day_does_not_grow(monkeypatch):
    """By a simulated clock: 86,400 looks at a server where something changes every minute."""
    now = [0.0]

    async def sleep(seconds):
        now[0] += seconds

    shared = SimpleNamespace(stopping=False)
    metrics = SimpleNamespace(
        written_at=lambda run: int(now[0] // 60), read=lambda run, after: ([{"step": 1}], after + 1)
    )

    async def in_pool(function, *arguments):
        return function(*arguments)

    site = SimpleNamespace(
        ledger=SimpleNamespace(shared=shared, workshop=SimpleNamespace(metrics=metrics)),
        limits=SimpleNamespace(page_seconds=1.0),
        in_pool=in_pool,
    )
    states = {}

    async def state(call):
        minute = int(now[0] // 60)
        if minute not in states:
            states.clear()
            states[minute] = b"event: state\ndata: %d\n\n" % minute
        return states[minute]

    monkeypatch.setattr(endpoints, "overview_event", state)
    monkeypatch.setattr(endpoints, "_is_signed_in", lambda call: True)
    monkeypatch.setattr(endpoints, "asyncio", SimpleNamespace(sleep=sleep))
    monkeypatch.setattr(endpoints, "time", SimpleNamespace(monotonic=lambda: now[0]))

    async def day():
        kinds, memory = Counter(), {}
        async for told in endpoints._changes(SimpleNamespace(site=site), "run", 0):
            kinds[told.split(b"\n")[0]] += 1
            hour = int(now[0] // 3600)
            if hour not in memory:
                memory[hour] = tracemalloc.get_traced_memory()[0]
            shared.stopping = now[0] >= 86_400
        return kinds, memory

    tracemalloc.start()
    try:
        kinds, memory = asyncio.run(day())
    finally:
        tracemalloc.stop()

    assert 1441 == kinds[b"event: state"] == kinds[b"event: points"]
    assert 3 * 1440 == kinds[b": still here"]  # so that proxies keep it open
    assert memory[23] < memory[1] + 50_000


def test_what_another_user_s_model_is_called_is_not_shown(users, signed_in):
    """That something is computed is: it is why one's own operations wait."""
    bob = users.client_with("tml-b")
    model = bob.model()
    users.engine.gate.clear()
    bob.forward_backward(model, 1, [5])
    deadline = time.monotonic() + 10
    while signed_in.ask("/ui/state")["running"] is None:
        assert time.monotonic() < deadline
    state = signed_in.ask("/ui/state")
    users.engine.gate.set()

    assert "another user's model" == state["running"]
    assert model not in json.dumps(state)


def test_cookies_that_have_expired_are_forgotten_with_the_next_one():
    """Not only refused: each would keep a key in memory for ever."""
    now = [0.0]
    sign_ins = SignIns(lambda: now[0])
    for _ in range(3):
        sign_ins.give_cookie("k")
    now[0] = COOKIE_SECONDS + 1
    fresh = sign_ins.give_cookie("k")

    assert {fresh} == set(sign_ins._cookies)
