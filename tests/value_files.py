"""Folders of values, as ``llava-cot rollout`` writes them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from llava_cot_jax.search.answers import Answer, join_stages, tagged_text
from llava_cot_jax.stage_format import LLAVA_COT


def candidate(text: str, value: float | None, score: float | None = None) -> dict[str, Any]:
    """Return a candidate of a stage."""
    right = None if value is None else round(value * 4)
    return {"text": text, "value": value, "right": right, "continuations": 4, "mean_log_prob": -0.5, "score": score}


def question(id: str, image: str | Sequence[str], stages: Mapping[str, Sequence[float | None]], right: Sequence[bool]):
    """Return a line of a question whose candidates of each stage, and whole answers, have these values."""
    images = [image] if isinstance(image, str) else list(image)
    won: list[str] = []
    rows = []
    for name, values in stages.items():
        texts = [f"<{name}> {i} red {id} </{name}>" for i in range(len(values))]
        candidates = [candidate(text, value) for text, value in zip(texts, values, strict=True)]
        rows.append({"stage": name, "before": join_stages(won), "winner": 0, "candidates": candidates})
        won.append(texts[0])
    answers = [
        {"text": join_stages([*won[:-1], f"<CONCLUSION> {i} </CONCLUSION>"]), "right": r, "score": None}
        for i, r in enumerate(right)
    ]
    return {
        "id": id,
        "question": f"What of {id}?",
        "images": images,
        "answer": "1",
        "match": "exact",
        "seed": 1,
        "format": "llava_cot",
        "stages": rows,
        "answers": answers,
    }


def searched_question(number: int, image: str, answer: Answer, values: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Return the line of a question that was searched, whose candidates of each stage are given these values."""
    won, stages = [], []
    for stage, given in zip(answer.trace.stages, values, strict=True):
        texts = [tagged_text(LLAVA_COT, stage.stage, each) for each in stage.candidates]
        candidates = [
            candidate(*each) for each in zip(texts, given, [each.score for each in stage.candidates], strict=True)
        ]
        stages.append(
            {"stage": stage.stage, "before": join_stages(won), "winner": stage.winner, "candidates": candidates}
        )
        won.append(texts[stage.winner])
    line = question(f"q{number}", image, {"SUMMARY": [1]}, [True, False])
    return line | {"question": answer.trace.question, "stages": stages}


def write_values(folder: Path, lines: Sequence[Mapping[str, Any]], images: Mapping[str, Image.Image]) -> Path:
    """Write a folder of values with its images by name, and return it."""
    folder.mkdir(parents=True)
    for name, image in images.items():
        (folder / name).parent.mkdir(exist_ok=True)
        image.save(folder / name)
    (folder / "values.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
