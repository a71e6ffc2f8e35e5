import os
import shutil
import sys
import warnings
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
from torchvision.models import alexnet
from torchvision.models.vgg import cfgs, make_layers

from robustok.errors import UserError
from robustok.metrics.lpips import LPIPS, load_lpips

SHAPES = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3), 10: (256, 256, 3, 3)}

pytest.importorskip("lpips", reason="the extra robustok[lpips] is not installed")


def pair(count=3, size=35):
    rng = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, count, 3, size, size), dtype=torch.uint8, generator=rng)


@pytest.fixture(scope="module")
def state():
    """Convolutions of AlexNet, as torchvision's file names them."""
    rng, found = torch.Generator().manual_seed(0), {}
    for i, shape in SHAPES.items():
        found[f"features.{i}.weight"] = torch.randn(shape, generator=rng) * 0.05
        found[f"features.{i}.bias"] = torch.randn(shape[0], generator=rng) * 0.05
    return found


@pytest.fixture(scope="module")
def weights(tmp_path_factory, state):
    path = tmp_path_factory.mktemp("alexnet") / "alexnet.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def metric(weights):
    return LPIPS("alex", weights)


def by_hand(a, b, state, heads):
    """Zhang et al. 2018: squared difference of unit-length features, weighted by channel, mean over positions, sum."""

    shift, scale = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), torch.tensor([0.458, 0.448, 0.450])

    def maps(pixels):
        x = (pixels.double() / 255 * 2 - 1 - shift) / scale.view(3, 1, 1)
        for i, stride, padding in ((0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1)):
            x = F.max_pool2d(x, 3, 2) if i in (3, 6) else x
            kernel, bias = state[f"features.{i}.weight"].double(), state[f"features.{i}.bias"].double()
            x = F.conv2d(x, kernel, bias, stride, padding).relu()
            yield x / x.square().sum(1, keepdim=True).sqrt()

    layers = zip(maps(a), maps(b), heads, strict=True)
    return sum(((x - y).square() * head.double()).sum(1).mean(dim=(1, 2)) for x, y, head in layers)


def test_it_is_the_distance_of_the_paper_with_the_package_s_linear_layers(metric, state):
    a, b = pair()
    heads = list(metric.network.heads)  # each (1, C, 1, 1)
    assert (torch.cat([head.flatten() for head in heads]) >= 0).all()
    found = metric(a, b)
    assert found.shape == (3,)
    assert found.min() > 1e-3
    assert torch.allclose(found.double(), by_hand(a, b, state, heads), rtol=1e-4)


def test_equal_images_have_no_distance_and_a_small_change_a_small_one(metric):
    a, _ = pair()
    assert metric(a, a).abs().max() == 0
    little, much = ((a.int() + n).clamp(0, 255).to(torch.uint8) for n in (2, 60))
    assert (metric(little, a) > 0).all()
    assert (metric(little, a) < metric(much, a)).all()
    assert torch.allclose(metric(little, a), metric(a, little), rtol=1e-4)


def test_neither_batch_nor_autocast_nor_train_mode_matters(metric):
    a, b = pair()
    whole = metric(a, b)
    metric.network.train()  # would switch dropout on
    with torch.autocast("cpu", torch.bfloat16):
        alone = metric(a[1:2], b[1:2])
    assert alone.dtype == torch.float32
    assert not alone.requires_grad
    assert (alone - whole[1:2]).abs().max() < 1e-5


def test_the_network_is_part_of_the_name(metric, monkeypatch):
    assert metric.name == "lpips_alex"
    assert metric.extractor.startswith("custom-alexnet-")
    monkeypatch.setattr("robustok.metrics.lpips.load_lpips", lambda net, *_, **__: (metric.network, net))
    assert LPIPS("vgg").name == "lpips_vgg"


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        (pair()[0].float(), pair()[1], "uint8"),
        (pair()[0], pair(2)[1], "equal shape"),
        (pair(size=30)[0], pair(size=30)[1], r"30x30 pixels, lpips_alex needs 31"),
    ],
)
def test_images_it_cannot_judge(metric, a, b, said):
    with pytest.raises(UserError, match=said):
        metric(a, b)


def test_the_least_size_is_enough(metric):
    assert metric(*pair(1, size=31)).isfinite().all()


def test_missing_weights_say_where_to_put_the_file(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    for net, file in (("alex", "alexnet-owt-7be5be79.pth"), ("vgg", "vgg16-397923af.pth")):
        with pytest.raises(UserError, match=r"no route to host.*lpips\.weights=FILE") as error:
            LPIPS(net)
        assert str(tmp_path / "checkpoints" / file) in str(error.value)
        assert "\n" not in str(error.value)


def test_the_cache_is_read_and_its_file_must_be_the_official_one(tmp_path, monkeypatch, weights):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    cached = tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth"
    cached.parent.mkdir()
    cached.write_bytes(weights.read_bytes())
    with pytest.raises(UserError, match=r"has the SHA-256 .*expected 7be5be79"):
        LPIPS("alex")


def test_weights_of_another_network(tmp_path):
    torch.save({"features.0.weight": torch.zeros(2)}, tmp_path / "wrong.pth")
    with pytest.raises(UserError, match="holds no AlexNet weights"):
        LPIPS("alex", tmp_path / "wrong.pth")


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(UserError, match=r"pip install 'robustok\[lpips\]'"):
        LPIPS()


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_it_is_the_package_s(tmp_path, net):
    """With the same random weights below; its linear layers may come from a file, without the package."""
    import lpips

    torch.manual_seed(0)
    network = alexnet(weights=None).features if net == "alex" else make_layers(cfgs["D"])
    for layer in network:
        if isinstance(layer, torch.nn.Conv2d):  # so that deep features vary as much as the first ones
            torch.nn.init.kaiming_normal_(layer.weight)
    weights = {f"features.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save(weights, tmp_path / "weights.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchvision's deprecated settings
        theirs = lpips.LPIPS(net=net, pnet_rand=True, verbose=False).eval()
    own = theirs.net.state_dict()  # slice1.0.weight is features.0.weight
    theirs.net.load_state_dict({name: weights[f"features.{name.partition('.')[2]}"] for name in own})
    images = torch.randint(0, 256, (2, 3, 3, 64, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    a, b = (x.float() / 127.5 - 1 for x in images)
    with torch.no_grad():
        expected = theirs(a, b).flatten()
    linear = shutil.copy(Path(lpips.__file__).parent / f"weights/v0.1/{net}.pth", tmp_path / "linear.pth")
    assert expected.min() > 0.05
    for path in (None, linear):
        assert (LPIPS(net, tmp_path / "weights.pth", linear=path)(*images) - expected).abs().max() < 1e-5

    x, y = (b.clone().requires_grad_() for _ in range(2))
    load_lpips(net, tmp_path / "weights.pth", linear, ("", ""))[0](a, x).sum().backward()
    theirs(a, y).sum().backward()
    assert (x.grad - y.grad).norm() < 1e-4 * y.grad.norm()


def test_linear_layers_of_another_network(tmp_path, weights):
    import lpips

    other = Path(lpips.__file__).parent / "weights/v0.1/vgg.pth"
    for file, said in ((other, "of another network than AlexNet"), (weights, "holds no linear layers of LPIPS")):
        with pytest.raises(UserError, match=f"{said}.*alex.pth as lpips.linear"):
            LPIPS("alex", weights, linear=file)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0"
BROKEN = {"features.0.bias": torch.full((64,), torch.nan)}
REFUSED = {  # what the file is, what is said
    "an object": (lambda file, state: torch.save(state | {"features.0.bias": {1, 2}}, file), "'features.0.bias' is a"),
    "not finite": (lambda file, state: torch.save(state | BROKEN, file), "it: features.0.bias holds NaN"),
    "a pointer": (lambda file, _: file.write_text(POINTER), "git-lfs pointer"),
    "a pipe": (lambda file, _: os.mkfifo(file), "it is a FIFO"),
    "a folder": (lambda file, _: file.mkdir(), "it is a folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_is_refused_is_one_line_without_advice_to_trust_it(tmp_path, state, case):
    make, said = REFUSED[case]
    make(tmp_path / "alexnet.pth", state)
    with pytest.raises(UserError, match=said) as error:
        LPIPS("alex", tmp_path / "alexnet.pth")
    assert "weights_only" not in str(error.value)
    assert "\n" not in str(error.value)
