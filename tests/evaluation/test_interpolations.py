import pytest
import torch

import tiny
from robustok.commands.evaluate import evaluate
from robustok.config import load, plain
from robustok.data.dataset import open_images
from robustok.data.pixels import to_pixels
from robustok.data.sources import Digits
from robustok.errors import UserError
from robustok.evaluation.settings import EvaluateRun
from robustok.metrics.features import ExtractorConfig, load_extractor
from robustok.metrics.frechet import GaussianStatistics, frechet_distance
from robustok.metrics.interpolation import interpolated_latents, nearest_latents
from robustok.snapshots import write_snapshot
from robustok.tokenizers import TOKENIZERS
from tiny_models import tiny_tokenizer


def saved(out, name):
    """The folder of a tiny tokenizer whose decoder makes other images of other latents."""
    model = tiny_tokenizer(name)
    write_snapshot(out / name, {"kind": "tokenizer", "config": plain(model.config)}, model.state_dict(), {})
    return out / name


def measured(out, name, classifier, *words):
    given = (*tiny.DATA, f"tokenizer={saved(out, name)}", f"extractor.path={classifier}", *words)
    return {m.metric: m for m in evaluate(load(EvaluateRun, None, (f"out={out}/out", *given)))}


@pytest.mark.parametrize("name", TOKENIZERS)
@torch.no_grad()
def test_ifid_of_every_tokenizer_by_hand(tmp_path, name, classifier):
    """Tokens are interpolated as code vectors, which are decoded as they are; 40 of 128 images are every fourth."""
    found = measured(tmp_path, name, classifier, "metrics=[ifid]", "ifid.train_images=40", "seed=3")["ifid"]
    model = tiny_tokenizer(name)
    train, test = (open_images(Digits(limit=128), 8, split) for split in ("train", "test"))
    images = test.read(range(128)).images
    latents, training = model.encode(images), model.encode(train.read(range(0, 128, 4)).images)
    discrete = model.kind == "discrete"
    vectors, decode = (model.embed, model.decode_vectors) if discrete else (lambda some: some, model.decode)
    near = nearest_latents(latents, training, 10, vectors)
    between = interpolated_latents(latents, near, training, vectors, 0.5, 3, torch.arange(128))
    extractor = load_extractor(ExtractorConfig(path=classifier))
    a, b = (GaussianStatistics.of(extractor(to_pixels(some))) for some in (decode(between), images))
    assert found.value == pytest.approx(frechet_distance(a, b), rel=1e-4)
    details = found.details
    assert (details["neighbours"], details["alpha"], details["training_latents"]) == (10, 0.5, 32)
    assert details["decoded_from"] == ("interpolated code vectors" if discrete else "interpolated latents")
    assert ("digits train" in details["training"], "digits test" in found.reference) == (True, True)
    assert details["bias"] > 0  # the images differ


@pytest.mark.parametrize("name", ["llamagen", "kl"])
def test_alpha_zero_is_rfid(tmp_path, name, classifier):
    words = ("metrics=[rfid,ifid]", "ifid.neighbours=3")
    zero, half = (measured(tmp_path, name, classifier, *words, f"ifid.alpha={alpha}") for alpha in (0, 0.5))
    assert zero["ifid"].value == pytest.approx(zero["rfid"].value, rel=1e-6)
    assert half["ifid"].value != pytest.approx(half["rfid"].value, rel=1e-2)


@pytest.mark.parametrize("name", ["llamagen", "kl"])
def test_it_does_not_depend_on_the_batch_size(tmp_path, name, classifier):
    found = [measured(tmp_path, name, classifier, "metrics=[ifid]", f"batch_size={n}")["ifid"] for n in (64, 7)]
    assert found[0].value == pytest.approx(found[1].value, rel=1e-4)
    other = measured(tmp_path, name, classifier, "metrics=[ifid]", "seed=1")["ifid"]
    assert other.value != pytest.approx(found[0].value, rel=1e-3)


def test_more_neighbours_than_training_latents(tmp_path, classifier):
    with pytest.raises(UserError, match=r"ifid\.neighbours=10, but there are 3 training latents"):
        measured(tmp_path, "robustok", classifier, "metrics=[ifid]", "ifid.train_images=3")
