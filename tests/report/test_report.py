import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from robustok.errors import UserError
from robustok.report import ReportRun, collect, render, report, write_report
from robustok.report.plot import amplified_difference, curve_keys, sprite, tile
from robustok.report.table import Estimate, difference, headline, over_seeds, partners, without_digest

EVIL = "<script>alert(1)</script>"
DASH, MINUS, SIGMA = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{GREEK SMALL LETTER SIGMA}"
VOID = {"meta", "img", "br", "input", "link", "hr"}


class Page(HTMLParser):
    """Checks that tags balance; keeps the tags with attributes, the rows of tables and the visible text."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.stack, self.tags, self.rows, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.stack.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        data = data.replace("\xa0", " ")
        if not {"script", "style"} & set(self.stack):
            self.text += data
            if {"td", "th"} & set(self.stack):
                self.rows[-1][-1] += data

    def row(self, start):
        return next(row for row in self.rows if row and row[0].startswith(start))


def line(metric, value, **more):
    facts = {
        "standard_error": None,
        "samples": 100,
        "seed": 0,
        "extractor": "classifier-64-3f9a12bc",
        "reference": "test",
    }
    return {"metric": metric, "value": value, **facts, **more}


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in lines))


def story(seed=0, after=6.0, control=7.0, error=0.2):
    common = {"seed": seed, "standard_error": error}
    return [
        line("rfid", 2.7, tokenizer="plain", **common),
        line("gfid", 9.5, tokenizer="plain", decoder="original", **common),
        *(line("pfid", 10.0 * s, tokenizer="plain", rate=r, strength=s, **common) for r in (0.5, 0.9) for s in (2, 4)),
        *(
            line("pfid", 5.0 * s, tokenizer="perturbed", rate=r, strength=s, **common)
            for r in (0.5, 0.9)
            for s in (2, 4)
        ),
        line("rfid", 2.5, tokenizer="perturbed", **common),
        line("gfid", 7.5, tokenizer="perturbed", decoder="original", **common),
        line("gfid", after, tokenizer="perturbed", decoder="post_trained", sigma=0.9, **common),
        line("gfid", control, tokenizer="perturbed", decoder="control", sigma=1.0, **common),
    ]


def summary(folder, lines):
    write_lines(folder / "metrics.jsonl", lines)
    text = render(collect(folder))
    return Page(text[text.index("<header>") : text.index("</header>") + len("</header>")]).text


def pictures(folder, size=16, count=12, **more):
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    images = rng.integers(0, 256, (5, count, size, size, 3), np.uint8)
    titles = np.array([EVIL, "clean", "perturbed", "clean", "perturbed"])
    np.savez_compressed(folder / "reconstructions.npz", images=images, row_titles=titles, title="Rows " + EVIL)
    arrays = {
        "before": images[0],
        "after": images[1],
        "control": images[2],
        "labels": np.arange(count),
        "score_before": np.linspace(2, 3, count),
        "score_after": np.linspace(1, 4, count),
        "title": "Decoders " + EVIL,
        "score_name": "distance " + EVIL,
    }
    np.savez_compressed(folder / "decoders.npz", **arrays | more)


@pytest.fixture
def demo(tmp_path):
    folder = tmp_path / EVIL.replace("/", "|")  # a folder's name reaches the page too
    write_lines(
        folder / "metrics.jsonl", [*story(), line("psnr", math.nan, tokenizer="VQ" + EVIL, versions={EVIL: "1"})]
    )
    stage = folder / "seed-0" / "tokenizer-plain"
    write_lines(stage / "log.jsonl", [{"step": i, "pixel": 1 / (i + 1), EVIL: 2.0, "note": EVIL} for i in range(30)])
    with (stage / "log.jsonl").open("a") as file:
        file.write('{"step": 30, "pix')
    (stage / "config.yaml").write_text(f"name: {EVIL}\n")
    (stage / "samples").mkdir()
    Image.new("RGB", (64, 32), "red").save(stage / "samples" / "00000010.png")
    (stage / "samples" / "00000020.png").write_bytes(b"\x89PNG half")
    pictures(folder / "pictures")
    return folder


def test_page_is_well_formed_and_self_contained(demo):
    text = render(collect(demo))
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name in ("src", "href", "srcset", "action", "poster"):
            assert attributes.get(name, "data:").startswith("data:")
        assert tag != "img" or attributes["alt"]
        assert tag != "th" or attributes["scope"] in ("row", "col", "rowgroup", "colgroup")
    assert re.findall(r"url\((?!data:)|@import|https?://", text) == []
    assert "default-src 'none'" in text


def test_nothing_from_files_becomes_markup(demo):
    text = render(collect(demo))
    assert EVIL not in text
    assert sum(tag == "script" for tag, _ in Page(text).tags) == 1
    # Folder, title, row title, score name, log key, configuration, tokenizer and version: all are shown, all escaped.
    places = ("Rows ", "Decoders ", "distance ", "name: ", "Made with ")
    assert all(place + "&lt;script&gt;alert(1)&lt;/script&gt;" in text for place in places)


def test_order_of_the_sections(demo):
    text = render(collect(demo))
    sections = ["Results", "Perturbed", "Training", "Reconstructions", "Before and after", "Protocol", "Runs", "Notes"]
    assert [name for name in re.findall(r"<h2>(\w+(?: and after)?)", text)] == sections
    assert re.findall(r"<h4>([\w ]+)", text) == ["Side by side", "Most improved", "Most worsened"]


def test_table_shows_the_measured_numbers(demo):
    text = render(collect(demo))
    page = Page(text)
    shown = {float(attributes["value"]) for tag, attributes in page.tags if tag == "data"}
    assert {2.7, 9.5, 2.5, 7.5, 6.0, 7.0, 20.0, 40.0, 10.0} <= shown
    head = page.row("Tokenizer")
    assert [name.split()[0] for name in head[1:5]] == ["Decoder", "rFD", "pFD", "gFD"]  # on a classifier: never FID
    original = ["2.700 ± 0.200n = 100", "30.00n = 100", "9.500 ± 0.200n = 100"]
    assert page.row("Plain")[1:5] == ["original", *original]
    # The three decoders of the perturbed tokenizer stand together, beside its name.
    first = page.rows.index(page.row("Perturbed"))
    assert [len(row) for row in page.rows[first : first + 3]] == [6, 5, 5]
    assert page.rows[first][1] == "original"
    assert page.rows[first + 1][:4] == [f"post-trained{SIGMA} = 0.9", DASH, DASH, "6.000 ± 0.200n = 100"]
    assert page.rows[first + 2][0].startswith("control")
    assert ("th", {"scope": "rowgroup", "rowspan": "3"}) in page.tags
    assert page.row("VQ" + EVIL)[2:] == [DASH] * 4  # NaN and missing values alike
    assert page.row("0.9")[1:] == ["20.00", "40.00"]


def test_inception_features_are_called_fid(tmp_path):
    text = summary(tmp_path, [item | {"extractor": "inception-2015-12-05-6726825d"} for item in story()])
    assert "gFID" in text
    assert "cannot be compared" not in text


def test_fewer_images_than_published_stay_with_the_name(tmp_path):
    inception = {"extractor": "inception-2048-6726825d"}
    lines = [line("gfid@2000", 21.5, images="mine", **inception), line("gfid", 3.5, images="theirs", **inception)]
    lines += [line("pfid@100", 9.0, rate=0.5, strength=2, **inception)]
    lines += [line("pfid_mean@100", 9.0, **inception), line("noise_fd_cell", 1.0), line("noise_fd", 4.25)]
    write_lines(tmp_path / "metrics.jsonl", lines)
    page = Page(render(collect(tmp_path)))
    head = next(row for row in page.rows if any("gFID@2000" in cell for cell in row))
    assert any("gFID" in cell and "@" not in cell for cell in head)
    assert any("pFID@100" in cell for cell in head)
    assert "21.5" in " ".join(page.row("mine"))
    assert "3.5" not in " ".join(page.row("mine"))
    assert "4.25" in page.text
    assert "1.00" not in page.text.split("Protocol")[0]  # one level of the noise alone


def test_broken_lines_and_files_are_noted(demo):
    (demo / "pictures" / "broken.npz").write_bytes(b"PK half")
    np.savez(demo / "pictures" / "floats.npz", images=np.zeros((1, 2, 4, 4, 3)))
    np.savez(demo / "pictures" / "pickled.npz", images=np.array([{}], dtype=object))
    with (demo / "metrics.jsonl").open("a") as file:
        file.write('{"value": 1}\n[1]\n\n"a"\n')
    found = collect(demo)
    notes = "\n".join(found.notes)
    assert "seed-0/tokenizer-plain/log.jsonl: line 31 is not a JSON object" in notes
    assert "metrics.jsonl: 2 lines (the first is line 17) are not a JSON object" in notes
    assert "without the name of its metric" in notes
    assert all(f"pictures/{name}.npz: " in notes for name in ("broken", "floats", "pickled"))
    assert (len(found.grids), len(found.comparisons), len(found.runs[1].log)) == (1, 1, 30)
    assert "line 31 is not" in Page(render(found)).text


@pytest.mark.parametrize(
    ("after", "control", "words"),
    [
        (
            6.0,
            7.0,
            ["lowered gFD (7.500 to 6.000, -20 %, 5.3 standard errors)", "It is lower than", "-14 %, 3.5 standard"],
        ),
        (9.0, 7.0, ["raised gFD (7.500 to 9.000, +20 %, 5.3 standard errors)", "It is higher than"]),
        (7.3, 7.2, ["did not change gFD (7.500 to 7.300, -2.7 %, 0.7 standard errors)", "not distinguishable from"]),
        (7.5, 7.5, ["did not change gFD (7.500 to 7.500)", "not distinguishable from"]),
    ],
)
def test_summary_is_honest(tmp_path, after, control, words):
    text = summary(tmp_path, story(after=after, control=control))
    assert "2.500 for reconstructions (rFD), 15.00 from perturbed tokens (pFD) and 7.500 for generated" in text
    assert "3.0 times the first" in text
    assert (
        "Training with latent perturbation lowered pFD (30.00 to 15.00, -50 %; no standard error is known"
        in text.replace(MINUS, "-")
    )
    assert all(word in text.replace(MINUS, "-") for word in words)


def test_summary_says_what_is_missing(tmp_path):
    lines = [item for item in story() if item.get("decoder") != "control"]
    assert "Without a control" in summary(tmp_path, lines)
    assert "No post-trained decoder" in summary(tmp_path, [item for item in lines if "sigma" not in item])
    assert "No Fréchet distances" in summary(tmp_path, [line("psnr", 20.0)])


def test_seeds_are_averaged_and_compared_in_pairs(tmp_path):
    # After is lower by 1.0, 1.2 and 1.4 in each seed although the seeds themselves are far apart.
    base = {0: 5.0, 1: 8.0, 2: 20.0}
    lines = []
    for seed, value in base.items():
        lines.append(line("gfid", value, tokenizer="perturbed", decoder="original", seed=seed))
        after = value - 1.0 - 0.2 * seed
        lines.append(line("gfid", after, tokenizer="perturbed", decoder="post_trained", sigma=0.9, seed=seed))
    text = summary(tmp_path, lines)
    spread = np.std([1.0, 1.2, 1.4], ddof=1) / math.sqrt(3)
    assert f"(11.00 to 9.800, {MINUS}11 %, {1.2 / spread:.1f} standard errors over 3 seeds)" in text
    page = Page(render(collect(tmp_path)))
    error = np.std(list(base.values()), ddof=1) / math.sqrt(3)
    assert page.row("Perturbed")[2] == f"11.00 ± {error:.2f}3 seeds, n = 100"
    assert [row[1] for row in page.rows if row[0].startswith("seed ")][:3] == ["5.000", "8.000", "20.00"]


def test_estimates():
    seeds = {0: Estimate(1.0, 0.1), 1: Estimate(math.nan, 0.1), 2: Estimate(3.0, 0.1)}
    # As text: an estimate without a baseline has NaN there, which from Python 3.13 on makes it unequal to itself.
    assert str(over_seeds(seeds)) == str(Estimate(2.0, 1.0, (), 2))
    assert str(over_seeds({0: Estimate(1.0, 0.1)})) == str(Estimate(1.0, 0.1))
    assert math.isnan(over_seeds({}).value)
    one = difference({0: Estimate(5.0, 0.3)}, {0: Estimate(4.0, 0.4)})
    assert (one.value, one.standard_error) == pytest.approx((1.0, 0.5))


def paired_lines(effect=-0.3, error=0.05, **more):
    """Decoders whose own errors hide what the same four sets of latents show, as ``evaluate`` writes them."""
    facts = {"tokenizer": "perturbed", "sets": 4}
    return [
        line("gfid", 7.5, decoder="original", standard_error=0.4, **facts),
        line("gfid", 7.5 + effect, decoder="post_trained", sigma=0.9, standard_error=0.4, **facts),
        line("gfid", 7.4, decoder="control", sigma=1.0, standard_error=0.4, **facts),
        *(
            line("gfid_difference", value, decoder=one, versus=other, **facts | {"standard_error": error} | more)
            for one, other, value in (
                ("post_trained", "original", effect),
                ("control", "original", -0.1),
                ("control", "post_trained", -0.1 - effect),
            )
        ),
    ]


def test_summary_takes_differences_on_the_same_latents(tmp_path):
    text = summary(tmp_path, paired_lines()).replace(MINUS, "-")
    assert "lowered gFD (7.500 to 7.200, -4.0 %, 6.0 standard errors, paired over 4 sets of latents)" in text
    # The line says control - post-trained; the sentence is about post-trained - control.
    assert "lower than that of the control" in text
    assert "(7.400 to 7.200, -2.7 %, 4.0 standard errors, paired over 4 sets of latents)" in text
    text = summary(tmp_path, paired_lines(effect=0.3)).replace(MINUS, "-")
    assert "raised gFD (7.500 to 7.800, +4.0 %, 6.0 standard errors, paired" in text
    assert "higher than that of the control" in text
    assert "did not change gFD (7.500 to 7.200, -4.0 %, 1.5 standard errors" in summary(
        tmp_path, paired_lines(error=0.2)
    ).replace(MINUS, "-")


@pytest.mark.parametrize("change", [{"standard_error": None}, {"reference": "other"}, {"sigma": 0.5}])
def test_a_difference_that_is_not_that_of_the_two_rows_is_not_taken(tmp_path, change):
    text = summary(tmp_path, paired_lines(**change))
    assert "0.5 standard errors)" in text
    assert "paired over" not in text


def test_a_sweep_finds_its_own_differences(tmp_path):
    facts = {"tokenizer": "plain", "standard_error": 0.4, "sets": 4}
    lines = [line("gfid", 9.0, decoder="original", **facts), line("gfid", 8.5, decoder="control", sigma=1.0, **facts)]
    for sigma, value in ((0.5, 8.8), (0.9, 8.2)):
        lines.append(line("gfid", value, decoder="post_trained", sigma=sigma, **facts))
        facts_of_pair = {
            "decoder": "post_trained",
            "versus": "original",
            "sigma": sigma,
            **facts,
            "standard_error": 0.1,
        }
        lines.append(line("gfid_difference", value - 9.0, **facts_of_pair))
    # To which of the two decoders this was compared is not said: better not to use it than to guess.
    lines.append(line("gfid_difference", 0.3, decoder="control", versus="post_trained", sigma=1.0, **facts))
    text = summary(tmp_path, lines).replace(MINUS, "-")
    assert "(9.000 to 8.800, -2.2 %, 2.0 standard errors, paired over 4 sets of latents)" in text
    assert "(9.000 to 8.200, -8.9 %, 8.0 standard errors, paired over 4 sets of latents)" in text
    assert "(8.500 to 8.200, -3.5 %, 0.5 standard errors)" in text


def test_a_partner_has_the_same_guidance_rather_than_the_same_sigma(tmp_path):
    settings = [("post_trained", 1, 0.9), ("post_trained", 2, 0.9), ("control", 1, 0.9), ("control", 2, 1.0)]
    lines = [line("gfid", 5.0, decoder=name, guidance_scale=scale, sigma=sigma) for name, scale, sigma in settings]
    write_lines(tmp_path / "metrics.jsonl", lines)
    table = headline(collect(tmp_path).results)
    row = next(row for row in table.rows if row.decoder == "post_trained" and ("guidance_scale", "2") in row.settings)
    found = partners(table, row, "control", table.columns[0])
    assert [other.settings for other in found] == [(("sigma", "1.0"), ("guidance_scale", "2"))]


def test_differences_have_a_table_of_their_own(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", paired_lines())
    page = Page(render(collect(tmp_path)))
    first = page.rows.index(next(row for row in page.rows if row[:2] == ["Tokenizer", "Decoders"]))
    minus = f"{MINUS} original{SIGMA} = "
    assert page.rows[first + 1][1:] == [
        f"post-trained {minus}0.9",
        f"{MINUS}0.3000 ± 0.05006.0 standard errors, n = 100 in 4 sets",
    ]
    assert page.rows[first + 2][0] == f"control {minus}1.0"
    assert "difference" not in "".join(page.row("Tokenizer"))  # no column of the distances themselves


def test_seeds_with_differences_are_averaged(tmp_path):
    lines = [item | {"seed": seed} for seed in range(3) for item in paired_lines(effect=-0.3 - 0.1 * seed)]
    text = summary(tmp_path, lines).replace(MINUS, "-")
    error = 0.1 / math.sqrt(3)
    assert f"(7.500 to 7.100, -5.3 %, {0.4 / error:.1f} standard errors over 3 seeds)" in text


def test_latents_have_their_table_and_paragraph(tmp_path):
    lines = [
        *paired_lines(),
        line("codebook_usage", 0.9, tokenizer="perturbed", samples=449, extractor=None),
        line("codebook_perplexity", 66.0, tokenizer="perturbed", samples=449, extractor=None),
        line("generated_usage", 0.6, tokenizer="perturbed", samples=2000),
        line("token_divergence", 0.02, tokenizer="perturbed", samples=2000),
        line("latent_distance", 3.5, tokenizer="perturbed", samples=2000),
        line("psnr", 20.0, tokenizer="perturbed", extractor=None),
        line("kid", 0.004, tokenizer="perturbed"),
        line("pfid_mean", 12.0, tokenizer="perturbed", grid="relative"),
        line("pfid_geometric_mean", 11.0, tokenizer="perturbed", grid="relative"),
    ]
    text = summary(tmp_path, lines)
    assert (
        "generated images use 60.0 % of the codes (2,000 images), real ones 90.0 % (449 images); token frequencies "
        "are 0.0200 bits apart; mean latents are a Fréchet distance of 3.500 apart." in text
    )
    page = Page(render(collect(tmp_path)))
    heads = [[name.strip(" ↓↑") for name in row[2:]] for row in page.rows if row[:1] == ["Tokenizer"]]
    assert heads[0] == ["pFD", "pFD (geometric mean)", "gFD", "KD", "PSNR (dB)"]
    codes, perplexity = ["Codes used by real images", "Codes used by generated images"], "Codebook perplexity"
    assert heads[-1] == [codes[0], perplexity, codes[1], "Token divergence (bits)", "Latent distance"]
    assert "Generated latents" not in summary(tmp_path, paired_lines())


def gap_lines(bits=0.02, distance=3.5, kernel=0.012, used=0.6, **more):
    facts = {"tokenizer": "perturbed" + EVIL, "samples": 2000, "extractor": None} | more
    return [
        line("gfid", 7.0, tokenizer="perturbed" + EVIL),
        line("generated_usage", used, baseline=0.9, **facts),
        line("token_divergence", bits, baseline=0.005, **facts),
        line("latent_distance", distance, baseline=0.7, **facts),
        line("latent_kernel_distance", kernel, baseline=0.0, **facts | {"standard_error": 0.002}),
        line("token_agreement", 0.8, baseline=0.93, **facts),
        line("generator_accuracy", 0.12, baseline=0.03, **facts),
    ]


def test_the_gap_is_told_beside_its_floors(tmp_path):
    text = summary(tmp_path, gap_lines())
    assert (
        f"With the perturbed{EVIL} tokenizer, generated images use fewer codes than the same number of real ones, "
        "60.0 % (2,000 images) against 90.0 %; token frequencies are 0.0200 bits apart, 4.0 times as far as two sets "
        "of real images (0.00500); mean latents are a Fréchet distance of 3.500 apart, 5.0 times as far as two sets of "
        "real images (0.700); the kernel distance of mean latents is 0.0120 (6.0 standard errors); decoded and encoded "
        "again, 80.0 % of the generated tokens come back, of those of real images 93.0 %; given the real tokens before "
        "it, the generator finds 12.0 % of the real tokens, token frequencies alone 3.00 %. By the token frequencies, "
        "the mean latents and the kernel distance, the decoder is given other latents than those of real images: at "
        "least twice" in text
    )
    assert EVIL not in render(collect(tmp_path))


@pytest.mark.parametrize(
    ("change", "words", "never"),
    [
        ({"bits": 0.004, "distance": 0.8, "kernel": 0.001}, "generated latents cannot be told from real", "is given"),
        ({"bits": 0.004, "distance": 0.8, "kernel": -0.012}, "generated latents cannot be told from real", "is given"),
        ({"bits": 0.004, "distance": 1.5, "kernel": 0.001}, "By the mean latents, the decoder is given", "be told"),
        (
            {"bits": 0.004},
            "0.00400 bits apart, no further than two sets of real images (0.00500)",
            "token frequencies,",
        ),
        ({"used": 0.9}, "use as many codes as the same number of real ones, 90.0 %", "fewer"),
        ({"used": 0.95}, "use more codes than the same number of real ones, 95.0 %", "fewer"),
    ],
)
def test_the_words_of_the_gap_follow_the_figures(tmp_path, change, words, never):
    text = summary(tmp_path, gap_lines(**change))
    gap = text[text.index("Generated latents against") :]
    assert words in gap
    assert never not in gap


def test_floors_are_averaged_over_seeds_and_are_no_other_measurement(tmp_path):
    lines = [line("latent_distance", 2.0 + s, baseline=1.0 + s, seed=s, tokenizer="a") for s in (0, 1)]
    text = summary(tmp_path, [line("latent_distance", 9.0, baseline=8.0, seed=0, tokenizer="a"), *lines])
    assert "a Fréchet distance of 2.500 apart, 1.7 times as far as two sets of real images (1.50)" in text
    assert "1 measurements were made again" in collect(tmp_path).notes[0]


def test_continuous_latents_have_a_gap_without_tokens(tmp_path):
    facts = {"tokenizer": "kl", "extractor": None}
    lines = [
        line("latent_position_distance", 4.0, baseline=1.0, **facts),
        line("reencoded_displacement", 0.2, baseline=0.1, **facts),
    ]
    text = summary(tmp_path, lines)
    assert "latents at the same position are 4.000 apart, 4.0 times as far as two sets of real images (1.00)" in text
    assert "generated latents move by 20.0 % of the mean squared distance between two real images, those of " in text
    assert "By the latents at each position, the decoder is given" in text
    assert "codes" not in text[text.index("Generated latents against") :]


def test_held_out_values_are_a_curve_of_their_own(tmp_path):
    log = [{"step": step, "total": 1.0, "seconds": 1.0} for step in range(1, 9)]
    log += [{"step": step, "held_out": 9.0 - step, "seconds": 2.0} for step in (0, 4, 8)]
    write_lines(tmp_path / "log.jsonl", log)
    found = collect(tmp_path).runs[0].log
    assert [item["step"] for item in found if "held_out" in item] == [0, 4, 8]
    assert [item["step"] for item in found if "total" in item] == list(range(1, 9))  # steps 4 and 8 have both
    assert curve_keys([found]) == ["held_out", "total"]
    text = render(collect(tmp_path))
    assert 'alt="held-out Fréchet distance against training step, ending at 1.000"' in text


def test_top_level_metrics_win_and_repeated_lines_count_once(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [line("gfid", 1.0), line("gfid", 2.0), line("gfid", 3.0, seed=1)])
    write_lines(tmp_path / "seed-0" / "post" / "metrics.jsonl", [line("gfid", 9.0)])
    found = collect(tmp_path)
    assert sorted(result.value for result in found.results) == [2.0, 3.0]
    assert "1 measurements were made again" in found.notes[0]
    # Without the file above, those of the stages are read, and the folders of seeds fall together.
    (tmp_path / "metrics.jsonl").unlink()
    write_lines(tmp_path / "seed-1" / "post" / "metrics.jsonl", [line("gfid", 11.0, seed=1)])
    table = headline(collect(tmp_path).results)
    assert [row.group for row in table.rows] == ["post"]
    assert over_seeds(table.cells[table.rows[0]][table.columns[0]]).value == 10.0


def test_settings_that_vary_make_rows_of_their_own(tmp_path):
    sweep = [line("gfid", 5.0 + s, tokenizer="plain", decoder="post_trained", sigma=s) for s in (0.5, 0.9)]
    write_lines(
        tmp_path / "metrics.jsonl",
        [*sweep, line("gfid", 9.0, tokenizer="plain"), line("gfid", 8.0, snapshot="b", tokenizer="plain")],
    )
    table = headline(collect(tmp_path).results)
    assert [row.settings for row in table.rows] == [(), (("sigma", "0.5"),), (("sigma", "0.9"),)]
    assert table.hidden == 1
    assert "1 further results" in Page(render(collect(tmp_path))).text


def test_resumed_log_keeps_the_later_line(tmp_path):
    write_lines(
        tmp_path / "log.jsonl", [{"step": s, "total": v} for s, v in ((0, 3), (10, 2), (20, 9), (10, 2), (20, 1))]
    )
    log = collect(tmp_path).runs[0].log
    assert [(item["step"], item["total"]) for item in log] == [(0, 3), (10, 2), (20, 1)]


def test_digests_leave_names():
    assert without_digest("classifier-64-3f9a12bc") == "classifier-64"
    assert without_digest("digits test 360 9ab34f00") == "digits test 360"
    assert without_digest("inception-2015-12-05") == "inception-2015-12-05"


def test_pictures_are_packed_in_order():
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 4, 3), np.uint8)
    packed = sprite(images)
    assert (packed.columns, packed.count, packed.width, packed.height) == (3, 5, 4, 3)
    sheet = tile(images[:4].reshape(2, 2, 3, 4, 3), gap=1)
    assert sheet.shape == (2 * 4, 2 * 5, 3)
    np.testing.assert_array_equal(sheet[4:7, 5:9], images[3])
    assert (sheet[3] == 255).all()


def test_difference_states_its_factor():
    before = np.full((1, 8, 8, 3), 100, np.uint8)
    shown, factor = amplified_difference(before, before - 10)
    assert factor == 16
    assert (shown == 160).all()
    assert amplified_difference(before, before + 155)[1] == 1
    assert amplified_difference(before, before)[1] == 32


def test_pictures_keep_the_page_small(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", story())
    pictures(tmp_path / "pictures", size=128, count=40)  # 21 MB of noise, which no PNG can shrink
    text = render(collect(tmp_path))
    assert len(text) < 9_000_000
    shown = int(re.search(r"(\d+) of 40 pictures", text)[1])
    assert shown >= 16
    # Picture 0 improved most and picture 39 worsened most: both are among those shown.
    assert 'aria-label="picture 0, before"' in text
    assert 'aria-label="picture 39, before"' in text


def test_scores_may_be_missing(tmp_path):
    write_lines(tmp_path / "log.jsonl", [{"step": 0, "total": 1.0}])
    images = np.zeros((3, 4, 4, 3), np.uint8)
    (tmp_path / "pictures").mkdir()
    np.savez(tmp_path / "pictures" / "two_decoders.npz", before=images, after=images)
    text = Page(render(collect(tmp_path))).text
    assert "two decoders" in text
    assert "Most improved" not in text


def test_report_writes_the_page(demo, tmp_path):
    assert report(ReportRun(path=demo)) == demo / "report.html"
    out = report(ReportRun(path=demo, out=tmp_path / "deep" / "page.html", title="A & B"))
    assert "<h1>A &amp; B</h1>" in out.read_text()
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]  # nothing half-written is left


def test_user_errors(tmp_path):
    with pytest.raises(UserError, match="found no folder"):
        write_report(tmp_path / "missing")
    (tmp_path / "snapshot").mkdir()
    write_lines(tmp_path / "snapshot" / "metrics.jsonl", [])
    with pytest.raises(UserError, match=r"found no log\.jsonl or metrics\.jsonl under"):
        collect(tmp_path)
    write_lines(tmp_path / "metrics.jsonl", story())
    with pytest.raises(UserError, match="cannot write the report"):
        write_report(tmp_path, tmp_path / "metrics.jsonl" / "page.html")
