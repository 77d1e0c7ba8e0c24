"""The search sentence by sentence in plain Python: the answer so far is read anew, byte by byte, after every token."""

import jax

from llava_cot_jax.inference.sentences import sentence_automaton
from llava_cot_jax.inference.stop_strings import vocabulary_bytes
from llava_cot_jax.processing.messages import user_turn
from llava_cot_jax.search.scorers import Verifier
from tests.search.brute_force import CANDIDATE, Search, Sequence, Stage

END = b"</CONCLUSION>"


class SentenceSearch(Search):
    """It is the search of ``brute_force``, but for what a candidate is and where it ends."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        config = self.processor.config.text
        self.entries = vocabulary_bytes(self.processor.tokenizer, config.vocab_size, self.processor.control_tokens)
        self.automaton, _ = sentence_automaton(END)
        self.stage_names = ("first sentence", "sentence")

    def bytes_of(self, ids: list[int]) -> bytes:
        return b"".join(self.entries[token] for token in ids)

    def text(self, ids: list[int]) -> str:
        """Return the bytes of tokens, each as a character, so that a part of a character is one too."""
        return self.bytes_of(ids).decode("latin-1")

    def ends_in(self, before: bytes, text: bytes) -> bool:
        """Whether a sentence or the answer ends in ``text``, which comes after ``before``."""
        unfinished, state = len(self.automaton) // 2, 0
        for place, byte in enumerate(before + text):
            state = int(self.automaton[state, byte])
            if state >= unfinished:
                if place >= len(before):
                    return True
                state -= unfinished
        return False

    def run(self) -> list[Stage]:
        strategy, stages, answer = self.strategy, list[Stage](), list[int]()
        prompt = self.ids(self.processor.prompt(user_turn(self.question, len(self.images))))
        main = Sequence(self.model, self.processor, prompt, self.images)
        for number in range(strategy.max_sentences):
            name, key = self.stage_names[min(number, 1)], jax.random.fold_in(self.key, number)
            before = self.bytes_of(answer)
            longest = min(strategy.max_sentence_tokens, strategy.max_new_tokens - len(answer))
            candidates = [
                self.write(
                    main,
                    prompt + answer,
                    jax.random.fold_in(jax.random.fold_in(key, CANDIDATE), i),
                    longest,
                    strategy.temperature,
                    lambda text, before=before: self.ends_in(before, text.encode("latin-1")),
                )
                for i in range(strategy.num_candidates)
            ]
            texts = [prompt + answer + candidate.ids for candidate in candidates]
            scores = []
            if isinstance(strategy.scorer, Verifier):
                scores = [self.verify(main, ids, "sentence") for ids in texts]
            self.won["first sentence"] = list(answer)
            stage = self.choose(candidates, [c.ids for c in candidates], name, key, scores)
            stages.append(stage)
            won = candidates[stage.winner]
            answer += won.ids
            if won.ended == "eos" or END in self.bytes_of(answer) or len(answer) >= strategy.max_new_tokens:
                break
        return stages
