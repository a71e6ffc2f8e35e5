import math

import pytest
import torch
import torch.nn.functional as F

from robustok.config import validate
from robustok.errors import UserError
from robustok.generators.gpt import GPT, GPT_SIZES, GPTConfig
from robustok.generators.sampling import Sampling
from robustok.pretrained.export import export_weights
from robustok.pretrained.load import load_pretrained
from tiny_tokens import CLASSES, K, L, batch, randomised
from tiny_tokens import GPTS as VARIANTS


def build(variant="llamagen", length=L, **settings):
    """A tiny GPT in which every parameter is random and matters, those that start at zero included."""
    torch.manual_seed(0)
    size = {"width": 32, "depth": 2, "heads": 4, "mlp_width": 24} | VARIANTS[variant] | settings
    model = GPT(GPTConfig(**size), K, length, CLASSES)
    return randomised(model)


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)


def rms(x, weight):
    return x / ((x * x).mean() + 1e-5).sqrt() * weight


def layer_norm(x, weight, bias):
    return (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() * weight + bias


def rotated(x, position):
    """A query or key of head width 8, rotated by row and column of its token; that of the class is zero."""
    if position is None:
        return torch.zeros_like(x)
    x = x.clone()
    row, column = position
    for pair, angle in enumerate([row, row / 100, column, column / 100]):  # 10000 ** (-2 / 4) is 1 / 100
        a, b = x[2 * pair].item(), x[2 * pair + 1].item()
        x[2 * pair] = a * math.cos(angle) - b * math.sin(angle)
        x[2 * pair + 1] = b * math.cos(angle) + a * math.sin(angle)
    return x


def logits_by_hand(model, tokens, label):
    """The method written out for one image: every position, head and earlier position in a loop of its own."""
    state, config = model.state_dict(), model.config
    heads, groups, width, side = config.heads, config.kv_heads or config.heads, config.width, math.isqrt(L)
    xs = [state["cls_embedding.embedding_table.weight"][label], *state["tok_embeddings.weight"][tokens]]
    if config.positions == "learned":
        xs = [x + position for x, position in zip(xs, state["positional_embedding"], strict=True)]
    condition = F.silu(xs[0])
    for i in range(config.depth):
        block = {k.removeprefix(f"layers.{i}."): v for k, v in state.items() if k.startswith(f"layers.{i}.")}
        m = torch.tensor([0, 0, 1, 0, 0, 1])[:, None].expand(6, width).float()
        if config.adaptive_norm:
            m = linear(block, "adaLN_modulation.1", condition).view(6, width)
        queries, keys, values = [], [], []
        for p, x in enumerate(xs):
            x = rms(x, block["attention_norm.weight"]) * (1 + m[1]) + m[0]
            rows = linear(block, "attention.wqkv", x).view(heads + 2 * groups, width // heads)
            q, k, v = rows[:heads], rows[heads : heads + groups], rows[heads + groups :]
            if config.query_key_norm:
                q, k = (
                    [layer_norm(h, block[f"attention.{n}.weight"], block[f"attention.{n}.bias"]) for h in part]
                    for n, part in (("q_norm", q), ("k_norm", k))
                )
            if config.positions == "rotary":
                position = divmod(p - 1, side) if p else None
                q, k = [rotated(h, position) for h in q], [rotated(h, position) for h in k]
            queries.append(q), keys.append(k), values.append(v)
        for p in range(len(xs)):
            mixed = []
            for h in range(heads):
                g = h * groups // heads
                scores = torch.stack([queries[p][h] @ keys[e][g] for e in range(p + 1)]) / math.sqrt(width // heads)
                mixed.append(sum(s * values[e][g] for e, s in enumerate(scores.softmax(0))))
            x = xs[p] + m[2] * linear(block, "attention.wo", torch.cat(mixed))
            y = rms(x, block["ffn_norm.weight"]) * (1 + m[4]) + m[3]
            y = F.silu(linear(block, "feed_forward.w1", y)) * linear(block, "feed_forward.w3", y)
            xs[p] = x + m[5] * linear(block, "feed_forward.w2", y)
    shift, scale = torch.zeros(2, width)
    if config.adaptive_norm:
        shift, scale = linear(state, "final_adaLN.1", condition).view(2, width)
    return torch.stack([linear(state, "output", rms(x, state["norm.weight"]) * (1 + scale) + shift) for x in xs])


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_logits_match_the_method_read_literally(variant):
    model = build(variant).double()
    tokens, _, _ = batch(2)
    labels = torch.tensor([3, model.null_label])
    logits = model.logits(tokens, labels)
    assert logits.shape == (2, L + 1, K)
    for i in range(2):
        # The tables are float32 as in the release.
        assert torch.allclose(logits[i], logits_by_hand(model, tokens[i], int(labels[i])), atol=1e-5)
    output = model(tokens, labels, torch.arange(L).expand(2, L))
    assert torch.equal(output.prediction, logits[:, :L])
    assert torch.equal(output.targets, tokens)


def test_sizes_are_those_of_the_release():
    for size, millions in {"b": 111, "l": 343, "xl": 775, "xxl": 1411, "3b": 3100}.items():
        with torch.device("meta"):
            model = GPT(GPT_SIZES[size], codebook_size=16384, length=256, classes=1000)
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)
    assert GPTConfig(width=768).hidden == 2048


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_initial_loss_is_ln_k(variant):
    torch.manual_seed(0)
    model = GPT(GPTConfig(width=32, depth=2, heads=4, **VARIANTS[variant]), K, L, CLASSES)
    output = model(*batch(64)[:2])
    loss = F.cross_entropy(output.prediction.flatten(0, 1), output.targets.flatten())
    assert loss.item() == pytest.approx(math.log(K), abs=0.02)


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_batch_is_learned_by_heart(variant):
    torch.manual_seed(0)
    model = GPT(GPTConfig(width=32, depth=2, heads=4, dropout=0, **VARIANTS[variant]), K, L, CLASSES)
    tokens, labels = batch(4)[0], torch.arange(4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        output = model(tokens, labels)
        loss = F.cross_entropy(output.prediction.flatten(0, 1), output.targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    recited = model.generate(labels, Sampling(temperature=1e-5), torch.Generator().manual_seed(0))
    assert torch.equal(recited, tokens)


def test_another_order_or_length_is_refused():
    model = build()
    reference, labels, _ = batch(2)
    with pytest.raises(UserError, match="raster order only"):
        model(reference, labels, torch.arange(L).flip(0).expand(2, L))
    with pytest.raises(UserError, match="8 tokens per image"):
        model(reference[:, :8], labels)
    with pytest.raises(UserError, match="square grid"):
        build(length=10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 30, "heads": 4}, "do not divide width 30"),
        ({"width": 32, "heads": 4, "kv_heads": 3}, "do not divide heads 4"),
        ({"width": 12, "heads": 2}, "multiple of 4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        validate(GPTConfig, settings)


CONFIG = {"args": {"n_head": 4, "block_size": L, "vocab_size": K, "num_classes": CLASSES, "cls_token_num": 1}}


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_pretrained_weights_load_and_are_exported_unchanged(variant):
    original, family = build(variant), "llamagen_gpt" if "giga" not in variant else "gigatok_gpt"
    weights = original.state_dict()
    assert {"layers.1.attention.wqkv.weight", "output.weight", "cls_embedding.embedding_table.weight"} < weights.keys()
    config = CONFIG | {"derived": {"null_class": CLASSES, "ffn_hidden_dim": 24, "head_dim": 8, "grid": 3}}
    model = load_pretrained(family, {"model": weights}, config)
    tokens, labels, _ = batch(2)
    assert torch.equal(model.logits(tokens, labels), original.logits(tokens, labels))
    assert export_weights(model).keys() == weights.keys()
    assert model.latent_shape == (L, 8)
    assert model.sampling.guided
    assert model.sampling.guidance_power == 0
    assert model.sampling.guidance_from == (0.18 if "giga" in variant else 0)
    assert model.check() == []


def test_a_null_class_that_was_never_trained_and_missing_guidance_are_reported():
    model = build()
    model.sampling = Sampling()
    with torch.no_grad():
        model.cls_embedding["embedding_table"].weight[-1] = 0
    assert [problem.split()[0] for problem in model.check()] == ["Row", "No"]


@pytest.mark.parametrize(
    ("family", "variant", "config", "message"),
    [
        ("llamagen_gpt", "llamagen", {"n_head": 4}, "lacks block_size"),
        ("llamagen_gpt", "llamagen", {"block_size": L}, "lacks n_head"),
        ("llamagen_gpt", "llamagen", {"n_head": 4, "block_size": 10}, "square grid"),
        ("llamagen_gpt", "llamagen", {"n_head": 3, "block_size": L}, "heads do not divide"),
        ("llamagen_gpt", "grouped", CONFIG | {"n_kv_head": 4}, "kv_heads = 4, the weights have 2"),
        ("llamagen_gpt", "llamagen", CONFIG | {"model_type": "t2i"}, "model_type"),
        ("llamagen_gpt", "gigatok", CONFIG, "unexpected positional_embedding"),
        ("gigatok_gpt", "llamagen", CONFIG, "positional_embedding is missing"),
        ("gigatok_gpt", "gigatok", CONFIG | {"use_adaLN": True}, "use_adaLN = True, the weights have False"),
        ("gigatok_gpt", "gigatok", CONFIG | {"use_qk_nrom": True}, "did you mean 'use_qk_norm'"),
        ("gigatok_gpt", "gigatok", CONFIG | {"rope": True}, "cannot sample"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(family, variant, config, message):
    with pytest.raises(UserError, match=message) as error:
        load_pretrained(family, build(variant).state_dict(), config)
    assert "\n" not in str(error.value)
