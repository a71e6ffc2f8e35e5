import gc
import hashlib
import os
import sys
from urllib.error import URLError

import pytest
import torch

import tiny
from robustok.commands.evaluate import evaluate
from robustok.commands.generate import generate
from robustok.config import load
from robustok.data.dataset import open_images
from robustok.data.latent_cache import LatentCache
from robustok.data.pixels import from_pixels, to_pixels
from robustok.data.sources import Digits
from robustok.errors import UserError
from robustok.evaluation.settings import EvaluateRun
from robustok.metrics.features import ExtractorConfig, inception, load_extractor
from robustok.metrics.features.inception import SPATIAL_DIM, InceptionExtractor
from robustok.metrics.inception_score import inception_score
from robustok.metrics.kernel import kernel_distance
from robustok.metrics.manifold import precision_recall
from robustok.tokenizers import load_tokenizer
from robustok.types import FeatureExtractor

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


@pytest.fixture(scope="module")
def theirs(inception_weights):
    """What torch-fidelity's own network gives, and sFID's features by their definition."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    network, maps = FeatureExtractorInceptionV3("theirs", ["2048", "logits_unbiased"], str(inception_weights)), []
    # What enters the branch is what Mixed_6c gives; the branch itself is a convolution, a normalisation and a ReLU.
    network.Mixed_6d.register_forward_pre_hook(lambda module, args: maps.append(module.branch1x1(args[0])))
    with torch.no_grad():
        pool, logits = network(pixels())
    return pool, logits, maps[0]  # (3, 192, 17, 17)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_features_are_those_of_torch_fidelity(found, theirs):
    pool, logits, _ = theirs
    assert pool.std() > 1e-3  # random, but not vanished
    assert relative(found.pool, pool) < 3e-6
    assert relative(found.logits, logits) < 3e-6
    assert found.logits.shape == (3, 1008)


def test_spatial_features_are_seven_channels_with_channels_last(found, theirs):
    whole = theirs[2]
    assert whole.shape == (3, 192, 17, 17)
    assert found.spatial.shape == (3, SPATIAL_DIM) == (3, 2023)
    for row, column, channel in [(0, 0, 0), (0, 0, 6), (0, 1, 0), (16, 3, 2)]:
        at = (row * 17 + column) * 7 + channel
        assert torch.allclose(found.spatial[:, at], whole[:, channel, row, column], rtol=1e-4, atol=1e-6)


def test_no_batch_norm_is_left(extractor):
    assert not [m for m in extractor.network.modules() if isinstance(m, torch.nn.BatchNorm2d)]


def test_neither_autocast_nor_tf32_nor_batch_nor_train_mode_matters(extractor, found):
    extractor.network.train()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            alone = extractor.features(pixels()[1:2])
        assert torch.get_float32_matmul_precision() == "medium"  # as it was
    finally:
        torch.set_float32_matmul_precision("highest")
    for name in ("pool", "logits", "spatial"):
        one, all_three = getattr(alone, name), getattr(found, name)
        assert (one.dtype, one.requires_grad) == (torch.float32, False)
        assert (one - all_three[1:2]).abs().max() < 1e-5, name


def test_bf16_is_near_and_says_so(inception_weights, digest, found):
    fast = load_extractor(ExtractorConfig(name="inception", path=inception_weights, precision="bf16"))
    assert fast.name == f"custom-inception-2048-{digest}-bf16"
    near = fast.features(pixels())
    assert {near.pool.dtype, near.logits.dtype, near.spatial.dtype} == {torch.float32}
    assert 1e-5 < relative(near.pool, found.pool) < 2e-2
    assert relative(near.logits, found.logits) < 2e-2
    assert relative(near.spatial, found.spatial) < 6e-2


def test_nothing_is_kept_from_batch_to_batch(extractor):
    def tensors():
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    before = tensors()
    for _ in range(2):
        extractor(pixels(1))
    assert tensors() == before


def test_images_have_the_same_features_and_a_gradient(extractor):
    pixels = torch.randint(0, 256, (2, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = from_pixels(pixels).requires_grad_()
    features = extractor.from_images(images)
    torch.testing.assert_close(features.detach(), extractor(pixels), rtol=1e-4, atol=1e-5)
    features[0].sum().backward()
    assert images.grad[0].abs().max() > 0
    assert not images.grad[1].any()


def test_only_uint8_pixels_enter(extractor):
    with pytest.raises(UserError, match="uint8"):
        extractor(pixels().float())


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (32, 32), (17, 64), (256, 256), (299, 299), (512, 301)])
def test_resizing_is_that_of_tensorflow(shape):
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as theirs

    rng = torch.Generator().manual_seed(sum(shape))
    images = torch.randint(0, 256, (2, 3, *shape), dtype=torch.uint8, generator=rng)
    ours = inception.resize_like_tensorflow(images)
    assert ours.shape == (2, 3, 299, 299)
    assert (ours - theirs(images.float(), (299, 299), align_corners=False)).abs().max() < 1e-4


def test_resizing_by_hand():
    """Position 1 of 4 is at 1 * 2 / 4 of the old ones, position 3 beyond the last: no half-pixel offset."""
    row = inception.resize_like_tensorflow(torch.tensor([[[[10, 30]]]], dtype=torch.uint8), size=4)[0, 0, 0]
    assert row.tolist() == [10, 20, 30, 30]


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
    monkeypatch.setattr(inception, "INCEPTION_URL", f"https://nowhere/weights-{digest}.pth")
    os.link(inception_weights, hub / f"weights-{digest}.pth")
    assert InceptionExtractor().name == f"inception-2048-{digest}"


def test_a_download_is_checked(tmp_path, inception_weights, monkeypatch):
    """From the official address, were it a file of this machine."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    wrong = tmp_path / "weights-inception-2015-12-05-6726825d.pth"
    os.link(inception_weights, wrong)
    monkeypatch.setattr(inception, "INCEPTION_URL", wrong.as_uri())
    with pytest.raises(UserError, match=r"did not arrive .*invalid hash"):
        InceptionExtractor()
    assert not list((tmp_path / "hub" / "checkpoints").iterdir())


class Harmful:
    """A pickle that makes a folder where it is loaded without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("content", ["pickle", "words", "other", "list", "cut off"])
def test_files_that_are_no_weights(tmp_path, content):
    path = tmp_path / "weights.pth"
    if content == "words":
        path.write_text("not weights")
    else:
        kinds = {"pickle": Harmful(tmp_path / "harm"), "list": [torch.zeros(2)]}
        torch.save(kinds.get(content, {"fc.weight": torch.zeros(2)}), path)
    if content == "cut off":
        path.write_bytes(path.read_bytes()[:300])
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
    with pytest.raises(UserError, match=r"precision=bf16 needs extractor\.name=inception"):
        load(ExtractorConfig, None, ("path=folder", "precision=bf16"))


# All metrics of samples, from one pass


def distance(a, b):
    """Frechet distance of fewer images than features: tr (S_a S_b)^(1/2) is the nuclear norm of a small matrix."""
    a, b = a.double(), b.double()
    x, y = ((z - z.mean(dim=0)) / (len(z) - 1) ** 0.5 for z in (a, b))
    root = torch.linalg.svdvals(x @ y.T).sum()
    return ((a.mean(dim=0) - b.mean(dim=0)).square().sum() + x.square().sum() + y.square().sum() - 2 * root).item()


@torch.no_grad()
def test_evaluation_by_hand(tmp_path, extractor, inception_weights, tokenizer, generator):
    samples = generate(tiny.samples_run(tmp_path / "samples", generator, "count=10"))
    metrics = ["gfid", "sfid", "kid", "precision", "recall", "inception_score"]
    words = (f"samples.latents=[{samples}]", f"samples.decoders.d={tokenizer}", f"metrics=[{','.join(metrics)}]")
    space = ("extractor.name=inception", f"extractor.path={inception_weights}")
    settings = (
        f"out={tmp_path}",
        "data.name=digits",
        "data.limit=7",
        "seed=3",
        "allow_fewer=true",
        "batch_size=5",
        *words,
        *space,
    )
    measured = evaluate(load(EvaluateRun, None, settings))
    decode = load_tokenizer(tokenizer).decode
    fake = extractor.features(to_pixels(decode(LatentCache(samples).read(slice(None)).latents)))
    real = extractor.features(to_pixels(open_images(Digits(limit=7), 16, "train").read(range(7)).images))
    pool, spatial = distance(fake.pool, real.pool), distance(fake.spatial, real.spatial)
    both = precision_recall(real=real.pool, fake=fake.pool)
    score = inception_score(fake.logits, rng=torch.Generator().manual_seed(3)).mean
    kid = kernel_distance(fake.pool, real.pool).value
    by_hand = (pool, spatial, kid, both.precision, both.recall, score)
    values = {m.metric.partition("@")[0]: m.value for m in measured}
    assert values == pytest.approx(dict(zip(metrics, by_hand, strict=True)), rel=1e-3)
    assert {m.extractor for m in measured} == {extractor.name}
    notes = {m.metric.partition("@")[0]: m.details.get("note", "") for m in measured}
    assert notes["gfid"].startswith("FID of 10 samples: biased upward by about c/N =")
    assert {metric for metric, note in notes.items() if note} == {"gfid"}
