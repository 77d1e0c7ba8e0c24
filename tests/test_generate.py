"""The command ``generate``: its output, what it compiles, and its errors."""

import base64
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from transformers import MllamaForConditionalGeneration
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from llava_cot_jax import cli
from llava_cot_jax.data.shapes.rows import ShapesRows
from llava_cot_jax.files import read_json
from llava_cot_jax.generate import main
from llava_cot_jax.inference.generator import Generator
from llava_cot_jax.inference.screen import Screen
from llava_cot_jax.model import config as config_module
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.model.sharding import default_mesh
from llava_cot_jax.paths import BUNDLED_MODEL_FOLDER
from llava_cot_jax.processing.messages import user_turn
from llava_cot_jax.processing.processor import Processor
from llava_cot_jax.question_result import MORE_TOKENS, QuestionResult
from llava_cot_jax.questions import read_questions
from llava_cot_jax.search.reasoner import Reasoner
from llava_cot_jax.search.strategies import StageBeam
from llava_cot_jax.stage_format import LLAVA_COT, STAGES
from tests.demo import write_demo
from tests.parity.reference import and_then, logits_of, under
from tests.parity.test_transformers import OFF

QUESTION = "How many shapes are red?"


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder)
    Image.open(folder / "picture.png").resize((90, 200)).save(folder / "tall.jpg", quality=95)
    return folder


def arguments(demo: Path, *more: str) -> list[str]:
    return ["--checkpoint", str(demo), "--image", str(demo / "picture.png"), "--question", QUESTION, *more]


def cut(*stages: str) -> str:
    """The warning about stages that reach their limit."""
    return f"warning: {', '.join(stages)} cut at the limit of new tokens, and closed by the search: {MORE_TOKENS}\n"


def start_process(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "llava_cot_jax.generate", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def greedy_in_transformers(demo: Path, image: str, new: int) -> tuple[str, int]:
    """The greedy answer of transformers under ``meta``: its text, and its number of tokens.

    The tokens are the library's. In one pass without a cache, each is the likeliest after those before it.
    """
    processor = Processor.from_pretrained(demo)
    inputs = processor([processor.prompt(user_turn(QUESTION, 1))], [[demo / image]])
    ids = Generator(Mllama.from_pretrained(demo)).generate(inputs, max_new_tokens=new).astype(np.int64)
    pixels = MllamaImageProcessorPil.from_pretrained(demo)(Image.open(demo / image), return_tensors="np")
    inputs["pixel_values"] = pixels["pixel_values"]
    model = MllamaForConditionalGeneration.from_pretrained(demo, attn_implementation="eager").eval()
    with under("meta", model):
        logits = logits_of(model, and_then(inputs, ids))
    given = logits[0, inputs["input_ids"].shape[1] - 1 : -1]
    second, first = np.sort(given)[:, -2:].T
    assert (first - second).min() > 2 * OFF * np.abs(logits).max()  # or either could be right
    assert given.argmax(axis=-1).tolist() == ids[0].tolist()
    ends = [token in model.generation_config.eos_token_id for token in ids[0].tolist()]
    assert not any(ends[:-1]) and (ends[-1] or len(ends) == new)
    return processor.decode(ids[0]), len(ends)


@pytest.mark.slow
def test_an_end_token_that_config_json_does_not_name_ends_an_answer(tmp_path, capsys):
    folder = Path(shutil.copytree(BUNDLED_MODEL_FOLDER, tmp_path / "model"))
    config = read_json(folder / "config.json")
    config["text_config"]["eos_token_id"] = 465  # the model ends its answers with 473
    (folder / "config.json").write_text(json.dumps(config))
    main(["--checkpoint", str(folder), "--draw_to", str(tmp_path), "--max_new_tokens", "100", "--json"])
    assert json.loads(capsys.readouterr().out)["ended"] == "eos"


@pytest.mark.slow
def test_json_of_two_questions_in_a_process_of_its_own(demo):
    """A PNG and a JPEG; the answers are those of transformers, and the second one compiles nothing."""
    images = ["picture.png", "tall.jpg"]
    more = ["--json", "--max_new_tokens", "60"]
    given = ["--checkpoint", str(demo), "--question", QUESTION, QUESTION, "--image", *(str(demo / i) for i in images)]
    process = start_process(*given, *more)
    out, err = process.communicate()
    assert process.returncode == 0, err.decode()
    answers = [json.loads(line) for line in out.decode().splitlines()]
    assert len(answers) == 2
    for answer, image in zip(answers, images, strict=True):
        text, count = greedy_in_transformers(demo, image, 60)
        assert answer["text"] == text
        assert answer["tokens"]["new"] == count
        assert answer["stages"] == {}
        assert answer["images"] == [str(demo / image)]
        assert answer["ended"] == ("max_new_tokens" if count == 60 else "eos")
        assert 0 < answer["seconds"]["first_token"] <= answer["seconds"]["total"]
    assert answers[0]["compilations"] > 0
    assert answers[1]["compilations"] == 0


@pytest.mark.slow
def test_text_streams_as_it_comes(demo):
    """The beginning of an answer is printed while the process still generates the rest."""
    process = start_process(*arguments(demo, "--max_new_tokens", "4000", "--temperature", "2", "--seed", "4"))
    first = os.read(process.stdout.fileno(), 4096)
    working = process.poll() is None
    process.kill()
    process.communicate()
    assert first.strip()
    assert working


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """Run the command in this process, and return its exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["generate", *arguments])
    code = 0
    try:
        cli.run(main)
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.slow
def test_an_answer_without_stages_is_shown_whole(demo, monkeypatch, capsys):
    shown = run(monkeypatch, capsys, *arguments(demo, "--max_new_tokens", "40"))
    whole = run(monkeypatch, capsys, *arguments(demo, "--max_new_tokens", "40", "--show_reasoning"))
    answer = json.loads(run(monkeypatch, capsys, *arguments(demo, "--max_new_tokens", "40", "--json"))[1])
    assert shown[0] == whole[0] == 0
    assert shown[1] == whole[1] == answer["text"] + "\n"


@pytest.mark.slow
@pytest.mark.parametrize("convention", [None, "transformers_4"])
def test_config_json_is_read_once_and_is_the_same_for_model_and_processor(
    demo, monkeypatch, capsys, convention: str | None
):
    """The convention of the command reaches the processor, and the processor's configuration is the model's."""
    files, processors, models = [], [], []

    def counting_read(path: Path) -> dict[str, Any]:
        files.append(path.name)
        return read_json(path)

    def recording_init(self: Processor, config: MllamaConfig, tokenizer: Any) -> None:
        processors.append(config)
        make_processor(self, config, tokenizer)

    def recording_load(*given: Any, **options: Any) -> Mllama:
        models.append(load(*given, **options))
        return models[-1]

    make_processor, load = Processor.__init__, Mllama.from_pretrained
    monkeypatch.setattr(config_module, "read_json", counting_read)
    monkeypatch.setattr(Processor, "__init__", recording_init)
    monkeypatch.setattr(Mllama, "from_pretrained", recording_load)
    more = ["--convention", convention] if convention else []
    code, _, error = run(monkeypatch, capsys, *arguments(demo, "--max_new_tokens", "1", "--json", *more))
    assert code == 0, error
    assert files.count("config.json") == 1
    assert processors == [model.config for model in models] and len(models) == 1
    assert processors[0].convention == (convention or "meta")


@pytest.mark.slow
def test_settings_from_a_file_and_a_mesh(demo, monkeypatch, capsys, tmp_path):
    """The file's settings are used, later options override them, and a mesh samples the same tokens."""
    (tmp_path / "run.yaml").write_text(
        f"checkpoint: {demo}\nquestion: [{QUESTION}]\nmax_new_tokens: 24\ntemperature: 0.9\ntop_k: 50\nseed: 3\n"
        "mesh: {data: 1, fsdp: 1, tensor: 1}\n"
    )
    settings = ["--config", str(tmp_path / "run.yaml"), "--json"]
    one, again, other, spread = (
        json.loads(run(monkeypatch, capsys, *settings, *more)[1])
        for more in ([], [], ["--seed", "4"], ["--mesh.fsdp", "4", "--mesh.tensor", "2"])
    )
    assert one["text"] == again["text"] == spread["text"] != other["text"]
    assert one["tokens"] == {"prompt": spread["tokens"]["prompt"], "new": 24}
    assert (one["images"], one["seed"], other["seed"]) == ([], 3, 4)


@pytest.mark.slow
def test_the_default_length_shrinks_to_a_short_context(demo, tmp_path, monkeypatch, capsys):
    """The 2048 tokens that nobody gave are not refused, and where they cut the answer, a line says so."""
    folder = Path(shutil.copytree(demo, tmp_path / "short"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 64
    (folder / "config.json").write_text(json.dumps(config))
    code, out, err = run(monkeypatch, capsys, *arguments(folder, "--json"))
    answer = json.loads(out)
    assert code == 0 and answer["ended"] == "max_new_tokens" and sum(answer["tokens"].values()) == 64
    left = answer["tokens"]["new"]
    assert err.count("warning: ") == 1 and answer["bounded_by"] == "context"
    assert "warning: the answer was cut at what the prompt leaves of the model's context: shorten the question" in err
    code, _, err = run(monkeypatch, capsys, *arguments(folder, "--max_new_tokens", str(left + 1)))
    assert code == 2 and "exceeds the context of 64" in err


SEARCH = ["", "--search"]
"""Beginning of the arguments of a search, to which no --max_new_tokens is added."""


def without_a_tensor(demo: Path, folder: Path) -> Path:
    shutil.copytree(demo, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["language_model.lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("mistake", "named"),
    [
        (lambda d, t: ["--checkpoint", str(t / "none")], "none"),
        (lambda d, t: ["--checkpoint", "meta-llama/Llama-3.2-11B-Vision-Instruct"], "Llama-3.2-11B-Vision-Instruct"),
        (lambda d, t: ["--checkpoint", str(without_a_tensor(d, t / "less"))], "language_model.lm_head.weight"),
        (lambda d, t: ["--image", str(d / "config.json")], "config.json is not an image"),
        (lambda d, t: ["--image", str(t / "none.png")], "none.png does not exist"),
        (lambda d, t: ["--mesh.tensor", "4"], "does not divide"),
        (lambda d, t: ["--mesh.fsdp", "3"], "does not divide"),
        (lambda d, t: ["--mesh.data", "9"], "takes 9 devices; there are 8"),
        (lambda d, t: ["--question", "long " * 140_000], "context of 131072"),
        (lambda d, t: ["--max_new_tokens", "200000"], "context of 131072"),
        (lambda d, t: ["--max_new_tokens", "0"], "max_new_tokens"),
        (lambda d, t: ["--seed", "-1"], "seed"),
        (lambda d, t: ["--question", "<|eot_id|>"], "<|eot_id|>"),
        (lambda d, t: ["--temperature", "hot"], "temperature"),
        (lambda d, t: ["--temperature", "-1"], "temperature"),
        (lambda d, t: ["--temperature", "1", "--top_p", "0"], "top_p is 0.0; it must be above 0"),
        (lambda d, t: ["--convention", "mine"], "convention"),
        (lambda d, t: ["--num_candidates", "4"], "--num_candidates needs a search"),
        (lambda d, t: ["--trace", str(t / "x.json")], "--trace needs a search"),
        (lambda d, t: ["--temperature", "[0.1, 0.2]"], "--search stage_beam"),
        (lambda d, t: ["--search", "beam"], "search"),
        (lambda d, t: [*SEARCH, "greedy", "--max_new_tokens", "[4, 2]"], "--max_new_tokens takes one value"),
        (
            lambda d, t: [*SEARCH, "greedy", "--num_candidates", "4"],
            "--num_candidates has no meaning for --search greedy",
        ),
        (lambda d, t: [*SEARCH, "majority_vote", "--judge", "token"], "--judge has no meaning"),
        (lambda d, t: [*SEARCH, "weighted_vote", "--judge", "token"], "which is --judge verifier"),
        (lambda d, t: [*SEARCH, "best_of_n", "--num_candidates", "[4, 2]"], "--num_candidates takes one value"),
        (lambda d, t: [*SEARCH, "stage_beam", "--num_candidates", "[4, 2]"], "2 values for 4 stages"),
        (lambda d, t: [*SEARCH, "stage_beam", "--max_new_tokens", "0"], "max_new_tokens is 0; it must be at least 1"),
        (lambda d, t: [*SEARCH, "stage_beam", "--max_new_tokens", "200000"], "context of 131072"),
        (lambda d, t: [*SEARCH, "stage_beam", "--judge_prompts", str(t / "none.yaml")], "none.yaml"),
        (lambda d, t: [*SEARCH, "greedy", "--trace", str(d / "config.json" / "x.json")], "x.json cannot be written"),
        (lambda d, t: [*SEARCH, "greedy", "--trace", str(d)], "it is a folder; name a file"),
        (lambda d, t: [*SEARCH, "greedy", "--page", str(d)], "it is a folder; name a file"),
        (lambda d, t: [*SEARCH, "greedy", "--page", ""], "a path is empty"),
        (lambda d, t: ["--page", str(t / "x.html")], "--page needs a search"),
        (lambda d, t: ["--show_search"], "--show_search needs a search"),
        (lambda d, t: ["--live"], "--live needs a search"),
        (lambda d, t: ["--verifier_adapter", "none"], "--verifier_adapter is for the verifier, which no search here"),
        (lambda d, t: [*SEARCH, "stage_beam", "--verifier_adapter", "none"], "which no search here asks: give --judge"),
        (lambda d, t: [*SEARCH, "retracing", "--live"], "--live cannot show --search retracing: leave out --live, or"),
        (lambda d, t: ["--question", "a", "b", "--image", "a.png", "b.png", "c.png"], "3 images for 2 questions"),
        (lambda d, t: ["--image", "-", "--question", "-"], "standard input, -, can be read once"),
        (lambda d, t: ["--image", "data:image/png;base64,AAAA"], "the image of a data: URL of 26 characters is not an"),
        (lambda d, t: ["--question", "half \udc80"], "question has no valid character at position 5"),
        (lambda d, t: ["--config", str(t / "none.yaml")], "none.yaml"),
    ],
)
def test_a_mistake_ends_in_one_line_and_code_2(demo, tmp_path, monkeypatch, capsys, mistake, named):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    given = mistake(demo, tmp_path)
    given = given[1:] if given[0] == "" else ["--max_new_tokens", "8", *given]
    code, out, err = run(monkeypatch, capsys, *arguments(demo), *given)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert named in err


class Stdin(io.TextIOWrapper):
    """Standard input that has these bytes."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))


class TestQuestionsAndImages:
    """Where questions and images come from, and how several answers are told apart."""

    FEW = ("--max_new_tokens", "3", "--dtype", "float32")

    def answers(self, monkeypatch, capsys, demo: Path, *given: str) -> tuple[list[dict[str, Any]], str]:
        """The JSON objects and the text on stderr."""
        code, out, err = run(monkeypatch, capsys, "--checkpoint", str(demo), *self.FEW, "--json", *given)
        assert code == 0, err
        return [json.loads(line) for line in out.splitlines()], err

    @pytest.mark.slow
    @pytest.mark.exhaustive
    def test_several_images_of_one_question(self, demo, monkeypatch, capsys, all_devices):
        """The answer is that of the library, on all devices. URLs of files and data, and standard input, are files."""
        data = base64.b64encode((demo / "tall.jpg").read_bytes()).decode()
        monkeypatch.setattr(sys, "stdin", Stdin((demo / "picture.png").read_bytes()))
        urls = [(demo / "tall.jpg").as_uri(), f"data:image/jpeg;base64,{data}", "-"]
        (answer,), err = self.answers(monkeypatch, capsys, demo, "--question", QUESTION, "--image", *urls)
        assert [len(name) for name in answer["images"]] == [len(urls[0]), 63, 1]
        processor, images = Processor.from_pretrained(demo), [demo / "tall.jpg"] * 2 + [demo / "picture.png"]
        model = Mllama.from_pretrained(demo, dtype="float32", mesh=default_mesh(processor.config))
        inputs = processor([processor.prompt(user_turn(QUESTION, 3))], [images])
        (want,) = Generator(model, processor=processor).complete(inputs, max_new_tokens=3)
        assert answer["text"] == answer["conclusion"] == want.text
        assert (answer["seed"], answer["ended"], answer["forced_stages"]) == (0, "max_new_tokens", {})
        warning = f"warning: the answer was cut at the limit of new tokens: {MORE_TOKENS}\n"
        assert err.endswith(warning)

    def test_a_question_in_standard_input(self, demo, monkeypatch):
        monkeypatch.setattr(sys, "stdin", Stdin("Wie viele \u2013 rot?\n".encode()))
        monkeypatch.setenv("HOME", str(demo))
        long = f"{demo}{'/.' * 40}/picture.png"
        assert read_questions(["Which?"], [long])[0].images == [long]
        asked = read_questions(["-", "Which?"], ["~/picture.png"])
        assert [each.question for each in asked] == ["Wie viele \u2013 rot?", "Which?"]
        assert [each.sources for each in asked] == [["~/picture.png"]] * 2

    def test_a_standard_input_that_is_closed(self, demo):
        given = ["-m", "llava_cot_jax.generate", "--checkpoint", str(demo), "--question", "-"]
        ended = subprocess.run(["sh", "-c", '"$@" <&-', "sh", sys.executable, *given], capture_output=True, text=True)
        closed = "error: standard input is closed: - stands for what another command writes there\n"
        assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", closed)

    @pytest.mark.slow
    def test_a_question_and_a_file_in_a_terminal_that_is_not_utf8(self, demo, tmp_path):
        """Neither a question in UTF-8, nor the name of a file in other bytes, needs a locale."""
        picture = os.fsencode(tmp_path) + b"/gr\xf6\xdfer.png"
        shutil.copy(demo / "picture.png", picture)
        given = ["--checkpoint", str(demo), "--question", "gr\xf6\xdfer?".encode(), "--image", picture, "--json"]
        environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        command = [sys.executable, "-m", "llava_cot_jax.generate", *given, "--max_new_tokens", "2"]
        ended = subprocess.run(command, env=environment, capture_output=True, check=True)
        answer = json.loads(ended.stdout)
        assert answer["question"] == "gr\xf6\xdfer?"
        assert os.fsencode(answer["images"][0]) == picture

    def test_a_question_without_text(self, monkeypatch, capsys):
        """As a shell gives it for a variable that is not set."""
        code, _, err = run(monkeypatch, capsys, "--question", "")
        assert (code, err) == (2, "error: a question is empty: give its text after --question\n")

    @pytest.mark.parametrize(("content", "named"), [(b" \n", "standard input is empty"), (b"\xff", "no text in UTF-8")])
    def test_a_standard_input_that_has_none(self, demo, monkeypatch, capsys, content, named):
        monkeypatch.setattr(sys, "stdin", Stdin(content))
        code, _, err = run(monkeypatch, capsys, "--checkpoint", str(demo), "--question", "-")
        assert code == 2 and named in err and err.count("\n") == 1

    def test_several_answers_are_told_apart(self, demo, monkeypatch, capsys):
        given = ["--question", "How many?", "Which\none?", "--image", str(demo / "picture.png"), *self.FEW]
        code, out, err = run(monkeypatch, capsys, "--checkpoint", str(demo), *given)
        headers = [f"{question} ({demo / 'picture.png'})" for question in ("How many?", "Which one?")]
        lines = out.splitlines()
        assert code == 0 and lines[0] == headers[0] and headers[1] in lines[1:]
        for header in headers:
            assert f"warning: {header}: the answer was cut at the limit of new tokens" in err


@pytest.mark.parametrize(
    ("stages", "ended", "bound", "notes"),
    [
        ({}, "eos", "context", []),
        ({}, "max_new_tokens", "max_new_tokens", [f"the answer was cut at the limit of new tokens: {MORE_TOKENS}"]),
        ({"CAPTION": "eos"}, "tag", "context", ["CAPTION ended without a closing tag, which the search added"]),
        (
            {"SUMMARY": "max_new_tokens"},
            "tag",
            "context",
            [
                "SUMMARY cut at what the prompt leaves of the model's context, and closed by the search: shorten the "
                "question for the rest"
            ],
        ),
        (
            {"SUMMARY": "max_new_tokens", "CAPTION": "eos", "CONCLUSION": "max_new_tokens"},
            "max_new_tokens",
            "max_new_tokens",
            [cut("SUMMARY", "CONCLUSION")[9:-1], "CAPTION ended without a closing tag, which the search added"],
        ),
    ],
)
def test_how_an_answer_ended_is_told(stages, ended, bound, notes):
    assert QuestionResult("", "", {}, ended, {}, {}, stages, bound).notes(LLAVA_COT) == notes


def test_a_mistake_in_a_process_of_its_own(demo, tmp_path):
    process = start_process(*arguments(tmp_path / "none"))
    out, err = process.communicate()
    assert process.returncode == 2
    assert out == b""
    assert err.decode() == f"error: no such folder: {tmp_path / 'none'}\n"


STAGED = (
    "<SUMMARY> Count them. </SUMMARY>\n\n<CAPTION> Two. </CAPTION>\n\n"
    "<REASONING> 1 < 2. </REASONING>\n\n<CONCLUSION> It is 2 < 3. </CONCLUSION>"
)


def show(text: str, show_reasoning: bool, capsys) -> tuple[str, str]:
    """The stdout and stderr for an answer that comes a character at a time."""
    screen = Screen(show_reasoning)
    for end in range(1, len(text) + 1):
        screen.show(text[:end])
    screen.finish(text)
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_a_person_sees_the_stage_at_work_and_then_the_conclusion(capsys):
    out, err = show(STAGED, False, capsys)
    assert out == "It is 2 < 3.\n"
    assert err == "writing the summary\nwriting the caption\nwriting the reasoning\n"


@pytest.mark.parametrize(
    ("text", "show_reasoning"),
    [
        (STAGED, True),
        ("Two <b>shapes</b>.", False),
        ("", False),
        (STAGED[:60], False),  # broken off before the conclusion
        ("First of all. " + STAGED[:60], False),
    ],
)
def test_where_the_whole_answer_is_shown(text, show_reasoning, capsys):
    assert show(text, show_reasoning, capsys)[0] == text + "\n"


def test_the_conclusion_comes_as_it_is_written(capsys):
    screen, seen = Screen(False), []
    for end in range(1, len(STAGED) + 1):
        screen.show(STAGED[:end])
        seen.append(capsys.readouterr().out)
    assert sum(map(bool, seen)) > 5
    assert "".join(seen) == "It is 2 < 3."
    assert not np.any(["CONCL" in s for s in seen])


@pytest.mark.slow
def test_a_search_with_its_trace(demo, monkeypatch, capsys, tmp_path):
    """The command prints the answers of the library, and the trace holds the whole search of every question."""
    trace = tmp_path / "trace.json"
    search = [
        "--search",
        "stage_beam",
        "--num_candidates",
        "[3, 1, 2, 2]",
        "--max_new_tokens",
        "8",
        "--temperature",
        "0.9",
    ]
    given = ["--checkpoint", str(demo), "--question", QUESTION, "Which?", "--image", str(demo / "picture.png"), *search]
    code, out, err = run(monkeypatch, capsys, *given, "--seed", "4", "--json", "--trace", str(trace))
    assert code == 0, err
    answers, traces = [json.loads(line) for line in out.splitlines()], json.loads(trace.read_text())
    assert [t["question"] for t in traces] == [QUESTION, "Which?"]
    strategy = StageBeam((3, 1, 2, 2), max_new_tokens=8, temperature=0.9)
    model = Mllama.from_pretrained(demo)
    reasoner = Reasoner(model, Processor.from_pretrained(demo), strategy)
    for answer, told, question in zip(answers, traces, (QUESTION, "Which?"), strict=True):
        own = reasoner.answer(demo / "picture.png", question, seed=4)
        assert (answer["text"], answer["stages"], answer["tokens"]) == (own.text, own.stages, own.trace.tokens)
        del told["seconds"]
        assert told == json.loads(json.dumps({k: v for k, v in own.trace.to_dict().items() if k != "seconds"}))
        assert [len(stage["candidates"]) for stage in told["stages"]] == [3, 1, 2, 2]
        assert [len(stage["matches"]) for stage in told["stages"]] == [2, 0, 1, 1]
    assert answers[0]["compilations"] > answers[1]["compilations"] == 0
    assert not list(tmp_path.glob(".trace*"))
    # No stage of so few tokens closes its tag.
    assert [a["forced_stages"] for a in answers] == [dict.fromkeys(STAGES, "max_new_tokens")] * 2
    shown = run(monkeypatch, capsys, *given, "--seed", "4")
    headers = [f"{question} ({demo / 'picture.png'})" for question in (QUESTION, "Which?")]
    assert shown[1] == "".join(f"{h}\n{a['stages']['CONCLUSION']}\n" for h, a in zip(headers, answers, strict=True))
    assert shown[2] == "".join("searching\n" + cut(*STAGES).replace(": ", f": {h}: ", 1) for h in headers)
    assert [a["conclusion"] for a in answers] == [a["stages"]["CONCLUSION"] for a in answers]


@pytest.mark.slow
def test_ctrl_c_ends_a_search_that_compiles_or_runs(demo):
    code = (  # background jobs of a shell, and their children, ignore the signal
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "runpy.run_module('llava_cot_jax.generate', run_name='__main__')"
    )
    given = ["--checkpoint", str(demo), "--question", QUESTION, "--search", "stage_beam", "--max_new_tokens", "20000"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *given],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stderr.readline() == b"searching\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)  # the search would take hours
    assert (process.returncode, out, err) == (130, b"", b"interrupted\n")


class TestWithoutACheckpoint:
    """The small model of the package, asked about pictures that the command draws."""

    @pytest.mark.slow
    def test_it_is_named_and_asked_about_a_drawn_picture(self, monkeypatch, capsys, tmp_path):
        monkeypatch.chdir(tmp_path)
        code, out, err = run(monkeypatch, capsys)
        assert code == 0
        told = " ".join(err.split())
        assert "No --checkpoint was given: the small model of the package answers" in told
        row = ShapesRows("test", seed=0, size=1)[0]
        asked = row.turns[0].question
        question, answer, right = out.splitlines()
        assert question == f"{asked} (runs/pictures/shapes-0-0.png)"
        assert right == f"(the right answer: {ShapesRows('test').answer(0)})" and answer
        saved = Image.open(tmp_path / "runs/pictures/shapes-0-0.png")
        assert np.array_equal(np.asarray(saved), np.asarray(row.images[0]))
        # The picture on the disk is the one that was asked about.
        given = ["--checkpoint", "shapes", "--image", "runs/pictures/shapes-0-0.png", "--question", asked]
        again = run(monkeypatch, capsys, *given)
        assert again[:2] == (0, f"{answer}\n") and "No --checkpoint" not in again[2]

    @pytest.mark.slow
    def test_most_answers_are_right(self, monkeypatch, capsys, tmp_path):
        """Its accuracy is 5 in 6. Half of 40 answers would be more than four standard errors below."""
        given = ["--checkpoint", "shapes", "--draw", "40", "--draw_to", str(tmp_path), "--seed", "7", "--json"]
        answers = [json.loads(line) for line in run(monkeypatch, capsys, *given)[1].splitlines()]
        right = [answer["stages"]["CONCLUSION"] == answer["right_answer"] for answer in answers]
        assert len(right) == 40 and sum(right) > 20
        assert {Path(answer["images"][0]).name for answer in answers} == {f"shapes-7-{i}.png" for i in range(40)}

    @pytest.mark.slow
    @pytest.mark.parametrize("search", [[], ["--search", "greedy"]])
    def test_its_own_length_is_the_default(self, monkeypatch, capsys, tmp_path, search):
        """Its context holds no 2048 tokens."""
        given = ["--checkpoint", "shapes", "--draw_to", str(tmp_path), "--json", *search]
        assert json.loads(run(monkeypatch, capsys, *given)[1])["ended"] in ("eos", "tag")  # not cut off

    def test_an_image_without_a_question(self, demo, monkeypatch, capsys):
        code, _, err = run(monkeypatch, capsys, "--image", str(demo / "picture.png"))
        assert (code, err) == (2, "error: give --question: what is to be answered about the image\n")

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (["--draw", "0"], "draw is 0"),
            (["--seed", "-1"], "seed is -1"),
            (["--draw_to", "/proc/x"], "/proc/x cannot be"),
        ],
    )
    def test_what_cannot_be_drawn(self, monkeypatch, capsys, given, message):
        code, _, err = run(monkeypatch, capsys, *given)
        assert code == 2 and message in err and err.count("\n") == 1
