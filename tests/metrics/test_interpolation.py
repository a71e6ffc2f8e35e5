import math

import numpy as np
import pytest
import torch

from robustok.errors import UserError
from robustok.metrics import interpolation
from robustok.metrics.interpolation import draw_neighbour, interpolated_latents, nearest_latents, spherical
from robustok.randomness import image_draws

# One latent of width 2 an image: directions in the plane.
TRAINING = torch.tensor([[0.0, 1.0], [1.0, 1.0], [-1.0, 0.0], [3.0, 0.0], [1.0, -2.0]])[:, None]
QUERY = torch.tensor([[[1.0, 0.0]]])


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same(latents):
    return latents


def test_neighbours_by_hand():
    """Cosines with (1, 0): 0, 0.71, -1, 1, 0.45. Length does not count."""
    assert nearest_latents(QUERY, TRAINING, 1, same).tolist() == [[3]]
    assert nearest_latents(QUERY, TRAINING, 3, same).tolist() == [[1, 3, 4]]
    assert nearest_latents(QUERY[:0], TRAINING, 3, same).shape == (0, 3)
    with pytest.raises(UserError, match=r"ifid\.neighbours=6, but there are 5 training latents; lower it"):
        nearest_latents(QUERY, TRAINING, 6, same)


def test_a_latent_is_one_vector():
    """Of the whole latents the second is nearer, position by position the first would be: cosines 1, 0 and 0.8, 0.6."""
    query = torch.tensor([[[1.0, 0.0], [3.0, 0.0]]])
    training = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.6, 0.8], [3.0, 0.1]]])
    assert nearest_latents(query, training, 1, same).tolist() == [[1]]


def test_the_draw_by_hand():
    """Mean squared errors 0.5 and 2 from (1, 0): the first has the share 1 / (1 + exp(-1.5)) = 0.8176."""
    near = TRAINING[[1, 3]][None]
    for uniform, chosen in {0.0: 1, 0.8175: 1, 0.8177: 3, 0.9999999: 3}.items():
        assert torch.equal(draw_neighbour(QUERY, near, torch.tensor([uniform])), TRAINING[chosen : chosen + 1])


def test_spherical_interpolation_by_hand():
    """Half-way over 45 degrees both weights are sin 22.5 / sin 45 = 0.5412."""
    found = spherical(QUERY, TRAINING[1:2], 0.5)
    assert found.flatten().tolist() == pytest.approx([2 * 0.5411961, 0.5411961])
    quarter = spherical(QUERY, TRAINING[:1], 1 / 3)  # a third of a right angle
    assert quarter.flatten().tolist() == pytest.approx([math.cos(math.pi / 6), math.sin(math.pi / 6)])


def test_limits_of_spherical_interpolation():
    start, end = normal(6, 3, 2, seed=0), normal(6, 3, 2, seed=1)
    assert torch.equal(spherical(start, end, 0.0), start)
    assert torch.allclose(spherical(start, end, 1.0), end, atol=1e-6)
    assert torch.equal(spherical(start, start, 0.5), start)
    assert torch.allclose(spherical(start, 3 * start, 0.5), 2 * start)
    assert spherical(start, -start, 0.5).isfinite().all()
    unit = [x / x.flatten(1).norm(dim=1)[:, None, None] for x in (start, end)]
    assert spherical(*unit, 0.3).flatten(1).norm(dim=1).numpy() == pytest.approx(1)


def test_blocks_do_not_matter(monkeypatch):
    latents, training = normal(11, 2, 3, seed=0), normal(23, 2, 3, seed=1)
    whole = nearest_latents(latents, training, 4, same)
    cosine = torch.nn.functional.cosine_similarity(latents.flatten(1)[:, None], training.flatten(1)[None], dim=2)
    assert torch.equal(whole, cosine.topk(4).indices.sort(dim=1).values)
    for queries, keys in ((3, 2), (1, 23), (11, 5)):
        monkeypatch.setattr(interpolation, "QUERIES", queries)
        monkeypatch.setattr(interpolation, "KEYS", keys)
        assert torch.equal(nearest_latents(latents, training, 4, same), whole)


def test_the_published_protocol_step_by_step():
    """For each latent: cosines, the 10 nearest, softmax(-MSE), one draw, slerp at 0.5. All in NumPy, one at a time."""
    codebook = normal(9, 2, seed=0)
    tokens = torch.randint(9, (40, 3), generator=torch.Generator().manual_seed(1))
    training, validation = tokens[:30], tokens[30:]
    indices = torch.arange(10)
    near = nearest_latents(validation, training, 10, lambda some: codebook[some])
    found = interpolated_latents(validation, near, training, lambda some: codebook[some], 0.5, 4, indices)
    uniforms = image_draws(torch.rand, "ifid 4", indices, (1,)).numpy()[:, 0].astype(float)
    vectors, drawn = codebook.numpy().astype(float), set()
    for row, uniform, one in zip(validation.numpy(), uniforms, found.numpy(), strict=True):
        own = vectors[row].ravel()
        others = np.stack([vectors[other].ravel() for other in training.numpy()])
        cosines = others @ own / np.linalg.norm(others, axis=1) / np.linalg.norm(own)
        nearest = sorted(np.argsort(-cosines, kind="stable")[:10])
        weights = np.exp([-np.mean((others[i] - own) ** 2) for i in nearest])
        weights /= weights.sum()
        chosen = nearest[next(k for k in range(10) if uniform < weights[: k + 1].sum() or k == 9)]
        angle = np.arccos(np.clip(cosines[chosen], -1, 1))
        expected = own if angle < 1e-6 else np.sin(angle / 2) / np.sin(angle) * (own + others[chosen])
        assert one.ravel() == pytest.approx(expected, abs=1e-5)
        drawn.add(list(nearest).index(chosen))
    assert len(drawn) > 3  # not always the same neighbour


def test_an_image_is_interpolated_alike_in_every_batch():
    latents, training = normal(7, 2, 3, seed=0), normal(20, 2, 3, seed=1)
    near = nearest_latents(latents, training, 5, same)
    make = lambda rows, seed=0: interpolated_latents(latents[rows], near[rows], training, same, 0.5, seed, rows)  # noqa: E731
    whole = make(torch.arange(7))
    assert torch.equal(torch.cat([make(torch.tensor([i])) for i in range(7)]), whole)
    assert not torch.equal(make(torch.arange(7), seed=1), whole)
