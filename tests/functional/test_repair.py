"""`modelpress doctor --repair` and a further run restore the bytes from before the damage."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from tests.functional.toy import Toy


def _damage(path: Path) -> None:
    """Change a byte but not size, time or mode: only reading the file reveals it."""
    before, content = path.stat(), path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    path.chmod(0o444)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _outputs(toy: Toy) -> dict[str, bytes]:
    files = [path for place in ("models", "metrics", "report") for path in (toy.root / place).rglob("*")]
    return {str(path): path.read_bytes() for path in files if path.is_file()}


def test_damaged_objects_and_their_links_are_recreated(toy: Toy) -> None:
    toy.set(gate__four_bit=0.85)
    toy.run()
    toy.dvc("checkout", "--relink")  # the toy's copy has copies instead of links
    before = _outputs(toy)
    model = toy.root / "models/int8/content.json"
    cache = toy.root / ".dvc/cache/files/md5"
    digest = hashlib.md5(model.read_bytes()).hexdigest()
    _damage(cache / digest[:2] / digest[2:])
    assert model.read_bytes() != before[str(model)]  # it is the same file
    listing = next(path for path in cache.glob("*/*.dir") if "summary.json" in path.read_text())
    _damage(listing)
    toy.write("dvc.lock", "")
    refused = toy.call("run")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "`modelpress doctor --repair` fixes it" in refused.stderr

    ran = len(toy.executed())
    done = toy.call("doctor", "--repair")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 4
    assert "deleted models/int8/content.json" in done.stdout
    assert not model.exists()
    assert toy.call("doctor", "--repair").stdout == "nothing to repair\n"

    toy.run()
    assert _outputs(toy) == before
    assert set(toy.executed()[ran:]) == {"quantize@int8", "report"}  # the others came from the run cache
    assert json.loads(listing.read_text())
    assert toy.dvc("status").strip() == "Data and pipelines are up to date."


def test_no_repair_while_a_run_is_active(toy: Toy) -> None:
    from flows.workspace.run_lock import exclusive

    toy.write("dvc.lock", "")
    with exclusive(toy.root):
        done = toy.call("doctor", "--repair")
    assert done.returncode == 1
    assert done.stderr.startswith("error: another run (process ")
    assert toy.read("dvc.lock") == ""
