"""Exhausted memory of a device or of the host, recognised in what jax, NumPy and Python raise, in a line.

The texts are those of XLA on CPUs ("Out of memory allocating 5 bytes"), GPUs ("Out of memory while trying to allocate")
and TPUs ("Ran out of memory in memory space hbm. Used 21.95G of 15.48G hbm", "Attempting to allocate 4.39G").
"""

import errno
import re

from llava_cot_jax.errors import causes

_LESS_FOR_ANSWERS = (
    "Less memory is taken by --quantize int8, --dtype bfloat16, fewer --num_candidates or --max_new_tokens, and by "
    "more devices (--mesh.tensor). What a search takes is told by `llava-cot plan --search`."
)

ADVICE = {
    "train": (
        "What fits is told by `llava-cot plan`. Less memory is taken by remat: full, more grad_accum_steps, a smaller "
        "loader.batch_size or chat.max_length, adapters (lora.rank), optimizer.precision: bfloat16_stochastic, and by "
        "more devices."
    ),
    "generate": _LESS_FOR_ANSWERS,
    "evaluate": _LESS_FOR_ANSWERS,
    "rollout": (
        "Less memory is taken by fewer --slots, --continuations or --num_candidates, a smaller --max_new_tokens, "
        "--quantize int8, --dtype bfloat16, and by more devices (--mesh.tensor)."
    ),
    "bench": (
        "Less memory is taken by --quantize int8, --dtype bfloat16, fewer --workload.num_candidates, and by shorter "
        "questions and answers."
    ),
    "convert": "One tensor at a time is in memory, or 1 GiB of a training run: free that much.",
    "prepare": "Less memory is taken by fewer --workers, each of which decodes one image at a time.",
}
"""Advice to a user for whom memory does not suffice, by command."""

_EXHAUSTED = re.compile(
    r"out of memory|ran out of \w+ memory|OUT_OF_MEMORY|cannot allocate memory|failed to allocate|unable to allocate"
    r"|exceeds available HBM"
    r"|(RESOURCE_EXHAUSTED|resource exhausted)[\s\S]*(allocat|reserve|memory|\bhbm\b)|std::bad_alloc",
    re.IGNORECASE,
)
_USED = (
    re.compile(r"Used (?P<used>[\d.]+\w*) of (?P<capacity>[\d.]+\w*) (?P<space>\w+)"),
    re.compile(r"required.*?\((?P<used>[\d.]+G)\) exceeds available (?P<space>HBM) \((?P<capacity>[\d.]+G)\)"),
)
_SIZE = re.compile(
    r"(?:allocat\w*|reserve|request \w+|requirement)\W(?:[a-z ]*)(?P<size>\d[\d.,]*\s?(?:bytes|[KMGTPE]i?B?|B)\b)",
    re.IGNORECASE,
)
_FREE = re.compile(r"There are (?P<free>[\d.]+\w*) free")
_ARRAYS = (
    re.compile(r"shape (?P<shape>\([^)]*\)) and data type (?P<dtype>\w+)"),  # NumPy
    re.compile(r"\bShape: (?P<dtype>[a-z]+\d*\w*)(?P<shape>\[[\d,]*\])"),  # the largest, of XLA's list
)
_UNITS = {"k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}


def describe_exhausted_memory(fault: BaseException) -> str | None:
    """Return how much memory was asked for and for what, as far as it is known, or None if ``fault`` is another one.

    Args:
        fault: Exception that ended a command. Those that led to it are looked at too.
    """
    for cause in causes(fault):
        text = str(cause)
        # jax.errors.JaxRuntimeError is a RuntimeError; where arrays are put on a device, it may be a ValueError.
        is_from_device = isinstance(cause, RuntimeError) or text.startswith("RESOURCE_EXHAUSTED")
        is_exhausted = isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno == errno.ENOMEM)
        if not is_exhausted and not (is_from_device and _EXHAUSTED.search(text)):
            continue
        return "out of memory" + _details(text)
    return None


def _details(text: str) -> str:
    """Return what an error message tells of bytes and array, in words that follow "out of memory"."""
    details = []
    if used := next(filter(None, (pattern.search(text) for pattern in _USED)), None):
        details.append(f"{_bytes(used['used'])} are needed of {_bytes(used['capacity'])} of {used['space']}")
    elif size := _SIZE.search(text):
        free = _FREE.search(text)
        there_are = f", of which {_bytes(free['free'])} are free" if free else ""
        details.append(f"{_bytes(size['size'])} are needed at once{there_are}")
    for pattern in _ARRAYS:
        if array := pattern.search(text):
            shape = array["shape"].strip("[]()").replace(" ", "").strip(",")
            details.append(f"{'the largest array is ' if details else ''}{array['dtype']} [{shape.replace(',', ', ')}]")
            break
    return f": {'; '.join(details)}" if details else ""


def _bytes(text: str) -> str:
    """Return an amount such as "70368744177664 bytes", "2.00 PiB" or "15.48G" in GB, or in MB if it is small."""
    number, unit = re.match(r"([\d.,]*\d)\s*(\w*)", text).groups()  # type: ignore[union-attr]
    amount = float(number.replace(",", "")) * 2 ** _UNITS.get("" if unit == "bytes" else unit[:1].lower(), 0)
    return f"{amount / 1e9:,.1f} GB" if amount >= 1e9 else f"{amount / 1e6:,.1f} MB"
