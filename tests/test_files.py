"""Files that are written whole or not at all, and errors on one line."""

import errno
import fcntl
import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from robustok.errors import FileError, UserError, printable
from robustok.files import (
    append_line,
    atomic_file,
    atomic_folder,
    bytes_digest,
    check_appendable,
    clean,
    inside,
    is_temporary,
    json_lines,
    load_tensors,
    locked,
    one_line,
    regular_file,
    write_file,
)
from tiny_user import as_nobody


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
    with pytest.raises(UserError, match="it is a folder, no file"):
        append_line(tmp_path, {})


def test_writers_of_a_shared_file_do_not_disturb_each_other(tmp_path):
    with atomic_file(tmp_path / "a", shared=True) as one, atomic_file(tmp_path / "a", shared=True) as other:
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "a").read_text() == "one"  # the last to finish


def test_nothing_but_a_file_is_replaced_by_a_file_and_a_folder_by_a_folder(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    for name, what in (("fifo", "FIFO"), ("link", "FIFO"), ("folder", "folder")):
        said = f"cannot write .*{name}: it is a {what}, no file; choose another out=PATH"
        with pytest.raises(UserError, match=said):
            write_file(tmp_path / name, "text")
        with pytest.raises(UserError, match=said):
            append_line(tmp_path / name, {})
    for name, what in (("fifo", "FIFO"), ("link", "FIFO"), ("file", "file")):
        said = f"cannot write .*{name}: it is a {what}, no folder; choose another out=PATH"
        with pytest.raises(UserError, match=said), atomic_folder(tmp_path / name):
            pytest.fail("not reached")
    assert (tmp_path / "fifo").is_fifo()
    assert (tmp_path / "file").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["fifo", "file", "folder", "link"]


def test_what_is_written_once_stays_and_may_be_written_again(tmp_path):
    """A command that was killed after its last write is repeated; another command gets no say."""

    def file(content):
        with atomic_file(tmp_path / "file", once=True) as temporary:
            temporary.write_text(content)

    def folder(**contents):
        with atomic_folder(tmp_path / "folder", once=True) as temporary:
            (temporary / "inner").mkdir()
            for name, content in contents.items():
                (temporary / "inner" / name).write_text(content)

    file("a")
    folder(a="1", b="2")
    before = {path: path.stat().st_ino for path in tmp_path.rglob("*")}
    file("a")
    folder(a="1", b="2")
    for write in (
        lambda: file("b"),
        lambda: folder(a="1"),
        lambda: folder(a="1", b="3"),
        lambda: folder(a="1", b="2", c="3"),
    ):
        with pytest.raises(UserError, match="exists and holds something else; choose another out=PATH or remove it"):
            write()
    assert {path: path.stat().st_ino for path in tmp_path.rglob("*")} == before


def test_links_are_replaced_and_not_followed(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "my folder").mkdir()
    (tmp_path / "my folder" / "x").write_text("mine")
    for name in ("a", ".a.tmp", ".b.tmp"):
        (tmp_path / name).symlink_to("mine")
    for name in (".folder.tmp", ".folder.old", ".b.old"):
        (tmp_path / name).symlink_to("my folder")
    write_file(tmp_path / "a", "new")
    write_file(tmp_path / "b", "new")
    for _ in range(2):
        with atomic_folder(tmp_path / "folder") as folder:
            (folder / "x").write_text("new")
    assert [(tmp_path / name).read_text() for name in ("a", "b", "folder/x")] == ["new"] * 3
    assert (tmp_path / "mine").read_text() == (tmp_path / "my folder" / "x").read_text() == "mine"
    assert not (tmp_path / "a").is_symlink()


def test_links_out_of_a_folder_are_refused(tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    (out / "deep").mkdir(parents=True)
    other.mkdir()
    (tmp_path / "link").symlink_to(out)
    (out / "deep" / "file").write_text("text")
    (out / "within").symlink_to(out / "deep")
    (out / "deep" / "circle").symlink_to("circle")
    (out / ".file.tmp").symlink_to(other)  # removed before something is written
    assert inside(out) == out
    assert inside(tmp_path / "link", "within", "new.txt") == tmp_path / "link" / "within" / "new.txt"
    for target in (other, other / "missing"):
        (out / "deep" / "leads out").symlink_to(target)
        for names in ((), ("deep",), ("within",), ("deep", "leads out"), ("deep", "leads out", "new.txt")):
            with pytest.raises(UserError, match=r"leads out.* is a link to a place outside of .*out.*; remove it"):
                inside(out, *names)
        assert inside(out, "deep", "file") == out / "deep" / "file"
        (out / "deep" / "leads out").unlink()
    with pytest.raises(UserError, match="is a link to a place outside"):
        inside(out, "..", "other")


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_have_the_mode_of_the_umask(tmp_path, umask):
    old = os.umask(umask)
    try:
        write_file(tmp_path / "a", "text")
        append_line(tmp_path / "lines", {})
        with atomic_file(tmp_path / "b.safetensors") as temporary:
            save_file({"x": torch.zeros(1)}, temporary)  # makes it for its owner alone
        with atomic_folder(tmp_path / "folder") as folder:
            save_file({"x": torch.zeros(1)}, folder / "c.safetensors")
    finally:
        os.umask(old)
    for name in ("a", "lines", "b.safetensors", "folder/c.safetensors"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~umask, name
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_line_after_half_a_line_begins_a_new_one(tmp_path, recwarn):
    file = tmp_path / "metrics.jsonl"
    append_line(file, {"a": 1})
    append_line(file, {"a": 2})
    assert not recwarn
    with file.open("a") as handle:
        handle.write('{"a": 3, "b')
    with pytest.warns(UserWarning, match=r"metrics\.jsonl ended in half a line.*what follows begins a new one"):
        append_line(file, {"a": 4})
    append_line(file, {"a": 5})
    assert file.read_text() == '{"a": 1}\n{"a": 2}\n{"a": 3, "b\n{"a": 4}\n{"a": 5}\n'
    assert json_lines(file.read_text()) == ([{"a": 1}, {"a": 2}, {"a": 4}, {"a": 5}], [3])


def test_what_cannot_be_appended_to_is_refused_beforehand(tmp_path):
    check_appendable(tmp_path / "deep" / "new")
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").write_text("")
    check_appendable(tmp_path / "file")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UserError, match="fifo: it is a FIFO, no file"):
        check_appendable(tmp_path / "fifo")
    with pytest.raises(UserError, match="file: it is a file, no folder"):
        check_appendable(tmp_path / "file" / "deep" / "new")
    for name in ("file", "new"):
        code = f"check_appendable(Path({str(tmp_path / name)!r}))"
        said = as_nobody("from pathlib import Path; from robustok.files import check_appendable", code, tmp_path)
        assert f"{name}: Permission denied; ask its owner to let you write there or choose another out=PATH" in said


def test_lines_that_are_no_objects_are_numbered():
    text = '{"a": 1}\n\n[1]\n{}\n"x"\n' + "[" * 100_000 + '\n{"b": NaN}'
    records, broken = json_lines(text)
    assert (records[0], list(records[1]), broken) == ({"a": 1}, ["b"], [3, 5, 6])


def test_what_a_killed_process_left_is_removed_or_named_again(tmp_path):
    for name in (".best.old", ".new.tmp", ".both.old", "both"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
    for name in (".a.tmp", ".a.0123abcd.tmp", ".lock", ".hidden", "b.tmp", "b.old"):
        (tmp_path / name).write_text("")
    ours = {path.name for path in tmp_path.iterdir() if is_temporary(path)}
    assert ours == {".best.old", ".new.tmp", ".both.old", ".a.tmp", ".a.0123abcd.tmp", ".lock"}
    clean(tmp_path)
    clean(tmp_path / "missing")
    assert sorted(os.listdir(tmp_path)) == [".hidden", ".lock", "b.old", "b.tmp", "best", "both"]
    assert [(tmp_path / name / "x").read_text() for name in ("best", "both")] == [".best.old", "both"]


def test_a_link_is_never_named_again(tmp_path):
    for name in ("elsewhere", "run"):
        (tmp_path / name).mkdir()
    for name in (".snapshot.old", ".best.tmp"):
        (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere")
    clean(tmp_path / "run")
    assert os.listdir(tmp_path / "run") == []
    assert (tmp_path / "elsewhere").is_dir()


def test_one_process_writes_to_a_folder(tmp_path):
    code = "import sys, time; from robustok.files import locked"
    code += "\nwith locked(sys.argv[1]): print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match=r"another process is writing to .*; wait until it ends"), locked(tmp_path):
            pytest.fail("not reached")
        other.kill()
    with locked(tmp_path), locked(tmp_path):  # the lock has ended with the process; this process may have it twice
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks_is_no_error(tmp_path, monkeypatch, error):
    def refuse(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with locked(tmp_path):
        write_file(tmp_path / "a", "text")
    with locked(tmp_path / "missing"):
        pass


def test_tensors_are_read_at_paths_of_any_bytes(tmp_path):
    for name in ("plain", os.fsdecode(b"\xff")):
        folder = tmp_path / name
        folder.mkdir()
        with atomic_file(folder / "x.safetensors") as temporary:
            save_file({"x": torch.arange(3)}, temporary)
        assert load_tensors(folder / "x.safetensors")["x"].tolist() == [0, 1, 2]


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
            with pytest.raises(FileError, match=f"cannot read .*: {line}; give the path of a file that you may"):
                regular_file(tmp_path / name)
    with pytest.raises(FileError, match="cannot read ~nosuchuser/x: Could not determine home"):
        regular_file("~nosuchuser/x")
    with pytest.raises(OSError, match="No such file"):  # for those who skip what cannot be read
        regular_file(tmp_path / "none")


def test_a_file_without_permission_is_not_called_missing(tmp_path):
    (tmp_path / "weights").write_text("text")
    (tmp_path / "weights").chmod(0)
    tmp_path.chmod(0o755)
    assert "weights: Permission denied; give the path of a file that you may read" in as_nobody(
        "from robustok.files import regular_file", f"regular_file({str(tmp_path / 'weights')!r})", tmp_path
    )


def test_foreign_text_cannot_steer_a_terminal():
    assert printable("a\x1b[2J\x07\x9b\u202eb\udcff\tµ\n") == "a\\x1b[2J\\x07\\x9b\\u202eb\\udcff\tµ\n"
    assert str(UserError("file \x1b]0;title\x07")) == "file \\x1b]0;title\\x07"


def test_a_pointer_of_git_lfs_is_called_that(tmp_path):
    """As in a repository that was cloned without git-lfs."""
    (tmp_path / "a.png").write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 3\n")
    with pytest.raises(FileError, match=r"it is a git-lfs pointer without the content, which `git lfs pull`"):
        regular_file(tmp_path / "a.png")
    (tmp_path / "b.txt").write_text("version of something else")
    assert regular_file(tmp_path / "b.txt") == tmp_path / "b.txt"
