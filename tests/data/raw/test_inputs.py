"""Tests of paths of raw data as users type them: patterns, several files, and places that are not on a disk."""

from pathlib import Path

import pytest

from llava_cot_jax.data.raw.inputs import annotations_path, images_path, local_path
from llava_cot_jax.data.settings import PrepareSettings
from llava_cot_jax.errors import UserError


@pytest.mark.parametrize(
    ("url", "command"),
    [
        ("gs://bucket/image.zip", "gcloud storage cp -r gs://bucket/image.zip ."),
        ("s3://bucket/images", "aws s3 cp --recursive s3://bucket/images ."),
        ("https://host/train.jsonl?a=b", "curl -LO 'https://host/train.jsonl?a=b'"),
        ("hf://datasets/Xkev/LLaVA-CoT-100k", "hf download"),
    ],
)
def test_places_elsewhere(url: str, command: str) -> None:
    for given in (local_path, annotations_path, images_path):
        with pytest.raises(UserError) as fault:
            given(url)
        assert str(fault.value) == (
            f"{url} is not on this machine, and raw data are read from a disk: copy it here first, as by `{command}`"
        )
    with pytest.raises(UserError, match=r"abfs://x/y is not on this machine, .*: copy it here first$"):
        images_path("abfs://x/y")


def test_a_file_url() -> None:
    assert local_path("file:///data/my%20images") == Path("/data/my images")


def test_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("sqa/1.png", "sqa/2.png", "vg/1.png", "[a].zip", "train.jsonl", "one.zip", "two.zip"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for letter in "abc":
        (tmp_path / f"image.zip.part-a{letter}").write_bytes(b"PK\x03\x04")
    parts = sorted(str(path) for path in tmp_path.glob("image.zip.part-*"))
    assert images_path("image.zip.part-*") == images_path(parts) == images_path(parts[:2]) == Path(parts[0])
    assert images_path("[a].zip") == tmp_path / "[a].zip"
    assert images_path("sqa/*.png") == images_path(["sqa/2.png", "sqa/1.png"]) == tmp_path / "sqa"
    assert images_path("*/*.png") == images_path(["sqa", "vg"]) == tmp_path
    assert images_path("one*") == tmp_path / "one.zip"
    assert annotations_path("*.jsonl") == tmp_path / "train.jsonl"
    with pytest.raises(UserError, match=r"--images names 2 files, and one\.zip, two\.zip among them: unpack archives"):
        images_path(["one.zip", "two.zip"])
    with pytest.raises(UserError, match=f"there is no {tmp_path}/x\\*, and no file that it is a pattern of"):
        images_path("x*")
    with pytest.raises(
        UserError, match=r"--annotations names 2 files: join them, .* by `cat .*one\.zip .*two\.zip > all"
    ):
        annotations_path(["one.zip", "two.zip"])


def test_settings_of_raw_data_in_a_bucket(tmp_path: Path) -> None:
    for paths in ((Path("gs://bucket/a.jsonl"), tmp_path), (tmp_path, Path("gs://bucket/a"))):
        with pytest.raises(UserError, match=r"bucket/a.* is in a bucket, .* read from a disk: copy it here first"):
            PrepareSettings(*paths, tmp_path / "out")
