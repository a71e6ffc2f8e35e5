"""Pretrained layouts are made here from models of ours with random weights; nothing is downloaded."""

import json

import pytest
import torch
from safetensors.torch import save_file

import robustok
from robustok.errors import UserError
from robustok.generators.rar import RAR, RARConfig
from robustok.generators.sampling import Sampling
from robustok.pretrained.export import export_weights
from robustok.pretrained.families import ALIASES, FAMILIES, choose_family, families_named, recognise
from robustok.pretrained.load import load_pretrained
from robustok.randomness import image_rngs
from robustok.tokenizers.robustok import RobusTok, RobusTokConfig
from tiny_models import PLAIN, RELEASES, VIT, released, tiny_generator, tiny_tokenizer

# The release's form of a configuration, with much that is of no concern to the weights.
TOKENIZER_CONFIG = {
    "vq_model": "VQ-16",
    "encoder_model": "vit_base_patch14_dinov2.lvd142m",
    "backbone_overrides": {"num_heads": 2, "img_size": 8, "patch_size": 2, "mlp_ratio": 4.0, "drop_path_rate": 0.1},
    "codebook_l2_norm": True,
    "v_patch_nums": [4],
    "product_quant": 1,
    "num_latent_tokens": 16,
    "start_drop": 3,
    "clip_norm": False,
}
RAR_CONFIG = {"model": {"vq_model": {"codebook_size": 16}, "generator": {"num_attention_heads": 2, "dropout": 0.2}}}


def slim():
    return tiny_tokenizer("robustok", encoder=VIT | {"mlp_ratio": 2.7})


def middle(blocks):
    return {side: sizes | {"middle_blocks": blocks} for side, sizes in PLAIN.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def images():
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="module")
def every():
    """Pretrained weights by family; tests leave them as they are."""
    assert RELEASES.keys() == FAMILIES.keys()  # a new family gets a line in tiny_models.py
    return {family: released(family)[0] for family in FAMILIES}


# Loading


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pretrained_model_does_what_it_did_and_is_exported_bit_for_bit(family):
    weights, model = released(family)
    loaded = robustok.load_pretrained(family, weights, RELEASES[family][1])
    assert type(loaded) is type(model)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert same(export_weights(loaded), weights)
    if FAMILIES[family].kind == "tokenizer":
        latents = model.encode(images())
        assert torch.equal(loaded.encode(images()), latents)
        assert torch.equal(loaded.decode(latents), model.decode(latents))
        assert (loaded.image_size, loaded.latent_shape) == (8, (16, 4))
        return
    labels = torch.tensor([0, 5])
    assert (loaded.classes, loaded.latent_shape[0], loaded.latent_space) == (5, 16, None)
    if loaded.codebook_size is None:
        latents = torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(0))
        assert torch.equal(loaded.velocity(latents, 0.3, labels), model.velocity(latents, 0.3, labels))
        assert torch.equal(loaded.normalise(latents), model.normalise(latents))
    else:
        tokens = torch.arange(32).reshape(2, 16) % 16
        assert torch.equal(loaded.logits(tokens, labels), model.logits(tokens, labels))
        samples = [m.generate(labels, Sampling(guidance_scale=3.0), image_rngs(0, range(2))) for m in (loaded, model)]
        assert torch.equal(*samples)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_brings_its_configuration(family, every, tmp_path):
    """As metadata, with tensors that are none of the model's; nothing else is given."""
    metadata = {"state_keys": json.dumps([*every[family]]), "config": json.dumps(RELEASES[family][1])}
    save_file(every[family] | {"output.x": torch.ones(1)}, tmp_path / "a.safetensors", metadata)
    assert same(export_weights(load_pretrained(family, tmp_path / "a.safetensors")), every[family])
    with pytest.raises(UserError, match=r"unexpected output\.x"):
        load_pretrained(family, every[family] | {"output.x": torch.ones(1)}, metadata["config"])
    if RELEASES[family][1]:
        with pytest.raises(UserError, match="config"):
            load_pretrained(family, tmp_path / "a.safetensors", {"depth": 3, "n_layer": 3, "ch": 3, "n_head": 3})


def test_a_configuration_of_the_file_is_named_as_such(every, tmp_path):
    save_file(every["robustok"], tmp_path / "a.safetensors", {"config": '{"num_heads": 2, "embed_dim": 8}'})
    with pytest.raises(UserError, match=r"embed_dim = 8, the weights have 16.*This config is the one in the file"):
        load_pretrained("robustok", tmp_path / "a.safetensors")
    assert load_pretrained("robustok", tmp_path / "a.safetensors", {"num_heads": 2}).config.encoder.heads == 2


def test_averaged_weights_are_preferred_and_the_teacher_is_dropped(every):
    other = {name: tensor + 1 for name, tensor in every["rar"].items()}
    assert same(export_weights(load_pretrained("rar", {"model": other, "ema": every["rar"]})), every["rar"])
    teacher = {"semantic_model.cls_token": torch.zeros(1, 1, 16), "semantic_model.norm.weight": torch.ones(16)}
    assert same(
        export_weights(load_pretrained("robustok", every["robustok"] | teacher, TOKENIZER_CONFIG)), every["robustok"]
    )


def test_orders_are_visited_as_they_were(every):
    model = released("rar")[1]
    tokens, labels = torch.arange(32).reshape(2, 16) % 16, torch.tensor([0, 5])
    orders = torch.stack([torch.arange(16), torch.arange(15, -1, -1)])
    loaded = load_pretrained("rar", every["rar"], RAR_CONFIG)
    assert torch.equal(loaded.logits(tokens, labels, orders), model.logits(tokens, labels, orders))
    assert torch.equal(loaded.logits(tokens, labels, orders[1]), model.logits(tokens, labels, orders[1].repeat(2, 1)))
    assert (loaded.config.heads, loaded.config.dropout, loaded.sampling) == (2, 0.2, Sampling())


def test_the_exported_tokenizer_has_the_names_and_shapes_of_the_authors(every):
    found = {name: tuple(tensor.shape) for name, tensor in every["robustok"].items()}
    for name, shape in {
        "encoder.model.patch_embed.proj.weight": (16, 3, 2, 2),
        "encoder.latent_tokens": (1, 16, 16),
        "encoder.lvl_embed.weight": (2, 16),
        "encoder.lvl1LC": (1, 33),
        "quant_conv.weight": (4, 16, 1, 1),
        "quantize.embedding.weight": (16, 4),
        "quantize.ema_vocab_hit_SV": (16,),
        "post_quant_conv.weight": (16, 4, 1, 1),
        "decoder.model.blocks.0.mlp.fc2.bias": (16,),
        "decoder.lvl1LC": (1, 34),
        "decoder.to_pixel.model.bias": (12,),
    }.items():
        assert found.pop(name) == shape
    assert every["robustok"]["decoder.lvl1LC"].tolist() == [[0] * 17 + [1] * 17]
    assert not any(name.startswith("decoder.model.patch_embed") for name in found)


@pytest.mark.parametrize(("codes", "scale", "width"), [(4096, 6.75, 64), (1024, 15.5, 256), (8, 1.0, 64)])
def test_published_generators_bring_their_sampling(codes, scale, width):
    config = RARConfig(width=1024, depth=24, heads=16, mlp_ratio=0.01)
    with torch.device("meta"):
        given = {name: torch.empty(t.shape) for name, t in RAR(config, codes, 4, 3).state_dict().items()}
        loaded = FAMILIES["rar"].build(given, {})
    assert loaded.sampling.guidance_scale == scale
    assert loaded.latent_shape == (4, width)


def test_weights_that_the_layout_does_not_have_are_not_dropped():
    vit = {"width": 16, "depth": 1, "heads": 2}
    config = RobusTokConfig(image_size=16, patch_size=8, latents=9, encoder=vit, decoder=vit)
    with pytest.raises(UserError, match="no place for decoder"):
        export_weights(RobusTok(config))
    with pytest.raises(UserError, match="Linear has no layout"):
        export_weights(torch.nn.Linear(2, 2))


def test_the_discriminator_of_another_variant_is_refused():
    weights = {"heads.0.0.0.weight_orig": torch.ones(8, 8, 1), "heads.0.1.fn.0.weight_orig": torch.ones(8, 8, 3)}
    settings = FAMILIES["robustok"].discriminator
    assert settings(weights, {"num_heads": 2, "input_size": None}) == {"heads": 2, "width": 8, "kernel_size": 3}
    with pytest.raises(UserError, match="config gives norm_type = 'gn', the weights have 'bn'"):
        settings(weights, {"norm_type": "gn"})


# Names


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        *((family, (family,)) for family in FAMILIES),
        ("RobusTok", ("robustok",)),
        ("robustok-tokenizer", ("robustok",)),
        ("rar_generator", ("rar",)),
        ("RAR-XL", ("rar",)),
        ("SiT-XL/1", ("sit",)),
        ("lightningdit_xl", ("lightningdit",)),
        ("MaskGIT", ("maskgit_vqgan",)),
        ("maetok", ("maetok_tokenizer",)),
        ("maetok_tokenizer_ape", ("maetok_tokenizer",)),
        ("VA-VAE", ("vavae",)),
        ("vae", ("vavae",)),
        ("llamagen", ("llamagen_tokenizer", "llamagen_gpt")),
        ("LlamaGen GPT", ("llamagen_gpt",)),
        ("gigatok", ("gigatok_tokenizer", "gigatok_gpt")),
        ("gigatok_gpt_adaln", ("gigatok_gpt",)),
    ],
)
def test_a_name_that_can_mean_one_thing_is_taken(name, meant):
    assert families_named(name) == meant


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("dits", "dit"),
        ("site", "sit"),
        ("rarity", "rar"),
        ("llama_gen", "llamagen"),
        ("vqgan", ""),
        ("", ""),
        ("é", ""),
    ],
)
def test_other_names_are_refused_with_the_known_ones(name, near):
    with pytest.raises(UserError, match=f"known: robustok, rar, .*did you mean '{near}") as error:
        families_named(name)
    assert all(family in str(error.value) for family in FAMILIES)


def test_the_weights_distinguish_tokenizer_and_gpt(every):
    for name in ("llamagen", "gigatok"):
        for family in ALIASES[name]:
            assert choose_family(name, every[family]) == family
    with pytest.raises(UserError, match="means llamagen_tokenizer or llamagen_gpt, and the weights look like sit"):
        choose_family("llamagen", every["sit"])
    with pytest.raises(UserError, match="the weights are of none of them"):
        choose_family("gigatok", {"x": torch.ones(1)})


# What does not fit


@pytest.mark.parametrize("family", FAMILIES)
def test_the_weights_of_every_other_family_are_refused_by_name(every, family):
    assert recognise(every[family]) == family
    for other, weights in every.items():
        for config in ({}, RELEASES[family][1], RELEASES[other][1]):
            if other != family:
                with pytest.raises(UserError, match=f"These look like the weights of {other}: try family={other}$"):
                    load_pretrained(family, weights, config)


def test_weights_of_no_family_are_refused():
    for family, (_, config) in RELEASES.items():
        with pytest.raises(UserError, match="another family"):
            load_pretrained(family, {"conv.weight": torch.zeros(3, 3)}, config)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_key_too_few_or_too_many_and_a_transposed_shape_are_named(every, family):
    """Each of a few tensors spread over the file."""
    names = sorted(every[family].keys() - {"quantize.codebook_used"})  # which may be left out
    for name in names[:: len(names) // 5]:
        tensor = every[family][name]
        without = {key: tensor for key, tensor in every[family].items() if key != name}
        changed = [without, without | {f"{name}_": tensor}]
        if tensor.ndim > 1 and tensor.shape != tensor.transpose(0, 1).shape:
            changed.append(without | {name: tensor.transpose(0, 1)})
        for given in changed:
            with pytest.raises(UserError) as error:
                load_pretrained(family, given, RELEASES[family][1])
            assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"unexpected surprise\.weight"):
        load_pretrained(family, every[family] | {"surprise.weight": torch.ones(1)}, RELEASES[family][1])


@pytest.mark.parametrize(
    ("family", "config", "said"),
    [
        ("robustok", {}, "num_heads"),
        ("robustok", {"num_head": 4}, "did you mean 'num_heads'"),
        ("robustok", {"num_heads": 3}, "do not divide width 16"),
        ("robustok", {"num_heads": 2, "img_size": 64}, "img_size = 64, the weights have 8"),
        ("robustok", {"num_heads": 2, "product_quant": 2}, "product_quant"),
        ("rar", {"num_attention_heads": 4}, "num_attention_heads = 4, the weights have 2"),
        ("rar", {"image_seq_len": 4000}, "too few for 4000 tokens"),
        ("rar", "{width", "no JSON"),
        ("llamagen_tokenizer", {"codebook_size": 32}, "codebook_size = 32, the weights have 16"),
        ("llamagen_gpt", {"n_head": 2}, "lacks block_size"),
        ("gigatok_tokenizer", {"norm_groups": 4}, "lacks encoder_heads"),
        ("gigatok_gpt", {"n_head": 2, "use_adaLN": False}, "use_adaLN = False, the weights have True"),
        ("maskgit_vqgan", {"norm_groups": 3}, "groups 3 do not divide"),
        ("maetok_tokenizer", {"num_heads": 2, "vq_std": 0}, "latent_std"),
        ("sit", {"num_heads": 2, "vq_mean": 0.1}, "latent_std is missing"),
        ("vavae", {"norm_groups": 4, "embed_dim": 8}, "embed_dim = 8, the weights have 4"),
        ("lightningdit", {"num_heads": 4}, "num_heads = 4, the weights have 2"),
        ("lightningdit", {"mean": [0.1] * 3, "std": [1.0] * 3}, "has 3 values"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(every, family, config, said):
    with pytest.raises(UserError, match=said) as error:
        load_pretrained(family, every[family], config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("family", "model", "config"),
    [
        ("robustok", slim, {"num_heads": 2}),
        ("robustok", slim, {"num_heads": 2, "mlp_ratio": 2.7}),
        ("sit", lambda: tiny_generator("sit", mlp_width=42), {"num_heads": 2, "mlp_ratio": 8 / 3}),
        ("maskgit_vqgan", lambda: tiny_tokenizer("maskgit", **middle(3)), {"norm_groups": 4}),
        ("maskgit_vqgan", lambda: tiny_tokenizer("maskgit", **middle(1)), {"norm_groups": 4}),
        ("maskgit_vqgan", lambda: tiny_tokenizer("maskgit"), {"norm_groups": 4, "channel_mult": (1, 2)}),
        ("llamagen_gpt", lambda: tiny_generator("gpt"), {"n_head": 2, "block_size": 16.0}),
    ],
)
def test_sizes_and_forms_that_nothing_published_has(family, model, config):
    weights = export_weights(model())
    wrapped = {f"_orig_mod.module.{name}": tensor for name, tensor in weights.items()}
    assert same(export_weights(load_pretrained(family, wrapped, config)), weights)
    key = "block_size" if "block_size" in config else "mlp_ratio" if family in ("robustok", "sit") else "channel_mult"
    with pytest.raises(UserError, match=key):
        load_pretrained(family, weights, config | {key: {"channel_mult": (1, 4)}.get(key, 3.5)})


def test_the_number_of_heads_matters(every):
    one = load_pretrained("robustok", every["robustok"], {"heads": 1})
    assert not torch.allclose(one.features(images()), tiny_tokenizer("robustok").features(images()))


# Values that no model can have

IMPOSSIBLE = ("x", [], 10**12, 2**31 - 1, -1, 0.5, float("nan"), [10**9] * 3)
IN_NO_SHAPE = {"robustok": "num_heads", "llamagen_gpt": "block_size", "sit": "num_heads"}


@pytest.mark.parametrize("family", FAMILIES)
def test_settings_of_wrong_type_or_size_are_one_line_before_anything_is_made(every, family):
    """A setting that is in no shape, or one whose value no file can have."""
    key, refused = IN_NO_SHAPE.get(family, "codebook_size"), []
    for value in IMPOSSIBLE:
        try:
            loaded = load_pretrained(family, every[family], {**(RELEASES[family][1] or {}), key: value})
        except UserError as error:
            refused.append(str(error))
        else:  # of some families this setting is none, and ignored
            assert same(export_weights(loaded), every[family])
    assert len(refused) in (0, len(IMPOSSIBLE))
    assert not any("\n" in line for line in refused)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(family, value):
    weights = released(family)[0]
    name = next(name for name, tensor in reversed(weights.items()) if tensor.is_floating_point())
    weights[name].view(-1)[-1] = value
    with pytest.raises(UserError, match=f"weights: {name} holds NaN or infinite|has other values than"):
        load_pretrained(family, weights, RELEASES[family][1])
