"""The commands for a finished bundle: `modelpress verify`, `sign`, `oci`, `push` and `pull`.

python -m tasks.bundle verify dist/smollm2-135m-instruct --key publisher.pem
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tasks.bundle.checksums import SIGNATURE, check_sums
from tasks.bundle.places import SCHEME, is_layout
from tasks.bundle.signing import Signer, check_signature, sign, unchecked
from tasks.errors import TaskError
from tasks.output import whole_directory
from tasks.program import one_line_errors


def verify(what: str, signer: Signer | None) -> None:
    """Check a bundle: a folder, an OCI image layout or an image in a registry, and print what was checked.

    TaskError if a byte differs from its SHA256SUMS, or if `signer` did not sign it.
    """
    with _as_folder(what) as bundle:
        print(_checked(bundle, what, signer))


def push(what: str, address: str) -> None:
    """Upload a bundle, or the OCI image layout of one, to a registry, and print the address with its digest."""
    from tasks.bundle.oci import write_layout
    from tasks.bundle.registry import push as upload

    bundle = _folder(what)
    if is_layout(bundle):
        print(upload(bundle, address))
        return
    with tempfile.TemporaryDirectory() as scratch:
        write_layout(bundle, Path(scratch) / "layout")
        print(upload(Path(scratch) / "layout", address))


def pull(address: str, destination: Path, signer: Signer | None) -> None:
    """Fetch the bundle at an address in a registry to a new folder, if it is whole and signed by `signer`."""
    if destination.exists():
        raise TaskError(f"{destination} already exists; name another folder with --to, or remove it")
    destination.parent.mkdir(parents=True, exist_ok=True)
    with _as_folder(address, destination.parent) as bundle:
        said = _checked(bundle, str(destination), signer)
        with whole_directory(destination, seal=lambda _: None) as folder:
            for path in bundle.iterdir():
                path.rename(folder / path.name)
    print(said)


def _checked(bundle: Path, name: str, signer: Signer | None) -> str:
    """Check sums and signature; what was found, in words."""
    sums = check_sums(bundle)
    size = sum((bundle / file).stat().st_size for file in sums)
    lines = [f"{name}: {len(sums)} files, {size:,} bytes, match SHA256SUMS"]
    if signer:
        check_signature(bundle, sums, signer)
        lines.append(f"{SIGNATURE} is a signature of {signer} over all of them")
    else:
        lines.append(unchecked(bundle))
    return "\n".join(lines)


@contextmanager
def _as_folder(what: str, beside: Path | None = None) -> Iterator[Path]:
    """The bundle as a folder; of an image, an unpacked copy below `beside` or else TMPDIR."""
    if not what.startswith(SCHEME) and not is_layout(Path(what)):
        yield _folder(what)
        return
    from tasks.bundle.oci import unpack

    with tempfile.TemporaryDirectory(prefix=".bundle.", dir=beside) as scratch:
        layout = Path(what)
        if what.startswith(SCHEME):
            from tasks.bundle.registry import pull as download

            layout = Path(scratch) / "layout"
            download(what, layout)
        bundle = Path(scratch) / "bundle"
        bundle.mkdir()
        unpack(layout, bundle)
        yield bundle


def _folder(what: str) -> Path:
    if not Path(what).is_dir():
        raise TaskError(
            f"{what} is not a folder; name the folder of a bundle, an OCI image layout, or oci://HOST/NAME:TAG"
        )
    return Path(what)


def _signer(given: argparse.Namespace) -> Signer | None:
    """The expected signer; None if none is named. TaskError for half of an identity, or a key beside it."""
    if given.key and not (given.identity or given.issuer):
        return Signer(key=given.key)
    if given.identity and given.issuer and not given.key:
        return Signer(identity=given.identity, issuer=given.issuer)
    if given.key or given.identity or given.issuer:
        raise TaskError("the signer is incomplete or named twice; expected --key, or --identity together with --issuer")
    return None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tasks.bundle")
    commands = parser.add_subparsers(dest="command", required=True)
    signer = argparse.ArgumentParser(add_help=False)
    signer.add_argument("--key", type=Path)
    signer.add_argument("--identity")
    signer.add_argument("--issuer")
    commands.add_parser("verify", parents=[signer]).add_argument("what")
    signing = commands.add_parser("sign")
    signing.add_argument("bundle")
    signing.add_argument("--keyless", action="store_true")
    image = commands.add_parser("oci")
    image.add_argument("bundle")
    image.add_argument("--to", type=Path, required=True)
    upload = commands.add_parser("push")
    upload.add_argument("what")
    upload.add_argument("address")
    download = commands.add_parser("pull", parents=[signer])
    download.add_argument("address")
    download.add_argument("--to", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    """Run one command; the exit status is 0 only if all that was asked for is true."""
    given = _arguments()
    with one_line_errors():
        match given.command:
            case "verify":
                verify(given.what, _signer(given))
            case "sign":
                sign(_folder(given.bundle), "keyless" if given.keyless else "key")
                print(Path(given.bundle) / SIGNATURE)
            case "oci":
                from tasks.bundle.oci import write_layout

                write_layout(_folder(given.bundle), given.to)
                print(given.to)
            case "push":
                push(given.what, given.address)
            case "pull":
                pull(given.address, given.to, _signer(given))


if __name__ == "__main__":
    main()
