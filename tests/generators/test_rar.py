import math

import pytest
import torch
import torch.nn.functional as F

import robustok.generators.rar as rar
import tiny_tokens
from robustok.config import validate
from robustok.errors import UserError
from robustok.generators.rar import RAR, RAR_SIZES, RARConfig, draw_orders, drop_labels, random_share
from robustok.generators.sampling import Sampling
from robustok.randomness import image_rngs
from tiny_tokens import CLASSES, GUIDED, K, forced_logits, full_logits, randomised

L = 12


def build(**settings):
    """A tiny RAR in which every parameter is random and matters, those that start at zero included."""
    torch.manual_seed(0)
    model = RAR(RARConfig(**({"width": 16, "depth": 2, "heads": 2} | settings)), K, L, CLASSES)
    return randomised(model)


def batch(count):
    return tiny_tokens.batch(count, L)


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(x, weight=1.0, bias=0.0):
    return (x - x.mean()) / (x.var(unbiased=False) + 1e-6).sqrt() * weight + bias


def logits_by_hand(model, tokens, label, order):
    """RAR written out for one image: every position, head and earlier position in a loop of its own."""
    state = model.state_dict()
    heads, width = model.config.heads, model.config.width
    own, target, times = (state[n][0] for n in ("pos_embed", "target_aware_pos_embed", "timesteps_embeddings"))
    condition = state["embeddings.weight"][K + 1 + label]
    xs = [state["cls_token"][0, 0] + own[0], condition + own[1] + target[2 + order[0]]]
    for j in range(L):
        x = state["embeddings.weight"][tokens[order[j]]] + own[2 + order[j]]
        xs.append(x + target[2 + order[j + 1]] if j + 1 < L else x)
    for i in range(model.config.depth):
        block = {k.removeprefix(f"blocks.{i}."): v for k, v in state.items() if k.startswith(f"blocks.{i}.")}
        queries, keys, values, modulations = [], [], [], []
        for p, x in enumerate(xs):
            m = linear(block, "adaLN_modulation.1", F.silu(condition + times[p])).view(6, width)
            x = norm(x, block["norm1.weight"], block["norm1.bias"]) * (1 + m[1]) + m[0]
            q, k, v = linear(block, "attn.qkv", x).view(3, heads, width // heads)
            queries.append([norm(h, block["attn.q_norm.weight"], block["attn.q_norm.bias"]) for h in q])
            keys.append([norm(h, block["attn.k_norm.weight"], block["attn.k_norm.bias"]) for h in k])
            values.append(v)
            modulations.append(m)
        for p, m in enumerate(modulations):
            mixed = []
            for h in range(heads):
                scores = torch.stack([queries[p][h] @ keys[e][h] for e in range(p + 1)]) / math.sqrt(width // heads)
                mixed.append(sum(s * values[e][h] for e, s in enumerate(scores.softmax(0))))
            x = xs[p] + m[2] * linear(block, "attn.proj", torch.cat(mixed))
            y = norm(x, block["norm2.weight"], block["norm2.bias"]) * (1 + m[4]) + m[3]
            y = linear(block, "mlp.fc1", y)
            y = y * (1 + torch.erf(y / math.sqrt(2))) / 2
            xs[p] = x + m[5] * linear(block, "mlp.fc2", y)
    rows = []
    for p in range(1, L + 2):
        scale, shift = linear(state, "adaln_before_head.adaLN_modulation.1", F.silu(condition + times[p])).view(
            2, width
        )
        rows.append(linear(state, "lm_head", norm(xs[p]) * (1 + scale) + shift))
    return torch.stack(rows)


@pytest.mark.parametrize("share", [0.0, 1.0])
@torch.no_grad()
def test_logits_and_targets_match_the_method_read_literally(share):
    model = build(position_rows=40, timestep_rows=30)
    tokens, _, rng = batch(2)
    labels = torch.tensor([3, model.null_label])
    orders = draw_orders(2, L, share, rng)
    logits = model.logits(tokens, labels, orders)
    assert logits.shape == (2, L + 1, K)
    for i in range(2):
        expected = logits_by_hand(model, tokens[i].tolist(), int(labels[i]), orders[i].tolist())
        assert torch.allclose(logits[i], expected, atol=2e-5)
    output = model(tokens, labels, orders if share else None)
    assert torch.equal(output.prediction, logits[:, :L])
    assert output.targets.tolist() == [[tokens[i, j].item() for j in orders[i]] for i in range(2)]


def test_sizes_and_names_are_those_of_the_release():
    counts = {"b": 265_645_312, "l": 467_962_880, "xl": 963_292_416, "xxl": 1_507_174_528}
    for size, count in counts.items():
        config = RAR_SIZES[size].model_copy(update={"position_rows": 1280, "timestep_rows": 356})
        with torch.device("meta"):
            model = RAR(config, codebook_size=4096, length=256, classes=1000)
        assert sum(p.numel() for p in model.parameters()) == count
        if size == "b":
            shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
            assert len(shapes) == 441
            assert shapes["embeddings.weight"] == (5098, 768)
            assert shapes["blocks.23.attn.q_norm.bias"] == (48,)
            assert shapes["adaln_before_head.adaLN_modulation.1.weight"] == (1536, 768)


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(UserError, match="heads = 5: heads 5 do not divide width 16"):
        validate(RARConfig, {"width": 16, "heads": 5})
    with pytest.raises(UserError, match="at least 14"):
        build(position_rows=13)
    tokens, labels, _ = batch(2)
    with pytest.raises(UserError, match="11 tokens per image"):
        build()(tokens[:, :11], labels)


def test_an_untrained_model_knows_nothing():
    torch.manual_seed(0)
    model = RAR(RARConfig(width=32, depth=2, heads=2), codebook_size=512, length=64, classes=10)
    tokens = torch.randint(512, (8, 64))
    output = model(tokens, torch.arange(8), draw_orders(8, 64, 1.0, torch.Generator().manual_seed(0)))
    loss = F.cross_entropy(output.prediction.flatten(0, 1), output.targets.flatten())
    assert loss.item() == pytest.approx(math.log(512), abs=0.05)


def test_it_learns_one_batch_by_heart_and_recites_it():
    torch.manual_seed(0)
    model = RAR(RARConfig(width=32, depth=2, heads=2, dropout=0), K, L, CLASSES)
    tokens, labels = batch(CLASSES)[0], torch.arange(CLASSES)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        output = model(tokens, labels)
        loss = F.cross_entropy(output.prediction.flatten(0, 1), output.targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    recited = model.generate(labels, Sampling(temperature=1e-5), torch.Generator().manual_seed(0))
    assert torch.equal(recited, tokens)


@pytest.mark.parametrize("sampling", [Sampling(), GUIDED])
@pytest.mark.parametrize("ahead", [1, 5, 1000])
def test_cached_and_full_logits_agree(monkeypatch, sampling, ahead):
    model = build()
    tokens, labels, _ = batch(4)
    classes = len(labels.unique()) + sampling.guided
    monkeypatch.setattr(rar, "MODULATION_VALUES", ahead * classes * 2 * 6 * 16)
    cached, full = forced_logits(model, tokens, labels, sampling), full_logits(model, tokens, labels, sampling)
    assert full.std() > 0.5
    assert (cached - full).abs().max() < 1e-5 * max(1, full.abs().max())


@pytest.mark.parametrize("sigma", [0.3, 0.7, 0.95])
def test_the_kept_share_is_sigma(sigma):
    count = 400
    model = build(depth=1)
    with torch.no_grad():
        model.lm_head.bias[0] = 1e4  # always samples token 0, which the reference does not hold
    reference = torch.randint(1, K, (count, L), generator=torch.Generator().manual_seed(0))
    mixture = model.generate(torch.zeros(count).long(), Sampling(), torch.Generator().manual_seed(3), reference, sigma)
    kept = mixture == reference
    assert (mixture[~kept] == 0).all()
    assert abs(kept.float().mean().item() - sigma) < 4 * math.sqrt(sigma * (1 - sigma) / (count * L))


def test_guidance_0_and_1_both_sample_without_a_second_pass():
    model = build()
    labels = batch(4)[1]
    plain = model.generate(labels, Sampling(guidance_scale=1), image_rngs(0, range(4)))
    with torch.no_grad():
        model.embeddings.weight[-1] = torch.nan  # the row of "no class"
    assert torch.equal(model.generate(labels, Sampling(guidance_scale=0), image_rngs(0, range(4))), plain)


def test_random_share_anneals_linearly():
    values = [random_share(step, 125_000, 187_500) for step in (0, 124_999, 125_000, 156_250, 187_500, 250_000)]
    assert values == [1.0, 1.0, 1.0, 0.5, 0.0, 0.0]
    assert [random_share(step, 10, 10) for step in (9, 10)] == [1.0, 0.0]


def test_orders_are_permutations_in_the_asked_share():
    rng = torch.Generator().manual_seed(0)
    orders = draw_orders(4000, 6, 0.3, rng)
    assert torch.equal(orders.sort(dim=1).values, torch.arange(6).expand(4000, 6))
    shuffled = (orders != torch.arange(6)).any(dim=1)
    share = 0.3 * (1 - 1 / math.factorial(6))  # a random permutation may be raster
    assert abs(shuffled.float().mean().item() - share) < 4 * math.sqrt(share * (1 - share) / 4000)
    firsts = draw_orders(6000, 6, 1.0, rng)[:, 0].bincount(minlength=6)
    assert (firsts - 1000).abs().max() < 5 * math.sqrt(6000 / 6 * 5 / 6)
    assert torch.equal(draw_orders(5, 6, 0.0, rng), torch.arange(6).expand(5, 6))


def test_labels_are_dropped_at_the_asked_rate():
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(5).repeat(2000)
    dropped = drop_labels(labels, 0.1, null_label=5, rng=rng)
    gone = dropped == 5
    assert torch.equal(dropped[~gone], labels[~gone])
    assert abs(gone.float().mean().item() - 0.1) < 4 * math.sqrt(0.09 / len(labels))
    assert (drop_labels(labels, 0.0, 5, rng) == labels).all()
    assert (drop_labels(labels, 1.0, 5, rng) == 5).all()
