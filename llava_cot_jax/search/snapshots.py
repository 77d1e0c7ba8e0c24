"""Snapshots of a search while it runs, for a function that shows them."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import Mesh

from llava_cot_jax.checks import shown
from llava_cot_jax.errors import UserError
from llava_cot_jax.inference.completions import INCOMPLETE
from llava_cot_jax.inference.decoding import EndReason, Samples
from llava_cot_jax.search.answers import AnswerMaker
from llava_cot_jax.search.program import StageResult
from llava_cot_jax.search.scorers import OwnScores
from llava_cot_jax.search.strategies import SearchSpec
from llava_cot_jax.search.trace import CandidateTrace, StageTrace, stage_name, trace_candidates

_SECONDS, _MOST_STEPS = 0.1, 64
"""Seconds between two snapshots, about, and the largest number of decoding steps between them."""


@dataclass(frozen=True)
class SearchSnapshot:
    """The search for the answer to a question, as far as it is.

    Attributes:
        stages: Names of all stages in their order; "whole" alone where answers are sampled whole.
        finished: The stages that have a winner, as ``Answer.trace`` has them.
        candidates: Candidates of the next stage, ``stages[len(finished)]``, so far. One that is still being written has
            the beginning of its text, in whole characters, and nothing in ``ended`` and ``added``. Empty before the
            first token of the stage.
    """

    stages: tuple[str, ...]
    finished: tuple[StageTrace, ...] = ()
    candidates: tuple[CandidateTrace, ...] = ()

    @property
    def num_ended(self) -> int:
        """Number of candidates that are written. Once it is all of them, the stage's scorer chooses."""
        return sum(bool(candidate.ended) for candidate in self.candidates)


OnSearchProgress = Callable[[SearchSnapshot], object]
"""Function that is called with snapshots of a search: about ten times in a second, and when a stage has its winner."""


def check_progress_function(function: Any, spec: SearchSpec, strategy: Any, mesh: Mesh | None) -> None:
    """Check that a function can be called with snapshots of a search.

    Raises:
        UserError: It is no function, or the search is one compiled program, or the model is on the devices of several
            processes, which would stop for a snapshot at different times.
    """
    if not callable(function):
        raise UserError(f"on_progress is {shown(function)}; it must be a function that takes a SearchSnapshot")
    if not spec.can_stream:
        raise UserError(
            f"{type(strategy).__name__} runs as one program, which tells no progress: leave out on_progress, or search "
            "with StageBeam()"
        )
    if mesh is not None and mesh.is_multi_process:
        raise UserError("on_progress is for a model in one process: leave it out where several have one model")


class SnapshotReporter:
    """Calls a function with snapshots of the search of one question.

    Args:
        on_progress: The function.
        maker: Maker of the search's answer.

    Attributes:
        max_steps: Largest number of decoding steps until the next snapshot, by how long the last ones took.
    """

    def __init__(self, on_progress: OnSearchProgress, maker: AnswerMaker) -> None:
        self._on_progress, self._maker = on_progress, maker
        names = tuple(stage_name(maker.spec, number) for number in range(maker.spec.num_stages))
        self._last = SearchSnapshot(names)
        self._told = time.perf_counter()
        self.max_steps = 1

    def tell_candidates(self, samples: Samples, kept: jax.Array) -> None:
        """Tell the candidates of the present stage so far.

        Args:
            samples: The candidates, in host arrays [candidates, ...].
            kept: int32, number of tokens that are kept of each.
        """
        is_slow = time.perf_counter() - self._told > _SECONDS
        self.max_steps = max(self.max_steps // 2, 1) if is_slow else min(2 * self.max_steps, _MOST_STEPS)
        spec, number = self._maker.spec, len(self._last.finished)
        goes_on = (samples.ended == EndReason.MAX_NEW_TOKENS) & (samples.lengths < spec.max_new_tokens[number])
        traces = trace_candidates(self._maker.processor, spec, number, samples, kept)
        candidates = (_open(one) if goes_on[i] else one for i, one in enumerate(traces))
        self._tell(replace(self._last, candidates=tuple(candidates)))

    def tell_winner(self, stages: Sequence[StageResult], own_scores: Mapping[int, OwnScores]) -> None:
        """Tell the stages so far, the last of which has its winner; the arguments are those of ``AnswerMaker.make``."""
        finished = self._maker.trace_stages(stages, own_scores)
        self._tell(replace(self._last, finished=tuple(finished), candidates=()))

    def _tell(self, snapshot: SearchSnapshot) -> None:
        self._last = snapshot
        self._on_progress(snapshot)
        self._told = time.perf_counter()


def _open(candidate: CandidateTrace) -> CandidateTrace:
    """Return a candidate that is still being written."""
    return replace(candidate, text=candidate.text.rstrip(INCOMPLETE), ended="", added="")
