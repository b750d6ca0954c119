"""`doctor --repair` on a real git and DVC repository with an empty pipeline."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows.doctor import git_locks
from flows.doctor.cache_check import damaged_objects, links_to
from flows.doctor.examine import Finding, examine
from flows.doctor.repair import OPENING, repair
from flows.errors import FlowError
from flows.workspace.git import git
from flows.workspace.run_lock import exclusive
from tests.waiting import soon

LOCK = "schema: '2.0'\nstages:\n  a:\n    cmd: x\n    outs:\n    - path: models/a\n      md5: 00\n"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A git and DVC repository with one commit."""
    root = tmp_path / "project"
    (root / ".dvc").mkdir(parents=True)
    (root / ".dvc/config").touch()
    (root / "dvc.yaml").write_text("stages: {}\n")
    git(root, "init", "--quiet")
    _commit(root)
    return root


def _commit(root: Path) -> None:
    git(root, "add", "--all")
    git(root, "-c", "user.name=t", "-c", "user.email=t@t", "commit", "--quiet", "--message", "x")


def run_repair(root: Path) -> list[str]:
    return list(repair(root, lambda read, total: None))


def keep(root: Path, content: bytes, suffix: str = "") -> Path:
    """Write an object to the cache."""
    digest = hashlib.md5(content).hexdigest()
    path = root / ".dvc/cache/files/md5" / digest[:2] / (digest[2:] + suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.chmod(0o444)
    return path


def test_sound_project_is_unchanged(project: Path) -> None:
    sound = keep(project, b"sound")
    (project / "dvc.lock").write_text(LOCK)
    assert run_repair(project) == []
    assert sound.read_bytes() == b"sound"
    assert (project / "dvc.lock").read_text() == LOCK


def test_lock_file_is_restored_from_git(project: Path) -> None:
    (project / "dvc.lock").write_text(LOCK)
    _commit(project)
    (project / "dvc.lock").write_text("")
    assert run_repair(project) == ["dvc.lock is empty, as after a crash or a full disk: restored from git"]
    assert (project / "dvc.lock").read_text() == LOCK
    assert not (project / "dvc.lock.damaged").exists()


def test_damaged_lock_file_is_moved_aside_if_not_in_git(project: Path) -> None:
    (project / "dvc.lock").write_text(LOCK[:30])
    (line,) = run_repair(project)
    assert "the damaged file is in dvc.lock.damaged" in line
    assert not (project / "dvc.lock").exists()
    assert (project / "dvc.lock.damaged").read_text() == LOCK[:30]
    assert run_repair(project) == []


@pytest.mark.parametrize(
    "text",
    ["", "{", json.dumps({"write": {"a": {"pid": os.getpid(), "cmd": "dvc repro"}}})],
    ids=["empty", "cut", "of a process other than dvc"],
)
def test_stale_locks_are_removed(project: Path, text: str) -> None:
    lock = project / ".dvc/tmp/rwlock"
    lock.parent.mkdir()
    lock.write_text(text)
    (line,) = run_repair(project)
    assert line.startswith("removed .dvc/tmp/rwlock: is ")
    assert not lock.exists()


def test_nothing_is_changed_while_a_run_or_dvc_is_active(project: Path) -> None:
    (project / "dvc.lock").touch()
    with exclusive(project), pytest.raises(FlowError, match="another run"):
        run_repair(project)
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "dvc"])
    try:
        (project / ".dvc/tmp").mkdir()
        held = {"read": {"a": [{"pid": sleeper.pid, "cmd": "dvc repro"}]}}
        (project / ".dvc/tmp/rwlock").write_text(json.dumps(held))
        with pytest.raises(FlowError, match=rf"`dvc repro` \(process {sleeper.pid}\) is running"):
            run_repair(project)
    finally:
        sleeper.kill()
        sleeper.wait()
    assert (project / "dvc.lock").exists()
    assert (project / ".dvc/tmp/rwlock").exists()


def test_damaged_object_is_deleted_with_all_links_to_it(project: Path) -> None:
    sound, bad, listing = keep(project, b"sound"), keep(project, b"was sound"), keep(project, b"[]", ".dir")
    links = [project / "models/a/weights", project / ".modelpress/runs/x/models/a/weights", project / "results/link"]
    for link in links:
        link.parent.mkdir(parents=True, exist_ok=True)
    os.link(bad, links[0])
    os.link(bad, links[1])
    links[2].symlink_to(bad)
    os.link(sound, project / "models/a/config")
    before = bad.stat()
    for path in (bad, listing):  # written through a link, as root can; size, time and mode do not change
        path.chmod(0o644)
        path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
        path.chmod(0o444)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    lines = run_repair(project)
    assert len(lines) == 5
    assert not any(os.path.lexists(path) for path in [*links, bad, listing])
    assert (project / "models/a/config").read_bytes() == sound.read_bytes() == b"sound"
    assert run_repair(project) == []


def test_other_files_are_neither_read_nor_deleted(project: Path) -> None:
    cache = project / ".dvc/cache"
    strange = [cache / "files/md5/ab/short", cache / "runs/ab/abc", cache / "files/md5/zz/" / ("0" * 30)]
    for path in strange:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    assert damaged_objects(cache, lambda read, total: None) == []
    assert links_to(project, [], cache) == []
    assert run_repair(project) == []
    assert all(path.exists() for path in strange)


def test_progress_ends_with_all_bytes_read(project: Path) -> None:
    keep(project, b"12345")
    keep(project, b"123")
    told: list[tuple[int, int]] = []
    list(repair(project, lambda read, total: told.append((read, total))))
    assert told[-1] == (8, 8)


def test_backup_of_a_killed_run_is_restored(project: Path) -> None:
    (project / ".modelpress/kept/quantize@a").mkdir(parents=True)
    (project / ".modelpress/kept/quantize@a/models%2Fa").write_text("old")
    assert run_repair(project) == ["models/a restored: a killed run had moved it away"]
    assert (project / "models/a").read_text() == "old"


def test_half_created_and_half_removed_worktrees_are_cleaned_up(project: Path) -> None:
    runs = project / ".modelpress/runs"
    for name in ("gone", "unbegun", "opening"):
        git(project, "worktree", "add", "--quiet", "--detach", str(runs / name), "HEAD")
    shutil.rmtree(runs / "gone")
    then = time.time() - 2 * OPENING
    os.utime(runs / "unbegun", (then, then))
    lines = run_repair(project)
    assert "deleted .modelpress/runs/unbegun, the workspace of a run that had not started" in lines
    assert lines[1] == f"removed missing worktrees from git: {runs / 'gone'}, {runs / 'unbegun'}"
    assert len(lines) == 2
    assert git(project, "worktree", "list").count("\n") == 1
    assert (runs / "opening").is_dir()


def git_findings(root: Path) -> list[Finding]:
    return [finding for finding in examine(root) if finding.subject == "git lock"]


def test_locks_of_a_killed_git_are_named_and_removed(project: Path) -> None:
    space = project / ".modelpress/runs/otter"
    git(project, "worktree", "add", "--quiet", "--detach", str(space), "HEAD")
    left = [project / ".git/index.lock", project / ".git/worktrees/otter/index.lock"]
    for lock in left:
        lock.touch()
        os.utime(lock, (time.time() - git_locks.AGE,) * 2)
    for checkout in (project, space):
        with pytest.raises(FlowError, match=r"index\.lock exists; .*`modelpress doctor --repair` removes it"):
            git(checkout, "add", "--all")
    assert [finding.found.partition(" ")[0] for finding in git_findings(project)] == [str(lock) for lock in left]

    lines = run_repair(project)
    assert lines == [f"removed {lock}: no running git holds it" for lock in left]
    assert git_findings(project) == []
    _commit(project)
    git(space, "add", "--all")


def test_young_lock_is_waited_for(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = project / ".git/index.lock"
    lock.touch()
    assert git_findings(project) == []
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        os.utime(lock, (time.time() - git_locks.AGE,) * 2)

    monkeypatch.setattr(time, "sleep", wait)
    assert run_repair(project) == [f"removed {lock}: no running git holds it"]
    assert waited == [pytest.approx(git_locks.AGE, abs=5)]


def test_lock_of_a_running_git_is_kept(project: Path) -> None:
    """The user is editing a commit message in another worktree."""
    elsewhere = project.parent / "elsewhere"
    git(project, "worktree", "add", "--quiet", "--detach", str(elsewhere), "HEAD")
    (elsewhere / "dvc.yaml").write_text("stages: {a: {cmd: x}}\n")
    words = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-c", "core.editor=sleep 60 #", "commit", "--all"]
    commit = subprocess.Popen(words, cwd=elsewhere, stdout=subprocess.DEVNULL, start_new_session=True)
    lock = project / ".git/worktrees/elsewhere/index.lock"
    try:
        assert soon(lock.exists, 10)
        os.utime(lock, (0, 0))
        assert git_findings(project) == []
        with pytest.raises(FlowError, match=rf"`git -c` \(process {commit.pid}\) is running"):
            run_repair(project)
        assert lock.exists()
    finally:
        os.killpg(commit.pid, signal.SIGKILL)
        commit.wait()
    assert run_repair(project) == [f"removed {lock}: no running git holds it"]
