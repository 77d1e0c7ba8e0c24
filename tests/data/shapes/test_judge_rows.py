"""Tests of judge rows: exactly one of the two texts is true of the picture."""

import pickle
from collections import Counter
from typing import get_args

import numpy as np
import pytest

from llava_cot_jax.data.shapes.judge_rows import JudgeRow, JudgeRows
from llava_cot_jax.data.shapes.rows import ShapesRows, Split
from llava_cot_jax.errors import UserError
from llava_cot_jax.stages import STAGES, find_stages
from tests.data.shapes.shapes_reader import NUMBERS, is_true, read_picture

COUNT = 480


@pytest.fixture(scope="module")
def rows() -> list[JudgeRow]:
    return [row for split in get_args(Split) for row in JudgeRows(split, seed=4, size=COUNT)]


def body(text: str, stage: str) -> str:
    """Return the text between the tags."""
    opening, closing = f"<{stage}> ", f" </{stage}>"
    assert text.startswith(opening) and text.endswith(closing)
    return text.removeprefix(opening).removesuffix(closing)


def false_text(row: JudgeRow) -> str:
    return body(row.texts[2 - row.better], row.stage)


def test_one_text_is_true_and_the_other_false(rows: list[JudgeRow]) -> None:
    for row in rows:
        seen = read_picture(row.image)
        verdicts = [is_true(row.stage, body(text, row.stage), row.question, seen) for text in row.texts]
        assert verdicts == [row.better == 1, row.better == 2], row


def test_the_context_is_the_truth_so_far(rows: list[JudgeRow]) -> None:
    for row in rows:
        stages = find_stages(row.context)
        assert tuple(stages) == STAGES[: STAGES.index(row.stage)]
        assert row.context == "\n\n".join(f"<{stage}> {text} </{stage}>" for stage, text in stages.items())
        seen = read_picture(row.image)
        assert all(is_true(stage, text, row.question, seen) for stage, text in stages.items())


def test_stages_kinds_and_orders_are_balanced(rows: list[JudgeRow]) -> None:
    kinds = [ShapesRows("train").kind(i) for i in range(COUNT)] * 3
    assert set(Counter(zip((row.stage for row in rows), kinds, strict=True)).values()) == {3 * COUNT // 16}
    for stage in STAGES:
        first = np.mean([row.better == 1 for row in rows if row.stage == stage])
        assert abs(first - 0.5) < 0.08  # 3 standard errors of 360


def test_a_false_text_is_one_that_another_picture_could_have(rows: list[JudgeRow]) -> None:
    """The form of a false text does not reveal it: its length and its counts are those of true texts."""
    true: dict[str, set[int]] = {stage: set() for stage in STAGES}
    for row in rows:
        true[row.stage].add(len(row.texts[row.better - 1].split()))
    for row in rows:
        assert len(false_text(row).split()) + 2 in true[row.stage]
        if row.stage == "CONCLUSION" and row.question.startswith("How many"):
            assert false_text(row) in NUMBERS[:4]
        if row.stage == "REASONING" and row.question.startswith("How many"):
            assert false_text(row).split()[-1] in NUMBERS[:4]


def things(text: str) -> dict[str, tuple[str, ...]]:
    words = text.split()
    return {words[i]: tuple(words[i + 1 : i + 3]) for i in range(0, len(words), 3)}


def test_captions_are_wrong_in_every_way(rows: list[JudgeRow]) -> None:
    wrongs = Counter(change(read_picture(row.image), things(false_text(row))) for row in rows if row.stage == "CAPTION")
    assert set(wrongs) == {"colour", "shape", "cell", "missing", "added"} and min(wrongs.values()) > 40


def change(seen: dict, said: dict) -> str:
    """Return the one thing in which a caption differs from the picture."""
    lost, new = seen.keys() - said.keys(), said.keys() - seen.keys()
    differing = [cell for cell in seen.keys() & said.keys() if seen[cell] != said[cell]]
    assert len(differing) + max(len(lost), len(new)) == 1
    if differing:
        colour, shape = (a != b for a, b in zip(seen[differing[0]], said[differing[0]], strict=True))
        assert colour != shape
        return "colour" if colour else "shape"
    if lost and new:
        assert seen[lost.pop()] == said[new.pop()]
        return "cell"
    return "missing" if lost else "added"


def test_reasonings_are_wrong_in_every_way(rows: list[JudgeRow]) -> None:
    """A false reasoning has a wrong result, a wrong counter with its consequences, or a misread thing; none is cut."""
    wrongs: Counter[str] = Counter()
    for row in rows:
        if row.stage == "REASONING":
            true, false = (steps_of(body(row.texts[i], row.stage)) for i in (row.better - 1, 2 - row.better))
            assert len(false) >= len(true)
            wrongs["result" if true == false else "count" if unnumbered(true) == unnumbered(false) else "misread"] += 1
    assert set(wrongs) == {"result", "count", "misread"} and min(wrongs.values()) > 50


def steps_of(text: str) -> list[str]:
    return text.rpartition(" so ")[0].split()


def unnumbered(words: list[str]) -> list[str]:
    return [word for word in words if word not in NUMBERS]


def test_layouts_are_those_of_the_split() -> None:
    for split in get_args(Split):
        pairs, rows = JudgeRows(split, seed=2), ShapesRows(split, seed=2)
        for i in range(20):
            np.testing.assert_array_equal(np.asarray(pairs[i].image), np.asarray(rows[i].image))
            assert pairs[i].question == rows[i].turns[0].question


def test_a_row_depends_on_no_other_row() -> None:
    rows, few = JudgeRows("train"), JudgeRows("train", size=20)
    backwards = [few[i] for i in reversed(range(20))][::-1]
    assert [(row.texts, row.better) for row in backwards] == [(rows[i].texts, rows[i].better) for i in range(20)]
    assert JudgeRows("train", 1)[9].texts != rows[9].texts
    prints = {JudgeRows(split, seed).fingerprint for split in get_args(Split) for seed in (0, 1)}
    assert len(prints | {ShapesRows("train").fingerprint}) == 7


def test_pickle() -> None:
    rows = JudgeRows("validation", seed=2, size=30)
    copy = pickle.loads(pickle.dumps(rows))
    assert copy == rows and len(copy) == 30
    assert pickle.loads(pickle.dumps(copy[3])).texts == rows[3].texts


def test_mistakes() -> None:
    with pytest.raises(UserError, match="no split 'dev'"):
        JudgeRows("dev")  # type: ignore[arg-type]
    with pytest.raises(IndexError):
        JudgeRows("test", size=3)[3]
