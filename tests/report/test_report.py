import base64
import hashlib
import io
import json
import math
import os
import re
import subprocess
import sys
import zipfile
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from robustok.commands.report import ReportRun, report
from robustok.errors import UserError
from robustok.report import collect, render, write_report
from robustok.report.figures import amplified_difference, curve_keys
from robustok.report.results import (
    Estimate,
    arrange,
    matching_rows,
    mean_over_seeds,
    without_digest,
)
from tiny_images import picture, postscript, watch_postscript
from tiny_user import as_nobody

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

    def change(self, name):
        """A row of the table of differences, after its name: distance, from, to, difference, result."""
        return next(row[1:] for row in self.rows if row and row[0].startswith(name))


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


def study(seed=0, after=6.0, control=7.0, error=0.2):
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
        line("gfid", after, tokenizer="perturbed", decoder="paired", sigma=0.9, **common),
        line("gfid", control, tokenizer="perturbed", decoder="clean", sigma=1.0, **common),
    ]


def page_of(folder, lines):
    write_lines(folder / "metrics.jsonl", lines)
    return Page(render(collect(folder)))


def headline(folder, lines):
    """The visible text above the pictures, one space between words, with hyphens for minus signs."""
    write_lines(folder / "metrics.jsonl", lines)
    text = render(collect(folder))
    header = Page(text[text.index("<header>") : text.index("</header>") + len("</header>")]).text
    return " ".join(header.replace(MINUS, "-").split())


def pictures(folder, size=16, count=12, **more):
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    images = rng.integers(0, 256, (5, count, size, size, 3), np.uint8)
    titles = np.array([EVIL, "clean", "perturbed", "clean", "perturbed"])
    np.savez_compressed(folder / "reconstructions.npz", images=images, row_titles=titles, title="Rows " + EVIL)
    arrays = {
        "before": images[0],
        "after": images[1],
        "clean": images[2],
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
        folder / "metrics.jsonl", [*study(), line("psnr", math.nan, tokenizer="VQ" + EVIL, versions={EVIL: "1"})]
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
        assert "style" not in attributes  # the policy forbids it
        assert not any(name.startswith("on") for name in attributes)
        assert tag != "img" or attributes["alt"]
        assert tag != "th" or attributes["scope"] in ("row", "col", "colgroup")
    assert re.findall(r"url\(|@import|https?://", text) == []


def test_the_policy_allows_this_style_and_script_only(demo):
    text = render(collect(demo))
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)[1].replace("&#39;", "'")
    found = {}
    for tag in ("style", "script"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        found[tag] = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{found['style']}'; "
        f"script-src 'sha256-{found['script']}'; base-uri 'none'; form-action 'none'"
    )


def test_nothing_from_files_becomes_markup(demo):
    text = render(collect(demo))
    assert EVIL not in text
    assert sum(tag == "script" for tag, _ in Page(text).tags) == 1
    # Folder, title, row title, score name, log key, configuration, tokenizer and version: all are shown, all escaped.
    before = ("<h1>", "Rows ", "Decoders ", "distance ", "<figcaption>", "name: ", ">VQ", "<td>")
    shown = "&lt;script&gt;alert(1)&lt;/script&gt;"
    assert all(name + shown in text for name in (*before[1:], ""))
    assert shown.replace("/", "|") in text[text.index("<h1>") : text.index("</h1>")]
    assert f"<td>{shown} 1</td>" in text


def test_files_outside_the_folder_are_not_embedded(demo, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.yaml").write_text("token: hunter2\n")
    Image.new("RGB", (8, 8), "blue").save(outside / "secret.png")
    pictures(outside / "pictures", title="hunter2")
    stage = demo / "seed-0" / "tokenizer-plain"
    before = render(collect(demo)).count("<img")
    (stage / "config.yaml").unlink()
    (stage / "config.yaml").symlink_to(outside / "secret.yaml")
    (stage / "samples" / "00000030.png").symlink_to(outside / "secret.png")
    (demo / "pictures" / "linked.npz").symlink_to(outside / "pictures" / "decoders.npz")
    found = collect(demo)
    text = render(found)
    assert "hunter2" not in text
    assert text.count("<img") == before
    assert sum("is a link to a file outside the folder" in note for note in found.notes) == 3
    # A link that stays inside is followed.
    (demo / "pictures" / "linked.npz").unlink()
    (demo / "pictures" / "linked.npz").symlink_to(demo / "pictures" / "decoders.npz")
    assert len(collect(demo).pairs) == 2


def test_order_of_the_sections(demo):
    text = render(collect(demo))
    sections = re.findall(r"<h2>(.*?)</h2>|<details><summary>(.*?)</summary>", text)
    names = [name or folded for name, folded in sections]
    assert names[0].startswith("Decoders ")
    assert names[1:8] == [
        "What changed most",
        "Images of the tokenizers",
        "Results",
        "Differences",
        "pFID by rate and strength",
        "Training curves",
        "Protocol of each number",
    ]
    assert names[8:] == ["Settings and progress of the runs", "seed-0/tokenizer-plain", "Notes"]
    assert [name.split(" &lt")[0] for name in re.findall(r"<h3>([^<]+)", text)][:3] == [
        "Most improved",
        "Most worsened",
        "Rows",
    ]
    # The slider comes first, then the rows of images; all before the first table.
    places = [text.index(part) for part in ("</header>", 'class="tiles"', 'class="strips"', "<table")]
    assert places == sorted(places)


def test_a_progress_picture_that_is_postscript_is_left_out(tmp_path, monkeypatch):
    opened = watch_postscript(monkeypatch)
    write_lines(tmp_path / "stage" / "log.jsonl", [{"step": i, "total": 1.0} for i in range(3)])
    (tmp_path / "stage" / "config.yaml").write_text("name: plain\n")
    (tmp_path / "stage" / "samples").mkdir()
    picture().save(tmp_path / "stage" / "samples" / "00000010.png")
    (tmp_path / "stage" / "samples" / "00000020.png").write_bytes(postscript())
    text = render(collect(tmp_path))
    assert "samples at step 10" in text
    assert "samples at step 20" not in text
    assert not opened


def test_table_shows_the_measured_numbers(demo):
    text = render(collect(demo))
    page = Page(text)
    shown = {float(attributes["value"]) for tag, attributes in page.tags if tag == "data"}
    assert {2.7, 9.5, 2.5, 7.5, 6.0, 7.0, 20.0, 40.0, 10.0} <= shown
    head = page.row("Tokenizer")
    assert [name.split()[0] for name in head[1:5]] == ["Decoder", "rFD", "pFD", "gFD"]  # on a classifier: never FID
    original = ["2.700 ± 0.200n = 100", "30.00n = 100", "9.500 ± 0.200n = 100"]
    assert page.row("Plain")[1:5] == ["original", *original]
    # The three decoders of the perturbed tokenizer are together, after its name.
    first = page.rows.index(page.row("Perturbed"))
    assert [len(row) for row in page.rows[first : first + 3]] == [6, 6, 6]
    assert [row[0] for row in page.rows[first : first + 3]] == ["Perturbed", "", ""]
    assert page.rows[first][1] == "original"
    assert page.rows[first + 1][1].startswith("clean")
    assert page.rows[first + 2][1:5] == [f"paired{SIGMA} = 0.9", DASH, DASH, "6.000 ± 0.200n = 100"]
    assert page.row("VQ" + EVIL)[2:] == [DASH] * 4  # NaN and missing values alike
    assert page.row("0.9")[1:] == ["20.00", "40.00"]


def test_inception_features_are_called_fid(tmp_path):
    text = headline(tmp_path, [item | {"extractor": "inception-2015-12-05-6726825d"} for item in study()])
    assert "gFID" in text
    assert "not comparable with published" not in text
    assert "not comparable with published" in headline(tmp_path, study())


def test_fewer_images_than_published_stay_with_the_name(tmp_path):
    inception = {"extractor": "inception-2048-6726825d"}
    lines = [line("gfid@2000", 21.5, images="mine", **inception), line("gfid", 3.5, images="theirs", **inception)]
    lines += [line("pfid@100", 9.0, rate=0.5, strength=2, **inception)]
    lines += [line("pfid_mean@100", 9.0, **inception), line("noise_fd_cell", 1.0), line("noise_fd", 4.25)]
    page = page_of(tmp_path, lines)
    head = next(row for row in page.rows if any("gFID@2000" in cell for cell in row))
    assert any("gFID" in cell and "@" not in cell for cell in head)
    assert any("pFID@100" in cell for cell in head)
    mine = next(row for row in page.rows if row[1:2] == ["mine"])
    assert any("21.5" in cell for cell in mine)
    assert not any("3.5" in cell for cell in mine)
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
    assert "seed-0/tokenizer-plain/log.jsonl: not a JSON object in 1 lines (the first is line 31)" in notes
    assert "metrics.jsonl: not a JSON object in 2 lines (the first is line 17)" in notes
    assert "metrics.jsonl: 1 lines without the name of a metric" in notes
    assert all(f"pictures/{name}.npz: " in notes for name in ("broken", "floats", "pickled"))
    assert (len(found.rows), len(found.pairs), len(found.runs[1].log)) == (1, 1, 30)
    assert "the first is line 31" in Page(render(found)).text


def test_only_regular_files_are_read_and_others_are_noted(demo):
    stage = demo / "seed-0" / "tokenizer-plain"
    (stage / "config.yaml").unlink()
    os.mkfifo(stage / "config.yaml")
    (stage / "samples" / "00000031.png").symlink_to("00000031.png")
    (demo / "pictures" / "folder.npz").mkdir()
    bomb = zipfile.ZipFile(demo / "pictures" / "bomb.npz", "w", zipfile.ZIP_DEFLATED)
    with bomb, bomb.open("images.npy", "w", force_zip64=True) as member:
        for _ in range(33):
            member.write(bytes(2**25))
    content = (demo / "pictures" / "decoders.npz").read_bytes()
    (demo / "pictures" / "flipped.npz").write_bytes(content[:300] + bytes(40) + content[340:])
    notes = "\n".join(collect(demo).notes)
    assert "seed-0/tokenizer-plain/config.yaml: it is a FIFO; skipped." in notes
    assert "samples/00000031.png: Too many levels of symbolic links; skipped." in notes
    assert "pictures/folder.npz: it is a folder; skipped." in notes
    assert "pictures/bomb.npz: its arrays would take 1,107,296" in notes
    assert "pictures/flipped.npz: " in notes


def test_folders_that_may_not_be_read_are_named(tmp_path):
    write_lines(tmp_path / "a" / "log.jsonl", [{"step": 0, "total": 1.0}])
    write_lines(tmp_path / "b" / "log.jsonl", [{"step": 0, "total": 1.0}])
    (tmp_path / "b").chmod(0)
    collecting = "from robustok.report import collect"
    tmp_path.chmod(0o755)
    said = as_nobody(collecting, f"print(collect({str(tmp_path)!r}).notes, file=sys.stderr)", tmp_path)
    assert said == "('b: Permission denied; skipped.',)\n"
    said = as_nobody(collecting, f"collect({str(tmp_path / 'b')!r})", tmp_path)
    assert "UserError: cannot read the folder" in said
    assert "b: Permission denied; give a run folder" in said


def test_a_page_replaces_no_device_and_no_target_of_a_link(demo, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UserError, match="fifo: it is a FIFO, no file; choose another out=PATH"):
        write_report(demo, tmp_path / "fifo")
    (tmp_path / "letter").write_text("mine")
    (demo / "report.html").symlink_to(tmp_path / "letter")
    assert "<h1>" in write_report(demo).read_text()
    assert (tmp_path / "letter").read_text() == "mine"


@pytest.mark.parametrize(
    ("after", "control", "sentence", "result", "against"),
    [
        (
            *(
                6.0,
                7.0,
                "Post-training (paired) lowered gFD by 20 %; it is below the control (perturbed tokenizer, σ = 0.9).",
            ),
            *("lower, -20 %5.3 standard errors", "lower, -14 %3.5 standard errors"),
        ),
        (
            *(
                9.0,
                7.0,
                "Post-training (paired) raised gFD by 20 %; it is above the control (perturbed tokenizer, σ = 0.9).",
            ),
            *("higher, +20 %5.3 standard errors", "higher, +29 %7.1 standard errors"),
        ),
        (
            *(
                7.3,
                7.2,
                "Post-training (paired) did not clearly change gFD; it is not clearly different from the control",
            ),
            *("no clear change, -2.7 %0.7 standard errors", "no clear change, +1.4 %0.4 standard errors"),
        ),
        (
            *(
                7.5,
                7.5,
                "Post-training (paired) did not clearly change gFD; it is not clearly different from the control",
            ),
            *("no clear change, +0.0 %0.0 standard errors", "no clear change, +0.0 %0.0 standard errors"),
        ),
    ],
)
def test_the_headline_follows_the_numbers(tmp_path, after, control, sentence, result, against):
    text = headline(tmp_path, study(after=after, control=control))
    assert sentence in text
    assert f"gFD, original → paired7.500 → {after:.3f}{after - 7.5:+.3f}" in text.replace("-0.2000", "-0.200")
    assert f"gFD of the control (clean){control:.3f}" in text
    assert "rFD (reconstructions)2.500gFD before is 3.0 times as large" in text
    page = Page(render(collect(tmp_path)))
    assert page.change(f"paired {MINUS} original")[-1].replace(MINUS, "-") == result
    assert page.change(f"paired {MINUS} clean")[-1].replace(MINUS, "-") == against
    perturbation = [cell.replace(MINUS, "-") for cell in page.change(f"perturbed {MINUS} plain tokenizer")]
    assert perturbation[:3] == ["pFDclassifier-64", "30.00", "15.00"]
    assert perturbation[-1] == "lower, -50 %standard error unknown, so this may be noise"


def test_the_headline_says_what_is_missing(tmp_path):
    lines = [item for item in study() if item.get("decoder") != "clean"]
    assert "gFD of the control–Not measured: longer training alone may explain" in headline(tmp_path, lines)
    text = headline(tmp_path, [item for item in lines if "sigma" not in item])
    assert "No decoder was measured before and after post-training." in text
    assert "rFD2.700 ± 0.200Plain tokenizer, original decoder" in text
    assert "PSNR (dB)20.00" in headline(tmp_path, [line("psnr", 20.0)])
    assert "No measurements yet." in headline(tmp_path, [])


def test_decoders_with_names_of_the_user_are_compared_too(tmp_path):
    lines = [line("gfid", 3.8, decoder="before"), line("gfid", 3.2, decoder="after")]
    lines.append(line("gfid_difference", -0.6, decoder="after", versus="before", sets=5, standard_error=0.1))
    text = headline(tmp_path, lines)
    assert "After instead of before lowered gFD by 16 %" in text
    assert "gFD, before → after3.800 → 3.200-0.6000 ± 0.1000, 6.0 standard errors, paired over 5 sets" in text


def test_seeds_are_averaged_and_compared_in_pairs(tmp_path):
    # After is lower by 1.0, 1.2 and 1.4 in each seed although the seeds themselves are far apart.
    base = {0: 5.0, 1: 8.0, 2: 20.0}
    lines = []
    for seed, value in base.items():
        lines.append(line("gfid", value, tokenizer="perturbed", decoder="original", seed=seed))
        after = value - 1.0 - 0.2 * seed
        lines.append(line("gfid", after, tokenizer="perturbed", decoder="paired", sigma=0.9, seed=seed, steps=seed))
    page = page_of(tmp_path, lines)  # each seed keeps another number of steps, which makes no rows of their own
    spread = np.std([1.0, 1.2, 1.4], ddof=1) / math.sqrt(3)
    change = page.change(f"paired {MINUS} original")
    assert change[1:3] == ["11.00 ± 4.58", "9.800 ± 4.474"]
    assert change[3].startswith(
        f"{MINUS}1.200 ± {spread:.3f}seed 0: {MINUS}1.000seed 1: {MINUS}1.200seed 2: {MINUS}1.400"
    )
    assert change[4] == f"lower, {MINUS}11 %{1.2 / spread:.1f} standard errors, over 3 seeds"
    error = np.std(list(base.values()), ddof=1) / math.sqrt(3)
    assert page.row("Perturbed")[2] == f"11.00 ± {error:.2f}3 seeds, n = 100"
    assert [row[2] for row in page.rows if row[1:] and row[1].startswith("seed ")][:3] == ["5.000", "8.000", "20.00"]


def test_estimates():
    seeds = {0: Estimate(1.0, 0.1), 1: Estimate(math.nan, 0.1), 2: Estimate(3.0, 0.1)}
    # As text: an estimate without a baseline has NaN there, which from Python 3.13 on makes it unequal to itself.
    assert str(mean_over_seeds(seeds)) == str(Estimate(2.0, 1.0, (), 2))
    assert str(mean_over_seeds({0: Estimate(1.0, 0.1)})) == str(Estimate(1.0, 0.1))
    assert math.isnan(mean_over_seeds({}).value)


@pytest.mark.parametrize("seed", [0, 1])
def test_unpaired_differences_combine_both_errors(tmp_path, seed):
    before, after = {"standard_error": 0.3}, {"standard_error": 0.4, "seed": seed}  # also where no seed has both
    lines = [line("gfid", 5.0, **before), line("gfid", 4.0, decoder="paired", sigma=0.9, **after)]
    assert page_of(tmp_path, lines).change(f"paired {MINUS} original")[3] == f"{MINUS}1.000 ± 0.500"


def paired_lines(effect=-0.3, error=0.05, **more):
    """Decoders whose own errors hide what the same four sets of latents show, as ``evaluate`` writes them."""
    facts = {"tokenizer": "perturbed", "sets": 4}
    return [
        line("gfid", 7.5, decoder="original", standard_error=0.4, **facts),
        line("gfid", 7.5 + effect, decoder="paired", sigma=0.9, standard_error=0.4, **facts),
        line("gfid", 7.4, decoder="clean", sigma=1.0, standard_error=0.4, **facts),
        *(
            line("gfid_difference", value, decoder=one, versus=other, **facts | {"standard_error": error} | more)
            for one, other, value in (
                ("paired", "original", effect),
                ("clean", "original", -0.1),
                ("clean", "paired", -0.1 - effect),
            )
        ),
    ]


def test_differences_on_the_same_latents_have_their_own_error(tmp_path):
    def changes(**settings):
        page = page_of(tmp_path, paired_lines(**settings))
        names = [f"{one} {MINUS} {other}" for one, other in (("paired", "original"), ("paired", "clean"))]
        return [[cell.replace(MINUS, "-") for cell in page.change(name)[-2:]] for name in names]

    # The line says control - post-trained; the second row is paired - clean.
    assert changes() == [
        ["-0.3000 ± 0.0500", "lower, -4.0 %6.0 standard errors, paired over 4 sets"],
        ["-0.2000 ± 0.0500", "lower, -2.7 %4.0 standard errors, paired over 4 sets"],
    ]
    assert [row[1].split(",")[0] for row in changes(effect=0.3)] == ["higher", "higher"]
    assert changes(error=0.2)[0][1] == "no clear change, -4.0 %1.5 standard errors, paired over 4 sets"
    rows = [row[0] for row in page_of(tmp_path, paired_lines()).rows]
    assert f"clean {MINUS} originalperturbed tokenizer, {SIGMA} = 1.0" in rows
    assert not any("ifference" in cell for cell in page_of(tmp_path, paired_lines()).row("Tokenizer"))


@pytest.mark.parametrize("change", [{"standard_error": None}, {"reference": "other"}, {"sigma": 0.5}])
def test_a_difference_that_is_not_that_of_the_two_rows_is_not_taken(tmp_path, change):
    page = page_of(tmp_path, paired_lines(**change))
    assert page.change(f"paired {MINUS} original")[-1].endswith("0.5 standard errors")
    assert "paired over" not in page.text


def test_a_sweep_finds_its_own_differences(tmp_path):
    facts = {"tokenizer": "plain", "standard_error": 0.4, "sets": 4}
    lines = [line("gfid", 9.0, decoder="original", **facts), line("gfid", 8.5, decoder="clean", sigma=1.0, **facts)]
    for sigma, value in ((0.5, 8.7), (0.9, 8.2)):
        post = facts | {"decoder": "paired", "sigma": sigma}
        lines.append(line("gfid", value, **post))
        lines.append(line("gfid_difference", value - 9.0, versus="original", **post | {"standard_error": 0.1}))
    # Which of the two decoders this was compared with is not known: better not to use it than to guess.
    lines.append(line("gfid_difference", 0.3, decoder="clean", versus="paired", sigma=1.0, **facts))
    page = page_of(tmp_path, lines)
    rows = [[cell.replace(MINUS, "-") for cell in row] for row in page.rows]
    found = {row[0]: row[-1] for row in rows if row and row[0].startswith("paired")}
    original, control = "paired - originalplain tokenizer, σ = ", "paired - cleanplain tokenizer, σ = "
    assert found[f"{original}0.5"] == "lower, -3.3 %3.0 standard errors, paired over 4 sets"
    assert found[f"{original}0.9"] == "lower, -8.9 %8.0 standard errors, paired over 4 sets"
    assert found[f"{control}0.9"] == "no clear change, -3.5 %0.5 standard errors"
    # The headline shows the lowest of them, and says of how many.
    text = headline(tmp_path, lines)
    assert (
        "lowered gFD by 8.9 %; it is not clearly different from the control (plain tokenizer, σ = 0.9). Of 2 such"
        in text
    )


def test_a_partner_has_the_same_guidance_rather_than_the_same_sigma(tmp_path):
    settings = [("paired", 1, 0.9), ("paired", 2, 0.9), ("clean", 1, 0.9), ("clean", 2, 1.0)]
    lines = [line("gfid", 5.0, decoder=name, guidance_scale=scale, sigma=sigma) for name, scale, sigma in settings]
    write_lines(tmp_path / "metrics.jsonl", lines)
    table = arrange(collect(tmp_path).results)
    row = next(row for row in table.rows if row.decoder == "paired" and ("guidance_scale", "2") in row.settings)
    found = matching_rows(table, row, "clean", table.columns[0])
    assert [other.settings for other in found] == [(("sigma", "1.0"), ("guidance_scale", "2"))]


def test_seeds_with_differences_are_averaged(tmp_path):
    lines = [item | {"seed": seed} for seed in range(3) for item in paired_lines(effect=-0.3 - 0.1 * seed)]
    change = page_of(tmp_path, lines).change(f"paired {MINUS} original")
    error = 0.1 / math.sqrt(3)
    assert change[1:3] == ["7.500 ± 0", "7.100 ± 0.058"]
    assert change[-1] == f"lower, {MINUS}5.3 %{0.4 / error:.1f} standard errors, over 3 seeds"


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


def test_latents_have_a_table_of_their_own(tmp_path):
    lines = [
        *gap_lines(),
        line("codebook_usage", 0.9, tokenizer="perturbed" + EVIL, samples=449, extractor=None),
        line("codebook_perplexity", 66.0, tokenizer="perturbed" + EVIL, samples=449, extractor=None),
        line("psnr", 20.0, tokenizer="perturbed" + EVIL, extractor=None),
        line("kid", 0.004, tokenizer="perturbed" + EVIL),
        line("pfid_mean", 12.0, tokenizer="perturbed" + EVIL, grid="relative"),
        line("pfid_geometric_mean", 11.0, tokenizer="perturbed" + EVIL, grid="relative"),
    ]
    page = page_of(tmp_path, lines)
    heads = [[name.strip(" ↓↑") for name in row[2:]] for row in page.rows if row[:1] == ["Tokenizer"]]
    assert heads[0] == ["pFD", "pFD (geometric mean)", "gFD", "KD", "PSNR (dB)"]
    numbers = [row[2:] for row in page.rows if row and row[0].startswith("Perturbed")][1]
    assert dict(zip(heads[1], numbers, strict=True)) == {
        "Codebook usage": "0.9000n = 449",
        "Codebook perplexity": "66.00n = 449",
        "Generated usage": "0.6000baseline 0.900 (× 0.7)n = 2,000",
        "Token divergence (bits)": "0.02000baseline 0.00500 (× 4.0)n = 2,000",
        "Latent distance": "3.500baseline 0.700 (× 5.0)n = 2,000",
        "Latent kernel distance": "0.01200 ± 0.002006.0 standard errorsbaseline 0.00n = 2,000",
        "Token agreement": "0.8000baseline 0.930 (× 0.9)n = 2,000",
        "Generator accuracy": "0.1200baseline 0.0300 (× 4.0)n = 2,000",
    }
    assert EVIL not in render(collect(tmp_path))
    assert "Codebook and latents" not in page_of(tmp_path, paired_lines()).text


def test_baselines_are_averaged_over_seeds_and_are_no_other_measurement(tmp_path):
    lines = [line("latent_distance", 2.0 + s, baseline=1.0 + s, seed=s, tokenizer="a") for s in (0, 1)]
    page = page_of(tmp_path, [line("latent_distance", 9.0, baseline=8.0, seed=0, tokenizer="a"), *lines])
    assert page.row("A")[2] == "2.500 ± 0.500baseline 1.50 (× 1.7)2 seeds, n = 100"
    assert "1 measurements were repeated" in collect(tmp_path).notes[0]


def test_continuous_latents_have_a_gap_without_tokens(tmp_path):
    facts = {"tokenizer": "kl", "extractor": None}
    lines = [
        line("latent_position_distance", 4.0, baseline=1.0, **facts),
        line("reencoded_displacement", 0.2, baseline=0.1, **facts),
    ]
    page = page_of(tmp_path, lines)
    assert [name.strip(" ↓↑") for name in page.row("Tokenizer")[2:]] == [
        "Latent position distance",
        "Reencoded displacement",
    ]
    assert page.row("Kl")[2:] == ["4.000baseline 1.00 (× 4.0)n = 100", "0.2000baseline 0.100 (× 2.0)n = 100"]
    assert "No decoder was measured" in page.text


def test_validation_distances_are_a_curve_of_their_own(tmp_path):
    log = [{"step": step, "total": 1.0, "seconds": 1.0} for step in range(1, 9)]
    log += [{"step": step, "held_out": 9.0 - step, "seconds": 2.0} for step in (0, 4, 8)]
    write_lines(tmp_path / "log.jsonl", log)
    found = collect(tmp_path).runs[0].log
    assert [item["step"] for item in found if "held_out" in item] == [0, 4, 8]
    assert [item["step"] for item in found if "total" in item] == list(range(1, 9))  # steps 4 and 8 have both
    assert curve_keys([found]) == ["held_out", "total"]
    text = render(collect(tmp_path))
    assert 'alt="validation Fréchet distance against training step, ending at 1.000"' in text


def test_top_level_metrics_win_and_repeated_lines_count_once(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [line("gfid", 1.0), line("gfid", 2.0), line("gfid", 3.0, seed=1)])
    write_lines(tmp_path / "seed-0" / "post" / "metrics.jsonl", [line("gfid", 9.0)])
    found = collect(tmp_path)
    assert sorted(result.value for result in found.results) == [2.0, 3.0]
    assert "1 measurements were repeated" in found.notes[0]
    # Without the file above, those of the stages are read, and the folders of seeds fall together.
    (tmp_path / "metrics.jsonl").unlink()
    write_lines(tmp_path / "seed-1" / "post" / "metrics.jsonl", [line("gfid", 11.0, seed=1)])
    table = arrange(collect(tmp_path).results)
    assert [row.group for row in table.rows] == ["post"]
    assert table.mean(table.rows[0], table.columns[0]).value == 10.0


def test_settings_that_vary_make_rows_of_their_own(tmp_path):
    sweep = [line("gfid", 5.0 + s, tokenizer="plain", decoder="paired", sigma=s) for s in (0.5, 0.9)]
    write_lines(
        tmp_path / "metrics.jsonl",
        [*sweep, line("gfid", 9.0, tokenizer="plain"), line("gfid", 8.0, snapshot="b", tokenizer="plain")],
    )
    table = arrange(collect(tmp_path).results)
    assert [row.settings for row in table.rows] == [(), (("sigma", "0.5"),), (("sigma", "0.9"),)]
    assert table.hidden == 1
    assert "1 further results" in Page(render(collect(tmp_path))).text
    write_lines(tmp_path / "metrics.jsonl", [line("gfid", 5.0, steps=steps) for steps in (10, 20)])
    assert [row.settings for row in arrange(collect(tmp_path).results).rows] == [(("steps", "10"),), (("steps", "20"),)]


def test_stages_are_in_the_order_of_training(tmp_path):
    for name in ("a/pairs", "a/generator", "a/post", "a/tokenizer", "a/seed-10/post", "a/seed-2/post"):
        write_lines(tmp_path / name / "log.jsonl", [{"step": 0, "total": 1.0}])
    names = [run.name for run in collect(tmp_path).runs]
    assert names == [f"a/{n}" for n in ("tokenizer", "generator", "pairs", "post", "seed-2/post", "seed-10/post")]


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


def test_images_are_embedded_as_they_are(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", study())
    pictures(tmp_path / "pictures")
    with np.load(tmp_path / "pictures" / "decoders.npz") as file:
        arrays = dict(file)
    shown = {attributes["alt"]: attributes for tag, attributes in Page(render(collect(tmp_path))).tags if tag == "img"}

    def pixels(alt):
        content = base64.b64decode(shown[alt]["src"].removeprefix("data:image/png;base64,"))
        return np.asarray(Image.open(io.BytesIO(content)))

    np.testing.assert_array_equal(pixels("image 7, 7, after"), arrays["after"][7])
    strip = pixels("image 7, 7: before, after, clean, difference × 1")
    layers = [*(arrays[name][7] for name in ("before", "after", "clean"))]
    layers.append(amplified_difference(arrays["before"][7], arrays["after"][7])[0])
    np.testing.assert_array_equal(strip, np.concatenate(layers, axis=1))
    assert (shown["image 7, 7, after"]["width"], strip.shape) == ("96", (16, 64, 3))


def test_difference_states_its_factor():
    before = np.full((1, 8, 8, 3), 100, np.uint8)
    shown, factor = amplified_difference(before, before - 10)
    assert factor == 16
    assert (shown == 160).all()
    assert amplified_difference(before, before + 155)[1] == 1
    assert amplified_difference(before, before)[1] == 32


def test_pictures_keep_the_page_small(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", study())
    pictures(tmp_path / "pictures", size=128, count=40)  # 21 MB of noise, which no PNG can shrink
    text = render(collect(tmp_path))
    assert len(text) < 9_000_000
    shown = int(re.search(r"(\d+) of 40 images", text)[1])
    assert shown >= 16
    # Image 0 improved most and image 39 worsened most: both are among those shown.
    assert 'alt="image 0, 0, before"' in text
    assert 'alt="image 39, 39, before"' in text


def test_scores_may_be_missing(tmp_path):
    write_lines(tmp_path / "log.jsonl", [{"step": 0, "total": 1.0}])
    images = np.zeros((3, 4, 4, 3), np.uint8)
    (tmp_path / "pictures").mkdir()
    np.savez(tmp_path / "pictures" / "two_decoders.npz", before=images, after=images)
    text = Page(render(collect(tmp_path))).text
    assert "two decoders" in text
    assert "Side by side" in text
    assert "Most improved" not in text


def test_report_writes_the_page(demo, tmp_path):
    assert report(ReportRun(path=demo)) == demo / "report.html"
    out = report(ReportRun(path=demo, out=tmp_path / "deep" / "page.html", title="A & B"))
    assert "<h1>A &amp; B</h1>" in out.read_text()
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]  # nothing half-written is left


def test_watch_writes_the_page_again_when_a_run_has_changed(demo, monkeypatch, capsys):
    page, shown, sleeps = demo / "report.html", [], []

    def sleep(seconds):
        """What happens between two looks: nothing, a measurement, a snapshot that the page does not show, Ctrl-C."""
        sleeps.append((seconds, page.stat().st_mtime_ns, "17.25" in page.read_text()))
        if len(sleeps) == 2:
            with (demo / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line("kid", 17.25)) + "\n")
        if len(sleeps) == 3:
            (demo / "seed-0" / "tokenizer-plain" / "snapshot").mkdir()
            (demo / "seed-0" / "tokenizer-plain" / "snapshot" / "config.yaml").write_text("kind: tokenizer\n")
        if len(sleeps) == 4:
            assert '<meta http-equiv="refresh" content="3">' in page.read_text()
            raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", sleep)
    monkeypatch.setattr("webbrowser.open", lambda address: shown.append(address) or True)
    assert report(ReportRun(path=demo, watch=True, open=True, every=3)) == page
    assert [known for *_, known in sleeps] == [False, False, True, True]
    times = [written for _, written, _ in sleeps]
    assert times[0] == times[1] < times[2] == times[3]
    assert {seconds for seconds, *_ in sleeps} == {3}
    assert shown == [page.as_uri()]  # once, though it was written twice
    assert 'http-equiv="refresh"' not in page.read_text()  # the page that stays
    assert "Ctrl-C" in capsys.readouterr().err


def test_watch_waits_for_the_first_run_but_not_for_a_missing_folder(tmp_path, monkeypatch, capsys):
    def sleep(_):
        if (tmp_path / "run").exists():
            raise KeyboardInterrupt
        write_lines(tmp_path / "run" / "metrics.jsonl", study())

    monkeypatch.setattr("time.sleep", sleep)
    assert report(ReportRun(path=tmp_path, watch=True)).exists()
    assert "waiting" in capsys.readouterr().err
    with pytest.raises(UserError, match="found no folder"):
        report(ReportRun(path=tmp_path / "missing", watch=True))


def test_open_says_where_the_page_is_without_a_browser(demo, monkeypatch, capsys):
    monkeypatch.setattr("webbrowser.open", lambda address: False)
    assert report(ReportRun(path=demo, open=True)) == demo / "report.html"
    assert "found no browser to open; the page is " in capsys.readouterr().err


def test_user_errors(tmp_path):
    with pytest.raises(UserError, match="found no folder"):
        write_report(tmp_path / "missing")
    (tmp_path / "snapshot").mkdir()
    write_lines(tmp_path / "snapshot" / "metrics.jsonl", [])
    with pytest.raises(UserError, match=r"found no log\.jsonl or metrics\.jsonl under"):
        collect(tmp_path)
    write_lines(tmp_path / "metrics.jsonl", study())
    with pytest.raises(UserError, match=r"cannot write .*page\.html: "):
        write_report(tmp_path, tmp_path / "metrics.jsonl" / "page.html")


def test_report_imports_no_torch():
    code = "import sys, robustok.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
