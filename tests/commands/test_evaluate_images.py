"""Finished images against references of every kind, published protocols, and samples of a generator."""

import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from robustok.cli import main
from robustok.commands.evaluate import evaluate
from robustok.config import load
from robustok.data.dataset import open_images
from robustok.data.latent_cache import LatentCache
from robustok.data.pixels import to_pixels
from robustok.data.sources import Digits
from robustok.errors import UserError
from robustok.evaluation.collector import FeatureCollector
from robustok.evaluation.settings import EvaluateRun
from robustok.generators import load_generator
from robustok.metrics import METRICS, Metric
from robustok.metrics.comparison import Score
from robustok.metrics.features import ExtractorConfig, load_extractor
from robustok.metrics.features.inception import SPATIAL_DIM
from robustok.metrics.frechet import Estimate, GaussianStatistics, frechet_distance
from robustok.metrics.manifold import precision_recall
from robustok.metrics.pixels import psnr, ssim
from robustok.tokenizers import load_tokenizer


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same 60 digits as a folder of PNG and as .npz, and noisy copies of them."""
    folder = tmp_path_factory.mktemp("images")
    pixels = to_pixels(open_images(Digits(), 16, "train").read(range(60)).images)  # (60, 3, 16, 16)
    rng = np.random.default_rng(0)
    noise = rng.integers(-40, 41, pixels.shape)
    noisy = (pixels.numpy().astype(int) + noise).clip(0, 255).astype(np.uint8)
    (folder / "png").mkdir()
    for i, image in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(folder / "png" / f"{i:03d}.png")
    np.savez(folder / "real.npz", arr_0=pixels.permute(0, 2, 3, 1).numpy())
    np.savez(folder / "noisy.npz", arr_0=noisy.transpose(0, 2, 3, 1))
    return SimpleNamespace(folder=folder, real=pixels, noisy=torch.from_numpy(noisy))


def run(out, *words):
    return load(EvaluateRun, None, (f"out={out}", *words))


def by_name(measurements):
    return {m.metric: m for m in measurements}


def test_a_folder_and_an_archive_of_the_same_images_give_the_same_numbers(tmp_path, files, classifier):
    words = [
        f"extractor.path={classifier}",
        "metrics=[gfid,kid,precision,recall]",
        f"reference={files.folder}/real.npz",
    ]
    noisy = by_name(evaluate(run(tmp_path, f"images.noisy={files.folder}/noisy.npz", *words)))
    same = by_name(evaluate(run(tmp_path, f"images.same={files.folder}/png", *words)))
    extractor = load_extractor(ExtractorConfig(path=classifier))
    real, fake = extractor(files.real), extractor(files.noisy)
    expected = frechet_distance(GaussianStatistics.of(fake), GaussianStatistics.of(real))
    assert noisy["gfid"].value == pytest.approx(expected, rel=1e-5)
    assert noisy["gfid"].value > 100 * max(same["gfid"].value, 1e-9)
    assert same["gfid"].value < 1e-6 * GaussianStatistics.of(real).covariance.trace()
    assert (same["precision"].value, same["recall"].value) == (1, 1)
    assert noisy["precision"].value == pytest.approx(precision_recall(real=real, fake=fake).precision)
    details = noisy["gfid"].details
    assert details["images"] == "noisy"
    assert "as they are, 16x16" in details["source"]
    assert details["uint8"] == "as stored"
    assert noisy["gfid"].samples == 60
    assert "60 images" in noisy["gfid"].reference


def test_pairs_are_compared_image_by_image(tmp_path, files):
    words = [f"reference={files.folder}/png", "metrics=[psnr,ssim]"]
    found = by_name(evaluate(run(tmp_path, f"paired_images.noisy={files.folder}/noisy.npz", *words, "batch_size=7")))
    values = psnr(files.noisy, files.real)
    assert found["psnr"].value == pytest.approx(values.mean().item())
    assert found["psnr"].standard_error == pytest.approx((values.std() / 60**0.5).item())
    assert found["ssim"].value == pytest.approx(ssim(files.noisy, files.real).mean().item())
    assert evaluate(run(tmp_path, f"images.noisy={files.folder}/noisy.npz", *words)) == []  # not given as pairs
    np.savez(tmp_path / "few.npz", arr_0=files.noisy[:5].permute(0, 2, 3, 1).numpy())
    with pytest.raises(UserError, match="as many images on both sides"):
        evaluate(run(tmp_path, *words, f"paired_images.noisy={tmp_path}/few.npz"))


def test_a_data_set_is_a_reference_too_and_its_statistics_are_kept(tmp_path, files, classifier, monkeypatch):
    cache = tmp_path / "cache"
    words = [f"extractor.path={classifier}", *tiny.DATA, f"images.noisy={files.folder}/noisy.npz", f"cache={cache}"]
    first = by_name(evaluate(run(tmp_path / "a", *words, "metrics=[gfid]")))
    (kept,) = cache.iterdir()
    # The file itself is a reference, and another run reads it instead of the images.
    again = by_name(evaluate(run(tmp_path / "b", *words[:1], words[-2], f"reference={kept}", "metrics=[gfid]")))
    assert again["gfid"].value == pytest.approx(first["gfid"].value, rel=1e-9)
    assert "digits train" in again["gfid"].reference
    counts, update = [], FeatureCollector.update
    monkeypatch.setattr(FeatureCollector, "update", lambda self, i, p: counts.append(len(p)) or update(self, i, p))
    evaluate(run(tmp_path / "c", *words, "metrics=[gfid]"))
    assert sum(counts) == 60  # the noisy images alone
    evaluate(run(tmp_path / "d", *words, "metrics=[gfid,kid]"))
    assert sum(counts) == 60 + 60 + 128  # single features were not kept: made again, once
    np.savez(kept, **{**dict(np.load(kept)), "data": np.array("other images")})
    with pytest.raises(UserError, match="other images"):
        evaluate(run(tmp_path / "e", *words, "metrics=[gfid]"))


def test_pairs_are_found_by_their_names(tmp_path, files):
    """0.png, 1.png, 10.png, 11.png, ... are images 0, 1, 10, 11, ... of the array."""
    for i, image in enumerate(files.real.permute(0, 2, 3, 1).numpy()):
        (tmp_path / "png").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "png" / f"{i}.png")
    words = [f"paired_images.a={tmp_path}/png", f"reference={files.folder}/real.npz", "metrics=[ssim]"]
    assert by_name(evaluate(run(tmp_path, *words)))["ssim"].value == pytest.approx(1)


def test_broken_images_are_not_counted(tmp_path, files, classifier):
    shutil.copytree(files.folder / "png", tmp_path / "png")
    (tmp_path / "png" / "007.png").write_bytes(b"no image")
    words = [f"images.a={tmp_path}/png", f"reference={files.folder}/real.npz", f"extractor.path={classifier}"]
    with pytest.warns(UserWarning, match="007.png"):
        measured = by_name(evaluate(run(tmp_path, *words, "metrics=[gfid]")))["gfid"]
    assert measured.samples == 59
    assert "59 images" in measured.details["source"]


def test_classes_without_samples_are_not_balanced(tmp_path, files, classifier):
    np.savez(tmp_path / "one.npz", arr_0=np.zeros((8, 16, 16, 3), np.uint8), arr_1=np.full(8, 3))
    words = [f"images.a={tmp_path}/one.npz", *tiny.DATA, f"extractor.path={classifier}", "metrics=[gfid]"]
    assert by_name(evaluate(run(tmp_path, *words)))["gfid"].details["balance"] == "0 to 8 of each class"


def test_kept_statistics_are_those_of_the_files_that_are_there(tmp_path, files, classifier):
    for name in ("photos", "same"):
        (tmp_path / name / "a").mkdir(parents=True)
        for i, image in enumerate(files.real[:40].permute(0, 2, 3, 1).numpy()):
            Image.fromarray(image).save(tmp_path / name / "a" / f"{i:03d}.bmp")  # all files have one size
    words = [f"images.a={files.folder}/noisy.npz", "data.name=folder", "data.holdout=0", "metrics=[gfid]"]
    words += [f"data.path={tmp_path}/photos", f"extractor.path={classifier}", f"cache={tmp_path}/cache"]
    first, again = (by_name(evaluate(run(tmp_path, *words)))["gfid"].value for _ in range(2))
    for i in range(40):
        Image.fromarray(255 - files.real[i].permute(1, 2, 0).numpy()).save(tmp_path / "photos" / "a" / f"{i:03d}.bmp")
    other = by_name(evaluate(run(tmp_path, *words)))["gfid"].value
    fresh = by_name(evaluate(run(tmp_path, *words[:-1])))["gfid"].value
    assert first == again
    assert other == fresh != first
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_statistics_of_images_of_another_size_are_refused(tmp_path, files, classifier):
    words = [f"images.a={files.folder}/noisy.npz", f"extractor.path={classifier}", "metrics=[gfid]"]
    np.savez(tmp_path / "larger.npz", arr_0=files.real.permute(0, 2, 3, 1).numpy().repeat(2, 1).repeat(2, 2))
    kept = [f"images.a={tmp_path}/larger.npz", f"reference={tmp_path}/larger.npz", f"cache={tmp_path}/cache"]
    evaluate(run(tmp_path, *kept, *words[1:]))
    (statistics,) = (tmp_path / "cache").iterdir()
    with pytest.raises(UserError, match="have 16x16 and 32x32 pixels"):
        evaluate(run(tmp_path, *words, f"reference={statistics}"))


def test_an_extractor_that_sees_no_difference_measures_nothing(tmp_path, files, monkeypatch):
    class Zeros(FakeInception):
        def __call__(self, pixels):
            return torch.zeros(len(pixels), 6)

    monkeypatch.setattr("robustok.evaluation.evaluator.load_extractor", lambda config, device: Zeros())
    words = [f"images.a={files.folder}/noisy.npz", f"reference={files.folder}/real.npz", "extractor.path=x"]
    for metric in ("gfid", "kid", "recall"):
        with pytest.raises(UserError, match="have the same features, so that nothing can be measured"):
            evaluate(run(tmp_path, *words, f"metrics=[{metric}]"))


def test_a_flipped_bit_in_an_array_is_found(tmp_path, files, classifier):
    content = bytearray((files.folder / "noisy.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "flipped.npz").write_bytes(content)
    words = [f"images.a={tmp_path}/flipped.npz", f"reference={files.folder}/real.npz", f"extractor.path={classifier}"]
    with pytest.raises(UserError, match=r"flipped.npz is cut off or damaged .*CRC"):
        evaluate(run(tmp_path, *words, "metrics=[gfid]"))


def test_a_path_with_brackets_is_that_path(tmp_path, files, classifier):
    path = tmp_path / "samples [cfg=1.5].npz"
    shutil.copy(files.folder / "noisy.npz", path)
    found = evaluate(run(tmp_path, f"reference={files.folder}/real.npz", f"extractor.path={classifier}",
                         "metrics=[gfid]", f"images.a={path}"))  # fmt: skip
    assert found[0].details["source"].startswith("samples [cfg=1.5].npz")


def test_a_pipe_is_no_file_of_images_or_statistics(tmp_path, files, classifier):
    os.mkfifo(tmp_path / "pipe.npz")
    words = {"images.a": files.folder / "noisy.npz", "reference": files.folder / "real.npz"}
    for key in words:
        given = [f"{name}={path}" for name, path in (words | {key: tmp_path / "pipe.npz"}).items()]
        with pytest.raises(UserError, match="it is a FIFO"):
            evaluate(run(tmp_path, *given, f"extractor.path={classifier}", "metrics=[gfid]"))


def adm_inputs(path):
    """What ADM's evaluator reads of a reference batch: METRICS.md has its keys."""
    with np.load(path) as file:
        assert file["arr_0"].dtype == np.uint8
        assert file["arr_0"].shape[3] == 3
        return dict(file)


def test_references_for_adm(tmp_path, inception, monkeypatch):
    words = [*tiny.DATA, "extractor.name=inception", "adm_reference=16", "metrics=[gfid]"]
    monkeypatch.setattr("robustok.evaluation.adm.REFERENCE_IMAGES", 50)
    evaluate(run(tmp_path, *words))
    images = open_images(Digits(limit=128), 16, "train")
    everything = to_pixels(images.read(range(len(images))).images)
    found, features = adm_inputs(tmp_path / "reference.npz"), FakeInception().features(everything)
    assert 25 <= len(found["arr_0"]) <= 50
    np.testing.assert_array_equal(found["arr_0"][1], everything[-(-len(images) // 50)].permute(1, 2, 0))
    for suffix, rows in {"": features.pool, "_s": features.spatial}.items():
        np.testing.assert_allclose(found[f"mu{suffix}"], rows.double().mean(0), rtol=1e-5)
        np.testing.assert_allclose(found[f"sigma{suffix}"], np.cov(rows.double().T), rtol=1e-3, atol=1e-6)
    with pytest.raises(UserError, match="needs the statistics of all"):
        evaluate(run(tmp_path / "more", *tiny.DATA, "adm_reference=16", "metrics=[]"))
    given = [f"images.a={tmp_path}/reference.npz", f"reference={tmp_path}/reference.npz", "extractor.name=inception"]
    count = len(found["arr_0"])
    assert f"gfid@{count}" in by_name(evaluate(run(tmp_path, *given, "metrics=[gfid]", "allow_fewer=true")))


def test_references_that_do_not_fit_are_refused_by_name(tmp_path, files, classifier, capsys):
    words = ["evaluate", f"out={tmp_path}/out", f"extractor.path={classifier}", f"images.a={files.folder}/real.npz"]
    pickled = tmp_path / "pickled.npz"
    np.savez(pickled, mu=np.array([{"a": 1}], dtype=object), sigma=np.eye(2))
    other = tmp_path / "other.npz"
    np.savez(other, mu=np.zeros(3), sigma=np.eye(3), name=np.array("classifier-3-00000000"), count=np.array(9))
    halves = tmp_path / "half.npz"
    np.savez(halves, mu=np.zeros(3))
    floats = tmp_path / "floats.npz"
    np.savez(floats, arr_0=np.full((4, 16, 16, 3), np.nan))
    larger = tmp_path / "larger.npz"
    np.savez(larger, arr_0=np.zeros((4, 32, 32, 3), np.uint8))
    one = tmp_path / "one.npz"
    np.savez(one, arr_0=np.zeros((1, 16, 16, 3), np.uint8))
    fake = tmp_path / "fake.npz"
    fake.write_bytes(b"\x80\x04cos\nsystem\n.")
    cases = {
        pickled: "pickled.npz", other: "classifier-3-00000000", halves: "sigma", floats: "float", larger: "32x32",
        one: "1 images", fake: "fake.npz", tmp_path / "none": "does not exist",
    }  # fmt: skip
    for path, said in cases.items():
        assert main([*words, "metrics=[gfid]", f"reference={path}"]) == 2, path
        message = capsys.readouterr().err.strip().splitlines()
        assert len(message) == 1, message
        assert said in message[0]
    assert not (tmp_path / "out").exists()


# Published protocols


class FakeInception:
    """The shape of the official network's features, from sums of pixels."""

    name, dim = "inception-2048-6726825d", 6

    def __init__(self, *_):
        pass

    def __call__(self, pixels):
        return self.features(pixels).pool

    def features(self, pixels):
        parts = pixels.float().flatten(1)
        pool = torch.stack([parts[:, i::6].mean(1) / 50 for i in range(6)], 1)
        spatial = parts[:, :7].repeat(1, SPATIAL_DIM // 7) / 255
        return SimpleNamespace(pool=pool, logits=parts[:, :10] / 20, spatial=spatial)


@pytest.fixture
def inception(monkeypatch):
    monkeypatch.setattr("robustok.evaluation.evaluator.load_extractor", lambda config, device: FakeInception())


def test_published_protocols_on_fewer_images_need_a_flag_and_are_named_by_their_count(
    tmp_path, files, inception, capsys
):
    words = ["evaluate", f"out={tmp_path}", f"images.a={files.folder}/noisy.npz", f"reference={files.folder}/real.npz"]
    words += ["extractor.name=inception", "metrics=[gfid,precision,inception_score]"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "gfid is published on 50,000 images, there are 60" in said
    assert "gfid@60" in said
    assert not (tmp_path / "metrics.jsonl").exists()
    assert main([*words, "--allow-fewer"]) == 0
    out = capsys.readouterr().out
    assert "gfid@60" in out
    assert "precision@60" in out
    assert "inception_score@60" in out
    assert "kid" in out
    assert "kid@" not in out


def test_an_adm_reference_has_moments_and_other_images(tmp_path, files, inception):
    """Its moments are of a whole data set; its images are for precision and recall only."""
    everything = to_pixels(open_images(Digits(), 16, "train").read(range(500)).images)
    found = FakeInception().features(everything)
    pool, spatial = found.pool.double().numpy(), found.spatial.double().numpy()
    moments = {"mu": pool.mean(0), "sigma": np.cov(pool.T), "mu_s": spatial.mean(0), "sigma_s": np.cov(spatial.T)}
    np.savez(tmp_path / "adm.npz", arr_0=files.real.permute(0, 2, 3, 1).numpy(), **moments)
    words = [f"images.a={files.folder}/noisy.npz", f"reference={tmp_path}/adm.npz", "extractor.name=inception"]
    words += ["allow_fewer=true", "metrics=[gfid,sfid,recall]"]
    measured = by_name(evaluate(run(tmp_path, *words)))
    fake = FakeInception().features(files.noisy)
    expected = frechet_distance(GaussianStatistics.of(fake.pool), GaussianStatistics.of(found.pool))
    assert measured["gfid@60"].value == pytest.approx(expected, rel=1e-6)
    expected = frechet_distance(GaussianStatistics.of(fake.spatial), GaussianStatistics.of(found.spatial))
    assert measured["sfid@60"].value == pytest.approx(expected, rel=1e-4)
    expected = precision_recall(real=FakeInception()(files.real), fake=fake.pool).recall
    assert measured["recall@60"].value == pytest.approx(expected)
    assert measured["recall@60"].details["reference_samples"] == 60
    assert "unknown number of images" in measured["gfid@60"].reference
    np.savez(tmp_path / "bare.npz", **{key: moments[key] for key in ("mu", "sigma")})
    for metric, said in {"sfid": "mu_s", "recall": "single images"}.items():
        with pytest.raises(UserError, match=said):
            evaluate(run(tmp_path, *words, f"reference={tmp_path}/bare.npz", f"metrics=[gfid,{metric}]"))


def test_halves_give_a_standard_error_to_one_set(tmp_path, files, classifier):
    words = [f"images.a={files.folder}/noisy.npz", f"reference={files.folder}/real.npz", f"extractor.path={classifier}"]
    bare = by_name(evaluate(run(tmp_path, *words, "metrics=[gfid]")))["gfid"]
    halved = by_name(evaluate(run(tmp_path, *words, "metrics=[gfid]", "comparison.halves=10")))["gfid"]
    assert bare.standard_error is None
    assert halved.value == pytest.approx(bare.value)
    assert 0 < halved.standard_error < 0.1
    assert halved.details["standard_error_from"] == "10 random halves"


def test_halves_are_drawn_of_pairs(tmp_path, files, classifier):
    words = [f"reference={files.folder}/real.npz", f"extractor.path={classifier}", "metrics=[gfid]"]
    errors = [
        evaluate(run(tmp_path, *words, "comparison.halves=20", f"{key}.a={files.folder}/noisy.npz"))[0].standard_error
        for key in ("paired_images", "images")
    ]
    assert 0 < errors[0] < errors[1] / 2  # what an image and its noisy copy share cancels


def test_bare_statistics_are_enough_for_gfid(tmp_path, files, inception):
    """KID is added to FID of few images only where the reference has features of single images."""
    pool = FakeInception()(files.real).double().numpy()
    np.savez(tmp_path / "bare.npz", mu=pool.mean(0), sigma=np.cov(pool.T))
    words = [f"images.a={files.folder}/noisy.npz", f"reference={tmp_path}/bare.npz", "extractor.name=inception"]
    found = evaluate(run(tmp_path, *words, "metrics=[gfid]", "allow_fewer=true"))
    assert [m.metric for m in found] == ["gfid@60"]


def test_several_feature_spaces_share_one_pass(tmp_path, files, classifier, inception, monkeypatch):
    real_loader = load_extractor
    monkeypatch.setattr(
        "robustok.evaluation.evaluator.load_extractor",
        lambda config, device: FakeInception() if config.name == "inception" else real_loader(config, device),
    )
    words = [f"images.a={files.folder}/noisy.npz", f"reference={files.folder}/real.npz", "extractor.name=inception"]
    words += [f"more_extractors=[{{path: {classifier}}}]", "allow_fewer=true", "metrics=[gfid,sfid,kid]"]
    found = evaluate(run(tmp_path, *words))
    spaces = {m.extractor.split("-")[0] for m in found if m.metric.startswith("gfid")}
    assert spaces == {"inception", "classifier"}
    assert [m.metric for m in found if m.metric.startswith("sfid")] == ["sfid@60"]  # Inception's alone


# Samples made first


@torch.no_grad()
def test_a_generator_is_sampled_evaluated_and_predicts_real_tokens(tmp_path, tokenizer, generator, classifier):
    words = [*tiny.DATA, f"extractor.path={classifier}", f"tokenizer={tokenizer}", f"samples.generator={generator}"]
    words += ["samples.count=40", "samples.sets=2", "metrics=[gfid,gap]", "seed=5"]
    found = by_name(evaluate(run(tmp_path, *words)))
    assert found["gfid"].details["balance"] == "8 of each class"
    assert found["gfid"].details["sets"] == 2
    caches = [LatentCache(tmp_path / "samples" / name) for name in ("000005", "000006")]
    direct = [f"samples.latents=[{','.join(str(c.path) for c in caches)}]", f"samples.decoders.original={tokenizer}"]
    other = by_name(evaluate(run(tmp_path, *words[:2], *words[2:3], *direct, "metrics=[gfid]")))
    assert other["gfid"].value == found["gfid"].value
    # Teacher forcing by hand, on the tokens of the training images.
    model, images = load_generator(generator), open_images(Digits(limit=128), 16, "train")
    batch = images.read(range(len(images)))
    tokens = load_tokenizer(tokenizer).encode(batch.images)
    right = (model.logits(tokens, batch.labels)[:, :-1].argmax(-1) == tokens).double().mean()
    assert found["generator_accuracy"].value == pytest.approx(right.item(), abs=1e-9)
    assert 0 < found["generator_accuracy"].details["baseline"] < 1
    folder = tmp_path / "samples" / "000005"
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    evaluate(run(tmp_path, *words))  # found complete, not made again
    assert before == {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}


def test_what_is_missing_is_named(tmp_path, files, tokenizer, classifier):
    with pytest.raises(UserError, match="no real images"):
        run(tmp_path, f"images.a={files.folder}/png", f"extractor.path={classifier}")
    with pytest.raises(UserError, match="nothing to evaluate"):
        run(tmp_path, f"reference={files.folder}/png", f"extractor.path={classifier}")
    words = [f"images.a={files.folder}/png", *tiny.DATA, f"extractor.path={classifier}"]
    with pytest.raises(UserError, match="halves=1"):
        run(tmp_path, *words, "comparison.halves=1")
    with pytest.raises(UserError, match="nothing to decode"):
        run(tmp_path, *words, f"samples.decoders.a={tokenizer}")
    with pytest.raises(UserError, match=r"no metric 'fid'; one of psnr, .*gfid"):
        run(tmp_path, *words, "metrics=[gfid,fid]")


def test_a_metric_is_one_function_and_one_entry(tmp_path, files, classifier, monkeypatch):
    def shift(sets):
        return Score(Estimate((sets.fake.statistics.mean - sets.real.statistics.mean).norm().item()))

    monkeypatch.setitem(METRICS, "shift", Metric("samples", "distance of the mean features", shift))
    monkeypatch.setitem(METRICS, "worst", Metric("pairs", "largest error", lambda a, b: (a - b).flatten(1).amax(1)))
    words = [f"paired_images.a={files.folder}/noisy.npz", f"reference={files.folder}/real.npz"]
    evaluate(run(tmp_path, *words, f"extractor.path={classifier}", "metrics=[shift,worst,psnr]"))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["metric"] for line in lines] == ["psnr", "worst", "shift"]
    extractor = load_extractor(ExtractorConfig(path=classifier))
    means = [extractor(pixels).double().mean(dim=0) for pixels in (files.noisy, files.real)]
    assert lines[2]["value"] == pytest.approx((means[0] - means[1]).norm().item(), rel=1e-5)
    assert lines[2]["extractor"] == extractor.name
