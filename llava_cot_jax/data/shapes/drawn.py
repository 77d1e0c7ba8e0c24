"""Pictures of the shapes world, drawn and saved for somebody who has no picture at hand, with a question about each."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from llava_cot_jax.data.shapes.rows import ShapesRows
from llava_cot_jax.errors import UserError


@dataclass(frozen=True)
class DrawnQuestion:
    """A question about a picture that was drawn.

    Attributes:
        image: the file of the picture, a PNG of 48 x 48 pixels.
        question: what is asked about it.
        answer: the right answer, a word or two.
    """

    image: Path
    question: str
    answer: str


def draw_questions(folder: Path, count: int, seed: int) -> list[DrawnQuestion]:
    """Draw pictures of the test split, in which no picture is one that the package's own model was trained on.

    Questions of the four types take turns. The same seed draws the same pictures and asks the same questions.

    Args:
        folder: where the pictures are saved; made where there is none.
        count: how many pictures.
        seed: of the pictures.

    Raises:
        UserError: fewer than one picture, a negative seed, or a folder that cannot be written.
    """
    if count < 1:
        raise UserError(f"draw is {count}; it must be at least 1")
    rows = ShapesRows("test", seed=seed, size=count)
    drawn = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            row, path = rows[index], folder / f"shapes-{seed}-{index}.png"
            assert isinstance(row.image, Image.Image)
            row.image.save(path)
            drawn.append(DrawnQuestion(path, row.turns[0].question, rows.answer(index)))
    except OSError as fault:
        raise UserError(f"the pictures cannot be written to {folder}: {fault.strerror or fault}") from None
    return drawn
