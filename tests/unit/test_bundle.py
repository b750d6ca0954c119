"""Verify, sign and pack a bundle: each kind of damage and each wrong signer is found."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from olot.basics import crawl_ocilayout_blobs_to_extract

from tasks.bundle import __main__ as program
from tasks.bundle.checksums import SIGNATURE, SUMS, check_sums, write_sums
from tasks.bundle.oci import read_manifest, unpack, write_layout
from tasks.bundle.registry import _target
from tasks.bundle.signing import KEY, PASSWORD, Signer, check_key, check_signature, sign, unchecked
from tasks.errors import TaskError, TransientError
from tasks.output import checksums, sha256
from tests.bundles import key_pair, small_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return small_bundle(tmp_path / "bundle")


@pytest.fixture
def public(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The public half of the key in the environment."""
    private, public = key_pair(tmp_path, "signing")
    monkeypatch.setenv(KEY, str(private))
    monkeypatch.delenv(PASSWORD, raising=False)
    return public


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def listed_as(bundle: Path, name: str) -> None:
    lines = (bundle / SUMS).read_text()
    (bundle / SUMS).write_text(f"{lines}{'0' * 64}  {name}\n")


def elsewhere(bundle: Path, name: str) -> None:
    (bundle / name).rename(bundle.parent / "config")
    (bundle / name).symlink_to(bundle.parent / "config")


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped bit": (lambda b: flip(b / "model.safetensors", 50_001), r"model\.safetensors was changed"),
    "in a sub-folder": (lambda b: flip(b / "serve/compose.yaml", 0), r"serve/compose\.yaml was changed"),
    "hidden": (lambda b: flip(b / ".gitattributes", 0), r"\.gitattributes was changed"),
    "longer": (lambda b: (b / "empty.txt").write_text("x"), r"empty\.txt was changed"),
    "added": (lambda b: (b / "serve/run.sh").write_text("x"), r"serve/run\.sh was added"),
    "missing": (lambda b: (b / "config.json").unlink(), r"config\.json is missing"),
    "renamed": (lambda b: (b / "config.json").rename(b / "x.json"), r": config\.json was renamed to x\.json\. Do"),
    "case": (lambda b: (b / "config.json").rename(b / "Config.json"), r"was renamed to Config\.json"),
    "link": (lambda b: elsewhere(b, "config.json"), r"config\.json is a symbolic link"),
    "linked folder": (lambda b: (b / "more").symlink_to(b / "serve"), r"more is a symbolic link"),
    "pipe": (lambda b: os.mkfifo(b / "pipe"), r"pipe is not a regular file"),
    "no sums": (lambda b: (b / SUMS).unlink(), r"has no SHA256SUMS"),
    "linked sums": (lambda b: elsewhere(b, SUMS), r"has no SHA256SUMS"),
    "empty sums": (lambda b: (b / SUMS).write_text(""), r"lists no file"),
    "blank line": (lambda b: (b / SUMS).write_text("\n" + (b / SUMS).read_text()), r"line 1 of .* is ''"),
    "bytes in sums": (lambda b: (b / SUMS).write_bytes(b"\xff\xfe"), r"is not UTF-8"),
    "outside": (lambda b: listed_as(b, "../config.json"), r"line 6 .*expected a sha256 and a new path inside"),
    "deep outside": (lambda b: listed_as(b, "serve/../../x"), r"expected a sha256 and a new path inside"),
    "absolute": (lambda b: listed_as(b, "/etc/passwd"), r"expected a sha256 and a new path inside"),
    "other spelling": (lambda b: listed_as(b, "./config.json"), r"expected a sha256 and a new path inside"),
    "backslash": (lambda b: listed_as(b, "..\\x"), r"expected a sha256 and a new path inside"),
    "twice": (lambda b: listed_as(b, "config.json"), r"expected a sha256 and a new path inside"),
    "two cases": (lambda b: listed_as(b, "CONFIG.json"), r"config\.json and CONFIG\.json, which are one file"),
}


class TestSums:
    def test_an_unchanged_bundle_holds(self, bundle: Path) -> None:
        assert check_sums(bundle) == {k: v for k, v in checksums(bundle).items() if k != SUMS}
        assert {"serve/compose.yaml", ".gitattributes"} <= check_sums(bundle).keys()
        before = (bundle / SUMS).read_bytes()
        write_sums(bundle)
        assert (bundle / SUMS).read_bytes() == before

    @pytest.mark.parametrize("fault", FAULTS)
    def test_every_fault_is_named(self, bundle: Path, fault: str) -> None:
        damage, message = FAULTS[fault]
        damage(bundle)
        with pytest.raises(TaskError, match=message):
            check_sums(bundle)

    def test_a_name_that_sums_cannot_hold_is_refused(self, bundle: Path) -> None:
        (bundle / "two\nlines").touch()
        with pytest.raises(TaskError, match="expected a sha256"):
            write_sums(bundle)


class TestSignature:
    def test_the_signer_is_recognized_in_a_renamed_folder(self, bundle: Path, public: Path) -> None:
        sign(bundle, "key")
        moved = bundle.rename(bundle.parent / "moved")
        check_signature(moved, check_sums(moved), Signer(public))
        assert "was not checked: it was made with a key" in unchecked(moved)

    def test_another_key_is_not_the_signer(self, bundle: Path, public: Path, tmp_path: Path) -> None:
        sign(bundle, "key")
        _, other = key_pair(tmp_path, "other")
        with pytest.raises(TaskError, match=r"no signature of the key .*other\.pub .*it was made with another key"):
            check_signature(bundle, check_sums(bundle), Signer(other))

    @pytest.mark.parametrize("name", ["model.safetensors", ".gitattributes", "serve/compose.yaml"])
    def test_sums_written_anew_do_not_help(self, bundle: Path, public: Path, name: str) -> None:
        sign(bundle, "key")
        flip(bundle / name, 0)
        write_sums(bundle)
        with pytest.raises(TaskError, match=rf"it is of other files \(see {name}\)"):
            check_signature(bundle, check_sums(bundle), Signer(public))

    def test_an_added_file_does_not_pass_with_new_sums(self, bundle: Path, public: Path) -> None:
        sign(bundle, "key")
        (bundle / ".gitignore").write_text("*")
        write_sums(bundle)
        with pytest.raises(TaskError, match=r"it is of other files \(see \.gitignore\)"):
            check_signature(bundle, check_sums(bundle), Signer(public))

    def test_a_changed_signature_is_refused(self, bundle: Path, public: Path) -> None:
        sign(bundle, "key")
        made = json.loads((bundle / SIGNATURE).read_text())
        payload = base64.b64decode(made["dsseEnvelope"]["payload"]).replace(b"config.json", b"confag.json")
        changes: list[Callable[[], object]] = [
            lambda: made["dsseEnvelope"]["signatures"][0].update(sig=base64.b64encode(b"0" * 70).decode()),
            lambda: made["dsseEnvelope"].update(payload=base64.b64encode(payload).decode()),
            lambda: made["dsseEnvelope"].update(signatures=[]),
            lambda: made.pop("dsseEnvelope"),
        ]
        for change in changes:
            change()
            (bundle / SIGNATURE).write_text(json.dumps(made))
            with pytest.raises(TaskError, match="is no signature of the key"):
                check_signature(bundle, check_sums(bundle), Signer(public))
        for text in ("", "[]", "{}", "null"):
            (bundle / SIGNATURE).write_text(text)
            with pytest.raises(TaskError, match="is not a signature of model signing"):
                check_signature(bundle, check_sums(bundle), Signer(public))

    def test_a_signature_that_leaves_files_out_is_refused(self, bundle: Path, public: Path) -> None:
        from model_signing import hashing, signing

        part = hashing.Config().set_ignored_paths(paths=[SIGNATURE, "config.json"], ignore_git_paths=False)
        config = signing.Config().set_hashing_config(part)
        config.use_elliptic_key_signer(private_key=os.environ[KEY]).sign(bundle, bundle / SIGNATURE)
        with pytest.raises(TaskError, match=r"leaves out config\.json"):
            check_signature(bundle, check_sums(bundle), Signer(public))

    def test_the_librarys_own_verifier_agrees(self, bundle: Path, public: Path) -> None:
        from model_signing import hashing, verifying

        sign(bundle, "key")
        files = hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)
        config = verifying.Config().set_hashing_config(files).use_elliptic_key_verifier(public_key=public)
        config.verify(bundle, bundle / SIGNATURE)
        flip(bundle / "config.json", 3)
        with pytest.raises(ValueError, match="Signature mismatch"):
            config.verify(bundle, bundle / SIGNATURE)

    def test_a_damaged_bundle_is_not_signed(self, bundle: Path, public: Path) -> None:
        flip(bundle / "config.json", 3)
        with pytest.raises(TaskError, match="was changed"):
            sign(bundle, "key")
        assert not (bundle / SIGNATURE).exists()

    def test_an_unusable_key_is_refused_without_quoting_it(
        self, bundle: Path, public: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for words, path in {
            "is no private key that can sign": public,
            "which cannot be read": tmp_path / "absent",
        }.items():
            monkeypatch.setenv(KEY, str(path))
            with pytest.raises(TaskError, match=words):
                check_key()
        private, public = key_pair(tmp_path, "locked", b"secret words")
        monkeypatch.setenv(KEY, str(private))
        for password in ("", "wrong words"):
            monkeypatch.setenv(PASSWORD, password)
            with pytest.raises(TaskError, match="its password in MODELPRESS_SIGNING_PASSWORD") as caught:
                sign(bundle, "key")
            assert not password or password not in str(caught.value)
        monkeypatch.setenv(PASSWORD, "secret words")
        sign(bundle, "key")
        check_signature(bundle, check_sums(bundle), Signer(public))
        monkeypatch.delenv(KEY)
        with pytest.raises(TaskError, match="MODELPRESS_SIGNING_KEY is not set"):
            check_key()
        with pytest.raises(TaskError, match="is no public key that can verify"):
            check_signature(bundle, check_sums(bundle), Signer(private))

    def test_keyless_needs_an_identity_and_the_network(self, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def away(*_: object, **__: object) -> None:
            raise ConnectionError("no route to host")

        monkeypatch.setattr("sigstore.oidc.detect_credential", lambda: None)
        monkeypatch.setattr(sys, "stdin", io.StringIO())
        with pytest.raises(TaskError, match="no identity for a keyless signature was found"):
            sign(bundle, "keyless")
        monkeypatch.setattr("sigstore.oidc.detect_credential", lambda: "a.b.c")
        monkeypatch.setattr("sigstore.models.ClientTrustConfig.production", away)
        with pytest.raises(TransientError, match="Sigstore was not reached: no route to host"):
            sign(bundle, "keyless")
        assert not (bundle / SIGNATURE).exists()
        (bundle / SIGNATURE).write_text('{"verificationMaterial": {"certificate": {}}}')
        with pytest.raises(TransientError, match="Sigstore was not reached"):
            check_signature(bundle, check_sums(bundle), Signer(identity="ci", issuer="https://example.org"))
        with pytest.raises(TaskError, match="was made without a key, through Sigstore, but the key"):
            check_signature(bundle, check_sums(bundle), Signer(Path("publisher.pem")))


class TestImage:
    def test_equal_bundles_give_equal_layouts(self, bundle: Path, tmp_path: Path) -> None:
        other = shutil.copytree(bundle, tmp_path / "other", copy_function=shutil.copy)
        (other / "config.json").chmod(0o600)
        os.utime(other / "config.json", (1, 1))
        for folder in (bundle, other):
            write_layout(folder, tmp_path / f"{folder.name}.oci")
        assert checksums(tmp_path / "bundle.oci") == checksums(tmp_path / "other.oci")

    def test_the_image_holds_the_same_bundle(self, bundle: Path, public: Path, tmp_path: Path) -> None:
        sign(bundle, "key")
        layout = tmp_path / "layout"
        write_layout(bundle, layout)
        unpack(layout, tmp_path / "back")
        assert checksums(tmp_path / "back") == checksums(bundle)
        # olot, the library of model cars, reads the same files
        crawl_ocilayout_blobs_to_extract(layout, tmp_path / "theirs")
        assert checksums(tmp_path / "theirs/models") == checksums(bundle)
        with pytest.raises(TaskError, match="already exists"):
            write_layout(bundle, layout)

    def test_large_files_have_layers_of_their_own(
        self, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("tasks.bundle.oci._OWN_LAYER", 10)
        monkeypatch.setattr("tasks.bundle.oci._LAYERS", 3)
        layout = tmp_path / "layout"
        for part in range(7):
            (bundle / f"{part}.safetensors").write_bytes(bytes([part]) * 1000)
        write_sums(bundle)
        write_layout(bundle, layout)
        assert len(read_manifest(layout)[0].layers) <= 1 + 3
        unpack(layout, tmp_path / "back")
        assert checksums(tmp_path / "back") == checksums(bundle)

    def test_a_changed_or_missing_blob_is_named(self, bundle: Path, tmp_path: Path) -> None:
        layout = tmp_path / "layout"
        write_layout(bundle, layout)
        for path in sorted((layout / "blobs/sha256").iterdir()):
            content = path.read_bytes()
            flip(path, len(content) // 2)
            with pytest.raises(TaskError, match=f"{path.name} is changed; fetch the image again"):
                read_manifest(layout)
            path.unlink()
            with pytest.raises(TaskError, match=f"{path.name} is missing"):
                read_manifest(layout)
            path.write_bytes(content)
        (layout / "index.json").write_text("{}")
        with pytest.raises(TaskError, match="is not an OCI image layout of a bundle"):
            read_manifest(layout)

    @pytest.mark.parametrize(
        ("name", "kind", "words"),
        [
            ("models/../../outside", tarfile.REGTYPE, "cannot be unpacked"),
            ("../models/x", tarfile.REGTYPE, "expected files below /models"),
            ("etc/passwd", tarfile.REGTYPE, "expected files below /models"),
            ("models/link", tarfile.SYMTYPE, "expected files below /models"),
            ("models/config.json", tarfile.REGTYPE, "twice"),
        ],
    )
    def test_a_hostile_layer_writes_nothing_outside(
        self, bundle: Path, tmp_path: Path, name: str, kind: bytes, words: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write = tarfile.TarFile.addfile

        def add(archive: tarfile.TarFile, entry: tarfile.TarInfo, source: object = None) -> None:
            write(archive, entry, source)  # type: ignore[arg-type]
            if entry.name.endswith("empty.txt"):
                hostile = tarfile.TarInfo(name)
                hostile.type, hostile.linkname = kind, "/etc/passwd"
                write(archive, hostile)

        monkeypatch.setattr(tarfile.TarFile, "addfile", add)
        write_layout(bundle, tmp_path / "layout")
        (tmp_path / "in").mkdir()
        with pytest.raises(TaskError, match=words):
            unpack(tmp_path / "layout", tmp_path / "in/back")
        assert [p.name for p in (tmp_path / "in").iterdir()] == ["back"]
        assert not (tmp_path / "outside").exists()


class TestAddress:
    def test_parts(self) -> None:
        digest = f"sha256:{'a' * 64}"
        assert _target("oci://localhost:5000/team/model:v1.2") == {
            "host": "localhost:5000",
            "name": "team/model",
            "tag": "v1.2",
            "digest": None,
        }
        assert _target(f"oci://example.org/model@{digest}")["digest"] == digest

    @pytest.mark.parametrize("address", ["oci://me:secret@example.org/model:1", "oci://example.org/model", "model:1"])
    def test_a_malformed_address_is_refused_without_its_password(self, address: str) -> None:
        with pytest.raises(TaskError, match="is not an address of an image; expected oci://HOST/NAME:TAG") as caught:
            _target(address)
        assert "secret" not in str(caught.value)


class TestProgram:
    def run(self, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> object:
        """The exit status, or the error line."""
        monkeypatch.setattr(sys, "argv", ["bundle", *arguments])
        try:
            program.main()
        except SystemExit as end:
            return end.code
        return 0

    def test_it_says_what_was_checked(
        self, bundle: Path, public: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def run(*arguments: str) -> object:
            return self.run(*arguments, monkeypatch=monkeypatch)

        assert run("verify", str(bundle)) == 0
        assert "nobody signed these files" in capsys.readouterr().out
        assert "has no model.sig, so the key" in str(run("verify", str(bundle), "--key", str(public)))
        assert run("sign", str(bundle)) == 0
        assert run("verify", str(bundle)) == 0
        assert "model.sig was not checked" in capsys.readouterr().out
        assert run("oci", str(bundle), "--to", str(bundle.parent / "layout")) == 0
        for one in (bundle, bundle.parent / "layout"):
            assert run("verify", str(one), "--key", str(public)) == 0
            assert f"is a signature of the key {public} over all of them" in capsys.readouterr().out
        assert "incomplete or named twice" in str(run("verify", str(bundle), "--identity", "me"))
        assert "incomplete or named twice" in str(run("verify", str(bundle), "--identity", "me", "--key", str(public)))
        assert "is not a folder" in str(run("verify", str(bundle / "absent")))
        flip(bundle / "model.safetensors", 1)
        assert "model.safetensors was changed" in str(run("verify", str(bundle), "--key", str(public)))

    def test_verifying_changes_nothing(self, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before = {p: (sha256(p), p.stat().st_mtime_ns) for p in bundle.rglob("*") if p.is_file()}
        assert self.run("verify", str(bundle), monkeypatch=monkeypatch) == 0
        assert {p: (sha256(p), p.stat().st_mtime_ns) for p in bundle.rglob("*") if p.is_file()} == before
