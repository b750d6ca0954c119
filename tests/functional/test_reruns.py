"""The stages that DVC finds out of date after a change in the code; no stage runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo

from tests.functional.toy import PROJECT

VARIANTS = ("base", "int8")
CODE = ("tasks", "evals", "locks", "dvc.yaml", "params.yaml", "pyproject.toml", ".dvcignore")


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project in which, according to DVC, every stage has run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    for name in CODE:
        copy = shutil.copytree if (PROJECT / name).is_dir() else shutil.copy
        copy(PROJECT / name, tmp_path / name)
    params = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    params["variants"] = {name: params["variants"][name] for name in VARIANTS}
    Path("params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    with Repo.init(".", no_scm=True) as repo:
        for out in (out for stage in repo.index.stages for out in stage.outs):
            # other stages read a part of some folders
            path, parts = Path(out.fs_path), ("source.json", "sources.json", "transformers/summary.json")
            for file in [path] if path.suffix else [path / part for part in parts]:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(out.def_path, encoding="utf-8")
        repo.commit(force=True)
        assert repo.status() == {}
    return tmp_path


def test_a_comment_in_a_solver_leaves_all_but_quantize_up_to_date(finished: Path) -> None:
    with (finished / "tasks/solvers/gptq.py").open("a", encoding="utf-8") as file:
        file.write("# a comment\n")
    with Repo(str(finished)) as repo:
        changed = [{"changed deps": {"tasks/solvers/gptq.py": "modified"}}]
        assert repo.status() == {f"quantize@{name}": changed for name in VARIANTS}
