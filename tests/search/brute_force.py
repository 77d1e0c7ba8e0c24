"""The search in plain Python: one sequence at a time, the whole forward pass for every token, no cache, no batch.

It is written from the rules alone. It uses the package's forward pass of the model, its processor, and the texts of the
judge's prompts. Tags and verdicts are looked for in decoded text.
"""

import re
from collections import Counter
from dataclasses import dataclass, field

import jax
import numpy as np

from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.processing.messages import user_turn
from llava_cot_jax.processing.processor import Processor
from llava_cot_jax.search.prompts import JudgePrompts
from llava_cot_jax.search.scorers import Judge, LogProbability, OwnScorer, Verifier
from llava_cot_jax.search.strategies import MajorityVote, WeightedVote
from llava_cot_jax.stage_format import StageFormat
from llava_cot_jax.stages import find_stages

WIDTH = 64
"""Multiple that the lengths of sequences are padded to, so that the forward pass is compiled a few times only."""

TURN = (
    "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{ask}"
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)
"""What comes between two answers of the assistant, in Llama 3's chat format."""

CANDIDATE, BRACKET, REASON, CHECK = range(4)


@dataclass
class Draws:
    """Tokens sampled after others."""

    ids: list[int]
    ended: str
    log_prob: float
    drawn: int
    margins: list[float] = field(default_factory=list)  # lead in score of each draw over the second best


@dataclass
class Verdict:
    first: int
    second: int | None
    vote: float
    reason: str | None = None


@dataclass
class Match:
    first: int
    second: int
    margin: float
    decision: str
    winner: int


@dataclass
class Stage:
    candidates: list[Draws]
    winner: int
    kept: list[list[int]] = field(default_factory=list)
    checks: list[Verdict] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    matches: list[Match] = field(default_factory=list)
    scores: list[tuple[float, float]] = field(default_factory=list)  # of the verifier, and what is on neither answer


def next_headings(format: StageFormat, number: int) -> list[str]:
    """Return the headings that may end a stage: those of the later stages of its turn."""
    later = format.stages[number + 1 :]
    turn = next((i for i, stage in enumerate(later) if stage.ask), len(later))
    return [stage.opening.strip() for stage in later[:turn]]


def ends_in(text: str, headings: list[str]) -> bool:
    """Whether a heading is in a text, or the text ends with the beginning of one."""
    return any(
        heading in text or text.endswith(tuple(heading[:n] for n in range(1, len(heading)))) for heading in headings
    )


class Sequence:
    """A prompt that tokens can be appended to."""

    def __init__(self, model: Mllama, processor: Processor, prompt: list[int], images: list) -> None:
        self._model = model
        self._arrays = processor.collate([prompt], [images])
        self._arrays.pop("attention_mask")

    def logits(self, ids: list[int]) -> np.ndarray:
        """Return the logits after ``ids``, which begin with the prompt."""
        width = len(ids) + -len(ids) % WIDTH
        arrays = dict(self._arrays)
        row = np.zeros((1, width), np.int32)
        row[0, : len(ids)] = ids
        if "cross_attention_mask" in arrays:
            mask = arrays["cross_attention_mask"]
            more = np.repeat(mask[:, -1:], width - mask.shape[1], axis=1)
            arrays["cross_attention_mask"] = np.concatenate([mask, more], axis=1)
        present = (np.arange(width) < len(ids))[None].astype(np.int32)
        return np.asarray(self._model(**{**arrays, "input_ids": row}, attention_mask=present)[0, len(ids) - 1])


def draw(logits: np.ndarray, key: jax.Array, temperature: float, top_k: int | None, top_p: float) -> tuple[int, float]:
    """Sample a token. Return it with its lead in score over the second best."""
    if temperature == 0:
        order = np.argsort(-logits, kind="stable")
        return int(order[0]), float(logits[order[0]] - logits[order[1]])
    scaled = (logits / np.float32(temperature)).astype(np.float32)
    ids = np.arange(len(logits))
    if top_k is not None or top_p < 1:
        ids = np.argsort(-scaled, kind="stable")[:top_k]
        scaled = scaled[ids]
    if top_p < 1:
        p = np.exp(scaled - scaled.max())
        p /= p.sum()
        scaled = np.where((np.cumsum(p) - p < top_p) | (np.arange(len(p)) == 0), scaled, -np.inf)
    score = scaled + noise(key, ids)
    order = np.argsort(-score, kind="stable")
    return int(ids[order[0]]), float(score[order[0]] - score[order[1]])


def noise(key: jax.Array, ids: np.ndarray) -> np.ndarray:
    """Return the Gumbel noise of tokens, which the first word of the key with a token's id folded in decides."""
    words = np.asarray(jax.random.key_data(jax.vmap(jax.random.fold_in, (None, 0))(key, ids)))[:, 0]
    return -np.log(-np.log((words // 2**9 + 0.5) / 2**23))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


def search(model: Mllama, processor: Processor, strategy, image, question: str, seed: int, prompts: JudgePrompts):
    """Return the stages of an answer."""
    return Search(model, processor, strategy, image, question, seed, prompts).run()


class Search:
    def __init__(self, model, processor, strategy, image, question, seed, prompts) -> None:
        self.model, self.processor, self.strategy, self.prompts = model, processor, strategy, prompts
        self.images = [] if image is None else [image]
        self.question, self.key = question, jax.random.key(seed)
        self.spec = strategy.to_spec()
        self.stage_names = self.spec.stages or ("whole",)
        self.won: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def run(self) -> list[Stage]:
        spec, format, stages = self.spec, self.spec.format, []
        asked = (format.stages[0].ask or "{question}").replace("{question}", self.question)
        prompt = self.ids(self.processor.prompt(user_turn(asked, len(self.images))))
        main = Sequence(self.model, self.processor, prompt, self.images)
        prefix, breaks = list(prompt), 2
        for number, max_new_tokens in enumerate(spec.max_new_tokens):
            tag = spec.stages[number] if spec.stages else None
            marks = format.stages[number if spec.stages else -1]
            closing = (marks.closing or "").strip()
            headings = [] if closing or tag is None else next_headings(format, number)
            if tag is not None and number and marks.ask:
                prefix += self.ids(TURN.format(ask=marks.ask) + (marks.opening or ""))
            elif tag is not None and marks.opening:
                prefix += self.ids("\n" * (2 - breaks) + marks.opening)
            stage_key = jax.random.fold_in(self.key, number)
            of_candidates = jax.random.fold_in(stage_key, CANDIDATE)
            ends = [closing] if closing else headings
            candidates = [
                self.write(
                    main,
                    prefix,
                    jax.random.fold_in(of_candidates, i),
                    max_new_tokens,
                    spec.temperatures[number],
                    lambda text, ends=ends: any(end in text for end in ends),
                )
                for i in range(spec.num_candidates[number])
            ]
            added = [self.missing(c, closing) if tag is not None and closing else "" for c in candidates]
            kept = [self.before(c, headings) for c in candidates]
            label = (
                "" if tag is None else marks.opening if closing else "\n" + (marks.opening or f"{tag.capitalize()}: ")
            )
            texts = [self.ids(label) + k + self.ids(a) for k, a in zip(kept, added, strict=True)]
            scores = []
            if isinstance(spec.scorers[0], Verifier):
                whole = [prefix + k + self.ids(a) for k, a in zip(kept, added, strict=True)]
                scores = [self.verify(main, ids, tag or "whole") for ids in whole]
            stage = self.choose(candidates, texts, tag or "whole", stage_key, scores)
            stage.kept = kept
            stages.append(stage)
            won = kept[stage.winner]
            prefix += won + self.ids(added[stage.winner])
            self.won[tag or "whole"] = texts[stage.winner]
            tail = self.text(won).partition(closing)[2] if closing else self.text(won)
            tail = "\n\n" if added[stage.winner] else tail
            breaks = min(len(tail) - len(tail.rstrip("\n")), 2)
        return stages

    def before(self, candidate: Draws, headings: list[str]) -> list[int]:
        """Return the tokens up to the last one after which no heading is complete or has begun."""
        if candidate.ended == "eos":
            return candidate.ids
        counts = range(len(candidate.ids), 0, -1)
        return candidate.ids[: next((n for n in counts if not ends_in(self.text(candidate.ids[:n]), headings)), 0)]

    def text(self, ids: list[int]) -> str:
        return self.processor.decode(ids)

    def write(self, sequence, ids, key, max_new_tokens, temperature, is_end) -> Draws:
        """Sample until ``is_end(text)``, an end-of-sequence token, or ``max_new_tokens`` tokens."""
        written, total, margins = [], 0.0, []
        for place in range(max_new_tokens):
            logits = sequence.logits(ids + written)
            token, margin = draw(
                logits, jax.random.fold_in(key, place), temperature, self.spec.sampling.top_k, self.spec.sampling.top_p
            )
            margins.append(margin)
            total += log_softmax(logits)[token]
            if token in self.model.config.text.eos_token_ids:
                return Draws(written, "eos", total, place + 1, margins)
            written.append(token)
            if is_end(self.text(written)):
                return Draws(written, "tag", total, place + 1, margins)
        return Draws(written, "max_new_tokens", total, max_new_tokens, margins)

    def missing(self, candidate: Draws, closing: str) -> str:
        """Return the text that closes a stage which the model did not close."""
        if candidate.ended == "tag":
            return ""
        text = self.text(candidate.ids)
        there = max(n for n in range(len(closing)) if text.endswith(closing[:n]))
        return (closing[there:] if there else " " + closing) + "\n\n"

    def verify(self, sequence: Sequence, ids: list[int], tag: str) -> tuple[float, float]:
        """Return the verifier's score of the candidate that ``ids`` end with, and what is on neither answer."""
        probe = self.prompts.probe
        question = probe.questions.get(tag, probe.questions["other"])
        text = "<|eot_id|>" + "".join(
            f"<|start_header_id|>{role}<|end_header_id|>\n\n{content}"
            for role, content in (("user", question + "<|eot_id|>"), ("assistant", probe.stem))
        )
        p = np.exp(log_softmax(sequence.logits(ids + self.ids(text))))
        yes, no = (p[self.ids(probe.stem + answer)[-1]] for answer in probe.answers)
        return float(yes / (yes + no)), float(1 - yes - no)

    def choose(
        self,
        candidates: list[Draws],
        texts: list[list[int]],
        tag: str,
        key: jax.Array,
        scores: list[tuple[float, float]],
    ) -> Stage:
        means = [c.log_prob / c.drawn for c in candidates]
        scorer = self.spec.scorers[(self.spec.stages or (tag,)).index(tag)]
        if isinstance(self.strategy, MajorityVote | WeightedVote):
            answers = [find_stages(self.text(c.ids)).get("CONCLUSION", self.text(c.ids)) for c in candidates]
            spaced = [" ".join(a.lower().split()) for a in answers]
            votes = [re.sub(r"^\W+|\W+$", "", text) or text for text in spaced]
            weights = [score for score, _ in scores] or [1.0] * len(votes)
            totals = Counter[str]()
            for vote, weight in zip(votes, weights, strict=True):
                totals[vote] += weight
            ranks = [(totals[vote], *rest) for vote, *rest in zip(votes, weights, means, strict=True)]
            return Stage(candidates, max(range(len(votes)), key=ranks.__getitem__), scores=scores)
        if isinstance(scorer, Verifier):
            ranks = [(score, mean) for (score, _), mean in zip(scores, means, strict=True)]
            return Stage(candidates, max(range(len(ranks)), key=ranks.__getitem__), scores=scores)
        if isinstance(scorer, LogProbability):
            return Stage(candidates, int(np.argmax(means)))
        if isinstance(scorer, OwnScorer):
            before = [self.text(ids).strip() for ids in self.won.values()]
            answers = ["\n\n".join([*before, self.text(ids).strip()]) for ids in texts]
            return Stage(candidates, int(np.nanargmax(scorer.function(self.images, self.question, tag, answers))))
        if not isinstance(scorer, Judge) or len(candidates) == 1:
            return Stage(candidates, 0)
        stage = Stage(candidates, 0)
        failed = set()
        if scorer.verdict == "rationale" and tag in self.prompts.checked:
            stage.checks = [self.check(text, i, tag, key) for i, text in enumerate(texts)]
            failed = {v.first for v in stage.checks if v.vote < 0}
        lots = [
            float(jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, BRACKET), i)))
            for i in range(len(candidates))
        ]
        alive = sorted(range(len(candidates)), key=lambda i: lots[i])
        while len(alive) > 1:
            winners = [alive.pop()] if len(alive) % 2 else []
            for first, second in zip(alive[::2], alive[1::2], strict=True):
                winners.append(self.play(stage, texts, means, failed, first, second, tag, key))
            alive = winners
        stage.winner = alive[0]
        return stage

    def play(self, stage, texts, means, failed, first, second, tag, key) -> int:
        votes = []
        for order in range(self.spec.judge.orders):
            one, two = (second, first) if order else (first, second)
            verdict = self.judge(texts[one], texts[two], one, two, tag, key)
            stage.verdicts.append(verdict)
            votes.append(-verdict.vote if order else verdict.vote)
        margin, decision = float(np.mean(votes)), "judged"
        if (first in failed) != (second in failed):
            margin, decision = (-1.0 if first in failed else 1.0), "checked"
        elif margin == 0:
            decision = "scored"
        if margin == 0:
            winner = first if (means[first], -first) > (means[second], -second) else second
        else:
            winner = first if margin > 0 else second
        stage.matches.append(Match(first, second, margin, decision, winner))
        return winner

    def prompt_of(self, kind: str, tag: str, texts: list[list[int]], images: int) -> list[int]:
        stages = self.stage_names
        header, intro, middle, label, *rest = self.prompts.split(self.processor, kind, tag, stages, images)
        if kind == "pair" and self.spec.judge.verdict == "token":
            rest[-1] += self.prompts.stem
        ids = self.ids(header) + self.ids(intro) + self.ids(self.question) + self.ids(middle)
        for earlier in self.prompts.shown_stages(tag, stages):
            ids += self.won[earlier]
        ids += self.ids(label)
        for text, after in zip(texts, rest, strict=True):
            ids += text + self.ids(after)
        return ids

    def judge(self, one: list[int], two: list[int], first: int, second: int, tag: str, key: jax.Array) -> Verdict:
        judge = self.spec.judge
        ids = self.prompt_of("pair", tag, [one, two], len(self.images))
        sequence = Sequence(self.model, self.processor, ids, self.images)
        if judge.verdict == "token":
            scores = log_softmax(sequence.logits(ids))
            p1, p2 = (np.exp(scores[self.ids(self.prompts.stem + v)[-1]]) for v in self.prompts.verdicts)
            return Verdict(first, second, float((p1 - p2) / (p1 + p2)))
        key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, REASON), first), second)
        return self.read_verdict("pair", sequence, ids, key, judge.reason_tokens, first, second)

    def check(self, text: list[int], i: int, tag: str, key: jax.Array) -> Verdict:
        ids = self.prompt_of("check", tag, [text], 0)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, CHECK), i), 0)
        sequence = Sequence(self.model, self.processor, ids, [])
        return self.read_verdict("check", sequence, ids, key, self.spec.judge.check_tokens, i, None)

    def read_verdict(self, kind, sequence, ids, key, max_new_tokens, first, second) -> Verdict:
        yes, no = (r.lower() for r in self.prompts.readings[kind])
        either = re.compile("|".join(re.escape(r) for r in sorted((yes, no), key=len, reverse=True)))
        judge = self.spec.judge
        found = self.write(
            sequence, ids, key, max_new_tokens, judge.temperature, lambda text: either.search(text.lower()) is not None
        )
        text = self.text(found.ids)
        match = either.search(text.lower())
        vote = 0.0 if match is None else 1.0 if match[0] == yes else -1.0
        return Verdict(first, second, vote, text)
