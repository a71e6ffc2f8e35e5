"""Downloads from the Hugging Face Hub."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from robustok.errors import UserError
from robustok.files import one_line

HUB_STEMS = ("model", "pytorch_model", "diffusion_pytorch_model")  # files of these names have a config.json beside them


def is_remote(path: str | Path) -> bool:
    """Whether a path is on the Hugging Face Hub: ``hf://...``, or ``hf:/...``, as pathlib shortens it."""
    return re.match(r"hf:/", str(path)) is not None


def repository_of(address: str | Path) -> str:
    """``ORG/REPO`` of an address on the Hub.

    Raises:
        UserError: not such an address.
    """
    return _parse(address)[0]


def download(address: str | Path) -> Path:
    """Fetch ``hf://ORG/REPO/FILE`` or ``hf://ORG/REPO@REVISION/FILE`` into the cache of huggingface_hub.

    A token is only read from the environment variable HF_TOKEN.

    Raises:
        UserError: not such an address; no network, no such file, or no access.
    """
    repository, options, file = _parse(address)
    if not file:
        raise _malformed(address)
    from huggingface_hub import hf_hub_download

    with _downloading(f"{file} of {repository}"):
        path = Path(hf_hub_download(repository, file, **options))
    if path.stem in HUB_STEMS:
        with suppress(Exception):  # not all repositories have one
            hf_hub_download(repository, str(Path(file).with_name("config.json").as_posix()), **options)
    return path


def download_folder(address: str | Path, patterns: Sequence[str]) -> Path:
    """Fetch the files of ``hf://ORG/REPO``, or of its folder ``hf://ORG/REPO/FOLDER``, that match the patterns.

    Args:
        address: of a repository or of a folder in it, as for :func:`download`.
        patterns: such as ``vae/*.safetensors``.

    Returns:
        The folder in the cache of huggingface_hub.

    Raises:
        UserError: not such an address; no network, no such repository, or no access.
    """
    repository, options, folder = _parse(address)
    from huggingface_hub import snapshot_download

    with _downloading(f"{folder or 'the folder'} of {repository}"):
        wanted = [f"{folder}/{pattern}" if folder else pattern for pattern in patterns]
        return Path(snapshot_download(repository, allow_patterns=wanted, **options)) / folder


def _parse(address: str | Path) -> tuple[str, dict[str, Any], str]:
    """Repository, options of a download and path in the repository, empty for the whole repository."""
    found = re.fullmatch(r"hf:/+([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.*))?", str(address).replace(os.sep, "/"))
    if found is None:
        raise _malformed(address)
    repository, revision, path = found.groups()
    return repository, {"revision": revision, "token": os.environ.get("HF_TOKEN") or False}, (path or "").rstrip("/")


def _malformed(address: str | Path) -> UserError:
    return UserError(f"got {address}, expected hf://ORG/REPO/FILE such as hf://yucornetto/RAR/rar_b.bin")


@contextmanager
def _downloading(what: str) -> Iterator[None]:
    """Context in which every failure of a download becomes a UserError."""
    try:
        yield
    except Exception as error:  # of many types
        reason = one_line(error, 200).partition(". ")[0][:160]
        raise UserError(
            f"cannot download {what} ({type(error).__name__}: {reason}); "
            "check address and network, or download it yourself and give its path"
        ) from None
