"""The page in a real browser: what a person sees and does. `make browser` runs it.

BROWSER_SCREENSHOTS names a folder for pictures of the page; `make screenshots` sets it.
"""

from __future__ import annotations

import functools
import http.server
import os
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from tests.support.fake_engine import FakeEngine
from tests.support.wire_client import WireClient
from tinkex import types
from tinkex.server.app import LocalServer

SCREENSHOTS = os.environ.get("BROWSER_SCREENSHOTS")
EVIL = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
SENTENCES = [f"Sentence {i}: the quick brown fox jumps over the lazy dog." for i in range(4)]

#: Note the length of all answers together whenever one changes.
NOTE_LENGTHS = """
window.lengths = [];
const place = document.getElementById("answers");
new MutationObserver(() => lengths.push(place.textContent.length))
    .observe(place, {subtree: true, childList: true, characterData: true});
"""


def wait(browser, condition, seconds=30):
    redrawn = [StaleElementReferenceException]  # between finding an element and looking at it
    waiting = WebDriverWait(browser, seconds, poll_frequency=0.05, ignored_exceptions=redrawn)
    return waiting.until(lambda _: condition())


def text(browser, selector):
    return browser.find_element(By.CSS_SELECTOR, selector).text


def all_of(browser, selector):
    return browser.find_elements(By.CSS_SELECTOR, selector)


class Run:
    """A training run of "tiny" on a few sentences."""

    def __init__(self, service, **metadata):
        self.training = service.create_lora_training_client("tiny", user_metadata=metadata)
        tokens = [self.training.encode(sentence) for sentence in SENTENCES]
        self.data = [
            types.Datum(types.ModelInput.from_ints(ids[:-1]), {"target_tokens": ids[1:]})
            for ids in tokens
        ]

    def train(self, steps):
        for _ in range(steps):
            self.training.forward_backward(self.data, "cross_entropy")
            done = self.training.optim_step(types.AdamParams(learning_rate=3e-3))
        done.result()

    def save(self, name):
        self.training.save_weights_for_sampler(name).result()


@pytest.fixture(scope="module")
def run(service):
    made = Run(service, name="sentences", note=EVIL)
    made.train(60 if SCREENSHOTS else 5)
    made.save("first")
    return made


@pytest.fixture(scope="module")
def browser(chromium, server, run):
    opened = chromium()
    opened.get(server.url)
    wait(opened, lambda: all_of(opened, "#checkpoints tbody tr"))
    return opened


def curve(browser):
    """The corners of the loss curve."""
    (line,) = all_of(browser, "figure[data-metric=loss] polyline")
    return line.get_attribute("points").split()


def test_the_curve_moves_while_the_run_trains(browser, run):
    before = wait(browser, lambda: curve(browser))
    run.train(5)

    wait(browser, lambda: len(curve(browser)) == len(before) + 5)
    assert "step 10" in text(browser, "#run-status")


def test_an_answer_of_the_tuned_model_appears_beside_the_base_model_s(browser):
    browser.find_element(By.ID, "prompt").send_keys("Sentence 1")
    browser.find_element(By.ID, "plain").click()
    browser.find_element(By.ID, "most-tokens").clear()
    browser.find_element(By.ID, "most-tokens").send_keys("200")
    browser.execute_script(NOTE_LENGTHS)
    browser.find_element(By.ID, "send").click()
    wait(browser, lambda: all_of(browser, ".answer pre"))
    wait(browser, lambda: browser.find_element(By.ID, "send").is_enabled())

    titles = [title.text for title in all_of(browser, ".answer h3")]
    assert ["Base model tiny", "Fine-tuned"] == titles
    assert [] == all_of(browser, ".answer .error")
    lengths = browser.execute_script("return lengths")
    assert lengths == sorted(lengths) and len(set(lengths)) >= 3  # it came piece by piece


def test_an_answer_can_be_stopped(browser):
    field = browser.find_element(By.ID, "most-tokens")
    field.clear()
    field.send_keys("4000")
    browser.find_element(By.ID, "send").click()
    wait(browser, lambda: all_of(browser, ".answer pre") and text(browser, ".answer pre"))
    browser.find_element(By.ID, "stop").click()

    wait(browser, lambda: browser.find_element(By.ID, "send").is_enabled())


def test_a_refusal_is_shown_where_the_answer_would_be(browser):
    """Such as for a model that has been deleted."""
    browser.execute_script("document.getElementById('model').selectedOptions[0].value = 'gone'")
    browser.find_element(By.ID, "send").click()

    wait(browser, lambda: all_of(browser, ".answer .error"))
    assert "gone" in text(browser, ".answer .error")


def test_deleting_asks_first(browser, run):
    run.save("second")
    wait(browser, lambda: len(all_of(browser, "#checkpoints tbody tr")) == 2)

    def press_delete():
        all_of(browser, "#checkpoints tbody tr:last-child button.danger")[0].click()
        wait(browser, lambda: browser.find_element(By.ID, "confirm").is_displayed())

    press_delete()
    assert "sampler_weights/second" in text(browser, "#confirm-text")
    assert "Keep it" == browser.switch_to.active_element.text  # Enter by mistake keeps it
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    assert 2 == len(all_of(browser, "#checkpoints tbody tr"))
    press_delete()
    browser.find_element(By.CSS_SELECTOR, "#confirm .danger").click()

    wait(browser, lambda: len(all_of(browser, "#checkpoints tbody tr")) == 1)


def test_names_and_metadata_stay_text(browser, service):
    made = Run(service, name=EVIL)
    made.train(1)
    made.save("third")
    button = wait(
        browser,
        lambda: next((one for one in all_of(browser, "#runs button") if EVIL in one.text), None),
    )
    button.click()
    wait(browser, lambda: text(browser, "#run-title") == EVIL)
    browser.find_element(By.CSS_SELECTOR, "#run summary").click()

    assert EVIL in text(browser, "#settings")
    assert "tinkex" == browser.title
    assert [] == all_of(browser, "#page img")


def test_the_page_is_used_by_keyboard_alone(browser):
    """Every control is reached by Tab, in the order in which it stands, and has a name."""
    browser.refresh()
    wait(browser, lambda: all_of(browser, "#runs button"))
    browser.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    assert "Skip to the run" == browser.switch_to.active_element.text
    unnamed = browser.execute_script(
        "return [...document.querySelectorAll('input, select, textarea')]"
        ".filter((one) => !one.closest('label')).map((one) => one.id)"
    )
    assert [] == unnamed
    last = all_of(browser, "#runs button")[-1].get_attribute("title")
    while browser.switch_to.active_element.get_attribute("title") != last:
        browser.switch_to.active_element.send_keys(Keys.TAB)
    browser.switch_to.active_element.send_keys(Keys.ENTER)

    wait(browser, lambda: browser.find_element(By.ID, "run-title").get_attribute("title") == last)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1200, 400], ids=["wide", "phone"])
def test_the_page_fits(chromium, server, run, width, dark):
    """No sideways scrolling; what a screenshot shows."""
    opened = chromium(width, 900, dark)
    opened.get(server.url)
    wait(opened, lambda: all_of(opened, "figure polyline"))
    wide = opened.execute_script("return document.documentElement.scrollWidth - innerWidth")
    background = opened.execute_script("return getComputedStyle(document.body).backgroundColor")

    assert 0 >= wide
    assert dark == (background != "rgb(255, 255, 255)")
    if SCREENSHOTS and dark == (width == 400):  # one of each is enough
        name = "page-phone.png" if width == 400 else "page.png"
        assert opened.save_screenshot(str(Path(SCREENSHOTS) / name))


def test_the_page_comes_back_when_the_server_does(chromium, tmp_path):
    """It says that the connection is lost, and shows the server again when it is back."""
    from tests.support.processes import ServerProcess

    server = ServerProcess(tmp_path / "home")
    server.start()
    try:
        opened = chromium()
        opened.get(f"http://127.0.0.1:{server.port}")
        wait(opened, lambda: all_of(opened, "#server dd"))
        server.kill()
        wait(opened, lambda: "connection" in text(opened, "#notice"))
        server.start()
        wait(opened, lambda: not opened.find_element(By.ID, "notice").is_displayed())
    finally:
        server.close()


#: What a page from elsewhere could try: to read, to act without being able to read, to listen.
FROM_ELSEWHERE = """
const [url, done] = arguments;
const outcome = {};
const body = JSON.stringify({type: "create_session", tags: [], sdk_version: "1"});
(async () => {
  const tries = {
    read: () => fetch(`${url}/ui/state`, {credentials: "include"}),
    act: () => fetch(`${url}/api/v1/create_session`, {method: "POST", mode: "no-cors", body}),
    chat: () => fetch(`${url}/v1/completions`, {method: "POST", body,
      headers: {"Content-Type": "application/json"}}),
  };
  for (const [name, attempt] of Object.entries(tries)) {
    const said = (answer) => `${answer.type} ${answer.status}`;
    outcome[name] = await attempt().then(said, () => "blocked");
  }
  outcome.listen = await new Promise((resolve) => {
    const stream = new EventSource(`${url}/ui/events`);
    stream.onopen = () => resolve("open");
    stream.onerror = () => { stream.close(); resolve("blocked"); };
  });
  done(outcome);
})();
"""


def test_a_page_from_another_origin_sees_and_does_nothing(chromium, tmp_path):
    """Another port of this machine, on a server that asks for no key."""
    elsewhere = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0),
        functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path)),
    )
    threading.Thread(target=elsewhere.serve_forever, daemon=True).start()
    with LocalServer(tmp_path / "home", engine=FakeEngine) as server:
        opened = chromium()
        opened.set_script_timeout(30)
        opened.get(f"http://127.0.0.1:{elsewhere.server_port}/")
        outcome = opened.execute_async_script(FROM_ELSEWHERE, server.url)
        client = WireClient(server.url)
        sessions = client.get("sessions")["sessions"]
        client.http.close()
    elsewhere.shutdown()
    elsewhere.server_close()

    # "opaque": it was sent, and the page cannot read the 403.
    expected = {"read": "blocked", "act": "opaque 0", "chat": "blocked", "listen": "blocked"}
    assert expected == outcome
    assert [] == sessions


def test_samples_of_a_run_are_shown_as_text(browser, service, run):
    """As soon as they are reported."""
    browser.find_element(By.CSS_SELECTOR, f'#runs button[title="{run.training.model_id}"]').click()
    service.create_rest_client().report_run_metrics(
        run.training.model_id, [], [types.RunSample(10, "Who went to sea?", EVIL)]
    )
    wait(browser, lambda: all_of(browser, "#samples tbody tr"))
    browser.find_element(By.CSS_SELECTOR, "#said summary").click()

    assert "10 Who went to sea? " + EVIL == text(browser, "#samples tbody tr")
    assert [] == all_of(browser, "#page img")


def test_a_run_that_is_deleted_while_it_is_in_view(chromium, tmp_path):
    """The page tells it, and shows the others."""
    with LocalServer(tmp_path / "home", engine=FakeEngine) as server:
        client = WireClient(server.url)
        gone, kept = client.model(), client.model()
        opened = chromium()
        opened.get(server.url)
        wait(opened, lambda: len(all_of(opened, "#runs button")) == 2)
        opened.find_element(By.CSS_SELECTOR, f'#runs button[title="{gone}"]').click()
        wait(opened, lambda: gone == title_of(opened))
        index = tmp_path / "home" / "tinkex.sqlite"
        with closing(sqlite3.connect(index)) as database, database:
            database.execute("DELETE FROM runs WHERE run_id = ?", (gone,))
        wait(opened, lambda: "deleted" in text(opened, "#notice"))
        assert not opened.find_element(By.ID, "run").is_displayed()
        opened.find_element(By.CSS_SELECTOR, f'#runs button[title="{kept}"]').click()
        wait(opened, lambda: kept == title_of(opened))
        client.http.close()


def title_of(browser):
    return browser.find_element(By.ID, "run-title").get_attribute("title")


#: Server-sent events of a simulated day, as the page would get them.
EVENTS = """
window.EventSource = class extends EventTarget {
  constructor(url) { super(); window.told = this; }
  close() {}
};
"""
HOURS = """
const [id, from, to] = arguments;
const tell = (name, value) =>
  told.dispatchEvent(new MessageEvent(name, {data: JSON.stringify(value)}));
const state = await (await fetch("/ui/state")).json();
for (let minute = from * 60; minute < to * 60; minute++) {
  state.server.minutes = minute;
  state.runs[0].latest = {step: minute, loss: 1 / (minute + 1), tokens_per_second: 10};
  tell("state", state);
  const points = [0, 1, 2, 3, 4].map((i) => ({step: minute * 5 + i, loss: Math.sin(minute)}));
  tell("points", {run: id, points, next: minute + 1});
}
return document.getElementsByTagName("*").length;
"""


def test_a_page_that_is_open_for_a_day_does_not_grow(chromium, server, run):
    """By simulated events: 1,440 states and 7,200 points of a run in view."""
    opened = chromium()
    opened.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": EVENTS})
    opened.execute_cdp_cmd("Performance.enable", {})
    opened.set_script_timeout(120)
    opened.get(server.url)
    opened.find_element(By.TAG_NAME, "body")
    wait(opened, lambda: title_of(opened))
    identity = title_of(opened)

    def used(start, end):
        """Elements of the page, and what the browser holds, after some hours."""
        elements = opened.execute_script(
            "return (async function() {" + HOURS + "}).apply(null, arguments)",
            identity,
            start,
            end,
        )
        for _ in range(2):
            opened.execute_cdp_cmd("HeapProfiler.collectGarbage", {})
        found = opened.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
        held = {metric["name"]: metric["value"] for metric in found}
        return elements, held["JSHeapUsedSize"] / 1e6, held["Nodes"], held["JSEventListeners"]

    early, late = used(0, 4), used(4, 24)
    print(f"after 4 h and 24 h: elements, MB, nodes, listeners: {early}, {late}")

    assert early[0] == late[0]
    assert late[1] < early[1] + 2
    assert late[2] < 1.5 * early[2] and late[3] < 1.5 * early[3]


def test_nothing_was_blocked_and_no_script_failed(browser):
    """The last test of this browser: what its console holds."""
    console = [entry["message"] for entry in browser.get_log("browser")]
    expected = ("status of 404", "net::ERR")  # the refusal above
    assert [] == [line for line in console if not any(part in line for part in expected)]
