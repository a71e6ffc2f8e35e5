import hashlib
import os
import sys
from urllib.error import URLError

import pytest
import torch

import tiny
from robustok.config import load
from robustok.evaluate import EvaluateRun, evaluate
from robustok.generate import generate
from robustok.images import Digits, open_images, to_pixels
from robustok.latents import LatentCache
from robustok.metrics import (
    InceptionExtractor,
    features,
    inception_score,
    kernel_distance,
    precision_recall,
)
from robustok.metrics.features import ExtractorConfig, load_extractor
from robustok.tokenizers import load_tokenizer
from robustok.types import FeatureExtractor, UserError

pytest.importorskip("torch_fidelity")


def pixels(count=3):
    return torch.randint(0, 256, (count, 3, 20, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """Random weights of the network with 1008 classes (91 MB); torchvision's names are those of the official file."""
    from torchvision.models import inception_v3

    rng = torch.Generator().manual_seed(0)
    network = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 4:  # the default would let the features vanish on their way
                parameter.normal_(0, (2 / parameter[0].numel()) ** 0.5, generator=rng)
        network.fc.weight.normal_(0, 0.02, generator=rng)
    path = tmp_path_factory.mktemp("inception") / "inception-random.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def digest(inception_weights):
    return hashlib.sha256(inception_weights.read_bytes()).hexdigest()[:8]


@pytest.fixture(scope="module")
def extractor(inception_weights):
    return load_extractor(ExtractorConfig(name="inception", path=inception_weights))


@pytest.fixture(scope="module")
def found(extractor):
    return extractor.features(pixels())


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of torch.hub, and no network."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))

    def offline(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


# Features


def test_it_names_itself_by_the_file(extractor, digest):
    assert isinstance(extractor, FeatureExtractor)
    assert (extractor.name, extractor.dim) == (f"custom-inception-2048-{digest}", 2048)


@torch.no_grad()
def test_features_are_those_of_torch_fidelity(found, inception_weights):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    theirs = FeatureExtractorInceptionV3("theirs", ["2048", "logits_unbiased"], str(inception_weights))
    pool, logits = theirs(pixels())
    assert torch.allclose(found.pool, pool, rtol=1e-4, atol=1e-6)
    assert torch.allclose(found.logits, logits, rtol=1e-4, atol=1e-5)
    assert found.logits.shape == (3, 1008)
    assert pool.std() > 1e-3  # random, but not vanished


@torch.no_grad()
def test_spatial_features_are_seven_channels_with_channels_last(extractor, found):
    # What enters the branch is what Mixed_6c gives; the branch itself is a convolution, a normalisation and a ReLU.
    inputs = []
    hook = extractor.network.Mixed_6d.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    extractor(pixels())
    hook.remove()
    branch = extractor.network.Mixed_6d.branch1x1
    whole = branch.bn(branch.conv(inputs[0])).relu()  # (3, 192, 17, 17)
    assert whole.shape == (3, 192, 17, 17)
    assert found.spatial.shape == (3, features.SPATIAL_DIM) == (3, 2023)
    for row, column, channel in [(0, 0, 0), (0, 0, 6), (0, 1, 0), (16, 3, 2)]:
        place = (row * 17 + column) * 7 + channel
        assert torch.allclose(found.spatial[:, place], whole[:, channel, row, column], rtol=1e-4, atol=1e-6)


def test_neither_autocast_nor_tf32_nor_batch_size_nor_train_mode_matters(extractor, found):
    extractor.network.train()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            alone = extractor.features(pixels()[:1])
        assert torch.get_float32_matmul_precision() == "medium"  # as it was
    finally:
        torch.set_float32_matmul_precision("highest")
    for name in ("pool", "logits", "spatial"):
        one, all_three = getattr(alone, name), getattr(found, name)
        assert (one.dtype, one.requires_grad) == (torch.float32, False)
        assert torch.allclose(one, all_three[:1], rtol=1e-4, atol=1e-5), name


def test_only_uint8_pixels_enter(extractor):
    with pytest.raises(UserError, match="uint8"):
        extractor(pixels().float())


# Weights


def test_missing_weights_say_where_to_put_the_file(hub):
    with pytest.raises(UserError, match="no route to host") as error:
        InceptionExtractor()
    assert str(hub / "weights-inception-2015-12-05-6726825d.pth") in str(error.value)
    assert "extractor.path=FILE" in str(error.value)


def test_the_cache_is_read_and_its_file_must_be_the_official_one(hub, inception_weights, digest, monkeypatch):
    os.link(inception_weights, hub / "weights-inception-2015-12-05-6726825d.pth")
    with pytest.raises(UserError, match=f"has the SHA-256 {digest}.*expected 6726825d"):
        InceptionExtractor()
    monkeypatch.setattr(features, "INCEPTION_DIGEST", digest)
    assert InceptionExtractor().name == f"inception-2048-{digest}"


def test_a_download_is_checked(tmp_path, inception_weights, monkeypatch):
    """From the official address, were it a file of this machine."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    wrong = tmp_path / "weights-inception-2015-12-05-6726825d.pth"
    os.link(inception_weights, wrong)
    monkeypatch.setattr(features, "INCEPTION_URL", wrong.as_uri())
    with pytest.raises(UserError, match=r"did not arrive .*invalid hash"):
        InceptionExtractor()
    assert not list((tmp_path / "hub" / "checkpoints").iterdir())


class Harmful:
    """A pickle that makes a folder where it is loaded without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("content", ["pickle", "words", "other"])
def test_files_that_are_no_weights(tmp_path, content):
    path = tmp_path / "weights.pth"
    if content == "words":
        path.write_text("not weights")
    else:
        torch.save(Harmful(tmp_path / "harm") if content == "pickle" else {"fc.weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="holds no Inception weights") as error:
        InceptionExtractor(path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "harm").exists()


def test_without_torch_fidelity(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(UserError, match=r"pip install 'robustok\[fid\]'"):
        InceptionExtractor()


def test_configuration(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*No such file"):
        load_extractor(load(ExtractorConfig, None, ("name=inception", f"path={tmp_path / 'nowhere.pth'}")))
    with pytest.raises(UserError, match=r"a classifier needs extractor\.path"):
        load(ExtractorConfig, None, ())
    assert load(ExtractorConfig, None, ("name=inception",)).path is None
    assert load(ExtractorConfig, None, ("path=folder",)).name == "classifier"


# All metrics of samples, from one pass


def distance(a, b):
    """Frechet distance of fewer images than features: tr (S_a S_b)^(1/2) is the nuclear norm of a small matrix."""
    a, b = a.double(), b.double()
    x, y = ((z - z.mean(dim=0)) / (len(z) - 1) ** 0.5 for z in (a, b))
    root = torch.linalg.svdvals(x @ y.T).sum()
    return ((a.mean(dim=0) - b.mean(dim=0)).square().sum() + x.square().sum() + y.square().sum() - 2 * root).item()


@torch.no_grad()
def test_evaluation_by_hand(tmp_path, monkeypatch, extractor, inception_weights, tokenizer, generator):
    # Loaded once is enough. (The package has a function of the module's name.)
    monkeypatch.setattr(sys.modules["robustok.evaluate"], "load_extractor", lambda config, device: extractor)
    samples = generate(tiny.samples_run(tmp_path / "samples", generator, "count=10"))
    metrics = ["gfid", "sfid", "kid", "precision", "recall", "inception_score"]
    words = (f"latents=[{samples}]", f"decoders={{d: {tokenizer}}}", f"metrics=[{','.join(metrics)}]", "batch_size=5")
    space = ("extractor.name=inception", f"extractor.path={inception_weights}")
    settings = (f"out={tmp_path}", "data.name=digits", "data.limit=7", "seed=3", *words, *space)
    measured = evaluate(load(EvaluateRun, None, settings))
    decode = load_tokenizer(tokenizer).decode
    fake = extractor.features(to_pixels(decode(LatentCache(samples).read(slice(None)).latents)))
    real = extractor.features(to_pixels(open_images(Digits(limit=7), 16, "train").read(range(7)).images))
    pool, spatial = distance(fake.pool, real.pool), distance(fake.spatial, real.spatial)
    both = precision_recall(real=real.pool, fake=fake.pool)
    score = inception_score(fake.logits, rng=torch.Generator().manual_seed(3)).mean
    kid = kernel_distance(fake.pool, real.pool).value
    by_hand = (pool, spatial, kid, both.precision, both.recall, score)
    values = {m.metric: m.value for m in measured}
    assert values == pytest.approx(dict(zip(metrics, by_hand, strict=True)), rel=1e-3)
    assert {m.extractor for m in measured} == {extractor.name}
    notes = {m.metric: m.details.get("note", "") for m in measured}
    assert notes["gfid"].startswith("FID of 10 samples: biased upward by about c/N =")
    assert {metric for metric, note in notes.items() if note} == {"gfid"}
