"""The Frechet distance of 2,048 features, compared with ``scipy.linalg.sqrtm``, which most evaluators use.

    python benchmarks/frechet.py

Both get the same means and covariances, in one process. Ours is timed with and without a cached factor of the
reference's covariance; evaluations of several sets use the cached factor. Errors are relative to the exact distance: a
closed form where the covariances have full rank, singular values of the centred features where there are few images.
Goals: 5 times faster, and within 1e-6 of ``sqrtm`` where that is accurate.
"""

from collections.abc import Callable

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from robustok.metrics.frechet import GaussianStatistics, covariance_factor, factor_of_features, frechet_distance
from timing import Cost, arguments, measure

DIM = 2048


def by_sqrtm(a: GaussianStatistics, b: GaussianStatistics) -> complex:
    """The usual formula: |mean_a - mean_b|^2 + tr(S) + tr(T) - 2 tr((S T)^(1/2))."""
    s, t = a.covariance.numpy(), b.covariance.numpy()
    root = scipy.linalg.sqrtm(s @ t)
    return (a.mean - b.mean).square().sum().item() + np.trace(s) + np.trace(t) - 2 * np.trace(root)


def gaussians(
    rng: torch.Generator, decay: Callable[[Tensor], Tensor]
) -> tuple[GaussianStatistics, GaussianStatistics, float]:
    """Two Gaussians with S_b = M S_a M, whose distance has a closed form: tr (S_a S_b)^(1/2) = tr (S_a M)."""
    basis = torch.linalg.qr(torch.randn(DIM, DIM, generator=rng, dtype=torch.float64)).Q
    spectrum = decay(torch.arange(1, DIM + 1, dtype=torch.float64))
    a = (basis * spectrum) @ basis.T
    noise = torch.randn(DIM, DIM, generator=rng, dtype=torch.float64) / DIM**0.5
    m = torch.eye(DIM, dtype=torch.float64) + 0.2 * (noise + noise.T)
    b = m @ a @ m
    a, b, mean = (a + a.T) / 2, (b + b.T) / 2, torch.zeros(DIM, dtype=torch.float64)
    truth = (a.trace() + b.trace() - 2 * (a @ m).trace() + 0.001 * DIM).item()
    shifted = mean + 0.001**0.5
    return GaussianStatistics.from_moments(mean, a, None), GaussianStatistics.from_moments(shifted, b, None), truth


def of_features(x: Tensor, y: Tensor) -> float:
    """The distance of fewer images than features: tr (S_a S_b)^(1/2) is the sum of the singular values of X Y^T."""
    a, b = factor_of_features(x), factor_of_features(y)  # (F, N), (F, M)
    shift = x.mean(dim=0, dtype=torch.float64) - y.mean(dim=0, dtype=torch.float64)
    root = torch.linalg.svdvals(a.T @ b).sum()
    return (shift.square().sum() + a.square().sum() + b.square().sum() - 2 * root).item()


def few_images(rng: torch.Generator, images: int) -> tuple[GaussianStatistics, GaussianStatistics, float, Cost]:
    """Two sets with fewer images than features, and their exact distance, computed from the features."""
    scales = 5 / torch.arange(1, DIM + 1).sqrt()
    x, y = (scales * torch.randn(images, DIM, generator=rng) + shift for shift in (0.0, 0.03))
    truth, timed = measure(lambda: of_features(x, y), "cpu")
    return GaussianStatistics.of(x), GaussianStatistics.of(y), truth, timed


def main() -> None:
    device = arguments(__doc__).parse_args().device
    rng = torch.Generator().manual_seed(0)
    by = "CPU" if device == "cpu" else "wall"
    print(
        f"{DIM} features, {device}, {torch.get_num_threads()} threads; CPU s (wall s), and ratio to sqrtm by {by} time"
    )
    cases = {
        "full rank": gaussians(rng, lambda i: 25 / i),
        "nearly singular": gaussians(rng, lambda i: 25 * 10 ** (-10 * i / DIM)),
        "1,000 images each": few_images(rng, 1000),
        "2,000 images each": few_images(rng, 2000),
    }
    for name, (a, b, truth, *of_features) in cases.items():
        here, there = (
            GaussianStatistics.from_moments(s.mean.to(device), s.covariance.to(device), s.count) for s in (a, b)
        )
        cold, cold_time = measure(lambda a=here, b=there: frechet_distance(a, b), device)
        factor = covariance_factor(there)
        kept, kept_time = measure(lambda a=here, b=there, factor=factor: frechet_distance(a, b, factor), device)
        theirs, their_time = measure(lambda a=a, b=b: by_sqrtm(a, b), "cpu")
        real, imaginary = complex(theirs).real, abs(complex(theirs).imag)
        print(f"{name}: distance {truth:.6f}")
        print(f"  sqrtm             {show(their_time, their_time)}, error {real / truth - 1:+.1e}", end="")
        print(f", imaginary part {imaginary:.0e}")
        print(f"  ours, cold        {show(cold_time, their_time)}, error {cold / truth - 1:+.1e}", end="")
        print(f", to sqrtm {cold / real - 1:+.1e}")
        print(f"  ours, factor kept {show(kept_time, their_time)}, error {kept / truth - 1:+.1e}")
        for timed in of_features:
            print(f"  ours, of features {show(timed, their_time)}")


def show(timed: Cost, baseline: Cost) -> str:
    ratio = baseline.cpu / timed.cpu if timed.device == "cpu" else baseline.wall / timed.wall
    return f"{timed.cpu:6.2f} ({timed.wall:6.2f}), {ratio:5.1f}x, peak {timed.peak:.2f} GB"


if __name__ == "__main__":
    main()
