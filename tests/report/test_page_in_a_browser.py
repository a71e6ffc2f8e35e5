"""The page as a reader sees it."""

import csv
import io
import json

import numpy as np
import pytest

from robustok.report import write_report
from tiny_browser import CHROMIUM, Browser

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="found no chromium, chromium-browser or google-chrome")
FACTS = {"samples": 100, "seed": 0, "extractor": "classifier-64", "reference": "test", "tokenizer": "perturbed"}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("browser")) as one:
        yield one


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with pictures that are red before and blue after post-training."""
    folder = tmp_path_factory.mktemp("run")
    lines = [
        {"metric": "gfid", "decoder": "original", "value": 7.5, "standard_error": 0.25, **FACTS},
        {"metric": "gfid", "decoder": "clean", "value": 7.0, "standard_error": 0.25, **FACTS},
        {"metric": "gfid", "decoder": "=1|2", "value": 6.0, "standard_error": None, **FACTS},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    images = np.zeros((24, 16, 16, 3), np.uint8)
    images[..., 0] = 255
    (folder / "pictures").mkdir()
    np.savez(folder / "pictures" / "samples.npz", before=images, after=images[..., ::-1])
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return write_report(folder)


def pixels_of(screen):
    """How many pixels are red, and blue."""
    return tuple(
        int(((screen[..., a] > 250) & (screen[..., 1] < 5) & (screen[..., b] < 5)).sum()) for a, b in ((0, 2), (2, 0))
    )


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("size", [(1280, 800), (390, 844)])
def test_the_first_screen_shows_numbers_and_images(browser, page, size, dark):
    browser.requests.clear()
    browser.open(page, *size, dark)
    screen = browser.screen()
    # Beneath the numbers there is a row of images at least, each half before and half after.
    red, blue = pixels_of(screen)
    assert min(red, blue) > 30 * 64 * min(4, size[0] // 100)
    first = np.argwhere((screen[..., 0] > 250) & (screen[..., 1] < 5)).min(0)[0]
    assert 200 < first < size[1] - 64
    assert bool(screen[0, 0].mean() < 60) is dark
    assert browser.run("document.documentElement.scrollWidth") <= size[0]  # nothing to scroll sideways
    assert browser.requests == [page.as_uri()]
    assert browser.complaints == []  # neither style nor script nor image was refused


def test_the_slider_uncovers_before_and_after(browser, page):
    browser.open(page)
    everything = 24 * 96 * 96
    assert min(pixels_of(browser.screen())) > 0.45 * everything
    found = {}
    for key, code in (("Home", 36), ("End", 35)):
        browser.run("document.querySelector('.slider input').focus()")
        for kind in ("rawKeyDown", "keyUp"):
            browser.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)
        found[key] = pixels_of(browser.screen())
    assert found["Home"] == (everything, 0)
    assert found["End"][0] == 0
    assert found["End"][1] > 0.98 * everything  # at the edges of the clipped layer colours mix


def test_tables_are_copied(browser, page):
    browser.open(page)
    browser.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    browser.call("Emulation.setFocusEmulationEnabled", enabled=True)
    browser.run("document.querySelectorAll('details').forEach(fold => fold.open = true)")

    def copied(kind):
        bar = "[...document.querySelectorAll('.copies')].find(bar => bar.nextElementSibling.querySelector('.results'))"
        browser.run(f"{bar}.querySelector('button[value={kind}]').click()")
        assert browser.run(f"new Promise(r => setTimeout(() => r({bar}.querySelector('span').textContent), 300))") == (
            "copied"
        )
        return browser.run("navigator.clipboard.readText()").replace("\r\n", "\n")

    head, *rows = csv.reader(io.StringIO(copied("csv")))
    assert head[:2] == ["Tokenizer", "Decoder"]
    assert [row[:2] for row in rows] == [["Perturbed", name] for name in ("original", "clean", "'=1|2")]
    assert rows[0][2] == "7.500 ± 0.250 n = 100"
    lines = copied("markdown").splitlines()
    assert lines[1] == "| --- | --- | --- |"
    assert lines[4] == r"| Perturbed | =1\|2 | 6.000 n = 100 |"
    assert browser.complaints == []


def test_a_watched_page_loads_itself_again_as_it_was(browser, folder, tmp_path):
    page = write_report(folder, tmp_path / "watched.html", refresh=1)
    browser.open(page)
    browser.requests.clear()
    browser.run("window.before = true; document.querySelectorAll('details')[1].open = true")
    browser.wait("window.before === undefined && document.readyState === 'complete'")
    assert browser.run("[...document.querySelectorAll('details')].map(fold => fold.open)")[:3] == [False, True, False]
    write_report(folder, page)
    browser.wait("document.querySelector('meta[http-equiv=refresh]') === null")
    assert set(browser.requests) == {page.as_uri()}
    assert browser.complaints == []
