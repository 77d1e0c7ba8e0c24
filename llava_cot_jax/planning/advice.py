"""What to change where a run does not fit, and which slice to take."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

from llava_cot_jax.errors import UserError
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.sharding import default_sizes
from llava_cot_jax.planning.programs import Weight
from llava_cot_jax.planning.searching import SearchPlan, plan_search
from llava_cot_jax.planning.settings import Data
from llava_cot_jax.planning.slices import GENERATIONS, MARGIN, Slice
from llava_cot_jax.planning.training import TrainingPlan, best_mesh, plan_training
from llava_cot_jax.training.settings import LoraSettings, TrainSettings

RANK = 32

NARROWER: dict[Weight, tuple[Weight, ...]] = {"float32": ("bfloat16", "int8"), "int8": ()}
"""What weights for a search can be held in instead; those of two bytes in int8 alone."""


def fits(plan: TrainingPlan | SearchPlan) -> bool:
    """Whether a prediction leaves a margin."""
    return plan.room >= MARGIN * plan.slice.generation.usable


def smallest_change(plan: TrainingPlan, config: MllamaConfig, data: Data) -> tuple[str, TrainingPlan] | None:
    """The first change that makes a run fit, in words and as a plan; None where none does.

    In the order of what they cost: another mesh, then what else leaves the arithmetic as it is, then the precision of
    the optimizer's state, then the recipe, each also together with those before it, and last the slice.
    """
    settings = plan.settings
    words: dict[str, str] = {}
    unchanged = ("micro_batches", str(settings.micro_batches))
    for options, changed in ({}, lambda old: old), *_changes(settings):
        settings, words = changed(settings), words | options
        for told, tried in ((options, changed(plan.settings)), (words, settings)):
            for planned in (_planned, best_mesh):
                found = planned(tried, config, plan.slice, data)
                if found is not None and _relieves(found, plan):
                    told = {name: value for name, value in told.items() if (name, value) != unchanged}
                    return _in_words(_other_mesh(plan, found) | told), found
    return _larger(plan, config, data)


def _relieves(found: TrainingPlan | SearchPlan, plan: TrainingPlan | SearchPlan) -> bool:
    """Whether a plan fits, and takes less than one that may have been predicted to fit and did not."""
    return fits(found) and found.room > plan.room


def _other_mesh(plan: TrainingPlan | SearchPlan, found: TrainingPlan | SearchPlan) -> dict[str, str]:
    return {} if found.mesh == plan.mesh else {f"mesh.{axis}": str(size) for axis, size in found.mesh.items()}


def _in_words(options: dict[str, str]) -> str:
    return " ".join(f"--{name} {value}" for name, value in options.items())


Change = Callable[[TrainSettings], TrainSettings]


def _changes(settings: TrainSettings) -> Iterator[tuple[dict[str, str], Change]]:
    """Changes in their order, each with its options on the command line."""
    sizes, batch = settings.mesh, settings.loader.batch
    over = sizes.data * (sizes.fsdp or 1)
    if settings.checkpointing != "full":
        yield {"checkpointing": "full"}, lambda old: replace(old, checkpointing="full")
    for parts in range(settings.micro_batches + 1, batch // over + 1):
        if batch // over % parts == 0:
            yield {"micro_batches": str(parts)}, _in_parts(parts)
    if settings.optimizer.precision == "float32" and not settings.lora.rank:
        yield {"optimizer.precision": "bfloat16_stochastic"}, _rounded
    if batch > over:
        options = {"micro_batches": "1", "loader.batch": str(over)}
        yield options, lambda old: replace(_in_parts(1)(old), loader=replace(old.loader, batch=over))
    if not settings.lora.rank:
        lora = LoraSettings(rank=RANK, alpha=2.0 * RANK)
        options = {"lora.rank": str(RANK), "lora.alpha": str(2 * RANK)}
        yield options, lambda old: replace(old, lora=lora, frozen=[])


def _in_parts(parts: int) -> Change:
    return lambda old: replace(old, micro_batches=parts)


def _rounded(old: TrainSettings) -> TrainSettings:
    return replace(old, optimizer=replace(old.optimizer, precision="bfloat16_stochastic"))


def _planned(settings: TrainSettings, config: MllamaConfig, slice_: Slice, data: Data) -> TrainingPlan | None:
    try:
        return plan_training(settings, config, slice_, data)
    except UserError:  # the change does not divide the batch, or the model
        return None


def _larger(plan: TrainingPlan, config: MllamaConfig, data: Data) -> tuple[str, TrainingPlan] | None:
    """The smallest larger slice of the same chips that holds the run as it is."""
    for slice_ in _larger_slices(plan.slice):
        found = best_mesh(plan.settings, config, slice_, data)
        if found is not None and fits(found):
            return f"--topology {slice_.name}", found
    return None


def _larger_slices(slice_: Slice) -> Iterator[Slice]:
    for shape in slice_.generation.shapes:
        larger = replace(slice_, shape=shape)
        if larger.chips > slice_.chips:
            yield larger


def smallest_change_of_search(plan: SearchPlan, config: MllamaConfig) -> tuple[str, SearchPlan] | None:
    """The same for a search.

    First another mesh, then fewer questions at a time, then narrower weights, and last the slice.
    """
    slice_ = plan.slice
    dtypes = (plan.dtype, *NARROWER.get(plan.dtype, ("int8",)))
    counts = range(plan.questions, 0, -1)
    meshes = (plan.mesh, default_sizes(config, slice_.chips))
    for dtype, questions, mesh in itertools.product(dtypes, counts, meshes):
        found = plan_search(plan.plan, config, slice_, mesh, questions=questions, dtype=dtype)
        if _relieves(found, plan):
            options = _other_mesh(plan, found)
            options |= {"questions": str(questions)} if questions != plan.questions else {}
            options |= {"quantize" if dtype == "int8" else "dtype": dtype} if dtype != plan.dtype else {}
            return _in_words(options), found
    for slice_ in _larger_slices(plan.slice):
        found = plan_search(plan.plan, config, slice_, questions=plan.questions, dtype=plan.dtype)
        if fits(found):
            return f"--topology {slice_.name}", found
    return None


def finalists(settings: TrainSettings, config: MllamaConfig, data: Data) -> list[TrainingPlan]:
    """Of each generation of chips the smallest slice that holds a run, on its best mesh: the best first.

    The best is that which loses least of its chips' arithmetic to moving bytes; of two, the one of fewer chips.
    """
    found = []
    for generation in GENERATIONS.values():
        for shape in generation.shapes:
            plan = best_mesh(settings, config, Slice(generation, shape), data)
            if plan is not None and fits(plan):
                found.append(plan)
                break
    return sorted(found, key=lambda plan: (plan.floors.step / plan.floors.seconds["compute"], plan.slice.chips))
