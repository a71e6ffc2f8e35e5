"""Official weights from a local file, torch.hub's cache or the official address, with the digest of the file."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

import torch
from torch import Tensor

from robustok.checkpoints import read_checkpoint
from robustok.errors import UserError
from robustok.files import one_line, unreadable
from robustok.snapshots import check_finite_weights


@dataclass(frozen=True)
class OfficialWeights:
    """A state dict and where it comes from.

    Attributes:
        state: name to tensor, on the CPU.
        digest: first eight hexadecimal digits of the file's SHA-256.
        official: whether the digest is that of the official file.
        source: the file, for messages.
    """

    state: dict[str, Tensor]
    digest: str
    official: bool
    source: Path


def load_weights(url: str, path: str | Path | None, what: str, setting: str) -> OfficialWeights:
    """Read a state dict without running code in it.

    Args:
        url: official address; its file is named ``NAME-DIGEST.pth``, the first digits of its SHA-256, as torch.hub
            expects it.
        path: local file, which may hold other weights; None takes the official one, from torch.hub's cache or its
            address.
        what: names the network in messages, such as "Inception".
        setting: names the setting that takes a path, such as "extractor.path".

    Raises:
        UserError: the file is missing and did not arrive, cannot be read, is no state dict, holds weights that are not
            finite, or is in the cache under the official name with other content.
    """
    name = Path(urlparse(url).path).name
    expected = re.fullmatch(r".*-([0-9a-f]{8,})\.pth", name)[1]
    source = Path(path) if path is not None else _cached(url, name, what, setting)
    if problem := unreadable(source):
        raise UserError(f"cannot read the {what} weights {source}: {problem}; give the file {name} as {setting}")
    source = source.expanduser()
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[: len(expected)]
    if path is None and digest != expected:
        found = f"{source} has the SHA-256 {digest}..., expected {expected}..."
        raise UserError(f"{found}; delete it to download it again, or give {setting}=FILE")
    try:
        state = read_checkpoint(source).weights
        check_finite_weights(state, "it")
    except UserError as error:
        raise unfit(source, what, error, name) from None
    return OfficialWeights(state, digest, digest == expected, source)


def unfit(source: Path, what: str, error: Exception, name: str) -> UserError:
    """The error for a file with other content."""
    reason = one_line(error).removeprefix(f"{source} ").partition("; ")[0]  # the rest is advice for other files
    return UserError(f"{source} holds no {what} weights ({reason}); expected the state dict of {name}")


def _cached(url: str, name: str, what: str, setting: str) -> Path:
    """The file's path in torch.hub's cache, downloaded if it is not there yet."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.exists():
        try:
            torch.hub.load_state_dict_from_url(
                url, map_location="cpu", progress=False, check_hash=True, weights_only=True
            )
        except (OSError, RuntimeError) as error:  # no network, no space; a hash that does not fit
            reason = one_line(error)
            put = f"download {url} elsewhere and put it there, or give its path as {setting}=FILE"
            raise UserError(f"the {what} weights are not at {path} and did not arrive ({reason}); {put}") from None
    return path
