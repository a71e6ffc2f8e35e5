"""FSQ and LFQ, against their formulas in arXiv 2309.15505 and 2310.05737."""

import math
from itertools import product

import pytest
import torch

from robustok.config import load, plain, validate
from robustok.errors import UserError
from robustok.pretrained.export import export_weights
from robustok.tokenizers.llamagen import LlamaGenConfig
from robustok.tokenizers.quantizer import QuantizerConfig, VectorQuantizer
from robustok.tokenizers.quantizers import FSQ, LFQ, FSQConfig, LFQConfig, build_quantizer, entropy_loss
from robustok.tokenizers.robustok import RobusTokConfig
from tiny_models import tiny_tokenizer

QUANTIZERS = {"fsq": FSQ(FSQConfig(levels=(8, 5, 4, 2))), "lfq": LFQ(LFQConfig(bits=5))}


def features(count=6, length=9, dim=4, scale=2.0, seed=0):
    return scale * torch.randn(count, length, dim, generator=torch.Generator().manual_seed(seed))


def test_fsq_by_hand():
    """Odd levels: round(2 tanh z) / 2. Even: 3.5 tanh(z + atanh(1 / 7)) - 1 / 2, rounded, / 4; 0 stays 0."""
    quantizer = FSQ(FSQConfig(levels=(5, 8)))
    z = torch.tensor([[[0.0, 0.0], [0.5, 0.5], [9.0, 9.0], [-9.0, -9.0], [-0.2, -0.1]]])
    found = quantizer(z)
    # 2 tanh(0.5) = 0.92; 3.5 tanh(0.644) - 0.5 = 1.49; 2 tanh(-0.2) = -0.39; 3.5 tanh(0.044) - 0.5 = -0.35
    expected = torch.tensor([[[0.0, 0.0], [0.5, 0.25], [1.0, 0.75], [-1.0, -1.0], [0.0, 0.0]]])
    torch.testing.assert_close(found.vectors, expected)
    assert found.tokens.tolist() == [[2 + 5 * 4, 3 + 5 * 5, 4 + 5 * 7, 0, 2 + 5 * 4]]
    assert found.features[0, 1].tolist() == pytest.approx(
        [math.tanh(0.5), (3.5 * math.tanh(0.5 + math.atanh(1 / 7)) - 0.5) / 4]
    )
    assert found.codebook_loss is found.commitment_loss is found.entropy_loss is None


def test_fsq_reaches_every_code_and_no_other():
    quantizer = QUANTIZERS["fsq"]
    tokens = quantizer(features(4000, scale=1.5)).tokens
    assert torch.equal(tokens.unique(), torch.arange(8 * 5 * 4 * 2))
    broken = torch.full((1, 1, 4), torch.nan)
    assert 0 <= quantizer(broken).tokens.item() < 320  # the loss is what says that features are no numbers


def test_lfq_by_hand():
    found = LFQ(LFQConfig(bits=3))(torch.tensor([[[0.5, -2.0, 0.0], [-0.1, 3.0, 1.0]]]))
    assert found.vectors.tolist() == [[[1, -1, -1], [-1, 1, 1]]]
    assert found.tokens.tolist() == [[1, 6]]
    assert found.commitment_loss.item() == pytest.approx((0.25 + 1 + 1 + 0.81 + 4 + 0) / 6)
    assert found.codebook_loss is None


def test_the_entropy_loss_against_all_codes():
    """E[H(q)] - H[E q] from softmax(-|z - c|^2) over all 2^4 codes of each of 30 features."""
    z = features(6, 5, scale=0.3).flatten(0, 1).double().requires_grad_()
    codes = torch.tensor(list(product((-1.0, 1.0), repeat=4)), dtype=torch.float64)
    q = (-(z[:, None] - codes).square().sum(-1)).softmax(-1)  # (30, 16)
    entropy = lambda p: -(p * p.log()).sum(-1)  # noqa: E731
    expected = entropy(q).mean() - entropy(q.mean(0))
    found = entropy_loss(z)
    assert found.item() == pytest.approx(expected.item())
    torch.testing.assert_close(*torch.autograd.grad(found, z), torch.autograd.grad(expected, z)[0])


def test_the_entropy_loss_has_its_bounds():
    """Features that are certain and use all codes have -ln K; those of one code 0; undecided ones 0."""
    codes = torch.tensor(list(product((-1.0, 1.0), repeat=10)))  # two groups of bits
    assert entropy_loss(20 * codes).item() == pytest.approx(-10 * math.log(2))
    assert entropy_loss(20 * codes[:1]).item() == pytest.approx(0, abs=1e-6)
    assert entropy_loss(torch.zeros(3, 10)).item() == pytest.approx(0, abs=1e-6)
    many = torch.zeros(2, 20, requires_grad=True)
    entropy_loss(many).backward()
    assert torch.isfinite(many.grad).all()


@pytest.mark.parametrize("name", QUANTIZERS)
def test_tokens_and_vectors_go_round(name):
    quantizer = QUANTIZERS[name]
    size, dim = quantizer.config.size, quantizer.config.dim
    assert quantizer.codebook.shape == (size, dim)
    assert len(quantizer.codebook.unique(dim=0)) == size
    assert quantizer.codebook.abs().max() == 1
    found = quantizer(features(dim=dim))
    torch.testing.assert_close(found.vectors, quantizer.embed(found.tokens))
    assert torch.equal(quantizer.embed(found.tokens), quantizer.codebook[found.tokens])
    z = quantizer.codebook
    if name == "fsq":  # undo the bound
        levels = torch.tensor(quantizer.config.levels)
        z = torch.atanh(0.99 * (z * (levels // 2) + (levels % 2 == 0) / 2) / ((levels - 1) / 2)) - quantizer.shifts
    assert torch.equal(quantizer(z[None]).tokens[0], torch.arange(size))
    assert not list(quantizer.parameters())
    assert not quantizer.state_dict()


def test_gradients_pass_straight_through():
    z, weight = features(dim=2).requires_grad_(), features(dim=2, seed=1)
    (LFQ(LFQConfig(bits=2))(z).vectors * weight).sum().backward()
    torch.testing.assert_close(z.grad, weight)
    z = features(dim=2).requires_grad_()
    (FSQ(FSQConfig(levels=(5, 3)))(z).vectors * weight).sum().backward()
    torch.testing.assert_close(z.grad, weight * (1 - z.detach().tanh().square()))  # of tanh z in units of the range


@pytest.mark.parametrize("name", QUANTIZERS)
def test_autocast_and_double_precision(name):
    quantizer = QUANTIZERS[name]
    z = features(dim=quantizer.config.dim)
    with torch.autocast("cpu", torch.bfloat16):
        found = quantizer(z)
    assert found.vectors.dtype == torch.float32
    assert torch.equal(found.tokens, quantizer(z).tokens)
    assert quantizer(z.double()).vectors.dtype == torch.float64
    assert quantizer(z.bfloat16()).vectors.dtype == torch.float32


# Settings


def test_settings_of_before_are_a_learned_codebook():
    """Files of before have no name; their models are the same, bit for bit."""
    old = {"size": 16, "dim": 4, "normalize": True}
    config = validate(RobusTokConfig, {"quantizer": old}).quantizer
    assert config == QuantizerConfig(size=16, dim=4)
    assert plain(config)["name"] == "vq"
    torch.manual_seed(0)
    built = build_quantizer(config)
    torch.manual_seed(0)
    assert torch.equal(built.embedding.weight, VectorQuantizer(config).embedding.weight)
    assert validate(LlamaGenConfig, {"quantizer": {"dim": 5}}).quantizer == QuantizerConfig(size=4096, dim=5)


def test_variants_are_chosen_by_name():
    config = load(LlamaGenConfig, None, ("quantizer.name=fsq", "quantizer.levels=[8,5,5]"))
    assert (config.quantizer.size, config.quantizer.dim) == (200, 3)
    config = load(LlamaGenConfig, None, ("quantizer.name=lfq", "quantizer.bits=18"))
    assert (config.quantizer.size, config.quantizer.dim) == (2**18, 18)
    for words, says in (
        (("quantizer.name=fsq", "quantizer.levels=[64,64,64,64]"), r"16,777,216 codes, expected at most 2\^20"),
        (("quantizer.name=fsq", "quantizer.levels=[8,1]"), "greater than or equal to 2"),
        (("quantizer.name=lfq", "quantizer.bits=21"), "less than or equal to 20"),
        (("quantizer.name=lfq", "quantizer.size=64"), "belongs to another variant; set quantizer.name=vq"),
        (("quantizer.name=bsq",), "expected one of 'vq', 'fsq', 'lfq'"),
    ):
        with pytest.raises(UserError, match=says):
            load(LlamaGenConfig, None, words)


@pytest.mark.parametrize("family", ["robustok", "llamagen", "maskgit", "gigatok"])
def test_layouts_of_the_authors_have_no_place_for_them(family):
    model = tiny_tokenizer(family, quantizer={"name": "lfq", "bits": 4})
    with pytest.raises(UserError, match="learned codebook, this tokenizer has lfq"):
        export_weights(model)
