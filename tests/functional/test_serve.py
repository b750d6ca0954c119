"""`modelpress serve` with real servers: the form in a browser, schedules, cancelling and listening addresses."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from flows.server.ephemeral import free_port
from tests.browser import needs_browser, open_browser
from tests.functional.toy import PROJECT, Toy
from tests.waiting import soon

TOKEN = "hf_planted_" + "x" * 20
PATIENCE = 300.0  # seconds; operations that take a few on an idle machine may take this long on a busy one
SCREENSHOTS = PROJECT / ".screenshots"


@dataclass
class Served:
    """A toy pipeline with its running server."""

    toy: Toy
    process: subprocess.Popen[str]
    pages: str
    arguments: tuple[str, ...]
    links: dict[str, str]

    def api(self, path: str, body: Any = None, method: str = "POST") -> Any:
        """Call Prefect's API and return the response."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.pages}/api{path}", data, {"Content-Type": "application/json"}, method=method
        )
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            try:
                with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                    text = answer.read()
                return json.loads(text) if text else None
            except urllib.error.HTTPError as error:
                if error.code != 503:  # the database is busy
                    raise
                time.sleep(1)
        raise AssertionError(f"{path}: busy for {PATIENCE:.0f} s")

    def deployment(self, name: str) -> dict[str, Any]:
        return dict(self.api(f"/deployments/name/press/{name}", method="GET"))

    def run(self, name: str, deployment: str = "on-demand", **parameters: Any) -> str:
        """Start a deployed run like the form; return its id."""
        path = f"/deployments/{self.deployment(deployment)['id']}/create_flow_run"
        return str(self.api(path, {"name": name, "parameters": parameters})["id"])

    def flow_run(self, flow_run: str) -> dict[str, Any]:
        return dict(self.api(f"/flow_runs/{flow_run}", method="GET"))

    def state(self, flow_run: str) -> str:
        return str(self.flow_run(flow_run)["state_name"])

    def runs(self, deployment: str) -> list[dict[str, Any]]:
        """The started flow runs of a deployment."""
        wanted = {
            "deployments": {"id": {"any_": [self.deployment(deployment)["id"]]}},
            "sort": "EXPECTED_START_TIME_ASC",
        }
        return [run for run in self.api("/flow_runs/filter", wanted) if run["state_name"] not in ("Scheduled", "Late")]

    def processes(self, part: str) -> list[psutil.Process]:
        """The processes whose working directory contains `part`."""
        found = []
        for process in psutil.process_iter():
            try:
                if part in process.cwd():
                    found.append(process)
            except psutil.Error:
                continue
        return found


@pytest.fixture(scope="module")
def served(prefect_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The server on free ports, with a toy pipeline."""
    toy = Toy.create(tmp_path_factory.mktemp("served") / "toy")
    (toy.root / ".prefect").mkdir()
    shutil.copy(prefect_database, toy.root / ".prefect")
    shutil.copy(PROJECT / "prefect.yaml", toy.root)
    (toy.root / "flows").symlink_to(PROJECT / "flows")  # the flow's path in prefect.yaml
    ports = [free_port(), free_port()]
    arguments = ("serve", "--port", str(ports[0]), "--mlflow-port", str(ports[1]))
    log = toy.root / "serve.log"
    quick = {
        "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "2",
        "PREFECT_SERVER_SERVICES_SCHEDULER_RECENT_DEPLOYMENTS_LOOP_SECONDS": "2",
        "PREFECT_SERVER_DEPLOYMENTS_CONCURRENCY_SLOT_WAIT_SECONDS": "5",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "PREFECT_API_REQUEST_TIMEOUT": str(PATIENCE),  # for worker and runs, because the machine may be busy
    }
    process = toy.start_cli(
        *arguments, PREFECT_HOME=str(toy.root / ".prefect"), PREFECT_API_URL="", HF_TOKEN=TOKEN, **quick
    )
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if "Ctrl-C" in line:
            break
    log.write_text("".join(lines))
    assert process.poll() is None, lines
    links = dict(line.rstrip().rsplit("  ", 1) for line in lines if "://" in line)
    links = {what.strip(): link.strip() for what, link in links.items()}
    yield Served(toy, process, f"http://127.0.0.1:{ports[0]}", arguments, links)
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 130
    assert soon(lambda: not Served(toy, process, "", (), {}).processes(str(toy.root)), 60)


def test_a_second_service_prints_the_addresses_and_starts_nothing(served: Served) -> None:
    again = served.toy.call(*served.arguments)
    assert again.returncode == 0, again.stderr
    assert served.pages in again.stdout
    assert "already running" in again.stdout


def test_nothing_listens_beyond_this_machine(served: Served) -> None:
    ours = {process.pid for process in served.processes(str(served.toy.root))}
    connections: list[Any] = [c for c in psutil.net_connections("inet") if c.pid in ours]
    listening = [connection for connection in connections if connection.status == psutil.CONN_LISTEN]
    assert len(listening) >= 2
    assert {connection.laddr.ip for connection in listening} == {"127.0.0.1"}


@pytest.mark.parametrize(("parameters", "name"), [({"samples": 0}, "samples"), ({"variants": ["int5"]}, "variants")])
def test_a_bad_value_is_refused_by_name_before_a_run_starts(
    served: Served, parameters: dict[str, Any], name: str
) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        served.run("bad", **parameters)
    assert caught.value.code == 409
    assert name in caught.value.read().decode()


@needs_browser
def test_a_user_fills_in_the_form_and_opens_the_results(served: Served, browser: webdriver.Chrome) -> None:
    browser.get(served.links["start a run"])
    samples = wait_for(browser, "//label[contains(., 'samples')]/following::input[1]")
    assert samples.get_attribute("value") == "32"
    fill(browser, "Run Name", "By Hand")
    fill(browser, "gate_four_bit", "0.85")
    browser.save_screenshot(str(SCREENSHOTS / "form.png"))
    submit = wait_for(browser, "//button[@type='submit']")

    def runs() -> list[dict[str, Any]]:
        return [run for run in served.runs("on-demand") if run["name"] == "By Hand"]

    submit.click()
    if not soon(runs, 20):
        submit.click()  # the page ignores clicks while it validates the input
    (run,) = soon(runs, PATIENCE)
    assert run["parameters"]["gate_four_bit"] == 0.85
    assert soon(lambda: served.state(run["id"]) == "Completed", PATIENCE)
    browser.get(f"{served.pages}/runs/flow-run/{run['id']}")
    wait_for(browser, "//*[contains(text(), 'Completed')]")
    browser.save_screenshot(str(SCREENSHOTS / "run.png"))
    kinds = {"artifacts": {"flow_run_id": {"any_": [run["id"]]}}}
    artifacts = {a["key"]: a for a in served.api("/artifacts/filter", kinds)}
    assert {"variants-transformers", "result-transformers", "kept", "mlflow"} <= set(artifacts)
    browser.get(f"{served.pages}/artifacts/artifact/{artifacts['result-transformers']['id']}")
    wait_for(browser, "//tr[td[contains(., 'int8')] and td[contains(., '97.0 (95.0 to 99.0)')]]")
    assert "Winner: int8" in browser.page_source
    browser.save_screenshot(str(SCREENSHOTS / "result.png"))
    assert "run/by-hand" in served.toy.command("git", "tag", "--list")
    browser.get(served.links["runs, MLflow"])
    wait_for(browser, "//*[@role='gridcell'][contains(., 'int8')]")
    for column in ("report.retention.mean", "report.size_bytes", "scheme"):
        wait_for(browser, f"//*[@role='columnheader'][contains(., '{column}')]")
    browser.save_screenshot(str(SCREENSHOTS / "mlflow.png"))


def test_cancelling_ends_every_process_of_the_run(served: Served) -> None:
    served.toy.wish("quantize@int8", "sleep 100")
    commit(served.toy, "wish")
    run = served.run("to cancel", changes_to_params=["variants.int8.smoothing=0.11"])
    place = "/.modelpress/runs/to-cancel"
    assert soon(lambda: any("stage.py" in " ".join(p.cmdline()) for p in served.processes(place)), PATIENCE)
    served.api(f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
    assert soon(lambda: not served.processes(place), 60)
    assert soon(lambda: served.state(run) == "Cancelled", PATIENCE)
    assert "cancelled" in served.toy.call("runs").stdout
    (served.toy.root / "wish/quantize@int8").write_text("")
    commit(served.toy, "no wish")


@pytest.fixture
def held(served: Served) -> Iterator[Callable[[str], None]]:
    """Make runs wait in quantize@int8, unless it is cached. The yielded function releases a run by its name."""
    served.toy.wish("quantize@int8", "wait")
    commit(served.toy, "wish")
    yield lambda name: (served.toy.root / ".modelpress/runs" / name / "go-quantize@int8").touch()
    (served.toy.root / "wish/quantize@int8").write_text("")
    commit(served.toy, "no wish")


@pytest.mark.slow
def test_a_nightly_run_beside_another_is_refused(served: Served, held: Callable[[str], None]) -> None:
    runs = {
        name: served.run(name, "nightly", changes_to_params=["variants.int8.smoothing=0.12"])
        for name in ("night-1", "night-2")
    }
    assert soon(lambda: "Cancelled" in map(served.state, runs.values()), PATIENCE)
    (refused,) = (name for name, run in runs.items() if served.state(run) == "Cancelled")
    (first,) = set(runs) - {refused}
    assert served.flow_run(runs[refused])["state"]["message"] == "Deployment concurrency limit reached."
    assert soon((served.toy.root / f".modelpress/runs/{first}/dvc.yaml").exists, PATIENCE)
    held(first)
    assert soon(lambda: served.state(runs[first]) == "Completed", PATIENCE)
    assert served.toy.command("git", "tag", "--list", "run/night-*").split() == [f"run/{first}"]


@pytest.mark.slow
def test_the_fifth_run_on_demand_waits_for_one_of_four(served: Served, held: Callable[[str], None]) -> None:
    runs = {
        f"run-{n}": served.run(f"run-{n}", variants=["int8"], changes_to_params=["variants.int8.smoothing=0.13"])
        for n in range(5)
    }

    def states() -> list[str]:
        return sorted(served.state(run) for run in runs.values())

    assert soon(lambda: states() == ["AwaitingConcurrencySlot", *["Running"] * 4], PATIENCE)
    (fifth,) = (name for name, run in runs.items() if served.state(run) == "AwaitingConcurrencySlot")
    for name in set(runs) - {fifth}:
        assert soon((served.toy.root / f".modelpress/runs/{name}/dvc.yaml").exists, PATIENCE)
        held(name)
    assert soon(lambda: states() == ["Completed"] * 5, 2 * PATIENCE)
    ends = [served.flow_run(run)["end_time"] for name, run in runs.items() if name != fifth]
    assert min(ends) <= served.flow_run(runs[fifth])["start_time"]


def test_a_scheduled_run_starts_and_finishes(served: Served) -> None:
    nightly = served.deployment("nightly")
    assert [s["schedule"]["cron"] for s in nightly["schedules"]] == ["0 3 * * *"]
    # soon, and repeatedly in case the machine is too busy for the first one
    soon_after = (datetime.now(UTC) + timedelta(seconds=8)).isoformat()
    often = [{"schedule": {"interval": 60, "anchor_date": soon_after}, "active": True}]
    (schedule,) = served.api(f"/deployments/{nightly['id']}/schedules", often)

    def ends() -> list[tuple[str, bool]]:
        return [(run["state_name"], run["auto_scheduled"]) for run in served.runs("nightly")]

    try:
        assert soon(lambda: ("Completed", True) in ends(), PATIENCE)
    finally:
        served.api(f"/deployments/{nightly['id']}/schedules/{schedule['id']}", method="DELETE")


def test_the_token_is_not_leaked(served: Served) -> None:
    """After finished, cancelled and scheduled runs, no log, database or commit contains the token."""
    files = [path for path in served.toy.root.rglob("*") if path.is_file() and not path.is_symlink()]
    assert any(path.name == "prefect.db" for path in files)
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []
    assert TOKEN not in served.toy.command("git", "log", "--all", "--patch")


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[webdriver.Chrome]:
    SCREENSHOTS.mkdir(exist_ok=True)
    chrome = open_browser(tmp_path / "browser")
    yield chrome
    chrome.quit()


def wait_for(browser: webdriver.Chrome, xpath: str) -> WebElement:
    return WebDriverWait(browser, PATIENCE).until(lambda b: b.find_element(By.XPATH, xpath))


def fill(browser: webdriver.Chrome, label: str, text: str) -> None:
    field = wait_for(browser, f"//label[contains(., '{label}')]/following::*[self::input or self::textarea][1]")
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys(text)


def commit(toy: Toy, message: str) -> None:
    toy.command("git", "add", "wish")
    toy.command("git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "--quiet", "--message", message)
