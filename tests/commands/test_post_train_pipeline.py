"""Post-training of a diffusers pipeline through the command line: folder in, folder for ``from_pretrained`` out."""

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import robustok
import tiny
from robustok.cli import main
from robustok.commands.app import Viewer
from robustok.data.captions import caption_digest
from robustok.data.latent_cache import LatentCache
from robustok.errors import UserError
from robustok.generators.pipeline import PipelineGenerator
from robustok.randomness import image_rngs

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import tiny_pipelines  # noqa: E402, needs diffusers

SECRET = "secret"  # in every caption
SHORT = [word for word in tiny.TRAINING if not word.startswith("steps")]
WORDS = [*SHORT, "steps=2", "sigma=0.5", "adversarial.weight=0", "reconstruction.perceptual=none", "cache.batch_size=8"]
WORDS += ["mixture.sampling.name=pipeline", "mixture.sampling.steps=4", "learning_rate=1e-2"]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return tiny_pipelines.saved_with_text(tmp_path_factory.mktemp("given") / "tiny-diffusion")


def photos(folder: Path, count: int = 20, size: int = 40, captions: bool = True) -> Path:
    """Images of smooth colours, with three captions in turn."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        pixels = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((size, size + 8))
        pixels.save(folder / f"{i:02}.png")
        if captions:
            (folder / f"{i:02}.txt").write_text(f"{SECRET} {'abc'[i % 3]}\n")
    return folder


def run(out: Path, *words: str) -> Path:
    assert main(["post-train", f"out={out}", *WORDS, *words]) == 0
    return out


def refused(capsys, *words: str) -> str:
    assert main(["post-train", *WORDS, *words]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("robustok: ")
    assert "\n" not in said, said
    return said


def test_one_command_turns_a_pipeline_into_one_with_another_decoder(tmp_path, given, capsys):
    words = [f"pipeline={given}", f"data.path={photos(tmp_path / 'photos')}", "data.name=folder", "data.captions=txt"]
    post = run(tmp_path / "post", *words)
    pairs = LatentCache(next((post / "pairs").iterdir()))
    assert (len(pairs), pairs.manifest.classes) == (18, 3)  # two of twenty images are held out
    source = pairs.manifest.source
    assert (source["strength"], source["sampler_steps"], source["scheduler"]) == (0.5, 2, "DDIMScheduler")
    assert 0.2 < source["noise_level"] < 0.5
    header = yaml.safe_load((post / "snapshot" / "best" / "config.yaml").read_text())
    assert header["protocol"]["noise_level"] == source["noise_level"]

    # Pairs are what the Python interface makes, with the prompts of their images.
    tokenizer, generator = robustok.load_pipeline(given, [f"{SECRET} {letter}" for letter in "abc"])
    assert tokenizer.image_size == 32
    real, made = LatentCache(post / "latents"), pairs.read(range(2))
    rows = [real.indices.tolist().index(index) for index in made.indices.tolist()]
    kept = [index for index in range(20) if f"{index:02}" in train_names(words)]
    labels = torch.tensor([kept[index] % 3 for index in made.indices.tolist()])
    sampling = generator.sampling_type(steps=4)
    again = generator.generate(labels, sampling, image_rngs(0, [0, 1]), real.read(rows).latents, 0.5)
    torch.testing.assert_close(again, made.latents, rtol=1e-4, atol=1e-4)

    # Only the decoder differs, and the library itself reads and uses all of it.
    target = post / "export" / "pipeline"
    for file in (path for path in given.rglob("*") if path.is_file() and path.parent.name not in ("vae", given.name)):
        assert (target / file.relative_to(given)).read_bytes() == file.read_bytes()
    before = diffusers.AutoencoderKL.from_pretrained(given / "vae").state_dict()
    whole = diffusers.DiffusionPipeline.from_pretrained(target)
    after = whole.vae.state_dict()
    changed = {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"decoder", "post_quant_conv"}
    whole.set_progress_bar_config(disable=True)
    assert whole("a b", num_inference_steps=2, height=32, width=32).images[0].size == (32, 32)
    mixing = diffusers.AutoPipelineForImage2Image.from_pipe(whole)
    mixing.set_progress_bar_config(disable=True)
    image = Image.open(tmp_path / "photos" / "00.png").resize((32, 32))
    assert mixing("a b", image=image, strength=0.5, num_inference_steps=4).images[0].size == (32, 32)
    single = diffusers.AutoencoderKL.from_single_file(post / "export" / "vae.safetensors", config=str(given / "vae"))
    assert all(torch.equal(weight, after[name]) for name, weight in single.state_dict().items())
    file = load_file(post / "export" / "vae.safetensors")
    assert file["decoder.mid.attn_1.q.weight"].ndim == 4
    for kind, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        half = load_file(post / "export" / f"vae.{kind}.safetensors")
        assert half.keys() == file.keys()
        assert all(torch.equal(half[name], weight.to(dtype)) for name, weight in file.items())

    # The card shows four generated images, before and after.
    with Image.open(post / "export" / "before-after.png") as picture:
        shown = np.array(picture)
    assert shown.shape == (2 * 32, 4 * 32, 3)
    assert not np.array_equal(shown[:32], shown[32:])
    assert "](before-after.png)" in (post / "export" / "README.md").read_text()

    # The card names pipeline and licence. No prompt is in what is printed, logged or shared.
    card = (post / "export" / "README.md").read_text()
    assert "tiny-diffusion" in card
    assert "creativeml-openrail-m (generator)" in card
    assert "mit (tokenizer)" in card  # the autoencoder has its own
    printed = "".join(capsys.readouterr())
    texts = [path for path in post.rglob("*") if path.suffix in (".md", ".jsonl", ".json", ".yaml")]
    assert len(texts) > 8
    assert not [path for path in texts if SECRET in path.read_text()]
    assert SECRET not in printed
    assert len(list((post / "generator" / "prompts").glob("*.safetensors"))) == 4  # three, and the empty one

    # The app samples the prompts of the run and any other, and mixes with the photographs of the former.
    viewer = Viewer(post)
    views = {
        (prompt, sigma): viewer.show("post", prompt, 0, sigma, 1.0)
        for prompt, sigma in ((f"{SECRET} a", 0.0), (f"{SECRET} a", 0.5), ("another", 0.0))
    }
    assert len({view.before.tobytes() for view in views.values()}) == 3
    assert all(view.difference.max() == 255 for view in views.values())
    with pytest.raises(UserError, match="no latents of real images of 'another'"):
        viewer.show("post", "another", 0, 0.5, 1.0)

    # What a run needs can be asked for before.
    assert main(["post-train", f"out={tmp_path / 'dry'}", *WORDS, *words, "--dry-run", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["facts"]
    assert 0 < facts["trained_parameters"] < facts["tokenizer_parameters"]
    assert facts["converted_bytes"] == sum(file.stat().st_size for file in (given / "vae").iterdir())
    assert not (tmp_path / "dry").exists()

    # The same command again is done already; other sigmas and free samples need no text encoder.
    times = {path: path.stat().st_mtime_ns for path in post.rglob("*.safetensors") if path.parent.name != "best"}
    run(post, *words)
    assert times == {path: path.stat().st_mtime_ns for path in times}
    samples = tmp_path / "samples"
    words = [f"generator={post / 'generator'}", "count=4", "sampling.name=pipeline", "sampling.steps=2"]
    assert main(["generate", f"out={samples}", *words]) == 0
    assert LatentCache(samples).read(range(4)).labels.tolist() == [0, 1, 2, 0]


def train_names(words):
    from robustok.data.dataset import open_images
    from robustok.data.sources import Folder

    path = Path(words[1].partition("=")[2])
    return open_images(Folder(path=path, captions="txt"), 32, "train").names


@pytest.mark.parametrize("name", ["Stable Diffusion XL", "Flux", "Qwen-Image"])  # whose latents differ most
def test_other_families_come_back_with_another_decoder_too(tmp_path, monkeypatch, name):
    given = tiny_pipelines.saved(name, tmp_path / "given")
    folder = photos(tmp_path / "photos", captions=False)

    def embed(generator, _labels):
        generator.conditions = tiny_pipelines.conditions(name, "")

    monkeypatch.setattr(PipelineGenerator, "embed", embed)  # there is no text encoder
    words = [f"pipeline={given}", "data.name=folder", f"data.path={folder}", "tokenizer.config.image_size=32"]
    post = run(tmp_path / "post", *words)
    loaded = [getattr(diffusers, type(robustok.load_tokenizer(post).vae).__name__).from_pretrained(path / "vae")
              for path in (given, post / "export" / "pipeline")]  # fmt: skip
    before, after = (vae.state_dict() for vae in loaded)
    changed = {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}
    assert "decoder" in changed
    assert changed <= {"decoder", "post_quant_conv"}
    assert (post / "export" / "vae.safetensors").exists() is (name != "Qwen-Image")


def test_a_pipeline_without_image_to_image_learns_from_free_samples(tmp_path, monkeypatch, capsys):
    given = tiny_pipelines.saved("Sana", tmp_path / "given")
    folder = photos(tmp_path / "photos", captions=False)
    monkeypatch.setattr(
        PipelineGenerator, "embed", lambda made, _: made.conditions.update(tiny_pipelines.conditions("Sana", ""))
    )
    words = [f"pipeline={given}", "data.name=folder", f"data.path={folder}", "tokenizer.config.image_size=32"]
    assert "learn from its free samples" in refused(capsys, f"out={tmp_path / 'post'}", *words)
    free = [*tiny.ADVERSARY, "adversary_warmup=1", "adversarial.adaptive=false", "objective=free", "sigma=null"]
    post = run(tmp_path / "post", *words, *free, "adversarial.weight=0.1")
    before, after = (
        diffusers.AutoencoderDC.from_pretrained(path / "vae").state_dict() for path in (given, post / "export/pipeline")
    )
    assert {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])} == {"decoder"}
    assert (post / "export" / "before-after.png").is_file()


def test_a_killed_command_goes_on_and_ends_the_same(tmp_path, given, monkeypatch):
    folder = photos(tmp_path / "photos")
    words = [f"pipeline={given}", f"data.path={folder}", "data.name=folder", "data.captions=txt", "steps=3"]
    whole, out = run(tmp_path / "whole", *words), tmp_path / "killed"

    def killed(*_arguments, **_options):
        raise KeyboardInterrupt

    command = sys.modules["robustok.commands.post_train"]
    for name in ("make_pairs", "train_decoder", "export_pipeline"):  # before each of its stages
        with monkeypatch.context() as patch:
            patch.setattr(command, name, killed)
            assert main(["post-train", f"out={out}", *WORDS, *words]) == 130
    made = {path: path.stat().st_mtime_ns for path in (out / "pairs").rglob("*.safetensors")}
    run(out, *words)
    assert made
    assert made == {path: path.stat().st_mtime_ns for path in made}
    for name in ("export/vae.safetensors", "snapshot/best/model.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_two_processes_make_the_pairs_of_one(tmp_path, given, monkeypatch):
    """One process after the other, as torchrun would start them at once."""
    folder = photos(tmp_path / "photos")
    words = [f"pipeline={given}", f"data.path={folder}", "data.name=folder", "data.captions=txt"]
    post = run(tmp_path / "post", *words)
    sources = [f"generator={post / 'generator'}", f"latents={post / 'latents'}", "sigma=0.5"]
    settings = ["sampling.name=pipeline", "sampling.steps=4", "cache.shard_size=5", "cache.batch_size=5"]
    for rank, world, name in ((0, 1, "one"), (0, 2, "two"), (1, 2, "two")):
        tiny_pipelines.make_pairs_as(monkeypatch, rank, world)
        assert main(["make-pairs", f"out={tmp_path / name}", *sources, *settings]) == 0
        shards = list((tmp_path / name).glob("*.safetensors"))
        assert len(shards) == {(0, 2): 2}.get((rank, world), 4)
    one, two = (LatentCache(tmp_path / name).read(slice(None)) for name in ("one", "two"))
    assert len(one.latents) == 18
    assert all(
        torch.equal(getattr(one, name), getattr(two, name)) for name in ("latents", "labels", "indices", "seeds")
    )


@pytest.mark.parametrize("captions", ["none", "prompt", "label", "text"])
def test_prompts_come_from_settings_classes_or_a_table(tmp_path, given, captions):
    folder, words = tmp_path / "photos", [f"pipeline={given}", "data.name=folder", "data.holdout=0"]
    if captions == "label":
        for name in ("cat", "dog"):
            photos(folder / name, count=8, captions=False)
        words.append('generator.config.prompt="a {label}"')
        expected = ["a cat", "a dog"]
    else:
        photos(folder, count=16, captions=False)
        expected = [""] if captions == "none" else ["a photo"]
    if captions == "prompt":
        words.append("generator.config.prompt=a photo")
    if captions == "text":
        texts = ["a photo", "", "a bee"]  # an empty one is the empty prompt
        lines = [json.dumps({"file_name": f"{i:02}.png", "text": texts[i % 3]}) for i in range(16)]
        expected = sorted(texts, key=caption_digest)
        assert expected[-1]  # the empty one is not the last, as among the generator's prompts
        (folder / "metadata.jsonl").write_text("\n".join(lines))
        words.append("data.captions=text")
    post = run(tmp_path / "post", f"data.path={folder}", *words)
    generator = robustok.load_generator(post / "generator")
    assert generator.prompts == [*expected, ""]
    assert (generator._guidance(generator.sampling) == {}) is (captions != "none")


def test_sigma_auto_searches_on_a_pipeline_as_on_all_others(tmp_path, given, classifier):
    words = [f"pipeline={given}", "data.name=folder", f"data.path={photos(tmp_path / 'photos', captions=False)}"]
    words += ["sigma=auto", "sweep.sigmas=[0.5,1.0]", "sweep.samples=4", "sweep.sets=2", "sweep.steps=1"]
    post = run(tmp_path / "post", *words, f"held_out.extractor.path={classifier}", "data.holdout=0.1")
    header = yaml.safe_load((post / "snapshot" / "best" / "config.yaml").read_text())
    assert [row["sigma"] for row in header["sweep"]][:3] == [None, 0.5, 1.0]
    assert (post / "export" / "pipeline" / "vae" / "config.json").is_file()


def test_the_example_of_the_docs_runs(given, capsys):
    page = (Path(__file__).parents[2] / "docs" / "diffusers.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(example.replace("stable-diffusion-v1-5", str(given)), {})
    assert "sigma 0.7: level 0.44, strength 0.30, 15 steps" in capsys.readouterr().out
    row = next(line for line in page.splitlines() if line.startswith("| Stable Diffusion, DDIM, 50"))
    assert [cell.strip() for cell in row.split("|")][5] == "0.44"


def test_bad_input_is_one_line(tmp_path, given, capsys, monkeypatch):
    folder = photos(tmp_path / "photos")
    words = [f"out={tmp_path / 'out'}", "data.name=folder", f"data.path={folder}"]
    for name in ("03", "07"):
        os.remove(folder / f"{name}.txt")
    assert "2 of 20 images have no caption (03.png, 07.png)" in refused(
        capsys, *words, f"pipeline={given}", "data.captions=txt"
    )
    assert "no metadata.jsonl or metadata.csv" in refused(capsys, *words, f"pipeline={given}", "data.captions=text")
    for file in folder.glob("*.txt"):
        file.unlink()
    assert "18 of 18 images are smaller than the pipeline's 64 pixels" in refused(
        capsys, *words, f"pipeline={given}", "tokenizer.config.image_size=64"
    )
    assert "is no folder" in refused(capsys, *words, f"pipeline={tmp_path / 'nothing'}")
    assert "has no model_index.json" in refused(capsys, *words, f"pipeline={given / 'vae'}")
    assert "generator.config.promt is not known" in refused(
        capsys, *words, f"pipeline={given}", "generator.config.promt=a photo"
    )
    assert "crop.margin=3 is not a multiple of the 2 pixels" in refused(
        capsys, *words, f"pipeline={given}", "crop.size=8", "crop.margin=3"
    )
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    assert "optimizer=adamw8bit needs" in refused(capsys, *words, f"pipeline={given}", "optimizer=adamw8bit")
    assert "pipeline is missing" in refused(capsys, *words, "tokenizer.family=diffusers", "generator.family=pipeline")
    other = tiny_pipelines.set_class(tiny_pipelines.saved_with_text(tmp_path / "flux2"), "Flux2Pipeline")
    assert "conditions on reference images" in refused(capsys, *words, f"pipeline={other}")
    lacking = tiny_pipelines.saved_with_text(tmp_path / "lacking")
    (lacking / "text_encoder").rename(tmp_path / "moved")
    assert "lacks the folder text_encoder" in refused(capsys, *words, f"pipeline={lacking}")
    assert not (tmp_path / "out").exists()
