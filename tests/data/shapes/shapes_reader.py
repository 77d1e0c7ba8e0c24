"""Reader of pictures, questions and answers of the shapes world that uses none of its code."""

import re

import numpy as np
from PIL import Image

Seen = dict[str, tuple[str, str]]
"""(colour, shape) by cell, in reading order."""

RGB = {"red": (210, 45, 45), "yellow": (230, 200, 45), "green": (40, 165, 60), "blue": (50, 80, 210)}
GRID = ["a1", "a2", "a3", "b1", "b2", "b3", "c1", "c2", "c3"]
NUMBERS = ["zero", "one", "two", "three", "four", "five"]
OFFSETS = {"left of": -1, "right of": 1, "above": -3, "below": 3}


def read_picture(picture: Image.Image) -> Seen:
    """Return the content of each of the nine squares of 16 pixels."""
    pixels = np.asarray(picture, float)
    ground = np.median(pixels, axis=(0, 1))
    seen: Seen = {}
    for i, cell in enumerate(GRID):
        top, left = 16 * (i // 3), 16 * (i % 3)
        away = pixels[top : top + 16, left : left + 16] - ground
        far = np.abs(away).max(axis=2) > 90
        if far.sum() > 10:
            colour = np.median(away[far], axis=0)
            seen[cell] = (read_colour(colour + ground), read_shape(away @ colour > 0.5 * colour @ colour))
    return seen


def read_colour(rgb: np.ndarray) -> str:
    return min(RGB, key=lambda name: np.linalg.norm(rgb - np.array(RGB[name])))


def read_shape(there: np.ndarray) -> str:
    """Name the shape by the filled share of its bounding box: near the top, near the bottom, and in total."""
    rows, columns = np.flatnonzero(there.any(axis=1)), np.flatnonzero(there.any(axis=0))
    box = there[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    top, bottom = box[1].mean(), box[-2].mean()
    if bottom - top > 0.35:
        return "triangle"
    return "square" if top + bottom > 1.7 else "circle" if box.mean() > 0.6 else "star"


def members(group: str, seen: Seen) -> int:
    """Count the things of a group such as "red shapes" or "stars"."""
    name = group.removesuffix(" shapes") if group.endswith(" shapes") else group.removesuffix("s")
    return sum(name in thing for thing in seen.values())


def part(attribute: str, thing: tuple[str, str]) -> str:
    return {"": " ".join(thing), " colour": thing[0], " shape": thing[1]}[attribute]


def solve(question: str, seen: Seen) -> str:
    """Answer the question. Fail where the picture lacks what the question presupposes."""
    if match := re.fullmatch(r"What( colour| shape|) is at (\w\d)\?", question):
        return part(match[1], seen[match[2]])
    if match := re.fullmatch(r"How many ([\w ]+) are there\?", question):
        return NUMBERS[members(match[1], seen)]
    if match := re.fullmatch(r"Are there more ([\w ]+) than ([\w ]+)\?", question):
        return "yes" if members(match[1], seen) > members(match[2], seen) else "no"
    match = re.fullmatch(
        r"What( colour| shape|) is directly (left of|right of|above|below) the (\w+) (\w+)\?", question
    )
    assert match, question
    return part(match[1], seen[beside(match[2], find(match[3], match[4], seen))])


def find(colour: str, shape: str, seen: Seen) -> str:
    (cell,) = (cell for cell, thing in seen.items() if thing == (colour, shape))
    return cell


def beside(direction: str, cell: str) -> str:
    i = GRID.index(cell)
    j = i + OFFSETS[direction]
    assert 0 <= j < 9 and (i // 3 == j // 3 or i % 3 == j % 3), "outside of the grid"
    return GRID[j]


def summarise(question: str) -> str:
    """Return the summary that belongs to a question."""
    for pattern, summary in (
        (r"What is at (\w\d)\?", r"find what is at \1"),
        (r"What (colour|shape) is at (\w\d)\?", r"find the \1 at \2"),
        (r"How many ([\w ]+) are there\?", r"count the \1"),
        (r"Are there more ([\w ]+) than ([\w ]+)\?", r"compare the \1 and the \2"),
        (r"What is directly ([\w ]+)\?", r"find what is \1"),
        (r"What (colour|shape) is directly ([\w ]+)\?", r"find the \1 \2"),
    ):
        if re.fullmatch(pattern, question):
            return re.sub(pattern, summary, question)
    raise AssertionError(question)


def is_true_reasoning(text: str, question: str, seen: Seen) -> bool:
    """Whether every step is true, no step is missing, and the result answers the question."""
    steps, _, result = text.rpartition(" so ")
    words = steps.split()
    if result != solve(question, seen):
        return False
    if match := re.search(r"at (\w\d)\?", question):
        return words == [match[1], *seen[match[1]]]
    if match := re.search(r"directly (left of|right of|above|below) the (\w+) (\w+)", question):
        cell = find(match[2], match[3], seen)
        other = beside(match[1], cell)
        return words == [match[2], match[3], cell, match[1].split()[0], other, *seen[other]]
    match = re.search(r"(?:more|many) ([\w ]+?)(?: than ([\w ]+)| are there)\?", question)
    assert match, question
    groups = [group for group in match.groups() if group]
    visited: Seen = {}
    for cell, word, *counts in (words[i : i + 2 + len(groups)] for i in range(0, len(words), 2 + len(groups))):
        if cell not in seen or word != seen[cell]["shapes" not in groups[0]]:
            return False
        visited[cell] = seen[cell]
        if counts != [NUMBERS[members(group, visited)] for group in groups]:
            return False
    return list(visited) == list(seen)


def is_true(stage: str, text: str, question: str, seen: Seen) -> bool:
    """Whether the body of a stage is true of the picture, and complete."""
    match stage:
        case "SUMMARY":
            return text == summarise(question)
        case "CAPTION":
            words = text.split()
            listed = {words[i]: (words[i + 1], words[i + 2]) for i in range(0, len(words), 3)}
            return list(listed.items()) == list(seen.items())
        case "REASONING":
            return is_true_reasoning(text, question, seen)
    return text == solve(question, seen)
