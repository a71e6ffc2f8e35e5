"""What the numbers say, in plain words: names of metrics, and the summary at the top of the page."""

import html
import math
from collections.abc import Iterable, Sequence

from robustok.report.plot import decimal
from robustok.report.table import Column, Estimate, Row, Table, difference, measured_difference, over_seeds, partners

FRECHET = {
    "rfid": "rFID",
    "pfid": "pFID",
    "pfid_geometric_mean": "pFID (geometric mean)",
    "gfid": "gFID",
    "sfid": "sFID",
    "fid": "FID",
}
DISTANCES = {*FRECHET, "kid"}
# What is known of latents before any decoder sees them.
LATENTS = {
    "codebook_usage": "Codes used by real images",
    "codebook_perplexity": "Codebook perplexity",
    "generated_usage": "Codes used by generated images",
    "token_divergence": "Token divergence (bits)",
    "latent_distance": "Latent distance",
    "token_agreement": "Tokens kept when encoded again",
}
LABELS = {
    **FRECHET,
    **LATENTS,
    **{"kid": "KID", "psnr": "PSNR (dB)", "ssim": "SSIM", "lpips": "LPIPS", "inception_score": "IS"},
}

e = html.escape


def label(column: Column) -> str:
    """The metric's name as HTML; a distance on other features than Inception's is not called FID or KID."""
    name = LABELS.get(column.metric) or column.metric.replace("_", " ")
    if column.metric in DISTANCES and not _is_inception(column):
        name = name.replace("FID", "FD").replace("KID", "KD")
    return e(name)


def _is_inception(column: Column) -> bool:
    return column.extractor.lower().startswith("inception")


def decoder_name(decoder: str) -> str:
    """A decoder's name as HTML: ``post_trained`` becomes post-trained."""
    return e({"post_trained": "post-trained"}.get(decoder, decoder.replace("_", " ")))


def tokenizer_name(row: Row) -> str:
    """A tokenizer's name as HTML."""
    return f"{e(row.tokenizer)} tokenizer" if row.tokenizer else "tokenizer"


def capital(name: str) -> str:
    """A name at the start of a line: its first letter is a capital, the others stay."""
    return name[:1].upper() + name[1:]


def settings(row: Row) -> str:
    """What tells a row from others of the same tokenizer and decoder, as HTML; empty where nothing needs to."""
    words = (f"{'&sigma;' if key == 'sigma' else key.replace('_', ' ')}&nbsp;=&nbsp;{e(v)}" for key, v in row.settings)
    return ", ".join(words)


def summary(table: Table) -> str:
    """What the numbers say, in plain words, a paragraph for each experiment."""
    paragraphs = []
    for group in dict.fromkeys(row.group for row in table.rows):
        rows = [row for row in table.rows if row.group == group]
        told = [*_gaps(table, rows), *_perturbation(table, rows), *_post_training(table, rows)]
        name = f"<b>{e(group)}.</b> " if group else ""
        if told:
            paragraphs.append(f'<p class="lede">{name}{" ".join(told)}</p>')
        if latents := _latents(table, rows):
            paragraphs.append(f'<p class="measure">{name}{latents}</p>')
    if not any(column.metric in FRECHET for column in table.columns):
        return '<p class="lede">No Fréchet distances were measured yet.</p>' + "".join(paragraphs)
    rule = (
        "Lower is better. A difference counts when it is at least two standard errors; less is called no change. The "
        "error is that over seeds where there are several; else that of the difference itself, where two decoders "
        "were given the same sets of latents (paired); else the errors of the two numbers combined as if they were "
        "independent. Without several seeds, none of them tells how much training again would change."
    )
    return "".join(paragraphs) + f'<p class="small">{rule}{_naming(table)}</p>'


def _naming(table: Table) -> str:
    columns = [c for c in table.columns if c.metric in DISTANCES and not _is_inception(c)]
    others = sorted({column.extractor for column in columns})
    if not others:
        return ""
    kernel = any(column.metric == "kid" for column in columns)
    published = _and(["rFID", "pFID", "gFID", *["KID"] * kernel])
    ours = published.replace("ID", "D")
    spaces = ", ".join(f"<code>{e(name) or 'an unnamed extractor'}</code>" for name in others)
    return (
        f" {ours} are {published} measured on the features of {spaces} instead of Inception; they cannot be compared "
        "with published numbers."
    )


def _gaps(table: Table, rows: list[Row]) -> Iterable[str]:
    """The distances of real, perturbed and generated tokens, for each tokenizer with its original decoder."""
    kinds = {"rfid": "for reconstructions", "pfid": "from perturbed tokens", "gfid": "for generated images"}
    for row in (row for row in rows if row.decoder == "original"):
        parts, found = [], {}
        for metric, words in kinds.items():
            column = _column(table, [row], metric)
            if column and math.isfinite(value := over_seeds(table.cells[row][column]).value):
                parts.append(f"{decimal(value)} {words} ({label(column)})")
                found[metric] = (value, column.extractor, column.reference)
        if "gfid" not in found or len(parts) < 2:
            continue
        # A ratio means something only in one feature space and against one reference.
        comparable = found.get("rfid", (0,))[0] > 0 and found["rfid"][1:] == found["gfid"][1:]
        ratio = f", {found['gfid'][0] / found['rfid'][0]:.1f} times the first" if comparable else ""
        yield f"With the {_who(row)}, the distance to real images is {_and(parts)}{ratio}."


def _latents(table: Table, rows: list[Row]) -> str:
    """How far generated latents are from those of real images, for each tokenizer: a paragraph, or nothing."""
    told = []
    for row in rows:
        found = {column.metric: over_seeds(seeds) for column, seeds in table.cells[row].items()}
        used, real, bits, distance = (
            found[metric] if metric in found and math.isfinite(found[metric].value) else None
            for metric in ("generated_usage", "codebook_usage", "token_divergence", "latent_distance")
        )
        parts = [
            f"generated images use {_share(used, ' of the codes')}{f', real ones {_share(real)}' if real else ''}"
            if used
            else "",
            f"token frequencies are {decimal(bits.value, 3)} bits apart" if bits else "",
            f"mean latents are a Fréchet distance of {decimal(distance.value)} apart" if distance else "",
        ]
        if used or bits or distance:
            told.append(f"With the {_who(row)}, {'; '.join(filter(None, parts))}.")
    if not told:
        return ""
    return (
        f"Generated latents against those of real images, before any decoder: {' '.join(told)} More images use more "
        "codes, frequencies that share no token are 1 bit apart, and each tokenizer has its own scale of latents."
    )


def _share(usage: Estimate, what: str = "") -> str:
    """A share of the codebook, with the number of images that it was counted over."""
    images = f" ({usage.samples[-1]:,} images)" if usage.samples else ""
    return f"{decimal(100 * usage.value, 3)}&nbsp;%{what}{images}"


def _perturbation(table: Table, rows: list[Row]) -> Iterable[str]:
    original = [row for row in rows if row.decoder == "original"]
    plain = next((row for row in original if row.tokenizer == "plain"), None)
    perturbed = next((row for row in original if row.tokenizer == "perturbed"), None)
    if plain and perturbed and (column := _column(table, [plain, perturbed], "pfid")):
        effect, figures = _change(table, plain, perturbed, column)
        yield f"Training with latent perturbation {effect} {label(column)} {figures}."


def _post_training(table: Table, rows: list[Row]) -> Iterable[str]:
    trained = [row for row in rows if row.decoder == "post_trained" and _column(table, [row], "gfid")]
    if not trained and any(_column(table, [row], "gfid") for row in rows):
        yield "No post-trained decoder was measured."
    against = {"lowered": "lower than", "raised": "higher than", "did not change": "not distinguishable from"}
    for row in trained:
        for column in [column for column in table.cells[row] if column.metric == "gfid"][:1]:
            before, control = (partners(table, row, decoder, column)[:1] for decoder in ("original", "control"))
            if before:
                effect, figures = _change(table, before[0], row, column)
                yield f"Post-training the decoder of the {_who(row)} {effect} {label(column)} {figures}."
            if control:
                effect, figures = _change(table, control[0], row, column)
                yield (
                    f"It is {against.get(effect, 'not comparable with')} that of the control decoder, trained "
                    f"for as many steps on clean latents {figures}."
                )
            else:
                yield "Without a control on clean latents (&sigma; = 1), longer training alone may explain this."


def _change(table: Table, before: Row, after: Row, column: Column) -> tuple[str, str]:
    """What happened to a distance, as a verb, and the figures that say so: two standard errors decide."""
    numbers, others = table.cells[before][column], table.cells[after][column]
    paired = measured_difference(table, before, after, column)
    a, b, change = over_seeds(numbers), over_seeds(others), difference(numbers, others, paired)
    numbers = f"{decimal(a.value)} to {decimal(b.value)}"
    if not math.isfinite(change.value):
        return "has no comparable", f"({numbers})"
    if change.value == 0:
        return "did not change", f"({numbers})"
    effect = "lowered" if change.value > 0 else "raised"
    percent = decimal(-100 * change.value / abs(a.value), 2, "+") + "&nbsp;%" if a.value else "from nothing"
    if not change.standard_error > 0:
        return effect, f"({numbers}, {percent}; no standard error is known, so this may be noise)"
    over = f" over {change.seeds} seeds" if change.seeds > 1 else ""
    if paired and not over:
        over = f", paired over {change.sets} sets of latents" if change.sets else ", paired"
    figures = f"({numbers}, {percent}, {change.errors:.1f}&nbsp;standard errors{over})"
    return (effect, figures) if change.errors >= 2 else ("did not change", figures)


def _column(table: Table, rows: Sequence[Row], metric: str) -> Column | None:
    """The first column of a metric that all these rows have."""
    return next((c for c in table.columns if c.metric == metric and all(c in table.cells[row] for row in rows)), None)


def _who(row: Row) -> str:
    return tokenizer_name(row) + (f" ({settings(row)})" if row.settings else "")


def _and(parts: list[str]) -> str:
    return ", ".join(parts[:-1]) + " and " + parts[-1]
