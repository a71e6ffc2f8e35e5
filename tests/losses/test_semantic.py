import pytest
import timm
import torch

from robustok.config import validate
from robustok.errors import UserError
from robustok.losses.semantic import Teacher, TeacherConfig
from robustok.metrics.features.classifier import load_classifier


def some_images(size=16):
    return torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_a_classifier_teaches(classifier):
    teacher = Teacher(TeacherConfig(name="classifier", path=classifier), 16, 4)
    images = some_images().requires_grad_()
    features = teacher(images)
    assert teacher.width == 16
    assert torch.equal(features, load_classifier(classifier).features(images))
    assert not features.requires_grad
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.training


def test_a_timm_model_teaches_from_a_local_file(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=0).eval()
    torch.save(model.state_dict(), tmp_path / "teacher.pth")
    teacher = Teacher(TeacherConfig(name="timm", model="resnet10t", path=tmp_path / "teacher.pth"), 32, 8)
    images = some_images(32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        expected = model(((images + 1) / 2 - mean) / std)
    torch.testing.assert_close(teacher(images), expected)
    assert teacher.width == expected.shape[1]
    assert not teacher.training


def test_a_teacher_that_cannot_be_had(tmp_path):
    with pytest.raises(UserError, match=r"needs teacher\.path"):
        Teacher(TeacherConfig(name="classifier"), 16, 4)
    with pytest.raises(UserError, match="holds no snapshot"):
        Teacher(TeacherConfig(name="classifier", path=tmp_path), 16, 4)
    with pytest.raises(UserError, match=r"cannot load the teacher resnet10t: .*give a local file as teacher\.path"):
        Teacher(TeacherConfig(name="timm", model="resnet10t", path=tmp_path / "missing.pth"), 32, 8)
    with pytest.raises(UserError, match="name"):
        validate(TeacherConfig, {"name": "parrot"})
