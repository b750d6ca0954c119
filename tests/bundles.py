"""A small bundle, and keys to sign it."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tasks.bundle.checksums import write_sums


def small_bundle(folder: Path, large: int = 100_000) -> Path:
    """A bundle with a large file, a sub-folder, a hidden and an empty file, and its SHA256SUMS."""
    (folder / "serve").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * (large // 256))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "serve/compose.yaml").write_text("services: {}\n")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (folder / "empty.txt").touch()
    write_sums(folder)
    return folder


def key_pair(folder: Path, name: str, password: bytes | None = None) -> tuple[Path, Path]:
    """The files of a new private key and of its public key."""
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption))
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public
