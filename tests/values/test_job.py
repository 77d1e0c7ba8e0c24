"""The job of giving values without a model: what is written of given continuations, and what is refused afterwards."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from jsonargparse import Namespace

from llava_cot_jax.data.rows import Row, Turn
from llava_cot_jax.data.settings import VerifierSettings
from llava_cot_jax.data.sources import open_training_rows
from llava_cot_jax.errors import UserError
from llava_cot_jax.evaluation.matching import RightAnswer
from llava_cot_jax.evaluation.question_sets import EvaluationSet, Matching
from llava_cot_jax.evaluation.results import cluster_of
from llava_cot_jax.evaluation.verifier.values import WHOLE_ANSWERS, read_values
from llava_cot_jax.inference.decoding import EndReason, Samples
from llava_cot_jax.rollout import _match
from llava_cot_jax.search.answers import Answer
from llava_cot_jax.search.prompts import DEFAULT_JUDGE_PROMPTS
from llava_cot_jax.search.rollout_search import RolledOutAnswer, RolloutResult, StageRollouts, WholeAnswer, _rolled_out
from llava_cot_jax.search.strategies import StageBeam
from llava_cot_jax.search.stream import StreamedAnswer
from llava_cot_jax.search.trace import CandidateTrace, StageTrace
from llava_cot_jax.search.verifier import StageScores
from llava_cot_jax.stage_format import LLAVA_COT, StageFormat
from llava_cot_jax.values.job import RolloutJob, value_answers, value_stages
from llava_cot_jax.values.questions import open_questions


def rolled_out(text: str = "<CONCLUSION> 4 </CONCLUSION>", is_cut: bool = False) -> list[StageRollouts]:
    """A search of one candidate a stage, with one continuation each."""
    answer = WholeAnswer(text, "4", is_cut)
    stage = StageRollouts("", [text], [[answer]], [-1.0], [(0.5, 0.0)], [(0.5, 0.0)], 0)
    return [stage] * len(LLAVA_COT.names)


def new_job(questions: EvaluationSet, folder: Path) -> RolloutJob:
    names = {"checkpoint": None, "adapter": None, "verifier_adapter": None, "dtype": None, "quantize": None}
    names |= {
        "judge_prompts": DEFAULT_JUDGE_PROMPTS,
        "seed": 0,
        "continuations": 1,
        "match": None,
        "tolerance": 0.0,
        "slots": 8,
    }
    model = SimpleNamespace(config=SimpleNamespace(convention="transformers_5"), stated_length=None, digests={})
    return RolloutJob(Namespace(**names), questions, folder, StageBeam(1), model)


def answer(job: RolloutJob, *, is_cut: bool = False) -> None:
    """Answer what is left to a job as ``rolled_out`` has it, and finish it."""
    for number in job.unanswered:
        found = RolledOutAnswer("", {}, "", None, rolled_out(is_cut=is_cut))
        job.keep(number, job._row(number, StreamedAnswer(0, None, found), None))
    job.finish()
    job._file.close()


@pytest.fixture
def own(tmp_path) -> Path:
    """A file of two questions about one image, and a folder that has the values of the first."""
    (tmp_path / "a.png").write_bytes(b"picture")
    rows = [{"id": i, "question": "How many?", "image": "a.png", "answer": 4} for i in range(2)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answer(new_job(opened(tmp_path, limit=1), tmp_path / "out"))
    return tmp_path


def opened(folder: Path, first: int = 0, limit: int | None = None) -> EvaluationSet:
    return open_questions(str(folder / "own.jsonl"), None, first, limit, Matching(), 0)


def test_more_questions_go_on(own):
    """The others are answered, and no line changes. The digests tell which questions are about the same images."""
    before = (own / "out" / "values.jsonl").read_text()
    answer(new_job(opened(own), own / "out"))
    first, second = map(json.loads, (own / "out" / "values.jsonl").read_text().splitlines())
    assert json.dumps(first) + "\n" == before and (own / "out" / "images" / "a.png").read_bytes() == b"picture"
    assert cluster_of(first) == cluster_of(second | {"images": ["images/of-another-name"]})


def test_changed_images_are_refused(own):
    (own / "a.png").write_bytes(b"another")
    with pytest.raises(UserError, match="the answer to the id 0 about other pictures"):
        new_job(opened(own), own / "out")
    job = new_job(opened(own, first=1), own / "out")
    with pytest.raises(UserError, match=r"images/a\.png is another picture than the question's"):
        answer(job)
    assert (own / "out" / "images" / "a.png").read_bytes() == b"picture"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 5}, "has values of the id 0 by answer = 4, which is 5 now: name another output"),
        ({"match": "exact"}, "by match = 'number', which is 'exact' now"),
        ({"answer": "A", "options": ["4", "5"], "match": "option"}, "by answer = 4, which is 'A' now"),
    ],
)
def test_changed_right_answers_are_refused(own, change, message):
    row = {"id": 0, "question": "How many?", "image": "a.png", "answer": 4} | change
    (own / "own.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=message):
        new_job(opened(own), own / "out")


class FewRows:
    """A data set of two rows, of which the record of the first is damaged."""

    def __init__(self, content: str = "x") -> None:
        self.fingerprint = f"{content}-train"

    def __len__(self) -> int:
        return 2

    def turns(self, index: int) -> tuple[Turn, ...]:
        return (Turn("How many?", "<CONCLUSION> 4 </CONCLUSION>", 1),)

    def __getitem__(self, index: int) -> Row:
        if index == 0:
            raise UserError("record 0 is damaged")
        return Row(f"row {index}", "few", (b"picture",), self.turns(index))


def data_rows(monkeypatch, folder: Path, rows: FewRows, limit: int | None = None) -> EvaluationSet:
    monkeypatch.setattr("llava_cot_jax.values.questions.open_rows", lambda data, split: rows)
    return open_questions(str(folder), None, 0, limit, Matching(), 0)


def test_a_damaged_record_has_an_error(monkeypatch, tmp_path):
    """It is told in its line, and the other questions are answered."""
    questions = data_rows(monkeypatch, tmp_path, FewRows())
    job = new_job(questions, tmp_path / "out")
    fault = StreamedAnswer(0, None, None, UserError("record 0 is damaged"))
    job.keep(0, job._row(0, fault, None))
    job.unanswered = [1]
    answer(job)
    rows = [json.loads(line) for line in (tmp_path / "out" / "values.jsonl").read_text().splitlines()]
    assert rows[0]["error"] == "record 0 is damaged" and rows[1]["stages"]


def test_other_data_is_refused_wherever_it_lies(monkeypatch, tmp_path):
    answer(new_job(data_rows(monkeypatch, tmp_path, LastRow()), tmp_path / "out"))
    moved = new_job(data_rows(monkeypatch, tmp_path / "moved", LastRow(), limit=1), tmp_path / "out")
    assert not moved.unanswered
    moved._file.close()
    with pytest.raises(UserError, match='was begun with data = "x-train", which is "y-train" now'):
        new_job(data_rows(monkeypatch, tmp_path, LastRow("y")), tmp_path / "out")


def test_no_answer_that_can_be_compared(monkeypatch, tmp_path):
    monkeypatch.setattr("llava_cot_jax.values.questions.open_rows", lambda data, split: FewRows())
    with pytest.raises(UserError, match=r"none of 2 rows of .* that can be compared as --match yes_no: name another"):
        open_questions(str(tmp_path), None, 0, None, Matching("yes_no"), 0)


class LastRow(FewRows):
    """A data set of one row."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Row:
        return super().__getitem__(index + 1)


def test_what_is_cut_is_not_right(own, caplog):
    (own / "own.jsonl").write_text(json.dumps({"id": "cut", "question": "How many?", "answer": 4}) + "\n")
    with caplog.at_level(logging.WARNING, "llava_cot_jax.rollout"):
        answer(new_job(opened(own), own / "out"), is_cut=True)
    assert "50.0% of the answers by which candidates have their values were cut" in caplog.text
    assert "--max_new_tokens" in caplog.text
    ended, cut = [value_stages(rolled_out(is_cut=is_cut), RightAnswer((4,), "number"), LLAVA_COT) for is_cut in (0, 1)]
    for found, right in ((ended, 1), (cut, 0)):
        (candidate,) = found["stages"][0]["candidates"]
        assert (candidate["value"], candidate["right"], candidate["cut"]) == (right, right, 1 - right)
        assert (found["answers"][0]["right"], found["answers"][0]["cut"]) == (bool(right), not right)


class Words:
    """A processor whose tokens are numbers of texts."""

    def __init__(self, *texts: str) -> None:
        self._texts = texts

    def decode(self, ids: list[int]) -> str:
        return "".join(self._texts[i] for i in ids)


def test_the_conclusion_is_the_one_that_the_search_takes():
    """Not one that the reasoning before it has in its text; and a continuation that ends within its length is whole."""
    format = StageFormat.tagged(("REASONING", "CONCLUSION"))
    aside = " It may say <CONCLUSION> 3 </CONCLUSION> and so on"
    candidates = [(aside, "max_new_tokens", " </REASONING>")], [(" 4 </CONCLUSION>", "tag", "")]
    traces = [
        StageTrace(name, [CandidateTrace(*each, 1, 0.0, 0.0, None, None) for each in texts], [], [], winner=0)
        for name, texts in zip(format.names, candidates, strict=True)
    ]
    ends = np.array([EndReason.TAG, EndReason.MAX_NEW_TOKENS])[None]
    samples = Samples(np.array([[[0, 1], [0, 9]]]), np.array([[2, 1]]), ends, ends, np.zeros((1, 2)))
    scores = StageScores(np.zeros(1), np.zeros(1), np.zeros(1))
    result = RolloutResult(None, 0, None, scores, 0, None, continuations=samples, answer_scores=scores)
    searched = Answer("", {}, "", SimpleNamespace(format=format, stages=traces))
    found = _rolled_out(Words(" 4", " </CONCLUSION>"), searched, [result] * 2).rollouts
    assert [(a.conclusion, a.is_cut) for a in found[0].answers[0]] == [("4", False), ("4", True)]
    assert [(a.conclusion, a.is_cut) for a in found[1].answers[0]] == [("4", False)]
    for right, values in ((4, [0.5, 1.0]), (3, [0.0, 0.0])):
        stages = value_stages(found, RightAnswer((right,), "number"), format)["stages"]
        assert [stage["candidates"][0]["value"] for stage in stages] == values


def test_a_function_of_ones_own(own, monkeypatch):
    (own / "my_rules.py").write_text("def is_right(text, right):\n    return text == 2 * str(right.answers[0])\n")
    monkeypatch.syspath_prepend(str(own))
    matching = Matching(_match("my_rules:is_right"))
    (known, _) = open_questions(str(own / "own.jsonl"), None, 0, None, matching, 0).known
    assert [known.right.accepts(text) for text in ("4", "44")] == [False, True] and known.right.match_name == "is_right"
    (own / "my_errors.py").write_text("def is_right(text, right):\n    return float(text) == 4\n")
    broken = RightAnswer((4,), _match("my_errors:is_right"))
    with pytest.raises(UserError, match=r"is_right fails with the conclusion 'about four' .*ValueError.* return False"):
        broken.accepts("about four")


@pytest.mark.parametrize(
    ("name", "content"), [("bad_syntax", "def f(:"), ("bad_name", "nothing"), (".relative", ""), ("gone", None)]
)
def test_a_module_that_cannot_be_imported(tmp_path, monkeypatch, name, content):
    if content is not None:
        (tmp_path / f"{name}.py").write_text(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=f"--match {name}:f: its module cannot be imported"):
        _match(f"{name}:f")


def test_whole_answers_are_told_with_the_number_of_their_draws(tmp_path):
    """Seven of eight answers are right, as they were drawn, and the measures of a verifier say so."""
    texts = [*[" <CONCLUSION> 4 </CONCLUSION>"] * 7, " <CONCLUSION> 5 </CONCLUSION>"]
    candidates = [CandidateTrace(text, "tag", "", 9, -9.0, -1.0, 0.5, 0.0) for text in texts]
    values = value_answers(candidates, RightAnswer((4,), "number"), LLAVA_COT)
    row = {"id": 0, "question": "How many?", "images": [], **values}
    (tmp_path / "values.jsonl").write_text(json.dumps(row) + "\n")
    (group,) = read_values(str(tmp_path)).parts[WHOLE_ANSWERS]
    assert [(text.draws, text.value) for text in group.texts] == [(7, 1.0), (1, 0.0)]
    rollouts = value_stages(rolled_out(), RightAnswer((4,), "number"), LLAVA_COT)
    assert [each["draws"] for each in rollouts["answers"]] == [len(LLAVA_COT.names)]


def test_values_of_the_test_split_are_not_trained_on(tmp_path):
    """The benchmark of the shapes world asks these very questions."""
    for split in ("test", "train"):
        questions = open_questions("shapes", split, 0, 1, Matching(), 0)
        answer(new_job(questions, tmp_path / split))
    with pytest.raises(UserError, match="line 1: the question is of the split test"):
        open_training_rows(str(tmp_path / "test"), VerifierSettings())
    row = json.loads((tmp_path / "train" / "values.jsonl").read_text())
    assert row["split"] == "train" and len(row["image_digests"]) == 1


def test_other_rows_of_one_file_are_another_job(own):
    """Two processes with different rows would answer each other's questions."""
    jobs = [new_job(opened(own, first, 1), own / f"of-{first}") for first in (0, 1)]
    first, second = (job.fields() for job in jobs)
    assert {name for name in first if first[name] != second[name]} == {"the digest of their ids"}
    for job in jobs:
        job._file.close()


def test_a_blank_line_is_no_row(own):
    """As an editor leaves, by which a line with an error was deleted."""
    file = own / "out" / "values.jsonl"
    file.write_text(f"\n{file.read_text()}\n")
    answer(new_job(opened(own), own / "out"))
    assert [json.loads(line)["id"] for line in file.read_text().splitlines()] == [0, 1]
    file.write_text(f"\n{file.read_text()}\n")
    with pytest.raises(UserError, match="nothing is left to learn from"):
        open_training_rows(str(own / "out"), VerifierSettings())
