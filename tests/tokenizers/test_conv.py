"""The convolutional tokenizers at tiny size, and their released layouts, made here from random weights."""

import pytest
import torch
import torch.nn.functional as F

from robustok.config import plain, validate
from robustok.errors import UserError
from robustok.pretrained.export import export_weights
from robustok.pretrained.families import FAMILIES
from robustok.pretrained.load import load_pretrained
from robustok.snapshots import write_snapshot
from robustok.tokenizers import TOKENIZERS, encoder_digest, frozen_weights, load_tokenizer
from robustok.tokenizers.conv import Attention, ConvConfig, Downsample, Upsample, to_grid, to_row
from robustok.tokenizers.kl import KL, KLConfig, Posterior
from robustok.tokenizers.llamagen import LlamaGen, LlamaGenConfig
from robustok.tokenizers.maskgit import MaskGIT, MaskGITBlock, MaskGITConfig
from robustok.tokenizers.perturbation import PerturbationConfig, draw_perturbation
from robustok.training.adversary import last_layer
from robustok.types import DiscreteTokenizer, Tokenizer

SIDES = {side: {"width": 8, "multipliers": [1, 1, 2], "blocks": 1, "groups": 4} for side in ("encoder", "decoder")}
PLAIN = {side: sizes | {"attention": [], "middle_attention": False} for side, sizes in SIDES.items()}
SIZES = {
    "llamagen": SIDES | {"image_size": 16, "z_channels": 12, "quantizer": {"size": 32, "dim": 4}},
    "maskgit": PLAIN | {"image_size": 16, "quantizer": {"size": 32, "dim": 6, "normalize": False}},
    "kl": SIDES | {"image_size": 16, "z_channels": 12, "dim": 5},
}
RELEASES = {"llamagen": "llamagen_tokenizer", "maskgit": "maskgit_vqgan", "kl": "vavae"}
GROUPS = {"norm_groups": 4}  # the one size here that shapes do not tell


def build(name, seed=0, **settings):
    torch.manual_seed(seed)
    family, config = TOKENIZERS[name]
    tokenizer = family(validate(config, {"name": name} | SIZES[name] | settings)).eval()
    for parameter in tokenizer.parameters():  # norms start at 1 and 0: mistakes would not show
        parameter.data += 0.3 * torch.randn(parameter.shape)
    return tokenizer.requires_grad_(False)


def some_images(count=2, height=16, width=16, seed=1):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("name", SIZES)
def test_the_order_in_memory_changes_nothing(name):
    """Where channels come last, torch's group norm on a CPU cancels: three digits were lost in a decoder."""
    tokenizer, images = build(name), some_images()
    apart = images.to(memory_format=torch.channels_last)
    assert apart.stride() != images.stride()
    assert torch.equal(tokenizer.encode(apart), tokenizer.encode(images))
    assert to_grid(torch.randn(2, 16, 4)).is_contiguous()


@pytest.mark.parametrize("name", SIZES)
def test_contract(name):
    tokenizer, images = build(name), some_images()
    width = tokenizer.latent_shape[1]
    latents = tokenizer.encode(images)
    assert isinstance(tokenizer, DiscreteTokenizer if name != "kl" else Tokenizer)
    assert (tokenizer.image_size, tokenizer.latent_shape[0]) == (16, 16)  # factor 4
    if tokenizer.kind == "discrete":
        assert (latents.shape, latents.dtype) == ((2, 16), torch.int64)
        assert tokenizer.codebook.shape == (32, width)
        assert torch.equal(tokenizer.embed(latents), tokenizer.codebook[latents])
    else:
        assert (latents.shape, latents.dtype) == ((2, 16, width), torch.float32)
    assert tokenizer.decode(latents).shape == images.shape
    assert tokenizer.encode(some_images(1, 8, 24)).shape[1] == 12
    assert tokenizer.check() == []


def test_the_geometry_of_neighbours():
    llamagen, maskgit = build("llamagen"), build("maskgit")
    torch.testing.assert_close(llamagen.codebook.norm(dim=1), torch.ones(32))
    assert torch.equal(maskgit.codebook, maskgit.quantizer.embedding.weight)


@pytest.mark.parametrize("name", SIZES)
def test_latents_are_row_by_row_on_any_grid(name):
    """Without attention a latent shows around its own place. Column by column, number 35 would lie 40 pixels away."""
    tokenizer = build(name, **PLAIN)
    latents = tokenizer.encode(some_images(1, 24, 80))  # 6 x 20
    changed = latents.clone()
    changed[:, 35] = changed[:, 35] + 1 if name == "kl" else (changed[:, 35] + 1) % 32  # row 1, column 15
    change = (tokenizer.decode(changed, grid=(6, 20)) - tokenizer.decode(latents, grid=(6, 20))).abs().sum((0, 1))
    row, column = divmod(int(change.argmax()), 80)
    assert abs(row - 6) <= 12
    assert abs(column - 62) <= 16
    with pytest.raises(UserError, match=r"grid=\(rows, columns\)"):
        tokenizer.decode(latents)


def test_row_and_grid_are_inverse():
    grid = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    assert torch.equal(to_row(grid)[1, 7], grid[1, :, 1, 2])
    assert torch.equal(to_grid(to_row(grid), (4, 5)), grid)


@pytest.mark.parametrize("name", SIZES)
def test_post_training_reaches_all_of_the_decoder_and_nothing_else(name):
    tokenizer = build(name)
    latents = tokenizer.encode(some_images())
    before = encoder_digest(tokenizer)
    trained = [p for module in tokenizer.decoder_modules() for p in module.requires_grad_(True).parameters()]
    optimizer = torch.optim.SGD(trained, lr=1e-2)
    tokenizer.decode(latents).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    assert not any(p.requires_grad for p in frozen_weights(tokenizer).values())
    assert last_layer(tokenizer) is tokenizer.decoder.conv_out.weight
    optimizer.step()
    assert encoder_digest(tokenizer) == before
    assert torch.equal(tokenizer.encode(some_images()), latents)


@pytest.mark.parametrize("name", ["llamagen", "maskgit"])
def test_training_forward(name):
    tokenizer, images = build(name, teacher_width=7).train().requires_grad_(True), some_images()
    output = tokenizer(images, teacher_features=torch.ones(2, 7))
    torch.testing.assert_close(output.reconstructions, tokenizer.decode(output.tokens), atol=1e-4, rtol=1e-4)
    assert output.semantic_targets.shape == output.semantic_latents.shape == (2, tokenizer.latent_shape[1])
    (output.reconstructions.mean() + output.codebook_loss + output.commitment_loss).backward()
    assert all(p.grad is not None for n, p in tokenizer.named_parameters() if not n.startswith("from_teacher"))
    p = PerturbationConfig(proportion=1.0, rate=0.5)
    draw = draw_perturbation(2, 16, 0.5, 1.0, torch.Generator().manual_seed(0))
    perturbed = tokenizer(images, p, draw, strength=5)
    assert torch.equal(perturbed.tokens, output.tokens)
    assert not torch.allclose(perturbed.reconstructions, output.reconstructions)
    with pytest.raises(UserError, match="teacher_width"):
        build(name)(images, teacher_features=torch.ones(2, 7))


def test_kl_posterior():
    tokenizer, images = build("kl"), some_images()
    posterior = tokenizer.posterior(images)
    assert torch.equal(tokenizer.encode(images), posterior.mean)
    samples = [tokenizer.encode(images, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(samples[0], posterior.mean + torch.exp(posterior.logvar / 2) * noise)
    normal = torch.distributions.Normal(posterior.mean, posterior.std)
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum((1, 2)).mean()
    output = tokenizer(images, torch.Generator().manual_seed(3))
    torch.testing.assert_close(output.kl_loss, expected)
    assert torch.equal(output.reconstructions, tokenizer.decode(samples[0]))
    assert Posterior(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)).divergence() == 0


def test_maskgit_converts_its_images():
    """The release's network sees [0, 1] and makes [0, 1]; ours sees and makes [-1, 1]."""
    tokenizer, images = build("maskgit"), some_images()
    assert tokenizer.image_range == (0.0, 1.0)
    features = tokenizer.encoder((images + 1) / 2)
    assert torch.equal(tokenizer.features(images), to_row(features))
    released = tokenizer.decoder(to_grid(tokenizer.codebook[tokenizer.encode(images)]))
    torch.testing.assert_close(tokenizer.decode(tokenizer.encode(images)), 2 * released - 1)


def test_maskgit_block_drops_its_input_where_channels_change():
    torch.manual_seed(0)
    block, x = MaskGITBlock(8, 16, ConvConfig(width=8, groups=4)), torch.randn(1, 8, 5, 5)
    h = block.conv2(F.silu(block.norm2(block.conv1(F.silu(block.norm1(x))))))
    torch.testing.assert_close(block(x), h + F.conv2d(h, block.shortcut.weight))


def test_parts_against_their_formulas():
    torch.manual_seed(0)
    x = torch.randn(2, 8, 4, 6)
    attention = Attention(8, ConvConfig(width=8, groups=4))
    q, k, v = (part(attention.norm(x)).flatten(2) for part in (attention.q, attention.k, attention.v))  # (2, 8, 24)
    weights = torch.einsum("ncq,nck->nqk", q, k).div(8**0.5).softmax(-1)
    mixed = torch.einsum("nqk,nck->ncq", weights, v).reshape(x.shape)
    torch.testing.assert_close(attention(x), x + attention.proj_out(mixed))

    down = Downsample(8)  # the last output of a row sees two columns and a zero
    padded = torch.cat([x, torch.zeros(2, 8, 4, 1)], 3)
    padded = torch.cat([padded, torch.zeros(2, 8, 1, 7)], 2)
    corner = torch.einsum("ncij,ocij->no", padded[:, :, 2:, 4:], down.conv.weight) + down.conv.bias
    torch.testing.assert_close(down(x)[:, :, 1, 2], corner)

    up = Upsample(8)
    torch.testing.assert_close(up(x), up.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3)))


# Pretrained layouts


@pytest.mark.parametrize("name", SIZES)
def test_the_layout_of_the_authors_and_back(name, tmp_path):
    tokenizer, images = build(name), some_images()
    released = export_weights(tokenizer)
    config = {"args": {"dropout": 0.0}, "derived": GROUPS | {"image_range": [-1, 1], "downsample": 4}}
    again = load_pretrained(RELEASES[name], released, config)
    assert torch.equal(again.encode(images), tokenizer.encode(images))
    assert torch.equal(again.decode(again.encode(images)), tokenizer.decode(tokenizer.encode(images)))
    assert again.image_size == 256  # the shapes do not tell it
    header = {"kind": "tokenizer", "config": plain(again.config)}
    write_snapshot(tmp_path / "snapshot", header, again.state_dict(), {})
    assert torch.equal(load_tokenizer(tmp_path / "snapshot").encode(images), tokenizer.encode(images))


def test_names_of_the_authors():
    """One name of every kind, as the loading code of each release expects it."""
    llamagen, maskgit, kl = (export_weights(build(name)).keys() for name in SIZES)
    assert {
        "encoder.conv_blocks.2.res.0.nin_shortcut.weight",
        "encoder.conv_blocks.2.attn.0.proj_out.bias",
        "encoder.conv_blocks.1.downsample.conv.weight",
        "encoder.mid.1.q.weight",
        "decoder.conv_blocks.0.attn.1.norm.weight",  # the lowest resolution
        "decoder.conv_blocks.1.upsample.conv.bias",
        "decoder.mid.2.conv2.weight",
        "quantize.embedding.weight",
        "quantize.codebook_used",
        "post_quant_conv.bias",
    } <= llamagen
    assert {
        "encoder.down.2.block.0.nin_shortcut.weight",
        "decoder.up.2.upsample_conv.bias",  # the lowest resolution
        "decoder.mid.1.norm2.weight",
    } <= maskgit
    assert not any("downsample" in name or "conv1.bias" in name for name in maskgit)
    assert {
        "encoder.down.1.downsample.conv.weight",
        "encoder.mid.attn_1.k.weight",
        "decoder.up.2.attn.1.v.weight",
        "decoder.mid.block_2.norm1.bias",
        "decoder.up.2.upsample.conv.weight",
        "quant_conv.weight",
    } <= kl


def test_what_published_files_hold_besides():
    others = ("foundation_model.x", "linear_proj.weight", "loss.discriminator.y")
    weights = export_weights(build("kl")) | {name: torch.zeros(1) for name in others}
    assert load_pretrained("vavae", weights, GROUPS).licence == "MIT"
    with pytest.raises(UserError, match=r"unexpected surprise\.z"):
        load_pretrained("vavae", weights | {"surprise.z": torch.zeros(1)}, GROUPS)
    without = {name: w for name, w in export_weights(build("llamagen")).items() if name != "quantize.codebook_used"}
    assert "quantize.codebook_used" not in export_weights(load_pretrained("llamagen_tokenizer", without, GROUPS))


def test_encoder_and_decoder_may_differ():
    decoder = SIDES["decoder"] | {"multipliers": [2, 1, 4], "attention": [1]}
    tokenizer, images = build("llamagen", decoder=decoder), some_images()
    again = load_pretrained("llamagen_tokenizer", export_weights(tokenizer), GROUPS | {"decoder_ch_mult": [2, 1, 4]})
    assert again.config.decoder.multipliers == (2, 1, 4)
    tokens = tokenizer.encode(images)
    assert torch.equal(again.decode(tokens), tokenizer.decode(tokens))


def test_double_precision():
    for name in SIZES:
        tokenizer, images = build(name), some_images()
        latents = tokenizer.encode(images)
        single, tokenizer = tokenizer.decode(latents), tokenizer.double()
        double = tokenizer.decode(latents if latents.dtype == torch.int64 else latents.double())
        assert double.dtype == torch.float64
        torch.testing.assert_close(double.float(), single, atol=1e-4, rtol=1e-4)
        codes = getattr(tokenizer, "codebook", double)
        assert (codes - codes.float()).abs().max() > 0 or name == "maskgit"  # not rounded on the way


# What is refused, and what check() finds


def test_bad_input_is_one_sentence():
    llamagen, kl = build("llamagen"), build("kl")
    released = export_weights(llamagen)
    for call, words in (
        (lambda: llamagen.encode(some_images(1, 18, 16)), "divisible by 4"),
        (lambda: llamagen.decode(torch.zeros(2, 16)), "int64"),
        (lambda: kl.decode(torch.zeros(2, 16, 7)), r"\(N, L, 5\)"),
        (lambda: load_pretrained("vavae", released), "another family"),
        (lambda: load_pretrained("llamagen_tokenizer", released, {"codebook_size": 64}), "codebook_size = 64"),
        (lambda: load_pretrained("llamagen_tokenizer", released, {"norm_eps": 1e-5}), "norm_eps"),
        (lambda: load_pretrained("llamagen_tokenizer", released), "groups 32 do not divide"),
        (lambda: validate(KLConfig, {"decoder": {"multipliers": [1, 2]}}), "as many multipliers"),
        (lambda: validate(LlamaGenConfig, {"image_size": 250}), "image_size is 250"),
        (lambda: validate(MaskGITConfig, {"encoder": {"groups": 3}}), "groups 3"),
    ):
        with pytest.raises(UserError, match=words) as found:
            call()
        assert "\n" not in str(found.value)


def test_check_speaks_of_ranges_and_weights():
    tokenizer = build("llamagen")
    assert "in [0, 1]" in tokenizer.check((some_images() + 1) / 2)[0]
    assert "takes [-1, 1]" in tokenizer.check((some_images() + 1) * 127.5)[0]
    assert any("untrained" in sentence for sentence in build("kl").check(some_images()))
    tokenizer.quantizer.embedding.weight[3] = 0
    assert "zero" in tokenizer.check()[0]
    tokenizer.decoder.conv_out.bias[0] = torch.nan
    assert "damaged" in tokenizer.check()[0]


def test_a_few_steps_of_training_lower_the_loss():
    torch.manual_seed(0)
    images = F.interpolate(some_images(8, 2, 2), size=(16, 16))  # coloured quarters
    for tokenizer in (build("kl"), build("llamagen"), build("maskgit")):
        tokenizer.train().requires_grad_(True)
        optimizer, losses = torch.optim.Adam(tokenizer.parameters(), lr=3e-3), []
        for _ in range(16):
            output = tokenizer(images)
            loss = (output.reconstructions - images).square().mean()
            losses.append(loss.item())
            if isinstance(tokenizer, KL):
                loss = loss + 1e-6 * output.kl_loss
            else:
                loss = loss + output.codebook_loss + 0.25 * output.commitment_loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert losses[-1] < 0.8 * losses[0], type(tokenizer).__name__


def test_every_family_has_licence_and_range():
    assert (LlamaGen.licence, LlamaGen.image_range) == ("MIT", (-1.0, 1.0))
    assert (MaskGIT.licence, KL.licence, KL.image_range) == ("Apache-2.0", "MIT", (-1.0, 1.0))
    assert all(FAMILIES[release].kind == "tokenizer" for release in RELEASES.values())
