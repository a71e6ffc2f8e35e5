"""Post-training of a DiT pipeline through the command line: its folder in, a folder for ``from_pretrained`` out."""

import json

import pytest
import torch
import yaml

import tiny
from robustok.cli import main
from robustok.data.dataset import open_images
from robustok.data.latent_cache import LatentCache
from robustok.data.sources import Digits
from robustok.generators.dit import DiT
from robustok.model_card import add_licence
from robustok.tokenizers.diffusers import DiffusersKL

diffusers = pytest.importorskip("diffusers")

SOURCES = {"tokenizer": "diffusers_kl", "generator": "dit"}
SHORT = [word for word in tiny.TRAINING if not word.startswith("steps")]


def pipeline(path):
    """An autoencoder of 16 x 16 pixels and a DiT of its 8 x 8 latents, as their own library saves it."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (8, 16), "latent_channels": 4, "norm_num_groups": 4, "sample_size": 16}
    vae = diffusers.AutoencoderKL(**blocks, **sizes)
    network = diffusers.DiTTransformer2DModel(
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        sample_size=8,
        num_embeds_ada_norm=10,
    )
    diffusers.DiTPipeline(network, vae, diffusers.DDIMScheduler(clip_sample=False)).save_pretrained(path)
    return path


def command(name, out, *words):
    assert main([name, f"out={out}", *words]) == 0, name
    return out


@pytest.mark.parametrize("sigma", ["0.8", "auto"])
def test_a_pipeline_is_post_trained(tmp_path, sigma, classifier):
    given = pipeline(tmp_path / "DiT")
    ours = command("convert", tmp_path / "ours", "family=diffusers", f"weights={given}")
    tokenizer, generator = f"tokenizer={ours / 'tokenizer'}", f"generator={ours / 'generator'}"
    latents = command("encode", tmp_path / "latents", tokenizer, *tiny.DATA)
    sampling = {"name": "ddpm", "sampler": "ancestral", "variance": "learned", "steps": 5, "guidance_scale": 1.5}
    words = [
        tokenizer,
        generator,
        f"latents={latents}",
        f"sigma={sigma}",
        "steps=4",
        "snapshot_every=2",
        "mixture.count=64",
    ]
    words += [f"mixture.sampling={json.dumps(sampling | {'guided_channels': 3})}", "reconstruction.perceptual=none"]
    if sigma == "auto":
        words += ["sweep.sigmas=[0.8,1.0]", "sweep.samples=20", "sweep.sets=2", "sweep.steps=2"]
        words += [f"held_out.extractor.path={classifier}"]
    post = command("post-train", tmp_path / "post", *words, *tiny.DATA, *SHORT, *tiny.ADVERSARY, "adversary_warmup=2")
    header = yaml.safe_load((post / "snapshot" / "best" / "config.yaml").read_text())
    pairs = [LatentCache(path).manifest.source for path in (post / "pairs").glob("sigma-0.8-*")]
    assert pairs[0]["strategy"] == "sdedit"
    assert pairs[0]["sampler_steps"] == 1
    assert pairs[0]["guided_share"] == 1
    if sigma == "auto":
        assert [row["sigma"] for row in header["sweep"]][:3] == [None, 0.8, 1.0]
        return
    assert header["post_trained"]["sigma"] == 0.8
    assert header["protocol"]["noise_level"] == pytest.approx(pairs[0]["noise_level"])
    # The licence of the generator binds the decoder, too, in a delta as well, and in the one after that.
    delta = command("make-delta", tmp_path / "delta", tokenizer, f"post_trained={post}")
    for folder in (post / "snapshot" / "best", post / "export", delta):
        card = (folder / "README.md").read_text()
        assert f"{DiffusersKL.licence} (tokenizer); {DiT.licence} (generator)." in card
        assert "- commercial_use: NOT PERMITTED" in card
        assert "license: other" in card
    again = dict(header)
    add_licence(again, pairs[0]["licence"], "generator")
    assert again == header

    samples = command("generate", tmp_path / "samples", generator, "count=20", "sampling.name=ddpm", "sampling.steps=3")
    scored = [f"extractor.path={classifier}", "metrics=[gfid]"]
    decoders = [f"samples.decoders.original={ours / 'tokenizer'}", f"samples.decoders.post_trained={post}"]
    decoders.append(f"samples.latents=[{samples}]")
    measured = command("evaluate", tmp_path / "measured", *decoders, *scored, *tiny.DATA)
    assert "gfid" in (measured / "metrics.jsonl").read_text()

    back = command("convert", tmp_path / "back", "family=diffusers", "to=export", f"weights={post}")
    before = diffusers.AutoencoderKL.from_pretrained(given / "vae").eval()
    after = diffusers.AutoencoderKL.from_pretrained(back).eval()
    changed = {
        name.split(".")[0] for name, w in after.state_dict().items() if not torch.equal(w, before.state_dict()[name])
    }
    assert changed == {"decoder", "post_quant_conv"}
    images = open_images(Digits(limit=128), 16).read(range(8)).images
    with torch.no_grad():
        posterior = before.encode(images).latent_dist.mean
        assert torch.equal(after.encode(images).latent_dist.mean, posterior)  # bit for bit
        assert not torch.allclose(after.decode(posterior).sample, before.decode(posterior).sample, atol=1e-4)
    whole = diffusers.DiTPipeline.from_pretrained(given, vae=after)
    whole.set_progress_bar_config(disable=True)
    assert len(whole.vae.state_dict()) == len(before.state_dict())


def test_a_dit_learns_from_a_cache_and_goes_back(tmp_path):
    """Training of a generator, by what its folder's library calls the same sizes."""
    ours = command("convert", tmp_path / "ours", "family=diffusers_kl", f"weights={pipeline(tmp_path / 'DiT')}")
    latents = command("encode", tmp_path / "latents", f"tokenizer={ours}", *tiny.DATA)
    sizes = '{"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}'
    words = ["generator.name=dit", f"generator.settings={sizes}", f"latents={latents}", *SHORT, "steps=3"]
    words += ["sampling.name=ddpm", "sampling.steps=4", "sampling.guidance_scale=2.0"]
    assert main(["train-generator", *words, f"out={tmp_path / 'generator'}", "--dry-run"]) == 0
    generator = command("train-generator", tmp_path / "generator", *words)
    lines = tiny.log(generator)
    assert all(line["noise_prediction"] > 0 for line in lines)
    assert lines[-1]["noise_prediction"] != lines[0]["noise_prediction"]
    pairs = command("make-pairs", tmp_path / "pairs", f"generator={generator}", f"latents={latents}", "sigma=0.5")
    assert LatentCache(pairs).manifest.source["sampler_steps"] == 2
    back = command("convert", tmp_path / "back", "family=dit", "to=export", f"weights={generator}")
    assert diffusers.DiTTransformer2DModel.from_pretrained(back).config.num_embeds_ada_norm == 10


def test_one_command_turns_a_pipeline_into_a_folder_of_its_autoencoder(tmp_path):
    given = pipeline(tmp_path / "DiT")
    sources = [f"{name}={{family: {family}, weights: {given}}}" for name, family in SOURCES.items()]
    words = [
        *sources,
        "sigma=0.8",
        "steps=4",
        "mixture.count=64",
        "mixture.sampling.name=ddpm",
        "mixture.sampling.steps=5",
    ]
    words += ["reconstruction.perceptual=none", *tiny.DATA, *SHORT, *tiny.ADVERSARY, "adversary_warmup=2"]
    post = command("post-train", tmp_path / "post", *words)
    before = diffusers.AutoencoderKL.from_pretrained(given / "vae").state_dict()
    after = diffusers.AutoencoderKL.from_pretrained(post / "export" / "vae").state_dict()
    changed = {name.split(".")[0] for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert changed == {"decoder", "post_quant_conv"}
    card = (post / "export" / "README.md").read_text()
    assert f"{DiT.licence} (generator)" in card  # of the samples that it was trained on
    assert "- commercial_use: NOT PERMITTED" in card

    snapshots = [f"{name}={post / name}" for name in SOURCES]
    again = command("post-train", tmp_path / "again", *snapshots, *words[2:])
    written = diffusers.AutoencoderKL.from_pretrained(next((again / "export").glob("*/"))).state_dict()
    assert all(torch.equal(written[name], after[name]) for name in after)
