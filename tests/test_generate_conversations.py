"""The options of ``generate`` that name a conversation, and the format of the stages."""

import json
import sys
from pathlib import Path

import pytest

from tests.test_generate import Stdin, run
from tests.tiers import EXHAUSTIVE, in_tiers

QUESTION = "How many stars are there?"


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    from llava_cot_jax.data.shapes.drawn import draw_questions

    return draw_questions(tmp_path_factory.mktemp("pictures"), 1, 0)[0].image


def answers(monkeypatch, capsys, *given: str, checkpoint: str = "shapes") -> list[dict]:
    code, out, err = run(monkeypatch, capsys, "--checkpoint", checkpoint, "--json", *given)
    assert code == 0, err
    return [json.loads(line) for line in out.splitlines()]


def without_times(answer: dict) -> dict:
    return {name: value for name, value in answer.items() if name not in ("seconds", "compilations")}


SEARCH = ["--search", "stage_beam", "--num_candidates", "2", "--max_new_tokens", "50"]


@pytest.mark.slow
@pytest.mark.parametrize("search", [[], pytest.param(SEARCH, marks=EXHAUSTIVE)], ids=["streamed", "searched"])
def test_one_question_as_messages_is_answered_as_the_question_is(monkeypatch, capsys, tmp_path, image, search):
    """The image stands in the message, or beside it; the messages come from a file, or from standard input."""
    (want,) = answers(monkeypatch, capsys, "--question", QUESTION, "--image", str(image), *search)
    path = tmp_path / "messages.json"

    def write(**source) -> bytes:
        content = [{"type": "image", **source}, {"type": "text", "text": QUESTION}]
        path.write_text(json.dumps([{"role": "user", "content": content}]))
        return path.read_bytes()

    write(path=str(image))
    (inside,) = answers(monkeypatch, capsys, "--messages", str(path), *search)
    monkeypatch.setattr(sys, "stdin", Stdin(write()))
    (beside,) = answers(monkeypatch, capsys, "--messages", "-", "--image", str(image), *search)
    assert without_times(inside) == without_times(beside) == without_times(want)


@pytest.mark.slow
def test_earlier_turns_change_the_answer(monkeypatch, capsys, tmp_path, image):
    messages = [
        {"role": "user", "content": [{"type": "image", "url": image.as_uri()}, {"type": "text", "text": QUESTION}]},
        {"role": "assistant", "content": "<CONCLUSION> 9 </CONCLUSION>"},
        {"role": "user", "content": "What is at a2?"},
    ]
    (tmp_path / "messages.json").write_text(json.dumps(messages))
    (answer,) = answers(monkeypatch, capsys, "--messages", str(tmp_path / "messages.json"))
    assert (answer["question"], answer["images"]) == ("What is at a2?", [image.as_uri()])
    (alone,) = answers(monkeypatch, capsys, "--question", "What is at a2?", "--image", str(image))
    assert answer["tokens"]["prompt"] > alone["tokens"]["prompt"]


@pytest.mark.parametrize(
    ("content", "given", "said"),
    [
        ("[]", ["--question", "Why?"], "--messages ends with the question: leave out --question"),
        ("[]", [], "there are no messages"),
        ("Hi", [], "is not JSON"),
        ('[{"role": "assistant", "content": "Hi"}]', [], "the last message is of role 'assistant'"),
        ('[{"role": "user", "content": [{"type": "image"}]}]', [], "1 images without a source, and 0 images are given"),
        ('[{"role": "user", "content": "<|eot_id|>"}]', [], "special token <|eot_id|>"),
        ('[{"role": "user", "content": "\\ud800"}]', [], "no valid character"),
        ('[{"role": "user", "content": "Hi"}]', ["--image", "no.png"], "0 images without a source, and 1 images"),
    ],
)
def test_messages_that_cannot_be_used_end_the_command(monkeypatch, capsys, tmp_path, content, given, said):
    path = tmp_path / "messages.json"
    path.write_text(content)
    code, out, err = run(monkeypatch, capsys, "--checkpoint", "shapes", "--messages", str(path), *given)
    assert (code, out) == (2, "") and said in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--format", "mulbery"], "there is no stage format mulbery: give llamav_o1, llava_cot"),
        (["--format", "./mulberry"], "mulberry does not exist"),
        (["--format", "llamav_o1"], "asks for its stages in several turns: give --search too"),
        (["--format", "llamav_o1", "--search", "majority_vote"], "cannot be sampled whole"),
    ],
)
def test_formats_that_cannot_be_used_end_the_command(monkeypatch, capsys, tmp_path, given, said):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(monkeypatch, capsys, "--checkpoint", "shapes", "--question", QUESTION, *given)
    assert (code, out) == (2, "") and said in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("name", in_tiers(["llamav_o1", "mulberry", "mine.yaml"], suite=["llamav_o1"]))
def test_a_format_goes_through_a_whole_search(monkeypatch, capsys, tmp_path, image, untrained, name):
    """Its stages are those of the answer, of the trace and of the page; the conclusion is the stage that it names."""
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text('stages: [{name: PLAN}, {name: SAY, opening: "Say:"}]\nconclusion: PLAN\n')
    given = ["--format", name, "--search", "stage_beam", "--num_candidates", "2", "--max_new_tokens", "8"]
    files = ["--trace", "trace.json", "--page", "page.html"]
    asked = ["--question", QUESTION, "--image", str(image)]
    (answer,) = answers(monkeypatch, capsys, *asked, *given, *files, checkpoint=str(untrained))
    (trace,) = json.loads(Path("trace.json").read_text())
    names = {"mine.yaml": ["PLAN", "SAY"], "mulberry": ["CAPTION", "RATIONALES", "REASONING", "CONCLUSION"]}
    stages = names.get(name, ["SUMMARY", "CAPTION", "REASONING", "CONCLUSION"])
    assert list(answer["stages"]) == [stage["stage"] for stage in trace["stages"]] == stages
    assert answer["conclusion"] == answer["stages"]["PLAN" if name == "mine.yaml" else "CONCLUSION"]
    assert trace["format"] == name.removesuffix(".yaml") and trace["question"] == QUESTION
    assert all(f"<h3>{stage.capitalize()}</h3>" in Path("page.html").read_text() for stage in stages)


@pytest.mark.slow
def test_four_turns_without_candidates(monkeypatch, capsys, image):
    given = ["--format", "llamav_o1", "--search", "greedy", "--question", QUESTION, "--image", str(image)]
    (answer,) = answers(monkeypatch, capsys, *given)
    assert list(answer["stages"]) == ["SUMMARY", "CAPTION", "REASONING", "CONCLUSION"]
    assert answer["conclusion"] == answer["stages"]["CONCLUSION"]
