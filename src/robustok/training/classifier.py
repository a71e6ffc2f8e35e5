"""Training of the small classifier."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from robustok.data.pixels import from_pixels
from robustok.metrics.features.classifier import ClassifierConfig, Convolution, SmallClassifier, check_images
from robustok.precision import at_precision
from robustok.randomness import seeded


def fit_classifier(
    pixels: Tensor,
    labels: Tensor,
    config: ClassifierConfig,
    seed: int,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> SmallClassifier:
    """Train a classifier from scratch with AdamW on a one-cycle schedule; on a CPU the seed decides every bit.

    Args:
        pixels: (N, 3, H, W) uint8, H and W at least 16.
        labels: (N,) int64, classes from 0.
        config: the network and its training.
        seed: decides the first weights, the order of the images and their shifts.
        device: where to train.
        progress: called after each step with (steps done, all steps).

    Returns:
        The classifier on ``device``, in evaluation mode, its weights frozen.

    Raises:
        UserError: shapes or types that do not fit, negative labels, images smaller than 16x16.
    """
    check_images(pixels, labels)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seeded(seed).initial_seed())
        model = SmallClassifier(config, int(labels.max()) + 1, batch_norm=True)
    model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=config.steps + 1)
    rng = seeded(seed)
    order = torch.empty(0, dtype=torch.int64)
    with torch.enable_grad(), at_precision(device, "tf32" if config.precision == "tf32" else "float32"):
        for step in range(config.steps):
            while len(order) < config.batch_size:
                order = torch.cat([order, torch.randperm(len(pixels), generator=rng)])
            batch, order = order[: config.batch_size], order[config.batch_size :]
            images = _augment(from_pixels(pixels[batch]), config, rng)
            images = images.to(device, memory_format=torch.channels_last)
            # Without the cache: under a caller's autocast it would keep the weights of the first step for ever.
            with torch.autocast(
                images.device.type, torch.bfloat16, enabled=config.precision == "bf16", cache_enabled=False
            ):
                logits = model(images)  # (N, classes)
            loss = F.cross_entropy(logits.float(), labels[batch].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if progress is not None:
                progress(step + 1, config.steps)
    optimizer.zero_grad()  # the last step's gradients would stay in memory for ever
    for module in model.modules():
        if isinstance(module, Convolution):
            module.fold()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def accuracy(classifier: SmallClassifier, pixels: Tensor, labels: Tensor, batch_size: int = 256) -> float:
    """Share in [0, 1] of the images (N, 3, H, W) uint8 whose most likely class is their label (N,)."""
    device = classifier.head.weight.device
    guesses = [classifier(from_pixels(batch.to(device))).argmax(dim=1).cpu() for batch in pixels.split(batch_size)]
    return (torch.cat(guesses) == labels.cpu()).double().mean().item()


def _augment(images: Tensor, config: ClassifierConfig, rng: torch.Generator) -> Tensor:
    """Shift each image (N, 3, H, W) by whole pixels, repeating its border; mirror half of them where that is wanted."""
    n, _, height, width = images.shape
    most = round(config.shift * min(height, width))
    padded = F.pad(images, (most,) * 4, mode="replicate")
    down, right = torch.randint(0, 2 * most + 1, (2, n), generator=rng)
    rows = down[:, None] + torch.arange(height)  # (N, H)
    columns = right[:, None] + torch.arange(width)  # (N, W)
    if config.flip:
        mirrored = torch.rand(n, generator=rng) < 0.5
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    image, channel = torch.arange(n)[:, None, None, None], torch.arange(3)[:, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]  # (N, 3, H, W)
