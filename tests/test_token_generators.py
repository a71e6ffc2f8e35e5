"""What every generator of tokens promises, whatever its network: a cache, mixtures, and randomness of each image."""

import pytest
import torch

from robustok.generators.gpt import GPT, GPTConfig
from robustok.generators.rar import RAR, RARConfig
from robustok.generators.sampling import (
    Sampling,
    draw_tokens,
    guidance_scales,
    guide,
    image_rngs,
    image_uniforms,
)
from robustok.types import Generator, UserError

K, L, CLASSES = 29, 9, 5
GUIDED = Sampling(guidance_scale=4, guidance_power=1.5, temperature=1.1, top_k=20, top_p=0.95)
WINDOW = Sampling(guidance_scale=3, guidance_power=0, guidance_from=0.3, guidance_until=0.7)
GPTS = {
    "llamagen": {"positions": "rotary"},
    "grouped": {"positions": "rotary", "kv_heads": 2},
    "gigatok": {"positions": "learned"},
    "gigatok_adaln": {"positions": "learned", "adaptive_norm": True, "query_key_norm": True},
}
MODELS = ("rar", *GPTS)


def build(name, seed=0, **settings):
    """A tiny generator in which every parameter is random and matters, those that start at zero included."""
    torch.manual_seed(seed)
    size = {"width": 32, "depth": 2, "heads": 4} | settings
    if name == "rar":
        model = RAR(RARConfig(**size), K, L, CLASSES)
    else:
        model = GPT(GPTConfig(**size, mlp_width=24, **GPTS[name]), K, L, CLASSES)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def batch(count):
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(K, (count, L), generator=rng)
    return tokens, torch.randint(CLASSES, (count,), generator=rng), rng


@torch.no_grad()
def forced_logits(model, tokens, labels, sampling):
    """The guided logits of the cached pass (N, L, K) when it is made to choose ``tokens``."""
    steps = []

    def choose(step, logits):
        steps.append(logits)
        return tokens[:, step]

    assert torch.equal(model._sample(labels, sampling, choose), tokens)
    return torch.stack(steps, dim=1)


@torch.no_grad()
def full_logits(model, tokens, labels, sampling):
    """The same without a cache."""
    length = tokens.shape[1]
    conditional = model.logits(tokens, labels)[:, :length]
    unconditional = model.logits(tokens, torch.full_like(labels, model.null_label))[:, :length]
    return guide(conditional, unconditional, guidance_scales(length, sampling).to(conditional)[:, None])


@pytest.mark.parametrize("sampling", [Sampling(), GUIDED, WINDOW], ids=["plain", "guided", "window"])
@pytest.mark.parametrize("name", MODELS)
def test_cached_and_full_logits_agree(name, sampling):
    model = build(name).double()
    tokens, labels, _ = batch(4)
    cached, full = forced_logits(model, tokens, labels, sampling), full_logits(model, tokens, labels, sampling)
    assert full.std() > 0.3
    assert cached.dtype == torch.float64
    assert (cached - full).abs().max() < 1e-11


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_prefix_gives_the_same_rows_as_all_tokens(name):
    model = build(name).double()
    tokens, labels, _ = batch(3)
    assert torch.allclose(model.logits(tokens[:, :5], labels), model.logits(tokens, labels)[:, :6], atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_mixtures_are_drawn_from_their_own_prefix(name):
    """Replays `generate` without cache: kept where the first uniforms say so, else drawn from the mixture's logits."""
    model, sigma = build(name), 0.4
    reference, labels, _ = batch(8)
    mixture = model.generate(labels, GUIDED, image_rngs(1, range(8)), reference, sigma)
    rngs = image_rngs(1, range(8))
    keep = image_uniforms(rngs, L) < sigma
    uniforms = image_uniforms(rngs, L)
    logits = full_logits(model, mixture, labels, GUIDED)
    for step in range(L):
        drawn = draw_tokens(logits[:, step], uniforms[:, step], GUIDED)
        assert torch.equal(mixture[:, step], torch.where(keep[:, step], reference[:, step], drawn))
    assert not torch.equal(mixture[~keep], reference[~keep])


@pytest.mark.parametrize("name", MODELS)
def test_preservation_1_is_the_reference_and_0_ignores_it(name):
    model = build(name)
    reference, labels, _ = batch(6)

    def generate(*arguments):
        return model.generate(labels, GUIDED, image_rngs(2, range(6)), *arguments)

    kept = generate(reference, 1.0)
    assert torch.equal(kept, reference)
    assert kept.data_ptr() != reference.data_ptr()
    assert torch.equal(generate(reference, 0.0), generate())
    assert torch.equal(generate(reference, None), generate())
    assert not torch.equal(generate(), reference)


@pytest.mark.parametrize("name", MODELS)
def test_preservation_leaves_the_stream_of_a_shared_generator_alone(name):
    model = build(name)
    reference, labels, _ = batch(2)
    after = []
    for sigma in (0.0, 0.5, 1.0):
        rng = torch.Generator().manual_seed(0)
        model.generate(labels, Sampling(), rng, reference, sigma)
        after.append(torch.rand(1, generator=rng).item())
    assert after[0] == after[1] == after[2]


@pytest.mark.parametrize("name", MODELS)
def test_an_image_does_not_depend_on_its_batch(name):
    model = build(name)
    reference, labels, _ = batch(9)

    def generate(indices):
        return model.generate(labels[indices], GUIDED, image_rngs(7, indices), reference[indices], 0.3)

    together = generate(list(range(9)))
    assert len({tuple(row) for row in together.tolist()}) == 9
    assert torch.equal(torch.cat([generate([i]) for i in range(9)]), together)
    assert torch.equal(generate([8, 2, 5]), together[[8, 2, 5]])


@pytest.mark.parametrize("name", MODELS)
def test_seeds_decide(name):
    model = build(name)
    labels = torch.zeros(4, dtype=torch.int64)

    def generate(seed):
        return model.generate(labels, Sampling(), torch.Generator().manual_seed(seed))

    assert torch.equal(generate(0), generate(0))
    assert not torch.equal(generate(0), generate(1))
    assert len({tuple(row) for row in generate(0).tolist()}) == 4


@pytest.mark.parametrize("name", MODELS)
def test_dropout_acts_in_training_only_and_generate_restores_the_mode(name):
    model = build(name, dropout=0.5).train()
    tokens, labels, _ = batch(2)
    assert not torch.equal(model.logits(tokens, labels), model.logits(tokens, labels))
    first = model.generate(labels, GUIDED, image_rngs(0, range(2)))
    assert all(module.training for module in model.modules())
    assert torch.equal(first, model.eval().generate(labels, GUIDED, image_rngs(0, range(2))))
    assert not model.training


@pytest.mark.parametrize("name", MODELS)
def test_it_samples_under_bfloat16_autocast(name):
    model = build(name)
    tokens, labels, _ = batch(4)
    with torch.autocast("cpu", torch.bfloat16):
        logits = forced_logits(model, tokens, labels, GUIDED)
        generated = model.generate(labels, GUIDED, image_rngs(0, range(4)))
    exact = forced_logits(model, tokens, labels, GUIDED)
    assert logits.dtype == torch.float32
    assert 0 < (logits - exact).std() < 0.05 * exact.std()
    assert generated.shape == (4, L)
    assert 0 <= generated.min() <= generated.max() < K


@pytest.mark.parametrize("name", MODELS)
def test_bad_requests_are_refused_and_empty_ones_are_not(name):
    model = build(name)
    assert isinstance(model, Generator)
    reference, labels, rng = batch(2)
    for arguments in [
        (labels + CLASSES + 1, GUIDED, rng),
        (labels, GUIDED, image_rngs(0, range(3))),
        (labels, GUIDED, rng, None, 0.5),
        (labels, GUIDED, rng, reference, 1.5),
        (labels, GUIDED, rng, reference + K, 0.5),
    ]:
        with pytest.raises(UserError):
            model.generate(*arguments)
    assert model.generate(labels[:0], GUIDED, rng).shape == (0, L)
    assert torch.equal(  # more than K is all of them
        model.generate(labels, Sampling(top_k=K + 9), image_rngs(0, range(2))),
        model.generate(labels, Sampling(), image_rngs(0, range(2))),
    )
