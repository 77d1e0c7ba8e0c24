"""Formats of stages: read from YAML, told apart, and read in texts, against a reading of bytes."""

import random
from dataclasses import replace

import pytest
import yaml

from llava_cot_jax.errors import UserError
from llava_cot_jax.inference.screen import Screen
from llava_cot_jax.stage_format import FORMATS_FOLDER, LLAVA_COT, StageFormat, StageMarks
from llava_cot_jax.stages import find_conclusion, find_stages, locate_stages, may_be_staged

NAMES = ("llamav_o1", "llava_cot", "llava_cot_sentences", "mulberry")
FORMATS = {name: StageFormat.load(name) for name in NAMES}
THINK = StageFormat(
    "think",
    (
        StageMarks("THINK", "<think>", "</think>"),
        StageMarks("DRAFT", "Draft:\n"),
        StageMarks("ANSWER", "Answer:"),
        StageMarks("CHECK", "Check:", "(end)"),
    ),
    "ANSWER",
)
"""A format with stages of every kind, whose conclusion is not the last."""

SINGLE_TURN = {name: format for name, format in (FORMATS | {"think": THINK}).items() if not format.has_turns}

MULBERRY = """### Image Description:
A chart with four bars.

### Rationales:
The question is about the highest one.

### Let's think step by step.
### Step 1:
Read the heights: 3, 9 and 4.
### Step 2:
9 is the highest.

### The final answer is: B: 9"""


def test_every_format_of_the_package_is_known():
    assert tuple(sorted(path.stem for path in FORMATS_FOLDER.iterdir())) == NAMES
    assert FORMATS["llava_cot"] == LLAVA_COT


@pytest.mark.parametrize("name", [*NAMES, "think"])
def test_a_format_is_read_back_from_yaml(tmp_path, name):
    """What is read is what stands in the file, key by key."""
    format = FORMATS.get(name, THINK)
    given = [{k: v for k, v in vars(stage).items() if v is not None} for stage in format.stages]
    (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"stages": given, "conclusion": format.conclusion}))
    assert StageFormat.load(tmp_path / f"{name}.yaml") == format
    if name in NAMES:
        content = yaml.safe_load((FORMATS_FOLDER / f"{name}.yaml").read_text())
        assert content == {"stages": given, "conclusion": format.conclusion}


def has_all_stages(text: str, format: StageFormat) -> bool:
    """Whether a text has all stages of a format, each one closed."""
    found = locate_stages(text, format)
    return tuple(found) == format.names and all(stage.closed for stage in found.values())


def test_what_mulberry_writes():
    found = find_stages(MULBERRY, FORMATS["mulberry"])
    assert list(found) == ["CAPTION", "RATIONALES", "REASONING", "CONCLUSION"]
    assert found["CAPTION"] == "A chart with four bars."
    assert found["REASONING"] == "### Step 1:\nRead the heights: 3, 9 and 4.\n### Step 2:\n9 is the highest."
    assert find_conclusion(MULBERRY, FORMATS["mulberry"]) == "B: 9"
    assert has_all_stages(MULBERRY, FORMATS["mulberry"]) and not has_all_stages(MULBERRY, LLAVA_COT)
    assert find_stages(MULBERRY.replace(":\n", ":"), FORMATS["mulberry"])["RATIONALES"] == found["RATIONALES"]
    assert not has_all_stages(MULBERRY.replace("Rationales", "Rationale"), FORMATS["mulberry"])


def read_bytes(text: bytes, format: StageFormat) -> dict[str, tuple[str, bool]]:
    """Return the body of each stage of a text and whether it is closed: one byte at a time, from the rules alone."""
    found, place = {}, 0
    for number, stage in enumerate(format.stages):
        mark = (stage.opening or "").strip().encode()
        later = [(other.opening or "").strip().encode() for other in format.stages[number + 1 :]]
        starts = [i for i in range(place, len(text)) if text[i : i + len(mark)] == mark]
        if not starts:
            continue
        start = at = starts[0] + len(mark)
        closing = (stage.closing or "").strip().encode()
        end, closed = len(text), not closing and not later
        while at < len(text):
            if closing and text[at : at + len(closing)] == closing:
                end, at, closed = at, at + len(closing), True
                break
            if any(text[at : at + len(other)] == other for other in later):
                end, closed = at, not closing
                break
            at += 1
        found[stage.name] = (text[start:end].decode().strip(), closed)
        place = at
    return found


@pytest.mark.parametrize("name", SINGLE_TURN)
def test_stages_are_found_as_a_reading_of_bytes_finds_them(name):
    """Texts are drawn from the marks, whole and in parts, and from words; all kinds of ends occur."""
    format, rng, closed, opened = SINGLE_TURN[name], random.Random(0), 0, 0
    marks = [mark for stage in format.stages for mark in (stage.opening, stage.closing) if mark]
    pieces = [
        *marks,
        *marks,
        *(mark[: len(mark) // 2] for mark in marks),
        " a dog",
        "\n\n",
        "猫",
        " 3 < 4 ",
        "### Step 1:",
    ]
    for _ in range(2000):
        text = "".join(rng.choices(pieces, k=rng.randrange(10)))
        want = read_bytes(text.encode(), format)
        assert {n: (stage.body, stage.closed) for n, stage in locate_stages(text, format).items()} == want
        assert list(find_stages(text, format)) == list(want)
        assert find_conclusion(text, format) == want.get(format.conclusion, (text.strip(),))[0]
        closed += sum(end for _, end in want.values())
        opened += len(want)
    assert 200 < closed < opened - 200


def changed(format: StageFormat, number: int, **marks) -> StageFormat:
    stages = list(format.stages)
    stages[number] = replace(stages[number], **marks)
    return replace(format, stages=tuple(stages))


def test_each_field_of_a_format_is_read():
    """Another value of one field alone changes what is read in one text."""
    format = FORMATS["mulberry"]
    found = find_stages(MULBERRY, format)
    assert "STEPS" in find_stages(MULBERRY, changed(format, 2, name="STEPS"))
    assert "RATIONALES" not in find_stages(MULBERRY, changed(format, 1, opening="### Reasons:"))
    assert find_stages(MULBERRY, changed(format, 0, closing="four"))["CAPTION"] == "A chart with"
    assert find_conclusion(MULBERRY, replace(format, conclusion="CAPTION")) == found["CAPTION"]
    other = changed(format, 0, ask="{question}\nThink.")
    assert format.around_question != other.around_question == ("", "\nThink.")
    assert list(find_stages(MULBERRY, changed(format, 3, ask="And the answer?"))) == list(found)[:3]
    assert list(find_stages(MULBERRY, replace(format, stages=format.stages[:2], conclusion=""))) == list(found)[:2]


def test_the_prompt_of_a_question_is_the_question_unless_the_format_says_otherwise():
    assert LLAVA_COT.around_question == ("", "")
    assert [part[:14] for part in FORMATS["llamav_o1"].around_question] == ["", "\nSummarize how"]
    assert [part[-2:] for part in FORMATS["mulberry"].around_question] == ["\n\n", ""]


@pytest.mark.parametrize("name", SINGLE_TURN)
def test_a_growing_answer_shows_its_conclusion_only(name, capsys):
    """Character by character, and nothing of the marks around it is ever shown."""
    format = SINGLE_TURN[name]
    text = "\n\n".join(
        f"{stage.opening or ''} {stage.name.lower()} 3 < 4 # {stage.closing or ''}".strip() for stage in format.stages
    )
    assert has_all_stages(text, format)
    with Screen(False, format) as screen:
        for end in range(len(text) + 1):
            assert may_be_staged(text[:end], format)
            screen.show(text[:end])
        screen.finish(text)
    assert capsys.readouterr().out == find_conclusion(text, format) + "\n"


GOOD = {"name": "A", "opening": "<A>", "closing": "</A>"}
MISTAKES = {
    "no stages": ({"stages": []}, "at least one"),
    "no list": ({"stages": "A"}, "must be a list"),
    "no mapping": ([GOOD], "a stage format is ["),
    "stage is text": ({"stages": ["A"]}, "a stage is 'A'; it must be a mapping"),
    "unknown key": ({"stages": [GOOD], "end": 1}, "a stage format has the key end"),
    "unknown key of a stage": ({"stages": [GOOD | {"close": "x"}]}, "a stage has the key close"),
    "no name": ({"stages": [{"opening": "<A>"}]}, "a stage has no name"),
    "name of a number": ({"stages": [GOOD | {"name": 3}]}, "the name of a stage is 3"),
    "name twice": ({"stages": [GOOD, GOOD]}, "different names"),
    "empty name": ({"stages": [GOOD | {"name": " "}]}, "different names"),
    "empty closing": ({"stages": [GOOD | {"closing": ""}]}, "closing of A is empty"),
    "blank closing": ({"stages": [GOOD | {"closing": "\n"}]}, "closing of A is empty"),
    "empty opening": ({"stages": [GOOD | {"opening": ""}]}, "opening of A is empty"),
    "closing of a number": ({"stages": [GOOD | {"closing": 3}]}, "closing of A is 3; it must be a text"),
    "half a character": ({"stages": [GOOD | {"opening": "\ud800"}]}, "no valid character"),
    "conclusion of no stage": ({"stages": [GOOD], "conclusion": "B"}, "conclusion is 'B', but the stages are A"),
    "same openings": ({"stages": [GOOD, {"name": "B", "opening": "<A> "}]}, "openings of A and B cannot be told apart"),
    "opening in an opening": (
        {"stages": [{"name": "A", "opening": "Answer:"}, {"name": "B", "opening": "Final Answer:"}]},
        "openings of A and B cannot be told apart",
    ),
    "closing is an opening": (
        {"stages": [GOOD | {"closing": "<B>"}, {"name": "B", "opening": "<B>"}]},
        "closing of A and the opening of B cannot be told apart",
    ),
    "no opening": ({"stages": [GOOD, {"name": "B"}]}, "B has no opening"),
    "special closing": (
        {"stages": [GOOD | {"closing": "<|eot_id|>"}]},
        "closing of A has the special token <|eot_id|>",
    ),
    "special opening": ({"stages": [GOOD | {"opening": "A<|image|>"}]}, "opening of A has the special token <|image|>"),
    "special ask": ({"stages": [GOOD | {"ask": "{question}<|eot_id|>"}]}, "ask of A has the special token <|eot_id|>"),
    "question left out": ({"stages": [GOOD | {"ask": "Think."}]}, "ask of A must have {question} once"),
    "question twice": ({"stages": [GOOD | {"ask": "{question}{question}"}]}, "ask of A must have {question} once"),
    "question later": ({"stages": [GOOD, {"name": "B", "ask": "{question}"}]}, "which only the first stage"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_format_that_cannot_be_used(tmp_path, name):
    content, said = MISTAKES[name]
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError) as mistake:
        StageFormat.load(path)
    assert said in str(mistake.value) and str(path) in str(mistake.value) and "\n" not in str(mistake.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("mulbery", "there is no stage format mulbery: give llamav_o1, llava_cot"),
        ("nowhere/mulberry.yaml", "does not exist"),
        (None, "a path is None"),
    ],
)
def test_a_format_that_is_not_there(given, said):
    with pytest.raises(UserError, match=said):
        StageFormat.load(given)


def test_a_file_that_is_not_yaml(tmp_path):
    (tmp_path / "mine.yaml").write_text("stages: [")
    with pytest.raises(UserError, match=r"mine.yaml is not YAML") as mistake:
        StageFormat.load(tmp_path / "mine.yaml")
    assert "\n" not in str(mistake.value)
