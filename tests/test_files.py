"""Files that are written whole or not at all, and errors on one line."""

import errno
import os

import pytest

from robustok.errors import UserError
from robustok.files import append_line, atomic_file, bytes_digest, one_line, write_file


def test_a_file_is_replaced_as_a_whole(tmp_path):
    file = tmp_path / "deep" / "a.txt"
    write_file(file, "old")
    with atomic_file(str(file)) as temporary:
        temporary.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new"
    assert os.listdir(file.parent) == ["a.txt"]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()], ids=["error", "interruption"])
def test_an_exception_leaves_the_old_file(tmp_path, shared, error):
    write_file(tmp_path / "a", b"old")

    def interrupted():
        with atomic_file(tmp_path / "a", shared) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(type(error)):
        interrupted()
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_content_reaches_the_disk_before_the_file_has_its_name(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "fsync", lambda _: calls.append((tmp_path / "a").exists()))
    write_file(tmp_path / "a", "content")
    assert calls == [False]


def test_a_full_disk_leaves_the_old_file_and_is_one_line(tmp_path, monkeypatch):
    write_file(tmp_path / "a", "old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, full)
            with pytest.raises(UserError, match=r"cannot write .*a: No space left on device; free some space"):
                write_file(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]
    with pytest.raises(UserError, match="Is a directory"):
        append_line(tmp_path, {})


def test_writers_of_a_shared_file_do_not_disturb_each_other(tmp_path):
    with atomic_file(tmp_path / "a", shared=True) as one, atomic_file(tmp_path / "a", shared=True) as other:
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "a").read_text() == "one"  # the last to finish


def test_errors_on_one_line():
    assert one_line(ValueError("two\n  lines")) == "two lines"
    assert one_line(ValueError("two\n  lines"), 5) == "two l"
    assert one_line(MemoryError()) == "MemoryError"
    assert bytes_digest(b"content") == "ed7002b439e9"
