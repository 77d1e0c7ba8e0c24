"""Tables of a search on the device: tokens that open and close stages, texts of the judge's prompts, stop tables."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int, UInt8

from llava_cot_jax.inference.ragged_tokens import RaggedTokens, pad
from llava_cot_jax.inference.sentences import sentence_automaton
from llava_cot_jax.inference.stop_strings import (
    TAILS,
    Automaton,
    case_insensitive,
    compile_stop_table,
    endless_automaton,
    heading_automaton,
    string_automaton,
    tag_automaton,
    vocabulary_bytes,
)
from llava_cot_jax.processing.messages import Message, user_message
from llava_cot_jax.processing.probe import FIRST_SENTENCE, SENTENCE, WHOLE_ANSWER, natural_tokens, token_ids
from llava_cot_jax.processing.processor import Processor
from llava_cot_jax.search.prompts import PROMPT_KINDS, JudgePrompts, PromptKind
from llava_cot_jax.search.scorers import Judge
from llava_cot_jax.search.strategies import SearchSpec
from llava_cot_jax.stage_format import StageFormat, StageMarks

_ANSWER = "\ue000"
"""Text that stands for an answer in the chat template: a character of Unicode's private use area."""

BLANK_LINE = TAILS - 1
"""Number of line breaks at the end of a text that ends with a blank line, as a prompt and a closed stage do."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StageTables:
    """Openings and closings of the stages, and stop tables that find their ends.

    An opening is given to the model, never sampled, so it cannot be missing. The rest of a closing that was not sampled
    whole is added: a candidate that reached its largest length after ``</SUM`` is closed by ``MARY>``. A stage without
    a closing ends before the opening of a later stage, which is cut off where the model writes it.

    Attributes:
        openings: Opening of each stage after a text with 0 to ``BLANK_LINE`` line breaks at its end, [stages, TAILS].
            That of a stage with a turn of its own begins with the end of the turn before, and what the user says.
        closings: Rest of the closing and a blank line, for each state of the stop table; nothing in the accepting
            states, nor for a stage or a sentence without a closing, [stages, states with the accepting ones].
        stop_tables: uint8, stop table of what ends each stage.
        labels: Text before a stage where the judge is shown it, [stages]; None where it is the opening.
        cuts: Whether a stage ends before the opening of a later stage; None where none does.
    """

    openings: RaggedTokens
    closings: RaggedTokens
    stop_tables: UInt8[Array, "stages states vocab"]
    labels: RaggedTokens | None = None
    cuts: Bool[Array, " stages"] | None = None

    @property
    def num_states(self) -> int:
        """Number of states in which a stage, or a sentence, goes on; those in which it has ended come after them."""
        return self.stop_tables.shape[1]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class JudgeTables:
    """Texts of the judge's prompts, each [kinds, stages], and how verdicts are read. ``prompts`` draws a prompt.

    Attributes:
        intro: Text between the chat header and the question.
        middle: Text between the question and the earlier stages.
        label: Text between the earlier stages and the first candidate.
        between: Text between the candidates.
        ending: Text after the last candidate.
        shows: Whether a prompt about a stage shows another, earlier stage.
        checked: Whether the candidates of a stage are checked.
        verdicts: int32, the two tokens of a token verdict.
        stop_tables: uint8, stop table of written verdicts for each kind of prompt.
    """

    intro: RaggedTokens
    middle: RaggedTokens
    label: RaggedTokens
    between: RaggedTokens
    ending: RaggedTokens
    shows: Bool[Array, "kinds stages stages"]
    checked: Bool[Array, " stages"]
    verdicts: Int[Array, "2"]
    stop_tables: UInt8[Array, "kinds states vocab"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class VerifierTables:
    """Texts by which the verifier asks whether a candidate is right, and how its answer is read.

    Attributes:
        probes: Text after a candidate of each stage: the end of the turn, a user's question, and the beginning of the
            answer, [stages].
        answers: int32, the tokens of "yes" and "no" after it.
    """

    probes: RaggedTokens
    answers: Int[Array, "2"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ScorerTables:
    """Tables of the scorers that the model computes.

    Attributes:
        judge: Tables of the judge; None where no stage has one.
        verifier: Tables of the verifier; None where no stage has one.
        threshold: Score above which the second-best reasoning of a retracing search must be; None in other searches.
    """

    judge: JudgeTables | None
    verifier: VerifierTables | None
    threshold: Float32[Array, ""] | None


def vocabulary_of(processor: Processor) -> list[bytes]:
    """Return the bytes of each entry of the vocabulary, from which stop tables are made.

    Raises:
        UserError: The tokenizer is not byte-level.
    """
    return vocabulary_bytes(processor.tokenizer, processor.config.text.vocab_size, processor.control_tokens)


def build_stage_tables(processor: Processor, spec: SearchSpec, entries: Sequence[bytes]) -> StageTables:
    """Return the tables of the stages of ``spec``, where ``entries`` are the bytes of the vocabulary's.

    Whole answers are one stage, which ends with the closing of the format's last stage and has nothing added. So are
    the sentences of answers, which also end where a sentence does.

    Raises:
        UserError: A closing, or an opening that ends a stage, is too long.
    """
    format = spec.format
    if spec.max_sentences:
        return _sentence_tables(format, entries)
    numbers = range(spec.num_stages) if spec.stages else range(len(format.stages) - 1, len(format.stages))
    automata = [(_end_automaton(format, number), TAILS) for number in numbers]
    stop_tables, num_states = compile_stop_table(automata, entries)
    count = len(numbers)
    openings: list[list[int]] = [[]] * TAILS
    closings: list[list[int]] = [[]] * (num_states + TAILS)
    if spec.stages:
        openings = [ids for number in numbers for ids in _openings(processor, format, number)]
        texts = [closing_text(stage, state) for stage in format.stages for state in range(num_states)]
        added = [token_ids(processor, text) for text in texts]
        closings = [ids for n in numbers for ids in [*added[n * num_states : (n + 1) * num_states], *[[]] * TAILS]]
    cuts = [stage.closing is None and bool(format.later_marks(n)) for n, stage in enumerate(format.stages)]
    is_labelled = bool(spec.stages) and any(stage.closing is None for stage in format.stages)
    return StageTables(
        pad(openings, (count, TAILS)),
        pad(closings, (count, num_states + TAILS)),
        jax.device_put(stop_tables),
        pad([token_ids(processor, _label(stage)) for stage in format.stages]) if is_labelled else None,
        jax.device_put(np.array(cuts)) if spec.stages and any(cuts) else None,
    )


def _sentence_tables(format: StageFormat, entries: Sequence[bytes]) -> StageTables:
    """Return the tables of the sentences of answers."""
    closing = format.stages[-1].closing
    automaton = sentence_automaton(closing.strip().encode() if closing else None)
    stop_tables, num_states = compile_stop_table([automaton], entries)
    nothing: list[list[int]] = [[]]
    closings = pad(nothing * (num_states + automaton[1]), (1, num_states + automaton[1]))
    return StageTables(pad(nothing * TAILS, (1, TAILS)), closings, jax.device_put(stop_tables))


def scored_stages(spec: SearchSpec) -> tuple[str, ...]:
    """Return the names of the stages in the tables of the scorers, whether answers are written by stages or not."""
    if spec.max_sentences:
        return FIRST_SENTENCE, SENTENCE
    return spec.stages or (WHOLE_ANSWER,)


def _end_automaton(format: StageFormat, number: int) -> Automaton:
    """Return the automaton that finds what ends a stage in its text."""
    if closing := format.stages[number].closing:
        return tag_automaton(closing.strip().encode())
    if later := format.later_marks(number):
        return heading_automaton([mark.encode() for mark in later])
    return endless_automaton()


def _openings(processor: Processor, format: StageFormat, number: int) -> list[list[int]]:
    """Return the tokens that open a stage after a text with 0 to ``BLANK_LINE`` line breaks at its end."""
    stage = format.stages[number]
    if number and stage.ask is not None:
        return [token_ids(processor, _turn(processor, stage.ask) + (stage.opening or ""))] * TAILS
    if stage.opening is None:
        return [[]] * TAILS
    return [token_ids(processor, "\n" * (BLANK_LINE - tail) + stage.opening) for tail in range(TAILS)]


def _turn(processor: Processor, ask: str) -> str:
    """Return the text from the end of an assistant's answer to the beginning of the next, with what the user says."""
    answer: Message = {"role": "assistant", "content": _ANSWER}
    prompt = processor.prompt([user_message("?"), answer, user_message(ask)])
    return prompt.partition(_ANSWER)[2]


def _label(stage: StageMarks) -> str:
    """Return what the judge is shown before a stage, of which it is not told that it is a turn."""
    if stage.closing:
        return stage.opening or ""
    return "\n" + (stage.opening or f"{stage.name.capitalize()}: ")


def closing_text(stage: StageMarks, state: int) -> str:
    """Return the text that closes a stage after ``state`` bytes of its closing, and a blank line."""
    if not stage.closing:
        return ""
    closing = stage.closing.strip()
    return (f" {closing}" if state == 0 else closing.encode()[state:].decode(errors="ignore")) + "\n\n"


def build_scorer_tables(
    processor: Processor, spec: SearchSpec, prompts: JudgePrompts, entries: Sequence[bytes]
) -> ScorerTables:
    """Return the tables of the judge and of the verifier of ``spec``, where ``entries`` are the vocabulary's bytes.

    Raises:
        UserError: A verdict or an answer is not the natural next token.
    """
    return ScorerTables(
        judge=None if spec.judge is None else build_judge_tables(processor, spec, spec.judge, prompts, entries),
        verifier=build_verifier_tables(processor, scored_stages(spec), prompts) if spec.has_verifier else None,
        threshold=None if spec.rounds is None else jnp.float32(spec.rounds.threshold),
    )


def build_judge_tables(
    processor: Processor, spec: SearchSpec, judge: Judge, prompts: JudgePrompts, entries: Sequence[bytes]
) -> JudgeTables:
    """Return the tables of the judge of the candidates of ``spec``, where ``entries`` are the vocabulary's bytes.

    Raises:
        UserError: A verdict is not the natural next token after the stem.
    """
    stages = scored_stages(spec)
    ids: dict[str, list[list[int]]] = {name: [] for name in ("intro", "middle", "label", "between", "ending")}
    for kind in PROMPT_KINDS:
        for stage in stages:
            _, *texts = prompts.split(processor, kind, stage, stages, images=0)
            if kind == "check":
                texts.insert(3, "")  # there is no second candidate
            elif not judge.writes_reasons:
                texts[-1] += prompts.stem
            for name, text in zip(ids, texts, strict=True):
                ids[name].append(token_ids(processor, text))
    automata = [
        (case_insensitive(string_automaton([reading.lower().encode() for reading in prompts.readings[kind]])), 2)
        for kind in PROMPT_KINDS
    ]
    shape = (len(PROMPT_KINDS), len(stages))
    shows = [[earlier in prompts.shown_stages(stage, stages) for earlier in stages] for stage in stages]
    checked = [judge.writes_reasons and stage in prompts.checked for stage in stages]
    return JudgeTables(
        **{name: pad(sequences, shape) for name, sequences in ids.items()},
        shows=jax.device_put(np.array([shows] * len(PROMPT_KINDS))),
        checked=jax.device_put(np.array(checked)),
        verdicts=jax.device_put(np.array(_verdict_tokens(processor, stages, prompts), np.int32)),
        stop_tables=jax.device_put(compile_stop_table(automata, entries)[0]),
    )


def build_verifier_tables(processor: Processor, stages: Sequence[str], prompts: JudgePrompts) -> VerifierTables:
    """Return the tables of the verifier of candidates of ``stages``, which are names as in ``scored_stages``.

    Raises:
        UserError: An answer is not the natural next token after a probe.
    """
    probes = [prompts.probe.of(stage) for stage in stages]
    answers = probes[0].answer_ids(processor)
    return VerifierTables(
        pad([token_ids(processor, probe.text(processor)) for probe in probes]),
        jax.device_put(np.array(answers, np.int32)),
    )


def _verdict_tokens(processor: Processor, stages: Sequence[str], prompts: JudgePrompts) -> list[int]:
    """Return the tokens of the two verdicts after the stem."""
    return natural_tokens(
        processor,
        prompts.split(processor, "pair", stages[0], stages, images=0)[-1] + prompts.stem,
        prompts.verdicts,
        f"after the judge's stem {prompts.stem!r} the verdict",
        'end the stem with a space and let the verdicts be digits, as in "I choose response "',
    )


def chat_header_ids(
    processor: Processor, prompts: JudgePrompts, kind: PromptKind, stages: Sequence[str], images: int
) -> list[int]:
    """Return the token ids at the beginning of the judge's prompts: the begin-of-text token, a header, the images."""
    return token_ids(processor, prompts.split(processor, kind, stages[0], stages, images=images)[0])
