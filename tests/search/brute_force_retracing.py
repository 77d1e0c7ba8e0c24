"""The retracing search in plain Python: every candidate is a sequence of its own that is read anew for every token."""

from dataclasses import dataclass, field

import jax

from llava_cot_jax.processing.messages import user_turn
from tests.search.brute_force import CANDIDATE, Draws, Search, Sequence

ROUND = 4


@dataclass
class Scored:
    """A candidate with the tokens up to its end, and its parent."""

    draws: Draws
    ids: list[int]
    breaks: int
    score: tuple[float, float]
    parent: int = 0

    @property
    def rank(self) -> tuple[float, float]:
        return self.score[0], self.draws.log_prob / self.draws.drawn


@dataclass
class Found:
    """All candidates by stage, those of rounds by round too, and the places of those that won."""

    summary: Scored
    captions: list[list[Scored]] = field(default_factory=list)
    reasonings: list[list[Scored]] = field(default_factory=list)
    conclusions: list[Scored] = field(default_factory=list)
    winner: int = 0


class RetracingSearch(Search):
    def write_stage(self, sequence, before: Scored, stage: int, round_: int, group: int, count: int) -> list[Scored]:
        tag = self.spec.stages[stage]
        prefix = before.ids + self.ids("\n" * (2 - before.breaks) + f"<{tag}>")
        key = jax.random.fold_in(jax.random.fold_in(self.key, stage), ROUND)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, round_), group), CANDIDATE)
        found = []
        for i in range(count):
            draws = self.write(
                sequence,
                prefix,
                jax.random.fold_in(key, i),
                self.spec.max_new_tokens[stage],
                self.spec.temperatures[stage],
                lambda text: f"</{tag}>" in text,
            )
            added = self.missing(draws, f"</{tag}>")
            ids = prefix + draws.ids + self.ids(added)
            tail = "\n\n" if added else self.text(draws.ids).partition(f"</{tag}>")[2]
            breaks = min(len(tail) - len(tail.rstrip("\n")), 2)
            found.append(Scored(draws, ids, breaks, self.verify(sequence, ids, tag)))
        return found

    def run(self) -> Found:
        strategy = self.strategy
        prompt = self.ids(self.processor.prompt(user_turn(self.question, len(self.images))))
        main = Sequence(self.model, self.processor, prompt, self.images)
        start = Scored(Draws([], "", 0.0, 1), prompt, 2, (0.0, 0.0))
        (summary,) = self.write_stage(main, start, 0, 0, 0, 1)
        found = Found(summary)
        pool: list[tuple[int, Scored]] = []
        for round_ in range(strategy.max_rounds):
            captions = self.write_stage(main, summary, 1, round_, 0, strategy.captions)
            kept = sorted(range(len(captions)), key=lambda i: captions[i].rank, reverse=True)[: strategy.keep]
            reasonings = []
            for group, caption in enumerate(kept):
                for one in self.write_stage(main, captions[caption], 2, round_, group, strategy.reasonings):
                    one.parent = caption
                    reasonings.append(one)
            pool += [(len(pool) + i, one) for i, one in enumerate(reasonings)]
            found.captions.append(captions)
            found.reasonings.append(reasonings)
            best = sorted(pool, key=lambda each: each[1].rank, reverse=True)
            if best[1][1].score[0] > strategy.threshold:
                break
        for group, (number, reasoning) in enumerate(best[: strategy.conclusions]):
            (conclusion,) = self.write_stage(main, reasoning, 3, 0, group, 1)
            conclusion.parent = number
            found.conclusions.append(conclusion)
        found.winner = max(range(len(found.conclusions)), key=lambda i: found.conclusions[i].rank)
        return found
