"""Answers in the shapes of OpenAI's chat completions, whole and in events."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llava_cot_jax.processing.processor import Processor
from llava_cot_jax.question_result import result_of
from llava_cot_jax.search.answers import Answer, join_stages, tagged_text
from llava_cot_jax.serving.chat_request import ChatRequest
from llava_cot_jax.serving.orders import Answered
from llava_cot_jax.serving.searches import ChosenSearch
from llava_cot_jax.stages import locate_stages

NO_TEXT = "(no text)"
"""Content of an answer that has none, as tools take an empty one for a failure."""


@dataclass(frozen=True)
class ChatChoice:
    """Answer as a client gets it.

    Attributes:
        content: The conclusion, cut as the request asks.
        reasoning: The other stages with their tags; None where there are none.
        finish_reason: "stop", or "length" where the conclusion or the answer was cut.
        prompt_tokens: Number of tokens of the prompt.
        answer_tokens: Number of tokens of the answer, the other stages among them.
        reasoning_tokens: Number of tokens of the other stages.
        about: What this project tells of the answer.
    """

    content: str
    reasoning: str | None
    finish_reason: str
    prompt_tokens: int
    answer_tokens: int
    reasoning_tokens: int
    about: dict[str, Any]

    @property
    def message(self) -> dict[str, Any]:
        """The message of the assistant."""
        return {"role": "assistant", "content": self.content, "reasoning_content": self.reasoning, "refusal": None}

    def as_json(self, index: int) -> dict[str, Any]:
        """Return the choice as JSON has it."""
        return {
            "index": index,
            "message": self.message,
            "finish_reason": self.finish_reason,
            "logprobs": None,
            "llava_cot": self.about,
        }


def make_choice(found: Answered, request: ChatRequest, processor: Processor) -> ChatChoice:
    """Return an answer as a client gets it."""
    answer, trace = found.answer, found.answer.trace
    result = result_of(answer, found.is_shrunk)
    conclusion, reasoning = split_conclusion(answer)
    total = sum(candidate.tokens for candidate in trace.path.values())
    conclusion_tokens = min(total, len(_encode(processor, conclusion))) if reasoning else total
    is_cut = result.ended in ("max_new_tokens", "sentence")
    content = cut_at_stop(conclusion, request.stop)
    if len(content) < len(conclusion):
        is_cut = False
    shortened = cut_to_tokens(content, request.max_tokens, processor)
    is_cut |= len(shortened) < len(content)
    about = {"seed": trace.seed, "text": answer.text, "stages": answer.stages, "notes": result.notes(trace.format)}
    if request.trace:
        about["trace"] = trace.to_dict()
    return ChatChoice(
        content=shortened or NO_TEXT,
        reasoning=reasoning,
        finish_reason="length" if is_cut else "stop",
        prompt_tokens=trace.tokens["prompt"],
        answer_tokens=total,
        reasoning_tokens=total - conclusion_tokens,
        about=about,
    )


def split_conclusion(answer: Answer) -> tuple[str, str | None]:
    """Return the conclusion of an answer, and its other stages with their tags, if there are any.

    An answer without a conclusion is one as a whole.
    """
    trace = answer.trace
    if trace.whole_text is None:
        path = trace.path
        names = [name for name in trace.format.names if name != trace.format.conclusion]
        others = join_stages([tagged_text(trace.format, name, path[name]) for name in names])
        return (answer.conclusion, others) if answer.conclusion else (answer.text.strip(), None)
    place = locate_stages(answer.text, trace.format).get(trace.format.conclusion)
    if place is None or not place.body:
        return answer.text.strip(), None
    others = (answer.text[: place.start].rstrip() + answer.text[place.end :].rstrip()).strip()
    return place.body, others or None


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """Return a text up to the first of the texts that end it."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


def cut_to_tokens(text: str, most: int | None, processor: Processor) -> str:
    """Return at most a number of tokens of a text, without the beginning of a character that would be cut."""
    if most is None or len(tokens := _encode(processor, text)) <= most:
        return text
    return processor.decode(tokens[:most]).rstrip("\ufffd")


def usage_of(choices: Sequence[ChatChoice]) -> dict[str, Any]:
    """Return the numbers of tokens of a request, whose prompt counts once."""
    prompt, answers = choices[0].prompt_tokens, sum(choice.answer_tokens for choice in choices)
    reasoning = sum(choice.reasoning_tokens for choice in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answers,
        "total_tokens": prompt + answers,
        "completion_tokens_details": {"reasoning_tokens": reasoning},
        "prompt_tokens_details": {"cached_tokens": 0},
    }


@dataclass(frozen=True)
class ReplyHeader:
    """Beginning of the whole answer to a request, and of each of its events.

    Attributes:
        identity: Identity of the answer.
        created: Time at which it was asked for, in seconds since 1970.
        model: Name of the model as it was asked for.
        search: Search that answers.
    """

    identity: str
    created: int
    model: str
    search: ChosenSearch

    def whole(self, choices: Sequence[ChatChoice]) -> dict[str, Any]:
        """Return the whole answer."""
        return {
            **self._fields("chat.completion"),
            "choices": [choice.as_json(i) for i, choice in enumerate(choices)],
            "usage": usage_of(choices),
        }

    def event(self, index: int, delta: dict[str, Any], finish_reason: str | None = None, **more: Any) -> bytes:
        """Return the event of a part of a choice."""
        choice = {"index": index, "delta": delta, "finish_reason": finish_reason, "logprobs": None, **more}
        return as_event({**self._fields("chat.completion.chunk"), "choices": [choice]})

    def usage_event(self, choices: Sequence[ChatChoice]) -> bytes:
        """Return the event of the numbers of tokens."""
        return as_event({**self._fields("chat.completion.chunk"), "choices": [], "usage": usage_of(choices)})

    def _fields(self, kind: str) -> dict[str, Any]:
        search = {
            "search": self.search.name or None,
            "strategy": repr(self.search.strategy),
            "ignored": list(self.search.ignored),
        }
        return {
            "id": self.identity,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
            "llava_cot": search,
        }


def as_event(content: dict[str, Any]) -> bytes:
    """Return an event of a stream (server-sent events of HTML, section 9.2)."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()


LAST_EVENT = b"data: [DONE]\n\n"

KEEP_ALIVE = b": ping\n\n"


def _encode(processor: Processor, text: str) -> list[int]:
    tokens: list[int] = processor.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
    return tokens
