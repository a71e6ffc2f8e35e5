"""Model cards: what the README.md of a snapshot tells people, from what its config.yaml says."""

from typing import Any

import yaml

TOLD = (
    "config",
    "kind",
    "licence",
    "source",
    "post_trained",
    "protocol",
    "held_out",
    "sweep",
    "delta",
    "discriminator",
)


def model_card(header: dict[str, Any], use: str | None = None) -> str:
    """A README.md for a snapshot, with the protocol and the licence of a post-trained one.

    Args:
        header: what config.yaml holds; ``kind`` and ``config`` at least.
        use: how the weights beside the card are loaded, in Markdown; None is for a snapshot.
    """
    config, kind = header["config"], header["kind"]
    facts = "\n".join(f"- {key}: {value}" for key, value in header.items() if key not in TOLD)
    load = {"tokenizer": "load_tokenizer", "generator": "load_generator"}.get(kind, "load")
    loading = f'```python\nimport robustok\nmodel = robustok.{load}("path/to/this/folder")\n```'
    parts = [
        f"---\nlibrary_name: robustok\ntags: [image-{kind}]\n---\n# {config.get('name')} {kind}",
        "Made by robustok.",
        facts,
        *(_delta(header["delta"]) if "delta" in header else ()),
        *(_post_training(header) if "post_trained" in header else ()),
        *(_held_out(header) if "held_out" in header else ()),
        *(["## Licence", f"Of the original weights: {header['licence']}."] if "licence" in header else ()),
        f"## Use\n\n{use or loading}",
        f"```yaml\n{yaml.safe_dump(config, sort_keys=False)}```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _post_training(header: dict[str, Any]) -> list[str]:
    """How the decoder was fine-tuned."""
    facts, protocol = header["post_trained"], header.get("protocol", {})
    text = (
        "The decoder alone learned to make real images of latents in which a generator replaced a share of the real "
        "ones; sigma is the share that was kept. Encoder and latents are those of the original tokenizer."
    )
    if facts.get("trainable", "decoder") != "decoder":
        text = "All but the encoder's transformer learned, as in the released procedure."
    rows = {key: value for key, value in (facts | protocol).items() if value is not None}
    return ["## Post-training", text, _table(("setting", "value"), rows.items())]


def _held_out(header: dict[str, Any]) -> list[str]:
    """What chose this snapshot."""
    distances, rows = header["held_out"], header.get("sweep")
    text = (
        f"Frechet distance to real images on held-out samples, which chose this snapshot and are no result to report: "
        f"{distances['distance']:.4g}, of the decoder it started from {distances['at_the_start']:.4g}."
    )
    return [text, *(["All that was tried:", _table(rows[0], (row.values() for row in rows))] if rows else [])]


def _delta(facts: dict[str, Any]) -> list[str]:
    """What a delta needs, and how much of the difference it holds."""
    rank = "all of it" if facts["rank"] is None else f"rank {facts['rank']}"
    return [
        f"This snapshot holds the difference to another one alone ({rank}, {facts['dtype']}, relative error "
        f"{facts['relative_error']:.3g}). The weights of `{facts['base']}`, digest {facts['digest']}, belong to it. "
        "Behind its path, `@0.5` mixes both decoders half and half."
    ]


def _table(heads: Any, rows: Any) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join("" if cell is None else str(cell) for cell in line) + " |" for line in lines)
