"""One command from released files to a released file whose decoder alone is another."""

import json
import re
import shutil
import sys
from urllib.error import URLError

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from robustok.cli import main
from robustok.commands import pretrained_sources
from robustok.commands.convert import ConvertRun, convert
from robustok.commands.pretrained_sources import PretrainedTokenizer, export_decoder
from robustok.config import plain
from robustok.data.latent_cache import LatentCache
from robustok.losses.discriminators import DinoConfig, DinoHeads
from robustok.losses.discriminators.dino import DinoBackbone
from robustok.pretrained.export import export_weights
from robustok.pretrained.families import FAMILIES
from robustok.pretrained.load import load_pretrained
from robustok.snapshots import write_snapshot
from robustok.tokenizers import encoder_digest, frozen_weights, load_tokenizer
from tiny_models import CLASSES, RELEASES, released, shaken, tiny_tokenizer

QUICK = ["steps=2", "batch_size=8", "mixture.count=16", "precision=float32", "learning_rate=1e-2", "ema_decay=0.5"]
QUICK += ["log_every=1", "state_every=1", "snapshot_every=0", "reconstruction.perceptual=none", "adversary_warmup=1"]
QUICK += ["adversarial.weight=0.1", "mixture.sampling=null"]
PATCH = ["discriminator.name=patch", "discriminator.width=8", "discriminator.depth=1"]
PAIRS = {  # recipe: families of its tokenizer and its generator
    "llamagen": ("llamagen_tokenizer", "llamagen_gpt"),
    "maskgit": ("maskgit_vqgan", "rar"),
    "gigatok": ("gigatok_tokenizer", "gigatok_gpt"),
    "maetok": ("maetok_tokenizer", "sit"),
    "vavae": ("vavae", "lightningdit"),
    "robustok": ("robustok", "rar"),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of images in as many classes as the tiny generators have."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for label in range(CLASSES):
        (folder / f"class{label}").mkdir()
        for i in range(6):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"class{label}" / f"{i}.png")
    return folder


def command(pair, folder, images):
    """The words for tiny files in the layouts of a pair, which are written to the folder."""
    words = ["post-train", f"pairs/{pair}.yaml", f"data.path={images}", *QUICK, *PATCH]
    for name, family in zip(("tokenizer", "generator"), PAIRS[pair], strict=True):
        weights, config = released(family)[0], dict(RELEASES[family][1])
        if family in ("sit", "lightningdit"):  # whose statistics come from where they are released
            config = {key: value for key, value in config.items() if key == "num_heads"}
        torch.save({"ema": weights}, folder / f"{name}.pt")
        words += [f"{name}.weights={folder}/{name}.pt", f"{name}.config={json.dumps(config)}"]
    if pair == "vavae":
        torch.save({"mean": torch.full((4,), 0.1), "std": torch.full((4,), 0.5)}, folder / "stats.pt")
        words.append(f"generator.statistics={folder}/stats.pt")
    return words


def changed(before, after):
    """Names of the tensors that differ; names, shapes and types must not."""
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype for name in before)
    return {name for name in before if not torch.equal(before[name], after[name])}


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def run(capsys, words):
    capsys.readouterr()
    code = main(words)
    out, err = capsys.readouterr()
    assert code == 0, err
    return out, err


def best(out):
    return yaml.safe_load((out / "snapshot" / "best" / "config.yaml").read_text())


# There and back


@pytest.mark.parametrize("pair", PAIRS)
def test_only_the_decoder_changes_in_the_exported_file(capsys, tmp_path, images, pair):
    words, out = command(pair, tmp_path, images), tmp_path / "post"
    printed, said = run(capsys, [*words, f"out={out}"])
    assert printed == f"{out}/snapshot/best\n"
    assert f"{out}/export/tokenizer.safetensors" in said

    family, file = PAIRS[pair][0], out / "export" / "tokenizer.safetensors"
    before, after = released(family)[0], load_file(file)
    model = load_pretrained(family, file, RELEASES[family][1])
    frozen = {FAMILIES[family].export_name(name) for name in frozen_weights(model)}
    different = changed(before, after)
    assert not different & frozen
    learning = {FAMILIES[family].export_name(name) for name, _ in model.named_parameters()} - frozen
    assert len(different) > 0.8 * len(learning)
    trained = load_tokenizer(out)
    assert not changed(trained.state_dict(), model.state_dict())  # what robustok loads is what the project loads
    (pairs,) = (LatentCache(path) for path in (out / "pairs").iterdir())
    assert pairs.manifest.tokenizer == encoder_digest(model)

    card = (out / "export" / "README.md").read_text()
    licence, other = (FAMILIES[name].model.licence for name in PAIRS[pair])
    assert f"| sigma | {pairs.manifest.source['sigma']} |" in card
    assert "| adversary | reinit_warmup, 1 steps |" in card
    if licence == other:
        assert f"Of the original weights: {licence}." in card
    else:
        assert f"Of all the weights that it was made from: {licence} (tokenizer); {other} (generator)." in card
    assert "path/to/this/folder" not in card


def code_of(card):
    """The lines of Python on a card."""
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]


# How the loader of each project finds the weights in the file (shared/docs/ADAPTERS.md), for a file under these keys.
LOADERS = {
    "robustok": (("ema", "model"), lambda file: file["model"] if "model" in file else file["ema"]),
    "llamagen_tokenizer": (("model",), lambda file: file["model"]),
    "llamagen_tokenizer, reconstructions": (
        ("model",),
        lambda file: file["ema"] if "ema" in file else file["model"] if "model" in file else file["state_dict"],
    ),
    "gigatok_tokenizer": (
        ("ema", "model", "discriminator"),
        lambda file: file["ema"] if "ema" in file else file["model"] if "model" in file else file["state_dict"],
    ),
    "maskgit_vqgan": ((), lambda file: file),
    "vavae": (("state_dict",), lambda file: file.get("state_dict", file)),
}


@pytest.mark.parametrize("loader", LOADERS)
def test_the_lines_on_the_card_make_a_file_that_the_project_s_loader_reads(tmp_path, monkeypatch, loader):
    family, (keys, load) = loader.partition(",")[0], LOADERS[loader]
    weights, config = released(family)[0], RELEASES[family][1]
    file = tmp_path / 'their "best".pt'
    torch.save(dict.fromkeys(keys, weights) if keys else weights, file)
    source = PretrainedTokenizer(family=family, weights=file, config=config, discriminator=False)
    settings = {key: value for key, value in source if key != "published"}
    snapshot = convert(ConvertRun(out=tmp_path / "snapshot", **settings))
    exported = export_decoder(snapshot, source, tmp_path / "export")
    monkeypatch.chdir(tmp_path / "export")
    exec(code_of((tmp_path / "export" / "README.md").read_text()))
    found = load(torch.load(file.name, weights_only=True))
    assert not changed(found, weights)
    assert not changed(load_pretrained(family, exported, config).state_dict(), load_tokenizer(snapshot).state_dict())


def test_a_snapshot_of_a_file_with_more_is_told_how_to_export(capsys, tmp_path):
    weights = released("robustok")[0] | {"semantic_model.norm.weight": torch.ones(3)}
    torch.save({"model": weights}, tmp_path / "main-train.pt")
    words = ["convert", "family=robustok", f"weights={tmp_path}/main-train.pt", f"out={tmp_path}/ours"]
    run(capsys, [*words, "config.num_heads=2"])
    assert export_decoder(tmp_path / "ours", tmp_path / "ours", tmp_path / "export") is None
    assert "convert to=export family=robustok" in (said := capsys.readouterr().err)
    assert "original=main-train.pt" in said
    words = ["convert", "to=export", "family=robustok", f"weights={tmp_path}/ours"]
    _, said = run(capsys, [*words, f"out={tmp_path}/a.safetensors"])
    assert "has no semantic_model.*" in said
    assert "original=FILE of the original weights adds them" in said
    _, said = run(capsys, [*words, f"out={tmp_path}/b.safetensors", f"original={tmp_path}/main-train.pt"])
    assert said == ""
    assert not changed(load_file(tmp_path / "b.safetensors"), weights)


def test_the_same_command_again_does_nothing_again(capsys, tmp_path, images, monkeypatch):
    words, out = command("llamagen", tmp_path, images), tmp_path / "post"
    arguments = [*words, f"out={out}"]
    run(capsys, arguments)
    before = files(out)
    monkeypatch.setattr(pretrained_sources, "convert", None)
    run(capsys, arguments)
    assert files(out) == before


@pytest.mark.parametrize("stage", ["encode", "make_pairs", "train_decoder", "export_decoder"])
def test_an_interrupted_command_goes_on(capsys, tmp_path, images, monkeypatch, stage):
    words, whole, out = command("llamagen", tmp_path, images), tmp_path / "whole", tmp_path / "post"
    run(capsys, [*words, f"out={whole}"])

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["robustok.commands.post_train"], stage, interrupt)
        assert main([*words, f"out={out}"]) == 130
    assert (out / "generator" / "model.safetensors").exists()
    assert not (out / "export").exists()
    run(capsys, [*words, f"out={out}"])
    found = [load_file(folder / "export" / "tokenizer.safetensors") for folder in (whole, out)]
    assert not changed(*found)


def test_only_as_many_images_are_encoded_as_pairs_need(capsys, tmp_path, images):
    run(capsys, [*command("llamagen", tmp_path, images), f"out={tmp_path}/post", "data.holdout=0"])
    latents = LatentCache(tmp_path / "post" / "latents")
    (pairs,) = (LatentCache(path) for path in (tmp_path / "post" / "pairs").iterdir())
    assert len(latents) == len(pairs) == 16  # of 30 images
    assert set(latents.indices) == set(pairs.indices)
    assert max(latents.indices) > 16


def test_files_that_the_recipe_names_come_from_the_hub(capsys, tmp_path, images, monkeypatch):
    fetched = []

    def fetch(repository, file, **_):
        fetched.append(f"{repository}/{file}")
        return str(tmp_path / {"vq_ds16_c2i.pt": "tokenizer.pt", "c2i_L_256.pt": "generator.pt"}[file])

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    words = [word for word in command("llamagen", tmp_path, images) if ".weights=" not in word]
    run(capsys, [*words, f"out={tmp_path}/post"])
    assert set(fetched) == {"FoundationVision/LlamaGen/vq_ds16_c2i.pt", "FoundationVision/LlamaGen/c2i_L_256.pt"}
    assert changed(released("llamagen_tokenizer")[0], load_file(tmp_path / "post/export/vq_ds16_c2i.safetensors"))


def test_a_carried_discriminator_goes_on_and_the_card_says_so(capsys, tmp_path, images):
    words, out = command("robustok", tmp_path, images), tmp_path / "post"
    sizes = {"image_size": 32, "patch_size": 8, "width": 8, "depth": 3, "heads": 2, "read_after": (0, 2)}
    config = DinoConfig(**sizes, kernel_size=3)
    torch.save(DinoBackbone(config).vit.state_dict(), tmp_path / "dino.pth")
    weights = released("robustok")[0] | {"semantic_model.norm.weight": torch.ones(16)}
    heads = shaken(DinoHeads(config)).state_dict()
    torch.save({"ema": weights, "discriminator": heads}, tmp_path / "tokenizer.pt")
    settings = {"num_heads": 2, "depth": 3, "key_depths": [0, 2], "input_size": 32, "patch_size": 8}
    words.append(f"tokenizer.config.discriminator={json.dumps(settings)}")
    fresh = "discriminator={name: patch, width: 8, depth: 1}"
    run(capsys, [*words, f"discriminator={{name: dino, weights: {tmp_path}/dino.pth}}", f"out={out}"])
    assert best(out)["protocol"]["adversary"] == "carried"
    assert best(out)["discriminator"]["read_after"] == [0, 2]
    assert changed(heads, load_file(out / "snapshot" / "best" / "discriminator.safetensors"))
    assert "| adversary | carried |" in (out / "export" / "README.md").read_text()
    after = load_file(out / "export" / "tokenizer.safetensors")
    assert "semantic_model.norm.weight" not in changed(weights, after)  # the frozen teacher comes along

    run(capsys, [*words, fresh, "tokenizer.discriminator=false", f"out={tmp_path}/fresh"])
    assert best(tmp_path / "fresh")["protocol"]["adversary"] == "reinit_warmup, 1 steps"


def test_without_a_network_all_files_that_are_needed_are_named_before_anything_is_made(
    capsys, tmp_path, images, monkeypatch
):
    pytest.importorskip("lpips", reason="the extra robustok[lpips] is not installed")

    def offline(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    words = [word for word in command("robustok", tmp_path, images) if not word.startswith("reconstruction.perc")]
    heads = shaken(DinoHeads(DinoConfig(image_size=32, width=8, heads=2, depth=3, read_after=(0, 2), kernel_size=3)))
    torch.save({"ema": released("robustok")[0], "discriminator": heads.state_dict()}, tmp_path / "tokenizer.pt")
    settings = {"num_heads": 2, "depth": 3, "key_depths": [0, 2], "input_size": 32, "patch_size": 16}
    words = [*words, f"tokenizer.config.discriminator={json.dumps(settings)}", "reconstruction.perceptual=lpips"]
    line = refuse(capsys, tmp_path, words)
    for part in (
        "vgg16-397923af.pth",
        "reconstruction.perceptual_weights=FILE",
        "; and cannot load the discriminator's",
    ):
        assert part in line
    assert "discriminator.weights with discriminator.name=dino, such as https://" in line


def test_sigma_can_be_chosen_too(capsys, tmp_path, images, classifier):
    words, out = command("llamagen", tmp_path, images), tmp_path / "post"
    sweep = ["sigma=auto", "sweep.sigmas=[0.5,1]", "sweep.steps=1", "sweep.sets=2", "sweep.samples=10"]
    run(capsys, [*words, *sweep, f"held_out.extractor.path={classifier}", f"out={out}"])
    assert [row["sigma"] for row in best(out)["sweep"]][:3] == [None, 0.5, 1.0]
    assert "All that was tried:" in (out / "export" / "README.md").read_text()
    found = load_pretrained("llamagen", out / "export" / "tokenizer.safetensors", RELEASES["llamagen_tokenizer"][1])
    assert not changed(load_tokenizer(out).state_dict(), found.state_dict())


def test_the_configuration_beside_a_file_comes_along(capsys, tmp_path, images):
    words, out = command("maetok", tmp_path, images), tmp_path / "post"
    save_file(released("maetok_tokenizer")[0], tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(RELEASES["maetok_tokenizer"][1]))
    run(capsys, [*words, f"out={out}", f"tokenizer.weights={tmp_path}/model.safetensors", "tokenizer.config={}"])
    assert load_pretrained("maetok", out / "export" / "model.safetensors").config.latent_mean == 0.1
    assert (
        "Replace the original `model.safetensors` by `model.safetensors`" in (out / "export" / "README.md").read_text()
    )


def test_a_folder_is_exported_as_a_folder(tmp_path, monkeypatch):
    """As those of diffusers, whose pipelines hold more than the autoencoder."""
    model, asked = tiny_tokenizer("kl"), []
    write_snapshot(tmp_path / "best", {"kind": "tokenizer", "config": plain(model.config)}, model.state_dict(), {})
    (tmp_path / "DiT" / "vae").mkdir(parents=True)

    def convert(wanted):
        asked.append(wanted)
        wanted.out.mkdir(parents=True)

    monkeypatch.setattr(pretrained_sources, "convert", convert)
    source = PretrainedTokenizer(family="diffusers_kl", weights=tmp_path / "DiT")
    for _ in range(2):
        assert export_decoder(tmp_path / "best", source, tmp_path / "export") == tmp_path / "export" / "vae"
    (wanted,) = asked
    assert (wanted.to, wanted.original, wanted.weights) == ("export", None, tmp_path / "best")
    assert "Replace the folder `vae` of `DiT` by `vae`" in (tmp_path / "export" / "README.md").read_text()

    monkeypatch.setattr(pretrained_sources, "fetch", lambda path: tmp_path / "best")
    source = PretrainedTokenizer(family="diffusers_kl", weights="hf://stabilityai/sd-vae-ft-mse@v1")
    alone = tmp_path / "alone" / "sd-vae-ft-mse"
    assert export_decoder(tmp_path / "best", source, alone.parent) == alone
    assert asked[-1].original is None


# Paths instead of files


def test_paths_replace_what_a_recipe_says_of_files(capsys, tmp_path, images):
    words, out = command("llamagen", tmp_path, images), tmp_path / "post"
    run(capsys, [*words, f"out={out}"])
    rest = [word for word in words if not word.startswith(("tokenizer.", "generator."))]
    paths = [f"{name}={out}/{name}" for name in ("tokenizer", "generator", "latents")]
    run(capsys, [*rest, *paths, f"out={tmp_path}/again"])
    assert not changed(*(load_tokenizer(folder).state_dict() for folder in (out, tmp_path / "again")))
    assert not (tmp_path / "again" / "tokenizer").exists()
    # A snapshot tells all of a LlamaGen file, so that its own layout is written here too.
    found = [load_file(folder / "export" / "tokenizer.safetensors") for folder in (out, tmp_path / "again")]
    assert not changed(*found)

    pairs = next((out / "pairs").iterdir())
    run(capsys, [*rest, paths[0], f"pairs={pairs}", "generator=null", "sigma=null", f"out={tmp_path}/given"])
    assert not changed(found[0], load_file(tmp_path / "given" / "export" / "tokenizer.safetensors"))
    converted = [word for word in words if not word.startswith("generator.")]
    run(capsys, [*converted, f"pairs={pairs}", "generator=null", "sigma=null", f"out={tmp_path}/both"])
    assert not changed(found[0], load_file(tmp_path / "both" / "export" / "tokenizer.safetensors"))


def test_statistics_of_a_file_survive_the_way_through_snapshots(capsys, tmp_path, images):
    words, out = command("llamagen", tmp_path, images), tmp_path / "post"
    weights = released("llamagen_tokenizer")[0]
    weights["quantize.codebook_used"] = torch.rand(weights["quantize.codebook_used"].shape)
    torch.save(weights, tmp_path / "tokenizer.pt")
    run(capsys, [*words, f"out={out}"])
    rest = [word for word in words if not word.startswith("tokenizer.")]
    run(capsys, [*rest, f"tokenizer={out}/tokenizer", f"out={tmp_path}/again"])
    for folder in (out, tmp_path / "again"):
        assert "quantize.codebook_used" not in changed(weights, load_file(folder / "export/tokenizer.safetensors"))


def test_no_file_is_exported_where_a_snapshot_does_not_hold_all_of_it(capsys, tmp_path, images):
    words, out = command("robustok", tmp_path, images), tmp_path / "post"
    run(capsys, [*words, f"out={out}"])
    rest = [word for word in words if not word.startswith("tokenizer.")]
    run(capsys, [*rest, f"tokenizer={out}/tokenizer", f"out={tmp_path}/again"])  # may have had a teacher
    assert (tmp_path / "again" / "snapshot" / "best").exists()
    assert not (tmp_path / "again" / "export").exists()


# What does not fit


def test_a_dry_run_needs_the_files_and_writes_nothing(capsys, tmp_path, images):
    words, before = command("vavae", tmp_path, images), files(tmp_path)
    facts = json.loads(run(capsys, [*words, f"out={tmp_path}/post", "--dry-run", "--json"])[0])["facts"]
    assert files(tmp_path) == before
    model = RELEASES["vavae"][0]()
    assert facts["tokenizer_parameters"] == sum(p.numel() for p in model.parameters())
    assert (facts["pairs"], facts["pairs_bytes"], facts["latents_bytes"]) == (16, 16 * 277, 16 * 277)
    assert facts["converted_bytes"] == sum((tmp_path / f"{n}.pt").stat().st_size for n in ("tokenizer", "generator"))
    run(capsys, [*words, f"out={tmp_path}/post"])
    assert LatentCache(tmp_path / "post" / "latents").manifest.record_bytes == 277


REFUSED = {  # pair, words, what is said
    "no file": ("gigatok", ["tokenizer.weights=null"], ("tokenizer.weights is missing", "VQ_SB256_e200.pt", "Drive")),
    "no generator": ("maetok", ["generator.weights=null"], ("generator.weights is missing", "sit-xl_maetok-b-128")),
    "a file that is not there": ("llamagen", ["generator.weights=x.pt"], ("generator.weights=x.pt is not there",)),
    "no statistics there": ("vavae", ["generator.statistics=x.pt"], ("generator.statistics=x.pt is not there",)),
    "no statistics": ("vavae", ["generator.statistics=null"], ("generator: lightningdit needs the statistics",)),
    "no family": ("llamagen", ["tokenizer={weights: x}"], ("'tokenizer.family' is missing",)),
    "an unknown family": ("llamagen", ["tokenizer.family=lamagen"], ("did you mean 'llamagen'?",)),
    "an unknown setting": ("llamagen", ["tokenizer.weigths=x"], ("did you mean 'tokenizer.weights'?",)),
    "no snapshot": ("llamagen", ["tokenizer=3"], ("robustok: 3 holds no snapshot",)),
    "another family": ("llamagen", ["tokenizer.family=gigatok_tokenizer"], ("tokenizer: ", "llamagen_tokenizer")),
    "the other file": (
        "llamagen",
        ["tokenizer.weights={home}/generator.pt", "tokenizer.config={n_head: 2, block_size: 16}"],
        ("generator.pt holds a generator; give the file of the tokenizer",),
    ),
    "a snapshot that is none": ("llamagen", ["tokenizer={home}"], ("holds no snapshot",)),
    "no images": ("llamagen", ["data.path={home}/none"], ("none",)),
    "too few images": ("llamagen", ["batch_size=28"], ("the global batch is 28", "16")),
    "no sigma": ("llamagen", ["sigma=null"], ("sigma missing",)),
    "pairs and a generator": ("llamagen", ["pairs={home}"], ("so is generator", "generator=null")),
    "no perceptual network": ("llamagen", ["reconstruction.perceptual=classifier"], ("perceptual_weights",)),
    "no discriminator": ("llamagen", ["adversary=carried"], ("holds no discriminator",)),
    "no latents": ("llamagen", ["latents={home}"], ("no latents cache",)),
}


def refuse(capsys, folder, words):
    """The one line that a command is refused with; it wrote nothing."""
    before = files(folder)
    capsys.readouterr()
    code = main([*words, f"out={folder}/post"])
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert files(folder) == before
    assert not (folder / "post").exists()
    return err


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_missing_is_said_before_anything_is_written(capsys, tmp_path, images, case):
    pair, words, said = REFUSED[case]
    given = [*command(pair, tmp_path, images), *(word.replace("{home}", str(tmp_path)) for word in words)]
    line = refuse(capsys, tmp_path, given)
    for part in said:
        assert part in line


OTHER_TOKENIZERS = {  # pair, another tokenizer, its settings, what is said
    "codes": ("llamagen", "llamagen", {"quantizer": {"size": 8, "dim": 4}}, "(8, 16), the generator (16, 16)"),
    "shape": ("vavae", "kl", {"dim": 5}, "(16, 5), the generator (16, 4)"),
}


@pytest.mark.parametrize("case", OTHER_TOKENIZERS)
def test_a_generator_of_another_tokenizer(capsys, tmp_path, images, case):
    pair, name, settings, said = OTHER_TOKENIZERS[case]
    words = command(pair, tmp_path, images)
    torch.save(export_weights(tiny_tokenizer(name, **settings)), tmp_path / "tokenizer.pt")
    line = refuse(capsys, tmp_path, words)
    assert said in line
    assert f"{tmp_path}/tokenizer.pt has" in line


def test_snapshots_and_latents_of_another_tokenizer(capsys, tmp_path, images):
    (tmp_path / "home").mkdir()
    words, home = command("llamagen", tmp_path / "home", images), tmp_path / "first"
    run(capsys, [*words, f"out={home}"])
    weights = released("llamagen_tokenizer")[0]
    weights["encoder.conv_in.bias"] += 1
    torch.save(weights, tmp_path / "home" / "tokenizer.pt")
    assert "was made by another tokenizer" in refuse(capsys, tmp_path, [*words, f"latents={home}/latents"])
    rest = [word for word in words if not word.startswith("generator.")]
    assert "models the latents of another tokenizer" in refuse(capsys, tmp_path, [*rest, f"generator={home}/generator"])
    paths = [f"tokenizer={home}/tokenizer", f"latents={home}/latents", "data.limit=20"]
    rest = [word for word in words if not word.startswith("tokenizer.")]
    assert "latents of other images" in refuse(capsys, tmp_path, [*rest, *paths])


def test_images_of_more_classes_than_the_generator_has(capsys, tmp_path, images):
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images" / "more").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "more" / "0.png")
    line = refuse(capsys, tmp_path, command("llamagen", tmp_path, tmp_path / "images"))
    assert "the images have 6 classes" in line


def test_other_files_in_a_run_folder_are_refused(capsys, tmp_path, images):
    words, out = command("llamagen", tmp_path, images), tmp_path / "post"
    run(capsys, [*words, f"out={out}"])
    before = files(out)
    assert main([*words, f"out={out}", f"tokenizer.weights={tmp_path}/other.pt"]) == 2
    assert files(out) == before
