"""Published benchmarks: what is asked of their files, and the files of predictions, held to VLMEvalKit's own code."""

import base64
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas
import pytest
from PIL import Image

from llava_cot_jax.errors import UserError
from llava_cot_jax.evaluate import main
from llava_cot_jax.evaluation.benchmarks import kit_process
from llava_cot_jax.evaluation.benchmarks.kit_install import INSTALL_KIT, kit_fault
from llava_cot_jax.evaluation.benchmarks.predictions import READ_AS_MISSING, as_cell, write_predictions
from llava_cot_jax.evaluation.benchmarks.published import PUBLISHED_BENCHMARKS
from llava_cot_jax.evaluation.benchmarks.question_tables import read_published
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.processing.images import open_image
from llava_cot_jax.stage_format import LLAVA_COT
from llava_cot_jax.stages import find_stages
from tests.evaluation.benchmark_files import (
    FILES,
    ai2d,
    answer_row,
    mmbench,
    mmstar,
    mmvet,
    picture,
    questions_of,
    write_tsv,
)
from tests.evaluation.stand_in_judge import judge, mmvet_row
from tests.processes import ROOT, xla_flags

assert kit_fault() is None, f"these tests need VLMEvalKit: {INSTALL_KIT}"

ASKED_BY_THE_KIT = """
import importlib, importlib.util, json, sys
spec = importlib.util.spec_from_file_location("kit_process", sys.argv[1])
lean = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lean)
lean._prepare_imports()
asked = {}
for name, (module, scorer, dataset) in json.loads(sys.argv[2]).items():
    cls = getattr(importlib.import_module(module), scorer)
    cls.DATASET_MD5 = {}
    read = cls(dataset)
    rows = [(row["index"], read.build_prompt(row)) for _, row in read.data.iterrows()]
    asked[name] = [
        (index if isinstance(index, str) else int(index),
         [part["value"] for part in parts if part["type"] == "image"],
         [part["value"] for part in parts if part["type"] == "text"])
        for index, parts in rows
    ]
print(json.dumps(asked))
"""


@pytest.mark.slow
def test_each_question_is_asked_as_the_kit_asks_it(tmp_path):
    """Index, images and text of each row are those that the kit's own classes read out of the same file."""
    for write in FILES.values():
        write(tmp_path)
    scorers = {name: PUBLISHED_BENCHMARKS[name] for name in FILES}
    told = {name: (each.scorer.module, each.scorer.name, each.dataset) for name, each in scorers.items()}
    printed = subprocess.run(
        [sys.executable, "-c", ASKED_BY_THE_KIT, kit_process.__file__, json.dumps(told)],
        env=os.environ | {"LMUData": str(tmp_path)},
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    asked = json.loads(printed.splitlines()[-1])
    assert "A. red\nB. blue\nD. 0.5\nPlease" in asked["mmstar"][0][2][0] and "D. 7.0\n" in asked["mmstar"][1][2][0]
    assert len(asked["mmstar"][2][1]) == 2 and len(asked["hallusionbench"]) == 7
    for name in FILES:
        questions = questions_of(name, tmp_path)
        assert len(asked[name]) == len(questions.rows) == questions.total
        for row, (index, images, (text,)) in zip(questions.rows, asked[name], strict=True):
            assert (row.id, row.question, len(row.sources)) == (index, text, len(images))
            for source, image in zip(row.sources, images, strict=True):
                assert np.array_equal(open_image(source), Image.open(image))


def test_images_are_kept_once(tmp_path):
    """Rows that share an image have one and the same file, whether by its index or by equal cells."""
    first, second, third = questions_of("ai2d", tmp_path).rows
    assert first.sources[0] is second.sources[0] and first.images == second.images != third.images
    rows = questions_of("mmbench_dev_en_v11", tmp_path).rows
    assert len({id(row.sources[0]) for row in rows}) == 4 < len(rows)


def test_a_limit_takes_questions_with_all_their_rotations(tmp_path):
    """VLMEvalKit would count a question as right by those of its rotations alone that it finds."""
    table = pandas.read_csv(mmbench(tmp_path), sep="\t").sort_values("index")
    table.to_csv(tmp_path / "sorted.tsv", sep="\t", index=False)
    questions = read_published("mmbench_dev_en_v11", str(tmp_path / "sorted.tsv"), 2, "vlmevalkit", 0)
    assert [row.id for row in questions.rows] == [5, 7, 1_000_005, 1_000_007, 2_000_007, 3_000_007]
    assert questions.total == 11


def test_llava_cots_own_prompts(tmp_path):
    """They differ with AI2D alone, and only the first image is seen."""
    kit, own = (questions_of("ai2d", tmp_path, prompts).rows[1].question for prompts in ("vlmevalkit", "llava_cot"))
    assert (
        kit
        != own
        == (
            "Look at the diagram carefully, and answer this.\nWhat eats it?\nA. fox\nB. hawk\nC. hare\nD. owl\n"
            "Answer with the option alone."
        )
    )
    for name in FILES.keys() - {"ai2d"}:
        both = [questions_of(name, tmp_path, prompts).rows for prompts in ("vlmevalkit", "llava_cot")]
        assert [row.question for row in both[0]] == [row.question for row in both[1]]
        assert all(len(row.sources) == 1 for row in both[1])


def test_a_published_file_is_known_by_its_md5():
    spec = importlib.util.find_spec("vlmeval")
    source = "".join(
        (Path(spec.submodule_search_locations[0]) / "dataset" / name).read_text()
        for name in ("image_mcq.py", "image_yorn.py", "image_vqa.py")
    )
    for each in PUBLISHED_BENCHMARKS.values():
        (known,) = re.findall(rf"'{each.dataset}': '([0-9a-f]{{32}})'", source)
        assert known in each.md5s and len(each.md5s) == 1 + ("TEST" in each.dataset and each.is_circular)


NASTY = [
    "=1+1",
    "a\x08b\rc",
    "-14",
    "\tx",
    "x" * 40_000,
    "http://a.example",
    "7_x0041_8",
    "{=1}",
    "mailto:x",
    "internal:x",
    *READ_AS_MISSING,
]
"""Conclusions that a cell of an xlsx file, or pandas, would change."""


def test_predictions_are_read_back_as_they_are(tmp_path):
    """No conclusion becomes a missing cell, a formula or another text, also where the kit writes the file again."""
    path = write_tsv(tmp_path / "t.tsv", "index image question answer A B", [
        (number, picture(0), f"{number}?", "A", "x", "y") for number in range(len(NASTY) + 2)
    ])  # fmt: skip
    questions = read_published("mmstar", str(path), None, "vlmevalkit", 0)
    rows = [{"id": i, "text": text, "stages": {"CONCLUSION": text}} for i, text in enumerate(NASTY)]
    rows += [answer_row(len(NASTY), None), answer_row(len(NASTY) + 1, "</CONCLUSION>")]
    file = tmp_path / "made" / "p.xlsx"
    write_predictions(file, questions.table, rows, LLAVA_COT)
    for _ in range(2):
        read = pandas.read_excel(file)
        read.to_excel(file, index=False, engine="xlsxwriter")  # as the kit does
        assert list(read.columns) == ["index", "question", "answer", "A", "B", "prediction", "full_prediction"]
        found = [str(text) for text in read["prediction"]]
        assert "nan" not in [text for text, nasty in zip(found, NASTY, strict=False) if nasty != "nan"]
        assert found[-2] == "Z"
        for text, nasty in zip(found, NASTY, strict=False):
            assert text.split() == (nasty[:32_767].replace("\x08", " ").split() or ["Z"])


def test_what_is_read_as_missing():
    """Pandas reads these texts as missing, and none of them once it is a cell."""
    path = pandas.io.common.StringIO("\n".join(["text", *(f'"{text}"' for text in sorted(READ_AS_MISSING) if text)]))
    assert pandas.read_csv(path)["text"].isna().all()
    assert pandas._libs.parsers.STR_NA_VALUES == READ_AS_MISSING
    assert not {as_cell(text) for text in READ_AS_MISSING if text} & READ_AS_MISSING


JUDGE = ["--grader.url", "http://localhost:9", "--grader.model", "j"]
"""Options of a judge that nobody asks."""


@pytest.mark.parametrize(
    ("benchmark", "arguments", "message"),
    [
        ("mmstar", [], "--benchmark mmstar needs --data: its published file, MMStar.tsv"),
        ("mmstar", ["--data", "none.tsv"], "none.tsv does not exist"),
        ("mmstar", ["--data", "MMStar.tsv", "--match", "option"], "--match has no meaning with --benchmark mmstar"),
        (
            "mmstar",
            ["--data", "MMStar.tsv", "--tolerance", "0.1"],
            "--tolerance has no meaning with --benchmark mmstar",
        ),
        ("mmstar", ["--data", "MMStar.tsv", "--prompts", "own"], "--prompts is 'own'; "),
        ("mmstar", ["--data", "MMStar.tsv", "--limit", "0"], "limit is 0; it must be at least 1"),
        ("mmstar", ["--data", "MMVet.tsv"], "MMVet.tsv has no column A, so that it is no file of mmstar"),
        ("mmstar", ["--data", "ragged.tsv"], "ragged.tsv is no table with tabs: "),
        ("mmstar", ["--data", "."], " cannot be read: Is a directory"),
        ("mmstar", ["--data", "empty.tsv"], "empty.tsv is no table with tabs: No columns"),
        ("mmstar", ["--data", "picture.png"], "picture.png is no table with tabs: "),
        ("mmstar", ["--data", "header.tsv"], "header.tsv has no row with an image"),
        ("mmstar", ["--data", "foreign.tsv"], "row 1: its image is not in base64: string argument"),
        ("mmstar", ["--data", "padding.tsv"], "row 1: its image is not in base64: "),
        ("mmstar", ["--data", "listed.tsv"], "row 1: its images are no list of texts"),
        ("mmstar", ["--data", "unanswered.tsv"], "unanswered.tsv has rows without a right answer"),
        ("mmstar", ["--data", "MMStar.tsv", "--grader.model", "j"], "--grader.model needs --grader.url"),
        ("mmvet", ["--data", "MMVet.tsv"], "is graded by a judge: give --grader.url and --grader.model"),
        (
            "mmvet",
            ["--data", "MMVet.tsv", "--limit", "2", *JUDGE],
            "with questions of all capabilities, so that it",
        ),
        ("mmbench_dev_en_v11", ["--data", "reference.tsv"], "row 1 has the image of row '7', which has none"),
        ("mmbench_dev_en_v11", ["--data", "texts.tsv"], "an index that is no whole number"),
        ("hallusionbench", ["--data", "index.tsv"], "has the index 0, whose parts between underscores do not name"),
        ("shapes", ["--data", "MMStar.tsv"], "--data needs a published benchmark: mmstar, mmbench_dev_en_v11, "),
        ("shapes", ["--grader.url", "http://localhost"], "--grader.url needs a published benchmark"),
        ("shapes", ["--grader.model", "j"], "--grader.model needs a published benchmark"),
        ("own.jsonl", ["--prompts", "llava_cot"], "--prompts needs a published benchmark"),
    ],
)
def test_what_cannot_be_asked(tmp_path, monkeypatch, benchmark, arguments, message):
    """It is refused in one line, before a model is looked for."""
    monkeypatch.chdir(tmp_path)
    mmstar(tmp_path), mmvet(tmp_path)
    options = "index image question answer A B category l2-category"
    write_tsv(tmp_path / "reference.tsv", options, [(0, "7", "?", "A", "x", "y", "c", "d")])
    write_tsv(tmp_path / "texts.tsv", options, [("a", picture(0), "?", "A", "x", "y", "c", "d")])
    write_tsv(tmp_path / "index.tsv", options, [(0, picture(0), "?", "Yes", "x", "y", "c", "d")])
    images = {"foreign": "é" * 80, "padding": "A" * 81, "listed": "[{[]: 1}]" + " " * 80, "header": None}
    for name, image in images.items():
        rows = [(0, image, "?", "A", "x", "y", "c", "d")] if image else []
        write_tsv(tmp_path / f"{name}.tsv", options, rows)
    write_tsv(tmp_path / "unanswered.tsv", options, [(0, picture(0), "?", "", "x", "y", "c", "d")])
    (tmp_path / "empty.tsv").touch()
    (tmp_path / "picture.png").write_bytes(base64.b64decode(picture(0)))
    (tmp_path / "ragged.tsv").write_text("a\tb\nc\nd\te\tf\tg\n")
    with pytest.raises(UserError) as told:
        main(["--benchmark", benchmark, "--output", "run", *arguments])
    assert message in str(told.value) and "\n" not in str(told.value)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def site_packages(tmp_path_factory):
    """Return a function that makes a folder of all installed packages but some, as another environment has them."""

    def make(*missing: str) -> Path:
        folder = tmp_path_factory.mktemp("site")
        for place in filter(lambda place: place.endswith("site-packages"), sys.path):
            for path in Path(place).iterdir():
                if not path.name.lower().replace("-", "_").startswith(missing):
                    (folder / path.name).symlink_to(path)
        return folder

    return make


def without(packages: Path, arguments: list[str], **environment: str) -> subprocess.CompletedProcess:
    """Run the command with the packages of a folder alone."""
    command = [sys.executable, "-S", "-m", "llava_cot_jax.evaluate", *arguments]
    own = {"PYTHONPATH": f"{ROOT}{os.pathsep}{packages}", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(devices=1)}
    return subprocess.run(command, env=os.environ | own | environment, capture_output=True, text=True, cwd=packages)


@pytest.mark.slow
def test_a_whole_evaluation_and_its_scores_elsewhere(tmp_path, site_packages, monkeypatch, capsys):
    """The small model answers and the kit scores; where the kit is missing, predictions and two commands remain."""
    data, output = ai2d(tmp_path), tmp_path / "my out.xlsx"  # whose end the kit would take for a file's
    arguments = ["--benchmark", "ai2d", "--data", str(data), "--output", str(output), "--max_new_tokens", "12"]
    main([*arguments, "--limit", "2"])
    printed = capsys.readouterr().out
    assert "VLMEvalKit 0.0.20, exact matching, scores from 0 to 1" in printed and "foodChainsWebs" in printed
    assert "These are 2 of 3 questions" in printed and "The file is not the published one" in printed
    main(arguments)
    printed = capsys.readouterr().out
    assert "of 3 questions" not in printed
    monkeypatch.setattr(Mllama, "from_pretrained", lambda *_, **__: pytest.fail("the weights are loaded"))
    rows = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
    assert all("right" not in row and row["scored"] and row["trace"]["seed"] == row["seed"] for row in rows)
    right = dict(zip([row["id"] for row in rows], "BCA", strict=True))
    for row in rows:
        text = f"<CONCLUSION> {right[row['id']]} </CONCLUSION>"
        row |= {"text": text, "stages": find_stages(text)}
    (output / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    main([*arguments, "--checkpoint", "shapes", "--page", str(tmp_path / "page.html")])
    assert "1.0000" in capsys.readouterr().out
    page = (tmp_path / "page.html").read_text()
    assert "VLMEvalKit 0.0.20, exact matching, scores from 0 to 1" in page and ">foodChainsWebs</th>" in page
    assert "answers are right" not in page and "the right answer</p>" not in page and "Right answer<" not in page
    result = json.loads((output / "result.json").read_text())
    assert result["scores"]["tables"]["accuracy"] == [
        {"split": "none", "Overall": 1, "foodChainsWebs": 1, "partsOfA": 1}
    ]
    assert (result["published"], result["questions"]) == (False, {"asked": 3, "of": 3, "unanswered": 0})
    assert (result["run"]["prompts"], result["run"]["checkpoint"], result["run"]["seed"]) == ("vlmevalkit", "shapes", 0)
    assert len(result["md5"]) == 32 and len(result["sha256"]) == 64 and "accuracy" not in result
    read = pandas.read_excel(output / "vlmevalkit" / "llava_cot_jax_AI2D_TEST.xlsx")
    assert list(read["prediction"]) == ["B", "C", "A"] and read["full_prediction"][0] == "<CONCLUSION> B </CONCLUSION>"
    with pytest.raises(UserError, match='begun with prompts = "vlmevalkit", which is "llava_cot" now'):
        main([*arguments, "--prompts", "llava_cot"])

    there = without(site_packages("vlmeval", "ms_vlmeval"), arguments)
    assert there.returncode == 0, there.stderr
    assert "VLMEvalKit 0.0.20 is needed, and it is not installed. To install it: pip install --no-deps" in there.stdout
    predictions = output / "vlmevalkit" / "llava_cot_jax_AI2D_TEST.xlsx"
    assert f"vlmutil eval '{predictions}' --judge exact_matching" in there.stdout and "1.0000" not in there.stdout
    assert json.loads((output / "result.json").read_text())["scores"] is None
    shutil.rmtree(output)
    there = without(site_packages("pandas"), arguments)
    assert (there.returncode, there.stdout) == (2, "") and not output.exists()
    assert "--benchmark ai2d needs pandas: pip install 'llava-cot-jax[vlmevalkit]'" in there.stderr


KEY = "sk-never-to-be-seen"


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_scoring_that_is_killed_asks_nothing_twice(tmp_path):
    """Two grades come before the kill, and only the other two are asked for again; nobody else sees the key."""
    held = {"x"}

    def reply(text, before):
        right, _ = mmvet_row(text)
        if right in ("STOP", "a pug <OR> pug") and held:
            return 503, {"Retry-After": "30"}
        return "1.0" if right == "STOP" else "0.5"

    data = mmvet(tmp_path)
    output = tmp_path / "out"
    with judge(reply) as stand_in:
        arguments = ["--benchmark", "mmvet", "--data", str(data), "--output", str(output), "--max_new_tokens", "12"]
        arguments += ["--grader.url", stand_in.url, "--grader.model", "j"]
        command = [sys.executable, "-m", "llava_cot_jax.evaluate", *arguments]
        own = {"OPENAI_API_KEY": KEY, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(devices=1)}
        process = subprocess.Popen(command, env=os.environ | own, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        replies = output / "judge_replies.jsonl"
        while process.poll() is None:
            time.sleep(0.05)
            if len(stand_in.texts) == 4 and replies.read_bytes().count(b"\n") == 2:
                break
        listed = subprocess.run(["ps", "axww", "-o", "pid,ppid,args"], capture_output=True, text=True).stdout
        assert "kit_process.py" in listed and KEY not in listed
        children = [line.split()[0] for line in listed.splitlines() if line.split()[1] == str(process.pid)]
        (child,) = children
        assert KEY.encode() not in Path(f"/proc/{child}/environ").read_bytes()
        process.kill()
        told = b"".join(process.communicate())
        assert process.returncode == -9 and len(stand_in.texts) == 4
        assert json.loads((output / "result.json").read_text())["scores"] is None
        held.clear()
        again = subprocess.run(command, env=os.environ | own, capture_output=True, check=True)
        told += again.stdout + again.stderr
        rights = sorted(mmvet_row(text)[0] for text in stand_in.texts[4:])
        assert rights == ["STOP", "a pug <OR> pug"]
        assert [body["messages"][-1]["content"] for body in stand_in.bodies].count("hello") == 1
    assert stand_in.keys == {f"Bearer {KEY}"}
    assert "The judge was asked 4 questions: 4 requests, of which 2 had been answered" in again.stdout.decode()
    result = json.loads((output / "result.json").read_text())
    assert result["scores"]["tables"]["capabilities"][-1] == {"Category": "Overall", "tot": 4, "acc": 62.5}
    files = [path for path in output.rglob("*") if path.is_file()]
    assert len(files) > 8 and not [path for path in files if KEY.encode() in path.read_bytes()]
    assert KEY.encode() not in told
    assert sorted(path.name for path in (output / "vlmevalkit").glob("[!.]*")) == ["llava_cot_jax_MMVet.xlsx", "scored"]
