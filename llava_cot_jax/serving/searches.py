"""Searches that a request may choose: by the name of a model, by a field, or by the temperature of a plain answer."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from llava_cot_jax.checks import check_int
from llava_cot_jax.errors import UserError
from llava_cot_jax.inference.settings import Sampling
from llava_cot_jax.search.options import STRATEGIES, strategy_of, strategy_or_sampling
from llava_cot_jax.search.strategies import Greedy, Sample, Strategy
from llava_cot_jax.serving.api_errors import ApiError, invalid_value
from llava_cot_jax.serving.chat_request import ChatRequest
from llava_cot_jax.stage_format import StageFormat

_OPTIONS = ("num_candidates", "judge", "max_new_tokens", "temperature", "top_k", "top_p")
"""Options that the searches which are chosen by name have from the command line, where they take them."""


@dataclass(frozen=True)
class ChosenSearch:
    """Search that a request is answered by.

    Attributes:
        name: Name of the search, such as "stage_beam-4"; empty for the server's own.
        strategy: Strategy with its settings.
        ignored: Fields of the request that the search has settings of its own for.
    """

    name: str
    strategy: Strategy
    ignored: tuple[str, ...] = ()


class SearchMenu:
    """The searches of a server.

    Args:
        options: Options of the command, among them those of ``search.options.add_arguments``.
        name: Name of the model.
        most_candidates: Largest number of candidates that a name may ask for.
        accepts_any_model: Whether a name of a model that is not the server's stands for its own search.

    Attributes:
        name: Name of the model.
        format: Format of the answers.
        default: Search of a request that names none.

    Raises:
        UserError: An option is out of range, has no meaning with the others, or names a search that is not served.
    """

    def __init__(self, options: Any, name: str, most_candidates: int, accepts_any_model: bool) -> None:
        check_int("max_candidates", most_candidates)
        self.name, self.format = name, StageFormat.load(options.format)
        self._options, self._most, self._accepts_any = options, most_candidates, accepts_any_model
        self._method = strategy_or_sampling(options)
        self.default = strategy_of(self._method, options.max_new_tokens, self.format)
        if not self.default.to_spec().can_stream:
            raise UserError(f"--search {options.search} answers no questions side by side: give another --search")

    def choose(self, request: ChatRequest) -> ChosenSearch:
        """Return the search that a request asks for.

        Raises:
            ApiError: There is no such model or search.
        """
        model, suffix = self._split(request.model)
        if model != self.name and not self._accepts_any:
            message = f"there is no model {model!r}: this server has {self.name}"
            raise ApiError(404, "model_not_found", message, param="model")
        name = request.search or suffix
        strategy = self.strategy(name) if name else self.default
        given = {key: value for key in ("temperature", "top_p") if (value := getattr(request, key)) is not None}
        if (not name and isinstance(self._method, Sampling)) or isinstance(strategy, Sample):
            return ChosenSearch(name, self._plain(strategy, given))
        return ChosenSearch(name, strategy, tuple(given))

    def strategy(self, name: str) -> Strategy:
        """Return the strategy that a name such as "stage_beam-4" stands for.

        Raises:
            ApiError: There is no such search, or it is not served.
        """
        kind, dash, number = name.partition("-")
        if kind not in STRATEGIES or (dash and not (number.isascii() and number.isdigit() and len(number) < 6)):
            known = ", ".join(STRATEGIES)
            message = f"there is no search {name!r}: it is {known}, with a number of candidates as in stage_beam-4"
            raise ApiError(404, "model_not_found", message, param="model")
        accepted = {field.name for field in dataclasses.fields(STRATEGIES[kind])}
        if dash and "num_candidates" not in accepted:
            raise ApiError(404, "model_not_found", f"the search {kind} takes no number of candidates", param="model")
        options = self._options.clone()
        options.search = kind
        for option in _OPTIONS:
            is_accepted = ("scorer" if option == "judge" else option) in accepted
            if kind == "weighted_vote" and option == "judge":  # it has a scorer of its own, and takes no other
                is_accepted = False
            # What is given for each stage, and the length of a stage, mean nothing for whole answers.
            is_of_stages = isinstance(options[option], tuple) or option == "max_new_tokens"
            if not is_accepted or (is_of_stages and (kind == "stage_beam") != (self._options.search == "stage_beam")):
                options[option] = None
        if dash:
            options.num_candidates = int(number)
        try:
            strategy = strategy_of(strategy_or_sampling(options), options.max_new_tokens, self.format)
            spec = strategy.to_spec()
        except UserError as fault:
            raise invalid_value("model", str(fault)) from None
        if not spec.can_stream:
            message = f"the search {kind} answers no questions side by side, and is not served: ask llava-cot generate"
            raise ApiError(400, "search_not_served", message, param="model")
        if max(spec.num_candidates) > self._most:
            message = f"{name} has more than {self._most} candidates, the most that the server allows"
            raise ApiError(400, "search_not_served", message, param="model")
        return strategy

    def _split(self, model: str) -> tuple[str, str]:
        """Return the name of the model, and that of the search behind it, if there is one. No name is the server's."""
        if model in ("", self.name) or model.startswith(f"{self.name}:"):
            return self.name, model[len(self.name) + 1 :]
        before, colon, suffix = model.rpartition(":")
        return (before, suffix) if colon and suffix.partition("-")[0] in STRATEGIES else (model, "")

    def _plain(self, strategy: Strategy, given: dict[str, float]) -> Strategy:
        """Return the strategy of one answer with the settings that a request gives."""
        if not given or not isinstance(strategy, Sample | Greedy):
            return strategy
        own = strategy if isinstance(strategy, Sample) else self._method
        assert isinstance(own, Sample | Sampling)
        temperature = given.get("temperature", own.temperature)
        sampling = Sampling(temperature, own.top_k, given.get("top_p", own.top_p))
        return strategy_of(sampling, strategy.max_new_tokens, self.format)
