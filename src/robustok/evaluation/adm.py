"""A reference batch for ADM's evaluator: images as ``arr_0``, and the statistics of the whole data set."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from robustok.data.arrays import write_npz
from robustok.data.dataset import Draw
from robustok.data.loader import batches_of
from robustok.errors import UserError
from robustok.evaluation.evaluator import Evaluator
from robustok.metrics.comparison import REFERENCE_IMAGES
from robustok.metrics.reference import moments


def write_adm_reference(evaluator: Evaluator, size: int, file: Path) -> None:
    """Write the real images that samples are compared with, as ADM's own reference batches have them.

    ADM's evaluator takes precision and recall from ``arr_0``, and FID and sFID from ``mu``, ``sigma``, ``mu_s`` and
    ``sigma_s`` where they are there. Of more than 10,000 images, 10,000 evenly spread are written; then the statistics
    are needed, and with them the Inception network. All processes call this; the first one writes.

    Args:
        evaluator: with the real images.
        size: height and width in pixels.
        file: where to write.

    Raises:
        UserError: more than 10,000 images without the Inception network, a broken image, or a full disk.
    """
    images = evaluator.real_images(size)
    inception = evaluator.run.inception
    if len(images) > REFERENCE_IMAGES and not inception:
        raise UserError(
            f"{images.describe()}: ADM's evaluator reads {REFERENCE_IMAGES:,} of them and needs the statistics of all; "
            "give extractor.name=inception, or data.limit"
        )
    statistics = {}
    if inception:
        reference = evaluator.real_features(images, 0, {"spatial"})
        statistics = moments(reference.statistics, "") | moments(reference.spatial, "_s")
    rows = np.arange(0, len(images), -(-len(images) // REFERENCE_IMAGES))

    def batches() -> Iterator[np.ndarray]:
        parts = np.split(rows, range(evaluator.run.batch_size, len(rows), evaluator.run.batch_size))
        for some, batch in zip(parts, batches_of(images, map(Draw, parts), evaluator.run.workers), strict=True):
            if len(batch.indices) < len(some):
                raise UserError(f"{images.describe()} has broken images; repair or remove them")
            yield batch.pixels.permute(0, 2, 3, 1).numpy()

    if evaluator.processes.rank == 0:
        write_npz(file, batches(), (len(rows), size, size, 3), images.labels[rows], statistics)
