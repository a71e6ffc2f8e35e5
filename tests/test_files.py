"""Files that are written whole or not at all, and errors on one line."""

import errno
import os
import socket
import subprocess
import sys

import pytest

from robustok.errors import FileError, UserError, printable
from robustok.files import append_line, atomic_file, bytes_digest, one_line, regular_file, write_file


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


def test_only_regular_files_are_read(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to("file")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert regular_file("~/file").read_text() == regular_file(tmp_path / "link").read_text() == "text"
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "to fifo").symlink_to("fifo")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        lines = {
            "fifo": "it is a FIFO",
            "to fifo": "it is a FIFO",
            "folder": "it is a folder",
            "socket": "it is a socket",
            "circle": "Too many levels of symbolic links",
            "none": "No such file or directory",
            "file/x": "Not a directory",
            "x" * 300: "File name too long",
            "a\0b": "embedded null byte",
        }
        for name, line in lines.items():
            with pytest.raises(FileError, match=f"cannot read .*: {line}; give the path of a file"):
                regular_file(tmp_path / name)
    with pytest.raises(FileError, match="cannot read ~nosuchuser/x: Could not determine home"):
        regular_file("~nosuchuser/x")
    with pytest.raises(OSError, match="No such file"):  # for those who skip what cannot be read
        regular_file(tmp_path / "none")


def test_a_file_without_permission_is_not_called_missing(tmp_path):
    (tmp_path / "weights").write_text("text")
    (tmp_path / "weights").chmod(0)
    tmp_path.chmod(0o755)
    assert "weights: Permission denied; ask its owner" in as_nobody(
        f"from robustok.files import regular_file; regular_file({str(tmp_path / 'weights')!r})", tmp_path
    )


def as_nobody(code, folder):
    """What Python writes to stderr as a user without rights in the folder, whose parents it may pass."""
    for parent in folder.parents[:-2]:
        parent.chmod(parent.stat().st_mode | 0o011)
    drop = f"import os, robustok.files; os.getuid() or os.setuid(65534); {code}"
    return subprocess.run([sys.executable, "-c", drop], capture_output=True, text=True, check=False).stderr


def test_foreign_text_cannot_steer_a_terminal():
    assert printable("a\x1b[2J\x07\x9b\u202eb\udcff\tµ\n") == "a\\x1b[2J\\x07\\x9b\\u202eb\\udcff\tµ\n"
    assert str(UserError("file \x1b]0;title\x07")) == "file \\x1b]0;title\\x07"
