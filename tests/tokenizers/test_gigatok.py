"""GigaTok at tiny size: the parts against their formulas, the contract, and the released layout."""

import pytest
import torch
import torch.nn.functional as F

from robustok.config import plain, validate
from robustok.errors import UserError
from robustok.pretrained.export import export_weights
from robustok.pretrained.load import load_pretrained
from robustok.snapshots import write_snapshot
from robustok.tokenizers import encoder_digest, frozen_weights, load_tokenizer
from robustok.tokenizers.gigatok import AdaptiveNorm, CrossBlock, DepthToSpace, GigaTok, GigaTokConfig, pyramid
from robustok.tokenizers.gigatok import TransformerConfig as Size
from robustok.training.adversary import last_layer
from robustok.types import DiscreteTokenizer

CNN = {"width": 8, "multipliers": [1, 2], "blocks": 1, "groups": 4, "attention": [], "middle_attention": False}
SIZES = {
    "image_size": 8,  # a grid of 4 x 4
    "encoder": CNN,
    "decoder": CNN,
    "z_channels": 12,
    "latents": 8,
    "quantizer": {"size": 32, "dim": 4},
    "grid_to_row": {"width": 16, "depth": 2, "heads": 4},
    "row_to_grid": {"width": 24, "depth": 3, "heads": 2},
    "alignment": {"width": 10, "hidden": 20, "depth": 2},
}
CONFIG = {  # the release's form
    "args": {"encoder_size": "custom", "num_latent_tokens": 8, "rot": True, "distill_depth": 2, "model_size": None},
    "overrides": {"encoder_heads": 4, "decoder_heads": 2},
    "derived": {"norm_groups": 4, "grid": 4},
}


def build(seed=0, **settings):
    torch.manual_seed(seed)
    tokenizer = GigaTok(validate(GigaTokConfig, SIZES | settings)).eval()
    for parameter in tokenizer.parameters():  # norms start at 1 and 0: mistakes would not show
        parameter.data += 0.3 * torch.randn(parameter.shape)
    return tokenizer.requires_grad_(False)


def some_images(count=2, size=8, seed=1):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_contract():
    tokenizer, images = build(), some_images()
    tokens = tokenizer.encode(images)
    assert isinstance(tokenizer, DiscreteTokenizer)
    assert (tokenizer.image_size, tokenizer.latent_shape, tokenizer.licence) == (8, (8, 4), "MIT")
    assert (tokens.shape, tokens.dtype) == ((2, 8), torch.int64)
    assert tokenizer.decode(tokens).shape == images.shape
    assert torch.equal(tokenizer.decode(tokens, grid=(1, 8)), tokenizer.decode(tokens))
    torch.testing.assert_close(tokenizer.codebook.norm(dim=1), torch.ones(32))
    torch.testing.assert_close(tokenizer(images).reconstructions, tokenizer.decode(tokens), atol=1e-4, rtol=1e-4)
    assert tokenizer.alignment(tokenizer.row_to_grid.states(torch.zeros(2, 8, 12), 1)).shape == (2, 16, 10)
    assert tokenizer.check() == []


def test_post_training_reaches_all_three_stages_of_the_decoder():
    tokenizer = build()
    tokens, before = tokenizer.encode(some_images()), encoder_digest(tokenizer)
    modules = tokenizer.decoder_modules()
    assert modules == [tokenizer.from_latent, tokenizer.row_to_grid, tokenizer.decoder]
    trained = [p for module in modules for p in module.requires_grad_(True).parameters()]
    optimizer = torch.optim.SGD(trained, lr=1e-3)
    tokenizer.decode(tokens).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    assert {name.partition(".")[0] for name in frozen_weights(tokenizer)} == {
        "encoder",
        "grid_to_row",
        "to_latent",
        "quantizer",
        "alignment",
    }
    assert last_layer(tokenizer) is tokenizer.decoder.conv_out.weight
    optimizer.step()
    assert encoder_digest(tokenizer) == before
    assert torch.equal(tokenizer.encode(some_images()), tokens)


def test_pyramid_halves_width_before_height():
    grid = torch.arange(16.0).reshape(1, 1, 4, 4)
    whole = 7.5
    halves = [6.5, 8.5]  # left, right
    quarters = [2.5, 4.5, 10.5, 12.5]
    eighths = [2.0, 3.0, 4.0, 5.0, 10.0, 11.0, 12.0, 13.0]  # columns of two places
    expected = torch.tensor([whole, whole, *halves, *quarters, *eighths])
    for count in (1, 2, 4, 8, 16):
        torch.testing.assert_close(pyramid(grid, count)[0, :, 0], expected[:count])


def test_depth_to_space_places_blocks_first():
    up, x = DepthToSpace(3), torch.randn(2, 3, 4, 5)
    channels, out = up.conv1(x), up(x)
    assert out.shape == (2, 3, 8, 10)
    for row, column, c in ((0, 0, 0), (0, 1, 2), (1, 0, 1), (1, 1, 2)):
        assert torch.equal(out[:, c, row::2, column::2], channels[:, (row * 2 + column) * 3 + c])


def test_adaptive_norm():
    torch.manual_seed(0)
    norm, x, grid = AdaptiveNorm(8, 5, groups=4), torch.randn(2, 8, 6, 6), torch.randn(2, 5, 3, 4)
    places = grid.flatten(2)
    mean = places.mean(2)
    spread = ((places - mean[..., None]).square().sum(2) / 11 + 1e-6).sqrt()
    scale, shift = F.linear(spread, norm.gamma.weight, norm.gamma.bias), norm.beta(mean)
    expected = F.group_norm(x, 4, eps=1e-6) * scale[:, :, None, None] + shift[:, :, None, None]
    torch.testing.assert_close(norm(x, grid), expected)


def test_block_against_its_formula():
    torch.manual_seed(0)
    block = CrossBlock(Size(width=8, depth=1, heads=2)).eval().requires_grad_(False)
    for parameter in block.parameters():
        parameter += 0.3 * torch.randn(parameter.shape)
    x, positions, memory, places = (torch.randn(2, n, 8) for n in (3, 3, 5, 5))

    def attend(part, queries, keys, values):
        w, b = part.in_proj_weight.chunk(3), part.in_proj_bias.chunk(3)
        q, k, v = (F.linear(t, w[i], b[i]).unflatten(-1, (2, 4)) for i, t in enumerate((queries, keys, values)))
        weights = torch.einsum("nqhd,nkhd->nhqk", q, k).div(2).softmax(-1)
        return part.out_proj(torch.einsum("nhqk,nkhd->nqhd", weights, v).flatten(2))

    h = block.norm1(x)
    y = x + attend(block.self_attn, h + positions, h + positions, h)
    y = y + attend(block.multihead_attn, block.norm2(y) + positions, memory + places, memory)
    y = y + block.linear2(F.gelu(block.linear1(block.norm3(y))))
    torch.testing.assert_close(block(x, positions, memory, places), y)


def test_every_position_starts_from_the_first_latent_and_attends_to_the_row():
    tokenizer = build()
    row = torch.randn(1, 8, 12, generator=torch.Generator().manual_seed(0))
    start = tokenizer.row_to_grid.states(row, 0)
    first = tokenizer.row_to_grid.embed(tokenizer.row_to_grid.ln_pre(row[:, 0]))
    torch.testing.assert_close(start, first[:, None].expand(-1, 16, -1))
    for i in range(8):
        changed = row.clone()
        changed[:, i] = torch.arange(12.0)
        assert not torch.allclose(tokenizer.row_to_grid(changed), tokenizer.row_to_grid(row))


@pytest.mark.parametrize(
    "settings", [{}, {"alignment": None}, {"adaptive_norm": False}, {"depth_to_space": False}, {"show_usage": False}]
)
def test_the_layout_of_the_authors_and_back(settings, tmp_path):
    tokenizer, images = build(**settings), some_images()
    released = export_weights(tokenizer)
    again = load_pretrained("gigatok_tokenizer", released, CONFIG)
    assert again.config == tokenizer.config
    tokens = tokenizer.encode(images)
    assert torch.equal(again.encode(images), tokens)
    assert torch.equal(again.decode(tokens), tokenizer.decode(tokens))
    write_snapshot(tmp_path / "snapshot", {"kind": "tokenizer", "config": plain(again.config)}, again.state_dict(), {})
    assert torch.equal(load_tokenizer(tmp_path / "snapshot").decode(tokens), tokenizer.decode(tokens))


def test_names_and_shapes_of_the_authors():
    shapes = {name: tuple(tensor.shape) for name, tensor in export_weights(build()).items()}
    for name, shape in {
        "s2to1encoder.positional_embedding": (16, 1, 16),
        "s2to1encoder.latent_token_positional_embedding": (8, 1, 16),
        "s2to1encoder.encoder_embed.weight": (16, 12),
        "s2to1encoder.conv_out.weight": (12, 16, 1, 1),
        "s2to1encoder.transformer.1.multihead_attn.in_proj_weight": (48, 16),
        "s1to2decoder.decoder_embed.weight": (24, 12),
        "s1to2decoder.conv_out.weight": (12, 24, 3, 3),
        "s1to2decoder.distill_mlp.4.weight": (10, 20),
        "decoder.adaptive.0.gamma.weight": (16, 12),  # the lowest resolution
        "decoder.conv_blocks.0.upsample.conv1.weight": (64, 16, 3, 3),
        "post_quant_conv.weight": (12, 4, 1, 1),
        "quantize.codebook_used": (65536,),
    }.items():
        assert shapes[name] == shape, name


def test_double_precision():
    tokenizer = build()
    tokens = tokenizer.encode(some_images())
    single, tokenizer = tokenizer.decode(tokens), tokenizer.double()
    assert tokenizer.decode(tokens).dtype == torch.float64
    torch.testing.assert_close(tokenizer.decode(tokens).float(), single, atol=1e-4, rtol=1e-4)
    assert torch.equal(tokenizer.encode(some_images().double()), tokens)


def test_bad_input_is_one_sentence():
    tokenizer = build()
    released = export_weights(tokenizer)
    for call, words in (
        (lambda: tokenizer.encode(some_images(1, 16)), r"takes \(N, 3, 8, 8\)"),
        (lambda: tokenizer.decode(torch.zeros(2, 16, dtype=torch.int64)), "a row of 8"),
        (lambda: tokenizer.decode(torch.zeros(2, 8, dtype=torch.int64), grid=(2, 4)), "a grid of 2 x 4"),
        (lambda: load_pretrained("gigatok_tokenizer", released, {"norm_groups": 4}), "lacks encoder_heads"),
        (lambda: load_pretrained("gigatok_tokenizer", released, {"last_level_2d_query_init": True}), "last_level"),
        (lambda: load_pretrained("gigatok_tokenizer", {"x": torch.zeros(1)}), "another family"),
        (lambda: build(latents=6), "no power of two"),
        (lambda: build(grid_to_row={"width": 10, "heads": 3}), "heads 3"),
    ):
        with pytest.raises(UserError, match=words) as found:
            call()
        assert "\n" not in str(found.value)
