import pytest
import torch
import torch.nn.functional as F

from robustok.tokenizers.quantizer import QuantizerConfig, VectorQuantizer, nearest_code


def build(normalize=True, size=24, dim=6, seed=0):
    torch.manual_seed(seed)
    quantizer = VectorQuantizer(QuantizerConfig(size=size, dim=dim, normalize=normalize))
    torch.nn.init.normal_(quantizer.embedding.weight)  # rows of different length, as training leaves them
    return quantizer


def some_features(count=3, length=10, dim=6, seed=1):
    return torch.randn(count, length, dim, generator=torch.Generator().manual_seed(seed)) * 2


def plain_reading(h, embedding, normalize):
    """The l2-normalised quantiser position by position; returns straight-through vectors, tokens and the two losses."""
    norm = (lambda v: v / v.norm().clamp(min=1e-12)) if normalize else (lambda v: v)
    vectors, tokens, codebook_terms, commitment_terms = [], [], [], []
    for row in h.flatten(0, 1):
        z = norm(row)
        distances = [z @ z + norm(e) @ norm(e) - 2 * z @ norm(e) for e in embedding]
        token = min(range(len(distances)), key=lambda k: distances[k].item())
        code = norm(embedding[token])
        vectors.append(z + (code - z).detach())
        tokens.append(token)
        codebook_terms.append((code - z.detach()) ** 2)
        commitment_terms.append((code.detach() - z) ** 2)
    return torch.stack(vectors).view_as(h), torch.tensor(tokens).view(h.shape[:2]), codebook_terms, commitment_terms


@pytest.mark.parametrize("normalize", [True, False])
def test_losses_and_gradients_against_a_plain_reading(normalize):
    quantizer, weight = build(normalize), some_features(seed=2)
    h = some_features().requires_grad_()
    found = quantizer(h)
    ((found.vectors * weight).sum() + found.codebook_loss + 0.25 * found.commitment_loss).backward()

    h2, embedding = some_features().requires_grad_(), quantizer.embedding.weight.detach().clone().requires_grad_()
    vectors, tokens, codebook_terms, commitment_terms = plain_reading(h2, embedding, normalize)
    codebook_loss, commitment_loss = torch.stack(codebook_terms).mean(), torch.stack(commitment_terms).mean()
    ((vectors * weight).sum() + codebook_loss + 0.25 * commitment_loss).backward()

    assert torch.equal(found.tokens, tokens)
    torch.testing.assert_close(found.vectors, vectors)
    torch.testing.assert_close(found.codebook_loss, codebook_loss)
    torch.testing.assert_close(found.commitment_loss, commitment_loss)
    torch.testing.assert_close(h.grad, h2.grad)
    torch.testing.assert_close(quantizer.embedding.weight.grad, embedding.grad)


def test_each_loss_moves_one_side_only():
    quantizer, h = build(), some_features().requires_grad_()
    found = quantizer(h)
    assert torch.autograd.grad(found.codebook_loss, h, retain_graph=True, allow_unused=True)[0] is None
    assert (
        torch.autograd.grad(found.commitment_loss, quantizer.embedding.weight, retain_graph=True, allow_unused=True)[0]
        is None
    )
    assert torch.autograd.grad(found.vectors.sum(), quantizer.embedding.weight, allow_unused=True)[0] is None


def test_quantised_vectors_are_codes():
    quantizer = build()
    found = quantizer(some_features())
    torch.testing.assert_close(found.vectors, quantizer.embed(found.tokens))
    torch.testing.assert_close(found.features, F.normalize(some_features(), dim=-1))
    assert torch.equal(quantizer.embed(found.tokens), quantizer.codebook[found.tokens])
    torch.testing.assert_close(quantizer.codebook.norm(dim=1), torch.ones(24))


def test_a_new_codebook_is_normalised():
    weight = VectorQuantizer(QuantizerConfig(size=50, dim=4)).embedding.weight
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(50))
    assert VectorQuantizer(QuantizerConfig(size=50, dim=4, normalize=False)).embedding.weight.abs().max() <= 1 / 50


def test_nearest_code_takes_the_first_on_ties_and_any_shape():
    codebook = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert nearest_code(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), codebook).tolist() == [0, 1]
    many = torch.randn(3, 6000, 2, generator=torch.Generator().manual_seed(0))  # more rows than one chunk
    assert torch.equal(nearest_code(many, codebook), torch.cdist(many, codebook[:2]).argmin(-1))


def test_autocast_does_not_change_the_codes():
    quantizer, h = build(size=512), some_features(count=8, length=256)
    with torch.autocast("cpu", torch.bfloat16):
        found = quantizer(h)
    assert torch.equal(found.tokens, quantizer(h).tokens)
    assert (found.vectors.dtype, found.codebook_loss.dtype) == (torch.float32, torch.float32)
    # What the search would do in bf16, so that this test can fail.
    rounded = (F.normalize(h, dim=-1).bfloat16() @ quantizer.codebook.bfloat16().T).argmax(-1)
    assert not torch.equal(rounded, found.tokens)


def test_revived_codes_are_features():
    quantizer = build()
    before = quantizer.embedding.weight.detach().clone()
    found = quantizer(some_features())
    dead = torch.bincount(found.tokens.flatten(), minlength=24) == 0
    assert dead.any()
    quantizer.revive(dead, found.features, torch.Generator().manual_seed(0))
    after = quantizer.embedding.weight.detach()
    assert torch.equal(after[~dead], before[~dead])
    pool = found.features.detach().flatten(0, 1)
    assert (after[dead][:, None] == pool).all(-1).any(1).all()
    assert after.requires_grad is False
    assert quantizer.embedding.weight.requires_grad
    # A feature is the nearest code to itself: the revived codes are in use.
    assert (torch.bincount(quantizer(some_features()).tokens.flatten(), minlength=24)[dead] > 0).float().mean() > 0.5
    again = build()
    again.revive(dead, found.features, torch.Generator().manual_seed(0))
    assert torch.equal(again.embedding.weight, quantizer.embedding.weight)
