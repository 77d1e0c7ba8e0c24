"""Pictures of the shapes world that are drawn and saved as files, with a question about each."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from llava_cot_jax.data.shapes.rows import ShapesRows
from llava_cot_jax.errors import UserError
from llava_cot_jax.paths import writing_errors


@dataclass(frozen=True)
class DrawnQuestion:
    """A question about a drawn picture.

    Attributes:
        image: File of the picture, a PNG of 48 x 48 pixels.
        question: Text of the question.
        answer: Right answer, one word or two.
    """

    image: Path
    question: str
    answer: str


def draw_questions(folder: Path, count: int, seed: int) -> list[DrawnQuestion]:
    """Draw and save pictures of the test split, on which the package's own model was not trained.

    Questions of the four kinds take turns. The same seed gives the same pictures and questions.

    Args:
        folder: Folder where the pictures are saved. It is made if it does not exist.
        count: Number of pictures.
        seed: Seed of the pictures and questions.

    Raises:
        UserError: The count is less than one, the seed is negative, or the folder cannot be written.
    """
    if count < 1:
        raise UserError(f"draw is {count}; it must be at least 1")
    rows = ShapesRows("test", seed=seed, size=count)
    drawn = []
    with writing_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            row, path = rows[index], folder / f"shapes-{seed}-{index}.png"
            (picture,) = row.images
            assert isinstance(picture, Image.Image)
            picture.save(path)
            drawn.append(DrawnQuestion(path, row.turns[0].question, rows.answer(index)))
    return drawn
