"""The command that converts pretrained checkpoints to snapshots and back, and its errors."""

import os
import pickle

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import robustok
from robustok.cli import main
from robustok.config import plain
from robustok.generators import load_generator
from robustok.generators.rar import RAR, RARConfig
from robustok.losses.discriminators import DinoConfig, DinoHeads, PatchConfig, carried_config
from robustok.pretrained.export import export_weights
from robustok.pretrained.families import FAMILIES
from robustok.pretrained.load import load_pretrained
from robustok.snapshots import write_snapshot
from robustok.tokenizers import encoder_digest, load_tokenizer
from tiny_models import RELEASES, released, shaken, tiny_generator, tiny_tokenizer


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def run(capsys, *words):
    capsys.readouterr()
    code = main(["convert", *words])
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys, *words):
    """The one line that a command is refused with; it wrote nothing."""
    out = next(word.removeprefix("out=") for word in words if word.startswith("out="))
    code, printed, err = run(capsys, *words)
    assert (code, printed, err.count("\n")) == (2, "", 1)
    assert not os.path.exists(out)
    return err


def config_words(family):
    """The configuration of a release as words of the command line."""
    return [f"config.{key}={value}" for key, value in RELEASES[family][1].items()]


def header_of(folder):
    return yaml.safe_load((folder / "config.yaml").read_text())


# There and back


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_becomes_a_snapshot_that_loads_and_goes_back_bit_for_bit(capsys, tmp_path, family):
    weights, model = released(family)
    ours, back = tmp_path / "ours", tmp_path / "back.safetensors"
    torch.save({"model": {}, "ema": weights, "steps": 3}, tmp_path / "theirs.pt")
    words = [f"family={family}", f"weights={tmp_path}/theirs.pt", f"out={ours}", *config_words(family)]
    assert run(capsys, *words) == (0, f"{ours}\n", "")

    load = load_tokenizer if FAMILIES[family].kind == "tokenizer" else load_generator
    loaded, header, card = load(ours), header_of(ours), (ours / "README.md").read_text()
    assert type(loaded) is type(model)
    assert same(loaded.state_dict(), model.state_dict())
    assert loaded.config == load_pretrained(family, weights, RELEASES[family][1]).config
    assert header["trained_on"].startswith("converted from theirs.pt, ema")
    assert header["source"] == {"file": "theirs.pt", "part": "ema", "family": family}
    assert "- source" not in card
    assert header["licence"] == model.licence
    assert model.licence in card
    if FAMILIES[family].kind == "tokenizer":
        assert header["latent_space"] == encoder_digest(model)
        assert header["image_range"] == list(model.image_range)
        assert str(header["image_range"]) in card
        assert "holds no discriminator" in header["trained_on"]
    else:
        assert (loaded.latent_space, loaded.classes) == (None, 5)
        if loaded.codebook_size is None:
            assert torch.equal(loaded.latent_mean.expand(4), model.latent_mean.expand(4))
            assert torch.equal(loaded.latent_std.expand(4), model.latent_std.expand(4))
        else:
            assert loaded.sampling == load_pretrained(family, weights, RELEASES[family][1]).sampling

    assert run(capsys, f"family={family}", "to=export", f"weights={ours}", f"out={back}")[0] == 0
    assert same(load_file(back), weights)
    assert robustok.load_pretrained is load_pretrained


@pytest.mark.parametrize(
    ("family", "statistic"),
    [
        ("robustok", "quantize.ema_vocab_hit_SV"),
        ("llamagen_tokenizer", "quantize.codebook_used"),
        ("gigatok_tokenizer", "quantize.codebook_used"),
    ],
)
def test_statistics_that_no_model_of_ours_has_come_back_too(capsys, tmp_path, family, statistic):
    weights, model = released(family)
    weights[statistic] = torch.rand(weights[statistic].shape)
    save_file(weights, tmp_path / "a.safetensors")
    words = [f"family={family}", f"weights={tmp_path}/a.safetensors", f"out={tmp_path}/ours", *config_words(family)]
    assert run(capsys, *words)[0] == 0
    assert same(load_tokenizer(tmp_path / "ours").state_dict(), model.state_dict())
    run(capsys, f"family={family}", "to=export", f"weights={tmp_path}/ours", f"out={tmp_path}/back.safetensors")
    assert same(load_file(tmp_path / "back.safetensors"), weights)


def test_a_trained_decoder_drops_into_the_original_file(capsys, tmp_path):
    """Official loaders are strict: what we have no use for comes from the original."""
    weights, model = released("robustok")
    weights["semantic_model.norm.weight"] = torch.ones(16)
    weights["quantize.ema_vocab_hit_SV"] += 2
    torch.save({"ema": weights}, tmp_path / "main-train.pt")
    for module in model.decoder_modules():
        shaken(module, seed=1)
    write_snapshot(tmp_path / "ours", {"kind": "tokenizer", "config": plain(model.config)}, model.state_dict(), {})
    words = ["family=robustok", "to=export", f"weights={tmp_path}/ours"]
    words += [f"original={tmp_path}/main-train.pt", f"out={tmp_path}/post-train.safetensors"]
    assert run(capsys, *words)[0] == 0
    found = load_file(tmp_path / "post-train.safetensors")
    assert found.keys() == weights.keys()
    changed = {name for name in found if not torch.equal(found[name], weights[name])}
    assert changed == {name for name in weights if name.startswith(("decoder.", "post_quant_conv."))} - {
        "decoder.lvl1LC"
    }
    save_file(released("maskgit_vqgan")[0], tmp_path / "other.safetensors")
    words[3:] = [f"original={tmp_path}/other.safetensors", f"out={tmp_path}/b.safetensors"]
    assert "not those of a robustok model" in refused(capsys, *words)


# Whose latents


@pytest.mark.parametrize(("family", "tokenizer"), [("rar", "robustok"), ("sit", "maetok"), ("lightningdit", "kl")])
def test_a_generator_learns_whose_latents_it_models(capsys, tmp_path, family, tokenizer):
    snapshot, model = tmp_path / "tokenizer", tiny_tokenizer(tokenizer)
    write_snapshot(snapshot, {"kind": "tokenizer", "config": plain(model.config)}, model.state_dict(), {})
    save_file(released(family)[0], tmp_path / "g.safetensors")
    words = [f"family={family}", f"weights={tmp_path}/g.safetensors", f"tokenizer={snapshot}", f"out={tmp_path}/g"]
    assert run(capsys, *words, *config_words(family))[0] == 0
    loaded = load_generator(tmp_path / "g")
    assert (loaded.latent_space, loaded.latent_shape) == (encoder_digest(model), (16, 4))
    if family == "sit":  # MAETok knows the statistics of its latents
        assert run(capsys, *words[:3], f"out={tmp_path}/h", "config.num_heads=2")[0] == 0
        known = load_generator(tmp_path / "h")
        assert (known.latent_mean.item(), known.latent_std.item()) == (0.1, 0.5)


OTHER_TOKENIZERS = {  # generator's family, tokenizer, its other settings, what is said
    "tokens per image": ("rar", "robustok", {"patch_size": 4}, "(codes, tokens per image) (16, 4), the generator (16,"),
    "codes": ("llamagen_gpt", "llamagen", {"quantizer": {"size": 8, "dim": 4}}, "(8, 16), the generator (16, 16)"),
    "latents per image": ("sit", "maetok", {"latents": 8}, "latents of shape (8, 4), the generator (16, 4)"),
    "width": ("lightningdit", "kl", {"dim": 5}, "latents of shape (16, 5), the generator (16, 4)"),
    "tokens for diffusion": ("sit", "robustok", {}, "makes discrete latents, the generator models continuous ones"),
    "vectors for tokens": ("rar", "kl", {}, "makes continuous latents, the generator models discrete ones"),
    "other statistics": ("sit", "maetok", {"latent_mean": 0.2}, "tokenizer gives other latent statistics"),
}


@pytest.mark.parametrize("case", OTHER_TOKENIZERS)
def test_another_tokenizer_is_refused(capsys, tmp_path, case):
    family, name, settings, said = OTHER_TOKENIZERS[case]
    model = tiny_tokenizer(name, **settings)
    write_snapshot(tmp_path / "t", {"kind": "tokenizer", "config": plain(model.config)}, model.state_dict(), {})
    save_file(released(family)[0], tmp_path / "g.safetensors")
    words = [f"family={family}", f"weights={tmp_path}/g.safetensors", f"tokenizer={tmp_path}/t", f"out={tmp_path}/g"]
    assert said in refused(capsys, *words, *config_words(family))


def test_latent_statistics_come_from_their_file(capsys, tmp_path):
    save_file(released("lightningdit")[0], tmp_path / "g.safetensors")
    mean, std = torch.randn(1, 4, 1, 1), torch.rand(1, 4, 1, 1) + 0.5
    torch.save({"mean": mean, "std": std}, tmp_path / "latents_stats.pt")
    words = ["family=lightningdit", f"weights={tmp_path}/g.safetensors", f"out={tmp_path}/g"]
    assert run(capsys, *words, f"statistics={tmp_path}/latents_stats.pt")[0] == 0
    loaded = load_generator(tmp_path / "g")
    assert torch.equal(loaded.latent_mean, mean.double().flatten())
    assert torch.equal(loaded.latent_std, std.double().flatten())


STATISTICS = {  # family, file of statistics, words, what is said
    "missing": ("sit", None, [], "needs the statistics of its latents; give tokenizer=FOLDER"),
    "missing, with a grid": ("lightningdit", None, [], "statistics=latents_stats.pt"),
    "half": ("sit", None, ["config.vq_mean=0.1"], "latent_std is missing"),
    "defaults": ("sit", None, ["config.vq_mean=0", "config.vq_std=1"], "are the defaults 0 and 1"),
    "defaults of the tokenizer": ("maetok_tokenizer", None, [], "left at mean 0 and standard deviation 1"),
    "defaults in a file": ("lightningdit", {"mean": torch.zeros(4), "std": torch.ones(4)}, [], "defaults 0 and 1"),
    "inverted": ("lightningdit", {"mean": torch.zeros(4), "std": torch.full((4,), 40.0)}, [], "looks inverted"),
    "negative": ("lightningdit", {"mean": torch.zeros(4), "std": -torch.ones(4)}, [], "positive ones for the std"),
    "of another width": ("lightningdit", {"mean": torch.zeros(8), "std": torch.ones(8)}, [], "has 8 values"),
    "of something else": ("lightningdit", {"x": torch.zeros(8)}, [], "holds x; expected mean and std"),
    "contradicting": (
        "sit",
        {"mean": torch.zeros(1), "std": torch.tensor(0.5)},
        ["config.vq_mean=0.1", "config.vq_std=0.5"],
        "statistics gives other latent statistics",
    ),
    "for tokens": ("rar", {"mean": torch.zeros(1), "std": torch.ones(1)}, [], "is for diffusion models"),
}


@pytest.mark.parametrize("case", STATISTICS)
def test_wrong_latent_statistics_are_refused(capsys, tmp_path, case):
    family, statistics, words, said = STATISTICS[case]
    save_file(released(family)[0], tmp_path / "g.safetensors")
    if statistics is not None:
        torch.save(statistics, tmp_path / "stats.pt")
        words = [*words, f"statistics={tmp_path}/stats.pt"]
    heads = [] if family in ("rar", "lightningdit") else ["config.num_heads=2"]
    words = [f"family={family}", f"weights={tmp_path}/g.safetensors", f"out={tmp_path}/g", *heads, *words]
    assert said in refused(capsys, *words)


# The discriminator

HEADS = {"heads": 2, "depth": 3, "read_after": (0, 2), "width": 8, "kernel_size": 3}


def test_the_discriminator_comes_along_so_that_post_training_can_carry_it(capsys, tmp_path):
    weights, _ = released("robustok")
    heads = shaken(DinoHeads(DinoConfig(**HEADS)))
    content = {"model": weights, "discriminator": heads.state_dict(), "optimizer_disc": {"state": {}}, "steps": 7}
    torch.save(content, tmp_path / "main-train.pt")
    start = ["family=robustok", f"weights={tmp_path}/main-train.pt", "config.num_heads=2"]
    settings = [f"config.discriminator.{word}" for word in ("num_heads=2", "depth=3", "key_depths=[0,2]")]
    assert run(capsys, *start, *settings, f"out={tmp_path}/a")[0] == 0
    header = header_of(tmp_path / "a")
    assert header["trained_on"] == "converted from main-train.pt, model, with its discriminator"
    config = carried_config(header["discriminator"], PatchConfig(), source="test")
    assert config == DinoConfig(**HEADS)
    carried = DinoHeads(config)
    carried.load_state_dict(load_file(tmp_path / "a" / "discriminator.safetensors"))
    assert same(carried.state_dict(), heads.state_dict())

    assert "heads 6 do not divide width 8" in refused(capsys, *start, f"out={tmp_path}/b")
    assert run(capsys, *start, f"out={tmp_path}/b", "discriminator=false")[0] == 0
    assert "discriminator" not in header_of(tmp_path / "b")
    assert header_of(tmp_path / "b")["trained_on"].endswith("; its discriminator is not used")
    assert not (tmp_path / "b" / "discriminator.safetensors").exists()


def test_a_discriminator_of_another_kind_is_mentioned_and_left(capsys, tmp_path):
    weights, _ = released("gigatok_tokenizer")
    torch.save({"ema": weights, "discriminator": {"main.0.weight": torch.ones(2)}}, tmp_path / "a.pt")
    words = ["family=gigatok", f"weights={tmp_path}/a.pt", f"out={tmp_path}/a", *config_words("gigatok_tokenizer")]
    assert run(capsys, *words)[0] == 0
    assert header_of(tmp_path / "a")["trained_on"] == "converted from a.pt, ema; its discriminator is not used"


# The licence


@pytest.mark.parametrize(
    ("family", "licence", "use"),
    [
        ("llamagen_tokenizer", None, None),
        ("robustok", None, "UNCLEAR"),
        ("maetok_tokenizer", None, "UNCLEAR"),
        ("vavae", "CC-BY-NC-4.0", "NOT PERMITTED"),
        ("vavae", "some research licence, non-commercial", "NOT PERMITTED"),
        ("robustok", "Apache-2.0", None),
    ],
)
def test_the_card_says_what_the_licence_permits(capsys, tmp_path, family, licence, use):
    save_file(released(family)[0], tmp_path / "a.safetensors")
    words = [f"family={family}", f"weights={tmp_path}/a.safetensors", f"out={tmp_path}/a", *config_words(family)]
    assert run(capsys, *words, *([f"licence={licence}"] if licence else []))[0] == 0
    card = (tmp_path / "a" / "README.md").read_text()
    assert f"Of the original weights: {licence or FAMILIES[family].model.licence}." in card
    assert ("commercial_use" in card) == (use is not None)
    assert use is None or f"- commercial_use: {use}" in card


# Abuse


class Payload:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def cut_off(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def transpose(name):
    return lambda w: w.update({name: w[name].transpose(0, 1).contiguous()})


ABUSE = {  # family, what happens to the weights, what happens to the file, what is said
    "missing": ("robustok", lambda w: w.pop("decoder.mask_token"), None, "missing decoder.mask_token"),
    "missing source of sizes": ("rar", lambda w: w.pop("lm_head.weight"), None, "lm_head.weight is missing"),
    "missing head": ("llamagen_gpt", lambda w: w.pop("output.weight"), None, "missing output.weight"),
    "missing code": (
        "maskgit_vqgan",
        lambda w: w.pop("quantize.embedding.weight"),
        None,
        "embedding.weight is missing",
    ),
    "extra": ("rar", lambda w: w.update(extra=torch.ones(1)), None, "unexpected extra"),
    "extra of a tokenizer": ("vavae", lambda w: w.update(extra=torch.ones(1)), None, "unexpected extra"),
    "transposed": ("robustok", transpose("encoder.model.blocks.0.mlp.fc1.weight"), None, "(16, 64), expected (64, 16)"),
    "transposed codebook": ("robustok", transpose("quantize.embedding.weight"), None, "embedding.weight is (4, 16)"),
    "transposed head": (
        "lightningdit",
        transpose("final_layer.linear.weight"),
        None,
        "final_layer.linear.weight is (16",
    ),
    "transposed MLP": ("maetok_tokenizer", transpose("decoder.to_pixel.model.weight"), None, "expected (48, 16)"),
    "other levels": ("robustok", lambda w: w["encoder.lvl1LC"].zero_(), None, "encoder.lvl1LC has other values"),
    "other positions": ("sit", lambda w: w["pos_embed"].zero_(), None, "pos_embed has other values"),
    "integers": ("rar", lambda w: w.update(cls_token=w["cls_token"].long()), None, "cls_token is torch.int64"),
    "not a tensor": ("rar", lambda w: w.update(cls_token=3), None, "'cls_token' is a int"),
    "no numbers": (
        "vavae",
        lambda w: w["quant_conv.bias"].fill_(float("nan")),
        None,
        "weights.pt: quant_conv.bias holds NaN",
    ),
    "dead codes": ("maskgit_vqgan", lambda w: w["quantize.embedding.weight"].zero_(), None, "codes are zero"),
    "nothing": ("rar", lambda w: w.clear(), None, "holds no state dict"),
    "truncated": ("rar", None, cut_off, "is cut off"),
    "gone": ("rar", None, lambda file: file.unlink(), "No such file"),
}


@pytest.mark.parametrize("case", ABUSE)
def test_abuse_is_one_line_and_nothing_is_written(capsys, tmp_path, case):
    family, change, break_file, said = ABUSE[case]
    given, file = released(family)[0], tmp_path / "weights.pt"
    if change:
        change(given)
    torch.save(given, file)
    if break_file:
        break_file(file)
    before = sorted(tmp_path.iterdir())
    words = [f"family={family}", f"weights={file}", f"out={tmp_path}/out", *config_words(family)]
    assert said in refused(capsys, *words)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_a_payload_does_not_run(capsys, tmp_path, family):
    mark = tmp_path / "ran"
    payload = Payload(f"touch {mark}")
    pickle.loads(pickle.dumps(payload))
    assert mark.exists()  # it works where it is let
    mark.unlink()
    weights, _ = released(family)
    torch.save(weights | {next(iter(weights)): payload}, tmp_path / "a.pt")
    words = [f"family={family}", f"weights={tmp_path}/a.pt", f"out={tmp_path}/a", *config_words(family)]
    assert "is a _Stub" in refused(capsys, *words)
    torch.save({"args": payload, "model": weights}, tmp_path / "a.pt")
    assert run(capsys, *words)[0] == 0  # beside the weights it is an empty object
    assert not mark.exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_another_family_are_refused_by_name(capsys, tmp_path, family):
    names = list(FAMILIES)
    other = names[(names.index(family) + 1) % len(names)]
    save_file(released(other)[0], tmp_path / "weights.safetensors")
    words = [f"family={family}", f"weights={tmp_path}/weights.safetensors", f"out={tmp_path}/out"]
    assert f"try family={other}" in refused(capsys, *words)


def test_an_unknown_family_is_named_before_anything_is_read(capsys, tmp_path):
    words = ["family=pixart", f"weights={tmp_path}/gone.pt", f"out={tmp_path}/out"]
    assert "unknown family 'pixart'; known: robustok, rar" in refused(capsys, *words)


def test_nothing_is_overwritten(capsys, tmp_path):
    save_file(released("rar")[0], tmp_path / "g.safetensors")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years")
    code, _, err = run(capsys, "family=rar", f"weights={tmp_path}/g.safetensors", f"out={tmp_path}/out")
    assert code == 2
    assert "exists and holds something else" in err
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years"


def test_the_way_back_is_refused_where_there_is_none(capsys, tmp_path):
    model = tiny_generator("rar")
    header = {"kind": "generator", "config": plain(model.config), "latent_shape": [16, 4], "latent_space": None}
    header |= {"codebook_size": 16, "classes": 5}
    write_snapshot(tmp_path / "g", header, model.state_dict(), {})
    back = ["to=export", f"weights={tmp_path}/g"]
    assert ".safetensors" in refused(capsys, "family=rar", *back, f"out={tmp_path}/g.pt")
    assert "holds a RAR, which is no sit" in refused(capsys, "family=sit", *back, f"out={tmp_path}/a.safetensors")


def test_a_model_of_our_own_size_goes_out_and_comes_back(capsys, tmp_path):
    """Tables without the spare rows that releases have."""
    model = shaken(RAR(RARConfig(width=16, depth=1, heads=2), codebook_size=16, length=9, classes=5))
    save_file(export_weights(model), tmp_path / "g.safetensors")
    assert run(capsys, "family=rar", f"weights={tmp_path}/g.safetensors", f"out={tmp_path}/g")[0] == 0
    assert same(load_generator(tmp_path / "g").state_dict(), model.state_dict())
    assert load_generator(tmp_path / "g").length == 9
