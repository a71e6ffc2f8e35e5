"""Images to caches of latents: which crops, in which order, and the same whatever stops or shares the work."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional

import tiny
from robustok.commands.encode import EncodeRun, encode
from robustok.commands.make_pairs import make_pairs
from robustok.data.crops import center_crop, enlarged, five_crops
from robustok.data.latent_cache import LatentCache
from robustok.data.pixels import from_pixels, to_pixels
from robustok.errors import UserError
from robustok.tokenizers import load_tokenizer
from robustok.training.decoder import train_decoder
from tiny_images import picture, truncate

COUNT = 14


@pytest.fixture
def photos(tmp_path):
    for i in range(COUNT):
        file = tmp_path / "photos" / f"class{i % 3}" / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(i, 40 + i, 50 - i).save(file)
    return tmp_path / "photos"


def run(out, tokenizer, photos, *words):
    data = ("data.name=folder", f"data.path={photos}", "data.holdout=0", "cache.batch_size=9", "cache.shard_size=25")
    return tiny.load(EncodeRun, None, (f"out={out}", f"tokenizer={tokenizer}", *data, *words))


def records(path):
    return LatentCache(path).read(slice(None))


def plain_crops(image, crops):
    """The crops of one image, as PIL and torchvision cut them."""
    if crops == "ten":
        large = Image.fromarray(center_crop(image, int(16 * 1.1)))
        five = [np.asarray(crop) for crop in functional.five_crop(large, 16)]
        return five + [crop[:, ::-1] for crop in five]
    middle = center_crop(image, 16)
    return [middle, middle[:, ::-1]][: 1 if crops == "center" else 2]


def patch_sums(_, images):
    """Tokens (N, 16) that no single pixel can change unnoticed: sums over the patches, modulo the codebook."""
    patches = to_pixels(images).long().reshape(-1, 3, 4, 4, 4, 4)
    return patches.sum((1, 3, 5)).flatten(1) % 32


@pytest.mark.parametrize(("crops", "variants"), [("center", 1), ("center-flip", 2), ("ten", 10)])
def test_records_of_an_image_lie_together(tmp_path, tokenizer, photos, monkeypatch, crops, variants):
    monkeypatch.setattr(type(load_tokenizer(tokenizer)), "encode", patch_sums)
    settings = run(tmp_path / "cache", tokenizer, photos, f"crops={crops}")
    assert settings.variants == variants
    cache = LatentCache(encode(settings))
    found = cache.read(slice(None))
    files = sorted(photos.rglob("*.png"))
    cut = np.stack([pixels for file in files for pixels in plain_crops(Image.open(file), crops)])
    expected = patch_sums(None, from_pixels(torch.from_numpy(cut).permute(0, 3, 1, 2)))
    assert torch.equal(found.latents, expected)
    # Of an image of 17 pixels the middle is the corner, rounded; all others differ.
    assert len(expected.unique(dim=0)) == COUNT * (8 if crops == "ten" else variants)
    assert found.indices.tolist() == [i for i in range(COUNT) for _ in range(variants)]
    assert found.labels.tolist() == [int(file.parent.name[-1]) for file in files for _ in range(variants)]
    flips, numbers = {"center": ([0], [0]), "center-flip": ([0, 1], [0, 0])}.get(
        crops, ([0] * 5 + [1] * 5, [1, 2, 3, 4, 5] * 2)
    )
    assert found.flips.tolist() == flips * COUNT
    assert found.crops.tolist() == numbers * COUNT
    assert cache.manifest.source["crops"] == crops


@pytest.mark.parametrize(("size", "large"), [(256, 281), (32, 35), (64, 70), (16, 17)])
def test_five_crops_are_torchvisions(size, large):
    assert enlarged(size) == large
    images = torch.rand(2, 3, large, large, generator=torch.Generator().manual_seed(0))
    expected = torch.stack(functional.five_crop(images, [size, size]), dim=1)
    assert torch.equal(five_crops(images, size), expected)


def test_an_interruption_and_workers_change_nothing(tmp_path, tokenizer, photos, monkeypatch):
    whole = encode(run(tmp_path / "whole", tokenizer, photos, "crops=ten"))
    model, calls = type(load_tokenizer(tokenizer)), []
    plain = model.encode

    def stop(self, images):
        calls.append(len(images))
        if len(calls) == 5:  # in the second shard
            raise KeyboardInterrupt
        return plain(self, images)

    words = ("crops=ten", "workers=2", "data.max_broken=0.1")
    with monkeypatch.context() as patch:
        patch.setattr(model, "encode", stop)
        patch.setattr("robustok.data.dataset.MEMORY_LIMIT", 0)
        with pytest.raises(KeyboardInterrupt):
            encode(run(tmp_path / "parts", tokenizer, photos, *words))
        assert [file.name for file in sorted((tmp_path / "parts").glob("shard*"))] == ["shard-00000.safetensors"]
        patch.setattr(model, "encode", plain)
        encode(run(tmp_path / "parts", tokenizer, photos, *words))
    for file in whole.iterdir():
        assert (tmp_path / "parts" / file.name).read_bytes() == file.read_bytes(), file.name
    assert sum(calls) <= 25 + 18  # images are not encoded ahead


def test_a_part_of_the_images_is_a_part_of_the_whole_cache(tmp_path, tokenizer, photos):
    whole = LatentCache(encode(run(tmp_path / "whole", tokenizer, photos, "crops=center-flip")))
    for seed, count in ((0, 5), (1, 5), (1, COUNT)):
        words = ("crops=center-flip", f"count={count}", f"seed={seed}", "cache.batch_size=3", "cache.shard_size=4")
        part = LatentCache(encode(run(tmp_path / f"{seed}-{count}", tokenizer, photos, *words)))
        assert part.manifest.data == whole.manifest.data  # so that pairs may name images of the whole set
        found, everything = part.read(slice(None)), whole.read(slice(None))
        rows = [2 * i + flip for i, flip in zip(found.indices.tolist(), found.flips.tolist(), strict=True)]
        assert len(set(rows)) == 2 * count
        assert torch.equal(found.latents, everything.latents[rows])
        assert torch.equal(found.labels, everything.labels[rows])
    draws = [tuple(LatentCache(tmp_path / f"{seed}-5").indices) for seed in (0, 1)]
    assert draws[0] != draws[1]
    with pytest.raises(UserError, match=r"holds other latents .*source\.seed: 0 -> 1"):
        encode(run(tmp_path / "0-5", tokenizer, photos, "crops=center-flip", "count=5", "seed=1", "cache.shard_size=4"))


@pytest.mark.filterwarnings("ignore:skipping")
def test_a_broken_image_is_replaced_in_all_its_crops(tmp_path, tokenizer, photos):
    truncate(sorted(photos.rglob("*.png"))[4])
    found = records(encode(run(tmp_path / "cache", tokenizer, photos, "crops=ten")))
    good = [0, 1, 2, 3, 5, *range(5, COUNT)]  # the next good image replaces a broken one, with its label
    assert found.indices.tolist() == [i for i in good for _ in range(10)]
    assert torch.equal(found.latents[40:50], found.latents[50:60])
    assert found.labels[40] == found.labels[50]


def test_another_choice_of_crops_is_another_cache(tmp_path, tokenizer, photos):
    encode(run(tmp_path / "cache", tokenizer, photos))
    with pytest.raises(UserError, match=r"holds other latents .*source\.crops: center -> center-flip"):
        encode(run(tmp_path / "cache", tokenizer, photos, "crops=center-flip"))


def test_a_cache_is_completed_from_the_same_images_and_latents(tmp_path, tokenizer, generator, photos):
    for file in sorted(photos.rglob("*.png")):
        Image.open(file).resize((24, 24)).save(file.with_suffix(".bmp"))  # of one size on disk
        file.unlink()
    words = ("cache.shard_size=5",)
    whole = records(encode(run(tmp_path / "latents", tokenizer, photos, *words)))
    pairs = lambda: make_pairs(  # noqa: E731
        tiny.pairs_run(tmp_path / "pairs", generator, tmp_path / "latents", "sigma=0.5", *words)
    )
    mixed = records(pairs())
    for name in ("latents", "pairs"):
        (tmp_path / name / "shard-00001.safetensors").unlink()
    moved = photos.rename(tmp_path / "moved")
    assert torch.equal(records(encode(run(tmp_path / "latents", tokenizer, moved, *words))).latents, whole.latents)
    assert torch.equal(records(pairs()).latents, mixed.latents)

    file = next(moved.rglob("*.bmp"))
    Image.fromarray(255 - np.asarray(Image.open(file))).save(file)
    with pytest.raises(UserError, match=r"holds other latents \(source\.images: "):
        encode(run(tmp_path / "latents", tokenizer, moved, *words))
    encode(run(tmp_path / "others", tokenizer, moved, *words))
    (tmp_path / "latents").rename(tmp_path / "before")
    (tmp_path / "others").rename(tmp_path / "latents")
    with pytest.raises(UserError, match=r"holds other latents \(source\.latents: "):
        pairs()
    manifest = tmp_path / "pairs" / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["source"]["latents"]  # which earlier versions did not write
    manifest.write_text(json.dumps(content))
    pairs()


def test_ten_crops_make_no_pairs(tmp_path, tokenizer, generator, pairs):
    ten, mirrored = (
        encode(tiny.tokens_run(tmp_path / crops, tokenizer, f"crops={crops}", "data.limit=20"))
        for crops in ("ten", "center-flip")
    )
    with pytest.raises(UserError, match="latents of ten crops, post-training compares with centre crops"):
        make_pairs(tiny.pairs_run(tmp_path / "pairs", generator, ten))
    made = records(make_pairs(tiny.pairs_run(tmp_path / "mirrored", generator, mirrored)))
    assert sorted(made.flips.tolist()) == [0] * 20 + [1] * 20
    # Such pairs made by other means are refused too: the data are not those of centre crops.
    with pytest.raises(UserError, match="pairs latents with other images"):
        train_decoder(tiny.post_run(tmp_path / "post", tokenizer, ten, "data.limit=20"))
