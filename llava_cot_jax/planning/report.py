"""Plans as a person reads them: every figure with where it comes from."""

from collections.abc import Iterable, Mapping

from rich.table import Table

from llava_cot_jax.planning.collectives import sent_by_axis
from llava_cot_jax.planning.compiler import Compiled, versions
from llava_cot_jax.planning.floors import Floors
from llava_cot_jax.planning.memory import Parts
from llava_cot_jax.planning.searching import SearchPlan
from llava_cot_jax.planning.slices import Slice
from llava_cot_jax.planning.training import TrainingPlan

GB = 1e9
HOUR = 3600.0


def training_table(plan: TrainingPlan, compiled: Compiled | None, mfu: float) -> Table:
    """A training run on a slice."""
    settings = plan.settings
    precision = settings.optimizer.precision.replace("_", ", rounded ")
    what = "all parameters" if not settings.lora.rank else f"adapters of rank {settings.lora.rank}"
    table = _table("training", plan.slice, compiled)
    table.add_row("mesh", _mesh(plan.mesh))
    table.add_row("trains", f"{what} in {precision}; computed in {settings.dtype}")
    table.add_row(
        "batch",
        f"{settings.loader.batch} rows of up to {settings.chat.max_length} tokens in {settings.micro_batches} part(s), "
        f"checkpointing {settings.checkpointing}",
    )
    _add_memory(table, plan.memory, plan.slice, compiled)
    table.add_row(
        "a step of average rows, computed",
        f"{plan.flops / 1e12:,.4g} TFLOP counted, {plan.again / 1e12:,.4g} computed a second time",
    )
    _add_floors(table, plan.floors, plan.slice)
    if compiled is not None and compiled.exchanges is not None:
        found = {axis or "unknown": size for axis, size in sent_by_axis(compiled.exchanges).items() if size}
        table.add_row("sent by a chip in a step of the longest rows, compiled, GB", _gigabytes(found))
    hours = plan.hours(mfu)
    table.add_row(
        f"{plan.steps:,} steps at an MFU of {mfu:.0%}, computed",
        f"{hours:,.2f} hours, {hours * plan.slice.chips:,.1f} chip-hours; at the floor "
        f"{plan.steps * plan.floors.step / HOUR:,.2f} hours",
    )
    return table


def search_table(plan: SearchPlan, compiled: Compiled | None, most: int) -> Table:
    """A search on a slice."""
    table = _table("search", plan.slice, compiled)
    counts, budgets = sorted(set(plan.plan.candidates)), sorted(set(plan.plan.budgets))
    table.add_row("mesh", _mesh(plan.mesh))
    table.add_row(
        "search",
        f"{len(plan.plan.budgets)} stage(s) of {_list(counts)} candidates, up to {_list(budgets)} tokens; "
        f"{plan.questions} question(s) at a time; weights in {plan.dtype}",
    )
    _add_memory(table, plan.memory, plan.slice, compiled)
    table.add_row("questions at a time, computed", f"at most {most}")
    _add_floors(table, plan.step, plan.slice, "a step of decoding")
    table.add_row("the floor of an answer of usual length, computed", f"{plan.seconds:,.2f} s")
    return table


def _table(what: str, slice_: Slice, compiled: Compiled | None) -> Table:
    chips = f"{slice_.accelerator_type}, {slice_.chips} chip{'s' if slice_.chips > 1 else ''}"
    source = "computed" if compiled is None else "computed and compiled"
    table = Table(title=f"{what} on {slice_.name} ({chips}): {source}, not measured", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    return table


def _add_memory(table: Table, memory: Parts, slice_: Slice, compiled: Compiled | None) -> None:
    usable, total = slice_.generation.usable, sum(memory.values())
    table.add_row("bytes of a chip, computed", f"{total / GB:.2f} GB: {_gigabytes(memory)}")
    if compiled is None:
        table.add_row("fits, computed", fit(total, usable))
        return
    of = ", ".join(f"{name} {number}" for name, number in versions().items())
    if compiled.fault is not None:
        table.add_row(f"fits, compiled ({of})", f"no: {compiled.fault}")
        return
    table.add_row(
        f"bytes of a chip, compiled ({of})",
        f"{compiled.bytes / GB:.2f} GB: arguments {compiled.arguments / GB:.2f}, temporaries "
        f"{compiled.temporaries / GB:.2f}; computed is {total / compiled.bytes - 1:+.1%}; the program's code takes "
        f"{compiled.code / GB:.2f} GB more; compiled in {compiled.seconds:.0f} s",
    )
    table.add_row("fits, compiled", fit(compiled.bytes + compiled.code, usable))


def fit(size: int, usable: int) -> str:
    """Whether so many bytes fit, and by how much."""
    room = usable - size
    return (
        f"yes: {room / GB:.2f} of {usable / GB:.2f} GB are left" if room >= 0 else f"no: {-room / GB:.2f} GB too much"
    )


def _add_floors(table: Table, floors: Floors, slice_: Slice, of: str = "a step") -> None:
    chip = slice_.generation.chip
    rates = {"compute": f"{floors.flops / 1e12:,.3g} TFLOP", "memory": f"{floors.memory / GB:,.3g} GB"}
    rates["links"] = _gigabytes({axis: size for axis, size in floors.sent.items() if size}) or "nothing"
    parts = [
        f"{name} {1e3 * seconds:,.3g} ms" + (f" ({rates[name]})" if name in rates else "")
        for name, seconds in floors.seconds.items()
        if seconds or name != "network"
    ]
    table.add_row(f"floors of {of}, computed for {chip.name}", "; ".join(parts))
    table.add_row("binds", floors.binds)


def _mesh(mesh: dict[str, int]) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in mesh.items())


def _gigabytes(sizes: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {size / GB:.3g}" for name, size in sizes.items())


def _list(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))
