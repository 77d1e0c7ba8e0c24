"""The four stages of an answer, found in its text."""

import re

STAGES = ("SUMMARY", "CAPTION", "REASONING", "CONCLUSION")
"""LLaVA-CoT's stages in their order; each stands between ``<NAME>`` and ``</NAME>``."""


def find_stages(text: str) -> dict[str, str]:
    """The body of each stage of ``text`` that was opened, by name in order, without the space around it.

    A stage that was never closed reaches to the next stage's opening tag, or to the end. A stage
    counts once and in its order: a tag that repeats, or that comes before its time, is text.
    """
    found: dict[str, str] = {}
    rest = text
    for i, name in enumerate(STAGES):
        _, opened, after = rest.partition(f"<{name}>")
        if not opened:
            continue
        later = "|".join(f"<{n}>" for n in STAGES[i + 1 :]) or "$"
        end = re.search(f"</{name}>|{later}", after)
        found[name] = after[: end.start() if end else None].strip()
        rest = after[end.start() :] if end else ""
    return found


def may_be_staged(text: str) -> bool:
    """Whether ``text``, the beginning of an answer, opens a stage or may yet do so."""
    start = text.lstrip()
    return any(f"<{name}>".startswith(start[: len(name) + 2]) for name in STAGES)
