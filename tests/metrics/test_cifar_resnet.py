"""The public CIFAR-10 classifiers, on random weights that the tests make."""

import pytest
import torch
from safetensors.torch import save_file

from robustok.data.pixels import from_pixels
from robustok.errors import UserError
from robustok.metrics.features import ExtractorConfig, load_extractor
from robustok.metrics.features.cifar_resnet import Block, CifarResNet, CifarResNetExtractor, load_cifar_resnet
from tiny_models import save_resnet20


@pytest.fixture
def weights(tmp_path):
    return save_resnet20(tmp_path / "resnet20.safetensors")


def test_sizes_are_those_of_the_paper():
    """Table 6 of arXiv 1512.03385: millions of parameters."""
    found = {depth: sum(p.numel() for p in CifarResNet(depth).parameters()) / 1e6 for depth in (20, 32, 44, 56, 110)}
    assert {depth: round(count, 2) for depth, count in found.items()} == {
        20: 0.27,
        32: 0.46,
        44: 0.66,
        56: 0.85,
        110: 1.73,
    }


def test_the_shortcut_takes_every_second_pixel_and_adds_zero_channels():
    block = Block(16, 32).eval()
    torch.nn.init.zeros_(block.bn2.weight)  # the branch is 0, what is left is the shortcut
    x = torch.rand(2, 16, 8, 8)
    out = block(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def test_features_by_hand(weights):
    extractor = load_extractor(ExtractorConfig(name="cifar-resnet", path=weights))
    pixels = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    network = extractor.network
    x = (pixels / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(
        3, 1, 1
    )
    x = network.layer3(network.layer2(network.layer1(torch.relu(network.bn1(network.conv1(x))))))  # (3, 64, 8, 8)
    torch.testing.assert_close(extractor(pixels), x.mean(dim=(2, 3)), rtol=1e-4, atol=1e-5)
    assert [m.shape[1:] for m in network.feature_maps(from_pixels(pixels))] == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


def test_the_name_carries_depth_and_digest(weights, tmp_path):
    first = CifarResNetExtractor(weights)
    assert first.name.startswith("cifar-resnet20-")
    network = load_cifar_resnet(weights)
    network.linear.bias.data[0] += 1
    save_file({n: t for n, t in network.state_dict().items() if "num_batches" not in n}, tmp_path / "other.safetensors")
    assert CifarResNetExtractor(tmp_path / "other.safetensors").name != first.name


def test_other_weights_and_sizes_are_refused(weights, tmp_path):
    save_file({"conv1.weight": torch.zeros(16, 3, 3, 3)}, tmp_path / "part.safetensors")
    with pytest.raises(UserError, match="other weights than a CIFAR-10 ResNet"):
        load_cifar_resnet(tmp_path / "part.safetensors")
    with pytest.raises(UserError, match="32x32 pixels, got 16x16"):
        CifarResNetExtractor(weights)(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
