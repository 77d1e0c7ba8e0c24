"""Recognition of files by their first bytes, to say in one line what a file is and what makes it usable."""

import re
import shlex
from codecs import getincrementaldecoder
from dataclasses import dataclass
from pathlib import Path

HEAD_BYTES = 4096
"""Number of bytes at the beginning of a file that tell its form."""

_TO_LINES = "to_json('train.jsonl', orient='records', lines=True)"


@dataclass(frozen=True)
class Form:
    """Form of a file.

    Attributes:
        what: Name of the form, with its article.
        for_rows: Command or advice that makes annotations of it usable, where ``PATH`` stands for the file.
        for_images: The same for images.
        has_files: Whether files of this form have other files in them, which may be images.
    """

    what: str
    for_rows: str
    for_images: str = "name a folder of images, or a zip of them"
    has_files: bool = False

    def remedy_for_rows(self, path: Path) -> str:
        """Return what makes annotations in this form usable."""
        return self.for_rows.replace("PATH", shlex.quote(str(path)))

    @property
    def stands_in(self) -> bool:
        """Whether the file stands where another should be, so that the remedy does not depend on what that is."""
        return self.for_rows == self.for_images

    def remedy_for_images(self, path: Path) -> str:
        """Return what makes images in this form usable."""
        return self.for_images.replace("PATH", shlex.quote(str(path)))


def _compressed(by: str, command: str) -> Form:
    return Form(
        f"a file compressed by {by}",
        f"decompress it by `{command} PATH`, and name the result",
        "if it is an archive, unpack it by `mkdir images; tar -xf PATH -C images`, and name that folder",
        has_files=True,
    )


def _archive(what: str, command: str) -> Form:
    unpack = f"unpack it by `{command}`, and name"
    return Form(what, f"{unpack} the file of the rows", f"{unpack} the folder of the images", has_files=True)


def _table(what: str, reader: str) -> Form:
    convert = f"convert it by `python -c \"import pandas; pandas.{reader}('PATH').{_TO_LINES}\"`"
    return Form(what, convert, "write its images to files, and name their folder", has_files=True)


def _stand_in(what: str, remedy: str) -> Form:
    return Form(what, remedy, remedy)


def _fetched(what: str, command: str) -> Form:
    return _stand_in(what, f"fetch the file itself by `{command}`")


ZIP = _archive("a zip archive", "unzip PATH")

ZIP_VOLUME = _archive("the first volume of a zip in several", "unzip WHOLE.zip")

IMAGE = Form("an image", "name it by --images, and the file of the rows by --annotations", "name the folder it is in")

POINTER = _fetched("a pointer of Git LFS, not the file itself", "git lfs pull")

WEB_PAGE = _stand_in(
    "a web page, perhaps for logging in", "download the file itself, with a token if access is restricted"
)

_ANSWER = _stand_in(
    "a server's answer that it has no such file, or may not give it", "download the file itself, perhaps with a token"
)

_ENDS_IN_ZEROS = _stand_in("text that ends in zero bytes, whose download was not finished", "fetch it again")

BINARY = Form("binary data of an unknown form", "name a file of JSON Lines")

TEXT = Form("a text file", "", "name a folder of images, or a zip of them; rows are named by --annotations")

_UTF16 = Form("text in UTF-16 or UTF-32", "convert it by `iconv -f UTF-16 -t UTF-8 PATH > train.jsonl`")

_ARROW_STREAM = Form(
    "a stream of Arrow data",
    "convert it by `python -c \"import datasets; datasets.Dataset.from_file('PATH').to_json('train.jsonl')\"`",
)

_PICKLE = Form(
    "a pickle of Python objects",
    "if you trust it, convert its list by `python -c \"import json, pickle; json.dump(pickle.load(open('PATH', 'rb')), "
    "open('train.json', 'w'))\"`",
)

_FORMS: tuple[tuple[bytes, Form], ...] = (
    (rb"\x1f\x8b", _compressed("gzip", "gunzip -k")),
    (rb"\x28\xb5\x2f\xfd", _compressed("zstd", "zstd -d")),
    (rb"\xfd7zXZ\0", _compressed("xz", "xz -dk")),
    (rb"BZh[1-9]1AY", _compressed("bzip2", "bunzip2 -k")),
    (rb"\x04\x22\x4d\x18", _compressed("lz4", "lz4 -d")),
    (rb"[\x50-\x5f]\x2a\x4d\x18", _compressed("zstd", "zstd -d")),  # after a frame to skip, as pzstd writes it
    (rb"LZIP\x01", _compressed("lzip", "lzip -dk")),
    (rb"\x89LZO", _compressed("lzop", "lzop -d")),
    (rb"\xff\x06\0\0sNaPpY", _compressed("snappy", "snzip -dk")),
    (rb"\x5d\0\0..\0*", _compressed("lzma", "xz --format=lzma -dk")),
    (rb"\x1f\x9d", _compressed("compress", "uncompress -k")),
    (rb"PK\x03\x04|PK\x05\x06", ZIP),
    (rb"PK\x07\x08|PK00PK", ZIP_VOLUME),
    (rb"7z\xbc\xaf\x27\x1c", _archive("a 7z archive", "7z x PATH")),
    (rb"Rar!\x1a\x07", _archive("a RAR archive", "unrar x PATH")),
    (rb".{257}ustar", _archive("a tar archive", "tar -xf PATH")),
    (rb"PAR1", _table("a Parquet file", "read_parquet")),
    (rb"ARROW1|FEA1", _table("an Arrow (Feather) file", "read_feather")),
    (rb"\xff\xff\xff\xff", _ARROW_STREAM),
    (rb"ORC", _table("an ORC file", "read_orc")),
    (rb"Obj\x01", Form("an Avro file", "convert it to JSON Lines")),
    (
        rb"SQLite format 3\0",
        Form("an SQLite database", "write its table by `sqlite3 -json PATH 'SELECT * FROM rows' > train.json`"),
    ),
    (rb"\x89HDF\r\n", Form("an HDF5 file", "convert it to JSON Lines")),
    (rb"\x93NUMPY", Form("a NumPy array", "convert it to JSON Lines")),
    (rb"\x80[\x02-\x05]", _PICKLE),
    (rb"%PDF", Form("a PDF document", "name a file of JSON Lines")),
    (rb"\x89PNG|\xff\xd8\xff|GIF8[79]a|RIFF....WEBP|BM....\0\0\0\0|II\*\0|MM\0\*", IMAGE),
    (rb"\0\0\xfe\xff|\xff\xfe|\xfe\xff|(\s\0)*[{\[]\0|\0+([\s\0])*[{\[]", _UTF16),
    (rb"version https://(git-lfs\.github\.com|hawser\.github\.com)/spec/", POINTER),
    (
        rb"(\.\./)*(\.git)?/annex/objects/",
        _fetched("a pointer of git-annex, not the file itself", "git annex get PATH"),
    ),
    (rb"outs:\s|md5: ", _fetched("a pointer of DVC, not the file itself", "dvc pull PATH")),
    (rb"(?i:\s*(<!--.*?-->\s*)?<(!doctype html|html|head|body))", WEB_PAGE),
    (rb"(?i:\s*(<\?xml[^>]*>)?\s*<error)", _ANSWER),
    (rb"\s*<[?!a-zA-Z]", Form("an XML file", "convert it to JSON Lines")),
    (rb"\0+\Z", Form("a file of zero bytes, whose download was not finished", "fetch it again", "fetch it again")),
    (rb"\s*[{\[][^\0]*\0+\Z", _ENDS_IN_ZEROS),
    (rb"[^\0]*\0", BINARY),
    (rb"---\s|- +\w+:", Form("a YAML file", "convert it to JSON Lines")),
    (rb'"?[\w .-]+"?(\t"?[\w .-]+"?)+\r?\n', _table("a table (TSV), not JSON Lines", "read_table")),
    (rb'"?[\w .-]+"?([,;]"?[\w .-]+"?)+\r?\n', _table("a table (CSV), not JSON Lines", "read_csv")),
)
"""Forms by a pattern of the first bytes. The first that matches counts."""


def recognise(head: bytes) -> Form | None:
    """Return the form of a file by its first bytes. Return None for JSON, and for other text."""
    plain = head.removeprefix(b"\xef\xbb\xbf")
    if form := next((form for pattern, form in _FORMS if re.match(pattern, plain, re.DOTALL)), None):
        return form
    return None if _is_text(plain) or plain.lstrip()[:1] in (b"{", b"[") else BINARY


def _is_text(head: bytes) -> bool:
    """Whether bytes are UTF-8, but for a character that is cut at their end."""
    try:
        getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return True


def recognise_file(path: Path) -> Form | None:
    """Return the form of a file that can be read. Return None for JSON, and for other text.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        return recognise(file.read(HEAD_BYTES))
