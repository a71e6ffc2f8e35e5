import math
from itertools import product

import numpy as np
import pytest
import torch

from robustok.errors import UserError
from robustok.metrics.pixels import psnr, ssim


def noise(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_psnr_of_a_constant_error_has_a_closed_form():
    reference = torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)
    pixels = reference.clone()
    pixels[0] += 5
    pixels[1] -= 20
    assert psnr(pixels, reference).tolist() == pytest.approx([20 * math.log10(255 / 5), 20 * math.log10(255 / 20)])
    assert psnr(reference, reference).isinf().all()


def test_ssim_of_flat_images_has_a_closed_form():
    a, b = torch.full((1, 3, 16, 16), 51, dtype=torch.uint8), torch.full((1, 3, 16, 16), 204, dtype=torch.uint8)
    x, y, c1 = 0.2, 0.8, 0.01**2
    assert ssim(a, b).item() == pytest.approx((2 * x * y + c1) / (x * x + y * y + c1), rel=1e-9)


def test_ssim_against_direct_sums_over_windows():
    x, y = noise(1, 3, 8, 9), noise(1, 3, 8, 9, seed=1)
    weights = np.array([[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / 4.5) for j in range(11)] for i in range(11)])
    weights /= weights.sum()
    values = []
    for a, b in zip(x[0].numpy() / 255, y[0].numpy() / 255, strict=True):
        a, b = np.pad(a, 5, mode="reflect"), np.pad(b, 5, mode="reflect")
        for i, j in product(range(8), range(9)):
            u, v = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
            mu, mv = (weights * u).sum(), (weights * v).sum()
            vu, vv, cov = (
                (weights * (u - mu) ** 2).sum(),
                (weights * (v - mv) ** 2).sum(),
                (weights * (u - mu) * (v - mv)).sum(),
            )
            values.append((2 * mu * mv + 1e-4) * (2 * cov + 9e-4) / ((mu**2 + mv**2 + 1e-4) * (vu + vv + 9e-4)))
    assert ssim(x, y).item() == pytest.approx(np.mean(values), rel=1e-9)


def test_ssim_is_one_for_equal_images_symmetric_and_image_by_image():
    x, y = noise(3, 3, 20, 14), noise(3, 3, 20, 14, seed=1)
    assert torch.allclose(ssim(x, x), torch.ones(3, dtype=torch.float64))
    assert torch.allclose(ssim(x, y), ssim(y, x))
    assert torch.allclose(ssim(x, y)[1:2], ssim(x[1:2], y[1:2]))
    assert (ssim(x, y) < 0.5).all()


def test_pairs_that_do_not_fit():
    with pytest.raises(UserError, match="uint8"):
        psnr(noise(1, 3, 8, 8).float(), noise(1, 3, 8, 8))
    with pytest.raises(UserError, match="equal shape"):
        psnr(noise(1, 3, 8, 8), noise(2, 3, 8, 8))
    with pytest.raises(UserError, match="6x6"):
        ssim(noise(1, 3, 5, 8), noise(1, 3, 5, 8))
