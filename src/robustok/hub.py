"""Downloads from the Hugging Face Hub."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from robustok.errors import UserError

HUB_STEMS = ("model", "pytorch_model", "diffusion_pytorch_model")  # such files have their config.json beside them


def is_remote(path: str | Path) -> bool:
    """Whether a path names a file on the Hugging Face Hub: ``hf://...``, or what pathlib makes of it."""
    return re.match(r"hf:/", str(path)) is not None


def download(address: str | Path) -> Path:
    """Fetch ``hf://ORG/REPO/FILE`` or ``hf://ORG/REPO@REVISION/FILE`` into the cache of huggingface_hub.

    A token is taken from the environment variable HF_TOKEN alone.

    Raises:
        UserError: another form of address; no network, no such file, or no access.
    """
    repository, options, file = _address(address)
    if not file:
        raise UserError(f"got {address}, expected hf://ORG/REPO/FILE such as hf://yucornetto/RAR/rar_b.bin")
    from huggingface_hub import hf_hub_download

    with _one_line(f"{file} of {repository}"):
        path = Path(hf_hub_download(repository, file, **options))
    if path.stem in HUB_STEMS:
        with suppress(Exception):  # not every repository has one
            hf_hub_download(repository, str(Path(file).with_name("config.json").as_posix()), **options)
    return path


def download_folder(address: str | Path, patterns: Sequence[str]) -> Path:
    """Fetch those files of ``hf://ORG/REPO``, or of its folder ``hf://ORG/REPO/FOLDER``, whose paths in it fit.

    Args:
        address: as for :func:`download`, of a repository or of a folder in it.
        patterns: such as ``vae/*.safetensors``.

    Returns:
        The folder in the cache of huggingface_hub.

    Raises:
        UserError: another form of address; no network, no such repository, or no access.
    """
    repository, options, folder = _address(address)
    from huggingface_hub import snapshot_download

    with _one_line(f"{folder or 'the folder'} of {repository}"):
        wanted = [f"{folder}/{pattern}" if folder else pattern for pattern in patterns]
        return Path(snapshot_download(repository, allow_patterns=wanted, **options)) / folder


def _address(address: str | Path) -> tuple[str, dict[str, Any], str]:
    """Repository, options of a download and path in the repository, which is empty for all of it."""
    found = re.fullmatch(r"hf:/+([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.*))?", str(address).replace(os.sep, "/"))
    if found is None:
        raise UserError(f"got {address}, expected hf://ORG/REPO/FILE such as hf://yucornetto/RAR/rar_b.bin")
    repository, revision, path = found.groups()
    return repository, {"revision": revision, "token": os.environ.get("HF_TOKEN") or False}, (path or "").rstrip("/")


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Context of a download."""
    try:
        yield
    except Exception as error:  # of many kinds, all of which the user can act on
        reason = one_line_of(error).partition(". ")[0][:160] or type(error).__name__
        raise UserError(
            f"cannot download {what} ({type(error).__name__}: {reason}); "
            "check address and network, or download it yourself and give its path"
        ) from None


def one_line_of(error: Exception) -> str:
    """An exception's message on one line, cut to 200 characters."""
    return " ".join(str(error).split())[:200]
