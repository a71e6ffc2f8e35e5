"""Model cards: the README.md of a snapshot, from the content of its config.yaml."""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import yaml

from robustok.hub import is_remote, repository_of

OWN_SECTION = ("config", "kind", "licence", "post_trained", "protocol", "held_out", "price", "sweep", "delta")
OWN_SECTION += ("discriminator",)
PRICES = {"psnr": "PSNR (dB)", "rfd": "rFD", "lpips_alex": "LPIPS"}  # of reconstructions of real images
SEVERAL = "several: "  # begins the licence of what was made from several weights
HUB_LICENCES = ("mit", "apache-2.0", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0")


def model_card(
    header: dict[str, Any], use: str | None = None, base: str | None = None, sections: Iterable[str] = ()
) -> str:
    """A README.md for a snapshot: metadata for the Hub, provenance, post-training, licence and configuration.

    Args:
        header: content of config.yaml; at least ``kind`` and ``config``.
        use: how to load the weights beside the card, in Markdown; None if they are a snapshot.
        base: ``ORG/NAME`` of the original on the Hub; None takes it from the header.
        sections: further parts, in Markdown, in front of how it was made.
    """
    from huggingface_hub import ModelCardData  # here, because it takes a while to import

    config, kind = header["config"], header["kind"]
    file = header.get("source", {}).get("file", "")
    data = ModelCardData(
        library_name="robustok",
        tags=[f"image-{kind}"],
        base_model=base or (repository_of(file) if is_remote(file) else None),
        **_hub_licence(header.get("licence")),
    )
    load = {"tokenizer": "load_tokenizer", "generator": "load_generator"}.get(kind, "load")
    loading = f'```python\nimport robustok\nmodel = robustok.{load}("path/to/this/folder")\n```'
    parts = [
        f"---\n{data.to_yaml()}\n---\n# {config.get('name')} {kind}",
        "Made by robustok.",
        *sections,
        "\n".join(f"- {key}: {value}" for key, value in _own(header).items()),
        *(_delta(header["delta"]) if "delta" in header else ()),
        *(_post_training(header) if "post_trained" in header else ()),
        *(_held_out(header) if "held_out" in header else ()),
        *(_price(header["price"]) if "price" in header else ()),
        *(["## Licence", _licence(header)] if "licence" in header else ()),
        f"## Use\n\n{use or loading}",
        f"```yaml\n{yaml.safe_dump(config, sort_keys=False)}```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _own(header: Mapping[str, Any]) -> dict[str, Any]:
    """What has no section of its own; without the step of weights that were trained elsewhere, which is 0."""
    found = {key: value for key, value in header.items() if key not in (*OWN_SECTION, "source")}
    return {key: value for key, value in found.items() if (key, value) != ("step", 0)}


def licence_fields(licence: str) -> dict[str, str]:
    """``licence`` of a header, and ``commercial_use`` where it restricts that."""
    if re.search(r"\bnc\b|non-?commercial", licence, re.IGNORECASE):
        use = "NOT PERMITTED by this licence, nor of decoders trained from these weights"
    elif re.search(r"\bnone\b|without a licence|no licence", licence, re.IGNORECASE):
        use = "UNCLEAR, as some of the weights or code came without a licence; ask the authors"
    else:
        return {"licence": licence}
    return {"licence": licence, "commercial_use": use}


def add_licence(header: dict[str, Any], licence: str | None, part: str) -> None:
    """Add the licence of further weights that a model was made from, such as those of the "generator", to its header.

    Licences that the header has already are not repeated.
    """
    old = header.get("licence") or ""
    if licence and licence not in old:
        both = [old if not old or old.startswith(SEVERAL) else f"{SEVERAL}{old} ({header['kind']})"]
        text = "; ".join([*filter(None, both), f"{licence} ({part})"])
        header |= licence_fields(text if text.startswith(SEVERAL) else SEVERAL + text)


def _licence(header: dict[str, Any]) -> str:
    text = header["licence"]
    whose = "Of the original weights" if "source" in header else "Of the weights"
    whose = "Of all the weights that it was made from" if text.startswith(SEVERAL) else whose
    return f"{whose}: {text.removeprefix(SEVERAL)}."


def _hub_licence(text: str | None) -> dict[str, str]:
    """The licence by its name on the Hub; ``other`` if it has none, or if parts of the original have no licence."""
    if text is None:
        return {}
    name = re.match(r"[\w.-]*", text)[0].lower()
    if name in HUB_LICENCES and not re.search(r"without a licence|no licence", text):
        return {"license": name}
    return {"license": "other", "license_name": "see-model-card"}


def _post_training(header: dict[str, Any]) -> list[str]:
    """How the decoder was fine-tuned."""
    settings = {**header["post_trained"], **header.get("protocol", {})}
    text = (
        "The decoder was fine-tuned to reconstruct real images from latents in which a generator replaced a share of "
        "the real ones; sigma is the share that was kept. Encoder and latents are those of the original tokenizer."
    )
    if "objective" in settings:
        text = (
            "The decoder was fine-tuned on latents of several kinds, by weight. paired: real ones of which a generator "
            "replaced a share; free: samples of a generator, with an adversary and consistency with the original "
            "decoder; noise: real ones with noise; clean: real ones. Encoder and latents are those of the original "
            "tokenizer."
        )
    if settings.get("trainable", "decoder") != "decoder":
        text = "All but the encoder's transformer was trained, as in the authors' code."
    rows = ((key, value) for key, value in settings.items() if value is not None)
    return ["## Post-training", text, table(("setting", "value"), rows)]


def _held_out(header: dict[str, Any]) -> list[str]:
    """The validation score by which the snapshot was chosen."""
    score, rows = header["held_out"], header.get("sweep")
    text = (
        f"Frechet distance to real images on held-out samples: {score['distance']:.4g}, before post-training "
        f"{score['at_the_start']:.4g}. This snapshot was chosen by it, so it is not a result to report."
    )
    return [text, *(["All that was tried:", table(rows[0], (row.values() for row in rows))] if rows else [])]


def price_fields(after: Mapping[str, float], before: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """``price`` of a header: what reconstructions of held-out real images were before post-training, and are now."""
    found = {name: {"before": before[name], "after": after[name]} for name in PRICES if name in after}
    return {"price": found} if found else {}


def _price(price: Mapping[str, Mapping[str, float]]) -> list[str]:
    """What post-training cost in reconstructions."""
    rows = ([PRICES[name], *(f"{value[when]:.4g}" for when in ("before", "after"))] for name, value in price.items())
    return ["Its price, in reconstructions of held-out real images:", table(("", "before", "after"), rows)]


def _delta(delta: dict[str, Any]) -> list[str]:
    """What a delta needs, and its size and error."""
    rank = "all of it" if delta["rank"] is None else f"rank {delta['rank']}"
    return [
        f"This snapshot holds only the difference to another one ({rank}, {delta['dtype']}, relative error "
        f"{delta['relative_error']:.3g}). It needs the weights of `{delta['base']}`, digest {delta['digest']}. "
        "`@0.5` after its path mixes both decoders half and half."
    ]


def table(heads: Collection[Any], rows: Iterable[Iterable[Any]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join("" if cell is None else str(cell) for cell in line) + " |" for line in lines)
