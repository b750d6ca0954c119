"""The memory limit of a process, on fake trees of both control group versions."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from tasks.hardware import available_memory, total_memory

GB = 10**9
HUGE = 9223372036854771712  # version 1's value for no limit
MOUNT_V2 = "31 23 0:28 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
MOUNT_V1 = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"
V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with 64 GB, 40 GB of it free."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GB, available=40 * GB))


def process(root: Path, groups: str, *mounts: str) -> None:
    """Write the files of /proc/self that name the process's groups and where they are mounted."""
    folder = root / "proc/self"
    folder.mkdir(parents=True)
    (folder / "cgroup").write_text(f"{groups}\n" if groups else "")
    (folder / "mountinfo").write_text("\n".join(("22 1 8:1 / / rw - ext4 /dev/sda1 rw", *mounts)) + "\n")


def group(
    folder: Path, names: tuple[str, str, str], limit: int | str, usage: int | None = None, cache: int = 0
) -> None:
    """Write a group's memory files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    if usage is not None:
        (folder / names[1]).write_text(f"{usage}\n")
        (folder / "memory.stat").write_text(f"anon 17\nactive_file 5\n{names[2]} {cache}\nslab 3\n")


@pytest.mark.parametrize(
    ("line", "mount", "top", "names", "unlimited"),
    [
        ("0::/app/worker", MOUNT_V2, "sys/fs/cgroup", V2, "max"),
        ("9:name=systemd:/\n4:cpu,memory:/app/worker\n0::/", MOUNT_V1, "sys/fs/cgroup/memory", V1, HUGE),
    ],
    ids=["v2", "v1"],
)
class TestBothVersions:
    def test_smallest_limit_of_all_groups_applies(
        self, tmp_path: Path, line: str, mount: str, top: str, names: tuple[str, str, str], unlimited: int | str
    ) -> None:
        process(tmp_path, line, mount)
        group(tmp_path / top, names, 50 * GB)
        group(tmp_path / top / "app", names, 8 * GB)
        group(tmp_path / top / "app/worker", names, 12 * GB)
        group(tmp_path / top / "app/other", names, 1 * GB)  # not ours
        assert total_memory(tmp_path) == 8 * GB

    def test_without_a_limit_the_machine_decides(
        self, tmp_path: Path, line: str, mount: str, top: str, names: tuple[str, str, str], unlimited: int | str
    ) -> None:
        process(tmp_path, line, mount)
        for name in ("", "app", "app/worker"):
            group(tmp_path / top / name, names, unlimited, 20 * GB)
        assert total_memory(tmp_path) == 64 * GB
        assert available_memory(tmp_path) == 40 * GB

    def test_available_memory_is_the_smallest_remainder_of_any_group(
        self, tmp_path: Path, line: str, mount: str, top: str, names: tuple[str, str, str], unlimited: int | str
    ) -> None:
        process(tmp_path, line, mount)
        group(tmp_path / top, names, unlimited, 24 * GB)
        group(tmp_path / top / "app", names, 30 * GB, 28 * GB, cache=3 * GB)  # a neighbour takes most of it
        group(tmp_path / top / "app/worker", names, 10 * GB, 1 * GB)
        assert available_memory(tmp_path) == 5 * GB

    def test_a_full_group_has_nothing_left(
        self, tmp_path: Path, line: str, mount: str, top: str, names: tuple[str, str, str], unlimited: int | str
    ) -> None:
        process(tmp_path, line, mount)
        group(tmp_path / top / "app/worker", names, 2 * GB, 2 * GB + 4096)
        assert available_memory(tmp_path) == 0

    def test_machine_with_less_free_memory_than_the_limit_decides(
        self, tmp_path: Path, line: str, mount: str, top: str, names: tuple[str, str, str], unlimited: int | str
    ) -> None:
        process(tmp_path, line, mount)
        group(tmp_path / top / "app/worker", names, 60 * GB, 1 * GB)
        assert total_memory(tmp_path) == 60 * GB
        assert available_memory(tmp_path) == 40 * GB


def test_container_that_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    mount = "35 31 0:32 /docker/c0ffee /sys/fs/cgroup/memory ro,relatime master:15 - cgroup cgroup rw,memory"
    process(tmp_path, "4:memory:/docker/c0ffee/job", mount)
    group(tmp_path / "sys/fs/cgroup/memory", V1, 6 * GB)
    group(tmp_path / "sys/fs/cgroup/memory/job", V1, HUGE)
    assert total_memory(tmp_path) == 6 * GB


def test_group_outside_the_mounted_tree(tmp_path: Path) -> None:
    process(tmp_path, "0::/../elsewhere", MOUNT_V2.replace(" / /", " /here /"))
    group(tmp_path / "sys/fs/cgroup", V2, 7 * GB)
    assert total_memory(tmp_path) == 7 * GB


def test_hybrid_system_has_memory_under_version_1(tmp_path: Path) -> None:
    unified = "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"
    process(tmp_path, "4:memory:/job\n1:cpu:/\n0::/", MOUNT_V1, unified)
    (tmp_path / "sys/fs/cgroup/unified").mkdir(parents=True)
    group(tmp_path / "sys/fs/cgroup/memory/job", V1, 3 * GB, 1 * GB)
    assert (total_memory(tmp_path), available_memory(tmp_path)) == (3 * GB, 2 * GB)


@pytest.mark.parametrize("line", ["0::/app", "4:memory:/app", ""])
def test_without_group_files_the_machine_decides(tmp_path: Path, line: str) -> None:
    assert (total_memory(tmp_path), available_memory(tmp_path)) == (64 * GB, 40 * GB)  # no /proc at all
    process(tmp_path, line, MOUNT_V1, MOUNT_V2)
    assert (total_memory(tmp_path), available_memory(tmp_path)) == (64 * GB, 40 * GB)


def test_limit_without_usage_gives_only_the_total(tmp_path: Path) -> None:
    process(tmp_path, "0::/app", MOUNT_V2)
    group(tmp_path / "sys/fs/cgroup/app", V2, 5 * GB)
    assert (total_memory(tmp_path), available_memory(tmp_path)) == (5 * GB, 40 * GB)
