"""A small raw data set in LLaVA-CoT-100k's published layout, in which every kind of fault occurs once."""

import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tests.data.rows import staged

SOURCES = ("sqa", "chartqa", "geoqa+", "vg", "ai2d", "docvqa", "pisc", "CLEVR_v1.0", "clevr-math", "sam")


@dataclass(frozen=True)
class RawSet:
    """A raw data set with the facts that tests compare with.

    Attributes:
        annotations: File of the rows.
        files: Image files by their path in the rows.
        rows: Usable rows, by line.
        skipped: Reasons for which the other rows are skipped, by line.
    """

    annotations: Path
    files: dict[str, bytes]
    rows: dict[int, dict]
    skipped: dict[int, str]

    def write_folder(self, root: Path, prefix: str = "") -> Path:
        for name, content in self.files.items():
            path = root / prefix / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return root

    def write_zip(self, path: Path, prefix: str = "image_files/") -> Path:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("__MACOSX/image_files/._image.png", b"of a Mac")
            for name, content in self.files.items():
                archive.writestr(prefix + name, content)
        return path

    def write_parts(self, folder: Path, size: int = 30_000) -> list[Path]:
        """The zip as published: in parts, the whole nowhere."""
        folder.mkdir(exist_ok=True)
        return split(self.write_zip(folder / "image.zip"), size)


def split(path: Path, size: int) -> list[Path]:
    """Cut a file into parts of ``size`` bytes, as ``split -b`` does, and remove it."""
    content = path.read_bytes()
    path.unlink()
    parts = [path.with_name(f"{path.name}.part-a{letter}") for letter in "abcdefghijklmnopqrstuvwxyz"]
    parts = parts[: -(-len(content) // size)]
    for i, part in enumerate(parts):
        part.write_bytes(content[i * size : (i + 1) * size])
    assert sum(part.stat().st_size for part in parts) == len(content)
    return parts


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(draw: np.random.Generator, width: int = 40, height: int = 30) -> Image.Image:
    return Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))


def unusual_images(draw: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Image files by name, of the kinds that published data sets have."""
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = draw.integers(0, 65536, (30, 40), dtype=np.uint16)
    yield "cmyk.jpg", encode(noise(draw).convert("CMYK"), "JPEG")
    yield "palette.png", encode(noise(draw).quantize(16), transparency=3)
    yield "rgba.png", encode(noise(draw).convert("RGBA"))
    yield "turned.jpg", encode(noise(draw), "JPEG", exif=exif)
    yield "grey16.png", encode(Image.fromarray(grey))


def make_raw_set(folder: Path, *, faults: bool = True, scale: int = 1) -> RawSet:
    """Write the annotations, and return the images for writing in one form or another.

    Args:
        folder: Folder to write to.
        faults: Whether to include faulty rows.
        scale: Scale of the image sides; with 1, a file has about 4 kB.
    """
    draw = np.random.default_rng(0)
    files: dict[str, bytes] = {}
    rows: list[dict] = []

    def add(image: str, *, turns: int = 1, **changes: object) -> dict:
        answer = staged("I count.", "Dots.", f"There are {len(rows)} dots.", str(len(rows)))
        questions = [f"<image>\nHow many dots in {len(rows)} °?", *["And now?"] * (turns - 1)]
        talk = [
            {"from": speaker, "value": text} for q in questions for speaker, text in (("human", q), ("gpt", answer))
        ]
        rows.append({"id": f"{image}-{len(rows)}", "image": image, "conversations": talk} | changes)
        return rows[-1]

    for i, source in enumerate(SOURCES):
        for j in range(4):
            name = f"{source}/train/{j}/image.png"
            files[name] = encode(noise(draw, scale * (40 + i), scale * (30 + j)))
            add(name, turns=1 + (j == 2))
        add(f"{source}/train/3/image.png")  # two rows about one picture
    for name, content in unusual_images(draw):
        files[f"vg/unusual/{name}"] = content
        add(f"vg/unusual/{name}")
    rows[7]["conversations"][-1]["value"] = "No stages, and 7."  # the later answer of two
    rows[12]["id"] = rows[11]["id"]
    files["sam/never/named.png"] = encode(noise(draw))

    lines: list[bytes] = [json.dumps(row).encode() for row in rows]
    skipped: dict[int, str] = {}
    if faults:
        files["ai2d/short.png"] = files["ai2d/train/0/image.png"][:500]
        files["docvqa/text.png"] = b"This is no image."
        (folder / "outside.png").write_bytes(files["sqa/train/0/image.png"])
        good = "sqa/train/0/image.png"
        talk = rows[0]["conversations"]
        planted: list[tuple[str, bytes | dict]] = [
            ("broken JSON", lines[0][:-7]),
            ("bad text", json.dumps(add(good, id="half a pair: \ud800")).encode()),
            ("no conversation", b'["a list"]'),
            ("no conversation", {"id": "no talk", "image": good}),
            ("no image", {"id": "text alone", "conversations": talk}),
            ("missing image", add("chartqa/train/9/absent.png")),
            ("missing image", add("../outside.png")),
            ("missing image", add(str(folder / "outside.png"))),
            ("broken image", add("ai2d/short.png")),
            ("broken image", add("docvqa/text.png")),
            ("bad turns", add(good, conversations=[*talk[:1], *talk])),
            ("bad turns", add(good, conversations=[*talk, *talk[:1]])),
            ("bad turns", add(good, conversations=[talk[0], {"from": "gpt", "value": " \n"}])),
            ("bad turns", add(good, conversations=[])),
        ]
        for i, (reason, row) in enumerate(planted):
            at = 3 * i + 2
            lines.insert(at, row if isinstance(row, bytes) else json.dumps(row).encode())
            skipped[at + 1] = reason
    annotations = folder / "train.jsonl"
    annotations.write_bytes(b"\n".join(lines) + b"\n")
    sound = {i + 1: json.loads(line) for i, line in enumerate(lines) if i + 1 not in skipped}
    return RawSet(annotations, files, sound, skipped)
