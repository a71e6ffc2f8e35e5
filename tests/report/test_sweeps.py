"""The report's curves over sigma and over the strength of a delta."""

import html
import json
import re

import pytest

from robustok.report import collect, render


def held_out(stage, sigma, steps, value, change=0.0, **more):
    line = {"metric": "held_out", "value": value, "standard_error": 0.3, "samples": 80, "seed": 0, "extractor": "c"}
    line |= {"reference": "r", "stage": stage, "sigma": sigma, "steps": steps, "sets": 4, "values": [value] * 4}
    return line | {"change": change, "change_error": 0.05 if sigma else 0.0} | more


def gfid(decoder, value, **more):
    line = {"metric": "gfid", "value": value, "standard_error": 0.1, "samples": 80, "seed": 0, "extractor": "c-64"}
    return line | {"reference": "digits", "tokenizer": "plain", "decoder": decoder} | more


def page_of(folder, lines):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return html.unescape(render(collect(folder)))


def figures(page):
    return re.findall(r'alt="([^"]* against [^"]*)"', page)


SWEEP = [
    held_out("untouched", None, 0, 5.0),
    held_out("candidate", 0.8, 20, 5.5, 0.5),
    held_out("candidate", 0.9, 20, 4.5, -0.5),
    held_out("candidate", 1.0, 20, 4.9, -0.1),
    held_out("continued", 0.9, 200, 4.25, -0.75),
]


def test_the_choice_of_sigma_is_a_plot_and_a_table(tmp_path):
    page = page_of(tmp_path, SWEEP)
    (alt,) = figures(page)
    short = "short training: 5.500 at 0.8, 4.500 at 0.9, 4.900 at 1"
    assert alt == f"validation distance against σ: {short}; continued: 4.250 at 0.9; before post-training 5.000"
    table = page[page.index("Choice of σ") :]
    rows = [re.sub("<[^>]*>", " ", row).split() for row in re.findall("<tr.*?>(.*?)</tr>", table, re.DOTALL)][1:6]
    assert rows[0] == ["before", "post-training", "0", "5.000", "–", "4"]
    assert rows[2] == ["paired,", "σ", "=", "0.9", "20", "4.500", "−0.500", "±", "0.050", "4"]
    assert rows[3][3:5] == ["1", "(control)"]
    assert "4.250" in re.search('<tr class="best">(.*?)</tr>', table)[1]
    assert "The lowest is that of paired, σ = 0.9." in table
    assert table.count('class="best"') == 1


def test_where_nothing_helped_it_says_so(tmp_path):
    page = page_of(tmp_path, SWEEP[:2])
    assert "The lowest is that of the decoder before post-training." in page


def test_the_choice_of_an_objective_is_a_table_with_prices_and_the_verdict(tmp_path):
    prices = {"rfd": 1.25, "psnr": 22.5}
    lines = [
        held_out("untouched", None, 0, 5.0, objective=None, **prices),
        held_out("candidate", None, 20, 4.9, -0.1, objective="clean", change_error=0.02, **prices),
        held_out("candidate", None, 20, 4.5, -0.5, objective="free+clean", change_error=0.05, **prices),
        held_out("unseen", None, 20, 4.0, -1.0, objective="free+clean"),
        held_out("verdict", None, 20, 4.5, objective="free+clean", words="post-training pays: so much"),
    ]
    page = page_of(tmp_path, lines)
    assert not figures(page)
    table = page[page.index("Choice of objective") :]
    assert re.findall('<th scope="col">(.*?)</th>', table)[4:6] == ["rFD", "PSNR (dB)"]
    rows = [re.sub("<[^>]*>", " ", row).split() for row in re.findall("<tr.*?>(.*?)</tr>", table, re.DOTALL)][1:]
    assert rows[1][:2] == ["clean", "(control)"]
    assert rows[2] == ["free+clean", "20", "4.500", "−0.500", "±", "0.050", "1.250", "22.50", "4"]
    assert "4.000" not in table[: table.index("</table>")]
    assert "The lowest is that of free+clean. post-training pays: so much" in table
    for sigma in (0.8, 0.9):  # one sigma is no curve
        lines.append(held_out("candidate", sigma, 20, 5.5 - sigma, -0.3, objective="paired", **prices))
        assert bool(figures(page_of(tmp_path, lines))) == (sigma == 0.9)
    plot = figures(page_of(tmp_path, lines))[0]
    assert plot.startswith("validation distance against σ: 4.700 at 0.8, 4.600 at 0.9")


def test_held_out_distances_are_no_results(tmp_path):
    page = page_of(tmp_path, SWEEP)
    assert "No measurements yet." in page
    results = page_of(tmp_path, [*SWEEP, gfid("original", 7.0)])
    assert "<summary>Results</summary>" in results
    table = results[results.index("<summary>Results</summary>") : results.index("Objective, sigma and strength")]
    assert "7.000" in table
    assert "5.500" not in table


def test_broken_lines_are_left_out(tmp_path):
    lines = [
        *SWEEP,
        held_out("candidate", "auto", 20, 4.0),
        held_out("dreamt", 0.5, 20, 4.0),
        held_out([], 0.5, 20, 4.0),
    ]
    (alt,) = figures(page_of(tmp_path, lines))
    assert "at 0.5" not in alt
    assert not figures(page_of(tmp_path, SWEEP[1:]))  # without the untouched one there is nothing to compare with


def test_strengths_are_a_curve_with_the_original_as_a_line(tmp_path):
    strengths = {0.0: 5.0, 0.25: 4.6, 0.5: 4.4, 1.0: 4.7}
    lines = [gfid(f"s{s}", value, delta_scale=s, sigma=0.9) for s, value in strengths.items()]
    (alt,) = figures(page_of(tmp_path, [gfid("original", 5.0), *lines]))
    assert alt.startswith("gFD, plain tokenizer against scale of the delta: ")
    assert alt.endswith("5.000 at 0, 4.600 at 0.25, 4.400 at 0.5, 4.700 at 1; before post-training 5.000")
    assert not figures(page_of(tmp_path, lines[:2]))  # two are no curve
    others = [line | {"delta": "rank 8", "value": line["value"] + 1} for line in lines]
    (alt,) = figures(page_of(tmp_path, [*lines, *others]))
    assert "σ = 0.9: 5.000 at 0, " in alt
    assert "σ = 0.9, rank 8: 6.000 at 0, 5.600 at 0.25" in alt


def test_sigmas_are_a_curve_over_seeds(tmp_path):
    lines = [gfid("original", 5.0 + seed, seed=seed) for seed in (0, 1)]
    for seed in (0, 1):
        lines += [gfid(f"post{s}", s + seed, seed=seed, sigma=s, steps=9) for s in (0.7, 0.8, 0.9)]
    lines.append(gfid("half", 1.0, sigma=0.85, delta_scale=0.5))  # a mixture is not that sigma's decoder
    (alt,) = figures(page_of(tmp_path, lines))
    assert alt.endswith("σ: 1.200 at 0.7, 1.300 at 0.8, 1.400 at 0.9; before post-training 5.500")


@pytest.mark.parametrize("name", ["<b>x", "a&b"])
def test_names_are_escaped(tmp_path, name):
    lines = [gfid(f"s{s}", 1.0, delta_scale=s, tokenizer=name) for s in (0.0, 0.5, 1.0)]
    page_of(tmp_path, lines)
    page = render(collect(tmp_path))
    assert len(figures(page)) == 1
    assert name not in "".join(figures(page))
    assert html.escape(name) in figures(page)[0]
