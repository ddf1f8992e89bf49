"""Chromium, driven by selenium, on a real server with the real engine."""

from __future__ import annotations

import shutil

import pytest
from selenium import webdriver

import tinkex
from tinkex.server.app import LocalServer


@pytest.fixture(scope="session")
def chromium():
    """A new browser for each size; closed at the end."""
    driver, binary = shutil.which("chromedriver"), shutil.which("chromium")
    if driver is None or binary is None:
        pytest.fail("the browser tests need chromium: apt install chromium chromium-driver")
    opened = []

    def open_browser(width=1200, height=900, dark=False):
        options = webdriver.ChromeOptions()
        options.binary_location = binary
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        for argument in (
            "--headless=new",
            "--no-sandbox",
            "--disable-dev-shm-usage",
            f"--window-size={width},{height}",
            *(["--force-dark-mode"] if dark else []),
        ):
            options.add_argument(argument)
        opened.append(webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)))
        opened[-1].execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]},
        )
        return opened[-1]

    yield open_browser
    for browser in opened:
        browser.quit()


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with LocalServer(tmp_path_factory.mktemp("home")) as running:
        yield running


@pytest.fixture(scope="session")
def service(server):
    with tinkex.ServiceClient(base_url=server.url, api_key="tml-any") as client:
        yield client
