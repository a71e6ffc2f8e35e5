"""The app: what it finds, what it shows, and the served page, on tiny models."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from robustok.cli import main
from robustok.commands import app as module
from robustok.commands.app import Viewer, serve, sheet
from robustok.commands.run_models import find
from robustok.data.latent_cache import LatentCache
from robustok.data.pixels import to_pixels
from robustok.errors import UserError
from robustok.generators import load_generator
from robustok.randomness import image_rngs
from robustok.tokenizers import load_tokenizer

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def runs(pipeline, tmp_path_factory):
    """A folder of runs that was moved; the post-trained decoder differs enough to be seen."""
    home = tmp_path_factory.mktemp("app") / "runs"
    for name in ("tokenizer", "generator", "latents", "samples", "post"):
        shutil.copytree(pipeline / name, home / name, ignore=shutil.ignore_patterns("state"))
    config = home / "post" / "config.yaml"
    settings = yaml.safe_load(config.read_text()) | {"tokenizer": "gone/tokenizer", "pairs": "gone/pairs"}
    config.write_text(yaml.safe_dump(settings))
    (weights,) = (home / "post" / "snapshot").glob("*/model.safetensors")
    tensors, rng = load_file(weights), torch.Generator().manual_seed(0)
    for name in tensors:
        if name.startswith("decoder."):
            tensors[name] += 0.1 * torch.randn(tensors[name].shape, generator=rng)
    save_file(tensors, weights)
    return home


@pytest.fixture(scope="module")
def viewer(runs):
    return Viewer(runs)


def decoded(path, latents):
    return sheet(to_pixels(load_tokenizer(path).decode(latents)))


# Finding


def test_the_folder_is_sorted_by_what_it_holds(runs):
    found = find(runs)
    assert found.post_trained == {"post": runs / "post"}
    assert (found.tokenizers, found.generators) == ([runs / "tokenizer"], [runs / "generator"])
    assert found.caches == [runs / "latents", runs / "samples"]
    assert find(runs / "post").post_trained == {"post": runs / "post"}


def test_a_damaged_snapshot_is_passed_over(runs, tmp_path, capsys):
    shutil.copytree(runs, tmp_path / "runs")
    (file,) = (tmp_path / "runs" / "generator" / "snapshot").glob("*/config.yaml")
    file.write_text("{")
    assert find(tmp_path / "runs").generators == []
    assert "passed over" in capsys.readouterr().err


def test_a_folder_without_post_trained_decoders_is_refused(runs, tmp_path):
    with pytest.raises(UserError, match=r"holds no post-trained tokenizer; make one with `robustok post-train`"):
        find(runs / "tokenizer")
    with pytest.raises(UserError, match="there is no folder"):
        find(tmp_path / "nothing")


def test_a_run_without_its_generator_is_refused(runs, tmp_path):
    for name in ("tokenizer", "post"):
        shutil.copytree(runs / name, tmp_path / name)
    with pytest.raises(UserError, match="a generator of its latents is not to be found"):
        Viewer(tmp_path).open("post")


def test_a_delta_is_a_post_trained_decoder(runs, tmp_path):
    from robustok.commands.make_delta import MakeDeltaRun, make_delta

    shutil.copytree(runs, tmp_path / "runs")
    at = {name: tmp_path / "runs" / name for name in ("tokenizer", "post", "delta")}
    make_delta(MakeDeltaRun(out=at["delta"], tokenizer=at["tokenizer"], post_trained=at["post"]))
    viewer = Viewer(tmp_path / "runs")
    assert list(viewer.found.post_trained) == ["delta", "post"]
    one, other = (viewer.show(name, "3", 0, 0.0, 1.0) for name in ("delta", "post"))
    assert np.array_equal(one.after, other.after)


# Showing


def test_both_decoders_get_the_samples_of_the_seed(runs, viewer):
    generator = load_generator(runs / "generator")
    latents = generator.generate(torch.full((5,), 3), generator.sampling, image_rngs(7, range(5)))
    view = viewer.show("post", "3", 7, 0.0, 1.0, count=5)
    assert np.array_equal(view.before, decoded(runs / "tokenizer", latents))
    assert np.array_equal(view.after, decoded(runs / "post", latents))
    assert view.difference.max() == 255
    assert not np.array_equal(view.before, viewer.show("post", "3", 8, 0.0, 1.0, count=5).before)


def test_the_strength_goes_from_the_untouched_to_the_post_trained_decoder(viewer):
    views = [viewer.show("post", "3", 0, 0.0, strength) for strength in (0.0, 0.25, 0.5, 1.0)]
    assert np.array_equal(views[0].after, views[0].before)
    assert "both decoders give the same pixels" in views[0].words
    end = views[-1].after.astype(float)
    distances = [np.abs(view.after - end).mean() for view in views]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] == 0 < distances[-2]


def test_sigma_1_decodes_real_images_of_the_class(runs, viewer):
    cache = LatentCache(runs / "latents")
    rows = (cache.labels == 3).nonzero()[0]
    real = [decoded(runs / "tokenizer", cache.read([row]).latents) for row in rows]
    shown = viewer.show("post", "3", 0, 1.0, 1.0, count=1)
    assert any(np.array_equal(shown.before, picture) for picture in real)


def test_sigma_needs_latents_of_real_images(runs, tmp_path):
    shutil.copytree(runs, tmp_path / "runs", ignore=shutil.ignore_patterns("latents"))
    viewer = Viewer(tmp_path / "runs")
    with pytest.raises(UserError, match="sigma above 0 needs latents of real images"):
        viewer.show("post", "3", 0, 0.5, 1.0)
    assert viewer.show("post", "3", 0, 0.0, 1.0).before.any()


@pytest.mark.parametrize(("name", "label"), [("other", "3"), ("post", "eleven")])
def test_an_unknown_run_or_class_is_refused(viewer, name, label):
    with pytest.raises(UserError, match="there are"):
        viewer.show(name, label, 0, 0.0, 1.0)


def test_a_sheet_has_rows_and_columns_and_enlarges_small_images():
    pixels = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 16, 16)
    picture = sheet(pixels)
    assert picture.shape == (33 * 12, 50 * 12, 3)  # three columns and two lines, twelve times as large
    assert picture[:: 17 * 12, :: 17 * 12, 0].tolist() == [[0, 1, 2], [3, 4, 255]]  # the last cell is empty
    assert picture[0, 16 * 12 : 17 * 12].min() == 255
    assert sheet(torch.zeros(1, 3, 700, 700, dtype=torch.uint8)).shape == (700, 700, 3)


# The page


@pytest.fixture(scope="module")
def page(viewer, tmp_path_factory):
    """The served page and its folder."""
    pytest.importorskip("gradio", reason="needs the extra app", exc_type=ImportError)
    folder = tmp_path_factory.mktemp("gradio")
    before = set(Path.cwd().iterdir())
    served = serve(viewer, folder)
    yield served, folder
    served.close(verbose=False)
    assert set(Path.cwd().iterdir()) == before  # gradio writes no .gradio there


def test_the_page_is_served_to_this_computer_alone(page):
    served, _ = page
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", served.local_url)
    assert not served.share
    assert served.analytics_enabled is False
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"


def test_the_page_answers_by_its_interface(page, viewer, tmp_path):
    from gradio_client import Client

    served, folder = page
    client = Client(served.local_url, verbose=False, download_files=tmp_path, analytics_enabled=False)
    pair, difference, words = client.predict("post", "3", 7, 0.5, 1.0, api_name="/show")
    view = viewer.show("post", "3", 7, 0.5, 1.0)
    for file, expected in zip([*pair, difference], (view.before, view.after, view.difference), strict=True):
        assert np.array_equal(np.asarray(Image.open(file, formats=["PNG"])), expected)
    assert words == view.words
    assert len(list(folder.rglob("*.png"))) >= 3
    with pytest.raises(Exception, match="no class 'eleven'"):
        client.predict("post", "eleven", 7, 0.5, 1.0, api_name="/show")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_page_shows_the_pictures_without_a_network(page, tmp_path):
    served, _ = page
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    options += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--virtual-time-budget=20000"]
    options += ["--window-size=1280,1000", f"--screenshot={tmp_path / 'page.png'}"]
    subprocess.run([CHROMIUM, *options, served.local_url], check=True, capture_output=True, timeout=120)
    shown = np.asarray(Image.open(tmp_path / "page.png", formats=["PNG"]).convert("RGB"))
    assert shown.shape == (1000, 1280, 3)
    assert len(np.unique(shown[300:, :].reshape(-1, 3), axis=0)) > 100  # below the controls lie pictures, in colours


# The command


def test_without_gradio_the_command_says_how_to_install_it(viewer, tmp_path, monkeypatch):
    def missing(_viewer):
        raise ImportError("No module named 'gradio'")

    monkeypatch.setattr(module, "build_page", missing)
    with pytest.raises(UserError, match=r"pip install 'robustok\[app\]'"):
        serve(viewer, tmp_path)


@pytest.mark.parametrize("words", [["{}"], ["path={}"]])
def test_the_folder_may_be_given_without_its_key(words, tmp_path, capsys):
    assert main(["app", *(word.format(tmp_path / "nothing") for word in words)]) == 2
    assert f"there is no folder {tmp_path / 'nothing'}" in capsys.readouterr().err
