"""Post-training of a diffusers pipeline on photographs of several shapes, through the command line."""

import json
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import robustok
import tiny
from robustok.cli import main
from robustok.commands.app import Viewer
from robustok.commands.push import PushRun, _picture
from robustok.data.buckets import open_buckets
from robustok.data.captions import caption_digest
from robustok.data.latent_cache import LatentCache, caches_in
from robustok.data.sources import Folder
from robustok.evaluation.held_out import HeldOut, HeldOutScore, ReconstructionScore
from robustok.generators.pipeline import PipelineGenerator
from robustok.metrics.features import ExtractorConfig, load_extractor
from robustok.metrics.frechet import GaussianStatistics, frechet_distance
from robustok.randomness import bucket_seed, image_rngs
from robustok.tokenizers import encoder_digest, load_tokenizer
from robustok.training.latent_crops import LatentCrop, cropping
from robustok.training.objectives import LatentNoise, Material, Steps, mixture, open_caches

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import tiny_pipelines  # noqa: E402, needs diffusers

SHORT = [word for word in tiny.TRAINING if not word.startswith(("steps", "batch_size"))]
WORDS = [*SHORT, "steps=6", "batch_size=6", "adversarial.weight=0", "reconstruction.perceptual=none", "workers=0"]
WORDS += ["cache.batch_size=4", "mixture.sampling.name=pipeline", "mixture.sampling.steps=4", "learning_rate=1e-2"]
BUCKETS = "data.buckets=[[24,40],[32,32],[40,24]]"
NAMES = {"24x40": 8, "32x32": 7, "40x24": 6}  # how many photographs are trained on


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return tiny_pipelines.saved_with_text(tmp_path_factory.mktemp("given") / "tiny-diffusion")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Eight wide, seven square and six tall photographs to train on, and one of each beside them, with captions."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    sizes = {"wide": (60, 40), "square": (36, 36), "tall": (40, 60)}
    for (name, size), count in zip(sizes.items(), (8, 7, 6), strict=True):
        for i in range(count + 1):
            path = folder / ("test" if i == count else "train") / f"{name}{i}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(size).save(path)
            path.with_suffix(".txt").write_text(f"a {name} {'ab'[i % 2]}")
    return folder


def words(given, photos, *more):
    return [*WORDS, f"pipeline={given}", "data.name=folder", f"data.path={photos}", "data.captions=txt", *more]


def run(out, *settings):
    assert main(["post-train", f"out={out}", *settings]) == 0
    return out


@pytest.fixture(scope="module")
def post(tmp_path_factory, given, photos):
    return run(tmp_path_factory.mktemp("buckets") / "post", *words(given, photos, BUCKETS, "sigma=0.5"))


def test_one_command_goes_from_photographs_of_several_shapes_to_a_pipeline(post, given, photos, capsys):
    pairs = post / "pairs" / "sigma-0.5-21"
    assert {path.name: len(LatentCache(path)) for path in caches_in(post / "latents")} == NAMES
    assert {path.name: len(LatentCache(path)) for path in caches_in(pairs)} == NAMES

    # Pairs are what the pipeline makes at the size of their bucket, with the captions of their photographs.
    prompts = sorted({path.read_text() for path in photos.glob("train/*.txt")}, key=caption_digest)
    tokenizer, generator = robustok.load_pipeline(given, prompts)
    for bucket in open_buckets(Folder(path=photos, captions="txt", buckets=[(24, 40), (32, 32), (40, 24)]), tokenizer):
        height, width = bucket.shape
        cache = LatentCache(pairs / f"{height}x{width}")
        made, source = cache.read(slice(None)), cache.manifest.source
        assert made.latents.shape[1:] == (height // 2, width // 2, 4)
        assert (source["sampling"]["height"], source["sampling"]["width"]) == (height, width)
        texts = [(photos / f"{bucket.names[index]}.txt").read_text() for index in made.indices.tolist()]
        assert [prompts[label] for label in made.labels.tolist()] == texts
        with torch.no_grad():
            real = tokenizer.encode_grid(bucket.read(made.indices).images)
        sampling = generator.sampling_type(steps=4, height=height, width=width)
        again = generator.generate(
            made.labels,
            sampling,
            image_rngs(bucket_seed(0, list(NAMES).index(cache.path.name)), range(len(real))),
            real,
            0.5,
        )
        torch.testing.assert_close(again, made.latents, rtol=1e-4, atol=1e-4)

    # The pipeline has another decoder, and makes images of these sizes.
    target = post / "export" / "pipeline"
    before = diffusers.AutoencoderKL.from_pretrained(given / "vae").state_dict()
    whole = diffusers.DiffusionPipeline.from_pretrained(target)
    after = whole.vae.state_dict()
    assert {n.split(".")[0] for n in after if not torch.equal(after[n], before[n])} == {"decoder", "post_quant_conv"}
    whole.set_progress_bar_config(disable=True)
    assert whole("a b", num_inference_steps=2, height=24, width=40).images[0].size == (40, 24)

    # The picture shows one image of each bucket, and a second one of the first, as they are.
    with Image.open(post / "export" / "before-after.png") as picture:
        shown = np.array(picture)
    assert shown.shape == (2 * 40, 40 + 32 + 24 + 40, 3)
    assert (shown[24:40, :40] == 255).all()
    assert not (shown[:24, :40] == 255).all()
    header = yaml.safe_load((post / "snapshot" / "best" / "config.yaml").read_text())
    assert header["post_trained"]["pairs"] == 21
    assert 0.2 < header["protocol"]["noise_level"] < 0.5
    assert header["protocol"]["buckets"] == "24x40, 32x32, 40x24"
    assert "step: 0" not in (post / "export" / "README.md").read_text()

    # The app mixes photographs of the first bucket, and samples squares.
    viewer = Viewer(post)
    assert [viewer.show("post", "a wide a", 0, sigma, 1.0, 1).after.shape[:2] for sigma in (0.5, 0.0)] == [
        (24 * 16, 40 * 16), (32 * 20, 32 * 20)
    ]  # fmt: skip

    # The same command again has nothing to do.
    times = {path: path.stat().st_mtime_ns for path in post.rglob("*.safetensors") if path.parent.name != "best"}
    run(post, *words(given, photos, BUCKETS, "sigma=0.5"))
    assert times == {path: path.stat().st_mtime_ns for path in times}


def test_the_card_on_the_hub_has_a_picture_of_a_bucket(post):
    run_folder = post / "post-0.5"
    snapshot = next((run_folder / "snapshot").iterdir())
    with Image.open(BytesIO(_picture(PushRun(path=run_folder, to="org/name"), snapshot))) as picture:
        width, height = picture.size
    assert width / height == pytest.approx(8 * 40 / (2 * 24))


def test_buckets_are_told_before_the_work(tmp_path, given, photos, capsys):
    run(
        tmp_path / "post", *words(given, photos, "data.buckets=[[24,40],[32,32],[40,24],[16,64]]", "sigma=1", "steps=1")
    )
    said = "".join(capsys.readouterr()).replace("\n", "")
    assert "buckets of photos0 train (height x width: images): 24x40: 8, 32x32: 7, 40x24: 6; none in 16x64" in said
    assert "fewer than" not in said


def test_a_single_square_bucket_gives_the_weights_of_before(tmp_path, given, photos):
    more = ["crop.size=16", "crop.margin=4", "sigma=0.5"]
    plain = run(tmp_path / "plain", *words(given, photos, *more))
    bucket = run(tmp_path / "bucket", *words(given, photos, *more, "data.buckets=[[32,32]]"))
    one, other = LatentCache(plain / "pairs/sigma-0.5-21"), LatentCache(bucket / "pairs/sigma-0.5-21/32x32")
    assert torch.equal(one.read(slice(None)).latents, other.read(slice(None)).latents.flatten(1, 2))
    for name in ("export/vae.safetensors", "snapshot/best/model.safetensors", "export/before-after.png"):
        assert (plain / name).read_bytes() == (bucket / name).read_bytes()


def test_a_killed_command_goes_on_and_ends_the_same(tmp_path, post, given, photos, monkeypatch):
    settings, out = words(given, photos, BUCKETS, "sigma=0.5"), tmp_path / "killed"

    def killed(*_arguments, **_options):
        raise KeyboardInterrupt

    def after(module, name, calls):
        """Killed at a later call, amid the buckets."""
        function, left = getattr(module, name), iter(range(calls))
        return lambda *arguments: killed() if next(left, None) is None else function(*arguments)

    for module, name, calls in (("encode", "_encode", 1), ("make_pairs", "_make_pairs", 2)):
        module = sys.modules[f"robustok.commands.{module}"]
        with monkeypatch.context() as patch:
            patch.setattr(module, name, after(module, name, calls))
            assert main(["post-train", f"out={out}", *settings]) == 130
    made = {path: path.stat().st_mtime_ns for path in out.glob("*/**/shard*.safetensors")}
    assert len(made) == 3 + 2
    with tiny.in_each_step(lambda step: killed() if step == 4 else None):  # of six
        assert main(["post-train", f"out={out}", *settings]) == 130
    run(out, *settings)
    assert made == {path: path.stat().st_mtime_ns for path in made}
    for name in ("export/vae.safetensors", "snapshot/best/model.safetensors"):
        assert (out / name).read_bytes() == (post / name).read_bytes()


def test_two_processes_make_the_pairs_of_one(tmp_path, post, monkeypatch):
    """One process after the other, as torchrun would start them at once."""
    sources = [f"generator={post / 'generator'}", f"latents={post / 'latents'}", "sigma=0.5"]
    settings = ["sampling.name=pipeline", "sampling.steps=4", "cache.shard_size=2", "cache.batch_size=2"]
    for rank, world, name in ((0, 1, "one"), (0, 2, "two"), (1, 2, "two")):
        tiny_pipelines.make_pairs_as(monkeypatch, rank, world)
        assert main(["make-pairs", f"out={tmp_path / name}", *sources, *settings, "count=14"]) == 0
    assert {path.name: len(LatentCache(path)) for path in caches_in(tmp_path / "one")} == {
        "24x40": 5, "32x32": 5, "40x24": 4
    }  # fmt: skip
    for path in caches_in(tmp_path / "one"):
        one, two = (LatentCache(tmp_path / name / path.name).read(slice(None)) for name in ("one", "two"))
        for name in ("latents", "labels", "indices", "seeds"):
            assert torch.equal(getattr(one, name), getattr(two, name))


def materials(post, photos, crop=None):
    """What is learned from, of each bucket."""
    tokenizer = load_tokenizer(post / "tokenizer")
    buckets = open_buckets(Folder(path=photos, captions="txt", buckets=[(24, 40), (32, 32), (40, 24)]), tokenizer)
    found = []
    for data in buckets:
        name = "x".join(map(str, data.shape))
        paths = {"pairs": post / "pairs" / "sigma-0.5-21" / name, "latents": post / "latents" / name}
        crops = cropping(crop or LatentCrop(), tokenizer, data.shape)
        caches = open_caches(paths, encoder_digest(tokenizer))
        found.append(Material(tokenizer, data, caches, LatentNoise(), "float32", crops))
    return found


@pytest.mark.parametrize("crop", [None, LatentCrop(size=16, margin=4)], ids=["whole", "crops"])
def test_steps_are_of_one_bucket_in_all_processes(post, photos, crop):
    buckets, names = materials(post, photos, crop), {"paired": 1.0, "noise": 1.0}
    steps = Steps(12, 0, 0, 40, 0, 1)
    whole = list(mixture(buckets, names, 1.0, steps))
    halves = [list(mixture(buckets, names, 1.0, steps._replace(rank=rank, world=2))) for rank in (0, 1)]
    later = next(mixture(buckets, names, 1.0, steps._replace(first=7, count=1)))
    assert torch.equal(later.latents, whole[7].latents)
    ahead = mixture(buckets, names, 1.0, steps._replace(count=3), workers=1)  # read by another process
    assert all(torch.equal(a.targets, b.targets) for a, b in zip(ahead, whole[:3], strict=True))
    seen = {data.data.shape: 0 for data in buckets}
    for one, *parts in zip(whole, *halves, strict=True):
        for name in ("latents", "targets"):
            sides = [getattr(part, name).split(3) for part in parts]  # rows of pairs, and of noise
            joined = torch.cat([sides[0][0], sides[1][0], sides[0][1], sides[1][1]])
            assert torch.equal(joined, getattr(one, name))
        if crop is None:
            seen[tuple(one.targets.shape[-2:])] += 1
            assert tuple(2 * side for side in one.latents.shape[1:3]) == one.targets.shape[-2:]
        else:
            assert one.targets.shape[-2:] == (16, 16)
            assert one.latents.shape[1:3] == (12, 12)
    assert crop or min(seen.values()) > 6


def test_a_bucket_smaller_than_the_batch_repeats_its_photographs():
    steps = Steps(16, 0, 0, 1, 0, 1, repeats=True)
    for step in range(3):
        counts = np.bincount(steps.records(6, step), minlength=6)
        assert set(counts) == {2, 3}  # 16 of 6
    parts = [steps._replace(rank=rank, world=2).records(6, 1) for rank in (0, 1)]
    assert np.array_equal(np.concatenate(parts), steps.records(6, 1))


def test_given_pairs_are_learned_from_bucket_by_bucket(tmp_path, post, photos, capsys):
    again = [
        "make-pairs",
        f"out={tmp_path / 'pairs'}",
        f"generator={post / 'generator'}",
        f"latents={post / 'latents'}",
    ]
    again += [
        f"latents={post / 'latents'}",
        "sigma=0.5",
        "mode=reencoded",
        f"tokenizer={post / 'tokenizer'}",
        "sampling.name=pipeline",
    ]
    assert main([*again, "sampling.steps=4"]) == 0
    for path in caches_in(tmp_path / "pairs"):  # decoded, rounded and encoded again
        direct = LatentCache(post / "pairs" / "sigma-0.5-21" / path.name).read(slice(None)).latents
        reencoded = LatentCache(path).read(slice(None)).latents
        assert reencoded.shape == direct.shape
        assert not torch.equal(reencoded, direct)
    settings = [word for word in WORDS if not word.startswith(("cache.", "mixture."))]
    settings += [f"tokenizer={post / 'tokenizer'}", f"pairs={tmp_path / 'pairs'}", "data.name=folder", BUCKETS]
    settings += [f"data.path={photos}", "data.captions=txt"]
    run(tmp_path / "run", *settings)
    assert tiny.log(tmp_path / "run")[-1]["step"] == 6
    (tmp_path / "pairs" / "40x24" / "manifest.json").unlink()
    capsys.readouterr()
    assert "no latents cache at" in refused(capsys, "post-train", f"out={tmp_path / 'other'}", *settings)


def test_sigma_auto_measures_over_all_buckets(tmp_path, given, photos, classifier, capsys):
    more = ["sigma=auto", "sweep.sigmas=[0.5,1.0]", "sweep.samples=6", "sweep.sets=2", "sweep.steps=2"]
    more += [f"held_out.extractor.path={classifier}", "held_out.extractor.name=classifier"]
    post = run(tmp_path / "post", *words(given, photos, BUCKETS, *more))
    header = yaml.safe_load((post / "snapshot" / "best" / "config.yaml").read_text())
    assert [row["sigma"] for row in header["sweep"]][:3] == [None, 0.5, 1.0]
    caches = [LatentCache(path) for path in caches_in(post / "held-out")]
    assert [len(cache) for cache in caches] == [4, 4, 4]  # two of each bucket in each of two sets
    names = robustok.load_generator(post / "generator").prompts
    for cache, kind in zip(caches, ("wide", "square", "tall"), strict=True):  # the prompts of the photographs there
        assert {names[label].split()[1] for label in cache.labels} == {kind}

    # The distance is that of all images together, and so is the PSNR of reconstructions.
    tokenizer, config = load_tokenizer(post / "tokenizer"), ExtractorConfig(path=classifier)
    extract = load_extractor(config)
    data = Folder(path=photos, captions="txt", buckets=[(24, 40), (32, 32), (40, 24)])
    buckets, device = open_buckets(data, tokenizer), torch.device("cpu")
    score = HeldOutScore(HeldOut(latents=post / "held-out", extractor=config), tokenizer, buckets, device, 2)
    assert score.samples == 6
    real = torch.cat([extract(bucket.read(range(len(bucket))).pixels) for bucket in buckets])
    assert len(real) == 21
    with torch.no_grad():
        for i, found in enumerate(score(tokenizer.decode)):
            latents = [cache.read(slice(2 * i, 2 * i + 2)).latents for cache in caches]
            fake = torch.cat([extract(robustok.to_pixels(tokenizer.decode(part))) for part in latents])
            expected = frechet_distance(GaussianStatistics.of(fake), GaussianStatistics.of(real))
            assert found == pytest.approx(expected, rel=1e-5)
        held_out = open_buckets(data, tokenizer, "test")
        errors = []
        for bucket in held_out:
            pixels = bucket.read([0]).pixels
            again = robustok.to_pixels(tokenizer.decode(tokenizer.encode_grid(robustok.from_pixels(pixels))))
            errors.append((pixels.double() - again.double()).square().mean().item())
        found = ReconstructionScore(None, tokenizer, held_out)(tokenizer.decode)
        assert found["psnr"] == pytest.approx(np.mean([10 * np.log10(255**2 / error) for error in errors]), rel=1e-4)


def test_objectives_and_losses_take_buckets(tmp_path, given, photos, classifier):
    more = [*tiny.ADVERSARY, "adversary_warmup=2", "objective={free: 1, paired: 1, noise: 1}", "sigma=0.5"]
    more += ["frechet.weight=0.1", f"frechet.extractors=[{{name: classifier, path: {classifier}}}]", "steps=4"]
    post = run(tmp_path / "post", *words(given, photos, BUCKETS, *more, "gradient_accumulation=2"))
    assert {path.name for path in caches_in(post / "samples")} == NAMES.keys()
    lines = tiny.log(post / "post-0.5")
    assert {"free_pixel", "paired_pixel", "noise_pixel"} <= lines[-1].keys()
    assert any(name.startswith("frechet") for name in lines[-1])


def test_a_tuned_noise_level_of_each_bucket_is_stored(tmp_path, photos, monkeypatch):
    flux = tiny_pipelines.saved("Flux", tmp_path / "flux")

    def embed(generator, _labels):
        generator.conditions = tiny_pipelines.conditions("Flux", "")

    monkeypatch.setattr(PipelineGenerator, "embed", embed)  # there is no text encoder
    more = ["data.captions=null", "tokenizer.config.image_size=32", "data.buckets=[[24,40],[32,32],[40,24],[16,16]]"]
    more = [*more, "data.buckets=[[16,24],[32,32],[40,24]]", "sigma=0.5", "steps=2"]
    post = run(tmp_path / "post", *words(flux, photos, *more))
    levels = {
        p.name: LatentCache(p).manifest.source["noise_level"] for p in caches_in(next((post / "pairs").iterdir()))
    }
    assert levels["16x24"] < levels["40x24"] < levels["32x32"]  # the shift grows with the number of latents
    header = yaml.safe_load((post / "snapshot" / "best" / "config.yaml").read_text())
    said = f"{levels['16x24']:.6g} to {levels['32x32']:.6g} by bucket"
    assert header["protocol"]["noise_level"] == said


def test_a_dry_run_counts_the_largest_bucket(tmp_path, given, photos, capsys):
    def facts(*more):
        settings = words(given, photos, *more, "sigma=0.5")
        assert main(["post-train", f"out={tmp_path / 'dry'}", *settings, "--dry-run", "--json"]) == 0
        return json.loads(capsys.readouterr().out)["facts"]

    square, buckets = facts(), facts(BUCKETS)
    assert buckets["buckets"] == "24x40 8, 32x32 7, 40x24 6"
    assert buckets["activations_bytes"] == square["activations_bytes"]
    assert buckets["pairs"] == 21
    latents = sum(count * (4 * h * w + 21) for count, h, w in ((8, 24, 40), (7, 32, 32), (6, 40, 24)))
    assert buckets["pairs_bytes"] == pytest.approx(latents, rel=0.01)
    larger = facts("data.buckets=[[24,40],[32,32],[48,32]]")
    assert larger["activations_bytes"] == pytest.approx(1.5 * square["activations_bytes"], rel=0.1)
    crops = facts(BUCKETS, "crop.size=8", "crop.margin=2")
    assert (crops["crop_pixels"], crops["decoded_pixels"]) == (8, 12)
    assert not (tmp_path / "dry").exists()


def refused(capsys, *settings):
    assert main([*settings]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("robustok: ")
    assert "\n" not in said, said
    return said


def test_bad_input_is_one_line(tmp_path, given, photos, post, tokenizer, generator, classifier, capsys):
    out = tmp_path / "out"
    command = ["post-train", f"out={out}", *words(given, photos, "sigma=0.5")]
    for more, said in (
        ("data.buckets=[[24,40],[24,42]]", "data.buckets has 24x42, expected multiples of 8 pixels"),
        ("data.buckets=[]", "expected true, false, or sizes in pixels [[height, width], ...]"),
        ("data.buckets=[24,40]", "expected true, false, or sizes in pixels [[height, width], ...]"),
        ("data.buckets=[[0,40]]", "expected true, false, or sizes in pixels [[height, width], ...]"),
        ("data.buckets=[[48,80]]", "21 of 21 images are smaller than"),
        ("crop.size=28", "crop.size=28 is larger than the images of 24x40 pixels"),
    ):
        assert said in refused(capsys, *command, BUCKETS, more)
        assert not out.exists()
    size = ["sampling.name=pipeline", "sampling.height=24", "sampling.width=40"]
    sized = [*command, *(f"mixture.{word}" for word in size)]
    assert "drop sampling.height and sampling.width" in refused(capsys, *sized, BUCKETS)
    own = [f"generator={post / 'generator'}", f"latents={post / 'latents'}"]
    assert "drop sampling.height and sampling.width" in refused(capsys, "make-pairs", f"out={out}", *own, *size)
    assert not out.exists()
    # Other recipes and commands.
    words_of = [f"out={out}", f"tokenizer={tokenizer}", f"data.path={photos}", "data.name=folder", BUCKETS]
    assert "a tokenizer of family robustok takes one" in refused(capsys, "encode", *words_of)
    other = [*words_of, f"generator={generator}", "sigma=0.5", *WORDS[: len(SHORT)]]
    assert "a tokenizer of family robustok takes one" in refused(capsys, "post-train", *other)
    latents = post / "latents" / "24x40"
    assert "which generator sit does not take" in refused(
        capsys, "train-generator", f"out={out}", f"latents={latents}", "generator.name=sit"
    )
    samples = tmp_path / "samples"
    size = ["sampling.name=pipeline", "sampling.steps=2", "sampling.height=24", "sampling.width=40"]
    assert main(["generate", f"out={samples}", f"generator={post / 'generator'}", "count=3", *size,
                 f"tokenizer={post / 'tokenizer'}", "images=npz"]) == 0  # fmt: skip
    assert np.load(samples / "samples.npz")["arr_0"].shape == (3, 24, 40, 3)
    capsys.readouterr()
    assert "which evaluate does not take" in refused(
        capsys, "evaluate", f"out={out}", f"samples.latents=[{samples}]",
        f"samples.decoders={{a: {post / 'tokenizer'}}}", f"data.path={photos}", "data.name=folder",
        f"extractor.path={classifier}",
    )  # fmt: skip
    assert "data.buckets is for post-training" in refused(
        capsys, "train-classifier", f"out={out}", f"data.path={photos}", "data.name=folder", BUCKETS
    )
    assert "no latents cache at" in refused(
        capsys, "make-pairs", f"out={out}", f"generator={post / 'generator'}", f"latents={Path(photos)}"
    )
    assert not out.exists()
