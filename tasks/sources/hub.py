"""Fetch models and data files from a model hub: resolve revisions to commits, resume and verify downloads.

The hub library resumes only within one call: it deletes partial files when it gives up, leaves them behind when it is
killed, and checks sizes but not checksums (shown in tests/functional/test_hub.py). So the library does the listing,
addresses, errors and transfers, and this module stores the files in `downloads/hub/`, named by the hub's checksum.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from tasks.companion_files import small_files
from tasks.errors import TaskError, TransientError
from tasks.output import sha256
from tasks.sources.address import HubAddress
from tasks.sources.choice import read_index, weight_files
from tasks.sources.files import Fetched, check_pin, one_at_a_time, require_space, size

Kind = Literal["model", "dataset"]

_BUSY = (408, 429)  # request timeout, too many requests


@dataclass(frozen=True)
class _Remote:
    """A file on the hub; `digest` is its sha256 (64 digits), or git's checksum (40) for small files."""

    name: str
    url: str
    bytes: int | None
    digest: str


def fetch_file(address: HubAddress, expected: str | None, kind: Kind, downloads: Path) -> Fetched:
    """Fetch one file of a repository; TaskError if it cannot be fetched or does not match its checksum."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    assert address.file is not None
    name = address.file
    with _explained(address, kind):

        def url(revision: str) -> str:
            return hf_hub_url(address.repository, name, repo_type=kind, revision=revision, endpoint=_endpoint())

        about = get_hf_file_metadata(url(address.revision), token=_token(), endpoint=_endpoint())
        if about.commit_hash is None or about.etag is None:
            raise TaskError(f"{_endpoint()} returns no commit and no checksum, so it is not a model hub")
        remote = _Remote(name, url(about.commit_hash), about.size, about.etag)
        path = _download(remote, downloads / "hub")
    pin = check_pin(path, expected, _name(address))
    return Fetched("hf", about.commit_hash, pin, path)


def fetch_model(address: HubAddress, check: Callable[[dict[str, Path]], None], downloads: Path) -> Fetched:
    """Fetch a whole repository: first the small files, then, after `check`, the weights."""
    from huggingface_hub import HfApi, hf_hub_url

    folder = downloads / "hub"
    with _explained(address, "model"):
        api = HfApi(endpoint=_endpoint(), token=_token())
        info = api.model_info(address.repository, revision=address.revision, files_metadata=True)
        commit = info.sha
        remotes = {}
        for f in info.siblings or []:
            url = hf_hub_url(address.repository, f.rfilename, revision=commit, endpoint=_endpoint())
            digest = f.lfs.sha256 if f.lfs else f.blob_id
            if commit is None or digest is None:
                raise TaskError(f"{_endpoint()} returns no commit and no checksums, so it is not a model hub")
            remotes[f.rfilename] = _Remote(f.rfilename, url, f.size, digest)
        weight_files(remotes, _name(address))  # before anything is fetched
        files = {name: _download(remotes[name], folder) for name in small_files(remotes)}
        weights = weight_files(remotes, _name(address), read_index(files))
        check(files)
        missing = sum(remotes[n].bytes or 0 for n in weights if not (folder / remotes[n].digest).exists())
        require_space(folder, missing, f"downloading {_name(address)}")
        files |= {name: _download(remotes[name], folder) for name in weights}
    licence = getattr(info.card_data, "license", None)
    return Fetched("hf", commit, None, None, files, licence if isinstance(licence, str) else None)


def _download(remote: _Remote, folder: Path) -> Path:
    """Return `folder/<digest>`, after fetching any missing part and verifying the checksum."""
    from huggingface_hub.constants import MAX_HTTP_DOWNLOAD_SIZE
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    path = folder / remote.digest
    with one_at_a_time(path):
        if path.exists() and _digest(path, remote.digest) == remote.digest:
            return path
        path.unlink(missing_ok=True)
        part = path.with_name(path.name + ".part")
        had = part.stat().st_size if part.exists() else 0
        if remote.bytes is not None and had > remote.bytes:
            part.unlink()
            had = 0
        if remote.bytes is not None and remote.bytes > MAX_HTTP_DOWNLOAD_SIZE:
            raise TaskError(
                f"{remote.name} is {size(remote.bytes)}, and the hub serves no file over "
                f"{size(MAX_HTTP_DOWNLOAD_SIZE)} by plain HTTP; fetch the repository with `hf download`, then name "
                "its folder as path:"
            )
        require_space(folder, (remote.bytes or 0) - had, f"downloading {remote.name}")
        with part.open("ab") as file:
            http_get(
                remote.url,
                file,
                resume_size=had,
                headers=build_hf_headers(token=_token()),
                expected_size=remote.bytes,
                displayed_filename=remote.name,
            )
        found = _digest(part, remote.digest)
        if found != remote.digest:
            part.unlink()
            raise TaskError(
                f"{remote.name} from {remote.url} has the checksum {found}, but the hub lists "
                f"{remote.digest}; it was deleted. Run again; if the error persists, something modifies the download"
            )
        part.replace(path)
    return path


def _digest(path: Path, like: str) -> str:
    """The checksum of the file, of the same kind as `like`."""
    if len(like) == 64:
        return sha256(path)
    header = b"blob %d\0" % path.stat().st_size
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.sha1(header, usedforsecurity=False)).hexdigest()


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _token() -> str | Literal[False]:
    """The token from the environment; False stops the library from reading one from a file."""
    return os.environ.get("HF_TOKEN", "").strip() or False


def _name(address: HubAddress) -> str:
    return f"hf:{address.repository}@{address.revision}" + (f"/{address.file}" if address.file else "")


@contextmanager
def _explained(address: HubAddress, kind: Kind) -> Iterator[None]:
    """Turn errors of the hub or the network into one line with a remedy."""
    import httpx
    from huggingface_hub import errors

    name, endpoint = _name(address), _endpoint()
    page = f"{endpoint}/{'datasets/' if kind == 'dataset' else ''}{address.repository}"
    access = "HF_TOKEN is set, but its token has no access" if _token() else "HF_TOKEN is not set"
    try:
        yield
    except errors.GatedRepoError as error:
        raise TaskError(
            f"{name} is gated, and {access}; request access on {page}, then set the environment variable "
            "HF_TOKEN to a token of that account"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise TaskError(
            f"{address.repository} has no revision {address.revision!r}; see {page}/tree/main for its "
            "branches, tags and commits"
        ) from error
    except errors.EntryNotFoundError as error:
        raise TaskError(f"{name} not found in the repository; see {page}/tree/{address.revision}") from error
    except errors.RepositoryNotFoundError as error:
        raise TaskError(
            f"no {kind} {address.repository} on {endpoint}, or it is private ({access}); check the spelling, "
            "or set the environment variable HF_TOKEN to a token with read access"
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        answered = f"{endpoint} answered {status} for {name}"
        if status in (401, 403):
            raise TaskError(f"{answered}; {access}: set it to one with read access") from error
        if status in _BUSY or status >= 500:
            raise TransientError(f"{answered}; run again later; the partial download is kept") from error
        raise TaskError(f"{answered}; check the address and HF_ENDPOINT, then run again") from error
    except errors.HFValidationError as error:
        raise TaskError(f"{address.repository!r} is not a valid repository name: {error}") from error
    except errors.OfflineModeIsEnabled as error:
        raise TaskError(f"{name} is not downloaded, and HF_HUB_OFFLINE forbids fetching it; unset it") from error
    except httpx.UnsupportedProtocol as error:
        raise TaskError(f"{endpoint} is not a valid address: {error}; fix HF_ENDPOINT") from error
    except (httpx.HTTPError, OSError) as error:
        # disk errors have an errno, but so does a connection reset
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            raise
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            raise TaskError(
                f"cannot fetch {name}: {urlsplit(endpoint).hostname} shows a certificate that this machine does not "
                "trust, as behind a company's proxy; set SSL_CERT_FILE to a file with the proxy's certificate "
                f"({str(error).rpartition(': ')[2] or error})"
            ) from error
        raise TransientError(
            f"cannot fetch {name} from {endpoint}: {type(error).__name__}; check the network, a proxy and "
            "HF_ENDPOINT, then run again; the partial download is kept"
        ) from error
