"""The shuffle within a window, of images that are downloaded in blocks."""

import numpy as np

from robustok.data.order import Blocks, batch_indices, shuffle_in_window
from robustok.files import bytes_digest


def test_the_order_is_a_permutation_in_which_few_blocks_are_in_use():
    blocks = Blocks(np.repeat(np.arange(50), 20).astype(np.int32))
    for epoch in range(3):
        found = shuffle_in_window(blocks, 7, epoch, 200)
        assert sorted(found) == list(range(1000))
        where = np.empty(1000, int)
        where[found] = range(1000)
        assert np.ptp(where.reshape(50, 20), axis=1).max() <= 200 + 20 + 20  # of a block, in the order
        live = [len(np.unique(blocks.of[found[start : start + 50]])) for start in range(0, 1000, 50)]
        assert min(live[1:-1]) >= 9  # a batch of 50 has images of ten blocks or so: the window has ten
        assert max(live) <= 15
    # The same on every machine and for ever: runs resume with it.
    assert bytes_digest(shuffle_in_window(blocks, 7, 0, 200).astype("<i8").tobytes()) == "929593a749c0"
    assert (shuffle_in_window(blocks, 7, 0, 200) != shuffle_in_window(blocks, 7, 1, 200)).mean() > 0.9
    whole = shuffle_in_window(blocks, 7, 0, 0).reshape(50, 20)
    assert (np.diff(whole) == 1).all()
    assert (np.diff(whole[:, 0]) != 20).any()


def test_a_window_larger_than_the_set_mixes_all_of_it():
    blocks = Blocks(np.repeat(np.arange(10), 100).astype(np.int32))
    first = np.stack([batch_indices(1000, 100, seed, 0, blocks) for seed in range(50)])
    counts = np.stack([np.bincount(blocks.of[one], minlength=10) for one in first])
    assert np.abs(counts.mean(0) - 10).max() < 2  # of each block a tenth of the first batch
    assert counts.std(0).max() < 6
