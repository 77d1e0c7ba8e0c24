"""Files in the layouts of the published benchmarks, with their quirks, and answers that no model gave."""

import base64
import csv
import io
from pathlib import Path

from PIL import Image

from llava_cot_jax.evaluation.benchmarks.predictions import MODEL_NAME, write_predictions
from llava_cot_jax.evaluation.benchmarks.published import PUBLISHED_BENCHMARKS
from llava_cot_jax.evaluation.benchmarks.question_tables import PublishedSet, read_published
from llava_cot_jax.stage_format import LLAVA_COT
from llava_cot_jax.stages import find_stages


def picture(number: int) -> str:
    """Return a small picture of its own in base64, which is longer than the index of another row may be."""
    image = Image.frombytes("RGB", (8, 8), bytes((number * 37 + place * 11) % 256 for place in range(192)))
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def write_tsv(path: Path, columns: str, rows: list[tuple]) -> Path:
    """Write a table with tabs. The columns are named with spaces between."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(columns.split())
        writer.writerows(rows)
    return path


def mmstar(folder: Path) -> Path:
    """Four rows: an option that says None, which vanishes, and a column of numbers, of which 7 is asked as 7.0."""
    columns = "index question image answer A B C D category l2_category bench"
    rows = [
        (0, "Which colour?", picture(0), "A", "red", "blue", "None", 0.5, "coarse perception", "image_scene", "SEED"),
        (1, "How many?", picture(1), "D", "two", "three", "NA", 7, "math", "geometry", "MMMU"),
        (2, 'A "quoted"\nquestion?', f"['{picture(2)}', '{picture(0)}']", "B", "up", "down", "left", 1.25,
         "math", "x", ""),
        (3, "Which shape?", picture(0), "C", "star", "circle", "square", 2, "math", "geometry", "MMMU"),
    ]  # fmt: skip
    return write_tsv(folder / "MMStar.tsv", columns, rows)


def mmbench(folder: Path) -> Path:
    """Four questions with their rotations, each with the image of the one before, and a hint in two of them."""
    columns = "index question hint A B C D answer category image source l2-category comment split"
    questions = [
        (5, "What is it?", "It shines.", ["sun", "moon", "", ""], "image_scene", "coarse_perception"),
        (7, "Where is it?", "", ["left", "right", "=1+1", "4"], "image_style", "coarse_perception"),
        (11, "Why?", "", ["because", "never", "always", ""], "physical_relation", "relation_reasoning"),
        (12, "Who?", "A hint.", ["Ann", "Bob", "", ""], "physical_relation", "relation_reasoning"),
    ]
    rows = []
    for index, question, hint, options, category, ability in questions:
        filled = [option for option in options if option]
        for turn in range(len(filled)):
            turned = filled[turn:] + filled[:turn] + [""] * (4 - len(filled))
            answer = "ABCD"[turned.index(filled[0])]
            number = index + turn * 1_000_000
            image = str(number - 1_000_000) if turn else picture(index)
            rows.append((number, question, hint, *turned, answer, category, image, "made", ability, "", "dev"))
    return write_tsv(folder / "MMBench_DEV_EN_V11.tsv", columns, rows)


def ai2d(folder: Path) -> Path:
    """Three rows, of which two are about one diagram."""
    columns = "index image question answer A B C D category abcLabel image_path"
    rows = [
        (0, picture(0), "Which part is A?", "B", "leaf", "root", "stem", "seed", "partsOfA", True, "0.png"),
        (1, picture(0), "What eats it?", "C", "fox", "hawk", "hare", "owl", "foodChainsWebs", False, "0.png"),
        (2, picture(2), "Which is next?", "A", "1", "2", "3", "4", "partsOfA", False, "2.png"),
    ]
    return write_tsv(folder / "AI2D_TEST.tsv", columns, rows)


def hallusionbench(folder: Path) -> Path:
    """Seven rows with images, about two figures of each of two kinds, and one row without an image."""
    columns = "index image question answer category l2-category image_path"
    rows = [
        ("VD_illusion_0_0_1_0", picture(1), "Is the left one larger?", "Yes", "VD", "VD_illusion", "1.png"),
        ("VD_illusion_0_0_1_1", picture(1), "Is the right one larger?", "No", "VD", "VD_illusion", "1.png"),
        ("VD_illusion_0_0_2_0", picture(2), "Is the left one larger?", "No", "VD", "VD_illusion", "2.png"),
        ("VD_illusion_0_0_2_1", picture(2), "Is the right one larger?", "Yes", "VD", "VD_illusion", "2.png"),
        ("VS_chart_0_0_0_0", "", "Is it so in general?", "Yes", "VS", "VS_chart", ""),
        ("VS_chart_0_0_1_0", picture(3), "Does it rise?", "Yes", "VS", "VS_chart", "3.png"),
        ("VS_chart_0_0_2_0", picture(4), "Does it rise?", "No", "VS", "VS_chart", "4.png"),
        ("VS_chart_0_0_2_1", picture(4), "Does it fall?", "Yes", "VS", "VS_chart", "4.png"),
    ]
    return write_tsv(folder / "HallusionBench.tsv", columns, rows)


def mmvet(folder: Path) -> Path:
    """Four rows that need all six capabilities."""
    columns = "index image question answer category"
    rows = [
        ("v1_0", picture(0), "What is x in the equation?", "-1<AND>-5", "ocr,math"),
        ("v1_1", picture(1), "What is it called?", "a pug<OR>pug", "rec"),
        ("v1_2", picture(2), "Who stands left of it, and why?", "a man<AND>to look", "rec,know,gen,spat"),
        ("v1_3", picture(3), "What does it say?", "STOP", "ocr"),
    ]
    return write_tsv(folder / "MMVet.tsv", columns, rows)


def mathvista(folder: Path) -> Path:
    """Six rows: two with choices, and free answers that are whole numbers, decimals, and a list."""
    columns = "index image question question_type answer_type choices answer answer_option task skills precision"
    rows = [
        (1, picture(1), "Hint: letter.\nQuestion: Which?\nChoices:\n(A) 3/11\n(B) 8/11", "multi_choice", "text",
         "['3/11', '8/11']", "8/11", "B", "figure question answering",
         "['statistical reasoning', 'arithmetic reasoning']", ""),
        (2, picture(2), "Hint: letter.\nQuestion: Which?\nChoices:\n(A) yes\n(B) no", "multi_choice", "text",
         "['yes', 'no']", "no", "B", "geometry problem solving", "['geometry reasoning']", ""),
        (3, picture(3), "Hint: integer.\nQuestion: How many?", "free_form", "integer", "", "14", "",
         "math word problem", "['arithmetic reasoning']", ""),
        (4, picture(4), "Hint: integer.\nQuestion: How old?", "free_form", "integer", "", "7", "",
         "math word problem", "['arithmetic reasoning']", ""),
        (5, picture(5), "Hint: two decimals.\nQuestion: How long?", "free_form", "float", "", "1.45", "",
         "math word problem", "['arithmetic reasoning', 'numeric commonsense']", 2.0),
        (6, picture(6), "Hint: list.\nQuestion: Which years?", "free_form", "list", "", "[2007, 2008]", "",
         "figure question answering", "['statistical reasoning']", ""),
    ]  # fmt: skip
    return write_tsv(folder / "MathVista_MINI.tsv", columns, rows)


FILES = {
    "mmstar": mmstar,
    "mmbench_dev_en_v11": mmbench,
    "ai2d": ai2d,
    "hallusionbench": hallusionbench,
    "mmvet": mmvet,
    "mathvista": mathvista,
}
"""Functions that write the file of a benchmark to a folder, by the benchmark's name."""


def staged(conclusion: str) -> str:
    """Return a whole staged answer, whose other stages speak of all options."""
    stages = {"SUMMARY": "A or B, yes or no", "CAPTION": "C and D", "REASONING": "It is A, B, C or D; 1 or 2."}
    return "\n\n".join(f"<{name}> {text} </{name}>" for name, text in (stages | {"CONCLUSION": conclusion}).items())


def answer_row(index: int | str, conclusion: str | None) -> dict:
    """Return the row of an answer as an evaluation stores it; None stands for a question without an answer."""
    if conclusion is None:
        return {"id": index, "error": "the image is damaged"}
    return {"id": index, "text": staged(conclusion), "stages": find_stages(staged(conclusion))}


def questions_of(name: str, folder: Path, prompts: str = "vlmevalkit", limit: int | None = None) -> PublishedSet:
    """Write the file of a benchmark to a folder, and read it."""
    return read_published(name, str(FILES[name](folder)), limit, prompts, seed=0)


def planted(questions: PublishedSet, folder: Path, conclusions: list[str | None]) -> Path:
    """Write predictions with these conclusions, one a question, to a folder of an evaluation."""
    dataset = PUBLISHED_BENCHMARKS[questions.name].dataset
    rows = [answer_row(row.id, text) for row, text in zip(questions.rows, conclusions, strict=True)]
    path = folder / "vlmevalkit" / f"{MODEL_NAME}_{dataset}.xlsx"
    write_predictions(path, questions.table, rows, LLAVA_COT)
    return path
