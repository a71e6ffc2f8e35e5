import pytest
import torch
import yaml
from sklearn.datasets import load_digits

from robustok.data.pixels import from_pixels
from robustok.errors import UserError
from robustok.metrics.features.classifier import (
    ClassifierConfig,
    Convolution,
    SmallClassifier,
    load_classifier,
    save_classifier,
)
from robustok.training.classifier import accuracy, fit_classifier


def digits():
    data = load_digits()
    pixels = torch.from_numpy(data.images * 255 / 16).round().to(torch.uint8)
    pixels = pixels.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)[:, None].expand(-1, 3, -1, -1)
    return pixels.contiguous(), torch.from_numpy(data.target).long()


@pytest.fixture(scope="module")
def trained():
    pixels, labels = digits()
    config = ClassifierConfig(width=8, steps=120, batch_size=64, learning_rate=1e-2)
    return fit_classifier(pixels[:1000], labels[:1000], config, seed=0)


def test_it_learns_the_digits(trained):
    pixels, labels = digits()
    assert accuracy(trained, pixels[1000:], labels[1000:]) > 0.8
    untrained = SmallClassifier(trained.config, 10)
    assert accuracy(untrained, pixels[1000:], labels[1000:]) < 0.4


def test_the_seed_decides_the_weights_and_leaves_global_randomness_alone():
    pixels, labels = digits()
    config = ClassifierConfig(width=8, features=8, steps=2, batch_size=16, flip=True)
    state = torch.get_rng_state()
    first = fit_classifier(pixels, labels, config, seed=0)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(3)
    assert fit_classifier(pixels, labels, config, seed=0).digest == first.digest
    assert fit_classifier(pixels, labels, config, seed=1).digest != first.digest


def test_training_moves_under_the_autocast_of_the_caller():
    """Autocast keeps copies of the weights until its outermost context ends; training must not use those."""
    pixels, labels = digits()
    losses = []
    for steps in (1, 80):
        config = ClassifierConfig(width=8, steps=steps, batch_size=64, learning_rate=1e-2, precision="bf16")
        with torch.autocast("cpu", torch.bfloat16):
            model = fit_classifier(pixels, labels, config, seed=0)
        losses.append(torch.nn.functional.cross_entropy(model(from_pixels(pixels[:256])), labels[:256]).item())
    assert losses[1] < 0.7 * losses[0]


def test_folding_keeps_the_function():
    block = Convolution(3, 8, 3, batch_norm=True)
    images = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 2 + 1
    for _ in range(5):
        block(images)  # moves the running statistics
    before = block.eval()(images)
    block.fold()
    assert torch.allclose(block.train()(images), before, atol=1e-5)


def test_features_do_not_depend_on_the_batch_or_on_training_mode(trained):
    images = from_pixels(digits()[0][:6])
    together = trained.features(images)
    assert together.shape == (6, 64)
    alone = torch.cat([trained.train().features(image[None]) for image in images])
    assert torch.allclose(together, alone, atol=1e-5)
    trained.eval()


def test_feature_maps_give_gradients_to_images_and_none_to_weights(trained):
    images = torch.zeros(2, 3, 20, 24, requires_grad=True)
    maps = trained.feature_maps(images)
    assert [tuple(m.shape) for m in maps] == [(2, 8, 20, 24), (2, 16, 10, 12), (2, 32, 5, 6)]
    sum(m.square().mean() for m in maps).backward()
    assert images.grad.abs().sum() > 0
    assert all(weight.grad is None for weight in trained.parameters())


def test_save_and_load(trained, tmp_path):
    save_classifier(trained, tmp_path / "c")
    loaded = load_classifier(tmp_path / "c")
    images = from_pixels(digits()[0][:4])
    assert loaded.digest == trained.digest
    assert torch.equal(loaded(images), trained(images))
    header = yaml.safe_load((tmp_path / "c" / "config.yaml").read_text())
    assert {key: header[key] for key in ("classes", "digest")} == {"classes": 10, "digest": trained.digest}
    assert not any(weight.requires_grad for weight in loaded.parameters())


def test_other_folders_are_refused(trained, tmp_path):
    with pytest.raises(UserError, match="no snapshot"):
        load_classifier(tmp_path)
    save_classifier(trained, tmp_path / "c")
    header = tmp_path / "c" / "config.yaml"
    settings = yaml.safe_load(header.read_text())
    header.write_text(yaml.safe_dump(settings | {"classes": 7}))
    with pytest.raises(UserError, match="do not fit"):
        load_classifier(tmp_path / "c")
    header.write_text(yaml.safe_dump(settings | {"kind": "tokenizer"}))
    with pytest.raises(UserError, match="tokenizer"):
        load_classifier(tmp_path / "c")


@pytest.mark.parametrize(
    ("pixels", "labels", "said"),
    [
        (torch.zeros(4, 3, 16, 16), torch.zeros(4, dtype=torch.int64), "uint8"),
        (torch.zeros(4, 3, 8, 16, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), "at least 16"),
        (torch.zeros(4, 3, 16, 16, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), "one per image"),
        (torch.zeros(4, 3, 16, 16, dtype=torch.uint8), torch.tensor([0, 1, -1, 2]), "the label -1"),
    ],
)
def test_bad_training_data_is_named(pixels, labels, said):
    with pytest.raises(UserError, match=said):
        fit_classifier(pixels, labels, ClassifierConfig(steps=1), seed=0)
