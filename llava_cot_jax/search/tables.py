"""Tables of a search on the device: tokens that open and close stages, parts of the judge's prompts, stop tables."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from llava_cot_jax.errors import UserError
from llava_cot_jax.inference.ragged_tokens import RaggedTokens, pad
from llava_cot_jax.inference.stop_strings import (
    TAILS,
    case_insensitive,
    compile_stop_table,
    string_automaton,
    tag_automaton,
    vocabulary_bytes,
)
from llava_cot_jax.processing.processor import Processor
from llava_cot_jax.search.prompts import PROMPT_KINDS, WHOLE_ANSWER, JudgePrompts, PromptKind
from llava_cot_jax.search.strategies import Judge, SearchSpec
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
        stop_tables: Stop table of each stage's closing tag, uint8 [stages, states, vocab].
    """

    openings: RaggedTokens
    closings: RaggedTokens
    stop_tables: jax.Array

    @property
    def accept(self) -> int:
        """First state of the stop tables in which the whole tag has been seen."""
        return self.stop_tables.shape[1]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class JudgeTables:
    """The judge's prompts as pieces (``prompts`` draws them), each [kinds, stages], and how to read a verdict.

    Attributes:
        intro, middle, label, between, ending: the texts between the holes.
        shows: bool [kinds, stages, stages], which earlier stages the judge of a stage is shown.
        checked: bool [stages], whose candidates are checked.
        verdicts: int32 [2], the tokens that say 1 and 2.
        stop_tables: Stop table of written verdicts for each kind of prompt, uint8 [kinds, states, vocab].
    """

    intro: RaggedTokens
    middle: RaggedTokens
    label: RaggedTokens
    between: RaggedTokens
    ending: RaggedTokens
    shows: jax.Array
    checked: jax.Array
    verdicts: jax.Array
    stop_tables: jax.Array


def build_stage_tables(processor: Processor, spec: SearchSpec) -> StageTables:
    """The tables for ``spec``'s stages; for whole answers, whose end is LLaVA-CoT's last closing tag, one stage.

    Raises:
        UserError: a tokenizer that is not byte-level, or a tag that is too long.
    """
    entries = vocabulary_bytes(processor.tokenizer, processor.config.text.vocab_size)
    tags = [f"</{stage}>" for stage in spec.stages or STAGES[-1:]]
    stop_tables, accept = compile_stop_table([(tag_automaton(tag.encode()), TAILS) for tag in tags], entries)

    def ids(text: str) -> list[int]:
        return token_ids(processor, text)

    openings: list[list[int]] = []
    closings: list[list[int]] = []
    for stage in spec.stages or (None,):
        for tail in range(TAILS):
            openings.append([] if stage is None else ids("\n" * (BLANK_LINE - tail) + f"<{stage}>"))
        for state in range(accept + TAILS):
            closings.append([] if stage is None or state >= accept else ids(closing_text(stage, state)))
    count = len(tags)
    return StageTables(
        pad(openings, (count, TAILS)), pad(closings, (count, accept + TAILS)), jax.device_put(stop_tables)
    )


def closing_text(stage: str, state: int) -> str:
    """What closes a stage of which ``state`` bytes of the closing tag are there, and a blank line."""
    tag = f"</{stage}>"
    return (f" {tag}" if state == 0 else tag.encode()[state:].decode(errors="ignore")) + "\n\n"


def build_judge_tables(processor: Processor, spec: SearchSpec, judge: Judge, prompts: JudgePrompts) -> JudgeTables:
    """The tables for the judge of ``spec``'s candidates.

    Raises:
        UserError: a stem after which a verdict is not the natural next token.
    """
    stages = spec.stages or (WHOLE_ANSWER,)
    parts: dict[str, list[list[int]]] = {name: [] for name in ("intro", "middle", "label", "between", "ending")}
    for kind in PROMPT_KINDS:
        for stage in stages:
            _, *texts = prompts.cut(processor, kind, stage, stages, images=0)
            if kind == "check":
                texts.insert(3, "")  # there is no second candidate
            elif judge.verdict == "token":
                texts[-1] += prompts.stem
            for name, text in zip(parts, texts, strict=True):
                parts[name].append(token_ids(processor, text))
    entries = vocabulary_bytes(processor.tokenizer, processor.config.text.vocab_size)
    automata = [
        (case_insensitive(string_automaton([reading.lower().encode() for reading in prompts.readings[kind]])), 2)
        for kind in PROMPT_KINDS
    ]
    shape = (len(PROMPT_KINDS), len(stages))
    shows = [[[other in prompts.shown(stage, stages) for other in stages] for stage in stages] for _ in PROMPT_KINDS]
    checked = [judge.verdict == "rationale" and stage in prompts.checked for stage in stages]
    return JudgeTables(
        **{name: pad(rows, shape) for name, rows in parts.items()},
        shows=jax.device_put(np.array(shows)),
        checked=jax.device_put(np.array(checked)),
        verdicts=jax.device_put(np.array(_verdict_tokens(processor, stages, prompts), np.int32)),
        stop_tables=jax.device_put(compile_stop_table(automata, entries)[0]),
    )


def _verdict_tokens(processor: Processor, stages: Sequence[str], prompts: JudgePrompts) -> list[int]:
    """The tokens of the two verdicts after the stem."""
    ending = prompts.cut(processor, "pair", stages[0], stages, images=0)[-1] + prompts.stem
    before = token_ids(processor, ending)
    found = []
    for verdict in prompts.verdicts:
        *same, last = token_ids(processor, ending + verdict)
        if same != before:
            raise UserError(
                f"after the judge's stem {prompts.stem!r} the verdict {verdict!r} is not one natural next token: "
                'end the stem with a space and let the verdicts be digits, as in "I choose response "'
            )
        found.append(last)
    return found


def chat_headers(processor: Processor, prompts: JudgePrompts, kind: PromptKind, stages: Sequence[str], images: int) -> list[int]:
    """What stands before a judge's prompt: the beginning of the text, a header, the images."""
    return token_ids(processor, prompts.cut(processor, kind, stages[0], stages, images=images)[0])


def token_ids(processor: Processor, text: str) -> list[int]:
    """The ids of a text, as they stand; special tokens count."""
    return processor.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
