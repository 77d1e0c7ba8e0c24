"""What a search looks up on the device: the pieces that open and close stages, and the readers of what is written."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from llava_cot_jax.errors import UserError
from llava_cot_jax.inference.ragged_tokens import Pieces, pack
from llava_cot_jax.inference.stop_strings import (
    TAILS,
    find_strings,
    find_tag,
    ignoring_case,
    tabulate,
    vocabulary_bytes,
)
from llava_cot_jax.processing.processor import Processor
from llava_cot_jax.search.prompts import KINDS, WHOLE, JudgePrompts, Kind
from llava_cot_jax.search.strategies import Judge, Plan
from llava_cot_jax.stages import STAGES

BLANK_LINE = TAILS - 1
"""The tail of a text that ends in a blank line, as a prompt and a closed stage do."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StageTables:
    """How stages begin and end.

    The opening tag is given, never drawn, so it cannot be missing. What of a closing tag was not drawn
    is put in its place: a candidate that ran into its budget after ``</SUM`` is closed by ``MARY>``.

    Attributes:
        openings: [stages, TAILS], the opening tag, after a text with so many line breaks at its end.
        closings: [stages, states], the rest of the closing tag and a blank line; of a state that has seen it, nothing.
        readers: uint8 [stages, states, vocabulary], as ``readers.tabulate`` makes them.
    """

    openings: Pieces
    closings: Pieces
    readers: jax.Array

    @property
    def accept(self) -> int:
        """The readers' first state that has seen the whole tag."""
        return self.readers.shape[1]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class JudgeTables:
    """The judge's prompts as pieces (``prompts`` draws them), each [kinds, stages], and how to read a verdict.

    Attributes:
        intro, middle, label, between, ending: the texts between the holes.
        shows: bool [kinds, stages, stages], which earlier stages the judge of a stage is shown.
        checked: bool [stages], whose candidates are checked.
        verdicts: int32 [2], the tokens that say 1 and 2.
        readers: uint8 [kinds, states, vocabulary], for written verdicts.
    """

    intro: Pieces
    middle: Pieces
    label: Pieces
    between: Pieces
    ending: Pieces
    shows: jax.Array
    checked: jax.Array
    verdicts: jax.Array
    readers: jax.Array


def stage_tables(processor: Processor, plan: Plan) -> StageTables:
    """The tables for ``plan``'s stages; for whole answers, whose end is LLaVA-CoT's last closing tag, one stage.

    Raises:
        UserError: a tokenizer that is not byte-level, or a tag that is too long.
    """
    entries = vocabulary_bytes(processor.tokenizer, processor.config.text.vocab_size)
    tags = [f"</{stage}>" for stage in plan.stages or STAGES[-1:]]
    readers, accept = tabulate([(find_tag(tag.encode()), TAILS) for tag in tags], entries)

    def ids(text: str) -> list[int]:
        return tokens_of(processor, text)

    openings: list[list[int]] = []
    closings: list[list[int]] = []
    for stage in plan.stages or (None,):
        for tail in range(TAILS):
            openings.append([] if stage is None else ids("\n" * (BLANK_LINE - tail) + f"<{stage}>"))
        for state in range(accept + TAILS):
            closings.append([] if stage is None or state >= accept else ids(closing_text(stage, state)))
    count = len(tags)
    return StageTables(pack(openings, (count, TAILS)), pack(closings, (count, accept + TAILS)), jax.device_put(readers))


def closing_text(stage: str, state: int) -> str:
    """What closes a stage of which ``state`` bytes of the closing tag are there, and a blank line."""
    tag = f"</{stage}>"
    return (f" {tag}" if state == 0 else tag.encode()[state:].decode(errors="ignore")) + "\n\n"


def judge_tables(processor: Processor, plan: Plan, judge: Judge, prompts: JudgePrompts) -> JudgeTables:
    """The tables for the judge of ``plan``'s candidates.

    Raises:
        UserError: a stem after which a verdict is not the natural next token.
    """
    stages = plan.stages or (WHOLE,)
    parts: dict[str, list[list[int]]] = {name: [] for name in ("intro", "middle", "label", "between", "ending")}
    for kind in KINDS:
        for stage in stages:
            _, *texts = prompts.cut(processor, kind, stage, stages, images=0)
            if kind == "check":
                texts.insert(3, "")  # there is no second candidate
            elif judge.verdict == "token":
                texts[-1] += prompts.stem
            for name, text in zip(parts, texts, strict=True):
                parts[name].append(tokens_of(processor, text))
    entries = vocabulary_bytes(processor.tokenizer, processor.config.text.vocab_size)
    automata = [
        (ignoring_case(find_strings([reading.lower().encode() for reading in prompts.readings[kind]])), 2)
        for kind in KINDS
    ]
    shape = (len(KINDS), len(stages))
    shows = [[[other in prompts.shown(stage, stages) for other in stages] for stage in stages] for _ in KINDS]
    checked = [judge.verdict == "rationale" and stage in prompts.checked for stage in stages]
    return JudgeTables(
        **{name: pack(rows, shape) for name, rows in parts.items()},
        shows=jax.device_put(np.array(shows)),
        checked=jax.device_put(np.array(checked)),
        verdicts=jax.device_put(np.array(_verdict_tokens(processor, stages, prompts), np.int32)),
        readers=jax.device_put(tabulate(automata, entries)[0]),
    )


def _verdict_tokens(processor: Processor, stages: Sequence[str], prompts: JudgePrompts) -> list[int]:
    """The tokens of the two verdicts after the stem."""
    ending = prompts.cut(processor, "pair", stages[0], stages, images=0)[-1] + prompts.stem
    before = tokens_of(processor, ending)
    found = []
    for verdict in prompts.verdicts:
        *same, last = tokens_of(processor, ending + verdict)
        if same != before:
            raise UserError(
                f"after the judge's stem {prompts.stem!r} the verdict {verdict!r} is not one natural next token: "
                'end the stem with a space and let the verdicts be digits, as in "I choose response "'
            )
        found.append(last)
    return found


def leads(processor: Processor, prompts: JudgePrompts, kind: Kind, stages: Sequence[str], images: int) -> list[int]:
    """What stands before a judge's prompt: the beginning of the text, a header, the images."""
    return tokens_of(processor, prompts.cut(processor, kind, stages[0], stages, images=images)[0])


def tokens_of(processor: Processor, text: str) -> list[int]:
    """The ids of a text, as they stand; special tokens count."""
    return processor.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
