import math

import pytest
import torch
import torch.nn.functional as F

from robustok.config import plain, validate
from robustok.errors import UserError
from robustok.pretrained.export import export_weights
from robustok.pretrained.load import load_pretrained
from robustok.snapshots import write_snapshot
from robustok.tokenizers import encoder_digest, frozen_weights, load_tokenizer
from robustok.tokenizers.maetok import MAETok, MAETokConfig
from robustok.types import Tokenizer

SIZE, PATCH, GRID, L, D = 12, 4, 3, 5, 6
VARIANTS = {
    "rotary": {"positions": "rotary", "encoder_mask_token": True},
    "rotary_class": {"positions": "rotary", "decoder_class_token": True},
    "learned": {"positions": "learned", "decoder_class_token": True},
    "learned_no_class": {"positions": "learned"},
}


def build(variant="rotary", seed=0, **settings):
    """A tiny tokenizer, its halves of different sizes, in which every tensor is random and matters."""
    torch.manual_seed(seed)
    sizes = {"image_size": SIZE, "patch_size": PATCH, "latents": L, "latent_dim": D}
    sides = {"encoder": {"width": 16, "depth": 2, "heads": 2}, "decoder": {"width": 24, "depth": 1, "heads": 2}}
    statistics = {"latent_mean": -0.07, "latent_std": 0.6}
    tokenizer = MAETok(validate(MAETokConfig, sizes | sides | statistics | VARIANTS[variant] | settings)).eval()
    with torch.no_grad():
        for name, tensor in tokenizer.state_dict().items():
            if "freqs_t" not in name:
                tensor.normal_(std=0.4)
    return tokenizer


def some_images(count=2, seed=1):
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(state, name, x):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)


def part_of(state, name):
    return {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}


def transform_by_hand(state, xs, heads, prefix):
    """A list of tokens through the blocks, one token, head and pair at a time."""
    depth = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("model.blocks."))
    for i in range(depth):
        block = part_of(state, f"model.blocks.{i}")
        queries, keys, values = [], [], []
        for t, x in enumerate(xs):
            q, k, v = linear(block, "attn.qkv", norm(block, "norm1", x)).view(3, heads, -1)
            patch = t - prefix
            if "freqs" in state and 0 <= patch < GRID**2:
                row, column = divmod(patch, GRID)
                angles = column * state["freqs"][0, i] + row * state["freqs"][1, i]  # (W / 2,)
                q, k = (
                    torch.view_as_real(
                        torch.view_as_complex(part.reshape(-1, 2)) * torch.polar(torch.ones_like(angles), angles)
                    ).view(heads, -1)
                    for part in (q, k)
                )
            queries.append(q), keys.append(k), values.append(v)
        for t, x in enumerate(list(xs)):
            mixed = []
            for h in range(heads):
                scores = torch.stack([queries[t][h] @ key[h] for key in keys]) / math.sqrt(len(keys[0][h]))
                mixed.append(sum(s * value[h] for s, value in zip(scores.softmax(0), values, strict=True)))
            x = x + block["ls1.gamma"] * linear(block, "attn.proj", torch.cat(mixed))
            y = linear(block, "mlp.fc1", norm(block, "norm2", x))
            y = y * (1 + torch.erf(y / math.sqrt(2))) / 2
            xs[t] = x + block["ls2.gamma"] * linear(block, "mlp.fc2", y)
    return [norm(state, "model.norm", x) for x in xs]


def patch_at(image, patch):
    """The pixels (3, p, p) of a patch."""
    row, column = divmod(patch, GRID)
    return image[:, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_encode_and_decode_match_the_method_read_literally(variant):
    tokenizer = build(variant).double()
    image = some_images(1)[0].double()
    state = part_of(tokenizer.state_dict(), "encoder")
    weight, bias = state["model.patch_embed.proj.weight"].flatten(1), state["model.patch_embed.proj.bias"]
    xs = [state["model.cls_token"][0, 0], *(weight @ patch_at(image, p).flatten() + bias for p in range(GRID**2))]
    xs = [x + place for x, place in zip(xs, state["model.pos_embed"][0], strict=True)]
    xs += list(state["latent_tokens"][0] + state["latent_pos_embed"][0])
    xs = transform_by_hand(state, xs, heads=2, prefix=1)
    latents = torch.stack([linear(tokenizer.state_dict(), "quant_conv", x) for x in xs[-L:]])
    assert torch.allclose(tokenizer.encode(image[None])[0], latents, atol=1e-10)

    state, prefix = part_of(tokenizer.state_dict(), "decoder"), int(tokenizer.config.decoder_class_token)
    xs = [state["mask_token"][0, 0]] * GRID**2
    if prefix:
        xs = [state["model.cls_token"][0, 0], *xs]
    if "learned" in variant:
        xs = [x + place for x, place in zip(xs, state["model.pos_embed"][0][1 - prefix :], strict=True)]
    vectors = [linear(tokenizer.state_dict(), "post_quant_conv", z) for z in latents]
    xs += [z + place for z, place in zip(vectors, state["latent_pos_embed"][0], strict=True)]
    xs = transform_by_hand(state, xs, heads=2, prefix=prefix)
    decoded = tokenizer.decode(latents[None])[0]
    for p in range(GRID**2):
        pixels = linear(state, "to_pixel.model", xs[prefix + p]).view(PATCH, PATCH, 3).permute(2, 0, 1)
        assert torch.allclose(patch_at(decoded, p), pixels, atol=1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_pretrained_weights_load_and_are_exported_as_they_were(variant):
    original = build(variant)
    released = original.state_dict()
    assert {"encoder.latent_tokens", "decoder.model.patch_embed.proj.weight", "post_quant_conv.bias"} < released.keys()
    assert ("encoder.mask_token" in released) == (variant == "rotary")
    arguments = {"num_latent_tokens": L, "vq_mean": -0.07, "vq_std": 0.6, "enc_token_drop": 0.4, "to_pixel": "linear"}
    config = {"args": arguments | {"use_rope": "rotary" in variant}, "overrides": {"num_heads": 2, "encoder_depth": 2}}
    tokenizer = load_pretrained("maetok_tokenizer", released, config)
    assert tokenizer.config == original.config
    images = some_images()
    assert torch.equal(tokenizer.encode(images), original.encode(images))
    returned = export_weights(tokenizer)
    assert returned.keys() == released.keys()
    assert all(torch.equal(returned[name], released[name]) for name in released)


@torch.no_grad()
def test_it_keeps_the_contract_of_a_continuous_tokenizer():
    tokenizer, images = build(), some_images(3)
    latents = tokenizer.encode(images)
    assert isinstance(tokenizer, Tokenizer)
    assert (tokenizer.kind, tokenizer.image_size, tokenizer.latent_shape) == ("continuous", SIZE, (L, D))
    assert (latents.shape, latents.dtype) == ((3, L, D), torch.float32)
    assert torch.equal(tokenizer(images).reconstructions, tokenizer.decode(latents))
    normalised = tokenizer.normalise(latents)
    assert torch.allclose(normalised, (latents + 0.07) / 0.6)
    assert torch.allclose(tokenizer.denormalise(normalised), latents, atol=1e-6)
    assert torch.allclose(tokenizer.encode(images[1:2])[0], latents[1], atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.mse_loss(tokenizer.encode(images).float(), latents) < 1e-2 * latents.var()
    with pytest.raises(UserError, match=r"takes \(N, 3, 12, 12\)"):
        tokenizer.encode(images[:, :, :8])
    for wrong in (latents.transpose(1, 2), latents[0], latents[:, :3]):
        with pytest.raises(UserError, match=r"decodes \(N, 5, 6\)"):
            tokenizer.decode(wrong)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_two_halves_hold_all_that_learns_and_all_of_it_learns(variant):
    tokenizer = build(variant)
    tokenizer(some_images()).reconstructions.square().sum().backward()
    # Key biases shift all scores of a query alike, and softmax does not see it: they have a gradient, which is zero.
    assert all(p.grad is not None for p in tokenizer.parameters())
    frozen = frozen_weights(tokenizer)
    assert {name.partition(".")[0] for name in frozen} == {"encoder", "quant_conv"}
    decoder = {name for name, _ in tokenizer.named_parameters()} - frozen.keys()
    assert {name.partition(".")[0] for name in decoder} == {"decoder", "post_quant_conv"}


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_a_small_one_trains_from_scratch(positions):
    torch.manual_seed(0)
    side = {"width": 32, "depth": 1, "heads": 2}
    sizes = {"image_size": 8, "patch_size": 4, "latents": 4, "latent_dim": 16, "encoder": side, "decoder": side}
    start = {"init": "local", "layer_scale": None, "positions": positions}
    tokenizer = MAETok(validate(MAETokConfig, sizes | start))
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=2e-3)
    images = F.interpolate(torch.rand(8, 3, 2, 2) * 2 - 1, size=8, mode="bilinear")
    errors = []
    for _ in range(150):
        loss = F.mse_loss(tokenizer(images).reconstructions, images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    assert errors[0] > images.var().item()
    assert errors[-1] < 0.2 * images.var().item()


def test_a_snapshot_gives_it_back_with_its_statistics(tmp_path):
    tokenizer = build()
    header = {"kind": "tokenizer", "config": plain(tokenizer.config), "step": 0}
    write_snapshot(tmp_path / "snapshot", header, tokenizer.state_dict(), {})
    loaded = load_tokenizer(tmp_path / "snapshot")
    assert loaded.latent_std == 0.6
    assert torch.equal(loaded.encode(some_images()), tokenizer.encode(some_images()))
    assert encoder_digest(loaded) == encoder_digest(tokenizer)


@torch.no_grad()
def test_wrong_statistics_and_ranges_are_reported_in_plain_sentences():
    images = some_images(16)
    tokenizer = build()
    deviation = tokenizer.encode(images).std().item()
    assert build(latent_mean=0.0, latent_std=1.0).check()[0].startswith("The latent statistics are left at mean 0")
    right = build(latent_std=deviation)
    assert right.check() == right.check(images) == []
    assert "[-1, 1]" in right.check((images + 1) / 2)[0]
    assert "[-1, 1]" in right.check((images + 1) * 127.5)[0]
    far = 10 * deviation
    for name in ("weight", "bias"):
        getattr(right.quant_conv, name).mul_(10)
    assert right.check(images) == [f"Latents have a standard deviation of {far:.3g}, latent_std is {deviation:.3g}."]
    inverted = build(latent_std=1 / far)
    inverted.load_state_dict(right.state_dict())
    assert inverted.check(images)[0].endswith("that is its inverse.")


@pytest.mark.parametrize(
    ("variant", "config", "message"),
    [
        ("rotary", {}, "lacks num_heads"),
        ("rotary", {"num_heads": 3}, "do not divide width"),
        ("rotary", {"num_heads": 2, "image_size": 24}, "image_size = 24, the weights have 12"),
        ("rotary", {"num_heads": 2, "rope_mixed": False}, "rope_mixed"),
        ("learned", {"num_heads": 2, "use_rope": True}, "use_rope = True, the weights have False"),
        ("learned", {"num_heads": 2, "vq_std": 0}, "latent_std"),
        ("learned", {"num_heads": 2, "num_latent_tokns": L}, "did you mean 'num_latent_tokens'"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(variant, config, message):
    with pytest.raises(UserError, match=message) as error:
        load_pretrained("maetok_tokenizer", build(variant).state_dict(), config)
    assert "\n" not in str(error.value)


def test_weights_of_another_family_are_refused():
    weights = build().state_dict()
    with pytest.raises(UserError, match="another family"):
        load_pretrained("maetok_tokenizer", {"conv.weight": torch.zeros(3, 3)}, {"num_heads": 2})
    with pytest.raises(UserError, match="unexpected quantize"):
        load_pretrained(
            "maetok_tokenizer", weights | {"quantize.embedding.weight": torch.zeros(4, 6)}, {"num_heads": 2}
        )
    with pytest.raises(UserError, match="image_size 10 is not divisible"):
        validate(MAETokConfig, {"image_size": 10, "patch_size": 4})
