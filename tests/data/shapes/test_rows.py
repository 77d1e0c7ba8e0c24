"""Tests of the shapes world: its answers are true of its pictures, and no two splits share a layout."""

import hashlib
import os
import pickle
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from llava_cot_jax.data.rows import Row
from llava_cot_jax.data.shapes.rows import SIZES, ShapesRows, Split
from llava_cot_jax.errors import UserError
from llava_cot_jax.stages import find_stages, is_staged
from tests.data.shapes.shapes_reader import is_true, read_picture, solve

SPLITS = get_args(Split)


def digest(rows: list[Row]) -> str:
    """Hash everything in the rows, pixels and words."""
    content = hashlib.sha256()
    for row in rows:
        content.update(np.asarray(row.images[0]).tobytes())
        content.update(repr((row.id, row.source, [(turn.question, turn.answer) for turn in row.turns])).encode())
    return content.hexdigest()[:16]


# What is said is what is shown.


@pytest.mark.parametrize("split", SPLITS)
def test_every_stage_is_true_of_the_pixels(split: Split) -> None:
    rows = ShapesRows(split, seed=3)
    for i in range(320):  # with 40 second turns
        row = rows[i]
        seen = read_picture(row.images[0])
        assert 3 <= len(seen) <= 5
        for turn in row.turns:
            stages = find_stages(turn.answer)
            assert is_staged(turn.answer)
            assert turn.answer == "\n\n".join(f"<{name}> {body} </{name}>" for name, body in stages.items())
            for stage, body in stages.items():
                assert is_true(stage, body, turn.question, seen), (i, turn, seen)
        assert rows.answer(i) == solve(row.turns[0].question, seen) == find_stages(row.turns[0].answer)["CONCLUSION"]


def test_pictures() -> None:
    """Pictures are RGB with 48 x 48 pixels; the colour of each thing and the noise of each pixel vary."""
    pixels = np.stack(
        [np.asarray(row.images[0], float) for row in map(ShapesRows("train", size=200).__getitem__, range(200))]
    )
    assert pixels.shape == (200, 48, 48, 3)
    empty = pixels[np.abs(pixels - 228).max(axis=-1) < 60]
    assert abs(empty.std() - 12) < 2 and abs(empty.mean() - 228) < 3


# The split, the seed and the index decide, and nothing else.


@pytest.mark.slow
def test_no_layout_is_in_two_splits() -> None:
    """Chance alone would put some layouts into two splits, since three things have only 344,064 layouts."""
    captions = {
        split: {
            find_stages(rows.turns(i)[0].answer)["CAPTION"]
            for rows in (ShapesRows(split, seed=seed, size=1200) for seed in (0, 1))
            for i in range(1200)
        }
        for split in SPLITS
    }
    assert all(len(found) > 2300 for found in captions.values())
    assert len(set.union(*captions.values())) == sum(map(len, captions.values()))


def test_a_row_depends_on_no_other_row() -> None:
    rows, few = ShapesRows("train"), ShapesRows("train", size=40)
    backwards = [few[i] for i in reversed(range(40))][::-1]
    assert digest([rows[i] for i in range(40)]) == digest(backwards)
    assert digest([rows[7]]) == digest([few[7]]) != digest([few[8]])


def test_turns_are_those_of_the_row() -> None:
    rows = ShapesRows("test")
    assert [rows.turns(i) for i in range(64)] == [rows[i].turns for i in range(64)]


def test_other_seeds_and_splits_give_other_rows() -> None:
    pictures = {digest([ShapesRows(split, seed)[5]]) for split in SPLITS for seed in (0, 1, 2)}
    assert len(pictures) == 9
    prints = {ShapesRows(split, seed, size).fingerprint for split in SPLITS for seed in (0, 1) for size in (50, 60)}
    assert len(prints) == 12
    assert ShapesRows("train", 1).fingerprint == ShapesRows("train", 1, SIZES["train"]).fingerprint


GOLDEN = "9cc15b7b90b8d7e7"
"""Where this changes, so does ``VERSION``: prepared data and indices of lengths hang on the fingerprint."""

PRINT_DIGEST = """
from tests.data.shapes.test_rows import ShapesRows, digest
print(digest([ShapesRows("train")[i] for i in range(64)]))
"""


@pytest.mark.slow
def test_the_same_bytes_every_time() -> None:
    """The rows are the same in another process, where strings have other hashes."""
    assert digest([ShapesRows("train")[i] for i in range(64)]) == GOLDEN
    result = subprocess.run(
        [sys.executable, "-c", PRINT_DIGEST],
        cwd=Path(__file__).parents[3],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONHASHSEED": "7"},
    )
    assert result.stdout.strip() == GOLDEN


def test_pickle() -> None:
    rows = ShapesRows("validation", seed=2, size=30)
    copy = pickle.loads(pickle.dumps(rows))
    assert copy == rows and len(copy) == 30 and digest([copy[9]]) == digest([rows[9]])
    assert digest([pickle.loads(pickle.dumps(rows[9]))]) == digest([rows[9]])


# What is asked.


def questions_and_answers(kind: str) -> list[tuple[str, str]]:
    rows = ShapesRows("train", size=4000)
    indices = [i for i in range(4000) if rows.kind(i) == kind]
    return [(rows.turns(i)[0].question, rows.answer(i)) for i in indices]


BEGINNINGS = {"look_up": "is at", "count": "How many", "compare": "Are there more", "relation": "is directly"}
MAJORITY = {"look_up": 0.15, "count": 0.28, "compare": 0.54, "relation": 0.15}
QUESTIONS = {"look_up": 27, "count": 8, "compare": 24, "relation": 192}


@pytest.mark.parametrize("kind", BEGINNINGS)
def test_kinds_and_answers(kind: str) -> None:
    """Each kind has a quarter of the rows and many questions, and no answer is too frequent, even for one question."""
    pairs = questions_and_answers(kind)
    assert len(pairs) == 1000 and all(BEGINNINGS[kind] in question for question, _ in pairs)
    assert Counter(answer for _, answer in pairs).most_common(1)[0][1] < MAJORITY[kind] * 1000
    asked = Counter(question for question, _ in pairs)
    assert len(asked) > 0.95 * QUESTIONS[kind] and max(asked.values()) < 2.5 * 1000 / QUESTIONS[kind] + 10


@pytest.mark.parametrize(("kind", "chance"), [("count", 0.25), ("compare", 0.5)])
def test_nothing_but_the_picture_gives_a_balanced_answer_away(kind: str, chance: float) -> None:
    """The most frequent answer for a question, or for a number of things, is hardly more accurate than chance."""
    rows = ShapesRows("train", size=8000)
    turns = [rows.turns(i)[0] for i in range(8000) if rows.kind(i) == kind]
    by_clue: dict[str | int, Counter[str]] = defaultdict(Counter)
    for turn in turns:
        stages = find_stages(turn.answer)
        for clue in (turn.question, len(stages["CAPTION"].split()) // 3):
            by_clue[clue][stages["CONCLUSION"]] += 1
    for clues in (str, int):
        right = sum(max(counts.values()) for clue, counts in by_clue.items() if isinstance(clue, clues))
        assert right / len(turns) < chance + 0.07


def test_a_minority_has_a_second_turn() -> None:
    rows = ShapesRows("train", size=1600)
    turns = [rows.turns(i) for i in range(1600)]
    several = [pair for pair in turns if len(pair) > 1]
    assert len(several) == 200 and all(len(pair) == 2 for pair in several)
    assert all(first.question != second.question for first, second in several)
    seconds = Counter(next(k for k, words in BEGINNINGS.items() if words in pair[1].question) for pair in several)
    assert set(seconds) == set(BEGINNINGS) and min(seconds.values()) > 30
    # Of every kind of first question.
    assert Counter(i % 4 for i, pair in enumerate(turns) if len(pair) > 1) == dict.fromkeys(range(4), 50)


# Mistakes.

MISTAKES = {
    "no split": (("dev",), "no split 'dev'; it is one of train, validation, test"),
    "a negative seed": (("train", -1), "seed is -1"),
    "no rows": (("train", 0, 0), "size is 0"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str) -> None:
    arguments, message = MISTAKES[name]
    with pytest.raises(UserError, match=message):
        ShapesRows(*arguments)


def test_sizes() -> None:
    assert {split: len(ShapesRows(split)) for split in SPLITS} == SIZES
    rows = ShapesRows("test", size=3)
    assert len(list(rows)) == 3  # a sequence ends with IndexError
    for index in (-1, 3):
        with pytest.raises(IndexError):
            rows[index]
