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
    "gfid_infinity": "gFID, infinitely many images",
    "noise_fd": "FID under latent noise",
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
    "latent_position_distance": "Latent distance by position",
    "latent_kernel_distance": "Latent kernel distance",
    "token_agreement": "Tokens kept when encoded again",
    "reencoded_displacement": "Latents moved when encoded again",
    "reencoded_distance": "Latent distance to encoded again",
    "generator_accuracy": "Next token found by the generator",
    "generator_top_k": "Next token among its best k",
    "generator_cross_entropy": "Cross-entropy of the generator (nats)",
}
GAP = LATENTS.keys() - {"codebook_usage", "codebook_perplexity"}  # of a generator, not of the tokenizer alone
LABELS = {
    **FRECHET,
    **LATENTS,
    **{"kid": "KID", "psnr": "PSNR (dB)", "ssim": "SSIM", "inception_score": "IS"},
    **{"lpips_alex": "LPIPS (AlexNet)", "lpips_vgg": "LPIPS (VGG)"},
}

e = html.escape


def label(column: Column) -> str:
    """The metric's name as HTML; a distance on other features than Inception's is not called FID or KID."""
    name = LABELS.get(column.metric) or column.metric.replace("_", " ")
    if column.metric in DISTANCES and not _is_inception(column):
        name = name.replace("FID", "FD").replace("KID", "KD")
    return e(name + column.fewer)


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
    told, closing = [], False
    for row in rows:
        found = {column.metric: over_seeds(seeds) for column, seeds in table.cells[row].items()}
        found = {metric: estimate for metric, estimate in found.items() if math.isfinite(estimate.value)}
        parts = [*_usage(found), *_apart(found), *_encoded_again(found), *_predicted(found)]
        if parts and found.keys() & GAP:
            told.append(f"With the {_who(row)}, {'; '.join(parts)}.{_more_than_sampling(found)}")
            closing |= bool(found.keys() & {"generated_usage", "token_divergence", "latent_distance"})
    if not told:
        return ""
    units = (
        " More images use more codes, frequencies that share no token are 1 bit apart, and each tokenizer has its own "
        "scale of latents."
    )
    return f"Generated latents against those of real images, before any decoder: {' '.join(told)}{units * closing}"


def _usage(found: dict[str, Estimate]) -> Iterable[str]:
    if used := found.get("generated_usage"):
        if math.isfinite(used.baseline):
            fewer, equal = used.value < used.baseline, used.value == used.baseline
            than = "as many codes as" if equal else "fewer codes than" if fewer else "more codes than"
            shares = f"{_share(used)} against {_percent(used.baseline)}"
            yield f"generated images use {than} the same number of real ones, {shares}"
        else:
            real = found.get("codebook_usage")
            yield f"generated images use {_share(used, ' of the codes')}{f', real ones {_share(real)}' if real else ''}"


def _apart(found: dict[str, Estimate]) -> Iterable[str]:
    """The distances, each with how many times as large it is as the one between two sets of real images."""
    texts = {
        "token_divergence": "token frequencies are {} bits apart",
        "latent_distance": "mean latents are a Fréchet distance of {} apart",
        "latent_position_distance": "latents at the same position are {} apart",
    }
    for metric, text in texts.items():
        if one := found.get(metric):
            value = decimal(one.value, 3 if metric == "token_divergence" else 4)
            yield text.format(value) + _times(one)
    if kernel := found.get("latent_kernel_distance"):
        error = f" ({kernel.errors:.1f}&nbsp;standard errors)" if math.isfinite(kernel.errors) else ""
        yield f"the kernel distance of mean latents is {decimal(kernel.value, 3)}{error}"


def _times(one: Estimate) -> str:
    if not math.isfinite(one.baseline):
        return ""
    if one.value <= one.baseline:
        return f", no further than two sets of real images ({decimal(one.baseline, 3)})"
    times = f"{decimal(one.value / one.baseline, 2)} times as far as" if one.baseline > 0 else "further than"
    return f", {times} two sets of real images ({decimal(one.baseline, 3)})"


def _encoded_again(found: dict[str, Estimate]) -> Iterable[str]:
    if kept := found.get("token_agreement"):
        real = f", of those of real images {_percent(kept.baseline)}" if math.isfinite(kept.baseline) else ""
        yield f"decoded and encoded again, {_percent(kept.value)} of the generated tokens come back{real}"
    elif moved := found.get("reencoded_displacement"):
        real = f", those of real images by {_percent(moved.baseline)}" if math.isfinite(moved.baseline) else ""
        yield (
            f"decoded and encoded again, generated latents move by {_percent(moved.value)} of the mean squared "
            f"distance between two real images{real}"
        )


def _predicted(found: dict[str, Estimate]) -> Iterable[str]:
    if right := found.get("generator_accuracy"):
        chance = f", token frequencies alone {_percent(right.baseline)}" if math.isfinite(right.baseline) else ""
        yield f"given the real tokens before it, the generator finds {_percent(right.value)} of the real tokens{chance}"


def _more_than_sampling(found: dict[str, Estimate]) -> str:
    """One sentence on what exceeds sampling: twice the floor, or two standard errors of what has no floor."""
    names = {
        "token_divergence": "the token frequencies",
        "latent_distance": "the mean latents",
        "latent_position_distance": "the latents at each position",
    }
    judged = {metric: found[metric] for metric in names if metric in found and math.isfinite(found[metric].baseline)}
    far = [names[metric] for metric, one in judged.items() if one.value > 0 and one.value >= 2 * one.baseline]
    kernel = found.get("latent_kernel_distance")
    if kernel and math.isfinite(kernel.errors):
        judged["latent_kernel_distance"] = kernel
        far += ["the kernel distance"] * (kernel.value > 0 and kernel.errors >= 2)
    if not judged:
        return ""
    if not far:
        return (
            " None of these distances is twice that between two sets of real images, or two standard errors from "
            "zero: by them, generated latents cannot be told from real ones."
        )
    return (
        f" By {_and(far)}, the decoder is given other latents than those of real images: at least twice as far from "
        "these as two sets of them from each other, or two standard errors from zero."
    )


def _percent(share: float) -> str:
    return f"{decimal(100 * share, 3)}&nbsp;%"


def _share(usage: Estimate, what: str = "") -> str:
    """A share of the codebook, with the number of images that it was counted over."""
    images = f" ({usage.samples[-1]:,} images)" if usage.samples else ""
    return f"{_percent(usage.value)}{what}{images}"


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
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
