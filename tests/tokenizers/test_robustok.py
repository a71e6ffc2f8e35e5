import math

import pytest
import timm
import torch
import torch.nn.functional as F

from robustok.config import validate
from robustok.errors import UserError
from robustok.tokenizers import frozen_weights
from robustok.tokenizers.perturbation import PerturbationConfig, draw_perturbation
from robustok.tokenizers.quantizer import QuantizerConfig
from robustok.tokenizers.robustok import RobusTok, RobusTokConfig, ViTConfig, load_pretrained_backbones, unpatchify
from robustok.types import DiscreteTokenizer

SIZES = {16: 4, 32: 8, 256: 16}  # image size: patch size


def build(image_size=16, patch_size=4, latents=None, depth=1, seed=0, **settings):
    torch.manual_seed(seed)
    vit = ViTConfig(width=16, depth=depth, heads=2, layer_scale=1e-5)
    quantizer = QuantizerConfig(size=32, dim=8)
    config = RobusTokConfig(
        image_size=image_size,
        patch_size=patch_size,
        latents=latents,
        encoder=vit,
        decoder=vit,
        quantizer=quantizer,
        **settings,
    )
    tokenizer = RobusTok(config).eval()
    for parameter in tokenizer.parameters():  # layer scale and latent tokens start near zero: mistakes would not show
        parameter.data += 0.3 * torch.randn(parameter.shape)
    return tokenizer


def some_images(count=2, size=16, seed=1):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("image_size", SIZES)
@torch.no_grad()
def test_shapes_at_several_sizes(image_size):
    tokenizer = build(image_size, SIZES[image_size])
    length = (image_size // SIZES[image_size]) ** 2
    images = some_images(2, image_size)
    tokens = tokenizer.encode(images)
    assert isinstance(tokenizer, DiscreteTokenizer)
    assert (tokenizer.image_size, tokenizer.latent_shape, tokenizer.kind) == (image_size, (length, 8), "discrete")
    assert (tokens.shape, tokens.dtype) == ((2, length), torch.int64)
    assert tokenizer.embed(tokens).shape == (2, length, 8)
    assert tokenizer.decode(tokens).shape == images.shape
    torch.testing.assert_close(tokenizer(images).reconstructions, tokenizer.decode(tokens), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_more_or_fewer_latents_than_patches():
    shared = {name for name, _ in build().named_parameters()}
    for latents in (5, 40):
        tokenizer = build(latents=latents)
        tokens = tokenizer.encode(some_images())
        assert tokens.shape == (2, latents)
        assert tokenizer.decode(tokens).shape == (2, 3, 16, 16)
        own = {name for name, _ in tokenizer.named_parameters()} - shared
        assert own == {"encoder.latent_positions", "decoder.latent_positions"}


def test_unpatchify_puts_every_pixel_at_its_position():
    patches = torch.arange(2 * 9 * 4 * 4 * 3).view(2, 9, 48)
    images = unpatchify(patches, 4)
    for n, row, column, channel in torch.cartesian_prod(*map(torch.arange, (2, 12, 12, 3))).tolist():
        patch, inside = row // 4 * 3 + column // 4, (row % 4 * 4 + column % 4) * 3 + channel
        assert images[n, channel, row, column] == patches[n, patch, inside]


def test_parameter_count_of_the_paper():
    """ViT-B encoder and decoder with LayerScale; nothing is allocated."""
    vit = ViTConfig(layer_scale=1e-5)
    with torch.device("meta"):
        tokenizer = RobusTok(RobusTokConfig(encoder=vit, decoder=vit))
    count = {name: sum(p.numel() for p in module.parameters()) for name, module in tokenizer.named_children()}
    assert count == {
        "encoder": 86_061_312,
        "to_latent": 49_216,
        "quantizer": 262_144,
        "from_latent": 49_920,
        "decoder": 85_865_472,
    }
    assert sum(p.numel() for p in tokenizer.parameters()) == 172_288_064


def plain_transformer(state, prefix, tokens, depth, heads):
    """A pre-norm vision transformer of one sequence (T, width), written out with the released names."""

    def norm(x, name):
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / (variance + 1e-6).sqrt() * state[f"{prefix}.{name}.weight"] + state[f"{prefix}.{name}.bias"]

    def linear(x, name):
        return x @ state[f"{prefix}.{name}.weight"].T + state[f"{prefix}.{name}.bias"]

    for i in range(depth):
        block, (length, width) = f"blocks.{i}", tokens.shape
        qkv = linear(norm(tokens, f"{block}.norm1"), f"{block}.attn.qkv").view(length, 3, heads, width // heads)
        mixed = []
        for head in range(heads):
            q, k, v = qkv[:, 0, head], qkv[:, 1, head], qkv[:, 2, head]
            mixed.append((q @ k.T / math.sqrt(width // heads)).softmax(-1) @ v)
        tokens = tokens + state[f"{prefix}.{block}.ls1.gamma"] * linear(torch.cat(mixed, -1), f"{block}.attn.proj")
        hidden = linear(norm(tokens, f"{block}.norm2"), f"{block}.mlp.fc1")
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        tokens = tokens + state[f"{prefix}.{block}.ls2.gamma"] * linear(hidden, f"{block}.mlp.fc2")
    return norm(tokens, "norm")


def plain_encoder(state, image, patch_size):
    """One image: class token, patches in rows, latents; a latent shares the position of its patch."""
    kernel, bias = state["encoder.backbone.patch_embed.proj.weight"], state["encoder.backbone.patch_embed.proj.bias"]
    positions, level = state["encoder.backbone.pos_embed"][0], state["encoder.level_embed.weight"]
    side = image.shape[-1] // patch_size
    sequence = [state["encoder.backbone.cls_token"][0, 0] + positions[0] + level[0]]
    for row in range(side):
        for column in range(side):
            patch = image[:, row * patch_size :, column * patch_size :][:, :patch_size, :patch_size]
            sequence.append((kernel * patch).sum((1, 2, 3)) + bias + positions[1 + row * side + column] + level[0])
    for i in range(side * side):
        sequence.append(state["encoder.latent_tokens"][0, i] + positions[1 + i] + level[1])
    latents = plain_transformer(state, "encoder.backbone", torch.stack(sequence), depth=2, heads=2)[1 + side * side :]
    return latents @ state["to_latent.weight"].T + state["to_latent.bias"]


def plain_decoder(state, vectors, patch_size):
    """One image: class token, mask tokens, class token again, latents; the mask tokens become patches."""
    positions, level = state["decoder.backbone.pos_embed"][0], state["decoder.level_embed.weight"]
    cls, mask = state["decoder.backbone.cls_token"][0, 0], state["decoder.mask_token"][0, 0]
    z = vectors @ state["from_latent.weight"].T + state["from_latent.bias"]
    count = len(z)
    sequence = [cls + positions[0] + level[0]]
    sequence += [mask + positions[1 + i] + level[0] for i in range(count)]
    sequence += [cls + positions[0] + level[1]]
    sequence += [z[i] + positions[1 + i] + level[1] for i in range(count)]
    patches = plain_transformer(state, "decoder.backbone", torch.stack(sequence), depth=2, heads=2)[1 : 1 + count]
    patches = patches @ state["decoder.to_pixels.weight"].T + state["decoder.to_pixels.bias"]
    side = math.isqrt(count)
    rows = [
        torch.cat([patches[r * side + c].view(patch_size, patch_size, 3) for c in range(side)], 1) for r in range(side)
    ]
    return torch.cat(rows, 0).permute(2, 0, 1)


@torch.no_grad()
def test_encoder_and_decoder_against_a_plain_reading():
    tokenizer, images = build(depth=2), some_images()
    state, features = tokenizer.state_dict(), tokenizer.features(images)
    vectors = tokenizer.embed(torch.arange(32).view(2, 16))
    decoded = tokenizer.decode_vectors(vectors)
    for i in range(2):
        torch.testing.assert_close(features[i], plain_encoder(state, images[i], 4), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(decoded[i], plain_decoder(state, vectors[i], 4), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch():
    tokenizer, images = build(), some_images(5)
    tokens = tokenizer.encode(images)
    decoded = tokenizer.decode(tokens)
    assert len(tokens.unique()) > 3
    for i in range(5):
        assert torch.equal(tokenizer.encode(images[i : i + 1])[0], tokens[i])
        torch.testing.assert_close(tokenizer.decode(tokens[i : i + 1])[0], decoded[i], atol=1e-5, rtol=1e-5)


def test_decoder_modules_and_frozen_weights_are_all_weights():
    tokenizer = build()
    decoder = {id(p) for module in tokenizer.decoder_modules() for p in module.parameters()}
    frozen = frozen_weights(tokenizer)
    assert {name.split(".")[0] for name in frozen} == {"encoder", "to_latent", "quantizer"}
    assert len(decoder) + len(frozen) == len(list(tokenizer.parameters()))


# The training forward


def test_perturbation_comes_after_the_quantiser_s_losses():
    tokenizer, images = build(), some_images(4)
    draw = draw_perturbation(4, 16, 1.0, 0.5, torch.Generator().manual_seed(0))
    clean = tokenizer(images)
    for semantic_on in ("clean", "perturbed"):
        noisy = tokenizer(images, PerturbationConfig(semantic_on=semantic_on), draw, strength=5)
        assert torch.equal(noisy.tokens, clean.tokens)
        assert torch.equal(noisy.codebook_loss, clean.codebook_loss)
        assert torch.equal(noisy.commitment_loss, clean.commitment_loss)
        changed = (noisy.reconstructions != clean.reconstructions).flatten(1).any(1)
        assert torch.equal(changed, draw.images)
        moved = (noisy.semantic_latents - clean.semantic_latents).abs().amax(1) > 1e-6
        assert torch.equal(moved, draw.images if semantic_on == "perturbed" else torch.zeros(4, dtype=torch.bool))
    torch.testing.assert_close(clean.semantic_latents, F.normalize(tokenizer.embed(clean.tokens), dim=-1).mean(1))


def test_every_weight_learns_and_perturbed_images_reach_the_encoder():
    """DDP refuses weights that a step leaves out."""
    tokenizer, images = build(teacher_width=12), some_images(4)
    draw = draw_perturbation(4, 16, 1.0, 1.0, torch.Generator().manual_seed(0))
    output = tokenizer(images, PerturbationConfig(), draw, 5, torch.randn(4, 12))
    output.reconstructions.square().mean().backward(retain_graph=True)
    assert tokenizer.encoder.backbone.patch_embed.proj.weight.grad.abs().sum() > 0
    (output.codebook_loss + output.semantic_targets.sum() + output.commitment_loss).backward()
    assert [name for name, p in tokenizer.named_parameters() if p.grad is None] == []


def test_the_teacher_is_projected_by_the_tokenizer_itself():
    features = torch.randn(3, 16)
    tokenizer = build()
    found = tokenizer(some_images(3), teacher_features=features).semantic_targets
    torch.testing.assert_close(found, tokenizer.to_latent(features))
    assert tokenizer(some_images(3)).semantic_targets is None
    assert build(teacher_width=16).from_teacher is None
    other = build(teacher_width=12)
    found = other(some_images(3), teacher_features=features[:, :12]).semantic_targets
    torch.testing.assert_close(found, other.to_latent(other.from_teacher(features[:, :12])))


# What the user can get wrong


def test_wrong_shapes():
    tokenizer = build()
    with pytest.raises(UserError, match=r"shape \(2, 3, 32, 32\), this tokenizer takes \(N, 3, 16, 16\)"):
        tokenizer.encode(some_images(2, 32))
    with pytest.raises(UserError, match=r"decodes tokens \(N, 16\)"):
        tokenizer.decode(torch.zeros(2, 15, dtype=torch.int64))
    with pytest.raises(UserError, match="image_size 16 is not divisible by patch_size 5"):
        validate(RobusTokConfig, {"image_size": 16, "patch_size": 5})
    with pytest.raises(UserError, match="heads 3 do not divide width 16"):
        validate(RobusTokConfig, {"encoder": {"width": 16, "heads": 3}})


def started(config):
    """A tokenizer with the pretrained backbones of its configuration."""
    tokenizer = RobusTok(config)
    load_pretrained_backbones(tokenizer)
    return tokenizer


def test_a_pretrained_backbone_from_a_local_file(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    vit = ViTConfig(width=192, heads=3, pretrained="vit_tiny_patch16_224", weights=tmp_path / "vit.pth")
    config = RobusTokConfig(image_size=32, patch_size=8, encoder=vit, decoder=ViTConfig(width=16, depth=1, heads=2))
    loaded = started(config).encoder.backbone
    assert torch.equal(loaded.blocks[11].mlp.fc2.weight, model.blocks[11].mlp.fc2.weight)
    assert loaded.patch_embed.proj.weight.shape == (192, 3, 8, 8)  # resampled
    assert loaded.pos_embed.shape == (1, 17, 192)
    assert not torch.equal(RobusTok(config).encoder.backbone.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)
    with pytest.raises(UserError, match=r"width, depth, heads \(192, 12, 3\), configured are \(192, 6, 3\)"):
        started(config.model_copy(update={"encoder": vit.model_copy(update={"depth": 6})}))
    with pytest.raises(UserError, match=r"cannot load the pretrained backbone .* give a local file"):
        started(config.model_copy(update={"encoder": vit.model_copy(update={"weights": tmp_path / "none.pth"})}))
