"""Folders of the diffusers library to snapshots and back, in whole and under abuse."""

import json
import os
import pickle
import shutil
from fnmatch import fnmatch

import huggingface_hub
import pytest
import torch
import yaml
from safetensors.torch import load_file

import robustok
from conftest import unchanged_by
from robustok.cli import main
from robustok.errors import UserError
from robustok.generators import load_generator
from robustok.generators.ddpm import DDPMSampling
from robustok.snapshots import write_snapshot
from robustok.tokenizers import encoder_digest, load_tokenizer
from tiny_models import tiny_tokenizer

diffusers = pytest.importorskip("diffusers")

VAE = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 64,
}
DIT = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
DIT |= {"in_channels": 4, "out_channels": 8, "sample_size": 4, "num_embeds_ada_norm": 5}


def pipeline(path, vae=None, transformer=None):
    """The folder that ``DiTPipeline.save_pretrained`` makes, with random weights."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(**VAE | (vae or {}))
    network = diffusers.DiTTransformer2DModel(**DIT | (transformer or {}))
    diffusers.DiTPipeline(network, vae, diffusers.DDIMScheduler(clip_sample=False)).save_pretrained(path)
    return path


def run(capsys, *words):
    capsys.readouterr()
    code = main(["convert", *words])
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys, path, *words):
    """The one line that a command is refused with; it wrote nothing."""
    return unchanged_by(path, lambda: run(capsys, *words))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# There and back


def test_a_pipeline_becomes_a_tokenizer_and_its_generator(capsys, tmp_path):
    pipeline(tmp_path / "DiT")
    out = tmp_path / "ours"
    assert run(capsys, "family=diffusers", f"weights={tmp_path}/DiT", f"out={out}") == (0, f"{out}\n", "")
    assert sorted(path.name for path in out.iterdir()) == ["generator", "tokenizer"]
    tokenizer, generator = load_tokenizer(out / "tokenizer"), load_generator(out / "generator")
    vae = diffusers.AutoencoderKL.from_pretrained(tmp_path / "DiT" / "vae")
    network = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "DiT" / "transformer")
    assert same(tokenizer.vae.state_dict(), vae.state_dict())
    assert same(generator.transformer.state_dict(), network.state_dict())
    assert (tokenizer.image_size, tokenizer.latent_shape) == (8, (16, 4))  # what the transformer makes, not its 64
    assert (generator.latent_shape, generator.classes) == ((16, 4), 5)
    assert generator.latent_space == encoder_digest(tokenizer)
    assert generator.sampling == DDPMSampling()
    latents = torch.randn(2, 16, 4)
    torch.testing.assert_close(generator.normalise(latents).float(), 0.18215 * latents)
    header = yaml.safe_load((out / "generator" / "config.yaml").read_text())
    assert header["trained_on"] == "converted from DiT, DiTTransformer2DModel"
    assert header["source"] == {"file": "DiT", "part": "DiTTransformer2DModel", "family": "dit"}
    assert header["commercial_use"].startswith("NOT PERMITTED")
    card = (out / "tokenizer" / "README.md").read_text()
    assert "AutoencoderKL; it holds no discriminator" in card
    assert "commercial_use" not in card


@pytest.mark.parametrize(("family", "part"), [("diffusers_kl", "vae"), ("dit", "transformer")])
def test_a_part_alone(capsys, tmp_path, family, part):
    """Named by its family in a pipeline, or lying alone; both ways are the same model."""
    pipeline(tmp_path / "DiT")
    run(capsys, "family=diffusers", f"weights={tmp_path}/DiT", f"out={tmp_path}/both")
    assert run(capsys, f"family={family}", f"weights={tmp_path}/DiT", f"out={tmp_path}/one")[0] == 0
    kind = "tokenizer" if part == "vae" else "generator"
    files = [tmp_path / folder / name for folder in (f"both/{kind}", "one") for name in ("config.yaml",)]
    assert files[0].read_text() == files[1].read_text()
    shutil.copytree(tmp_path / "DiT" / part, tmp_path / "alone")
    words = [f"tokenizer={tmp_path}/both/tokenizer"] if kind == "generator" else ["config.image_size=8"]
    assert run(capsys, "family=diffusers", f"weights={tmp_path}/alone", f"out={tmp_path}/two", *words)[0] == 0
    load = load_tokenizer if kind == "tokenizer" else load_generator
    assert same(load(tmp_path / "one").state_dict(), load(tmp_path / "two").state_dict())
    assert load(tmp_path / "one").latent_shape == load(tmp_path / "two").latent_shape
    loaded = robustok.load_pretrained(family, tmp_path / "DiT")
    assert same(loaded.state_dict(), load(tmp_path / "one").state_dict())
    assert robustok.load_pretrained("diffusers", tmp_path / "alone").latent_shape[1] == 4

    back = tmp_path / "back"
    words = [f"family={family}", "to=export", f"weights={tmp_path}/one", f"out={back}"]
    assert run(capsys, *words) == (0, f"{back}\n", "")
    again = getattr(diffusers, "AutoencoderKL" if part == "vae" else "DiTTransformer2DModel").from_pretrained(back)
    assert same(again.state_dict(), type(again).from_pretrained(tmp_path / "DiT" / part).state_dict())
    assert run(capsys, *words) == (0, f"{back}\n", "")  # once more, as after a kill
    (back / "config.json").write_text("{}")
    assert "exists and holds something else" in refused(capsys, tmp_path, *words)


def test_another_decoder_of_the_same_encoder(capsys, tmp_path):
    """The fine-tuned decoders of Stable Diffusion share the encoder, so that the generator's latents fit them."""
    pipeline(tmp_path / "DiT")
    vae = diffusers.AutoencoderKL.from_pretrained(tmp_path / "DiT" / "vae")
    with torch.no_grad():
        vae.decoder.conv_out.weight.add_(1)
    vae.save_pretrained(tmp_path / "mse")
    words = ["family=diffusers", f"weights={tmp_path}/mse", f"out={tmp_path}/tokenizer", "config.image_size=8"]
    assert run(capsys, *words)[0] == 0
    words = ["family=dit", f"weights={tmp_path}/DiT", f"out={tmp_path}/generator", f"tokenizer={tmp_path}/tokenizer"]
    assert run(capsys, *words)[0] == 0
    assert load_generator(tmp_path / "generator").latent_space == encoder_digest(load_tokenizer(tmp_path / "tokenizer"))


def test_statistics_of_its_latents_can_be_given(capsys, tmp_path):
    pipeline(tmp_path / "DiT")
    alone = ["family=dit", f"weights={tmp_path}/DiT/transformer", f"out={tmp_path}/out"]
    assert "needs the statistics" in refused(capsys, tmp_path, *alone)
    settings = ["config.latent_mean=0.5", "config.latent_std=2.0", "config.latent_multiplier=0.3"]
    assert run(capsys, *alone, *settings)[0] == 0
    latents = torch.randn(2, 16, 4)
    torch.testing.assert_close(load_generator(tmp_path / "out").normalise(latents).float(), 0.3 * (latents - 0.5) / 2)
    pipeline(tmp_path / "other", {"latents_mean": [1.0, 2.0, 3.0, 4.0], "latents_std": [2.0, 4.0, 8.0, 1.0]})
    assert run(capsys, "family=dit", f"weights={tmp_path}/other", f"out={tmp_path}/four")[0] == 0
    found = load_generator(tmp_path / "four")
    assert (found.latent_mean.tolist(), found.latent_std.tolist()) == ([1, 2, 3, 4], [2, 4, 8, 1])
    assert found.config.latent_multiplier == 0.18215


def pickled(folder, rename=lambda name: name):
    """Weights as they were released before safetensors."""
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save({rename(name): tensor for name, tensor in weights.items()}, folder / PICKLED)


def old_name(name):
    """How Stable Diffusion's autoencoder called the layers of its attention when its weights were released."""
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        name = name.replace(new, old)
    return name


def test_weights_of_before_safetensors_are_the_same_weights(capsys, tmp_path):
    pipeline(tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    pickled(tmp_path / "old" / "vae", old_name)
    pickled(tmp_path / "old" / "transformer")
    for folder in ("new", "old"):
        words = ["family=diffusers", f"weights={tmp_path / folder}", f"out={tmp_path}/{folder}-snapshot"]
        assert run(capsys, *words)[0] == 0
    for part in ("tokenizer", "generator"):
        new, old = (load_file(tmp_path / f"{f}-snapshot" / part / "model.safetensors") for f in ("new", "old"))
        assert same(new, old)
    assert [*tmp_path.glob("old/*/*.safetensors")] == []


# As scripts/convert and users' uploads leave them: half precision alone, in pickles, in several files, with an index.
KEPT = {
    "fp16": {"variant": "fp16"},
    "fp16 in pickles": {"variant": "fp16", "safe_serialization": False},
    "several files": {"max_shard_size": "3KB"},
    "several pickles": {"max_shard_size": "3KB", "safe_serialization": False},
    "several of fp16": {"max_shard_size": "3KB", "variant": "fp16"},
    "several pickles of fp16": {"max_shard_size": "3KB", "variant": "fp16", "safe_serialization": False},
}


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("index", [True, False])
def test_weights_are_found_under_the_names_that_the_library_writes(tmp_path, kept, index):
    vae = diffusers.AutoencoderKL(**VAE)
    vae = vae.half() if "fp16" in kept else vae
    vae.save_pretrained(tmp_path, **KEPT[kept])
    files = [file for file in tmp_path.iterdir() if file.suffix != ".json"]
    assert (len(files) > 2) == ("several" in kept)
    for file in () if index else tmp_path.glob("*.index*"):
        file.unlink()
    found = robustok.load_pretrained("diffusers_kl", tmp_path)
    assert same(found.vae.state_dict(), vae.float().state_dict())
    assert found.vae.dtype == torch.float32
    if "several" in kept:
        max(files).unlink()
        with pytest.raises(UserError, match=rf"lacks {max(files).name}, one of its {len(files)} files .*copy it, too"):
            robustok.load_pretrained("diffusers_kl", tmp_path)


def test_of_several_weights_those_of_full_precision_are_taken(tmp_path):
    vae = diffusers.AutoencoderKL(**VAE)
    vae.save_pretrained(tmp_path, safe_serialization=False)
    for variant in ("fp16", "other"):
        diffusers.AutoencoderKL(**VAE).save_pretrained(tmp_path, variant=variant)
    assert same(robustok.load_pretrained("diffusers_kl", tmp_path).vae.state_dict(), vae.state_dict())
    (tmp_path / PICKLED).unlink()
    with pytest.raises(UserError, match="variants fp16 and other; keep one"):
        robustok.load_pretrained("diffusers_kl", tmp_path)


def test_an_index_leads_nowhere_else(tmp_path):
    vae = diffusers.AutoencoderKL(**VAE)
    vae.save_pretrained(tmp_path / "a", max_shard_size="3KB")
    index = tmp_path / "a" / f"{WEIGHTS}.index.json"
    for names in ({"x": "../b.safetensors"}, {"x": "/etc/hostname"}, {}, [], {"x": 3}):
        edit(index, weight_map=names)
        with pytest.raises(UserError, match=r"lists no files beside it|lacks 3"):
            robustok.load_pretrained("diffusers_kl", tmp_path / "a")


def test_a_pointer_of_git_lfs_is_called_that(capsys, tmp_path):
    pipeline(tmp_path / "DiT")
    (tmp_path / "DiT" / "vae" / WEIGHTS).write_text(POINTER)
    words = ["family=diffusers", f"weights={tmp_path}/DiT", f"out={tmp_path}/out"]
    assert "is a git-lfs pointer without the content" in refused(capsys, tmp_path, *words)


def test_a_folder_comes_from_the_hub_with_no_more_of_it_than_needed(capsys, tmp_path, monkeypatch):
    there, cache, asked = pipeline(tmp_path / "there"), tmp_path / "cache", []
    pickled(there / "transformer")
    for extra in ("vae/diffusion_pytorch_model.fp16.safetensors", f"vae/{PICKLED}", "DiT-XL-2-256x256.pt"):
        (there / extra).write_bytes(b"large")

    def fetch(repository, allow_patterns, revision=None, token=None):
        asked.append((repository, revision, token))
        for file in there.rglob("*.*"):
            if any(fnmatch(str(name := file.relative_to(there)), pattern) for pattern in allow_patterns):
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, cache / name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    words = ["family=diffusers", f"out={tmp_path}/snapshot", "weights=hf://facebook/DiT-XL-2-256@v1"]
    assert run(capsys, *words)[0] == 0
    assert asked == [("facebook/DiT-XL-2-256", "v1", None)] * 2
    assert sorted(str(file.relative_to(cache)) for file in cache.rglob("*.*")) == [
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        f"transformer/{PICKLED}",
        "vae/config.json",
        f"vae/{WEIGHTS}",
    ]
    header = yaml.safe_load((tmp_path / "snapshot" / "tokenizer" / "config.yaml").read_text())
    assert header["trained_on"].startswith("converted from hf://facebook/DiT-XL-2-256@v1, ")
    shutil.rmtree(cache)
    alone = robustok.load_pretrained("diffusers_kl", "hf://facebook/DiT-XL-2-256/vae")
    assert same(alone.state_dict(), load_tokenizer(tmp_path / "snapshot" / "tokenizer").state_dict())
    assert not (cache / "transformer").exists()
    for file in there.glob("vae/*.*"):
        if file.suffix != ".json":
            file.unlink()
    diffusers.AutoencoderKL(**VAE).half().save_pretrained(there / "vae", variant="fp16")
    shutil.rmtree(cache)
    assert robustok.load_pretrained("diffusers_kl", "hf://facebook/DiT-XL-2-256/vae").vae.dtype == torch.float32


# Abuse


class Payload:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def edit(file, **change):
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


def cut_off(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def poison(folder, write):
    """Weights that run a command when a pickle is trusted, in place of the good ones."""
    weights = load_file(folder / WEIGHTS) | {"payload": Payload(f"touch {folder}/executed")}
    (folder / WEIGHTS).unlink()
    with (folder / PICKLED).open("wb") as file:
        write(weights, file)


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 334643276\n"
WEIGHTS, PICKLED = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"
ABUSE = {  # what happens to the folder, other words, what is said
    "no such folder": (shutil.rmtree, [], "no config.json"),
    "an empty one": (lambda p: [shutil.rmtree(p), p.mkdir()], [], "no config.json"),
    "no weights of the autoencoder": (lambda p: (p / "vae" / WEIGHTS).unlink(), [], "vae has no weights; it needs"),
    "no weights": (lambda p: (p / "transformer" / WEIGHTS).unlink(), [], "transformer has no weights; it needs"),
    "cut off": (lambda p: cut_off(p / "transformer" / WEIGHTS), [], "cannot be read as safetensors"),
    "a pickle that runs a command": (lambda p: poison(p / "vae", torch.save), [], "'payload' is a"),
    "a bare pickle": (lambda p: poison(p / "vae", pickle.dump), [], "neither a PyTorch file"),
    "a pickle of other weights": (lambda p: pickled(p / "vae", lambda name: f"x.{name}"), [], "the weights do not fit"),
    "no scheduler": (lambda p: shutil.rmtree(p / "scheduler"), [], "scheduler_config.json is missing"),
    "damaged settings": (lambda p: cut_off(p / "vae" / "config.json"), [], "is no JSON"),
    "another network": (
        lambda p: [edit(p / part / "config.json", _class_name="PixArt") for part in ("vae", "transformer")],
        [],
        "holds PixArt and PixArt, expected AutoencoderKL or",
    ),
    "wrong shapes": (lambda p: edit(p / "vae" / "config.json", latent_channels=3), [], "cannot be loaded"),
    "another autoencoder": (
        lambda p: [shutil.rmtree(p), pipeline(p, {"latent_channels": 5})],
        [],
        "has latents of shape (16, 5), the generator (16, 4)",
    ),
    "another size": (lambda p: None, ["config.image_size=16"], "has latents of shape (64, 4), the generator (16, 4)"),
    "an impossible size": (lambda p: None, ["config.image_size=9"], "not divisible by 2"),
    "no size": (lambda p: None, ["config.image_size=big"], "image_size"),
    "wrong types": (lambda p: edit(p / "vae" / "config.json", block_out_channels=3), [], "cannot be made"),
    "a wrong size": (lambda p: edit(p / "transformer" / "config.json", sample_size="4x4"), [], "sample_size"),
    "a giant autoencoder": (
        lambda p: edit(p / "vae" / "config.json", block_out_channels=[2**20] * 2),
        [],
        "larger than",
    ),
    "a deep autoencoder": (lambda p: edit(p / "vae" / "config.json", layers_per_block=10**7), [], "larger than"),
    "a deep transformer": (lambda p: edit(p / "transformer" / "config.json", num_layers=10**7), [], "larger than"),
    "a wide transformer": (
        lambda p: edit(p / "transformer" / "config.json", num_attention_heads=10**6),
        [],
        "larger than",
    ),
    "a large grid": (lambda p: edit(p / "transformer" / "config.json", sample_size=10**6), [], "sample_size"),
    "many classes": (lambda p: edit(p / "transformer" / "config.json", num_embeds_ada_norm=10**9), [], "larger than"),
    "an unknown spacing": (
        lambda p: edit(p / "scheduler" / "scheduler_config.json", timestep_spacing=[1]),
        [],
        "the scheduler beside",
    ),
    "nested settings": (lambda p: (p / "vae" / "config.json").write_text("[" * 10**5), [], "is no JSON"),
    "an unknown setting": (lambda p: None, ["config.heads=2"], "config.heads is not known"),
    "two sources of statistics": (
        lambda p: None,
        ["config.latent_mean=3", "config.latent_std=2"],
        "other latent statistics",
    ),
    "not a number": (
        lambda p: broken(p / "transformer"),
        [],
        "proj_out_2.bias holds NaN or infinite numbers",
    ),
}


def broken(folder):
    network = diffusers.DiTTransformer2DModel.from_pretrained(folder)
    with torch.no_grad():
        network.proj_out_2.bias[0] = float("nan")
    network.save_pretrained(folder)


@pytest.mark.parametrize("case", ABUSE)
def test_a_bad_folder_is_one_line_and_nothing_is_written(capsys, tmp_path, case):
    happens, words, said = ABUSE[case]
    happens(pipeline(tmp_path / "DiT"))
    err = refused(capsys, tmp_path, "family=diffusers", f"weights={tmp_path}/DiT", f"out={tmp_path}/out", *words)
    assert said in err
    assert not list(tmp_path.rglob("executed"))


def test_wrong_words(capsys, tmp_path):
    pipeline(tmp_path / "DiT")
    tokenizer = tiny_tokenizer("kl")
    header = {"kind": "tokenizer", "config": robustok.config.plain(tokenizer.config)}
    write_snapshot(tmp_path / "kl", header, tokenizer.state_dict(), {})
    words = lambda *others: [f"weights={tmp_path}/DiT", f"out={tmp_path}/out", *others]  # noqa: E731
    refuse = lambda *others: refused(capsys, tmp_path, *words(*others))  # noqa: E731
    assert "holds a tokenizer; drop tokenizer=" in refuse("family=diffusers", f"tokenizer={tmp_path}/kl")
    assert "expected DiTTransformer2DModel" in refuse("family=dit", f"weights={tmp_path}/DiT/vae")
    assert "expected AutoencoderKL" in refuse("family=diffusers_kl", f"weights={tmp_path}/DiT/transformer")
    assert "holds a KL, which is no diffusers" in refuse("family=diffusers", "to=export", f"weights={tmp_path}/kl")
    assert "drop it" in refuse("family=diffusers", "to=export", f"weights={tmp_path}/kl", "original=a.pt")
    with pytest.raises(UserError, match="write it with export_folder"):
        robustok.export_weights(robustok.load_pretrained("dit", tmp_path / "DiT"))
    with pytest.raises(UserError, match="name one of them"):
        robustok.load_pretrained("diffusers", tmp_path / "DiT")
    with pytest.raises(UserError, match="give its path"):
        robustok.load_pretrained("dit", {"x": torch.ones(1)})
    with pytest.raises(UserError, match="does not take; known: image_size"):
        robustok.load_pretrained("diffusers_kl", tmp_path / "DiT", {"size": 3})
