"""The reference outputs as a test: ``pytest --golden=FOLDER``. See ``check.py``."""

import pytest
from check import main


def test_the_outputs_equal_their_references(pytestconfig: pytest.Config, capsys: pytest.CaptureFixture):
    with capsys.disabled():
        print()
        assert main(pytestconfig.getoption("golden")), "see the rows marked FAIL"
