import pytest
import torch

from robustok.errors import UserError
from robustok.metrics.codebook import codebook_perplexity, codebook_usage, count_tokens, token_divergence


def test_counts_add_up_and_are_exact():
    tokens = torch.tensor([[0, 3, 3], [1, 3, 0]])
    assert count_tokens(tokens, 5).tolist() == [2, 1, 0, 3, 0]
    assert torch.equal(count_tokens(tokens[:1], 5) + count_tokens(tokens[1:], 5), count_tokens(tokens, 5))
    with pytest.raises(UserError, match="codes 0 to 2"):
        count_tokens(tokens, 3)


def test_usage_and_perplexity():
    assert codebook_usage(torch.tensor([5, 0, 1, 0])) == 0.5
    assert codebook_perplexity(torch.tensor([7, 7, 7, 7, 0])) == pytest.approx(4)
    assert codebook_perplexity(torch.tensor([9, 0])) == pytest.approx(1)
    with pytest.raises(UserError, match="no tokens"):
        codebook_perplexity(torch.zeros(4, dtype=torch.int64))


def test_divergence_lies_between_equal_and_disjoint():
    equal = token_divergence(torch.tensor([1, 2, 3]), torch.tensor([10, 20, 30]))
    disjoint = token_divergence(torch.tensor([1, 2, 0, 0]), torch.tensor([0, 0, 5, 1]))
    half = token_divergence(torch.tensor([1, 0]), torch.tensor([1, 1]))  # entropy of (3/4, 1/4) less half a bit
    assert equal == pytest.approx(0, abs=1e-12)
    assert disjoint == pytest.approx(1)
    assert half == pytest.approx(0.811278124459 - 0.5)


def test_divergence_is_symmetric_and_bounded():
    rng = torch.Generator().manual_seed(0)
    for _ in range(20):
        p, q = torch.randint(0, 3, (2, 12), generator=rng) + torch.eye(12, dtype=torch.int64)[0]
        assert token_divergence(p, q) == pytest.approx(token_divergence(q, p), abs=1e-12)
        assert 0 <= token_divergence(p, q) <= 1
    with pytest.raises(UserError, match="one codebook"):
        token_divergence(torch.ones(3), torch.ones(4))
