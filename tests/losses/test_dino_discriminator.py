import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import tiny
from robustok.config import validate
from robustok.devices import start_accelerator
from robustok.errors import UserError
from robustok.losses.adversarial import AdversarialConfig, LeCam
from robustok.losses.discriminators import DinoConfig, DinoHeads, carried_config, frozen_features, load_heads
from robustok.losses.discriminators.dino import DinoBackbone, LocalBatchNorm, SpectralConv1d, fit
from robustok.training import adversary as adversaries
from robustok.training.common import adversary_learning_rate
from robustok.training.decoder_losses import make_adversary
from robustok.training.tokenizer import train_tokenizer

SMALL = {"image_size": 32, "patch_size": 8, "width": 16, "depth": 3, "heads": 2, "read_after": (0, 2), "kernel_size": 3}


def some_images(count=3, size=32, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_weights(seed=0):
    """A whole discriminator in one mapping, every weight drawn: layer norms and biases would hide mistakes."""
    config = DinoConfig(**SMALL)
    state = {f"dino.{k}": v for k, v in DinoBackbone(config).vit.state_dict().items()}
    state |= {f"disc.{k}": v for k, v in DinoHeads(config).state_dict().items()}
    drawn = {k: noise(*v.shape, seed=seed + i) / math.sqrt(v[0].numel()) for i, (k, v) in enumerate(state.items())}
    return {k: F.normalize(v, dim=0) if k.endswith(("weight_u", "weight_v")) else v for k, v in drawn.items()}


def parts(weights):
    """The weights of the backbone and those of the heads."""
    return [{k[5:]: v for k, v in weights.items() if k.startswith(prefix)} for prefix in ("dino.", "disc.")]


def load(weights, **settings):
    """Backbone and heads in evaluation mode."""
    of_backbone, of_heads = parts(weights)
    heads = load_heads(SMALL | settings, of_heads)
    return DinoBackbone(heads.config).load(of_backbone), heads.eval()


@pytest.fixture(scope="module")
def backbone_file(tmp_path_factory):
    """Random weights in the layout of the authors' file."""
    path = tmp_path_factory.mktemp("dino") / "dino.pth"
    torch.save({k.removeprefix("dino."): v for k, v in some_weights().items() if k.startswith("dino.")}, path)
    return path


# Against a plain reading


def plain_activations(w, images):
    """Activations (3, N, 16, 16) of images (N, 3, 32, 32), block by block."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        return F.layer_norm(x, (16,), w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)

    x = F.conv2d(((images + 1) / 2 - mean) / std, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=8)
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x.flatten(2).mT], 1) + w["pos_embed"]
    read = [x]
    for i in range(3):
        block = f"blocks.{i}"
        q, k, v = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").unflatten(-1, (3, 2, 8)).unbind(2)
        weights = (torch.einsum("nqhd,nkhd->nhqk", q, k) / math.sqrt(8)).softmax(-1)
        x = x + linear(torch.einsum("nhqk,nkhd->nqhd", weights, v).flatten(2), f"{block}.attn.proj")
        h = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
        h = h / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + linear(h, f"{block}.mlp.fc2")
        read += [x] if i in (0, 2) else []
    return torch.stack([(x[:, 1:] + x[:, :1]).mT for x in read])


def plain_convolution(w, name, x):
    """Circular convolution (N, in, L) with the weight over its spectral norm, estimated by the given vectors."""
    weight, u, v = (w[f"{name}.weight_{part}"] for part in ("orig", "u", "v"))
    weight, reach = weight / (u @ weight.flatten(1) @ v), weight.shape[-1] // 2
    total = w[f"{name}.bias"][:, None]
    for offset in range(-reach, reach + 1):  # the neighbour at this offset, around the end
        total = total + weight[:, :, offset + reach] @ x.roll(-offset, -1)
    return total


def plain_logits(w, activations):
    logits = []
    for k, x in enumerate(activations):

        def layer(name, x, k=k):
            x = plain_convolution(w, f"heads.{k}.{name}.0", x)
            mean, variance = x.mean((0, 2), keepdim=True), x.var((0, 2), unbiased=False, keepdim=True)
            x = (x - mean) / (variance + 1e-6).sqrt()
            return F.leaky_relu(
                x * w[f"heads.{k}.{name}.1.weight"][:, None] + w[f"heads.{k}.{name}.1.bias"][:, None], 0.2
            )

        x = layer("0", x)
        x = (x + layer("1.fn", x)) / math.sqrt(2)
        logits.append(plain_convolution(w, f"heads.{k}.2", x)[:, 0])
    return torch.cat(logits, 1)


@torch.no_grad()
def test_backbone_and_heads_against_a_plain_reading():
    weights, images = some_weights(), some_images()
    backbone, heads = load(weights)
    of_backbone, of_heads = parts(weights)
    activations = plain_activations(of_backbone, images)
    torch.testing.assert_close(backbone(images), activations, atol=1e-4, rtol=1e-4)
    logits = plain_logits(of_heads, activations)
    assert logits.shape == (3, 3 * 16)
    torch.testing.assert_close(heads(backbone(images)), logits, atol=1e-3, rtol=1e-3)
    exact, _ = load(weights, gelu="exact")
    errors = [(found - activations).abs().mean() for found in (exact(images), backbone(images))]
    assert errors[0] > 20 * errors[1]


def test_sizes_of_the_paper():
    with torch.device("meta"):
        heads, backbone = DinoHeads(DinoConfig()), DinoBackbone(DinoConfig())
    assert sum(p.numel() for p in heads.parameters()) == 7_386_245
    assert sum(p.numel() for p in backbone.parameters()) == 21_665_664
    shapes = {name: tuple(value.shape) for name, value in heads.state_dict().items() if name.startswith("heads.4.")}
    assert shapes["heads.4.1.fn.0.weight_orig"] == (384, 384, 9)
    assert shapes["heads.4.1.fn.0.weight_v"] == (3456,)
    assert shapes["heads.4.2.weight_u"] == (1,)
    assert len(shapes) == 4 + 2 + 4 + 2 + 4


def test_key_biases_are_dropped_and_change_nothing():
    weights = some_weights()
    backbone, _ = load(weights)
    bias = backbone.vit.blocks[1].attn.qkv.bias
    assert not bias[16:32].any()
    assert torch.equal(bias[32:], weights["dino.blocks.1.attn.qkv.bias"][32:])
    assert weights["dino.blocks.1.attn.qkv.bias"][16:32].all()  # the caller's stay as they are


# Its parts


def test_larger_images_are_cropped_or_averaged_and_smaller_ones_enlarged():
    images = some_images(2, 48)
    rng, found = torch.Generator().manual_seed(0), []
    averaged = images.unfold(2, 3, 3).unfold(3, 3, 3).mean((-1, -2))  # 48 to 16: means of 3 x 3
    torch.testing.assert_close(fit(images, 16), averaged)
    for _ in range(200):
        seen = fit(images, 16, rng)
        corner = (images[0] == seen[0, :, :1, :1]).all(0)[:33, :33].nonzero().tolist()
        if corner:
            ((top, left),) = corner
            assert torch.equal(seen, images[:, :, top : top + 16, left : left + 16])  # alike for the whole batch
        else:
            torch.testing.assert_close(seen, averaged)
        found += corner
    assert 70 < len(found) < 130
    assert {0, 32} < {top for top, _ in found} <= set(range(33))
    small = some_images(2, 8)
    torch.testing.assert_close(fit(small, 16, rng), F.interpolate(small, scale_factor=2, mode="bicubic"))
    assert fit(small, 8, rng) is small


@pytest.mark.parametrize(("count", "sizes"), [(1, [1]), (8, [8]), (9, [5, 4]), (16, [8, 8]), (18, [6, 6, 6])])
@torch.no_grad()
def test_local_batch_norm_by_groups(count, sizes):
    x = noise(count, 4, 5) * 3 + 1
    layer = LocalBatchNorm(4)
    layer.weight.copy_(noise(4, seed=1))
    layer.bias.copy_(noise(4, seed=2))
    plain = torch.cat(
        [F.batch_norm(part, None, None, layer.weight, layer.bias, True, eps=1e-6) for part in x.split(sizes)]
    )
    torch.testing.assert_close(layer(x), plain)
    torch.testing.assert_close(layer.eval()(x), plain)
    assert layer(x.bfloat16()).dtype == torch.float32


@torch.no_grad()
def test_spectral_norm_moves_once_a_training_forward():
    torch.manual_seed(0)
    layer = SpectralConv1d(6, 4, 3)
    matrix, u = layer.weight_orig.flatten(1), layer.weight_u.clone()
    layer.eval()(noise(1, 6, 5))
    assert torch.equal(layer.weight_u, u)
    layer.train()(noise(1, 6, 5))
    v = F.normalize(matrix.T @ u, dim=0)
    torch.testing.assert_close(layer.weight_v, v)
    torch.testing.assert_close(layer.weight_u, F.normalize(matrix @ v, dim=0))
    for _ in range(50):
        layer(noise(1, 6, 5))
    largest = torch.linalg.matrix_norm(matrix, ord=2)
    torch.testing.assert_close(layer._largest_singular_value(), largest)


def test_real_images_and_reconstructions_have_batch_statistics_of_their_own():
    torch.manual_seed(0)
    heads = DinoHeads(DinoConfig(**SMALL)).eval()
    real, fake = noise(3, 3, 16, 16), 2 * noise(3, 3, 16, 16, seed=1)
    torch.testing.assert_close(heads(real, fake), torch.cat([heads(real), heads(fake)]))
    assert not torch.allclose(heads(torch.cat([real, fake], 1)), heads(real, fake), atol=1e-2)


# Files


def test_heads_are_loaded_as_they_are():
    _, weights = parts(some_weights())
    heads = load_heads(SMALL, weights)
    assert heads.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in heads.state_dict().items())
    assert (heads.config.width, heads.config.kernel_size, heads.config.read_after) == (16, 3, (0, 2))
    assert heads.training


def test_weights_that_do_not_fit():
    weights = some_weights()
    kernel, bias = "disc.heads.1.1.fn.0.weight_orig", "disc.heads.2.2.bias"
    cases = {
        r"heads\.2\.2\.bias": {k: v for k, v in weights.items() if k != bias},
        r"Unexpected key.*heads\.0\.9": weights | {"disc.heads.0.9": torch.zeros(1)},
        r"size mismatch for heads\.1\.1\.fn\.0\.weight_orig": weights | {kernel: weights[kernel].mT},
        r"backbone: .*Missing.*norm\.bias": {k: v for k, v in weights.items() if k != "dino.norm.bias"},
    }
    for said, given in cases.items():
        with pytest.raises(UserError, match=said) as error:
            load(given)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"the weights have 3 heads, config reads after blocks \[1\]"):
        load(weights, read_after=[1])
    for key, value in {"kernel_size": 4, "heads": 5, "read_after": [2, 1], "depth": 8}.items():
        with pytest.raises(UserError, match=key):
            validate(DinoConfig, {key: value})


def test_the_backbone_from_local_files(tmp_path, backbone_file):
    config = DinoConfig(**SMALL, weights=backbone_file)
    expected, _ = load(some_weights())
    features = frozen_features(config, torch.device("cpu"))
    assert torch.equal(features(some_images(), torch.Generator()), expected(some_images()))
    assert not any(p.requires_grad for p in features.parameters())
    full = timm.create_model("vit_small_patch16_224.dino")
    first = {name: v for name, v in full.state_dict().items() if not name.startswith("blocks.") or ".0." in name[:9]}
    torch.save(first, tmp_path / "dino_deitsmall16_pretrain.pth")
    real = DinoConfig(depth=1, read_after=(0,), weights=tmp_path / "dino_deitsmall16_pretrain.pth")
    loaded = frozen_features(real, torch.device("cpu")).vit
    assert torch.equal(loaded.pos_embed, full.pos_embed)
    assert torch.equal(loaded.blocks[0].mlp.fc2.weight, full.blocks[0].mlp.fc2.weight)
    with pytest.raises(
        UserError, match=r"backbone vit_small_patch16_224\.dino: .*; give a local file as discriminator\.w"
    ):
        frozen_features(config.model_copy(update={"depth": 2}), torch.device("cpu"))
    with pytest.raises(
        UserError, match=r"cannot load the discriminator's .*none\.pth: No such file or directory; give a local"
    ):
        frozen_features(config.model_copy(update={"weights": tmp_path / "none.pth"}), torch.device("cpu"))


# In training


def words(backbone_file):
    sizes = [f"discriminator.{key}={list(v) if isinstance(v, tuple) else v}" for key, v in SMALL.items()]
    return ("adversarial.weight=0.1", "discriminator.name=dino", f"discriminator.weights={backbone_file}", *sizes)


def adversary(tmp_path, backbone_file, **settings):
    run = tiny.main_run(tmp_path / "run", *words(backbone_file))
    torch.manual_seed(0)
    return adversaries.Adversary(run, AdversarialConfig(**settings), run.discriminator, start_accelerator(16))


def test_the_term_reaches_images_but_no_weight_and_the_step_only_the_heads(tmp_path, backbone_file):
    trained = adversary(tmp_path, backbone_file)
    layer = torch.nn.Parameter(torch.ones(1))
    images = some_images(16, 16)
    reconstructions = images * layer
    fake = trained.features(reconstructions, 0, "fake")
    loss, _ = trained.term(fake, reconstructions, reconstructions.square().mean(), layer)
    loss.backward()
    assert layer.grad.abs() > 0
    before = {k: v.clone() for k, v in trained.backbone.vit.state_dict().items()}
    assert all(p.grad is None for p in [*trained.network.parameters(), *trained.backbone.parameters()])
    found = trained.step(images, fake, 0)
    assert all(p.grad is not None for p in trained.network.parameters())
    assert not any(p.requires_grad for p in trained.backbone.parameters())
    assert all(torch.equal(v, before[k]) for k, v in trained.backbone.vit.state_dict().items())
    assert set(found) == {"d_hinge", "d_lecam", "d_real", "d_fake"}
    assert {name.split("/")[0].split(".")[0] for name in trained.state()["network"]} == {"heads"}


def test_heads_learn_to_distinguish_noise_and_stripes(tmp_path, backbone_file):
    trained = adversary(tmp_path, backbone_file, learning_rate=3e-2)
    stripes = torch.arange(16).remainder(4).sub(1.5).expand(16, 3, 16, 16)
    noise = [trained.features(some_images(16, 16, seed), 0, "fake") for seed in range(30)]
    hinge = [trained.step(stripes, fake, 0)["d_hinge"].item() for fake in noise]
    assert hinge[-1] < 0.75 * hinge[0]


def test_the_state_holds_heads_power_iteration_and_averages(tmp_path, backbone_file):
    images, fakes = some_images(16, 16), some_images(16, 16, seed=1)
    trained, other = adversary(tmp_path, backbone_file), adversary(tmp_path, backbone_file)
    fakes = trained.features(fakes, 0, "fake")
    for step in range(2):
        trained.step(images, fakes, step)
    other.load_state(copy.deepcopy(trained.state()))
    assert other.lecam == trained.lecam != LeCam()
    assert trained.step(images, fakes, 2) == other.step(images, fakes, 2)
    assert all(torch.equal(value, other.network.state_dict()[k]) for k, value in trained.network.state_dict().items())


def test_a_schedule_of_its_own_begins_at_its_start(tmp_path):
    run = tiny.main_run(tmp_path / "run", "steps=100", "learning_rate=1", "min_learning_rate=1e-3")
    settings = AdversarialConfig(start=40, learning_rate=0.1, warmup_steps=3)
    rates = [adversary_learning_rate(run, settings, step) for step in range(40, 100)]
    assert rates[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    middle = 3 + (60 - 3) / 2
    assert (rates[math.floor(middle)] + rates[math.ceil(middle)]) / 2 == pytest.approx((0.1 + 1e-3) / 2, rel=1e-3)
    assert rates[-1] < 1.2e-3
    assert adversary_learning_rate(run, AdversarialConfig(start=40), 50) == pytest.approx(
        (8e-4 + 8e-4) / 2
    )  # the run's cosine, floored at its own peak


def test_neither_backbone_nor_heads_run_before_the_start(tmp_path, backbone_file, monkeypatch):
    calls, features, logits = [], DinoBackbone.forward, DinoHeads.forward
    monkeypatch.setattr(DinoBackbone, "forward", lambda self, *a: calls.append("backbone") or features(self, *a))
    monkeypatch.setattr(DinoHeads, "forward", lambda self, *a: calls.append("heads") or logits(self, *a))
    settings = (*words(backbone_file), "adversarial.start=2")
    train_tokenizer(tiny.main_run(tmp_path / "early", *settings, "steps=2"))
    assert calls == []
    train_tokenizer(tiny.main_run(tmp_path / "late", *settings, "steps=3"))
    assert calls == ["backbone", "heads", "backbone", "heads"]  # fakes for the decoder; then the real images


def test_post_training_carries_the_heads_over_and_finds_the_backbone(tmp_path, backbone_file):
    moved = tmp_path / "moved.pth"
    moved.write_bytes(backbone_file.read_bytes())
    train_tokenizer(tiny.main_run(tmp_path / "run", *words(moved), "steps=2"))
    saved = load_file(tmp_path / "run" / "snapshot" / "00000002" / "discriminator.safetensors")
    moved.unlink()
    run = tiny.post_run(tmp_path / "post", tmp_path / "run", tmp_path / "pairs", *words(backbone_file)[:3])
    carried = make_adversary(run, start_accelerator(16))
    assert carried.settings.width == 16
    assert saved.keys() == carried.network.state_dict().keys()  # no weight of the backbone
    assert all(torch.equal(value, saved[name]) for name, value in carried.network.state_dict().items())
    without = tiny.post_run(tmp_path / "post", tmp_path / "run", tmp_path / "pairs", "adversarial.weight=0.1")
    with pytest.raises(UserError, match=r"moved\.pth: No such file or directory; give a local file as discrim"):
        make_adversary(without, start_accelerator(16))
    with pytest.raises(UserError, match="unknown discriminator 'parrot'; known: patch, dino"):
        carried_config({"name": "parrot"}, run.discriminator, source="there")
