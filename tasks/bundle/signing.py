"""The signature of a bundle, `model.sig`, in the format of OpenSSF model signing (a Sigstore bundle).

It covers every file of the bundle, SHA256SUMS included: https://github.com/sigstore/model-transparency. Signatures
differ from run to run, because ECDSA takes a random number.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tasks.bundle.checksums import SIGNATURE, SUMS, check_sums
from tasks.errors import TaskError, TransientError, first_line
from tasks.output import write_text

if TYPE_CHECKING:
    from model_signing import hashing, signing, verifying

KEY, PASSWORD = "MODELPRESS_SIGNING_KEY", "MODELPRESS_SIGNING_PASSWORD"
Way = Literal["key", "keyless"]


@dataclass(frozen=True)
class Signer:
    """Whose signature is expected: of the owner of a public key, or of an identity that an issuer confirmed."""

    key: Path | None = None
    identity: str | None = None
    issuer: str | None = None

    def __str__(self) -> str:
        return f"the key {self.key}" if self.key else f"{self.identity}, confirmed by {self.issuer}"


def sign(bundle: Path, way: Way) -> None:
    """Check the bundle's SHA256SUMS, then sign all of its files and write `model.sig`.

    key: with the private key in the file that MODELPRESS_SIGNING_KEY names. keyless: with a short-lived certificate of
    Sigstore, for the identity of the CI job or, in a terminal, of a login in the browser.

    TaskError if the bundle is damaged or there is no usable key or identity; TransientError if Sigstore is not reached.
    """
    check_sums(bundle)
    from model_signing import signing  # takes a second to import

    config = signing.Config().set_hashing_config(_all_files())
    if way == "key":
        _with_key(config)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / SIGNATURE
        if way == "key":
            config.sign(bundle, made)
        else:
            _sign_keyless(config, bundle, made)
        write_text(bundle / SIGNATURE, made.read_text(encoding="utf-8"))


def check_key() -> None:
    """TaskError unless MODELPRESS_SIGNING_KEY names a private key that can sign."""
    from model_signing import signing

    _with_key(signing.Config())


def check_signature(bundle: Path, sums: Mapping[str, str], signer: Signer) -> None:
    """TaskError unless `model.sig` is a signature of `signer` over exactly the files of the bundle.

    sums: what `check_sums` returned. TransientError if Sigstore's list of trusted certificates, which a keyless
    signature needs, is not reached.
    """
    way = signed_how(bundle)
    if way is None:
        raise TaskError(f"{bundle} has no {SIGNATURE}, so {signer} did not sign it; ask its publisher for one")
    if way != ("key" if signer.key else "keyless"):
        raise TaskError(f"{bundle / SIGNATURE} was made {_HOW[way]}, but {signer} is expected; {_CHECK[way]}")
    from model_signing import verifying

    signature = bundle / SIGNATURE
    config = verifying.Config().set_hashing_config(_all_files())
    _expect(config, signer)
    try:
        config.verify(bundle, signature)
    except Exception as error:  # the library raises errors of many types for a forged or damaged signature
        raise TaskError(
            f"{signature} is no signature of {signer} over these files: {_why(error, signature, sums)}; do not use them"
        ) from error
    if unsigned := {*sums, SUMS} - _signed(signature).keys():  # a signature may leave out paths of its choice
        raise TaskError(f"{signature} leaves out {', '.join(sorted(unsigned))}; ask the publisher to sign all files")


def signed_how(bundle: Path) -> Way | None:
    """How `model.sig` says that it was made; None if there is none. TaskError if it is not a signature."""
    path = bundle / SIGNATURE
    if not path.is_file():
        return None
    try:
        material = json.loads(path.read_text(encoding="utf-8"))["verificationMaterial"]
        return "key" if "publicKey" in material else "keyless"
    except (ValueError, KeyError, TypeError) as error:
        raise TaskError(f"{path} is not a signature of model signing; ask its publisher for it again") from error


_HOW = {"key": "with a key", "keyless": "without a key, through Sigstore"}
_CHECK = {
    "key": "check it with: modelpress verify BUNDLE --key PUBLIC.pem",
    "keyless": "check it with: modelpress verify BUNDLE --identity NAME --issuer URL",
}


def unchecked(bundle: Path) -> str:
    """A line about the signature of a bundle whose signer was not asked for."""
    way = signed_how(bundle)
    if way is None:
        return f"no {SIGNATURE}: nobody signed these files, and whoever changes them can change SHA256SUMS as well"
    return f"{SIGNATURE} was not checked: it was made {_HOW[way]}; {_CHECK[way]}"


def _all_files() -> hashing.Config:
    """Hash every file but the signature; the library by default leaves out .gitattributes and the like."""
    from model_signing import hashing

    return hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)


def _expect(config: verifying.Config, signer: Signer) -> None:
    """Let `config` verify signatures of `signer`."""
    if signer.key is None:
        try:
            config.use_sigstore_verifier(identity=signer.identity or "", oidc_issuer=signer.issuer or "")
        except Exception as error:  # of requests, tuf and sigstore
            raise _unreached(error) from error
        return
    path = _readable(signer.key, "--key", "a public key")
    try:
        config.use_elliptic_key_verifier(public_key=path)
    except (ValueError, AttributeError) as error:
        raise TaskError(
            f"{path} is no public key that can verify; expected PEM, as `openssl ec -pubout` writes"
        ) from error


def _with_key(config: signing.Config) -> None:
    """Let `config` sign with the key that the environment names; no message quotes anything of it."""
    named = os.environ.get(KEY)
    if not named:
        raise TaskError(f"{KEY} is not set; name the file of a private key, or set package.signing: none")
    path = _readable(Path(named), KEY, "a private key")
    password: Any = os.environ.get(PASSWORD)
    try:
        # the library's annotation says str, but it takes bytes
        config.use_elliptic_key_signer(private_key=path, password=password.encode() if password else None)
    except (ValueError, TypeError, AttributeError) as error:
        raise TaskError(
            f"the file in {KEY} is no private key that can sign; expected PEM with an elliptic curve (P-256, P-384 or "
            f"P-521), and its password in {PASSWORD} if it has one"
        ) from error


def _readable(path: Path, named: str, what: str) -> Path:
    if not path.is_file() or not os.access(path, os.R_OK):
        raise TaskError(f"{named} names {path}, which cannot be read; expected the file of {what}")
    return path


def _sign_keyless(config: signing.Config, bundle: Path, made: Path) -> None:
    """Sign for the identity of the CI job; only in a terminal may a browser ask who the user is."""
    from sigstore.oidc import IdentityError, detect_credential

    try:
        token = detect_credential()
        if token is None and not sys.stdin.isatty():
            raise TaskError(
                "no identity for a keyless signature was found: this is neither a CI job with an OIDC token nor a "
                "terminal; sign later with: modelpress sign BUNDLE --keyless, or set package.signing: key"
            )
        config.use_sigstore_signer(identity_token=token)
        config.sign(bundle, made)
    except IdentityError as error:
        raise TaskError(f"the identity for a keyless signature was refused: {first_line(error)}") from error
    except TaskError:
        raise
    except Exception as error:  # of requests, tuf and sigstore
        raise _unreached(error) from error


def _unreached(error: Exception) -> TransientError:
    return TransientError(
        f"Sigstore was not reached: {first_line(error)[:300]}; a keyless signature needs the network. Try again, or "
        "use a key"
    )


def _why(error: Exception, signature: Path, sums: Mapping[str, str]) -> str:
    """The library's reason in one line; a forged signature has no words of its own."""
    text = str(error)
    if text.startswith("Signature mismatch"):
        signed = _signed(signature)
        others = sorted(name for name in signed.keys() | sums if name != SUMS and signed.get(name) != sums.get(name))
        return f"it is of other files (see {', '.join(others) or SUMS})"
    if not text or text.startswith("Key mismatch"):
        return "it was made with another key, or changed"
    return first_line(error)[:300]


def _signed(signature: Path) -> dict[str, str]:
    """The digests by path in a signature that was verified."""
    envelope = json.loads(signature.read_text(encoding="utf-8"))["dsseEnvelope"]
    resources = json.loads(base64.b64decode(envelope["payload"]))["predicate"]["resources"]
    return {one["name"]: one["digest"] for one in resources}
