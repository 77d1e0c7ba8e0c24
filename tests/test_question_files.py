"""``generate --questions``: files of questions and answers, and what an interruption leaves."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from llava_cot_jax import cli
from llava_cot_jax.data.shapes.rows import ShapesRows
from llava_cot_jax.errors import UserError
from llava_cot_jax.files import write_json
from llava_cot_jax.generate import main
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.paths import BUNDLED_MODEL_FOLDER
from llava_cot_jax.question_files import AnsweredQuestion, AnswerFile, files_digest, read_question_rows

SETTINGS = {"search": "Greedy()", "seed": 0}

TWO_PROCESSES = ["--hosts.coordinator", "localhost:1", "--hosts.count", "2", "--hosts.index", "0"]

COUNT = 30
"""Number of questions."""


def write_rows(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    """Thirty questions about pictures in a folder beside the file; the fifth picture is missing."""
    folder = tmp_path_factory.mktemp("questions")
    (folder / "pictures").mkdir()
    rows = []
    for i in range(COUNT):
        row, image = ShapesRows("test")[i], f"pictures/{i}.png"
        if i != 4:
            row.images[0].save(folder / image)
        rows.append({"id": i, "question": row.turns[0].question.replace("<image>", "").strip(), "image": image})
    rows[1] |= {"seed": 7, "id": "one"}
    rows[2] = {"id": 2, "question": "What do you see?", "images": []}
    return write_rows(folder / "questions.jsonl", rows)


def arguments(questions: Path, output: Path, *more: str) -> list[str]:
    search = ["--search", "sample", "--max_new_tokens", "90"]
    return ["--questions", str(questions), "--output", str(output), "--slots", "3", *search, *more]


def by_id(rows: list[dict]) -> dict:
    return {row["id"]: row for row in rows}


@pytest.fixture(scope="module")
def answered(questions, tmp_path_factory) -> list[dict]:
    """The rows of an uninterrupted run."""
    output = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    main(arguments(questions, output))
    return read_lines(output)


@pytest.mark.slow
def test_a_file_of_questions_is_answered(questions, answered, capsys):
    """A row has what ``--json`` says of the same question alone; the question whose picture is missing has an error."""
    rows = by_id(answered)
    assert [row["id"] for row in answered] == [0, "one", *range(2, COUNT)]
    assert rows[4].keys() == {"id", "question", "images", "seed", "error"}
    assert rows[4]["error"].endswith("pictures/4.png does not exist")
    for i, seed in ((0, 0), ("one", 7)):
        row = rows[i]
        image, search = str(questions.parent / row["images"][0]), arguments(questions, Path())[6:]
        main(["--image", image, "--question", row["question"], "--seed", str(seed), *search, "--json", "true"])
        report = json.loads(capsys.readouterr().out)
        for key in ("question", "seed", "text", "conclusion", "stages", "ended", "tokens", "forced_stages"):
            assert row[key] == report[key], key
    assert rows[2]["images"] == [] and rows[2]["text"] and "files_digest" not in rows[2]
    assert rows[0]["files_digest"] == files_digest([str(questions.parent / rows[0]["images"][0])])


@pytest.mark.slow
@pytest.mark.exhaustive
def test_all_devices_answer_as_one_does(questions, untrained, tmp_path, capsys, all_devices):
    """The answers to a file of questions, and to one of its questions alone."""
    few = questions.with_name("few.jsonl")
    few.write_text("".join(questions.read_text().splitlines(True)[:2]))
    model = ["--checkpoint", str(untrained), "--max_new_tokens", "6"]
    for name, more in (("all", []), ("one", ["--mesh.data", "1"])):
        main([*arguments(few, tmp_path / name), *model, *more])
    rows = read_lines(tmp_path / "all")
    assert rows == read_lines(tmp_path / "one")
    image = str(questions.parent / rows[0]["images"][0])
    capsys.readouterr()
    main(["--image", image, "--question", rows[0]["question"], "--search", "sample", *model, "--json", "true"])
    assert json.loads(capsys.readouterr().out)["text"] == rows[0]["text"]


@pytest.mark.slow
def test_a_second_run_asks_nothing_and_loads_no_weights(questions, answered, tmp_path, capsys):
    output = tmp_path / "answers.jsonl"
    main(arguments(questions, output, "--checkpoint", "shapes"))
    before = output.read_bytes()
    capsys.readouterr()
    main(arguments(questions, output, "--checkpoint", "shapes"))
    assert output.read_bytes() == before
    output.write_bytes(b"".join(reversed(before.splitlines(True))))  # as a kill before the end leaves it
    main(arguments(questions, output, "--checkpoint", "shapes"))
    assert output.read_bytes() == before
    assert f"{output} has the answers to all questions of {questions}" in capsys.readouterr().err
    output.write_text("".join(line for line in output.read_text().splitlines(True) if "error" not in line))
    main(arguments(questions, output, "--checkpoint", "shapes"))
    assert read_lines(output) == answered


@pytest.mark.slow
def test_a_killed_run_goes_on(questions, answered, tmp_path):
    """It is killed twice, and once its last line is torn. Each id has one row, that of an uninterrupted run."""
    output = tmp_path / "answers.jsonl"
    command = [sys.executable, "-m", "llava_cot_jax.generate", *arguments(questions, output)]
    done = 0
    for _ in range(2):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not output.exists() or output.read_bytes().count(b"\n") < done + 2:
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        lines = output.read_bytes().split(b"\n")
        done = len(lines) - 1
        assert 2 <= done < COUNT
        if not lines[-1]:
            output.write_bytes(output.read_bytes() + b'{"id": 11, "question": "What')
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert read_lines(output) == answered


@pytest.mark.slow
def test_a_job_without_any_answer_ends_with_code_1(tmp_path, monkeypatch):
    """Also where its questions were asked before; a single answer suffices."""
    rows = [{"id": i, "question": "What do you see?", "image": f"{i}.png"} for i in range(2)]
    lost = arguments(write_rows(tmp_path / "q.jsonl", rows), tmp_path / "a.jsonl", "--checkpoint", "shapes")
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"^none of 2 questions has an answer .*0.png does not exist.: delete"
        ) as told:
            main(lost)
        assert told.value.exit_code == 1 and "\n" not in str(told.value)
        monkeypatch.setattr(Mllama, "from_pretrained", lambda *_, **__: pytest.fail("the weights are loaded"))
    answered = read_lines(tmp_path / "a.jsonl")
    answered[0].pop("error")
    write_rows(tmp_path / "a.jsonl", answered)
    main(lost)


@pytest.mark.slow
def test_other_weights_at_the_same_path_are_refused(questions, tmp_path):
    """Also where all questions are answered, so that nothing would be computed."""
    checkpoint, output = tmp_path / "checkpoint", tmp_path / "answers.jsonl"
    shutil.copytree(BUNDLED_MODEL_FOLDER, checkpoint)
    one = write_rows(tmp_path / "q.jsonl", [{"id": 1, "question": "What do you see?"}])
    main(arguments(one, output, "--checkpoint", str(checkpoint)))
    (weights,) = checkpoint.glob("*.safetensors")
    tensors = load_file(weights)
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, weights, {"format": "pt"})
    with pytest.raises(UserError, match=r"answers.jsonl was begun with weights = \"\w+\", which is \"\w+\" now"):
        main(arguments(one, output, "--checkpoint", str(checkpoint)))


def test_another_setting_is_refused_before_the_weights_are_loaded(questions, tmp_path):
    output = tmp_path / "answers.jsonl"
    write_json(tmp_path / "answers.jsonl.settings.json", {"checkpoint": "shapes", "adapter": None})
    output.write_text('{"id": 0, "question": "What?"}\n')
    with pytest.raises(UserError, match=r'answers.jsonl was begun with convention = null, which is "meta" now'):
        main(arguments(questions, output))
    assert output.read_text() == '{"id": 0, "question": "What?"}\n'


def test_a_length_that_cannot_fit_is_refused_before_the_weights_are_loaded(questions, tmp_path, monkeypatch):
    monkeypatch.setattr(Mllama, "from_pretrained", lambda *_, **__: pytest.fail("the weights are loaded"))
    with pytest.raises(UserError, match="more than the context of 1024: shorten the question or lower max_new_tokens"):
        main(arguments(questions, tmp_path / "answers.jsonl", "--max_new_tokens", "1024"))


def test_rows_of_questions(tmp_path):
    path = write_rows(
        tmp_path / "q.jsonl",
        [
            {"id": "a", "question": "What?", "image": "x.png", "seed": 3},
            {"id": 2, "question": "Which?", "images": ["/y.png", "data:image/png;base64,AA=="]},
            {"id": 3, "question": "Why?", "image": None},
        ],
    )
    path.write_text("\n" + path.read_text() + "\n")
    rows = read_question_rows(path)
    assert [(row.id, row.question, row.seed, row.images) for row in rows] == [
        ("a", "What?", 3, ["x.png"]),
        (2, "Which?", None, ["/y.png", "data:image/png;base64,AA=="]),
        (3, "Why?", None, []),
    ]
    assert rows[0].sources == [str(tmp_path / "x.png")]
    assert rows[1].sources == ["/y.png", "data:image/png;base64,AA=="]


WRONG_ROWS = {
    "{": "line 2 is not JSON",
    "3": "line 2 is no JSON object, but 3",
    '{"question": "What?"}': "line 2: id is None; it must be a text or a whole number",
    '{"id": true, "question": "What?"}': "line 2: id is True",
    '{"id": 1.5, "question": "What?"}': "line 2: id is 1.5",
    '{"id": 2}': "line 2: question is None; it must be a text",
    '{"id": 2, "question": " "}': "line 2: question is ' '; it must be a text",
    '{"id": 2, "question": "What?", "imge": "x.png"}': "line 2 has the key 'imge'; the keys of a question are id, ques",
    '{"id": 2, "question": "What?", "image": 3}': r"line 2: images is \[3\], a list; it must be a list of paths",
    '{"id": 2, "question": "What?", "images": "x.png"}': "line 2: images is 'x.png'; it must be a list of paths",
    '{"id": 2, "question": "What?", "image": "x", "images": []}': "line 2 has both image and images",
    '{"id": 2, "question": "What?", "seed": -1}': "line 2: seed is -1; it must be a whole number from 0 to 4294967295",
    '{"id": 2, "question": "\\ud800"}': "line 2: question has no valid character at position 0",
    '{"id": "\\ud800", "question": "What?"}': "line 2: id has no valid character at position 0",
    "[" * 10**5: "line 2 is not JSON",
    '{"id": 1, "question": "What?"}': "line 2 has the id 1 of an earlier line: give each question an id of its own",
}


@pytest.mark.parametrize("line", WRONG_ROWS, ids=range(len(WRONG_ROWS)))
def test_rows_that_cannot_be_used(tmp_path, line):
    path = tmp_path / "q.jsonl"
    path.write_text('{"id": 1, "question": "What?"}\n' + line + "\n")
    with pytest.raises(UserError, match=WRONG_ROWS[line]) as told:
        read_question_rows(path)
    assert "\n" not in str(told.value)


def test_a_file_without_questions(tmp_path):
    (tmp_path / "q.jsonl").write_text("\n \n")
    with pytest.raises(UserError, match=r"q.jsonl has no questions: give one JSON object"):
        read_question_rows(tmp_path / "q.jsonl")
    with pytest.raises(UserError, match=r"none.jsonl does not exist"):
        read_question_rows(tmp_path / "none.jsonl")


def test_every_answer_is_kept_and_a_torn_one_dropped(tmp_path):
    """Wherever the last line is cut, what was written before it stays, and the next answer is whole."""
    path = tmp_path / "a.jsonl"
    with AnswerFile(path, SETTINGS) as file:
        file.append({"id": 1, "question": "What?", "images": [], "text": "\ud800 é\n"})
        first = path.read_bytes()  # on the disk already
        file.append({"id": "2", "question": "Which?", "images": ["x.png"]})
    both = path.read_bytes()
    assert both.startswith(first) and both.count(b"\n") == 2
    for end in range(len(first), len(both)):
        path.write_bytes(both[:end])
        with AnswerFile(path, SETTINGS) as file:
            assert file.known == {1: AnsweredQuestion("What?", [])}
            file.append({"id": "2", "question": "Which?", "images": ["x.png"]})
        assert path.read_bytes() == both


def test_one_process_at_a_time_writes_answers(tmp_path):
    path = tmp_path / "a.jsonl"
    with (
        AnswerFile(path, SETTINGS),
        pytest.raises(UserError, match=r"a.jsonl is being written by another process: name another output"),
    ):
        AnswerFile(path, SETTINGS)
    AnswerFile(path, SETTINGS).__exit__(None, None, None)


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        (None, {"seed": 1}, r"a.jsonl was begun with seed = 0, which is 1 now: give the same settings to go on"),
        (None, {"search": None}, r'begun with search = "Greedy\(\)", which is null now'),
        (None, {"new": 2}, r"begun with new = null, which is 2 now"),
        ("no JSON\n", {}, "a.jsonl, line 1 is no answer of this command: name another output"),
        ('{"text": 1}\n', {}, "line 1 is no answer of this command"),
        ("[]\n", {}, "line 1 is no answer of this command"),
    ],
)
def test_outputs_that_cannot_be_continued(tmp_path, content, settings, message):
    path = tmp_path / "a.jsonl"
    with AnswerFile(path, SETTINGS) as file:
        file.append({"id": 1, "question": "What?", "images": []})
    if content:
        path.write_text(content)
    before = path.read_bytes()
    with pytest.raises(UserError, match=message):
        AnswerFile(path, SETTINGS | settings)
    assert path.read_bytes() == before


def test_an_output_of_something_else(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": 1, "question": "What?", "images": []}\n')
    with pytest.raises(
        UserError, match=r"but a.jsonl.settings.json, which says how it was begun, does not: name anothe"
    ):
        AnswerFile(tmp_path / "a.jsonl", SETTINGS)
    with pytest.raises(UserError, match="it is a folder; name a file"):
        AnswerFile(tmp_path, SETTINGS)
    with pytest.raises(UserError, match="is in a bucket, where no line can be added to a file"):
        AnswerFile(cli.as_path("gs://bucket/a.jsonl"), SETTINGS)


def test_an_id_that_stands_for_another_question(tmp_path):
    rows = read_question_rows(write_rows(tmp_path / "q.jsonl", [{"id": 1, "question": "Which?"}]))
    with AnswerFile(tmp_path / "a.jsonl", SETTINGS) as file:
        assert file.unanswered(rows) == [0]
        for other in ({"question": "What?", "images": []}, {"question": "Which?", "images": ["x.png"]}):
            file.append({"id": 1, **other})
            with pytest.raises(
                UserError, match="has the answer to another question with the id 1: name another output"
            ):
                file.unanswered(rows)
        file.append({"id": 1, "question": "Which?", "images": []})
        assert file.unanswered(rows) == []


def test_a_seed_or_a_picture_that_changed_since(tmp_path):
    """Rows without a seed or a digest, as earlier versions wrote them, and pictures that are gone are accepted."""
    (tmp_path / "x.png").write_bytes(b"one")
    path = write_rows(tmp_path / "q.jsonl", [{"id": 1, "question": "Which?", "image": "x.png"}])
    (row,) = rows = read_question_rows(path)
    about = {"id": 1, "question": "Which?", "images": ["x.png"]}
    with AnswerFile(tmp_path / "old.jsonl", SETTINGS) as file:
        file.append(about)
        assert file.unanswered(rows, seed=4) == []
    with AnswerFile(tmp_path / "a.jsonl", SETTINGS) as file:
        file.append(about | {"seed": 3, "files_digest": files_digest(row.sources)})
        assert file.unanswered(rows, seed=3) == file.unanswered([replace(row, seed=3)], seed=4) == []
        with pytest.raises(UserError, match=r"a.jsonl has the answer to the id 1 by the seed 3, which is 4 now: name"):
            file.unanswered(rows, seed=4)
        (tmp_path / "x.png").write_bytes(b"two")
        with pytest.raises(UserError, match="the id 1 about other pictures, which have changed under the same names: "):
            file.unanswered(rows, seed=3)
        (tmp_path / "x.png").unlink()
        assert file.unanswered(rows, seed=3) == []


def test_two_answers_to_one_question_are_refused(tmp_path):
    with AnswerFile(tmp_path / "a.jsonl", SETTINGS) as file:
        for _ in range(2):
            file.append({"id": 1, "question": "Which?", "images": []})
    with pytest.raises(UserError, match=r"a.jsonl, line 2 has a second answer with the id 1: delete one"):
        AnswerFile(tmp_path / "a.jsonl", SETTINGS)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--questions", "q.jsonl"], "--questions needs --output: a JSONL file that takes the answers"),
        (["--output", "a.jsonl"], "--output takes the answers to a file of questions: give --questions too"),
        (["--questions", "q.jsonl", "--output", "a.jsonl", "--question", "What?"], "--question has no meaning with"),
        (["--questions", "q.jsonl", "--output", "a.jsonl", "--json", "true"], "--json has no meaning with --questions"),
        (["--questions", "q.jsonl", "--output", "a.jsonl", "--slots", "0"], "slots is 0; it must be at least 1"),
        (["--questions", "q.jsonl", "--output", "a.jsonl"], "q.jsonl does not exist"),
        (
            [*TWO_PROCESSES, "--question", "What?"],
            "there are 2 processes by the options of hosts, which can divide",
        ),
        ([*TWO_PROCESSES[:-1], "7", "--question", "What?"], "hosts.index is 7; with 2 processes it is 0 to 1"),
        (["--hosts.count", "2"], "give --hosts.coordinator and --hosts.index too, or none of the hosts' arguments"),
        (["--hosts.divide", "images"], "hosts.divide is 'images'; it must be one of questions, model"),
    ],
)
def test_options_that_cannot_be_used(tmp_path, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        main(more)
    assert not list(tmp_path.iterdir())
