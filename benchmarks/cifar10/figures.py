"""Tables (Markdown) and plots of the studies, from the metrics.jsonl of their evaluations."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import main_training
import matplotlib.pyplot as plt
import numpy as np
import pipelines
import torch
from scipy.stats import spearmanr
from setting import EVALUATOR, SECOND
from sklearn.manifold import TSNE

import post_training
from post_training import PAIRS, Pair
from robustok.data.latent_cache import LatentCache
from robustok.data.pixels import to_pixels
from robustok.metrics.codebook import codebook_perplexity, count_tokens
from robustok.tokenizers import load_tokenizer

Line = Mapping[str, Any]
SPACES = {f"cifar-resnet{EVALUATOR}": "ResNet-56", f"cifar-resnet{SECOND}": "ResNet-44", "classifier": "small"}


def lines_of(folder: Path) -> list[Line]:
    """What an evaluation measured; the last of equal lines. None if it was not run."""
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def space_of(line: Line) -> str:
    """Short name of the feature space of a line."""
    found = [name for key, name in SPACES.items() if str(line["extractor"]).startswith(key)]
    return found[0] if found else str(line["extractor"])


def find(lines: Sequence[Line], metric: str, space: str | None = "ResNet-56", **fields: Any) -> Line | None:
    """The last line of a metric, in a space, with these fields."""
    for line in reversed(lines):
        named = str(line["metric"]).partition("@")[0] == metric and (space is None or space_of(line) == space)
        if named and all(line.get(key) == value for key, value in fields.items()):
            return line
    return None


def number(line: Line | None, digits: int = 2, signed: bool = False, error: bool = True) -> str:
    """A value with its standard error."""
    if line is None:
        return ""
    text = f"{line['value']:{'+' if signed else ''}.{digits}f}"
    return f"{text} ± {line['standard_error']:.{digits}f}" if error and line["standard_error"] is not None else text


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))


# Post-training


def best_sigmas(out: Path) -> dict[str, float]:
    """The sigma of each pair whose decoder had the lowest gFD on samples that are not reported."""
    best = {}
    for pair in PAIRS:
        lines = lines_of(out / pair.name / "sigma")
        best[pair.name] = min(pair.sigmas, key=lambda s: find(lines, "gfid", decoder=f"paired-{s:g}")["value"])
    return best


def draw_post_training(out: Path) -> None:
    """Write ``post-training.md`` and the plots."""
    parts = [f"## {pair.name}\n\n{pair_table(out, pair)}" for pair in PAIRS if lines_of(out / pair.name / "gfid")]
    parts += [f"## Over seeds\n\n{post_seeds_table(out)}"]
    parts += [f"## Transfer\n\n{transfer_table(out)}", f"## When it pays\n\n{pays_table(out)}"]
    (out / "post-training.md").write_text("\n\n".join(parts) + "\n")
    print("\n\n".join(parts))
    draw_changes(out, out / "post-training.png")
    draw_pays(out, out / "when-it-pays.png")
    draw_long(out, out / "how-long.png")
    draw_samples(out, out / "samples.png")


def pair_table(out: Path, pair: Pair) -> str:
    """A row for each decoder."""
    lines = lines_of(out / pair.name / "gfid")
    names = list(dict.fromkeys(line["decoder"] for line in lines if line.get("decoder")))
    rows = []
    for name in names:
        quality = lines_of(out / pair.name / f"reconstructions-{name}")
        if name == "before":
            change = [number(find(lines, "gfid", space, decoder=name)) for space in SPACES.values()]
            validation = number(find(lines, "gfid_validation", decoder=name))
        else:
            of = {"decoder": name, "versus": "before"}
            change = [number(find(lines, "gfid_difference", s, **of), signed=True) for s in SPACES.values()]
            validation = number(find(lines, "gfid_validation_difference", **of), signed=True)
        kid = number(find(lines, "kid", decoder=name), 4)
        price = [number(find(quality, "rfid", s)) for s in ("ResNet-56", "small")]
        rows.append([name, *change, validation, kid, *price, number(find(quality, "psnr", None))])
    return table(
        ["decoder", *SPACES.values(), "validation", "KID", "rFD ResNet-56", "rFD small", "PSNR"],
        rows,
    )


def post_seeds_table(out: Path) -> str:
    """Change of gFD by the control and by free samples: mean and standard error over seeds of the post-training."""
    rows = []
    for pair in PAIRS:
        found = {0: lines_of(out / pair.name / "gfid")}
        found |= {seed: lines_of(out / pair.name / f"gfid-seed{seed}") for seed in post_training.SEEDS}
        found = {seed: lines for seed, lines in found.items() if lines}
        changes = {}  # of each objective, (seeds, spaces)
        for objective in ("clean", "free"):
            values = []
            for seed, lines in found.items():
                of = {"decoder": f"{objective}-seed{seed}" if seed else objective, "versus": "before"}
                values.append([find(lines, "gfid_difference", space, **of)["value"] for space in SPACES.values()])
            changes[objective] = np.array(values)
        if len(found) > 1:
            changes["free minus clean"] = changes["free"] - changes["clean"]
            for name, values in changes.items():
                errors = values.std(0, ddof=1) / len(values) ** 0.5
                cells = (f"{m:+.2f} ± {e:.2f}" for m, e in zip(values.mean(0), errors, strict=True))
                rows.append([pair.name, str(len(values)), name, *cells])
    return table(["pair", "seeds", "decoder", *SPACES.values()], rows)


def transfer_table(out: Path) -> str:
    """The first pair's decoders on other generators' samples."""
    rows = []
    for other in post_training.OTHERS:
        lines = lines_of(out / PAIRS[0].name / f"transfer-{other}")
        for name in dict.fromkeys(line["decoder"] for line in lines if line.get("decoder")):
            of = {"decoder": name, "versus": "before"}
            metric, signed = ("gfid", False) if name == "before" else ("gfid_difference", True)
            of = {"decoder": name} if name == "before" else of
            rows.append([other, name, *(number(find(lines, metric, s, **of), signed=signed) for s in SPACES.values())])
    return table(["generator", "decoder", *SPACES.values()], rows)


def gaps(out: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """Figures of each generator, weak ones too: gain of ``free``, of the control, and of the gap between latents."""
    for pair in PAIRS:
        for step in (*post_training.weak_steps(), None):
            lines = lines_of(out / pair.name / (f"gfid-{step}" if step else "gfid"))
            free = f"free-step{step}" if step else "free"
            changes = {
                "free": find(lines, "gfid_difference", decoder=free, versus="before"),
                "clean": find(lines, "gfid_difference", decoder="clean", versus="before"),
                "before": find(lines, "gfid", decoder="before"),
            }
            if None in changes.values():
                continue
            figures = {key: line["value"] for key, line in changes.items()}
            figures |= {line["metric"]: line["value"] for line in lines if line["extractor"] is None}  # of the gap
            quality = find(lines_of(out / pair.name / "reconstructions-before"), "rfid")
            yield (
                f"{pair.name}{f' {step}' if step else ''}",
                figures | {"rfid": quality["value"] if quality else np.nan},
            )


def pays_table(out: Path) -> str:
    """A row for each generator."""
    found = dict(gaps(out))
    keys = list(dict.fromkeys(key for figures in found.values() for key in figures))
    rows = [[name, *(f"{figures.get(key, np.nan):.3f}" for key in keys)] for name, figures in found.items()]
    return table(["generator", *keys], rows)


def draw_changes(out: Path, file: Path) -> None:
    """Bars: change of gFD by each objective, in each space, as a share of gFD before."""
    figure, axes = plt.subplots(1, len(PAIRS), figsize=(4 * len(PAIRS), 4), sharey=True, squeeze=False)
    for axis, pair in zip(axes[0], PAIRS, strict=True):
        lines = lines_of(out / pair.name / "gfid")
        names = [n for n in dict.fromkeys(line.get("decoder") for line in lines) if n not in (None, "before")]
        for i, space in enumerate(SPACES.values()):
            before = find(lines, "gfid", space, decoder="before")
            found = [find(lines, "gfid_difference", space, decoder=name, versus="before") for name in names]
            values = [100 * line["value"] / before["value"] for line in found]
            errors = [100 * (line["standard_error"] or 0) / before["value"] for line in found]
            axis.bar(np.arange(len(names)) + 0.27 * (i - 1), values, 0.25, yerr=errors, label=space)
        axis.set_xticks(range(len(names)), names, rotation=60, ha="right")
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_title(pair.name)
    axes[0, 0].set_ylabel("change of gFD in %")
    axes[0, 0].legend()
    _save(figure, file)


def draw_pays(out: Path, file: Path) -> None:
    """Gain of ``free`` beyond the control against the gap: gFD before over rFD."""
    found = dict(gaps(out))
    figure, axis = plt.subplots(figsize=(5, 4))
    for name, figures in found.items():
        x, y = figures["before"] / figures["rfid"], 100 * (figures["free"] - figures["clean"]) / figures["before"]
        axis.scatter(x, y)
        axis.annotate(name, (x, y), fontsize=8, xytext=(3, 3), textcoords="offset points")
    axis.set_xlabel("gFD before / rFD (ResNet-56)")
    axis.set_ylabel("free minus control, % of gFD before")
    axis.axhline(0, color="black", linewidth=0.8)
    _save(figure, file)


def draw_long(out: Path, file: Path) -> None:
    """Curves: change of gFD over the steps of longer post-trainings."""
    pairs = [name for name in post_training.LONG_PAIRS if lines_of(out / name / "gfid-long")]
    figure, axes = plt.subplots(1, max(len(pairs), 1), figsize=(5 * max(len(pairs), 1), 4), squeeze=False)
    for axis, pair in zip(axes[0], pairs, strict=False):
        lines = lines_of(out / pair / "gfid-long")
        for objective, style in (("clean", "--"), ("free", "-")):
            for i, space in enumerate(SPACES.values()):
                before = find(lines, "gfid", space, decoder="before")
                curve = {0: 0.0}
                for step in range(post_training.EVERY, post_training.LONG + 1, post_training.EVERY):
                    name = f"{objective}-{post_training.LONG}steps/{step}"
                    line = find(lines, "gfid_difference", space, decoder=name, versus="before")
                    curve[step] = 100 * line["value"] / before["value"]
                axis.plot(*zip(*curve.items(), strict=True), style, color=f"C{i}", label=f"{objective}, {space}")
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_title(pair)
        axis.set_xlabel("steps of post-training")
    axes[0, 0].set_ylabel("change of gFD in %")
    axes[0, 0].legend(fontsize=7)
    _save(figure, file)


def draw_samples(out: Path, file: Path, columns: int = 12) -> None:
    """The first samples of each pair (not chosen): a row for each decoder of the same latents."""
    names = {"before": "tokenizer", "clean": "post-clean", "free": "post-free", "free-frechet": "post-free-frechet"}
    drawn = [pair for pair in PAIRS if lines_of(out / pair.name / "gfid")]
    figure, axes = plt.subplots(len(drawn), 1, figsize=(columns * 0.7, 3.0 * len(drawn)), squeeze=False)
    for axis, pair in zip(axes[:, 0], drawn, strict=True):
        latents = LatentCache(out / pair.name / "samples-1").read(slice(0, columns)).latents
        draw_decoders(axis, {name: out / pair.name / folder for name, folder in names.items()}, latents)
        axis.set_title(pair.name)
    _save(figure, file)


@torch.no_grad()
def draw_decoders(axis: plt.Axes, decoders: Mapping[str, Path], latents: torch.Tensor) -> None:
    """A row for each decoder of the same latents."""
    rows = torch.stack([to_pixels(load_tokenizer(folder).decode(latents)) for folder in decoders.values()])
    n, size = rows.shape[1], rows.shape[-1]
    sheet = rows.permute(0, 3, 1, 4, 2).reshape(len(rows) * size, n * size, 3)  # (rows * H, n * W, 3)
    axis.imshow(sheet, interpolation="nearest")
    axis.set_yticks([size * (i + 0.5) for i in range(len(rows))], decoders)
    axis.set_xticks([])


def draw_pipelines(out: Path) -> None:
    """Write ``pipelines.md`` and the picture: the same free samples, and reconstructions."""
    text = pair_table(out, pipelines.PAIR)
    (out / "pipelines.md").write_text(text + "\n")
    print(text)
    shown = ("clean", "noise", "paired-0.7", "free")
    decoders = {"before": out / pipelines.PARTS["tokenizer"]}
    decoders |= {name: out / "pipeline" / f"post-{name}" for name in shown}
    figure, axes = plt.subplots(2, 1, figsize=(11, 8.5))
    caches = {"free samples": out / "pipeline" / "samples-1", "latents of images": out / pipelines.PARTS["latents"]}
    for axis, (title, cache) in zip(axes, caches.items(), strict=True):
        draw_decoders(axis, decoders, LatentCache(cache).read(slice(0, 16)).latents)
        axis.set_title(title)
    _save(figure, out / "pipelines.png")


# Main training


def draw_main_training(out: Path) -> None:
    """Write ``main-training.md`` and the plots."""
    names = [main.name for main in main_training.TOKENIZERS if lines_of(out / main.name / "figures")]
    found = {name: tokenizer_figures(out, name) for name in names}
    keys = ["psnr", "rfid", "pfid", "ifid", "codebook_usage"]
    keys += [f"gfid {step} {g:g}" for step in main_training.steps() for g in main_training.GUIDANCE]
    keys = [key for key in keys if any(key in figures for figures in found.values())]
    rows = [[name, *(f"{f[key]:.2f}" if key in f else "" for key in keys)] for name, f in found.items()]
    parts = [
        table(["tokenizer", *keys], rows),
        f"## Over seeds\n\n{seeds_table(found)}",
        f"## Which number predicts gFD\n\n{correlations(found)}",
    ]
    (out / "main-training.md").write_text("\n\n".join(parts) + "\n")
    print("\n\n".join(parts))
    draw_convergence(found, out / "convergence.png")
    draw_prediction(found, out / "prediction.png")
    draw_codes(out, out / "codes.png")


def tokenizer_figures(out: Path, name: str) -> dict[str, float]:
    """All figures of a tokenizer, in ResNet-56's space."""
    lines, found = lines_of(out / name / "figures"), {}
    for metric in ("psnr", "rfid", "ifid", "codebook_usage"):
        line = find(lines, metric, None if metric in ("psnr", "codebook_usage") else "ResNet-56")
        found |= {metric: line["value"]} if line else {}
    for line in lines_of(out / name / "pfid"):
        if str(line["metric"]).startswith("pfid_mean") and space_of(line) == "ResNet-56":
            found["pfid"] = line["value"]
    for step in main_training.steps():
        for guidance in main_training.GUIDANCE:
            line = find(lines_of(out / name / f"gfid-{step}-{guidance:g}"), "gfid")
            found |= {f"gfid {step} {guidance:g}": line["value"]} if line else {}
    return found


def seeds_table(found: Mapping[str, Mapping[str, float]]) -> str:
    """Mean and standard error over seeds of what perturbation changes: with minus without, seed by seed."""
    keys = [
        "psnr",
        "rfid",
        "pfid",
        "ifid",
        *(f"gfid {main_training.GENERATOR_STEPS} {g:g}" for g in main_training.GUIDANCE),
    ]
    rows = []
    for size in main_training.STRENGTHS:
        names = [(f"vq{size}-b0{end}", f"vq{size}-b0.3{end}") for end in ("", "-seed1", "-seed2")]
        both = [(found[a], found[b]) for a, b in names if a in found and b in found]
        for label, value in (("without", lambda a, b: a), ("with", lambda a, b: b), ("difference", lambda a, b: b - a)):
            cells = []
            for key in keys:
                values = np.array([value(a[key], b[key]) for a, b in both if key in a and key in b])
                error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
                sign = "+" if label == "difference" else ""
                cells.append(f"{values.mean():{sign}.2f} ± {error:.2f}" if len(values) else "")
            rows.append([str(size), label, str(len(both)), *cells])
    return table(["codes", "perturbation", "seeds", *keys], rows)


def correlations(found: Mapping[str, Mapping[str, float]]) -> str:
    """Spearman's rank correlation with gFD at the last step, with bootstrap intervals over the tokenizers."""
    rows = []
    for guidance in main_training.GUIDANCE:
        target = f"gfid {main_training.GENERATOR_STEPS} {guidance:g}"
        for among, chosen in (
            ("all", lambda n: True),
            ("VQGAN", lambda n: n.startswith("vq")),
            ("VQGAN, 1,024 codes", lambda n: n.startswith("vq1024")),
        ):
            for key in ("pfid", "rfid", "ifid", "psnr"):
                same = [f for n, f in found.items() if chosen(n) and key in f and target in f]
                if len(same) > 3:
                    pairs = np.array([(f[key], f[target]) for f in same])
                    rows.append([f"{guidance:g}", among, key, str(len(same)), interval(pairs)])
    return table(["guidance", "tokenizers", "number", "count", "Spearman, 90 % interval"], rows)


def interval(pairs: np.ndarray, draws: int = 2_000) -> str:
    """Spearman's correlation of pairs (n, 2) and a percentile bootstrap interval."""
    rng = np.random.default_rng(0)
    value = spearmanr(*pairs.T).statistic
    again = [pairs[rng.integers(len(pairs), size=len(pairs))] for _ in range(draws)]
    values = [spearmanr(*p.T).statistic for p in again if len({*p[:, 0]}) > 2]
    low, high = np.nanpercentile(values, (5, 95))
    return f"{value:+.2f} ({low:+.2f} to {high:+.2f})"


def draw_convergence(found: Mapping[str, Mapping[str, float]], file: Path) -> None:
    """Curves of gFD over the generator's steps."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for axis, guidance in zip(axes, main_training.GUIDANCE, strict=True):
        for name, figures in found.items():
            steps = [s for s in main_training.steps() if f"gfid {s} {guidance:g}" in figures]
            if len(steps) < 2:  # of other seeds only the end is measured
                continue
            style = "--" if "-b0" in name and "-b0." not in name else "-"
            axis.plot(steps, [figures[f"gfid {s} {guidance:g}"] for s in steps], style, marker="o", label=name)
        axis.set_title(f"guidance {guidance:g}" if guidance != 1 else "no guidance")
        axis.set_xlabel("steps of the generator")
    axes[0].set_ylabel("gFD (ResNet-56)")
    axes[1].legend(fontsize=7)
    _save(figure, file)


def draw_prediction(found: Mapping[str, Mapping[str, float]], file: Path) -> None:
    """Scatter plots of gFD at the last step, guided, against pFD, rFD and iFD: of VQGANs, which ViTs lie far from."""
    found = {name: figures for name, figures in found.items() if name.startswith("vq")}
    target, keys = f"gfid {main_training.GENERATOR_STEPS} {main_training.GUIDANCE[-1]:g}", ("pfid", "rfid", "ifid")
    figure, axes = plt.subplots(1, len(keys), figsize=(4.5 * len(keys), 4), sharey=True)
    for axis, key in zip(axes, keys, strict=True):
        for name, figures in found.items():
            if key in figures and target in figures:
                axis.scatter(figures[key], figures[target])
                axis.annotate(name, (figures[key], figures[target]), fontsize=7)
        axis.set_xlabel(key)
    axes[0].set_ylabel("gFD, guided (ResNet-56)")
    _save(figure, file)


def draw_codes(out: Path, file: Path) -> None:
    """How codes are used without and with perturbation: their shares in order, and an embedding of the codebooks."""
    names = [name for name in ("vq1024-b0", "vq1024-b0.3") if (out / name / "latents").exists()]
    if not names:
        return
    figure, axes = plt.subplots(1, 1 + len(names), figsize=(4.5 * (1 + len(names)), 4), squeeze=False)
    for name, axis in zip(names, axes[0, 1:], strict=True):
        codebook = load_tokenizer(out / name / "tokenizer").codebook.detach()
        tokens = LatentCache(out / name / "latents").read(slice(0, 10_000)).latents
        counts = count_tokens(tokens, len(codebook)).double()
        shares = counts / counts.sum() * len(codebook)  # 1 is what each code has where all are used alike
        axes[0, 0].plot(shares.sort(descending=True).values.clamp(min=1e-3), label=name)
        print(f"{name}: perplexity {codebook_perplexity(counts):.0f}, unused {(counts == 0).sum().item()}")
        shown = TSNE(random_state=0).fit_transform(codebook.numpy())  # (K, 2)
        colour = axis.scatter(*shown.T, c=shares.clamp(min=0.1).log10(), s=6, vmin=-1, vmax=0.7)
        axis.set_title(f"t-SNE of the codes, {name}")
        figure.colorbar(colour, ax=axis, label="log10 of the share")
    axes[0, 0].set_yscale("log")
    axes[0, 0].set_xlabel("codes, most used first")
    axes[0, 0].set_ylabel("share, 1 where all are used alike")
    axes[0, 0].legend()
    _save(figure, file)


def _save(figure: plt.Figure, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file, dpi=110, bbox_inches="tight")
    plt.close(figure)
