"""Released layouts are made here from models of ours with random weights; nothing is downloaded."""

import argparse
import os
import pickle
import zipfile
from collections import OrderedDict, UserList

import pytest
import torch
from safetensors.torch import load_file, save_file

import robustok
from robustok.checkpoints import read_checkpoint
from robustok.cli import main
from robustok.convert import FAMILIES, load_released, to_released
from robustok.generators import load_generator
from robustok.generators.rar import RAR, RARConfig
from robustok.generators.sampling import Sampling, image_rngs
from robustok.tokenizers import load_tokenizer
from robustok.tokenizers.robustok import RobusTok, RobusTokConfig
from robustok.types import UserError

# The release's form of a configuration, with much that is of no concern to the weights.
TOKENIZER_CONFIG = {
    "vq_model": "VQ-16",
    "encoder_model": "vit_base_patch14_dinov2.lvd142m",
    "backbone_overrides": {"num_heads": 4, "img_size": 32, "patch_size": 8, "mlp_ratio": 4.0, "drop_path_rate": 0.1},
    "codebook_l2_norm": True,
    "v_patch_nums": [4],
    "product_quant": 1,
    "num_latent_tokens": 16,
    "start_drop": 3,
    "clip_norm": False,
}
RAR_CONFIG = {"model": {"vq_model": {"codebook_size": 24}, "generator": {"num_attention_heads": 2, "dropout": 0.2}}}


def shake(model, seed=0):
    """Give every weight a value that matters, those that start at zero too."""
    rng = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=rng)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer():
    vit = {"width": 16, "depth": 2, "heads": 4, "layer_scale": 1e-5}
    quantizer = {"size": 24, "dim": 6}
    config = {"image_size": 32, "patch_size": 8, "encoder": vit, "decoder": vit | {"depth": 3}, "quantizer": quantizer}
    return shake(RobusTok(RobusTokConfig(**config)))


@pytest.fixture(scope="module")
def generator():
    config = RARConfig(width=16, depth=2, heads=2, position_rows=1024 + 9, timestep_rows=100 + 9)
    return shake(RAR(config, codebook_size=24, length=9, classes=5))


@pytest.fixture
def weights(tokenizer, generator):
    """Released weights by family; a test may change them."""
    teacher = {"semantic_model.cls_token": torch.zeros(1, 1, 16), "semantic_model.norm.weight": torch.ones(16)}
    return {"robustok": to_released(tokenizer) | teacher, "rar": to_released(generator)}


def configs(family):
    return {"robustok": TOKENIZER_CONFIG, "rar": RAR_CONFIG}[family]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


# Models


def test_a_released_tokenizer_gives_the_same_latents_tokens_and_images(tokenizer, weights):
    loaded = load_released("robustok", weights["robustok"], TOKENIZER_CONFIG)
    assert torch.equal(loaded.features(images()), tokenizer.features(images()))
    assert torch.equal(loaded.encode(images()), tokenizer.encode(images()))
    tokens = torch.arange(32).reshape(2, 16) % 24
    assert torch.equal(loaded.decode(tokens), tokenizer.decode(tokens))
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert (loaded.image_size, loaded.latent_shape, loaded.config.encoder.drop_path) == (32, (16, 6), 0.1)


def test_a_released_generator_gives_the_same_logits_and_samples(generator, weights):
    loaded = load_released("rar", weights["rar"])  # every size, heads too, is in the shapes
    tokens, labels = torch.arange(18).reshape(2, 9), torch.tensor([0, 5])
    orders = torch.stack([torch.arange(9), torch.arange(8, -1, -1)])
    assert torch.equal(loaded.logits(tokens, labels, orders), generator.logits(tokens, labels, orders))
    settings = Sampling(guidance_scale=3.0)
    samples = [m.generate(labels, settings, image_rngs(0, range(2))) for m in (loaded, generator)]
    assert torch.equal(*samples)
    assert (loaded.latent_shape, loaded.latent_space, loaded.sampling) == ((9, 64), None, Sampling())
    assert (loaded.length, loaded.classes, loaded.config.heads) == (9, 5, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_bit_for_bit(family, weights):
    expected = {name: t for name, t in weights[family].items() if not name.startswith("semantic_model.")}
    assert same(to_released(load_released(family, weights[family], configs(family))), expected)


def test_the_released_tokenizer_has_the_official_names_and_shapes(weights):
    found = {name: tuple(tensor.shape) for name, tensor in weights["robustok"].items()}
    for name, shape in {
        "encoder.model.patch_embed.proj.weight": (16, 3, 8, 8),
        "encoder.latent_tokens": (1, 16, 16),
        "encoder.lvl_embed.weight": (2, 16),
        "encoder.lvl1LC": (1, 33),
        "quant_conv.weight": (6, 16, 1, 1),
        "quantize.embedding.weight": (24, 6),
        "quantize.ema_vocab_hit_SV": (24,),
        "post_quant_conv.weight": (16, 6, 1, 1),
        "decoder.model.blocks.2.ls2.gamma": (16,),
        "decoder.lvl1LC": (1, 34),
        "decoder.to_pixel.model.bias": (192,),
    }.items():
        assert found.pop(name) == shape
    assert weights["robustok"]["decoder.lvl1LC"].tolist() == [[0] * 17 + [1] * 17]
    assert not any(name.startswith("decoder.model.patch_embed") for name in found)


def test_the_papers_generators_bring_their_sampling():
    config = RARConfig(width=1024, depth=24, heads=16, mlp_ratio=0.01)
    with torch.device("meta"):
        given = {name: torch.empty(t.shape) for name, t in RAR(config, 8, 4, 3).state_dict().items()}
    build = lambda: FAMILIES["rar"].build(given, {})  # noqa: E731
    with torch.device("meta"):
        assert build().sampling == Sampling(guidance_scale=6.75, guidance_power=1.01, temperature=1.04)


# The configuration


@pytest.mark.parametrize(
    ("family", "config", "said"),
    [
        ("robustok", {}, "num_heads"),
        ("robustok", {"num_head": 4}, "did you mean 'num_heads'"),
        ("robustok", {"num_heads": 3}, "do not divide width 16"),
        ("robustok", {"num_heads": 4, "img_size": 64}, "img_size = 64, the weights have 32"),
        ("robustok", {"num_heads": 4, "product_quant": 2}, "product_quant"),
        ("rar", {"num_attention_heads": 4}, "num_attention_heads = 4, the weights have 2"),
        ("rar", {"image_seq_len": 4000}, "too few for 4000 tokens"),
        ("dit", {}, "known: robustok, rar"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(weights, family, config, said):
    with pytest.raises(UserError, match=said) as error:
        load_released(family, weights.get(family, {}), config)
    assert "\n" not in str(error.value)


def test_the_number_of_heads_matters(tokenizer, weights):
    two = load_released("robustok", weights["robustok"], {"heads": 2})
    assert not torch.allclose(two.features(images()), tokenizer.features(images()))


# Files


class Arguments(UserList):
    """Stands for a foreign class, filled item by item."""


class Payload:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def checkpoint(weights, **more):
    """A file as released training writes it, arguments of foreign classes included."""
    arguments = argparse.Namespace(rate=Arguments([0.1]), names=OrderedDict(a=1))
    return {"model": weights, "optimizer": {"step": 3}, "steps": 7, "args": arguments, **more}


def test_averaged_weights_are_preferred(tmp_path, weights):
    other = {name: tensor + 1 for name, tensor in weights["rar"].items()}
    for file, content, part, expected in (
        ("a.pt", checkpoint(other, ema=weights["rar"]), "ema", weights["rar"]),
        ("b.pt", checkpoint(other, ema=None), "model", other),
        ("c.bin", OrderedDict(weights["rar"]), "flat state dict", weights["rar"]),
    ):
        torch.save(content, tmp_path / file)
        found, used = read_checkpoint(tmp_path / file)
        assert used == part
        assert same(found, expected)
    assert same(to_released(load_released("rar", checkpoint(other, ema=weights["rar"]))), weights["rar"])


def test_views_parameters_and_other_dtypes_are_read(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    content = {
        "view": base.t()[1:],
        "parameter": torch.nn.Parameter(base),
        "half": base.half(),
        "bf16": base.bfloat16(),
    }
    torch.save(content, tmp_path / "a.pt")
    assert same(read_checkpoint(tmp_path / "a.pt")[0], {name: t.detach() for name, t in content.items()})


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_payload_does_not_run(tmp_path, weights, protocol):
    mark = tmp_path / "ran"
    payload = Payload(f"touch {mark}")
    pickle.loads(pickle.dumps(payload))
    assert mark.exists()  # it works where it is let
    mark.unlink()
    torch.save(checkpoint(weights["rar"], payload=payload), tmp_path / "a.pt", pickle_protocol=protocol)
    assert same(read_checkpoint(tmp_path / "a.pt")[0], weights["rar"])  # beside the weights it is an empty object
    torch.save(weights["rar"] | {"cls_token": payload}, tmp_path / "b.pt", pickle_protocol=protocol)
    with pytest.raises(UserError, match="'cls_token' is a _Stub"):
        read_checkpoint(tmp_path / "b.pt")
    (tmp_path / "c.pt").write_bytes(pickle.dumps(payload))  # no archive
    with pytest.raises(UserError, match="nor"):
        read_checkpoint(tmp_path / "c.pt")
    assert not mark.exists()


# The verb


def run(capsys, *words):
    capsys.readouterr()
    code = main(["convert", *words])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_verb_makes_snapshots_that_load_and_takes_them_back(capsys, tmp_path, tokenizer, generator, weights):
    torch.save(checkpoint({}, ema=weights["robustok"]), tmp_path / "main-train.pt")
    save_file(weights["rar"], tmp_path / "rar.safetensors")
    ours, theirs = tmp_path / "tokenizer", tmp_path / "generator"
    words = ["family=robustok", f"weights={tmp_path}/main-train.pt", f"out={ours}", "config.num_heads=4"]
    assert run(capsys, *words) == (0, f"{ours}\n", "")
    words = ["family=rar", f"weights={tmp_path}/rar.safetensors", f"out={theirs}"]
    assert run(capsys, *words)[0] == 0
    assert same(load_tokenizer(ours).state_dict(), tokenizer.state_dict())
    assert "main-train.pt, ema" in (ours / "config.yaml").read_text()
    loaded = load_generator(theirs)
    assert same(loaded.state_dict(), generator.state_dict())
    assert loaded.latent_space is None

    for family, folder in (("robustok", ours), ("rar", theirs)):
        out = tmp_path / f"back-{family}.safetensors"
        assert run(capsys, f"family={family}", f"weights={folder}", f"out={out}", "to=released")[0] == 0
        assert same(load_file(out), {n: t for n, t in weights[family].items() if not n.startswith("semantic_model.")})
        assert load_released(family, out, configs(family)) is not None
    assert robustok.load_released is load_released


def test_a_generator_learns_whose_tokens_it_models(capsys, tmp_path, tokenizer, weights):
    save_file(to_released(tokenizer), tmp_path / "t.safetensors")
    run(capsys, "family=robustok", f"weights={tmp_path}/t.safetensors", f"out={tmp_path}/t", "config.num_heads=4")
    words = ["family=rar", f"weights={tmp_path}/g.safetensors", f"out={tmp_path}/g", f"tokenizer={tmp_path}/t"]
    save_file(weights["rar"], tmp_path / "g.safetensors")
    code, _, err = run(capsys, *words)
    assert code == 2
    assert "(24, 16), the generator (24, 9)" in err
    fitting = shake(RAR(RARConfig(width=16, depth=1, heads=2), codebook_size=24, length=16, classes=5))
    save_file(to_released(fitting), tmp_path / "g.safetensors")
    assert run(capsys, *words)[0] == 0
    loaded = load_generator(tmp_path / "g")
    assert loaded.latent_space == robustok.tokenizers.encoder_digest(load_tokenizer(tmp_path / "t"))
    assert loaded.latent_shape == (16, 6)


def cut_off(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def damage(file):
    """A whole archive whose pickle is cut."""
    with zipfile.ZipFile(file) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data[: len(data) // 2] if name.endswith("data.pkl") else data)


ABUSE = {  # family, what happens to the weights, what happens to the file, what is said
    "missing": ("robustok", lambda w: w.pop("decoder.mask_token"), None, "missing decoder.mask_token"),
    "missing source of sizes": ("rar", lambda w: w.pop("lm_head.weight"), None, "lm_head.weight is missing"),
    "extra": ("rar", lambda w: w.update(extra=torch.ones(1)), None, "unexpected extra"),
    "transposed": (
        "robustok",
        lambda w: w.update({"encoder.model.blocks.0.mlp.fc1.weight": torch.ones(16, 64)}),
        None,
        "encoder.model.blocks.0.mlp.fc1.weight is (16, 64), expected (64, 16)",
    ),
    "transposed codebook": (
        "robustok",
        lambda w: w.update({"quantize.embedding.weight": torch.ones(6, 24)}),
        None,
        "quantize.embedding.weight is (6, 24)",
    ),
    "other levels": ("robustok", lambda w: w["encoder.lvl1LC"].zero_(), None, "encoder.lvl1LC has other values"),
    "integers": ("rar", lambda w: w.update(cls_token=w["cls_token"].long()), None, "cls_token is torch.int64"),
    "not a tensor": ("rar", lambda w: w.update(cls_token=3), None, "'cls_token' is a int"),
    "nothing": ("rar", lambda w: w.clear(), None, "holds no state dict"),
    "truncated": ("rar", None, cut_off, "is cut off"),
    "damaged": ("rar", None, damage, "cannot be read as a PyTorch checkpoint"),
    "gone": ("rar", None, lambda file: file.unlink(), "is no file"),
}


@pytest.mark.parametrize("case", ABUSE)
def test_abuse_is_one_line_and_nothing_is_written(capsys, tmp_path, weights, case):
    family, change, break_file, said = ABUSE[case]
    given = {name: tensor.clone() for name, tensor in weights[family].items()}
    if change:
        change(given)
    file = tmp_path / "weights.pt"
    torch.save(given, file)
    if break_file:
        break_file(file)
    before = sorted(tmp_path.iterdir())
    heads = ["config.num_heads=4"] if family == "robustok" else []
    code, out, err = run(capsys, f"family={family}", f"weights={file}", f"out={tmp_path}/out", *heads)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert said in err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_another_family_are_refused(capsys, tmp_path, weights, family):
    other = next(name for name in FAMILIES if name != family)
    save_file(weights[other], tmp_path / "weights.safetensors")
    code, _, err = run(capsys, f"family={family}", f"weights={tmp_path}/weights.safetensors", f"out={tmp_path}/out")
    assert code == 2
    assert "another family" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(capsys, tmp_path, weights):
    save_file(weights["rar"], tmp_path / "g.safetensors")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years")
    code, _, err = run(capsys, "family=rar", f"weights={tmp_path}/g.safetensors", f"out={tmp_path}/out")
    assert code == 2
    assert "exists" in err
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years"


def test_a_truncated_safetensors_file_is_refused(tmp_path, weights):
    save_file(weights["rar"], tmp_path / "g.safetensors")
    cut_off(tmp_path / "g.safetensors")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        load_released("rar", tmp_path / "g.safetensors")


def test_a_released_file_must_be_named_safetensors(capsys, tmp_path, weights):
    save_file(weights["rar"], tmp_path / "g.safetensors")
    run(capsys, "family=rar", f"weights={tmp_path}/g.safetensors", f"out={tmp_path}/g")
    code, _, err = run(capsys, "family=rar", "to=released", f"weights={tmp_path}/g", f"out={tmp_path}/g.pt")
    assert code == 2
    assert ".safetensors" in err


def test_weights_without_a_released_place_are_not_dropped():
    vit = {"width": 16, "depth": 1, "heads": 2}
    config = RobusTokConfig(image_size=16, patch_size=8, latents=9, encoder=vit, decoder=vit)
    with pytest.raises(UserError, match="no place for decoder"):
        to_released(RobusTok(config))
    with pytest.raises(UserError, match="Linear has no released layout"):
        to_released(torch.nn.Linear(2, 2))
