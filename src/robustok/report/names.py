"""How metrics, decoders and numbers are written on the page."""

import math
from collections.abc import Iterable

from robustok.report.results import LATENTS, Column, Estimate, Row

NBSP = "\N{NO-BREAK SPACE}"
LABELS = {
    **{"rfid": "rFID", "gfid": "gFID", "pfid": "pFID", "fid": "FID", "sfid": "sFID", "kid": "KID"},
    **{"pfid_geometric_mean": "pFID (geometric mean)", "noise_fd": "FID under latent noise"},
    **{"gfid_infinity": "gFID, infinitely many images", "inception_score": "IS", "psnr": "PSNR (dB)", "ssim": "SSIM"},
    **{"ifid": "iFID", "gfid_validation": "gFID (validation images)", "fdr": "FDr"},
    **{"lpips_alex": "LPIPS (AlexNet)", "lpips_vgg": "LPIPS (VGG)", "token_divergence": "Token divergence (bits)"},
    **{"generator_cross_entropy": "Generator cross entropy (nats)"},
}
DISTANCES = {name for name, text in LABELS.items() if "FID" in text or "KID" in text}
LOWER = {*DISTANCES, "fdr", "sliced_wasserstein", "lpips_alex", "lpips_vgg", "token_divergence", "latent_distance"}
HIGHER = {"psnr", "ssim", "inception_score", "precision", "recall", "accuracy", *LATENTS[:2]}


def label(column: Column) -> str:
    """The metric's name. FID and KID are for Inception features; on other features they are called FD and KD."""
    name = LABELS.get(column.metric) or capital(column.metric.replace("_", " "))
    if other_features(column):
        name = name.replace("FID", "FD").replace("KID", "KD")
    return name + column.fewer


def other_features(column: Column) -> bool:
    """Whether it is a distance on features that published values do not use."""
    return column.metric in DISTANCES and not column.extractor.lower().startswith("inception")


def arrow(column: Column) -> str:
    """The better direction, or nothing where that is not clear."""
    return f"{NBSP}↓" if column.metric in LOWER else f"{NBSP}↑" if column.metric in HIGHER else ""


def decoder_name(decoder: str) -> str:
    """``my_decoder`` becomes my decoder."""
    return decoder.replace("_", " ")


def settings(row: Row) -> str:
    """What distinguishes a row from others of the same tokenizer and decoder, for example "σ = 0.9"."""
    names = {key: "σ" if key == "sigma" else key.replace("_", " ") for key, _ in row.settings}
    return joined(f"{names[key]}{NBSP}={NBSP}{value}" for key, value in row.settings)


def describe(row: Row) -> str:
    """Group, tokenizer and settings of a row, for example "perturbed tokenizer, σ = 0.9"."""
    return joined([row.group, f"{row.tokenizer} tokenizer".strip(), settings(row)])


def capital(name: str) -> str:
    """The name with a capital first; the other letters stay."""
    return name[:1].upper() + name[1:]


def joined(parts: Iterable[str], by: str = ", ") -> str:
    """The parts that are not empty, joined."""
    return by.join(filter(None, parts))


def decimal(value: float, digits: int = 4, sign: str = "-") -> str:
    """Significant digits with a true minus sign; an en dash for NaN. ``sign`` "+" writes the sign of any number."""
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    if size != 0 and (size < 1e-3 or size >= 1e6):
        text = f"{value:{sign}.2e}"
    else:
        decimals = digits - 1 - math.floor(math.log10(size or 1))
        text = f"{value:{sign},.{min(max(decimals, 0), 6)}f}"
    return text.replace("-", "−")


def plus_minus(estimate: Estimate) -> str:
    """The standard error after " ± ", with as many decimals as its value, or two digits; "" where it is unknown."""
    if not math.isfinite(estimate.standard_error):
        return ""
    text = decimal(estimate.value)
    decimals = len(text.partition(".")[2]) if "e" not in text else 0
    rounded = f"{estimate.standard_error:.{decimals}f}"
    return " ± " + (rounded if float(rounded) else f"{estimate.standard_error:.2g}".replace("-", "−"))


def counts(estimate: Estimate) -> str:
    """What a number was computed over: seeds, images and independent sets of them."""
    images = "–".join(f"{n:,}" for n in sorted({*estimate.samples[:1], *estimate.samples[-1:]}))
    sets = f" in {estimate.sets} sets" if estimate.sets > 1 else ""
    return joined([f"{estimate.seeds} seeds" if estimate.seeds > 1 else "", f"n = {images}{sets}" if images else ""])
