import io
import pickle
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch

from robustok.errors import UserError
from robustok.metrics.frechet import GaussianStatistics, covariance_factor, frechet_distance
from robustok.metrics.reference import (
    Reference,
    cached_reference,
    load_reference,
    reference_path,
    save_reference,
)


def normal(n, f, seed=0):
    return torch.randn(n, f, generator=torch.Generator().manual_seed(seed))


def reference(n=30, seed=0, name="toy-8", data="digits test, 30 images, 3f9a12bc", **parts):
    return Reference(GaussianStatistics.of(normal(n, 8, seed) + 3), name, data, **parts)


def full(**changes):
    return reference(features=normal(30, 8), spatial=GaussianStatistics.of(normal(30, 5)), **changes)


def adm(path, **changes):
    """A file with the keys of ADM's reference batches; None leaves one out."""
    arrays = {
        "mu": np.arange(4, dtype=np.float32),
        "sigma": np.eye(4),
        "mu_s": np.zeros(3, dtype=np.float32),
        "sigma_s": 2 * np.eye(3),
        "arr_0": np.zeros((5, 2, 2, 3), dtype=np.uint8),
    } | changes
    np.savez(path, **{key: array for key, array in arrays.items() if array is not None})
    return path


def test_a_reference_survives_a_file(tmp_path):
    saved = full()
    save_reference(saved, tmp_path / "folder" / "reference.anything")
    loaded = load_reference(tmp_path / "folder" / "reference.anything", "toy-8", saved.data, 30)
    assert (loaded.name, loaded.data, loaded.count, loaded.logits) == (saved.name, saved.data, 30, None)
    assert torch.equal(loaded.features, saved.features)
    for part in ("statistics", "spatial"):
        one, other = getattr(loaded, part), getattr(saved, part)
        assert one.count == other.count
        assert torch.allclose(one.mean, other.mean, rtol=1e-15)
        assert torch.allclose(one.covariance, other.covariance, rtol=1e-12)
    assert loaded.digest == saved.digest
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["reference.anything"]


def test_its_description_and_factors():
    found = full()
    assert found.describe() == f"{found.data}, 30 images, statistics {found.digest}"
    assert found.digest != reference(seed=1).digest
    assert torch.equal(found.factor, covariance_factor(found.statistics))
    assert found.factor is found.factor
    assert torch.equal(found.spatial_factor, covariance_factor(found.spatial))


def test_a_reference_batch_of_adm(tmp_path):
    """Its statistics are of the whole data set, whose size is not in the file; its images are others."""
    found = load_reference(adm(tmp_path / "adm.npz"), name="inception-2048")
    assert torch.equal(found.statistics.mean, torch.arange(4).double())
    assert torch.equal(found.statistics.covariance, torch.eye(4).double())
    assert torch.equal(found.spatial.covariance, 2 * torch.eye(3).double())
    assert (found.count, found.name, found.data, found.features) == (None, "inception-2048", "adm.npz", None)
    assert "adm.npz, an unknown number of images, statistics" in found.describe()
    counted = load_reference(tmp_path / "adm.npz", count=1_281_167)
    assert counted.count == 1_281_167
    assert torch.allclose(counted.statistics.covariance, torch.eye(4).double())
    fake = GaussianStatistics.of(normal(50, 4))
    assert frechet_distance(fake, found.statistics) == pytest.approx(frechet_distance(fake, counted.statistics))
    with pytest.raises(UserError, match="pass count"):
        found.statistics.as_tensor()


def test_without_spatial_statistics(tmp_path):
    """As mar's file of ImageNet has them."""
    assert load_reference(adm(tmp_path / "a.npz", mu_s=None, sigma_s=None, arr_0=None)).spatial is None


def test_adm_reads_ours(tmp_path):
    save_reference(full(), tmp_path / "ours.npz")
    with np.load(tmp_path / "ours.npz", allow_pickle=False) as file:
        assert set(file.files) == {"mu", "sigma", "mu_s", "sigma_s", "features", "name", "data", "count"}
        assert file["mu"].shape == (8,)
        assert file["sigma_s"].shape == (5, 5)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"name": "other-8"}, "holds features of the extractor toy-8, expected other-8"),
        ({"data": "digits train"}, "holds the images digits test, 30 images, 3f9a12bc, expected digits train"),
        ({"count": 31}, "holds a number of images, 30, expected 31"),
    ],
)
def test_a_wrong_or_stale_one_is_refused_by_name(tmp_path, given, said):
    save_reference(reference(), tmp_path / "mine.npz")
    with pytest.raises(UserError, match=f"mine.npz {said}"):
        load_reference(tmp_path / "mine.npz", **given)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"mu": None, "sigma": None, "mu_s": None, "sigma_s": None},
            "holds arr_0 and lacks mu, sigma; give it as",
        ),
        ({"sigma": None, "arr_0": None}, "holds mu, mu_s, sigma_s and lacks sigma"),
        ({"sigma_s": None}, "lacks sigma_s"),
        ({"mu": np.zeros(3)}, r"mu is \(3,\) and sigma \(4, 4\)"),
        ({"sigma": np.zeros(4)}, r"sigma \(4,\), expected"),
        ({"sigma_s": np.eye(4)}, r"mu_s is \(3,\) and sigma_s \(4, 4\)"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, "expected"),
        ({"mu": np.array([0, np.nan, 0, 0])}, "mu holds values that are not finite"),
        ({"sigma_s": np.diag([1, np.inf, 1])}, "sigma_s holds values that are not finite"),
        ({"sigma": np.arange(16.0).reshape(4, 4)}, "sigma is no covariance"),
        ({"sigma": -np.eye(4)}, "sigma is no covariance"),
        ({"mu": np.array([None] * 4)}, "mu holds pickled objects, which are never loaded"),
        ({"sigma": np.array([["1"] * 4] * 4)}, "sigma is <U1, expected numbers"),
        ({"mu": np.zeros(4, dtype=complex)}, "mu is complex128"),
        ({"name": np.array([None])}, "name holds pickled objects"),
        ({"name": np.array(3)}, "name is int64"),
        ({"count": np.array(1)}, "is of 1 images"),
        ({"count": np.array([3, 4])}, "count is int64"),
        ({"features": np.zeros((5, 3))}, r"features are \(5, 3\), expected \(M, 4\)"),
    ],
)
def test_what_is_no_statistics_is_refused(tmp_path, changes, said):
    with pytest.raises(UserError, match=said) as error:
        load_reference(adm(tmp_path / "bad.npz", **changes))
    assert "bad.npz" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [b"((((", b"-" * 4000 + b"1", b"{[]: 1}"])
def test_a_header_that_cannot_be_evaluated_is_refused(tmp_path, shape):
    text = b"{'descr': '<f8', 'fortran_order': False, 'shape': " + shape + b", }\n"
    adm(tmp_path / "bad.npz", mu=None)
    with zipfile.ZipFile(tmp_path / "bad.npz", "a") as archive:
        archive.writestr("mu.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)
    with pytest.raises(UserError, match=r"bad\.npz is cut off or damaged"):
        load_reference(tmp_path / "bad.npz")


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("the pickle ran",)


def test_a_pickle_is_never_opened(tmp_path):
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match=r"is no \.npz file"):
        load_reference(tmp_path / "pickle.npz")
    np.savez(tmp_path / "objects.npz", mu=np.array([Bomb()]), sigma=np.eye(1))
    with pytest.raises(UserError, match="never loaded"):
        load_reference(tmp_path / "objects.npz")


def test_files_that_are_not_there_or_not_whole(tmp_path):
    for name, content in (("text.npz", b"no"), ("empty.npz", b""), ("one.npz", b"PK")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            load_reference(tmp_path / name)
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(UserError, match=r"no \.npz file"):
        load_reference(tmp_path / "array.npy")
    with pytest.raises(UserError, match="not there"):
        load_reference(tmp_path / "missing.npz")
    with pytest.raises(UserError, match="a folder"):
        load_reference(tmp_path)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_cut_or_flipped_file_at_every_position(tmp_path, compressed):
    """Wherever it is damaged: refused in one line, or read as it was (a zip holds bytes that mean nothing)."""
    whole = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(whole, mu=np.arange(4.0), sigma=np.eye(4), count=9)
    content = whole.getvalue()
    said = []
    for at in range(0, len(content), 7):
        for broken in (content[:at], content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :]):
            (tmp_path / "broken.npz").write_bytes(broken)
            try:
                found = load_reference(tmp_path / "broken.npz")
            except UserError as error:
                said.append(str(error))
            else:
                assert torch.equal(found.statistics.mean, torch.arange(4).double())
                assert found.count in (9, None)  # the key itself may be what is damaged
    assert len(said) > len(content) / 7
    assert all("broken.npz" in line and "\n" not in line for line in said)


def test_nothing_is_left_behind_where_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        save_reference(reference(), tmp_path / "file" / "reference.npz")
    (tmp_path / "reference.npz").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        save_reference(reference(), tmp_path / "reference.npz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "reference.npz"]


def test_bare_statistics(tmp_path):
    a, b = GaussianStatistics.of(normal(30, 8) + 3), GaussianStatistics.of(normal(40, 8, seed=1))
    save_reference(Reference(a, "toy-8"), tmp_path / "reference")
    loaded = load_reference(tmp_path / "reference", name="toy-8").statistics
    assert loaded.count == 30
    assert frechet_distance(loaded, b) == pytest.approx(frechet_distance(a, b), rel=1e-12)
    with pytest.raises(UserError, match="toy-8, expected other-8"):
        load_reference(tmp_path / "reference", name="other-8")


class Maker:
    def __init__(self, *made):
        self.made, self.calls = list(made), 0

    def __call__(self):
        self.calls += 1
        return self.made.pop(0)


KEY = ("toy-8", "digits test, 30 images, 3f9a12bc", 30)


def test_the_cache_computes_once(tmp_path):
    make = Maker(reference(name=None, data=None))
    first, second = (cached_reference(tmp_path / "cache", *KEY, make) for _ in range(2))
    assert make.calls == 1
    assert (first.name, first.data) == (second.name, second.data) == KEY[:2]
    assert first.digest == second.digest
    assert reference_path(tmp_path / "cache", *KEY).exists()


def test_other_data_extractors_and_counts_are_computed_again(tmp_path):
    cached_reference(tmp_path, *KEY, Maker(reference()))
    for key in (("other-8", *KEY[1:]), (KEY[0], "digits test, 30 images, 00000000", 30), (*KEY[:2], 20)):
        make = Maker(reference(n=key[2], seed=1))
        cached_reference(tmp_path, *key, make)
        assert make.calls == 1
    assert len(list(tmp_path.iterdir())) == 4


def test_a_part_that_is_missing_is_computed_and_the_others_stay(tmp_path):
    spatial = GaussianStatistics.of(normal(30, 5))
    make = Maker(reference(), reference(spatial=spatial), reference(features=normal(30, 8)))
    cached_reference(tmp_path, *KEY, make)
    assert cached_reference(tmp_path, *KEY, make, needs=["spatial"]).spatial is not None
    both = cached_reference(tmp_path, *KEY, make, needs=["spatial", "features"])
    assert torch.allclose(both.spatial.covariance, spatial.covariance)
    assert both.features is not None
    assert cached_reference(tmp_path, *KEY, make, needs=["spatial"]).spatial is not None
    assert make.calls == 3


def test_a_foreign_or_damaged_file_in_the_cache_is_refused_by_name(tmp_path):
    path = reference_path(tmp_path, *KEY)
    never = Maker()
    for foreign in (replace(reference(), name="other-8"), replace(reference(), data="stale"), reference(n=29)):
        save_reference(foreign, path)
        with pytest.raises(UserError, match=f"{path.name}.*expected.*delete it"):
            cached_reference(tmp_path, *KEY, never)
    save_reference(reference(), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=path.name):
        cached_reference(tmp_path, *KEY, never)
    assert never.calls == 0


def test_what_was_made_has_to_be_what_was_asked_for(tmp_path):
    with pytest.raises(UserError, match="of 29 images, expected 30"):
        cached_reference(tmp_path, *KEY, Maker(reference(n=29)))
    cached_reference(tmp_path, *KEY, Maker(reference()), write=False)
    assert list(tmp_path.iterdir()) == []
