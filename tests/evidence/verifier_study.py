"""Train a verifier on what comes of a model's own candidates, and measure what its searches gain by it.

    python tests/evidence/verifier_study.py --ways --folder runs/study | tee tests/evidence/verifier_study.txt

The policy is the model of the package, trained further on right answers that are written with different care
(``write_annotations``): most leave out the shapes in the caption, the steps of the reasoning, or both. Without steps a
small model is often wrong, so that its sampled answers are right or wrong by the way that they are written in, and
there is something for a verifier to learn. The verifier is trained on values of the training split, the ways to train
it are compared on the validation split, and the searches on the test split.

A start has its own order of the annotators' answers, its own draws, and its own adapter. What was found is kept in
verifier_study.json beside this file, and is not measured again: delete the file, or some of its entries, to measure
anew. The folder keeps the runs, so that a call after an interruption goes on; runs with other settings need another
folder. A start takes about half an hour on one idle core, and the ways to train another. Needs ``pip install -e
'.[test]'``.
"""

import argparse
import datetime
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import Namespace
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from llava_cot_jax.data.shapes.questions import NUMBERS, answer_stages, tag  # noqa: E402
from llava_cot_jax.data.shapes.rows import ShapesRows  # noqa: E402
from llava_cot_jax.data.shapes.tokenizer import shapes_config  # noqa: E402
from llava_cot_jax.evaluation.comparison.derived import derived_row  # noqa: E402
from llava_cot_jax.evaluation.comparison.methods import Method, plan_runs  # noqa: E402
from llava_cot_jax.evaluation.job import scored_row  # noqa: E402
from llava_cot_jax.evaluation.matching import scored_text  # noqa: E402
from llava_cot_jax.evaluation.plotting import LINE_MARKERS  # noqa: E402
from llava_cot_jax.evaluation.question_sets import Matching, shapes_questions  # noqa: E402
from llava_cot_jax.evaluation.statistics import estimate_mean  # noqa: E402
from llava_cot_jax.files import write_json  # noqa: E402
from llava_cot_jax.search.options import SEARCH_OPTIONS  # noqa: E402
from llava_cot_jax.stages import find_stages  # noqa: E402
from tests.evidence.ablation import call, check_finished, commit, decoded, encoded  # noqa: E402

STARTS = (0, 1, 2)

FIRST_ANNOTATED, ANNOTATED = 20_000, 16_000
"""Rows of the training split that the annotators answer. Values are of the rows before them."""

DESCRIBES, STEPS_AFTER, STEPS_OTHERWISE = 0.4, 0.6, 0.2
"""Share of answers with a caption of every shape, and shares of those with and without it that reason in steps."""

VALUED, HELD_OUT, TESTED = 600, 300, 600
"""Number of questions of the training, the validation and the test split that a model answers."""

TEMPERATURE, LONGEST = 1.0, 100
"""Temperature of sampling, and largest number of tokens of a whole answer."""

SAMPLED = ("--temperature", str(TEMPERATURE), "--slots", "16")
IN_STAGES = ("--judge", "log_probability", "--num_candidates", "4", "--max_new_tokens", "[16,32,48,8]")
WHOLE = ("--search", "best_of_n", "--judge", "verifier", "--num_candidates", "8", "--max_new_tokens", str(LONGEST))

NUMBERS_OF_CANDIDATES = (2, 4, 8, 16)

SCORERS = ("log_probability", "verifier", "oracle")

METHODS = (
    *("greedy", "sample"),
    *(f"{name}:{n}" for name in ("majority_vote", "weighted_vote") for n in NUMBERS_OF_CANDIDATES),
    *(f"best_of_n:{n}/{scorer}" for scorer in SCORERS for n in NUMBERS_OF_CANDIDATES),
    *(f"stage_beam:{n}/verifier" for n in (2, 4, 8)),
    *("sentence_beam:4/verifier", "retracing"),
)

OTHER_METHODS = tuple(f"best_of_n:{n}/verifier" for n in (2, 4, 8))
"""Methods for which other verifiers of the first start choose."""

PAIRS = (
    ("best_of_n:8/verifier", "sample"),
    ("best_of_n:8/verifier", "greedy"),
    ("best_of_n:8/verifier", "majority_vote:8"),
    ("best_of_n:8/verifier", "majority_vote:16"),
    ("best_of_n:8/verifier", "best_of_n:8/log_probability"),
    ("best_of_n:8/verifier", "best_of_n:16/log_probability"),
    ("best_of_n:4/verifier", "best_of_n:8/log_probability"),
    ("best_of_n:2/verifier", "best_of_n:4/log_probability"),
    ("best_of_n:16/verifier", "best_of_n:16/log_probability"),
    ("best_of_n:16/log_probability", "majority_vote:16"),
    ("weighted_vote:8", "majority_vote:16"),
    ("stage_beam:4/verifier", "sample"),
    ("stage_beam:4/verifier", "majority_vote:16"),
    ("stage_beam:8/verifier", "stage_beam:2/verifier"),
    ("stage_beam:4/verifier", "best_of_n:8/verifier"),
    ("stage_beam:4/verifier", "best_of_n:16/log_probability"),
    ("stage_beam:4/verifier", "sentence_beam:4/verifier"),
    ("weighted_vote:16", "best_of_n:16/verifier"),
    ("best_of_n:16/oracle", "best_of_n:16/verifier"),
)
"""Pairs of methods whose difference is told."""


@dataclass(frozen=True)
class Way:
    """Way to train a verifier.

    Attributes:
        values: Kinds of values to train on.
        settings: Options of ``train``.
        is_adapter: Whether an adapter for the verifier's question alone is trained. Otherwise all parameters are, and
            the annotators' answers are among the data, so that the model still answers.
    """

    values: tuple[str, ...] = ("whole", "stages")
    settings: tuple[str, ...] = ()
    is_adapter: bool = True


TAKEN = "as in the table"
"""Way by which the verifiers of the searches are trained."""

WAYS = {
    TAKEN: Way(),
    "hard targets": Way(settings=("--verifier.targets", "hard")),
    "one continuation": Way(values=("whole", "stages_1")),
    "captions weigh 3": Way(settings=("--verifier.stage_weights", '{"CAPTION": 3}')),
    "second round": Way(values=("whole", "stages", "stages_2")),
    "all parameters": Way(
        settings=("--lora.rank", "0", "--lora.tokens", "all", "--optimizer.learning_rate", "5e-4"), is_adapter=False
    ),
}
"""Ways to train the verifier of the first start, which are compared on the validation split."""

MEASURES = (
    *("rank_correlation", "clear_pairs", "clear_pairs_by_log_prob", "all_pairs"),
    *("chosen_value", "random_value", "best_value"),
)

RECORD = ROOT / "tests" / "evidence" / "verifier_study.json"


def write_annotations(folder: Path) -> None:
    """Write right answers that differ in care, as annotations of LLaVA-CoT-100k with their images.

    A caption names every shape with its cell, or only says how many shapes there are. A reasoning has the steps of the
    shapes world, or only the result.
    """
    rows, draw = ShapesRows("train"), np.random.default_rng(7)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for index in range(FIRST_ANNOTATED, FIRST_ANNOTATED + ANNOTATED):
            row, scene = rows[index], rows.scene(index)
            row.images[0].save(folder / "images" / f"{index}.png")
            stages = answer_stages(scene.questions[0], scene.layout)
            describes = draw.random() < DESCRIBES
            if not describes:
                stages["CAPTION"] = tag("CAPTION", f"{NUMBERS[len(scene.layout)]} shapes")
            if draw.random() >= (STEPS_AFTER if describes else STEPS_OTHERWISE):
                stages["REASONING"] = tag("REASONING", f"so {rows.answer(index)}")
            says = (("human", row.turns[0].question), ("gpt", "\n\n".join(stages.values())))
            conversation = [{"from": who, "value": text} for who, text in says]
            print(json.dumps({"id": str(index), "image": f"{index}.png", "conversations": conversation}), file=file)


class Study:
    """Runs of the study in a folder, each of which is left as it is once it is finished.

    Args:
        folder: Folder of the runs.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def policy(self, start: int) -> Path:
        """Train the policy of a start, and return its exported checkpoint."""
        annotated = self._folder / "annotated"
        if not annotated.exists():
            written = self._folder / "written"
            write_annotations(written)
            call(
                "prepare",
                "--annotations",
                written / "rows.jsonl",
                "--images",
                written / "images",
                "--output",
                annotated,
            )
        seeds = ("--seed", str(start), "--loader.seed", str(42 + start))
        return self._train("policy", f"policy-{start}", "--data", str(annotated), *seeds)

    def _train(self, config: str, name: str, *arguments: str, is_adapter: bool = False) -> Path:
        """Train by a configuration of configs/miniature, and export what was trained."""
        run, exported = self._folder / name, self._folder / f"{name}-exported"
        if not exported.exists():
            call("train", "--config", f"configs/miniature/{config}.yaml", "--output", run, *arguments)
            check_finished(run)
            call("convert", run, exported, *(("--for", "peft") if is_adapter else ()))
        return exported

    def values(self, name: str, start: int, split: str, first: int, limit: int, *settings: str | Path) -> Path:
        """Roll out, and return the folder of the values."""
        output = self._folder / f"{name}-{start}"
        rows = ("--data", "shapes", "--split", split, "--first", str(first), "--limit", str(limit))
        more = () if "--checkpoint" in settings else ("--checkpoint", self.policy(start))
        call("rollout", *rows, "--seed", str(start), "--output", output, *SAMPLED, *more, *settings)
        return output

    def training_values(self, kind: str, start: int) -> Path:
        """Return values of the training split: of whole answers, of stages, or of another round or number of them."""
        if kind == "whole":
            return self.values(kind, start, "train", 0, VALUED, *WHOLE)
        if kind == "stages_2":
            chosen = ("--judge", "verifier", "--verifier_adapter", self.verifier(start), *IN_STAGES[2:])
            return self.values(kind, start, "train", VALUED, VALUED, *chosen, "--continuations", "4")
        continuations = "1" if kind == "stages_1" else "4"
        return self.values(kind, start, "train", 0, VALUED, *IN_STAGES, "--continuations", continuations)

    def verifier(self, start: int, name: str = TAKEN) -> Path:
        """Train the verifier of a start in a way, and return its adapter, or the model where all of it is trained."""
        way, run = WAYS[name], f"verifier-{name.replace(' ', '_')}-{start}"
        data: dict[str, float] = {str(self.training_values(kind, start)): 1 for kind in way.values}
        if not way.is_adapter:
            data[str(self._folder / "annotated")] = 0.1
        given = ("--checkpoint", str(self.policy(start)), "--data", json.dumps(data))
        seeds = ("--seed", str(start), "--loader.seed", str(42 + start))
        return self._train("verifier", run, *given, *seeds, *way.settings, is_adapter=way.is_adapter)

    def measures(self, name: str | None, start: int) -> dict[str, Any]:
        """Return the measures of a verifier, or of the untrained one, on values of the validation split, by part."""
        settings: tuple[str | Path, ...] = ()
        if name is not None:
            trained = self.verifier(start, name)
            settings = ("--verifier_adapter" if WAYS[name].is_adapter else "--checkpoint", trained)
        label = (name or "untrained").replace(" ", "_")
        whole = self.values(f"held_out_whole-{label}", start, "validation", 0, HELD_OUT, *WHOLE, *settings)
        continued = (*IN_STAGES, "--continuations", "4")
        stages = self.values(f"held_out_stages-{label}", start, "validation", 0, HELD_OUT, *continued, *settings)
        found: dict[str, Any] = {}
        for folder, parts in ((whole, ("whole answers",)), (stages, ("CAPTION", "REASONING"))):
            output = self._folder / f"measures-{folder.name}"
            call("evaluate", "--values", folder, "--output", output)
            (measured,) = json.loads((output / "result.json").read_text(encoding="utf-8"))["verifiers"]
            for part in parts:
                of = measured["parts"][part]
                found[part] = {each: [of[each][key] for key in ("mean", "standard_error")] for each in MEASURES}
                found[part]["calibration_error"] = of["calibration"]["expected_calibration_error"]
                found[part]["other_probability"] = of["other_probability"]["mean"]
        return found

    def comparison(self, start: int, name: str | None = TAKEN, methods: Sequence[str] = METHODS) -> dict[str, Any]:
        """Return the FLOPs of a question and what was right, of each method, on the test split.

        Args:
            start: The start.
            name: Way by which the adapter of the verifier was trained; None is the untrained one.
            methods: Methods to compare.
        """
        chosen_by = "" if name == TAKEN else f"{name or 'untrained'}-".replace(" ", "_")
        output = self._folder / f"compared-{chosen_by}{start}"
        adapter = () if name is None else ("--verifier_adapter", self.verifier(start, name))
        call(
            *("evaluate", "--benchmark", "shapes", "--limit", str(TESTED), "--seed", str(start), "--output", output),
            *("--checkpoint", self.policy(start), *adapter, *SAMPLED),
            *("--max_new_tokens", str(LONGEST), "--compare", ",".join(methods)),
            *(("--max_rounds", "2") if "retracing" in methods else ()),
        )
        lines = [json.loads(line) for line in (output / "comparison.jsonl").read_text(encoding="utf-8").splitlines()]
        right, found = right_answers(output, methods), {}
        for line in lines:
            if line["kind"] == "method":
                assert sum(right[line["method"]]) == line["right"]
                flops = line["flops_per_question"]["total"]
                found[line["method"]] = {"flops": flops, "right": encoded(right[line["method"]])}
        return found

    def forms(self, start: int) -> dict[str, list[float]]:
        """Return how often the verifier prefers a right whole answer to a wrong one that is written in the same form.

        The form is whether the caption names the shapes, and whether the reasoning has steps. Pairs of other forms are
        beside it. The answers are those of the test split. Each has the mean, its standard error, clustered by
        question, and the number of pairs.
        """
        content = (self._folder / f"compared-{start}" / "best_of_n-16-verifier" / "answers.jsonl").read_text()
        found: dict[str, list[tuple[float, int]]] = {"same form": [], "other forms": []}
        for number, (line, known) in enumerate(
            zip(content.splitlines(), shapes_questions(TESTED, Matching()).known, strict=True)
        ):
            assert known is not None
            answers = [(each["text"], each["score"]) for each in json.loads(line)["trace"]["stages"][0]["candidates"]]
            told = [(form_of(text), known.right.accepts(scored_text(text)), score) for text, score in answers]
            for one, _, better in (each for each in told if each[1]):
                for other, _, worse in (each for each in told if not each[1]):
                    agrees = (1 + np.sign(better - worse)) / 2
                    found["same form" if one == other else "other forms"].append((float(agrees), number))
        estimates = {
            name: estimate_mean([each for each, _ in pairs], [number for _, number in pairs])
            for name, pairs in found.items()
        }
        return {name: [each.mean, each.standard_error or 0.0, each.count] for name, each in estimates.items()}


def form_of(text: str) -> tuple[bool, bool]:
    """Return whether the caption of an answer names shapes with their cells, and whether its reasoning has steps."""
    bodies = find_stages(text)
    caption, reasoning = bodies.get("CAPTION", ""), bodies.get("REASONING", "")
    return not caption.strip().endswith("shapes"), not reasoning.strip().startswith("so ")


def right_answers(compared: Path, names: Sequence[str]) -> dict[str, list[bool]]:
    """Return whether each method of a comparison is right, question by question."""
    given = {"format": "llava_cot", "temperature": TEMPERATURE, "max_new_tokens": LONGEST}
    options = Namespace({**dict.fromkeys(SEARCH_OPTIONS), **given})
    methods = [Method.read(name, options) for name in names]
    runs, known, found = plan_runs(methods, options), shapes_questions(TESTED, Matching()).known, {}
    for method in methods:
        run = runs[method.name]
        content = (compared / run.folder / "answers.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in content.splitlines()]
        if run.name != method.name:
            format = method.strategy.to_spec().format
            pairs = [(row, each) for row, each in zip(rows, known, strict=True) if each is not None]
            rows = [
                scored_row(derived_row(row, method, shapes_config(), each.right), each, format) for row, each in pairs
            ]
        found[method.name] = [row["right"] for row in rows]
    return found


def fill(name: str, found: Any) -> None:
    """Keep what was found under a name of the record."""
    about = {"date": str(datetime.date.today()), "commit": commit(), "jax": version("jax")}
    write_json(RECORD, read_record() | {name: {**about, "found": found}})


def read_record() -> dict[str, Any]:
    """Return what was found so far."""
    found = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    return {name: found[name] for name in sorted(found)}


def run(folder: Path, starts: tuple[int, ...], ways: bool) -> None:
    """Run what the record lacks."""
    study = Study(folder)
    for start in starts:
        if not {name := f"searches, {start}", forms := f"forms, {start}"} <= set(read_record()):
            fill(name, study.comparison(start))
            fill(forms, study.forms(start))
        for way in (None, TAKEN):
            if (name := f"{way or 'untrained'}, {start}") not in read_record():
                fill(name, study.measures(way, start))
    for way in (None, "second round") if ways else ():
        if (name := f"searches by the {way or 'untrained'}, 0") not in read_record():
            fill(name, study.comparison(0, way, OTHER_METHODS))
    for way in WAYS if ways else ():
        if (name := f"{way}, 0") not in read_record():
            fill(name, study.measures(way, 0))


def searches(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return FLOPs and right answers [questions] of each method, for each start that is known."""
    found = [record[name]["found"] for name in sorted(record) if name.startswith("searches, ")]
    return [{method: (each["flops"], decoded(each["right"])) for method, each in methods.items()} for methods in found]


def estimate(rows: np.ndarray) -> str:
    """Return the mean of numbers [starts, questions] with its standard errors, over questions and over starts."""
    over_questions = rows.mean(0).std(ddof=1) / math.sqrt(rows.shape[1])
    each = rows.mean(1)
    over_starts = f"{each.std(ddof=1) / math.sqrt(len(each)):.1%}" if len(each) > 1 else "unknown"
    told = "  ".join(f"{mean:6.1%}" for mean in each)
    return f"{rows.mean():7.1%}   {over_questions:.1%}   {over_starts}   {told}"


def show(record: dict[str, Any]) -> None:
    """Print the tables."""
    for name, entry in record.items():
        print(f"{name}: {entry['date']}, commit {entry['commit']}, jax {entry['jax']}")
    if starts := searches(record):
        print(
            f"\naccuracy on {TESTED} questions of the test split: mean over the starts, standard error over questions,"
        )
        print("standard error over starts, each start, and FLOPs of a question")
        for method in starts[0]:
            flops = statistics.fmean(start[method][0] for start in starts)
            print(f"{method:27}{estimate(np.stack([start[method][1] for start in starts]))}   {flops:.2e}")
        print("\ndifferences, likewise, question by question")
        for first, second in PAIRS:
            rows = np.stack([start[first][1] - start[second][1] for start in starts])
            print(f"{first + ' less ' + second:55}{estimate(rows)}")
    for name, entry in record.items():
        if name.startswith("searches by"):
            told = {method: decoded(each["right"]).mean() for method, each in entry["found"].items()}
            print(f"\n{name}: " + ", ".join(f"{method} {mean:.1%}" for method, mean in told.items()))
    for name, entry in record.items():
        if name.startswith("forms"):
            told = ", ".join(
                f"{key} {mean:.1%} ({error:.1%}) of {n}" for key, (mean, error, n) in entry["found"].items()
            )
            print(f"\n{name}: the verifier prefers the right one of a right and a wrong whole answer: {told}")
    show_measures(record)


def draw(record: dict[str, Any]) -> None:
    """Draw the mean accuracy of each method over the FLOPs of a question, with the standard error over the starts."""
    starts = searches(record)
    families: dict[str, list[tuple[float, float, float]]] = {}
    for method in starts[0]:
        name, _, rest = method.partition(":")
        means = np.array([start[method][1].mean() for start in starts])
        error = means.std(ddof=1) / math.sqrt(len(means)) if len(means) > 1 else 0.0
        flops = statistics.fmean(start[method][0] for start in starts)
        scorer = rest.partition("/")[2]
        family = f"{name}, {scorer}" if name == "best_of_n" else name
        families.setdefault(family.replace("_", " "), []).append((flops, means.mean(), error))
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for i, (name, points) in enumerate(families.items()):
        look = {"color": f"C{i}", "marker": LINE_MARKERS[i % len(LINE_MARKERS)]}
        flops, means, errors = zip(*points, strict=True)
        axes.errorbar(flops, means, errors, label=name, capsize=2, **look)
    axes.set_xscale("log")
    axes.set(xlabel="FLOPs of a question", ylabel="right conclusions")
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    figure.savefig(RECORD.with_suffix(".png"), dpi=110)


def show_measures(record: dict[str, Any]) -> None:
    """Print the measures of the verifiers."""
    print(f"\nverifiers on values of {HELD_OUT} questions of the validation split; standard errors in brackets")
    names = "".join(f"{name.replace('_', ' '):>24}" for name in MEASURES)
    print(f"{'verifier, start':22}{'part':15}{names}{'calibration':>13}{'other':>9}")
    for name, entry in record.items():
        if name.startswith(("searches", "forms")):
            continue
        for part, found in entry["found"].items():
            cells = "".join(f"{mean:>15.4f} ({error:.4f})" for mean, error in map(found.get, MEASURES))
            print(f"{name:22}{part:15}{cells}{found['calibration_error']:>13.3f}{found['other_probability']:>9.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="Folder of the runs; by default one that is removed at the end.")
    parser.add_argument("--starts", type=int, nargs="*", choices=STARTS, default=STARTS, help="Starts to run.")
    parser.add_argument("--ways", action="store_true", help="Compare ways to train in the first start too.")
    parser.add_argument("--tables", action="store_true", help="Print tables and draw the plot of the record alone.")
    options = parser.parse_args()
    if not options.tables:
        with tempfile.TemporaryDirectory() as made:
            run((options.folder or Path(made)).resolve(), tuple(options.starts), options.ways)
    show(read_record())
    if searches(read_record()):
        draw(read_record())


if __name__ == "__main__":
    main()
