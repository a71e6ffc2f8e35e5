import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from robustok.data.dataset import open_images
from robustok.data.sources import data_at
from robustok.errors import UserError
from robustok.evaluation.pairing import partners
from tiny_images import encoded


def grey(level):
    return np.full((4, 4, 3), level, np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Writes images whose level is given by their name: a folder of PNG files, or an array."""

    def write(name, levels):
        if isinstance(levels, list):
            np.savez(tmp_path / f"{name}.npz", arr_0=np.stack([grey(level) for level in levels]))
            return open_images(data_at(tmp_path / f"{name}.npz"), None)
        for file, level in levels.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(grey(level)).save(path)
        return open_images(data_at(tmp_path / name), None)

    return write


def levels(images, indices):
    read = images.read(indices)
    assert read.indices.tolist() == list(indices)
    return ((read.images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def check(images, originals):
    """All partners have the same level."""
    found = partners(images, originals).tolist()
    assert sorted(found) == list(range(len(images)))
    assert levels(images, range(len(images))) == levels(originals, found)


NUMBERS = {"0.png": 0, "1.png": 10, "10.png": 100, "2.png": 20}


@pytest.mark.parametrize(
    "others",
    [
        {"000.bmp": 0, "001.bmp": 10, "002.bmp": 20, "010.bmp": 100},  # the same numbers
        {"a/0.png": 0, "b/1.png": 10, "a/2.png": 20, "b/10.png": 100},  # the same names in class folders
        [0, 10, 20, 100],  # an array in the order of the numbers
    ],
)
def test_partners_have_the_same_name_or_number(folder, others, recwarn):
    check(folder("ours", NUMBERS), folder("theirs", others))
    check(folder("theirs", others), folder("ours", NUMBERS))
    assert not [w for w in recwarn if "names differ" in str(w.message)]


def test_equal_names_in_class_folders_are_paired_by_class(folder):
    both = {"a/0.png": 3, "b/0.png": 4, "b/1.png": 5}
    check(folder("ours", both), folder("theirs", both))


def test_parquet_has_the_names_beside_the_bytes(folder, tmp_path):
    ours = {f"img_{i}.png": 20 * i for i in range(6)}
    order = [3, 1, 2, 0, 5, 4]
    stored = [{"bytes": encoded(Image.fromarray(grey(20 * i))), "path": f"img_{i}.png"} for i in order]
    pq.write_table(pa.table({"image": stored}), tmp_path / "a.parquet")
    check(open_images(data_at(tmp_path / "a.parquet"), None), folder("ours", ours))


def test_other_names_are_paired_in_order_and_named(folder):
    ours, theirs = folder("ours", {"x2.png": 2, "x10.png": 10}), folder("theirs", {"y02.png": 2, "y10.png": 10})
    with pytest.warns(UserWarning, match="names differ, so images are paired in order: x2 with y02, ..., x10 with y10"):
        check(ours, theirs)


def test_images_without_a_partner_are_named(folder):
    """Each side lacks another image: in order, all between the two would be paired with their neighbours."""
    ours, theirs = ({f"{i:05d}.png": i for i in range(10) if i != lacking} for lacking in (3, 7))
    with pytest.raises(UserError, match=r"8 of 9 names are on both sides, 00007 has no partner \(00003 has none"):
        partners(folder("ours", ours), folder("theirs", theirs))


def test_as_many_on_both_sides(folder):
    with pytest.raises(UserError, match="expected as many images on both sides"):
        partners(folder("ours", [0, 1]), folder("theirs", [0]))
