from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from flows.execution.output_backup import KEPT, kept, recover


def _model(root: Path, text: str) -> None:
    (root / "models/a").mkdir(parents=True, exist_ok=True)
    (root / "models/a/weights").write_text(text)
    (root / "metrics.json").write_text(text)


def _remove(root: Path) -> None:
    """Delete a stage's outputs, as DVC does before running it."""
    (root / "models/a/weights").unlink()
    (root / "models/a").rmdir()
    (root / "metrics.json").unlink()


OUTS = ["models/a", "metrics.json", "never/there"]


def test_successful_stage_leaves_only_its_outputs(tmp_path: Path) -> None:
    _model(tmp_path, "old")
    with kept(tmp_path, "stage@a", OUTS):
        _remove(tmp_path)
        _model(tmp_path, "new")
    assert (tmp_path / "models/a/weights").read_text() == "new"
    assert not list((tmp_path / KEPT).iterdir())


def test_failed_stage_restores_its_outputs(tmp_path: Path) -> None:
    _model(tmp_path, "old")
    inode = (tmp_path / "models/a/weights").stat().st_ino
    with contextlib.suppress(RuntimeError), kept(tmp_path, "stage@a", OUTS):
        _remove(tmp_path)
        (tmp_path / "models/a").mkdir()
        (tmp_path / "models/a/half").write_text("half")
        raise RuntimeError
    assert [p.name for p in (tmp_path / "models/a").iterdir()] == ["weights"]
    assert (tmp_path / "models/a/weights").read_text() == "old"
    # the same inode: no copy was made, and DVC does not need to hash it again
    assert (tmp_path / "models/a/weights").stat().st_ino == inode
    assert (tmp_path / "metrics.json").read_text() == "old"
    assert not (tmp_path / "never").exists()
    assert not list((tmp_path / KEPT).iterdir())


def test_next_run_restores_the_backup_of_a_killed_one(tmp_path: Path) -> None:
    _model(tmp_path, "old")
    killed = kept(tmp_path, "stage@a", OUTS)
    killed.__enter__()  # never exited
    _remove(tmp_path)
    (tmp_path / "metrics.json").write_text("new")
    assert recover(tmp_path) == ["models/a"]
    assert (tmp_path / "models/a/weights").read_text() == "old"
    assert (tmp_path / "metrics.json").read_text() == "new"
    assert recover(tmp_path) == []


def test_retry_keeps_the_first_backup(tmp_path: Path) -> None:
    _model(tmp_path, "old")
    killed = kept(tmp_path, "stage@a", OUTS)
    killed.__enter__()  # never exited
    _remove(tmp_path)
    (tmp_path / "models/a").mkdir()
    (tmp_path / "models/a/half").write_text("half")
    with contextlib.suppress(RuntimeError), kept(tmp_path, "stage@a", OUTS):
        _remove(tmp_path)
        raise RuntimeError
    assert [p.name for p in (tmp_path / "models/a").iterdir()] == ["weights"]
    assert (tmp_path / "models/a/weights").read_text() == "old"
    assert (tmp_path / "metrics.json").read_text() == "old"


def test_incomplete_backup_is_never_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _model(tmp_path, "old")

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr("flows.execution.output_backup.os.replace", fail)  # killed before the backup is complete
        kept(tmp_path, "stage@a", OUTS).__enter__()
    _remove(tmp_path)
    assert recover(tmp_path) == []
    with kept(tmp_path, "stage@a", OUTS):
        _model(tmp_path, "new")
    assert (tmp_path / "models/a/weights").read_text() == "new"
