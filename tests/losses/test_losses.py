import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.models.vgg import cfgs, make_layers

from robustok.errors import UserError
from robustok.losses.adversarial import LeCam, adaptive_weight, generator_loss, hinge_loss, lecam_loss
from robustok.losses.perceptual import LPIPSLoss, perceptual_loss
from robustok.losses.reconstruction import pixel_loss
from robustok.losses.semantic import contrastive_loss
from robustok.metrics.features.classifier import load_classifier


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_pixel_loss():
    images, reconstructions = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), -0.5)
    assert pixel_loss("l1", images, reconstructions).item() == 0.5
    assert pixel_loss("l2", images, reconstructions).item() == 0.25
    assert pixel_loss("l2", images, reconstructions.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_contrastive_loss_against_a_plain_reading(scale):
    a, b = noise(6, 4).requires_grad_(), noise(6, 4, seed=1).requires_grad_()
    found = contrastive_loss(a, b, scale)
    found.backward()
    total = 0.0
    for i in range(6):  # each vector must find its partner among all, from either side
        forward = [scale * (a[i] @ b[j]) for j in range(6)]
        backward = [scale * (a[j] @ b[i]) for j in range(6)]
        for logits in (forward, backward):
            total = total + (torch.stack(logits).exp().sum().log() - logits[i]) / 12
    gradients = torch.autograd.grad(total, (a, b))
    torch.testing.assert_close(found, total)
    torch.testing.assert_close((a.grad, b.grad), gradients)


def test_contrastive_loss_prefers_the_right_pairs():
    pairs = 5 * torch.eye(6)
    assert contrastive_loss(pairs, pairs) < 0.01
    assert contrastive_loss(pairs, pairs.roll(1, 0)) > 1
    assert contrastive_loss(torch.zeros(6, 6), pairs).item() == pytest.approx(math.log(6))


def test_hinge_and_generator_loss():
    real, fake = torch.tensor([[2.0, 0.5]]), torch.tensor([[-3.0, 0.5]])
    assert hinge_loss(real, fake).item() == pytest.approx(((0 + 0.5) / 2 + (0 + 1.5) / 2) / 2)
    assert generator_loss(fake).item() == 1.25


def test_lecam_against_a_plain_reading():
    averages, real_average, fake_average = LeCam(), 0.0, 0.0
    for step in range(4):
        real, fake = noise(3, 5, seed=step) + 2, noise(3, 5, seed=10 + step) - 1
        averages.update(real.mean().item(), fake.mean().item(), decay=0.9)  # first the averages, then the loss
        real_average = 0.9 * real_average + 0.1 * real.mean().item()
        fake_average = 0.9 * fake_average + 0.1 * fake.mean().item()
        plain = [max(0.0, x - fake_average) ** 2 for x in real.flatten().tolist()]
        other = [max(0.0, real_average - x) ** 2 for x in fake.flatten().tolist()]
        assert lecam_loss(real, fake, averages).item() == pytest.approx(sum(plain) / 15 + sum(other) / 15, rel=1e-5)
    assert (averages.real, averages.fake) == pytest.approx((real_average, fake_average))


def test_adaptive_weight_is_a_clamped_ratio():
    a, b = noise(4, 3), noise(4, 3, seed=1)
    assert adaptive_weight(a, b).item() == pytest.approx((a.norm() / (b.norm() + 1e-4)).item())
    assert adaptive_weight(a, torch.zeros(4, 3), maximum=50.0).item() == 50
    assert adaptive_weight(torch.ones(1), torch.zeros(1)).item() == pytest.approx(1e4)
    assert adaptive_weight(torch.zeros(4, 3), b).item() == 0
    assert adaptive_weight(a.bfloat16().requires_grad_(), b.bfloat16()).dtype == torch.float32
    assert not adaptive_weight(a.requires_grad_(), b).requires_grad


def test_perceptual_loss_of_a_classifier(classifier):
    maps = load_classifier(classifier).feature_maps
    images = noise(3, 3, 16, 16).clamp(-1, 1)
    other = noise(3, 3, 16, 16, seed=1).clamp(-1, 1).requires_grad_()
    assert perceptual_loss(maps, images, images).item() == 0
    loss = perceptual_loss(maps, images, other)
    loss.backward()
    assert other.grad.abs().sum() > 0
    plain = sum(
        (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean()
        for a, b in zip(maps(images), maps(other), strict=True)
    )
    torch.testing.assert_close(loss, plain)


def test_lpips_from_a_local_file(tmp_path):
    pytest.importorskip("lpips", reason="the extra robustok[lpips] is not installed")
    torch.manual_seed(0)
    network = make_layers(cfgs["D"])
    state = {f"features.{name}": value for name, value in network.state_dict().items()}  # as in torchvision's file
    torch.save(state, tmp_path / "vgg16.pth")
    loss = LPIPSLoss(str(tmp_path / "vgg16.pth"))
    assert not loss.training
    assert not any(p.requires_grad for p in loss.parameters())

    images, other = noise(2, 3, 32, 32).clamp(-1, 1), noise(2, 3, 32, 32, seed=1).clamp(-1, 1).requires_grad_()
    assert loss(images, images).item() == 0
    found = loss(images, other)
    assert torch.equal(found, loss(images, other))  # no dropout
    found.backward()
    assert other.grad.abs().sum() > 0
    with pytest.raises(UserError, match=r"8x32 pixels, lpips_vgg needs 16 a side"):
        loss(images[:, :, :8], images[:, :, :8])

    # The package's own linear heads on torchvision's network, written out: every layer has the file's weights.
    shift, scale = (
        torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1),
        torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1),
    )
    a, b, plain = (images - shift) / scale, (other.detach() - shift) / scale, 0.0
    heads = iter(loss.network.heads)
    for i, layer in enumerate(network):
        a, b = layer(a), layer(b)
        if i in (3, 8, 15, 22, 29):  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
            difference = (F.normalize(a, dim=1, eps=1e-10) - F.normalize(b, dim=1, eps=1e-10)).square()
            plain = plain + F.conv2d(difference, next(heads)).mean()
    torch.testing.assert_close(found, plain, rtol=1e-3, atol=1e-6)

    rounded = LPIPSLoss(str(tmp_path / "vgg16.pth"), "bf16")  # is in bf16 whatever is around it
    seen = []
    rounded.network.features[-1].register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        value = rounded(images, other)
    assert torch.equal(value, rounded(images, other))
    assert set(seen) == {torch.bfloat16}
    assert value.dtype == torch.float32  # the mean over positions
    torch.testing.assert_close(value, found, rtol=0.02, atol=0)


def test_lpips_with_unusable_weights(tmp_path):
    pytest.importorskip("lpips", reason="the extra robustok[lpips] is not installed")
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth holds no VGG-16 weights .*vgg16-397923af\.pth"):
        LPIPSLoss(str(tmp_path / "other.pth"))
    with pytest.raises(UserError, match=r"missing\.pth"):
        LPIPSLoss(str(tmp_path / "missing.pth"))
