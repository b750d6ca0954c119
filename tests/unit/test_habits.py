"""Pre-commit runs CI's checks, and the version comes only from git tags v*."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from email import message_from_string
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FALLBACK = "0.0.0"
BUILD = """
import sys
from setuptools import build_meta
build_meta.prepare_metadata_for_build_wheel(sys.argv[1])
"""


def test_pre_commit_and_ci_run_the_same_commands() -> None:
    script = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    ci = [line for line in script if line.startswith("make ")]
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    hooks = local["hooks"]
    assert ci == ["make install", *(hook["entry"] for hook in hooks), "make test"]
    for hook in hooks:  # on all files, as in CI, not only on changed ones
        assert hook["always_run"]
        assert not hook["pass_filenames"]
        assert not {"files", "exclude", "types", "stages", "args"} & set(hook)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files of this repository for a build, in a folder without git."""
    folder = tmp_path / "checkout"
    (folder / "flows").mkdir(parents=True)
    (folder / "flows/__init__.py").touch()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def git(folder: Path, *arguments: str) -> None:
    who = ("-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *who, *arguments], cwd=folder, env=environment(), check=True, capture_output=True)


def commit(folder: Path) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--allow-empty", "--message", "change")


def environment() -> dict[str, str]:
    """The environment without variables that affect git or a build, such as those of a git hook."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("GIT_", "SETUPTOOLS_SCM_", "VCS_VERSIONING_"))}


def built_version(folder: Path, **variables: str) -> str:
    """The version in the metadata of a wheel built from `folder` by pip's build backend."""
    target = folder.parent / "metadata"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    command = [sys.executable, "-c", BUILD, str(target)]
    done = subprocess.run(
        command, cwd=folder, env=environment() | variables, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (metadata,) = target.glob("*.dist-info/METADATA")
    return str(message_from_string(metadata.read_text(encoding="utf-8"))["Version"])


def test_version_comes_from_a_v_tag_and_never_from_a_run_tag(checkout: Path) -> None:
    git(checkout, "init", "--quiet")
    commit(checkout)
    git(checkout, "tag", "v1.2.3")
    git(checkout, "tag", "run/press-7.0.0")  # on the same commit
    assert built_version(checkout) == "1.2.3"
    commit(checkout)
    git(checkout, "tag", "--annotate", "--message", "a run", "run/quiet-otter-9.9")  # nearer, and annotated
    assert built_version(checkout).startswith("1.2.4.dev1+g")


def test_a_repository_without_a_version_counts_its_commits(checkout: Path) -> None:
    git(checkout, "init", "--quiet")
    commit(checkout)
    git(checkout, "tag", "run/v3.0.0")
    assert built_version(checkout).startswith("0.0.1.dev1+g")


def test_without_git_the_version_is_the_one_that_is_given_or_the_fallback(checkout: Path) -> None:
    assert built_version(checkout) == FALLBACK
    assert built_version(checkout, SETUPTOOLS_SCM_PRETEND_VERSION_FOR_MODELPRESS="") == FALLBACK  # the image's default
    assert built_version(checkout, SETUPTOOLS_SCM_PRETEND_VERSION_FOR_MODELPRESS="2.0.1") == "2.0.1"
