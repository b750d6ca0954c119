"""Open WebUI beside vLLM, both with exactly the environment of the compose files, in a headless Chromium.

MODELPRESS_VLLM_PYTHON: the Python of an environment with vLLM's CPU build; MODELPRESS_OPEN_WEBUI: the program
open-webui of another environment; MODELPRESS_SERVED_MODEL: a folder with a model that chats (docs/deploying.md).
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from selenium import webdriver
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from tasks.deployment.write import write_serving
from tasks.output import link_or_copy
from tasks.settings import check_settings
from tests.browser import needs_browser, open_browser
from tests.caddy import free_port
from tests.serving_files import HOST, KEY, PYTHON, Service, of_compose
from tests.waiting import soon

PROGRAM, MODEL = os.environ.get("MODELPRESS_OPEN_WEBUI", ""), os.environ.get("MODELPRESS_SERVED_MODEL", "")
pytestmark = [
    pytest.mark.slow,
    needs_browser,
    pytest.mark.skipif(not (PYTHON and PROGRAM and MODEL), reason="an environment or the model is not named"),
]
START = float(os.environ.get("MODELPRESS_START_SECONDS", "300"))  # a start takes minutes on a busy machine
LONG = "Write a very long story about a lighthouse keeper. Describe every day of a whole year."


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("webui") / "bundle"
    for file in Path(MODEL).iterdir():
        if file.is_file():
            link_or_copy(file, folder / file.name)
    params = yaml.safe_load(Path("params.yaml").read_text())
    write_serving(folder, check_settings(params), "vllm", "gptq-int4")
    return folder


@contextmanager
def open_webui(bundle: Path, server: str, data: Path) -> Iterator[str]:
    """Open WebUI as compose.webui.yaml describes it; its address."""
    settings = yaml.safe_load((bundle / "serve/compose.webui.yaml").read_text())["services"]["webui"]["environment"]
    variables = {"API_KEY": KEY, "WEBUI_SECRET_KEY": "another secret"}

    def here(value: str) -> str:
        value = re.sub(r"\$\{(\w+):\?[^}]*\}", lambda found: variables[found[1]], value)
        return value.replace("http://model:8000", server).replace("/data", str(data))

    port = free_port()
    environment = {"PATH": os.environ["PATH"]} | {name: here(value) for name, value in settings.items()}
    command = [PROGRAM, "serve", "--host", HOST, "--port", str(port)]
    data.mkdir()
    with (data.parent / "webui.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, cwd=data, stdout=log, stderr=log, start_new_session=True)
    try:
        url = f"http://{HOST}:{port}"
        assert soon(lambda: answers(f"{url}/health"), START, 1), (data.parent / "webui.log").read_text()[-3000:]
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def test_a_new_users_first_message_is_answered_streamed_and_stopped(bundle: Path, tmp_path: Path) -> None:
    with (
        Service(of_compose(bundle), bundle, tmp_path / "vllm") as service,
        open_webui(bundle, service.url, tmp_path / "data") as url,
    ):
        service.wait(START)
        browser = open_browser(tmp_path / "profile")
        try:
            sign_up(browser, url)
            say(browser, LONG)
            assert len(growth(browser, 1)) >= 3  # streamed
            browser.save_screenshot(str(tmp_path / "streaming.png"))
            (stop,) = shown(browser, STOP)
            stop.click()
            assert soon(lambda: not shown(browser, STOP), 30)
            assert soon(lambda: gauge(service, "vllm:num_requests_running") == 0, 60, 0.5)
            text = answers_shown(browser)[-1]
            time.sleep(3)
            assert answers_shown(browser)[-1] == text
            assert gauge(service, 'finished_reason="abort"') >= 1
            assert " 400 " not in service.logs(1000)  # what vLLM answers to tools that it has no parser for
        finally:
            browser.save_screenshot(str(tmp_path / "last.png"))
            browser.quit()


ANSWER, STOP, INPUT = "#response-content-container", "button[aria-label='Stop']", "#chat-input"


def shown(browser: webdriver.Chrome, selector: str, words: str = "") -> list[WebElement]:
    """The visible elements that contain the words, found at one moment, because the page changes all the time."""
    found = "return [...document.querySelectorAll(arguments[0])]"
    found += ".filter(one => one.checkVisibility() && one.innerText.includes(arguments[1]))"
    return list(browser.execute_script(found, selector, words))


def answers_shown(browser: webdriver.Chrome) -> list[str]:
    """The texts of the model's answers."""
    found = "return [...document.querySelectorAll(arguments[0])].map(one => one.innerText)"
    return list(browser.execute_script(found, ANSWER))


def sign_up(browser: webdriver.Chrome, url: str) -> None:
    """Create the first account."""
    browser.get(url)
    assert soon(lambda: shown(browser, "button"), 120)
    if not shown(browser, "input[type=email]"):
        shown(browser, "button")[0].click()  # get started
    assert soon(lambda: shown(browser, "input[type=email]"), 60)
    for name, value in (("name", "Ada"), ("email", "ada@example.org")):
        shown(browser, f"input[autocomplete={name}]")[0].send_keys(value)
    for field in shown(browser, "input[type=password]"):
        field.send_keys("a long password")
    shown(browser, "button[type=submit]")[0].click()
    assert soon(lambda: shown(browser, INPUT), 120)
    close = soon(lambda: shown(browser, "button", "Okay, Let's Go!"), 60)  # what is new
    assert close
    browser.execute_script("arguments[0].click()", close[0])
    assert soon(lambda: not shown(browser, "button", "Okay, Let's Go!"), 20)


def say(browser: webdriver.Chrome, text: str) -> None:
    assert soon(lambda: shown(browser, INPUT), 60)
    shown(browser, INPUT)[0].send_keys(text)
    shown(browser, INPUT)[0].send_keys(Keys.ENTER)


def growth(browser: webdriver.Chrome, number: int) -> list[int]:
    """The first lengths of the text of an answer, each longer than the one before."""
    lengths: list[int] = []
    end = time.monotonic() + 180
    while len(lengths) < 5 and time.monotonic() < end:
        answers = answers_shown(browser)
        if len(answers) == number and len(answers[-1]) > (lengths[-1] if lengths else 0):
            lengths.append(len(answers[-1]))
        if lengths and not shown(browser, STOP):
            break
        time.sleep(0.1)
    return lengths


def gauge(service: Service, name: str) -> float:
    """The sum of a metric's values."""
    with service.open("/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if name in line and not line.startswith("#"))
