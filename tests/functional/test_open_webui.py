"""Open WebUI beside the server of each target, both with exactly the environment of the compose files, in a headless
Chromium.

MODELPRESS_VLLM_PYTHON: the Python of an environment with vLLM's CPU build; MODELPRESS_OPEN_WEBUI: the program
open-webui of another environment; MODELPRESS_SERVED_MODEL, MODELPRESS_SERVED_ONNX, MODELPRESS_SERVED_GGUF: folders with
exports of a model that chats (docs/deploying.md).
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from selenium import webdriver
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from tasks.deployment.write import write_serving
from tasks.environments import interpreter
from tasks.output import link_or_copy
from tasks.serving.llama_server import llama_server
from tasks.settings import check_settings
from tests.browser import needs_browser, open_browser
from tests.caddy import free_port
from tests.serving_files import HOST, KEY, PYTHON, Service, of_compose
from tests.waiting import soon

PROGRAM = os.environ.get("MODELPRESS_OPEN_WEBUI", "")
MODELS = {
    target: os.environ.get(f"MODELPRESS_SERVED_{name}", "")
    for target, name in {"vllm": "MODEL", "onnx": "ONNX", "gguf": "GGUF"}.items()
}
pytestmark = [
    pytest.mark.slow,
    needs_browser,
    pytest.mark.skipif(not PROGRAM, reason="MODELPRESS_OPEN_WEBUI names no program"),
]
# what counts the requests in work
RUNNING = {
    "vllm": "vllm:num_requests_running",
    "onnx": "onnx_server_requests_running",
    "gguf": "llamacpp:requests_processing",
}
START = float(os.environ.get("MODELPRESS_START_SECONDS", "300"))  # a start takes minutes on a busy machine
LONG = "Write a very long story about a lighthouse keeper. Describe every day of a whole year."


def made_bundle(folder: Path, target: str) -> Path:
    if not MODELS[target] or (target == "vllm" and not PYTHON):
        pytest.skip(f"an environment or the model of {target} is not named")
    for file in Path(MODELS[target]).iterdir():
        if file.is_file():
            link_or_copy(file, folder / file.name)
    params = yaml.safe_load(Path("params.yaml").read_text())
    write_serving(folder, check_settings(params), target, "gptq-int4")
    return folder


@dataclass
class Plain:
    """The server of compose.yaml as a process, for the targets onnx and gguf: the program that the image would bring,
    with the arguments and the environment of the file."""

    target: str
    bundle: Path
    log: Path

    def __enter__(self) -> Plain:
        engine = yaml.safe_load((self.bundle / "serve/compose.yaml").read_text())["services"]["model"]
        port = free_port()
        self.url = f"http://{HOST}:{port}"
        places = {"/model": str(self.bundle), "0.0.0.0": HOST, "8000": str(port)}
        arguments = [
            re.sub(r"^(/model(?=/|$)|0\.0\.0\.0$|8000$)", lambda f: places[f[0]], a) for a in engine["command"]
        ]
        environment = {"PATH": os.environ["PATH"]}
        environment |= {name: KEY if "API_KEY" in name else value for name, value in engine["environment"].items()}
        if self.target == "onnx":
            program = [str(interpreter("onnx")), "-m", "onnx_server"]
            environment["PYTHONPATH"] = str(self.bundle / "serve")
        else:
            program = [str(llama_server(progress=""))]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*program, *arguments],
                env=environment,
                cwd=self.log.parent,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(30)

    def wait(self, seconds: float) -> None:
        assert soon(lambda: answers(f"{self.url}/health"), seconds, 0.5), self.logs()

    def logs(self, _lines: int = 0) -> str:
        return self.log.read_text(errors="replace")

    def open(self, path: str) -> Any:
        asked = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {KEY}"})
        return urllib.request.urlopen(asked, timeout=60)


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


@pytest.mark.parametrize("target", list(MODELS))
def test_a_new_users_first_message_is_answered_streamed_and_stopped(target: str, tmp_path: Path) -> None:
    bundle = made_bundle(tmp_path / "bundle", target)
    server: Service | Plain
    if target == "vllm":
        server = Service(of_compose(bundle), bundle, tmp_path / "server")
    else:
        server = Plain(target, bundle, tmp_path / "server.log")
    with (
        server as service,
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
            assert soon(lambda: gauge(service, RUNNING[target]) == 0, 60, 0.5)
            text = answers_shown(browser)[-1]
            time.sleep(3)
            assert answers_shown(browser)[-1] == text
            assert target != "vllm" or gauge(service, 'finished_reason="abort"') >= 1
            assert " 400 " not in service.logs(1000)  # what a server answers to tools that it does not take
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


def gauge(service: Service | Plain, name: str) -> float:
    """The sum of a metric's values."""
    with service.open("/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if name in line and not line.startswith("#"))
