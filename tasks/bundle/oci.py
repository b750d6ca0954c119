"""A bundle as an OCI image layout: a model car, whose layers put the files below /models.

https://github.com/opencontainers/image-spec/blob/main/image-layout.md. The layers are written here and not by olot,
which puts time, owner and name of the machine's user into them: equal bundles make equal images.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from olot.oci.oci_common import MediaTypes
from olot.oci.oci_config import OCIManifestConfig
from olot.oci.oci_image_index import Manifest, OCIImageIndex, create_oci_image_index, read_ocilayout_root_index
from olot.oci.oci_image_layout import verify_ocilayout
from olot.oci.oci_image_manifest import ContentDescriptor, OCIImageManifest, create_oci_image_manifest
from pydantic import BaseModel

from tasks.bundle.checksums import SIGNATURE, SUMS, check_sums
from tasks.bundle.places import LAYOUT
from tasks.errors import TaskError, first_line
from tasks.output import sha256, whole_directory, write_text

FOLDER = "models"  # in the image, where KServe expects a model
_NAME = "org.opencontainers.image.ref.name"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_OWN_LAYER = 16 * 2**20  # bytes from which a file has a layer of its own, so that registries store it once
_LAYERS = 100  # at most, because overlay file systems end at about 127


def write_layout(bundle: Path, destination: Path) -> None:
    """Write the bundle as an OCI image layout, a new folder.

    TaskError if the bundle does not match its SHA256SUMS, or `destination` exists.
    """
    if destination.exists():
        raise TaskError(f"{destination} already exists; name another folder, or remove it")
    files = [*check_sums(bundle), SUMS, *([SIGNATURE] if (bundle / SIGNATURE).is_file() else [])]
    with whole_directory(destination, seal=lambda _: None) as layout:
        blobs = layout / "blobs/sha256"
        blobs.mkdir(parents=True)
        layers = [_layer(bundle, group, blobs) for group in _groups(bundle, sorted(files))]
        config = OCIManifestConfig.model_validate(
            {
                "created": "1970-01-01T00:00:00Z",
                "architecture": "amd64",  # the format demands one; nothing in the image is run
                "os": "linux",
                "config": {},
                "rootfs": {"type": "layers", "diff_ids": [layer.digest for layer in layers]},
                "history": [{"created": "1970-01-01T00:00:00Z", "created_by": "modelpress"} for _ in layers],
            }
        )
        manifest = create_oci_image_manifest(config=_blob(config, MediaTypes.config, blobs), layers=layers)
        entry = _blob(manifest, MediaTypes.manifest, blobs)
        write_index(layout, entry.digest, entry.size)


def write_index(layout: Path, digest: str, size: int) -> None:
    """Complete a layout whose blobs are written: name its only image by the digest and size of its manifest."""
    named = {"mediaType": MediaTypes.manifest, "digest": digest, "size": size, "annotations": {_NAME: "latest"}}
    index = create_oci_image_index(manifests=[Manifest.model_validate(named)])
    write_text(layout / "index.json", _json(index))
    write_text(layout / LAYOUT, '{"imageLayoutVersion":"1.0.0"}')


def read_manifest(layout: Path) -> tuple[OCIImageManifest, str]:
    """The manifest of the only image in a layout, and its digest. TaskError if a blob is missing or changed."""
    try:
        verify_ocilayout(layout)
        index: OCIImageIndex = read_ocilayout_root_index(layout)
        images = [one.digest for one in index.manifests if one.mediaType == MediaTypes.manifest]
        if len(images) != 1 or len(index.manifests) != 1:
            raise TaskError(
                f"{layout} holds {len(index.manifests)} images, expected one; write it with: modelpress oci"
            )
        manifest = OCIImageManifest.model_validate_json(checked_blob(layout, images[0]).read_bytes())
    except (OSError, ValueError) as error:
        raise TaskError(f"{layout} is not an OCI image layout of a bundle: {first_line(error)}") from error
    for one in (manifest.config, *manifest.layers):
        checked_blob(layout, one.digest)
    return manifest, images[0]


def blob(layout: Path, digest: str) -> Path:
    """The file of a blob of a layout; TaskError unless the digest is a sha256, because it becomes a file name."""
    if not _DIGEST.fullmatch(digest):
        raise TaskError(f"the image names the digest {digest[:80]!r}, expected sha256: and 64 digits; do not use it")
    return layout / "blobs/sha256" / digest.removeprefix("sha256:")


def checked_blob(layout: Path, digest: str) -> Path:
    """The file of a blob; TaskError if its bytes are not those that the digest names."""
    path = blob(layout, digest)
    if not path.is_file() or sha256(path) != path.name:
        raise TaskError(f"{path} is {'changed' if path.is_file() else 'missing'}; fetch the image again")
    return path


def unpack(layout: Path, destination: Path) -> None:
    """Write the bundle in an image to the folder `destination`, which must be empty or absent.

    TaskError if a blob is damaged, or a layer holds anything but files and folders below /models.
    """
    manifest, _ = read_manifest(layout)
    for layer in manifest.layers:
        path = blob(layout, layer.digest)
        try:
            with tarfile.open(path) as archive:
                for member in archive:
                    _extract(archive, member, destination)
        except (tarfile.TarError, OSError, EOFError) as error:
            raise TaskError(f"{path} cannot be unpacked: {first_line(error)}; fetch the image again") from error


def _extract(archive: tarfile.TarFile, member: tarfile.TarInfo, destination: Path) -> None:
    """Write one file; a bundle has no links, and no file in two layers."""
    top, _, inside = member.name.lstrip("/").partition("/")
    if member.isdir():
        return
    if top != FOLDER or not inside or not member.isfile():
        raise TaskError(f"the image holds {member.name[:120]!r}, expected files below /{FOLDER}; do not use it")
    if (destination / inside).exists():
        raise TaskError(f"the image holds {member.name[:120]!r} twice; do not use it")
    archive.extract(member.replace(name=inside, deep=False), destination, set_attrs=False, filter="data")


def _groups(bundle: Path, files: list[str]) -> Iterator[list[str]]:
    """Files by layer: all small ones together, and each large one alone unless there are too many."""
    small = [file for file in files if (bundle / file).stat().st_size < _OWN_LAYER]
    large = [file for file in files if file not in small]
    yield small
    together = -(-len(large) // _LAYERS) or 1
    for start in range(0, len(large), together):
        yield large[start : start + together]


def _layer(bundle: Path, files: list[str], blobs: Path) -> ContentDescriptor:
    """Write files to an uncompressed layer, because weights do not shrink, without anything of this machine."""
    part = blobs / "part"
    with tarfile.open(part, "w", format=tarfile.GNU_FORMAT) as archive:
        folders = {parent for file in files for parent in Path(FOLDER, file).parents} - {Path()}
        for folder in sorted(folders):
            archive.addfile(_entry(f"{folder}/", tarfile.DIRTYPE, 0o755))
        for file in files:
            entry = _entry(f"{FOLDER}/{file}", tarfile.REGTYPE, 0o644)
            with (bundle / file).open("rb") as source:
                entry.size = (bundle / file).stat().st_size
                archive.addfile(entry, source)
    digest = sha256(part)
    size = part.stat().st_size
    part.rename(blobs / digest)
    return _descriptor(MediaTypes.layer, digest, size)


def _entry(name: str, kind: bytes, mode: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode = kind, mode
    return entry


def _blob(value: BaseModel, kind: str, blobs: Path) -> ContentDescriptor:
    """Write a value as JSON to the blobs."""
    text = _json(value)
    digest = hashlib.sha256(text.encode()).hexdigest()
    write_text(blobs / digest, text)
    return _descriptor(kind, digest, len(text.encode()))


def _descriptor(kind: str, digest: str, size: int) -> ContentDescriptor:
    values: dict[str, Any] = {"mediaType": kind, "digest": f"sha256:{digest}", "size": size}
    return ContentDescriptor.model_validate(values)


def _json(value: BaseModel) -> str:
    return value.model_dump_json(exclude_none=True)
