"""The `push` command: a snapshot or a delta to the Hugging Face Hub, with a card, so that others load it by its name.

robustok push runs/post ORG/NAME metrics=runs/evaluation base=ORG/ORIGINAL licence=mit
robustok evaluate tokenizer=hf://ORG/NAME ...
"""

import io
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from pydantic import Field

from robustok.config import Config, load, plain
from robustok.data.dataset import open_images
from robustok.data.latent_cache import LatentCache, caches_in
from robustok.data.pixels import sheet_of
from robustok.errors import UserError, printable
from robustok.files import IMAGE_FORMATS, json_lines, regular_file
from robustok.hub import check_upload, hub_address, is_remote, repository_of, upload
from robustok.model_card import SEVERAL, licence_fields, model_card, table
from robustok.snapshots import read_header, resolve, write_snapshot
from robustok.tokenizers import encoder_digest, load_tokenizer
from robustok.training.decoder_settings import DecoderTrainingRun
from robustok.training.tokenizer import TokenizerTrainingRun
from robustok.types import Tokenizer

SHOWN = 8  # images in a row of the picture
CELLS = ("pfid@", "noise_fd_cell")  # single cells of a grid, which the card leaves out


class PushRun(Config):
    """What is uploaded, and where to. The token is HF_TOKEN, or that of `hf auth login`."""

    path: Path = Field(description="run folder, snapshot or delta")
    to: str = Field(description="repository on the Hub, ORG/NAME; made if it is not there")
    private: bool = Field(False, description="a new repository is only for its owners")
    licence: str | None = Field(
        None,
        description="licence of your weights, such as mit; those of the weights that they were made from stay",
    )
    base: str | None = Field(
        None, description="ORG/NAME of the original on the Hub: base model of the card, and what a delta is added to"
    )
    metrics: Path | None = Field(
        None, description="folder of `robustok evaluate`, for the card; null: metrics.jsonl in the run folder, if any"
    )
    picture: Path | None = Field(
        None, description="image for the card; null: the newest of samples/, else one made of the run's data or latents"
    )


@dataclass(frozen=True)
class Pushed:
    """What :func:`push` uploaded.

    Attributes:
        url: of the repository.
        load: what to give as ``tokenizer=`` or ``generator=``.
        files: names in the repository.
    """

    url: str
    load: str
    files: list[str]


def push(run: PushRun) -> Pushed:
    """Upload a snapshot or a delta with its card, in one commit.

    Raises:
        UserError: no snapshot, a delta without ``base``, no token, no network, or no access.
    """
    check_upload(run.to)
    folder, header = resolve(run.path), read_header(run.path)
    if header["config"].get("name") == "pipeline":
        raise UserError(f"{folder} only refers to a pipeline and holds no weights; push the tokenizer")
    base = run.base and run.base.removeprefix("hf://")
    if "delta" in header:
        header = _delta_header(header, base)
        base = base or repository_of(header["delta"]["base"])
    if run.licence and "licence" in header:
        others = header["licence"].removeprefix(SEVERAL)
        header |= licence_fields(f"{SEVERAL}{run.licence} (these weights); {others}")
    elif run.licence:
        header |= {"licence": run.licence}
    header, name = _without_folders(header), f"hf://{run.to}"
    picture = _picture(run, folder)
    sections = ["![](picture.png)"] if picture else []
    sections += _metrics(run.metrics or _run_folder(run.path))
    load_function = {"tokenizer": "load_tokenizer", "generator": "load_generator"}.get(header["kind"], "load")
    use = f'```python\nimport robustok\nmodel = robustok.{load_function}("{name}")\n```\n\n'
    use += f"or `robustok COMMAND {header['kind']}={name}`, with [robustok](https://arxiv.org/abs/2509.12474)."
    files: dict[str, Path | bytes] = {file.name: file for file in sorted(folder.glob("*.safetensors"))}
    files["config.yaml"] = yaml.safe_dump(header, sort_keys=False).encode()
    files["README.md"] = printable(model_card(header, use, base, sections)).encode()
    if picture:
        files["picture.png"] = picture
    url = upload(run.to, files, run.private, f"{header['kind']} of robustok")
    return Pushed(url, name, list(files))


def push_to_hub(tokenizer: Tokenizer, to: str, licence: str | None = None, **settings: Any) -> Pushed:
    """Upload a tokenizer that is in memory; ``load_tokenizer("hf://ORG/NAME")`` loads it.

    Args:
        tokenizer: as ``load_tokenizer`` and ``load_pretrained`` give it, or trained by your own code.
        to: ORG/NAME.
        licence: of the weights; None: that of the family's published weights.
        **settings: others of :class:`PushRun`.

    Raises:
        UserError: as :func:`push`.
    """
    with tempfile.TemporaryDirectory() as folder:
        header = {"kind": "tokenizer", "config": plain(tokenizer.config), "latent_space": encoder_digest(tokenizer)}
        header |= licence_fields(licence or tokenizer.licence)
        write_snapshot(Path(folder, "snapshot"), header, tokenizer.state_dict(), {})
        return push(PushRun(path=Path(folder, "snapshot"), to=to, **settings))


def _delta_header(header: dict[str, Any], base: str | None) -> dict[str, Any]:
    """The header with the original's address on the Hub."""
    known = header["delta"]["base"]
    if base is None and not is_remote(known):
        raise UserError(
            f"a delta is loaded with its original, {known}, which others do not have; push that first, then give "
            "base=ORG/NAME"
        )
    return header | {"delta": header["delta"] | {"base": f"hf://{base}" if base else hub_address(known)}}


def _without_folders(value: Any) -> Any:
    """Settings without the folders of this machine: of absolute paths only the last part stays."""
    if isinstance(value, dict):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value


def _run_folder(path: Path) -> Path | None:
    """The run folder of a path: itself, or the one that a snapshot is in."""
    return next((one for one in (path, *path.parents[:2]) if (one / "log.jsonl").is_file()), None)


def _metrics(folder: Path | None) -> list[str]:
    """A table of what was measured."""
    file = folder / "metrics.jsonl" if folder is not None else None
    if file is None or not file.is_file():
        return []
    lines = json_lines(regular_file(file).read_text(errors="replace"))[0]
    lines = [one for one in lines if "metric" in one and not str(one["metric"]).startswith(CELLS)]
    if not lines:
        return []
    columns = ("metric", "value", "standard_error", "samples", "decoder", "tokenizer", "extractor", "reference")
    used = [column for column in columns if any(line.get(column) is not None for line in lines)]
    rows = [[_cell(line.get(column)) for column in used] for line in lines]
    return ["## Measured", table([column.replace("_", " ") for column in used], rows)]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = "" if value is None else str(_without_folders(value))
    return printable(text).replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


# The picture


def _picture(run: PushRun, snapshot: Path) -> bytes | None:
    """A PNG file for the card."""
    folder = _run_folder(run.path)
    drawn = sorted((folder / "samples").glob("[0-9]*.png"))[-1:] if folder is not None else []
    if run.picture is not None or drawn:
        with Image.open(regular_file(run.picture or drawn[0]), formats=IMAGE_FORMATS) as image:
            return _png(image.convert("RGB"))
    if folder is None or not (folder / "config.yaml").is_file():
        return None
    for make in (_before_after, _reconstructions):
        try:
            return _png(Image.fromarray(sheet_of(make(folder, snapshot))))
        except (UserError, OSError, KeyError, StopIteration):  # a run of another kind, or its data are gone
            continue
    return None


def _png(image: Image.Image) -> bytes:
    """A PNG file; a small picture is enlarged by a whole number, so that pixels stay pixels."""
    stream, factor = io.BytesIO(), max(1, 512 // image.width)
    image = image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)
    image.save(stream, "PNG")
    return stream.getvalue()


@torch.no_grad()
def _before_after(folder: Path, snapshot: Path) -> torch.Tensor:
    """The same latents before and after post-training, free samples if there are any: (2, n, 3, H, W)."""
    settings = load(DecoderTrainingRun, folder / "config.yaml")
    held_out = settings.held_out.latents if settings.held_out else None
    cache = next(filter(None, (settings.samples, held_out, settings.pairs, settings.latents)))
    latents = LatentCache(caches_in(cache)[0]).read(slice(0, SHOWN)).latents
    return torch.stack([load_tokenizer(path).decode(latents) for path in (settings.tokenizer, snapshot)])


@torch.no_grad()
def _reconstructions(folder: Path, snapshot: Path) -> torch.Tensor:
    """Images above their reconstructions: (2, n, 3, H, W)."""
    settings, tokenizer = load(TokenizerTrainingRun, folder / "config.yaml"), load_tokenizer(snapshot)
    data = open_images(settings.data, tokenizer.image_size, "test")
    images = data.read(range(min(SHOWN, len(data)))).images
    return torch.stack([images, tokenizer.decode(tokenizer.encode(images))])
