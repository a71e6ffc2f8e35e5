"""Whether latents are what a command needs: of its tokenizer, of real images or free samples, of its data set."""

from collections.abc import Sequence
from pathlib import Path

from robustok.config import differences
from robustok.data.latent_cache import LatentCache
from robustok.errors import UserError
from robustok.files import bytes_digest

INDEPENDENT = 64  # first samples of two sets that must not be equal


def check_cache(
    cache: LatentCache,
    tokenizer_digest: str | None = None,
    latent_shape: tuple[int, ...] | None = None,
    codebook_size: int | None = None,
) -> None:
    """Refuse a cache that was made for another tokenizer; None is not compared.

    Raises:
        UserError: names what differs.
    """
    given = {"tokenizer": tokenizer_digest, "latent_shape": latent_shape, "codebook_size": codebook_size}
    for name, value in given.items():
        found = getattr(cache.manifest, name)
        if value is not None and value != found:
            raise UserError(
                f"{cache.path} was made by another tokenizer: {name} {found}, expected {value}; encode the images again"
            )


def check_indices(cache: LatentCache, images: int) -> None:
    """Refuse latents that point to images which a data set of so many does not have.

    Raises:
        UserError: an index is out of range.
    """
    first, last = cache.indices.min(), cache.indices.max()
    if not 0 <= first <= last < images:
        raise UserError(
            f"{cache.path} points to the images {first} to {last} of {images}, which are 0 to {images - 1}; remove it "
            "and run the command that makes it again"
        )


def check_free_samples(cache: LatentCache) -> None:
    """Refuse latents that are no free samples of a generator.

    Raises:
        UserError: they are of real images, or mixtures of these with samples.
    """
    source = cache.manifest.source
    if source.get("mode") == "reencoded" or (cache.manifest.data is not None and source.get("sigma") != 0):
        found = f"pairs at sigma {source['sigma']}" if "sigma" in source else "latents of real images"
        raise UserError(f"{cache.path} holds {found}, expected free samples; make them with `robustok generate`")


def check_real_latents(cache: LatentCache) -> None:
    """Refuse latents that are not of real images.

    Raises:
        UserError: they are samples, or pairs.
    """
    if "sigma" in cache.manifest.source or cache.manifest.data is None:
        found = "free samples" if cache.manifest.data is None else "pairs"
        raise UserError(
            f"{cache.path} holds {found}, expected latents of real images; give what `robustok encode` made"
        )


def check_squares(cache: LatentCache, taker: str) -> None:
    """Refuse latents of a bucket where ``taker`` needs those of square images, row by row.

    Raises:
        UserError: they have rows and columns.
    """
    if cache.manifest.grid is not None:
        raise UserError(
            f"{cache.path} holds latents of data.buckets, with rows and columns, which {taker} does not take; give "
            "those of square images, made with data.buckets=false"
        )


def check_independent(caches: Sequence[LatentCache]) -> None:
    """Refuse sets of samples whose mean and standard error would mean nothing.

    They must be of one generator, drawn in one way, of one size, and differ in their random numbers.

    Raises:
        UserError: names what differs, or two sets with the same samples.
    """
    seen: dict[str, Path] = {}
    first = caches[0]
    for cache in caches:
        one, other = ({"count": len(c), **c.manifest.source} for c in (first, cache))
        shared = (one.keys() & other.keys()) - {"seed"}  # versions write different fields
        if different := differences(*({key: side[key] for key in sorted(shared)} for side in (one, other))):
            raise UserError(
                f"samples of {first.path} and {cache.path} differ in more than their seed ({'; '.join(different)}), so "
                "they have no common mean; evaluate them one after the other"
            )
        digest = bytes_digest(cache.read(slice(0, INDEPENDENT)).latents.numpy().tobytes())
        if digest in seen:
            raise UserError(
                f"{seen[digest]} and {cache.path} hold the same samples, so their standard error would be 0; make each "
                "set with a seed of its own"
            )
        seen[digest] = cache.path


def check_center_crops(cache: LatentCache) -> None:
    """Refuse latents of ten-crop: the images of post-training are centre crops.

    Raises:
        UserError: the cache holds ten-crop.
    """
    if cache.manifest.source.get("crops") == "ten":
        raise UserError(
            f"{cache.path} holds latents of ten crops, post-training compares with centre crops; "
            "encode the images again with crops=center or crops=center-flip"
        )
