"""Tests of the display of rows: the trained text, and the tiles as the model gets them."""

import re

import numpy as np
import pytest
from PIL import Image

from llava_cot_jax.data.chat import Chat
from llava_cot_jax.data.rows import Row, Turn
from llava_cot_jax.data.settings import ChatSettings
from llava_cot_jax.data.show import GAP, SHEET_SIDE, describe_row, display_processor, draw_sheet
from llava_cot_jax.errors import UserError
from llava_cot_jax.model.config import VisionConfig
from llava_cot_jax.prepare import main
from tests.data.rows import demo_processor, staged

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 70, 3), dtype=np.uint8))
ANSWER = staged("Count.", "Two ○ circles.", "One and one.", "2")
ROW = Row("a/1", "vg", (PICTURE,), (Turn("How many?", ANSWER, images=1), Turn("[b]Sure?[/b]", "Yes.")))


def test_the_trained_text_stands_between_marks():
    text = describe_row(3, ROW, Chat(demo_processor(), ChatSettings()).encode(ROW.turns), demo_processor().tokenizer)
    facts, _, body = text.plain.partition("\n")
    assert facts.startswith("row 3 (a/1) from vg: image 70 x 30, 2 of 2 turns, ")
    assert re.findall("⟦(.*?)⟧", body, re.DOTALL) == [f"{ANSWER}<|eot_id|>", "Yes.<|eot_id|>"]
    assert "<|image|>How many?<|eot_id|>" in body and "[b]Sure?[/b]" in body
    trained = {text.plain[span.start : span.end] for span in text.spans if "green" in str(span.style)}
    assert trained == {f"⟦{ANSWER}<|eot_id|>⟧", "⟦Yes.<|eot_id|>⟧"}


def test_a_sheet_shows_the_image_and_its_tiles_in_their_places():
    """An image of 70 x 30 pixels fills two tiles of 35 side by side; the rest of the canvas is black."""
    vision = VisionConfig(image_size=35, patch_size=7)
    sheet = np.asarray(draw_sheet([(0, ROW), (1, ROW)], vision))
    strip = sheet.shape[0] // 2
    tops = [top for top in range(strip) if (sheet[top, GAP] == np.asarray(PICTURE)[0, 0]).all()]
    scaled = PICTURE.resize((SHEET_SIDE, SHEET_SIDE * 30 // 70), Image.Resampling.NEAREST)
    for top in (tops[0], tops[0] + strip):
        np.testing.assert_array_equal(sheet[top : top + scaled.height, GAP : GAP + SHEET_SIDE], np.asarray(scaled))
        for tile in range(2):
            left = 2 * GAP + SHEET_SIDE + (SHEET_SIDE + GAP) * tile
            part = np.zeros((35, 35, 3), np.uint8)
            part[:30] = np.asarray(PICTURE)[:, 35 * tile : 35 * tile + 35]
            whole = Image.fromarray(part).resize((SHEET_SIDE, SHEET_SIDE), Image.Resampling.NEAREST)
            np.testing.assert_array_equal(sheet[top : top + SHEET_SIDE, left : left + SHEET_SIDE], np.asarray(whole))
    assert sheet.shape[1] == 2 * GAP + SHEET_SIDE + 2 * (SHEET_SIDE + GAP)


def test_what_rows_are_looked_at_with(tmp_path):
    assert display_processor("shapes", None).config.vision.image_size == 48
    assert display_processor("data/prepared", None).config.vision == VisionConfig()
    with pytest.raises(UserError, match="nowhere"):
        display_processor("shapes", str(tmp_path / "nowhere"))


def test_the_command(tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    main(["--show", "shapes", "--rows", "3", "--split", "validation", "--sheet", str(sheet)])
    out = capsys.readouterr().out
    assert out.count("⟦<SUMMARY>") >= 3 and [f"row {i} (validation/{i})" in out for i in range(4)] == [True] * 3 + [
        False
    ]
    assert f"wrote the tiles to {sheet}" in out
    with Image.open(sheet) as image:
        assert image.width == 2 * GAP + 2 * SHEET_SIDE + GAP


def test_the_command_says_what_is_skipped_and_follows_the_settings(tmp_path, capsys):
    arguments = ["--show", "shapes", "--rows", "1", "--sheet", str(tmp_path / "sheet.png")]
    main([*arguments, "--chat.max_length", "30"])
    assert "row 0 (train/0) is skipped: its first answer does not fit into 30 tokens" in capsys.readouterr().out
    main([*arguments, "--chat.variant", "conclusion"])
    assert "SUMMARY" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--show", "nowhere"], "nowhere is no prepared data set"),
        (["--show", "shapes", "--split", "tst"], "no split 'tst'"),
        (["--show", "shapes", "--rows", "-1"], "rows is -1"),
        (["--show", "shapes", "--chat.variant", "tagged"], "chat.variant"),
        (["--show", "shapes", "--sheet", "/proc/sheet.png"], "proc/sheet.png cannot be written"),
        (["--annotations", "train.jsonl"], "give --images and --output"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        main(arguments)
