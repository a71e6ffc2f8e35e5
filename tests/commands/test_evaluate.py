import json
import math
import shutil

import pytest
import torch

import tiny
from robustok.commands.encode import encode
from robustok.commands.evaluate import evaluate
from robustok.commands.generate import generate
from robustok.config import load
from robustok.data.dataset import open_images
from robustok.data.latent_cache import LatentCache
from robustok.data.pixels import to_pixels
from robustok.data.sources import Digits
from robustok.errors import UserError
from robustok.evaluation.settings import EvaluateRun
from robustok.metrics.features import ExtractorConfig, load_extractor
from robustok.metrics.features.classifier import ClassifierExtractor
from robustok.metrics.frechet import GaussianStatistics, frechet_distance
from robustok.metrics.kernel import kernel_distance
from robustok.metrics.manifold import precision_recall
from robustok.metrics.pixels import psnr
from robustok.tokenizers import load_tokenizer
from robustok.training.generator import train_generator
from robustok.training.tokenizer import TokenizerTrainingRun, train_tokenizer
from robustok.types import Measurement


def run(out, classifier, *words):
    return load(EvaluateRun, None, (f"out={out}", *tiny.DATA, "data.limit=101", f"extractor.path={classifier}", *words))


def decoded(latents, **decoders):
    """Words for latents and the tokenizers that decode them."""
    decoders = [f"samples.decoders.{name}={path}" for name, path in decoders.items()]
    return (f"samples.latents=[{','.join(map(str, latents))}]", *decoders)


def by_name(measurements):
    return {m.metric: m for m in measurements}


@pytest.fixture(scope="module")
def post_trained(tmp_path_factory, tokenizer, pairs):
    from robustok.training.decoder import train_decoder

    out = tmp_path_factory.mktemp("post") / "run"
    train_decoder(tiny.post_run(out, tokenizer, pairs, "learning_rate=1e-2"))
    return out


# Reconstructions


def test_pfid_with_rate_zero_equals_rfid(tmp_path, tokenizer, classifier):
    words = (
        f"tokenizer={tokenizer}",
        "metrics=[rfid,pfid]",
        "pfid.grid.name=explicit",
        "pfid.grid.rates=[0,0.5,1]",
        "pfid.grid.codes=[3]",
    )
    found = evaluate(run(tmp_path, classifier, *words))
    rfid = by_name(found)["rfid"].value
    cells = {m.details["rate"]: m.value for m in found if m.metric == "pfid"}
    assert cells[0] == pytest.approx(rfid, rel=1e-9)
    assert len(set(cells.values())) == 3  # an untrained decoder need not suffer more from more noise
    assert by_name(found)["pfid_mean"].value == pytest.approx(sum(cells.values()) / 3)
    assert by_name(found)["pfid_geometric_mean"].value == pytest.approx(math.prod(cells.values()) ** (1 / 3))


@torch.no_grad()
def test_rfid_and_psnr_by_hand(tmp_path, tokenizer, classifier):
    found = by_name(evaluate(run(tmp_path, classifier, f"tokenizer={tokenizer}", "metrics=[rfid,psnr,codebook]")))
    model, extractor = load_tokenizer(tokenizer), load_extractor(ExtractorConfig(path=classifier))
    images = open_images(Digits(limit=101), 16, "test").read(range(101)).images
    tokens = model.encode(images)
    real, pixels = to_pixels(images), to_pixels(model.decode(tokens))
    a, b = (GaussianStatistics.of(extractor(p)) for p in (pixels, real))
    assert found["rfid"].value == pytest.approx(frechet_distance(a, b), rel=1e-5)
    assert found["psnr"].value == pytest.approx(psnr(pixels, real).double().mean().item(), rel=1e-6)
    assert found["codebook_usage"].value == pytest.approx(len(tokens.unique()) / 32)


def test_halves_of_pairs_give_rfid_a_standard_error(tmp_path, tokenizer, classifier):
    words = (f"tokenizer={tokenizer}", "metrics=[rfid]")
    (bare,), (halved,) = (evaluate(run(tmp_path, classifier, *words, f"comparison.halves={n}")) for n in (0, 20))
    assert halved.value == bare.value
    assert bare.standard_error is None
    assert 0 < halved.standard_error < halved.value  # of unpaired halves it would be larger


def test_counts_and_independence_of_the_batch_size(tmp_path, tokenizer, classifier):
    words = (
        f"tokenizer={tokenizer}",
        "metrics=[rfid,psnr,ssim,codebook,pfid]",
        "pfid.grid.rates=[0.5]",
        "pfid.grid.shares=[0.1]",
    )
    found = [evaluate(run(tmp_path, classifier, *words, f"batch_size={size}")) for size in (64, 7)]
    for a, b in zip(*found, strict=True):
        assert a.metric == b.metric
        assert a.value == pytest.approx(b.value, rel=1e-6)
        assert a.samples == b.samples == 101
    assert "digits test, center crop 16, 101 images" in found[0][0].reference


def test_seeds_give_a_standard_error(tmp_path, tokenizer, classifier):
    words = (f"tokenizer={tokenizer}", "metrics=[pfid]", "pfid.grid.rates=[0.5]", "pfid.grid.shares=[0.1]")
    three = evaluate(run(tmp_path, classifier, *words, "pfid.seeds=3"))
    alone = [evaluate(run(tmp_path, classifier, *words, f"seed={seed}"))[0] for seed in range(3)]
    values = torch.tensor([m.value for m in alone], dtype=torch.float64)
    assert three[0].value == pytest.approx(values.mean().item())
    assert three[0].standard_error == pytest.approx(values.std().item() / math.sqrt(3))
    assert alone[0].standard_error is None
    assert len(values.unique()) == 3


CHOICE = ("pfid.grid.name=calibrated", "pfid.grid.rates=[0.2,0.8]", "pfid.grid.shares=[0.1,0.3]", "pfid.grid.keep=2")


def test_a_generator_s_samples_choose_the_cells_of_pfid(tmp_path, tokenizer, samples, classifier):
    words = (f"tokenizer={tokenizer}", "metrics=[pfid]", *CHOICE)
    found = evaluate(run(tmp_path, classifier, *words, *decoded(samples)))
    cells, mean = [m for m in found if m.metric == "pfid"], by_name(found)["pfid_mean"]
    candidates = mean.details["mmd_candidates"]
    assert [tuple(row[:2]) for row in candidates] == [(0.2, 3), (0.2, 10), (0.8, 3), (0.8, 10)]
    best = sorted(candidates, key=lambda row: row[2])[:2]
    assert {(m.details["rate"], m.details["strength"], m.details["mmd"]) for m in cells} == {(*b[:3],) for b in best}
    assert (mean.details["protocol"], mean.details["cells"]) == ("calibrated-custom", 2)
    assert mean.details["mmd_images"] == [80, 101]
    assert mean.value == pytest.approx(sum(m.value for m in cells) / 2)
    with pytest.raises(UserError, match=r"chosen by a generator's samples; give samples\.latents"):
        run(tmp_path, classifier, *words)


def test_a_codebook_of_levels_goes_all_the_way(tmp_path, classifier):
    """FSQ: main training, tokens, a generator whose first loss is ln K, samples, and a pFID that these choose."""
    sizes = [word for word in tiny.TOKENIZER if "quantizer" not in word]
    sizes += ["tokenizer.quantizer.name=fsq", "tokenizer.quantizer.levels=[5,4,3]", "perturbation.strength=4"]
    sizes += ["reconstruction.perceptual=none", "adversarial.weight=0", "learning_rate=1e-2", "min_learning_rate=1e-4"]
    words = (f"out={tmp_path / 'tokenizer'}", *tiny.DATA, *tiny.TRAINING, *sizes)
    tokenizer = train_tokenizer(load(TokenizerTrainingRun, None, words))
    latents = encode(tiny.tokens_run(tmp_path / "latents", tokenizer))
    assert LatentCache(latents).manifest.codebook_size == 60
    generator = train_generator(tiny.generator_run(tmp_path / "generator", latents, "steps=1", "generator.name=gpt"))
    assert tiny.log(tmp_path / "generator")[0]["cross_entropy"] == pytest.approx(math.log(60), abs=0.1)
    samples = generate(tiny.samples_run(tmp_path / "samples", generator))
    words = (f"tokenizer={tokenizer}", "metrics=[rfid,codebook,pfid]", *CHOICE)
    found = evaluate(run(tmp_path / "chosen", classifier, *words, *decoded([samples])))
    mean = by_name(found)["pfid_mean"]
    assert (mean.details["levels"], mean.details["codebook_size"]) == ([5, 4, 3], 60)
    assert mean.value != by_name(found)["rfid"].value  # as good as untrained, it need not suffer


# Samples


def test_decoders_are_compared_on_the_same_latents(tmp_path, tokenizer, post_trained, samples, classifier):
    words = decoded(samples[:2], original=tokenizer, post_trained=post_trained)
    found = evaluate(run(tmp_path, classifier, *words, "metrics=[gfid,kid]", "tags.sigma=0.5"))
    gfid = {m.details["decoder"]: m for m in found if m.metric == "gfid"}
    difference = by_name(found)["gfid_difference"]
    alone = {}
    for decoder, path in (("original", tokenizer), ("post_trained", post_trained)):
        alone[decoder] = [
            evaluate(run(tmp_path, classifier, *decoded([s], d=path), "metrics=[gfid]"))[0].value for s in samples
        ]
        assert gfid[decoder].value == pytest.approx(sum(alone[decoder]) / 2)
        assert gfid[decoder].standard_error == pytest.approx(abs(alone[decoder][0] - alone[decoder][1]) / 2)
        assert (gfid[decoder].samples, gfid[decoder].details["sets"], gfid[decoder].details["sigma"]) == (80, 2, 0.5)
    paired = [b - a for a, b in zip(alone["original"], alone["post_trained"], strict=True)]
    assert difference.value == pytest.approx(sum(paired) / 2)
    assert difference.standard_error == pytest.approx(abs(paired[0] - paired[1]) / 2)
    assert (difference.details["decoder"], difference.details["versus"]) == ("post_trained", "original")
    assert "digits train" in difference.reference


@torch.no_grad()
def test_gfid_by_hand(tmp_path, tokenizer, samples, classifier):
    found = evaluate(
        run(
            tmp_path,
            classifier,
            f"samples.latents=[{samples[0]}]",
            f"samples.decoders={{d: {tokenizer}}}",
            "metrics=[gfid]",
        )
    )
    extractor = load_extractor(ExtractorConfig(path=classifier))
    images = open_images(Digits(limit=101), 16, "train").read(range(101)).images
    pixels = to_pixels(load_tokenizer(tokenizer).decode(LatentCache(samples[0]).read(slice(None)).latents))
    a, b = GaussianStatistics.of(extractor(pixels)), GaussianStatistics.of(extractor(to_pixels(images)))
    assert found[0].value == pytest.approx(frechet_distance(a, b), rel=1e-5)
    assert (found[0].samples, found[0].standard_error) == (40, None)


def test_the_gap_of_latents(tmp_path, tokenizer, samples, classifier):
    words = (*decoded(samples[:1], d=tokenizer), "metrics=[gap]")
    found = by_name(evaluate(run(tmp_path, classifier, *words)))
    assert found["latent_distance"].value > 0
    assert found["token_divergence"].value > 0
    assert found["generated_usage"].value == len(LatentCache(samples[0]).read(slice(None)).latents.unique()) / 32


def test_the_gap_needs_no_feature_space(tmp_path, tokenizer, samples):
    words = (*decoded(samples[:1], d=tokenizer), "metrics=[gap]")
    found = evaluate(load(EvaluateRun, None, (f"out={tmp_path}", *tiny.DATA, *words)))
    figures = {"latent_distance", "latent_position_distance", "latent_kernel_distance"}
    figures |= {
        "token_divergence",
        "generated_usage",
        "token_agreement",
        "reencoded_displacement",
        "reencoded_distance",
    }
    assert {m.metric for m in found} == figures
    assert all("baseline" in m.details for m in found)


@torch.no_grad()
def test_precision_recall_and_kid_by_hand(tmp_path, tokenizer, samples, classifier):
    words = (
        f"samples.latents=[{samples[0]},{samples[1]}]",
        f"samples.decoders={{d: {tokenizer}}}",
        "metrics=[precision,recall,kid]",
    )
    found = by_name(evaluate(run(tmp_path, classifier, *words)))
    extractor, decode = load_extractor(ExtractorConfig(path=classifier)), load_tokenizer(tokenizer).decode
    real = extractor(to_pixels(open_images(Digits(limit=101), 16, "train").read(range(101)).images))
    fakes = [extractor(to_pixels(decode(LatentCache(path).read(slice(None)).latents))) for path in samples]
    both = [precision_recall(real=real, fake=fake) for fake in fakes]
    assert found["precision"].value == pytest.approx(sum(b.precision for b in both) / 2)
    assert found["recall"].value == pytest.approx(sum(b.recall for b in both) / 2)
    assert found["kid"].value == pytest.approx(sum(kernel_distance(f, real).value for f in fakes) / 2, rel=1e-5)
    assert found["recall"].standard_error == pytest.approx(abs(both[0].recall - both[1].recall) / 2)
    details = found["precision"].details
    assert (details["k"], details["reference_samples"], details["samples_per_set"]) == (3, 101, 40)


def test_features_of_every_image_are_computed_once(tmp_path, tokenizer, samples, classifier, monkeypatch):
    counts, call = [], ClassifierExtractor.__call__
    monkeypatch.setattr(ClassifierExtractor, "__call__", lambda self, p: counts.append(len(p)) or call(self, p))
    words = decoded(samples[:2], a=tokenizer, b=tokenizer)
    evaluate(run(tmp_path, classifier, *words, "metrics=[gfid,kid,precision,recall]"))
    assert sum(counts) == 101 + 2 * 2 * 40
    counts.clear()
    evaluate(run(tmp_path, classifier, f"tokenizer={tokenizer}", "metrics=[rfid,psnr,ssim]"))
    assert sum(counts) == 2 * 101


# Lines and errors


def test_every_line_carries_its_protocol(tmp_path, tokenizer, classifier):
    words = (f"tokenizer={tokenizer}", "metrics=[rfid,psnr,pfid]", "tags.tokenizer=plain", "seed=4")
    found = evaluate(run(tmp_path, classifier, *words))
    evaluate(run(tmp_path, classifier, *words))  # appended, not replaced
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for line in (*lines, *(m.details for m in found)):
        line.pop("seconds", None)  # wall time of pFID
    assert lines == [json.loads(json.dumps(m.line())) for m in found] * 2
    for line in lines:
        assert {"metric", "value", "standard_error", "samples", "seed", "extractor", "reference"} <= line.keys()
        assert (line["tokenizer"], line["seed"]) == ("plain", 4)
        assert (line["extractor"] is None) == (line["metric"] == "psnr")  # no feature space in pixel metrics
        assert ("rate" in line and "strength" in line) == (line["metric"] == "pfid")
    assert (
        sum(line["metric"] == "pfid" for line in lines) == 2 * 4 * 2
    )  # four rates; 2 and 3 of 32 codes: shares round alike


@pytest.mark.parametrize("name", ["metric", "value", "standard_error", "samples", "seed", "extractor", "uint8"])
def test_tags_replace_nothing_that_is_measured(name):
    words = ["out=o", "tokenizer=t", "data.name=digits", "metrics=[psnr]", "tags.tokenizer=mine"]
    assert load(EvaluateRun, words=words).tags == {"tokenizer": "mine"}
    with pytest.raises(UserError, match=f"tags: '{name}' is measured and would be replaced; give the tag another name"):
        load(EvaluateRun, words=[*words, f"tags.{name}=1"])
    assert Measurement("psnr", 1.0, None, 2, 0, None, None, {name: "x", "note": "y"}).line() == {
        **{"metric": "psnr", "value": 1.0, "standard_error": None, "samples": 2, "seed": 0, "extractor": None},
        **{"reference": None, "note": "y"} | ({"uint8": "x"} if name == "uint8" else {}),
    }


def test_a_tag_is_left_out_where_its_name_is_measured(tmp_path, tokenizer, samples, classifier):
    words = (*decoded(samples, a=tokenizer), "metrics=[gfid]", "tags.decoder=b", "tags.note=c")
    with pytest.warns(UserWarning, match="tags.decoder is left out of the lines in which decoder is measured"):
        (found,) = evaluate(run(tmp_path, classifier, *words))
    assert (found.line()["decoder"], found.line()["note"]) == ("a", "c")


def test_results_are_not_appended_to_a_file_elsewhere(tmp_path, tokenizer, classifier):
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / "run" / "metrics.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(
        UserError, match=r"metrics\.jsonl is a link to a place outside of .*run.*; remove it, or choose"
    ):
        evaluate(run(tmp_path / "run", classifier, f"tokenizer={tokenizer}", "metrics=[psnr]"))
    assert (tmp_path / "elsewhere").read_text() == "mine"


def changed_cache(path, out, source=None, **manifest):
    """A copy of a cache with other fields in its manifest."""
    shutil.copytree(path, out)
    record = json.loads((out / "manifest.json").read_text())
    record |= manifest
    record["source"] |= source or {}
    (out / "manifest.json").write_text(json.dumps(record))
    return out


def test_only_free_samples_are_samples(tmp_path, tokenizer, latents, pairs, classifier):
    words = "metrics=[gfid]"
    for path, said in {latents: "latents of real images", pairs: "pairs at sigma"}.items():
        with pytest.raises(UserError, match=f"holds {said}.*, expected free samples"):
            evaluate(run(tmp_path, classifier, *decoded([path], a=tokenizer), words))


def test_sets_of_one_mean_differ_in_their_seed_only(tmp_path, tokenizer, samples, classifier):
    def measured(*sets):
        return evaluate(run(tmp_path / "out", classifier, *decoded(sets, a=tokenizer), "metrics=[gfid]"))

    with pytest.raises(UserError, match="hold the same samples, so their standard error would be 0"):
        measured(samples[0], samples[0])
    copied = changed_cache(samples[0], tmp_path / "copied", {"seed": 77})  # another name and seed, the same samples
    with pytest.raises(UserError, match="hold the same samples"):
        measured(samples[0], copied)
    sampling = LatentCache(samples[0]).manifest.source["sampling"]
    for key, value in {"generator": "other", "sampling": sampling | {"temperature": 0.5}}.items():
        other = changed_cache(samples[1], tmp_path / key, {key: value})
        with pytest.raises(UserError, match=rf"differ in more than their seed \({key}"):
            measured(samples[0], other)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_what_cannot_be_evaluated(tmp_path, tokenizer, samples, classifier):
    with pytest.raises(UserError, match="nothing to evaluate"):
        run(tmp_path, classifier, f"samples.latents=[{samples[0]}]")
    with pytest.raises(UserError, match=r"rfid needs extractor\.path"):
        load(EvaluateRun, None, (f"out={tmp_path}", *tiny.DATA, f"tokenizer={tokenizer}", "metrics=[rfid]"))
    decoders = decoded(samples[:1], d=tokenizer)
    for metric in ("sfid", "inception_score"):
        with pytest.raises(UserError, match=rf"{metric} needs extractor\.name=inception"):
            run(tmp_path, classifier, *decoders, f"metrics=[{metric}]")
    with pytest.raises(UserError, match=r"recall needs extractor\.path"):
        load(EvaluateRun, None, (f"out={tmp_path}", *tiny.DATA, *decoders, "metrics=[recall]"))
    other = train_tokenizer(tiny.main_run(tmp_path / "other", "steps=1", "seed=5"))
    with pytest.raises(UserError, match="was made by another tokenizer"):
        evaluate(run(tmp_path / "out", classifier, *decoded(samples[:1], d=other)))
    assert not (tmp_path / "out").exists()
