import pickle

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from robustok.backbones import ImageNetRange, pretrained_backbone
from robustok.errors import UserError
from robustok.losses.semantic import Teacher, TeacherConfig
from robustok.tokenizers.robustok import RobusTok, RobusTokConfig, ViTConfig, load_pretrained_backbones

DINOV2 = "vit_small_patch14_dinov2.lvd142m"
VIT = {"width": 384, "heads": 6, "layer_scale": 1e-5, "pretrained": DINOV2}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Random weights of a DINOv2 ViT-S/14 for 518 x 518: in the authors' layout, and in timm's; and the weights."""
    folder, rng = tmp_path_factory.mktemp("dinov2"), torch.Generator().manual_seed(0)
    state = timm.create_model(DINOV2).state_dict()
    state = {name: 0.05 * torch.randn(value.shape, generator=rng) for name, value in state.items()}
    torch.save(state | {"mask_token": torch.zeros(1, 384)}, folder / "dinov2_vits14_pretrain.pth")
    save_file(state, folder / "model.safetensors")
    return folder / "dinov2_vits14_pretrain.pth", folder / "model.safetensors", state


def resized(table, size):
    """Bicubic with antialiasing by Pillow: (channels, side, side) to (channels, size, size)."""
    images = [Image.fromarray(channel.numpy()).resize((size, size), Image.Resampling.BICUBIC) for channel in table]
    return torch.from_numpy(np.stack([np.asarray(image) for image in images]))


@pytest.mark.parametrize("layout", [0, 1])
def test_positions_and_patch_kernel_are_resampled(files, layout):
    state = files[2]
    model = pretrained_backbone(DINOV2, files[layout], "the backbone", "weights", img_size=256, patch_size=16)
    assert model.pos_embed.shape == (1, 257, 384)
    assert torch.equal(model.pos_embed[:, 0], state["pos_embed"][:, 0])  # the class token's
    table = resized(state["pos_embed"][0, 1:].T.reshape(384, 37, 37), 16)
    torch.testing.assert_close(model.pos_embed[0, 1:], table.flatten(1).T, atol=1e-5, rtol=1e-4)

    # A patch of 14 x 14 enlarged to 16 x 16 means the same to the new kernel as it meant to the old one.
    patches = torch.rand(5, 3, 14, 14, generator=torch.Generator().manual_seed(1))
    enlarged = torch.stack([resized(patch, 16) for patch in patches])
    old, new = state["patch_embed.proj.weight"], model.patch_embed.proj.weight
    torch.testing.assert_close(
        torch.einsum("nchw,dchw->nd", enlarged, new), torch.einsum("nchw,dchw->nd", patches, old), atol=1e-3, rtol=1e-3
    )
    same = [name for name in state if name not in ("pos_embed", "patch_embed.proj.weight")]
    assert len(same) == len(state) - 2
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in same)
    assert "state_dict" not in model.pretrained_cfg


def test_a_model_of_the_same_size_is_unchanged(files):
    model = pretrained_backbone(DINOV2, files[1], "the backbone", "weights")
    assert all(torch.equal(value, files[2][name]) for name, value in model.state_dict().items())


@torch.no_grad()
def test_encoder_decoder_and_teacher_start_alike(files):
    encoder, decoder = (ViTConfig(**VIT, weights=file, drop_path=0.1) for file in files[:2])
    config = RobusTokConfig(image_size=64, patch_size=16, encoder=encoder, decoder=decoder)
    tokenizer = RobusTok(config)
    load_pretrained_backbones(tokenizer)
    teacher = Teacher(TeacherConfig(name="timm", model=DINOV2, path=files[0]), 64, 16)
    starts = [tokenizer.encoder.backbone, tokenizer.decoder.backbone, teacher.network[1]]
    for name, value in tokenizer.decoder.backbone.state_dict().items():
        assert torch.equal(starts[0].state_dict()[name], value)
        assert torch.equal(starts[2].state_dict()[name], value)
    assert torch.equal(starts[0].patch_embed.proj.weight, starts[2].patch_embed.proj.weight)
    assert starts[0].pos_embed.shape == (1, 17, 384)
    with torch.device("meta"):  # as a snapshot is loaded, without the backbone's file
        assert RobusTok(config).state_dict().keys() == tokenizer.state_dict().keys()

    # The teacher's feature is the class token after the last norm, of images in ImageNet's range.
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2)) * 2 - 1
    vit = starts[0].eval()
    x = vit.patch_embed(ImageNetRange()(images))
    x = torch.cat([vit.cls_token.expand(2, -1, -1), x], 1) + vit.pos_embed
    torch.testing.assert_close(teacher(images), vit.norm(vit.blocks(x))[:, 0])
    assert teacher.width == 384
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_the_range_of_imagenet():
    for channel, (mean, std) in enumerate(zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)):
        found = ImageNetRange()(torch.tensor([-1.0, 0.0, 1.0]).view(1, 1, 1, 3).expand(1, 3, 1, 3))[0, channel, 0]
        torch.testing.assert_close(found, (torch.tensor([0.0, 0.5, 1.0]) - mean) / std)
    assert ImageNetRange().state_dict() == {}


class Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_unfitting_weights_are_refused(files, tmp_path):
    def built(**changes):
        vit = ViTConfig(**VIT | {"weights": files[1]} | changes)
        config = RobusTokConfig(image_size=32, patch_size=16, encoder=vit, decoder=ViTConfig(width=16, heads=2))
        load_pretrained_backbones(RobusTok(config))

    with pytest.raises(UserError, match=r"has width, depth, heads \(384, 12, 6\), configured are \(384, 12, 12\)"):
        built(heads=12)
    with pytest.raises(UserError, match=r"has LayerScale and layer_scale is None; set layer_scale=1e-5"):
        built(layer_scale=None)
    with pytest.raises(
        UserError, match=r"cannot load the pretrained backbone vit_tiny.*; give a local file as weights"
    ):
        built(pretrained="vit_tiny_patch16_224")  # weights of another model
    with pytest.raises(UserError, match=r"cannot load the teacher parrot: Unknown model.*; give a local file as"):
        pretrained_backbone("parrot", None, "the teacher", "teacher.path")
    harmful = tmp_path / "harmful.pth"
    torch.save({"model": Harm(tmp_path / "harm")}, harmful)
    assert pickle.loads(pickle.dumps(Harm(tmp_path / "other"))).name == str(tmp_path / "other")  # it would run
    with pytest.raises(UserError, match="cannot load the teacher"):
        pretrained_backbone(DINOV2, harmful, "the teacher", "teacher.path")
    assert not (tmp_path / "harm").exists()
