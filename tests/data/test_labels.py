"""Numbers and names of classes."""

import numpy as np
import pytest

from robustok.data.labels import LabelList, check_same_classes, number_labels, sort_classes, sort_names
from robustok.errors import UserError


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["10", "9", "0"], ["0", "9", "10"]),
        (["01", "1", "2"], ["01", "1", "2"]),
        (["10", "9", "a"], ["10", "9", "a"]),
        (["²", "10", "9"], ["10", "9", "²"]),
        (["9" * 200, "8" * 255], ["9" * 200, "8" * 255]),
        ([], []),
    ],
)
def test_names_that_are_all_numbers_count_as_numbers(names, expected):
    assert sort_classes(names) == expected


@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [
        ([0, 2], None, ([0, 2], ["0", "1", "2"])),
        (["0", "2"], None, ([0, 2], ["0", "1", "2"])),
        (["10", "5"], ["5", "10"], ([1, 0], ["5", "10"])),  # names first
        (["1", "0"], ["cat", "dog"], ([1, 0], ["cat", "dog"])),
        (["dog", "cat"], None, ([1, 0], ["cat", "dog"])),
        ([-1, -1], None, ([-1, -1], ["all"])),
        ([True, False], None, ([1, 0], ["0", "1"])),
        (np.arange(2, dtype=np.uint8), None, ([0, 1], ["0", "1"])),
    ],
)
def test_labels_become_numbers(labels, classes, expected):
    numbers, names = number_labels(labels, "x", classes)
    assert (numbers.tolist(), names) == expected
    assert numbers.dtype == np.int64


def test_too_many_names_are_refused():
    with pytest.raises(UserError, match="x has 100,001 different labels, expected at most 100,000"):
        number_labels([f"id{i}" for i in range(100_001)], "x")


def test_names_of_files_in_the_order_of_their_numbers():
    assert sort_names(["b10", "b9", "a", "10", "9"]) == ["9", "10", "a", "b9", "b10"]


def test_a_name_with_two_numbers_is_refused():
    for found, expected in (
        (None, ["a"]), (["a"], None), (["a", "b"], ["a", "b"]), (["a"], ["a", "b"]), (["tench"], ["n01"]),
        (["crane", "x", "crane"], ["crane", "x", "crane"]),
    ):  # fmt: skip
        check_same_classes(found, expected, "A", "B")
    with pytest.raises(UserError, match="class 10 has number 2 in A and 10 in B; give both the same classes"):
        check_same_classes(["0", "1", "10", "2"], [str(i) for i in range(11)], "A", "B")


def test_the_numbers_of_the_devkit_are_read_with_its_table(tmp_path):
    """As in ILSVRC2012_devkit_t12/data, whose numbers have another order than the names."""
    from scipy.io import savemat

    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")]
    rows = np.array([(1, "n02119789", "kit fox"), (2, "n01440764", "tench"), (3, "n02100735", "setter")], dtype=kinds)
    file = tmp_path / "ILSVRC2012_validation_ground_truth.txt"
    file.write_text("2\n1\n3\n")
    assert LabelList(file).labels == ["2", "1", "3"]
    savemat(tmp_path / "meta.mat", {"synsets": rows[:, None]})
    assert LabelList(file).labels == ["n01440764", "n02119789", "n02100735"]
    file.write_text("2\n4\n")
    with pytest.raises(UserError, match=r"has the label '4', which .*meta\.mat lacks"):
        LabelList(file)
    (tmp_path / "meta.mat").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"cannot read .*meta\.mat"):
        LabelList(file)
