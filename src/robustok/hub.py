"""Downloads from the Hugging Face Hub, and uploads.

The token is the one in the environment (HF_TOKEN), or that of the library's own login (`hf auth login`).
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from robustok.console import shows_bars
from robustok.errors import UserError
from robustok.files import one_line

HUB_STEMS = ("model", "pytorch_model", "diffusion_pytorch_model")  # files of these names have a config.json beside them


def is_remote(path: str | Path) -> bool:
    """Whether a path is on the Hugging Face Hub: ``hf://...``, or ``hf:/...``, as pathlib shortens it."""
    return re.match(r"hf:/", str(path)) is not None


def hub_address(path: str | Path) -> str:
    """A path on the Hub as it was written: pathlib makes hf:/ORG of hf://ORG."""
    return re.sub("^hf:/+", "hf://", Path(path).as_posix())


def repository_of(address: str | Path) -> str:
    """``ORG/REPO`` of an address on the Hub.

    Raises:
        UserError: not such an address.
    """
    return _parse(address)[0]


def download(address: str | Path) -> Path:
    """Fetch ``hf://ORG/REPO/FILE`` or ``hf://ORG/REPO@REVISION/FILE`` into the cache of huggingface_hub.

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


@cache
def download_snapshot(address: str) -> Path:
    """Fetch one of our snapshots, ``hf://ORG/NAME``, once in this process; the folder in the cache of huggingface_hub.

    Raises:
        UserError: as :func:`download_folder`; or there is no snapshot.
    """
    folder = download_folder(address, ["config.yaml", "README.md", "*.safetensors"])
    if not all((folder / name).is_file() for name in ("config.yaml", "model.safetensors")):
        raise UserError(
            f"{address} holds no snapshot of robustok (config.yaml and model.safetensors); other people's weights are "
            "given as KEY.weights=..., or converted"
        )
    return folder


def check_upload(repository: str) -> None:
    """Refuse what could not be uploaded, before any work.

    Raises:
        UserError: ``repository`` is not ORG/NAME, or there is no token.
    """
    from huggingface_hub import get_token

    if re.fullmatch(r"[\w.-]+/[\w.-]+", repository) is None:
        raise UserError(f"got {repository}, expected ORG/NAME, as in to=me/my-tokenizer")
    if get_token() is None:
        raise UserError(f"no token to write {repository}; set HF_TOKEN in the environment, or run `hf auth login` once")


def upload(repository: str, files: Mapping[str, Path | bytes], private: bool, message: str) -> str:
    """Make a repository, or take the one that is there, and put files into it in one commit.

    Args:
        repository: ``ORG/NAME``.
        files: path in the repository to a file on disk, or its content.
        private: of a new repository: only for its owners.
        message: of the commit.

    Returns:
        The repository's address on the web.

    Raises:
        UserError: no such name, no token, no network, or no access.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    check_upload(repository)
    with _reporting(f"upload to {repository}", "check name and network, and that the token may write there"):
        api = HfApi()
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.create_commit(repository, [CommitOperationAdd(*file) for file in files.items()], commit_message=message)
    return str(url)


def _parse(address: str | Path) -> tuple[str, dict[str, Any], str]:
    """Repository, options of a download and path in the repository, empty for the whole repository."""
    found = re.fullmatch(r"hf:/+([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.*))?", str(address).replace(os.sep, "/"))
    if found is None:
        raise _malformed(address)
    repository, revision, path = found.groups()
    return repository, {"revision": revision}, (path or "").rstrip("/")


def _malformed(address: str | Path) -> UserError:
    return UserError(f"got {address}, expected hf://ORG/REPO/FILE such as hf://yucornetto/RAR/rar_b.bin")


def _quiet() -> None:
    """No bars of huggingface_hub where stderr is a file, in which they would be lines."""
    from huggingface_hub.utils import disable_progress_bars

    if not shows_bars():
        disable_progress_bars()


def _first_sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return one_line(lines[0], 200).partition(". ")[0][:160]


@contextmanager
def _reporting(doing: str, advice: str) -> Iterator[None]:
    """Context in which every failure of huggingface_hub becomes a UserError."""
    _quiet()
    try:
        yield
    except Exception as error:  # of many types
        reason = _first_sentence(error)
        raise UserError(f"cannot {doing} ({type(error).__name__}: {reason}); {advice}") from None


def _downloading(what: str) -> AbstractContextManager[None]:
    return _reporting(f"download {what}", "check address and network, or download it yourself and give its path")
