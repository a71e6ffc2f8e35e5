"""Settings from shapes and configurations."""

import pytest

from robustok.errors import UserError
from robustok.pretrained.shapes import merge_settings


def test_measured_settings_win_and_contradictions_are_refused():
    names = {"num_heads": "heads", "dim": "width"}
    config = {"dim": 4, "num_heads": 2, "seed": 1}
    assert merge_settings({"width": 4}, config, names, heads=1) == {"width": 4, "heads": 2}
    with pytest.raises(UserError, match="dim = 5, the weights have 4"):
        merge_settings({"width": 4}, {"dim": 5}, names)
    with pytest.raises(UserError, match="did you mean 'num_heads'"):
        merge_settings({"width": 4}, {"num_head": 5}, names)
