"""Tiny generators of tokens with random weights, and their logits with and without the key-value cache."""

import torch

from robustok.generators.gpt import GPT, GPTConfig
from robustok.generators.rar import RAR, RARConfig
from robustok.generators.sampling import Sampling, guidance_scales, guide

K, L, CLASSES = 29, 9, 5
GUIDED = Sampling(guidance_scale=4, guidance_power=1.5, temperature=1.1, top_k=20, top_p=0.95)
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
    length = size.pop("length", L)
    if name == "rar":
        model = RAR(RARConfig(**size), K, length, CLASSES)
    else:
        model = GPT(GPTConfig(**size, mlp_width=24, **GPTS[name]), K, length, CLASSES)
    return randomised(model)


def randomised(model):
    """The model with all parameters random, those that start at zero included."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def batch(count, length=L):
    """Tokens (count, length), labels (count,) and the random generator that drew them."""
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(K, (count, length), generator=rng)
    return tokens, torch.randint(CLASSES, (count,), generator=rng), rng


@torch.no_grad()
def forced_logits(model, tokens, labels, sampling):
    """The guided logits of the cached pass (N, L, K) when it is made to choose ``tokens``."""
    return model.cached_logits(tokens, labels, sampling)


@torch.no_grad()
def full_logits(model, tokens, labels, sampling):
    """The same without a cache."""
    length = tokens.shape[1]
    conditional = model.logits(tokens, labels)[:, :length]
    unconditional = model.logits(tokens, torch.full_like(labels, model.null_label))[:, :length]
    return guide(conditional, unconditional, guidance_scales(length, sampling).to(conditional)[:, None])
