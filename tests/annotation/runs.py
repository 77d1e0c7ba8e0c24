"""Runs of annotate against a stand-in endpoint, and good and bad responses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from llava_cot_jax import annotate
from llava_cot_jax.data.shapes.rows import ShapesRows
from tests.annotation.stand_in_endpoint import Asked, Response, StandIn, staged, well

KEY = "sk-secret-0123456789"


def rows_of(count: int) -> list[dict[str, Any]]:
    return [{"id": i, "image": "a.png", "question": f"Which is q{i}?", "answer": f"thing {i}"} for i in range(count)]


def write_input(folder: Path, rows: list[dict[str, Any]]) -> list[str]:
    """Write the rows and an image. Return the options that name them."""
    (folder / "images").mkdir(exist_ok=True)
    Image.new("RGB", (20, 10), "red").save(folder / "images" / "a.png")
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = {"input": "questions.jsonl", "images": "images", "output": "out.jsonl"}
    return [f"--{name}={folder / path}" for name, path in named.items()]


def write_world(folder: Path, count: int) -> list[str]:
    """Write rows of the shapes world with their short answers alone, the last with two turns. Return the options."""
    made, rows = ShapesRows("train", seed=1, size=32), []
    for number in [*range(count - 1), 28]:
        row = made[number]
        row.images[0].save(folder / f"{number}.png")
        turns = {"questions": [], "answers": []}
        for turn in row.turns:
            turns["questions"].append(turn.question)
            turns["answers"].append(turn.answer.rpartition("<CONCLUSION> ")[2].removesuffix(" </CONCLUSION>"))
        rows.append({"id": number, "image": f"{number}.png", **turns})
    assert len(rows[-1]["questions"]) == 2
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"--input={folder}/questions.jsonl", f"--images={folder}"]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(folder: Path, rows: list[dict[str, Any]], stand_in: StandIn, *options: str) -> None:
    annotate.main([*write_input(folder, rows), "--model", "stand-in", "--base_url", stand_in.url, *options])


def by_question(behaviours: dict[str, list[Response]], kind: str = "answer") -> Callable[[Asked], Response]:
    """Responses to the requests about a question in turn, and good ones after them and to all others."""
    left = {question: list(responses) for question, responses in behaviours.items()}

    def behave(asked: Asked) -> Response:
        waiting = left.get(asked.question, [])
        return waiting.pop(0) if waiting and asked.is_check == (kind == "check") else well(asked)

    return behave


BAD = {
    "missing section": Response(staged("x").replace("<CAPTION>", "").replace("</CAPTION>", "")),
    "wrong order": Response("\n".join(staged("x").split("\n\n")[::-1])),
    "text outside": Response("Sure!\n" + staged("x")),
    "section not closed": Response(staged("x").replace("</REASONING>", "")),
    "repeated tag": Response(staged("x") + "\n<CONCLUSION> y </CONCLUSION>"),
    "empty section": Response(staged("x", REASONING=" ")),
    "cut off": Response(staged("x"), finish="length"),
    "unusable characters": Response(staged("x\ud83d")),
    "refusal": Response("", refusal="I cannot help with that"),
    "wrong conclusion": Response(staged("another thing")),
}
