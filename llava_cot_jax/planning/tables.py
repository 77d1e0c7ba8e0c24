"""Tables of plans for a person to read. Each figure is labelled as computed or compiled."""

from collections.abc import Iterable, Mapping

from rich.table import Table

from llava_cot_jax.planning.collectives import sent_by_axis
from llava_cot_jax.planning.compiler import CompiledProgram, compiler_versions
from llava_cot_jax.planning.memory import MemoryShares
from llava_cot_jax.planning.roofline import Roofline
from llava_cot_jax.planning.search_plan import SearchPlan
from llava_cot_jax.planning.slices import Slice
from llava_cot_jax.planning.training_plan import TrainingPlan

GB = 1e9
HOUR = 3600.0

RESOURCES = {"compute": "compute", "hbm": "HBM", "ici": "ICI", "dcn": "DCN"}
"""Resources of a roofline as they are printed."""


def training_table(plan: TrainingPlan, compiled: CompiledProgram | None, mfu: float) -> Table:
    """Return the table of a training run on a slice."""
    settings = plan.settings
    precision = settings.optimizer.precision.replace("_", ", rounded ")
    what = "all parameters" if not settings.lora.rank else f"adapters of rank {settings.lora.rank}"
    table = _plan_table("training", plan.slice, compiled)
    table.add_row("mesh", _describe_mesh(plan.mesh))
    table.add_row("trained", f"{what} in {precision}; computed in {settings.dtype}")
    table.add_row(
        "batch",
        f"{settings.loader.batch_size} examples of up to {settings.chat.max_length} tokens and {plan.images} image(s), "
        f"{settings.grad_accum_steps} gradient accumulation step(s), remat {settings.remat}",
    )
    _add_memory(table, plan.memory, plan.slice, compiled)
    table.add_row(
        "FLOPs of a step of mean length, computed",
        f"{plan.flops / 1e12:,.4g} TFLOP, and {plan.recomputed_flops / 1e12:,.4g} TFLOP recomputed",
    )
    _add_roofline(table, plan.roofline, plan.slice)
    if compiled is not None and compiled.collectives is not None:
        found = {axis or "unknown": size for axis, size in sent_by_axis(compiled.collectives).items() if size}
        table.add_row("GB sent by a chip in a step of the longest examples, compiled", _gigabytes(found))
    hours = plan.hours(mfu)
    table.add_row(
        f"{plan.steps:,} steps at an MFU of {mfu:.0%}, computed",
        f"{hours:,.2f} hours, {hours * plan.slice.chips:,.1f} chip-hours; by the roofline at least "
        f"{plan.steps * plan.roofline.step_seconds / HOUR:,.2f} hours",
    )
    return table


def search_table(plan: SearchPlan, compiled: CompiledProgram | None, max_questions: int) -> Table:
    """Return the table of a search on a slice."""
    table = _plan_table("search", plan.slice, compiled)
    counts, lengths = sorted(set(plan.spec.num_candidates)), sorted(set(plan.spec.max_new_tokens))
    table.add_row("mesh", _describe_mesh(plan.mesh))
    table.add_row(
        "search",
        f"{plan.spec.num_stages} stage(s) of {_join(counts)} candidates, up to {_join(lengths)} tokens; "
        f"{plan.questions} question(s) together; weights in {plan.dtype}",
    )
    _add_memory(table, plan.memory, plan.slice, compiled)
    table.add_row("questions together, computed", f"at most {max_questions}")
    _add_roofline(table, plan.decode_step, plan.slice, "a decoding step")
    table.add_row("roofline of an answer of typical length, computed", f"{plan.seconds:,.2f} s")
    return table


def _plan_table(what: str, slice_: Slice, compiled: CompiledProgram | None) -> Table:
    chips = f"{slice_.accelerator_type}, {slice_.chips} chip{'s' if slice_.chips > 1 else ''}"
    source = "computed" if compiled is None else "computed and compiled"
    table = Table(title=f"{what} on {slice_.name} ({chips}): {source}, not measured", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    return table


def _add_memory(table: Table, memory: MemoryShares, slice_: Slice, compiled: CompiledProgram | None) -> None:
    usable, total = slice_.generation.usable_hbm_bytes, sum(memory.values())
    table.add_row("memory per chip, computed", f"{total / GB:.2f} GB: {_gigabytes(memory)}")
    if compiled is None:
        table.add_row("fits, computed", describe_fit(total, usable))
        return
    versions = ", ".join(f"{name} {version}" for name, version in compiler_versions().items())
    if compiled.error is not None:
        table.add_row(f"fits, compiled ({versions})", f"no: {compiled.error}")
        return
    table.add_row(
        f"memory per chip, compiled ({versions})",
        f"{compiled.bytes / GB:.2f} GB: arguments {compiled.arguments / GB:.2f}, temporaries "
        f"{compiled.temporaries / GB:.2f}; computed is {total / compiled.bytes - 1:+.1%}; the program's code takes "
        f"{compiled.code / GB:.2f} GB more; compiled in {compiled.seconds:.0f} s",
    )
    table.add_row("fits, compiled", describe_fit(compiled.bytes + compiled.code, usable))


def describe_fit(size: int, usable: int) -> str:
    """Say whether ``size`` bytes fit into ``usable`` bytes, and how many are left or too many."""
    headroom = usable - size
    if headroom < 0:
        return f"no: {-headroom / GB:.2f} GB too much"
    return f"yes: {headroom / GB:.2f} of {usable / GB:.2f} GB are left"


def _add_roofline(table: Table, roofline: Roofline, slice_: Slice, step: str = "a step") -> None:
    chip = slice_.generation.chip
    work = {"compute": f"{roofline.flops / 1e12:,.3g} TFLOP", "hbm": f"{roofline.hbm_bytes / GB:,.3g} GB"}
    sent = {axis: size for axis, size in roofline.sent_bytes.items() if size}
    work["ici"] = f"GB sent: {_gigabytes(sent)}" if sent else "nothing sent"
    resources = [
        f"{RESOURCES[name]} {1e3 * seconds:,.3g} ms" + (f" ({work[name]})" if name in work else "")
        for name, seconds in roofline.seconds.items()
        if seconds or name != "dcn"
    ]
    table.add_row(f"roofline of {step}, computed for {chip.name}", "; ".join(resources))
    table.add_row("bottleneck", RESOURCES[roofline.bottleneck])


def _describe_mesh(mesh: dict[str, int]) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in mesh.items())


def _gigabytes(sizes: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {size / GB:.3g}" for name, size in sizes.items())


def _join(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))
