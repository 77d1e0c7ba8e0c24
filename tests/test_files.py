"""Files appear whole or not at all, and their errors name what could not be read or written."""

import errno
import json
import os
import tempfile
from pathlib import Path

import pytest

from llava_cot_jax.errors import UserError
from llava_cot_jax.files import (
    atomic_file,
    atomic_path,
    cache_folder,
    check_file_writable,
    copy_file,
    keeping_in_cache,
    read_json,
    usable_cache,
    write_json,
    write_text,
)
from llava_cot_jax.paths import writing_errors


@pytest.mark.parametrize("shared", [False, True])
def test_a_file_appears_at_the_end_or_not_at_all(tmp_path: Path, shared: bool) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_file(path, shared=shared) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with atomic_file(path, shared=shared) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_writers_of_a_shared_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_path(path, shared=True) as first, atomic_path(path, shared=True) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


def test_a_file_that_a_killed_run_left_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file.partial").write_text("left over")
    with atomic_path(tmp_path / "file") as partial:
        partial.write_text("new")
    assert (tmp_path / "file").read_text() == "new" and len(list(tmp_path.iterdir())) == 1


def test_text_json_and_copies(tmp_path: Path) -> None:
    write_text(tmp_path / "a/b/text", "n\N{LATIN SMALL LETTER E WITH ACUTE}w")
    assert (tmp_path / "a/b/text").read_bytes() == b"n\xc3\xa9w"
    content = {"a": [1, 2.5, None], "b": "\N{LATIN SMALL LETTER E WITH ACUTE}"}
    write_json(tmp_path / "json", content)
    write_json(tmp_path / "line", content, indent=None)
    assert read_json(tmp_path / "json") == read_json(tmp_path / "line") == content
    assert (tmp_path / "json").read_text().endswith("}\n") and (tmp_path / "line").read_text().count("\n") == 1
    copy_file(tmp_path / "json", tmp_path / "copy")
    assert json.loads((tmp_path / "copy").read_bytes()) == content


@pytest.mark.parametrize(
    ("content", "message"), [(None, "does not exist"), ("{", "is not JSON"), ("[1]", "holds no JSON object")]
)
def test_json_that_cannot_be_read(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "file").write_text(content)
    with pytest.raises(UserError, match=f"^{tmp_path}/file {message}"):
        read_json(tmp_path / "file")


def test_errors_of_writing_name_the_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    inner, message = tmp_path / "file/x/y", rf"cannot be written: Not a directory \({tmp_path}/file/x"
    with pytest.raises(UserError, match=f"^{inner} {message}"), writing_errors(inner):
        write_text(inner, "text")
    with pytest.raises(UserError, match=f"^no space left on the disk of {tmp_path}: free"), writing_errors(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "inner"))
    with pytest.raises(KeyError), writing_errors(tmp_path):
        raise KeyError
    with pytest.raises(UserError, match=r"^mine$"), writing_errors(tmp_path):
        raise UserError("mine")


def test_whether_a_file_can_be_written(tmp_path: Path) -> None:
    check_file_writable(tmp_path / "new/file")
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(UserError, match=f"^{tmp_path}/new cannot be written: it is a folder; name a file$"):
        check_file_writable(tmp_path / "new")


def test_json_has_no_number_that_is_not_finite(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "file.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user has a number without a name."""

    def unknown(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)


@pytest.mark.usefixtures("homeless")
def test_without_a_home_there_is_no_cache(warnings_of: pytest.LogCaptureFixture, monkeypatch, tmp_path) -> None:
    assert cache_folder("index") is None and usable_cache(None, "things") is None
    assert [record.levelname for record in warnings_of.records] == ["WARNING"]
    assert warnings_of.messages[0].startswith("~/.cache: there is no such user's home folder; the work goes on, ")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("index") == tmp_path / "llava_cot_jax/index" and len(warnings_of.messages) == 1


def test_a_cache_that_cannot_be_written_is_a_warning(warnings_of, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with keeping_in_cache(tmp_path / "file/below", "counts"):
        (tmp_path / "file/below").mkdir(parents=True)
    assert usable_cache(tmp_path / "file/below", "programs") is None
    assert usable_cache(tmp_path / "new/below", "programs") == tmp_path / "new/below"
    with keeping_in_cache(tmp_path / "new", "plans"):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    with pytest.raises(ValueError, match="mine"), keeping_in_cache(tmp_path / "new", "plans"):
        raise ValueError("mine")
    assert len(warnings_of.messages) == 3
    assert warnings_of.messages[0].startswith(
        f"counts cannot be kept in {tmp_path}/file/below: Not a directory; the work "
    )
    assert f"plans cannot be kept in {tmp_path}/new: Read-only file system" in warnings_of.messages[2]


def test_a_device_or_a_link_is_not_replaced(tmp_path):
    """Neither a shell's pipe nor a named one becomes a file, and a link leads where it led."""
    os.mkfifo(tmp_path / "named")
    reader, writer = os.pipe()
    ends = {
        Path(f"/dev/fd/{writer}"): reader,
        tmp_path / "named": os.open(tmp_path / "named", os.O_RDONLY | os.O_NONBLOCK),
    }
    for path, end in ends.items():
        check_file_writable(path)
        write_text(path, "text")
        assert not path.is_file() and os.read(end, 9) == b"text"
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:  # a disk in memory, whose files are files
        plain = Path(memory, "file")
        plain.write_text("before")
        inode = plain.stat().st_ino
        write_text(plain, "after")
        assert plain.read_text() == "after" and plain.stat().st_ino != inode
    (tmp_path / "link").symlink_to("file")
    for text in ("one", "two"):
        write_text(tmp_path / "link", text)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "two"
