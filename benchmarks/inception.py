"""Inception features, compared with torch-fidelity's in one process: speed, and the effect of bf16.

    python benchmarks/inception.py --data FILE.parquet --size 256 --count 2000 --weights FILE.pth

Without ``--data`` it reads scikit-learn's digits. Without ``--weights`` it uses random weights, with batch norms
calibrated so that no feature vanishes: enough for speed and for ratios of distances, but the distances are not FIDs.
"""

import resource
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torchvision.io import decode_jpeg, encode_jpeg
from torchvision.models import inception_v3
from torchvision.transforms.functional import gaussian_blur

from robustok.data.dataset import open_images
from robustok.data.loader import batches_in_order
from robustok.data.pixels import to_pixels
from robustok.data.sources import Digits, Folder, Parquet
from robustok.metrics.features.inception import INPUT_SIZE, InceptionExtractor, resize_like_tensorflow
from robustok.metrics.frechet import GaussianStatistics, frechet_distance
from timing import Cost, arguments, measure

BATCH = 16
REPEATS = 3
CALIBRATION = 64  # images
Network = Callable[[Tensor], Tensor]


def main() -> None:
    words = arguments(__doc__)
    words.add_argument("--data", type=Path, help="folder of images or parquet file; default: scikit-learn's digits")
    words.add_argument("--size", type=int, default=256, help="height and width of the images")
    words.add_argument("--count", type=int, default=200, help="number of images for the distances")
    words.add_argument("--weights", type=Path, help="Inception weights; default: random, calibrated")
    given = words.parse_args()
    parquet = given.data is not None and given.data.suffix == ".parquet"
    source = (Parquet if parquet else Folder)(path=given.data, holdout=0) if given.data else Digits(holdout=0)
    images = open_images(source.model_copy(update={"limit": given.count}), given.size, "test")
    device = given.device
    print(f"{device}, {torch.get_num_threads()} threads; {images.describe()}")

    def batches() -> Iterable[Tensor]:
        return (to_pixels(batch.images) for batch in batches_in_order(images, BATCH, 0, 1))

    with tempfile.TemporaryDirectory() as folder:
        weights = given.weights or random_weights(Path(folder) / "random.pth", batches())
        print(
            f"weights: {'random, calibrated: the distances below are not FIDs' if given.weights is None else weights}"
        )
        shipped = FeatureExtractorInceptionV3("shipped", ["2048"], str(weights)).to(device)
        ours = {name: InceptionExtractor(weights, torch.device(device), precision=name) for name in ("float32", "bf16")}
    compare_resizing(device)
    first = next(iter(batches())).to(device)
    compare_speed({"torch-fidelity float32": lambda pixels: shipped(pixels)[0], **ours}, first)
    compare_distances(ours, batches)


def random_weights(path: Path, batches: Iterable[Tensor]) -> Path:
    """Save Kaiming-normal convolutions and batch norms with statistics of the images, for features of usual scale."""
    rng = torch.Generator().manual_seed(0)
    network = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 4:
                parameter.normal_(0, (2 / parameter[0].numel()) ** 0.5, generator=rng)
        network.fc.weight.normal_(0, 0.02, generator=rng)
    torch.save(network.state_dict(), path)
    network = FeatureExtractorInceptionV3("calibrated", ["2048"], str(path))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train().momentum = None  # average over all batches
    for _, pixels in zip(range(CALIBRATION // BATCH), batches, strict=False):
        network(pixels)
    torch.save(network.state_dict(), path)
    return path


def compare_resizing(device: str) -> None:
    """Speed of TensorFlow's resizing alone, in images per CPU second."""
    rng = torch.Generator().manual_seed(0)
    for size in (32, 64, 256, 512):
        pixels = torch.randint(0, 256, (BATCH, 3, size, size), dtype=torch.uint8, generator=rng).to(device)
        theirs, ours = resize_as_shipped(pixels), resize_like_tensorflow(pixels)
        costs = time_in_turns({"shipped": resize_as_shipped, "ours": resize_like_tensorflow}, pixels)
        speed = {name: BATCH / cost.seconds for name, cost in costs.items()}
        line = f"{speed['shipped']:7.0f} -> {speed['ours']:7.0f} images per {'CPU ' if device == 'cpu' else ''}second"
        print(f"resizing {size:3d} -> 299: {line}, {speed['ours'] / speed['shipped']:5.2f}x", end="; ")
        print(f"largest difference {(theirs - ours).abs().max():.1e} of 255")


def resize_as_shipped(pixels: Tensor) -> Tensor:
    return interpolate_bilinear_2d_like_tensorflow1x(pixels.float(), (INPUT_SIZE, INPUT_SIZE), align_corners=False)


def compare_speed(networks: dict[str, Network], pixels: Tensor) -> None:
    """Speed from pixels to features in images per second, best of a few rounds in turns."""
    baseline, *_ = expected = [network(pixels) for network in networks.values()]
    costs = time_in_turns(networks, pixels)
    first = next(iter(costs.values()))
    for (name, cost), features in zip(costs.items(), expected, strict=True):
        speed = f"{len(pixels) / cost.cpu:6.1f} images per CPU second ({first.cpu / cost.cpu:.2f}x)"
        error = ((features - baseline).norm() / baseline.norm()).item()
        print(
            f"{name:<22} {speed}, {len(pixels) / cost.wall:6.1f} per second ({first.wall / cost.wall:.2f}x)", end="; "
        )
        print(f"peak {cost.peak:.2f} GB; features differ by {error:.1e}", flush=True)


def time_in_turns(functions: dict[str, Network], pixels: Tensor) -> dict[str, Cost]:
    """Smallest cost of each, in turns, so that other load on the machine affects all of them."""
    costs: dict[str, list[Cost]] = {name: [] for name in functions}
    for _ in range(1 + REPEATS):  # the first warms up
        for name, function in functions.items():
            costs[name].append(measure(lambda function=function: function(pixels), pixels.device.type)[1])
    return {name: min(found[1:], key=lambda cost: cost.seconds) for name, found in costs.items()}


def compare_distances(extractors: dict[str, InceptionExtractor], batches: Callable[[], Iterable[Tensor]]) -> None:
    """Frechet distances between degraded and original images in both precisions, and the peak memory."""
    exact, fast = (of_all(extractor, batches()) for extractor in extractors.values())
    print(f"Frechet distances of {exact.count} images to the original ones, float32:")
    print(f"  the same images in bf16: {frechet_distance(fast, exact):.4f}", flush=True)
    for name, change in {"blur 0.7": blur, "JPEG 75": jpeg}.items():
        exact_changed, fast_changed = (of_all(e, map(change, batches())) for e in extractors.values())
        both = frechet_distance(exact_changed, exact)
        print(f"  {name}: {both:.4f}", end="")
        for how, value in (
            ("both sides in bf16", frechet_distance(fast_changed, fast)),
            ("one side in bf16", frechet_distance(fast_changed, exact)),
        ):
            print(f"; {how} {value:.4f} ({value / both - 1:+.2%})", end="")
        print(
            f"; peak memory of the process so far {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB",
            flush=True,
        )


def of_all(extractor: InceptionExtractor, batches: Iterable[Tensor]) -> GaussianStatistics:
    """Mean and covariance of the features of all images, one batch at a time."""
    statistics = GaussianStatistics(extractor.dim)
    for pixels in batches:
        statistics.update(extractor(pixels).cpu())
    return statistics


def blur(pixels: Tensor) -> Tensor:
    return gaussian_blur(pixels, kernel_size=[5, 5], sigma=[0.7, 0.7])


def jpeg(pixels: Tensor) -> Tensor:
    return torch.stack([decode_jpeg(encode_jpeg(image, quality=75)) for image in pixels])


if __name__ == "__main__":
    main()
