"""Published benchmarks that VLMEvalKit scores: their files, and how their scores are computed and told."""

from dataclasses import dataclass

KIT_VERSION = "0.0.20"
"""Version of VLMEvalKit, as the package ms-vlmeval, whose classes score the benchmarks."""

PROMPTS = ("vlmevalkit", "llava_cot")
"""Names of the prompts with which a benchmark can be asked."""

OPTION_COLUMNS = ("index", "image", "question", "answer", "A", "B")
"""Columns that the file of a benchmark of multiple-choice questions must have."""


@dataclass(frozen=True)
class KitScorer:
    """Class of VLMEvalKit that scores predictions.

    Attributes:
        module: Module that has it.
        name: Name of the class.
        tables: Ends of the names of the files that take its scores, by the tables' names; the first is the one that
            is printed.
        columns: Columns that a benchmark's file must have.
        is_share: Whether its scores lie between 0 and 1, rather than between 0 and 100.
        needs_judge: Whether it scores nothing without a judge.
        unread: Words that say what becomes of a row whose reply of the judge cannot be read.
    """

    module: str
    name: str
    tables: dict[str, str]
    columns: tuple[str, ...]
    is_share: bool
    needs_judge: bool
    unread: str


_OPTIONS = KitScorer(
    module="vlmeval.dataset.image_mcq",
    name="ImageMCQDataset",
    tables={"accuracy": "_acc.csv"},
    columns=OPTION_COLUMNS,
    is_share=True,
    needs_judge=False,
    unread="VLMEvalKit chose an option for them at random",
)

_YES_NO = KitScorer(
    module="vlmeval.dataset.image_yorn",
    name="ImageYORNDataset",
    tables={"accuracy": "_score.csv"},
    columns=("index", "image", "question", "answer", "category", "l2-category"),
    is_share=False,
    needs_judge=False,
    unread="VLMEvalKit counted them as wrong",
)

_MM_VET = KitScorer(
    module="vlmeval.dataset.image_vqa",
    name="MMVet",
    tables={"capabilities": "_judge_score.csv", "combinations": "_judge_score_fine.csv"},
    columns=("index", "image", "question", "answer", "category"),
    is_share=False,
    needs_judge=True,
    unread="VLMEvalKit graded them 0",
)

_MATH_VISTA = KitScorer(
    module="vlmeval.dataset.image_vqa",
    name="MathVista",
    tables={"accuracy": "_judge_score.csv"},
    columns=(
        *("index", "image", "question", "answer", "question_type", "answer_type", "choices", "answer_option"),
        *("task", "skills"),
    ),
    is_share=False,
    needs_judge=True,
    unread="VLMEvalKit counted them as wrong",
)

MM_VET_CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")
"""Capabilities of MM-Vet, each of which at least one scored question must need."""


@dataclass(frozen=True)
class PublishedBenchmark:
    """Published benchmark that VLMEvalKit scores.

    Attributes:
        dataset: VLMEvalKit's name of it, which is that of its file too.
        scorer: Class that scores it.
        md5s: MD5 of each published state of its file.
        is_circular: Whether a question is asked with its options in every rotation, and is right if all answers are.
    """

    dataset: str
    scorer: KitScorer
    md5s: tuple[str, ...]
    is_circular: bool = False


def _mmbench(split: str, *md5s: str) -> PublishedBenchmark:
    return PublishedBenchmark(f"MMBench_{split}_V11", _OPTIONS, md5s, is_circular=True)


PUBLISHED_BENCHMARKS = {
    "mmstar": PublishedBenchmark("MMStar", _OPTIONS, ("e1ecd2140806c1b1bbf54b43372efb9e",)),
    "mmbench_dev_en_v11": _mmbench("DEV_EN", "30c05be8f2f347a50be25aa067248184"),
    # The files of both test splits were replaced by others, with the right answers in them, in June 2026.
    "mmbench_test_en_v11": _mmbench("TEST_EN", "8d1a704e791df6f5d9fb3ef782b65365", "26f0f15381a21720255091d3e0316ce6"),
    "mmbench_dev_cn_v11": _mmbench("DEV_CN", "593f9b5f6bea453d870a798b34ae4f37"),
    "mmbench_test_cn_v11": _mmbench("TEST_CN", "156e6569f9547afb16603eca16e85373", "74bbe4556dac745613c7cbe5ad787050"),
    "ai2d": PublishedBenchmark("AI2D_TEST", _OPTIONS, ("0f593e0d1c7df9a3d69bf1f947e71975",)),
    "ai2d_no_mask": PublishedBenchmark("AI2D_TEST_NO_MASK", _OPTIONS, ("fd8f463634d4fe9fbd23b876e8eea5be",)),
    "hallusionbench": PublishedBenchmark("HallusionBench", _YES_NO, ("0c23ac0dc9ef46832d7a24504f2a0c7c",)),
    "mmvet": PublishedBenchmark("MMVet", _MM_VET, ("748aa6d4aa9d4de798306a63718455e3",)),
    "mathvista": PublishedBenchmark("MathVista_MINI", _MATH_VISTA, ("f199b98e178e5a2a20e7048f5dcb0464",)),
}
"""Published benchmarks by their names in ``evaluate --benchmark``."""
