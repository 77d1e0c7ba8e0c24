"""Search for the file that a row's path means, where spelling or folders in front differ from the file's name."""

import posixpath
import unicodedata
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from urllib.parse import unquote

PREFIXES = ("", "image_files/", "images/", "image/")
"""Folders that an archive may have in front of the paths in the annotations."""

NEIGHBOURS = 2
"""Number of names before and after a path, in alphabetical order, among which the nearest name is sought."""


class Match(StrEnum):
    """Relation of the path in a row to the name of the file that it means.

    The two are the same (but for a folder of ``PREFIXES``); or spelled differently; or the path goes on from the
    folder of the images itself, as a full path does; or only one of them has certain folders in front.
    """

    EXACT = "same path"
    SPELLING = "other spelling"
    OWN_FOLDER = "full path"
    OTHER_FOLDER = "other folder"


@dataclass(frozen=True, slots=True)
class Found:
    """File that a path means.

    Attributes:
        name: Name of the file.
        path: Path of the file without folders that only one of the two has in front.
        match: Relation of the name to the path.
        left_out: Folders of the path that the name does not have in front; empty if it has them all.
    """

    name: str
    path: str
    match: Match
    left_out: str = ""


def normalise_path(path: str) -> str | None:
    """Normalise a path, as ``./a//b.png`` to ``a/b.png``. Return None if it leads out of its folder."""
    short = posixpath.normpath(path)
    outside = short.startswith(("/", "../")) or short in (".", "..") or "\0" in short
    return None if outside else short


def clean_path(path: str) -> str:
    """Return a path with slashes, without quoting as in URLs, space around names, and steps to its beginning."""
    text = (unquote(path) if "%" in path else path).replace("\\", "/").removeprefix("file://")
    short = posixpath.normpath("/".join(map(str.strip, text.split("/"))))
    parts = [part for part in short.split("/") if part not in ("", ".", "..")]
    return unicodedata.normalize("NFC", "/".join(parts))


def without_prefix(name: str) -> str:
    """Return a file's name without a folder of ``PREFIXES`` in front."""
    return next((name[len(prefix) :] for prefix in PREFIXES if prefix and name.startswith(prefix)), name)


def contradictory_folders(found: Iterable[Found]) -> set[str]:
    """Return those ``left_out`` that would make one file out of two.

    Paths such as ``coco/1.png`` and ``vg/1.png`` mean two files. If there is only ``1.png``, it is not known whose it
    is, and so neither of these folders may be left out of any path. What is left out as the folder of the images
    itself is certain.

    Args:
        found: All that was found.
    """
    by_name: defaultdict[str, set[Found]] = defaultdict(set)
    for one in found:
        by_name[one.name].add(one)
    contradictory: set[str] = set()
    for several in by_name.values():
        folders = {_fold(one.left_out) for one in several if one.left_out}
        for one in several:
            own = _fold(one.left_out)
            others = (other for other in folders if not (_is_tail(own, other) or _is_tail(other, own)))
            if one.match == Match.OTHER_FOLDER and own and any(others):
                contradictory.add(one.left_out)
    return contradictory


@dataclass(frozen=True, slots=True)
class _Candidates:
    """Files that a path may mean, with the folded end of the path that they share, and what is left out before it."""

    names: list[str]
    shared: str
    match: Match
    left_out: str


class NameIndex:
    """Search among the names of files. What it needs is computed on first use.

    Args:
        names: Names of the files.
        root: Folder or archive of the files.
    """

    def __init__(self, names: Iterable[str], root: Path) -> None:
        self._names = sorted(names)
        self._root = _fold(str(root.with_suffix("") if root.suffix.lower() == ".zip" else root))

    def find(self, path: str) -> Found | None:
        """Return the only file that a path can mean. Return None if there is none, or more than one.

        Letter case, Unicode's composed and decomposed forms, the kind of slashes, quoting as in URLs and space around
        names do not matter. The path may have folders in front that the name lacks, unless the first of them exists
        among the files; or the other way round.
        """
        if not (candidates := self._search(path)):
            return None
        names, count = candidates.names, candidates.shared.count("/") + 1
        if len(names) > 1:  # letter case may tell which is meant
            spelled = "/".join(clean_path(path).split("/")[-count:])
            names = [name for name in names if _is_tail(spelled, clean_path(name))]
        if len(names) != 1:
            return None
        (name,) = names
        # Folders that only the name has in front say nothing about the image.
        added = candidates.match == Match.OTHER_FOLDER and not candidates.left_out
        short = "/".join(name.split("/")[-count:]) if added else without_prefix(name)
        left_out = clean_path(path).split("/")[:-count] if candidates.left_out else []
        return Found(name, short, candidates.match, "/".join(left_out))

    def explain(self, path: str) -> str:
        """Return why ``find`` finds nothing: which files a path may mean, or the nearest name."""
        sought = clean_path(path)
        if candidates := self._search(path):
            one, *others = map(without_prefix, candidates.names)
            if not others:
                return _readable(f"{one} is there, but it is no file that can be read, perhaps a link to what is gone")
            return _readable(f"{sought} may be any of {len(candidates.names)} files, such as {one} and {others[0]}")
        if not self._names:
            return _readable(f"there is no {sought}, and no other file")
        return _readable(f"there is no {sought}; the nearest name is {self._nearest(sought)}")

    def _search(self, path: str) -> _Candidates | None:
        """Return the files whose names share the longest end with a path."""
        parts = _fold(path).split("/")
        ends = [("/".join(parts[:k]), "/".join(parts[k:])) for k in range(len(parts))]
        # Where the first folder exists, the path is no path from elsewhere.
        known = len(parts) > 1 and parts[0] in self._folders
        ends = [(left_out, end) for left_out, end in ends if not left_out or not known or left_out == self._root]
        for left_out, end in ends if parts[0] else []:
            own = Match.OWN_FOLDER if self._is_own(left_out) else Match.OTHER_FOLDER
            for prefix in PREFIXES:
                if names := self._whole.get(f"{prefix}{end}"):
                    return _Candidates(names, end, own if left_out else Match.SPELLING, left_out)
        for left_out, end in ends if parts[0] and not known else []:
            if (not left_out or self._is_own(left_out)) and (names := self._ends.get(end)):
                return _Candidates(names, end, Match.OTHER_FOLDER, "")
        return None

    def _is_own(self, folders: str) -> bool:
        """Whether folders in front of a path can only be those of the images themselves."""
        return f"{folders}/" in PREFIXES or _is_tail(folders, self._root)

    @cached_property
    def _whole(self) -> dict[str, list[str]]:
        """Names by their folded form."""
        whole: defaultdict[str, list[str]] = defaultdict(list)
        for name in self._names:
            whole[_fold(name)].append(name)
        return dict(whole)

    @cached_property
    def _ends(self) -> dict[str, list[str]]:
        """Names by each folded end of theirs that lacks at least one folder."""
        ends: defaultdict[str, list[str]] = defaultdict(list)
        for folded, names in self._whole.items():
            _, slash, end = folded.partition("/")
            while slash:
                ends[end] += names
                _, slash, end = end.partition("/")
        return dict(ends)

    @cached_property
    def _folders(self) -> set[str]:
        """Folded names of the outermost folders, also of those in a folder of ``PREFIXES``."""
        paths = {end for folded in self._whole for end in (folded, without_prefix(folded))}
        return {path.partition("/")[0] for path in paths if "/" in path}

    @cached_property
    def _sorted(self) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        """Folded names, and folded names from back to front, in alphabetical order, each with its name.

        They lack a folder of ``PREFIXES`` in front, so that it makes no difference.
        """
        pairs = [(_fold(short), short) for short in map(without_prefix, self._names)]
        return sorted(pairs), sorted((folded[::-1], name) for folded, name in pairs)

    def _nearest(self, sought: str) -> str:
        """Return the name that shares the longest beginning and end with a path."""
        folded = _fold(sought)
        near: set[str] = set()
        for ordered, key in zip(self._sorted, (folded, folded[::-1]), strict=True):
            place = bisect_left(ordered, (key, ""))
            near |= {name for _, name in ordered[max(0, place - NEIGHBOURS) : place + NEIGHBOURS]}
        return min(near, key=lambda name: (-_shared(_fold(name), folded), name))


def _fold(path: str) -> str:
    """Return a path in a form that is the same for all of its spellings."""
    return unicodedata.normalize("NFC", clean_path(path).casefold())


def _is_tail(end: str, path: str) -> bool:
    """Whether the last parts of a path are ``end``."""
    return f"/{path}".endswith(f"/{end}")


def _shared(one: str, other: str) -> int:
    """Return the number of characters that two texts share at their beginning and at their end."""
    pairs = ((one, other), (one[::-1], other[::-1]))
    return sum(sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*both, strict=False))) for both in pairs)


def _readable(text: str) -> str:
    """Return a text that can be encoded, though the name of a file need not be valid Unicode."""
    return text.encode(errors="replace").decode()
