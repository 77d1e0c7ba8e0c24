"""Whether an answer is right: what is scored of its text, and the ways in which it is compared with the right answer.

Everything here is pure text: the same functions score an evaluation and the samples of a training by rewards.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from string import ascii_uppercase

from llava_cot_jax.checks import check_choice, check_number, check_text, shown
from llava_cot_jax.errors import UserError
from llava_cot_jax.stage_format import LLAVA_COT, StageFormat
from llava_cot_jax.stages import locate_stages, normalize_answer

MATCHES = ("exact", "option", "yes_no", "number")
"""Names of the ways to compare an answer with the right one."""

DEFAULT_LETTERS = ascii_uppercase[:4]
"""Letters of the options of a question that does not say them."""

AnswerValue = str | int | float
"""Right answer to a question."""

MatchFunction = Callable[[str, "RightAnswer"], bool]
"""Function of the user's own that says whether a conclusion is right."""

_EMPHASIS = re.compile(r"(?<!\w)(\*{1,3}|_{1,3}|`+)(?=[^\s*_`])(.+?)(?<=[^\s*_`])\1(?!\w)", re.DOTALL)
"""Text in the marks by which Markdown makes it italic, bold, or code."""

_OPTION_PUNCTUATION = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
"""Characters that count as spaces around the letter of an option."""

_REFUSAL = "Z"
"""Letter by which a model is said to refuse all options."""

_LAST_WORDS = 4
"""Number of words at the end of an answer among which the letter of its option stands."""

_SPACES = "\u00a0\u2009\u202f"
"""No-break and thin spaces, which separate thousands as commas do."""

_NUMBER = re.compile(
    rf"(?<![\w.])(?<!\d[,{_SPACES}])([-+\u2212\u2013]?)[$€£¥]?((?:\d{{1,3}}(?:[,{_SPACES}]\d{{3}})+|\d+)(?:\.\d+)?|\.\d+)([eE][-+]?\d+)?"
    r"(?![.,]?\d|[_^\u00b2\u00b3\u00b9\u2070-\u209c]|x[0-9a-fA-F])"
)
"""Number in a text: a sign, digits with or without separated thousands, decimals after a point, and an exponent.

A sign of currency may stand after the sign. A number with a power, or in another system, is none.
"""

_LARGEST_EXPONENT = 1000
"""Largest power of ten of a number that is computed with."""


@dataclass(frozen=True)
class RightAnswer:
    """The right answer to a question, and how answers are compared with it.

    Attributes:
        answers: Right answers, any of which will do.
        match: Name of the way to compare, one of ``MATCHES``, or a function of the user's own.
        options: Texts of the options by their letters; empty where they are not known.
        tolerance: Largest difference of a right number, as a share of the right answer.

    Raises:
        UserError: There is no right answer, or it cannot be compared in this way.
    """

    answers: tuple[AnswerValue, ...]
    match: str | MatchFunction = "exact"
    options: Mapping[str, str] = field(default_factory=dict)
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        if not self.answers:
            raise UserError("there is no right answer: give one, or several of which any will do")
        for answer in self.answers:
            if isinstance(answer, str):
                check_text("the right answer", answer)
                if not answer.strip():
                    raise UserError("the right answer is empty: give a text or a number")
            else:
                check_number("the right answer", answer)
        for letter, option in self.options.items():
            if letter not in tuple(ascii_uppercase):
                raise UserError(f"an option is called {shown(letter)}; its name is a letter from A to Z")
            check_text(f"option {letter}", option)
            if not option.strip():
                raise UserError(f"option {letter} is empty: leave it out, or give its text")
        check_number("tolerance", self.tolerance)
        if self.tolerance < 0:
            raise UserError(f"tolerance is {self.tolerance}; it must not be negative")
        if not callable(self.match):
            check_choice("match", self.match, MATCHES)
            self._check_form(self.match)

    @property
    def match_name(self) -> str:
        """Name of the way to compare."""
        return self.match if isinstance(self.match, str) else getattr(self.match, "__name__", type(self.match).__name__)

    @property
    def letters(self) -> str:
        """Letters of the options: those that are known, or ``DEFAULT_LETTERS``, or more where the answer is one."""
        if self.options:
            return "".join(self.options)
        last = max(ascii_uppercase.index(str(answer).strip()) for answer in self.answers)
        return ascii_uppercase[: max(last + 1, len(DEFAULT_LETTERS))]

    def accepts(self, conclusion: str) -> bool:
        """Return whether a conclusion is right. ``scored_text`` takes it out of an answer.

        Raises:
            UserError: A function of the user's own fails.
        """
        if not isinstance(self.match, str):
            return self._ask_function(self.match, conclusion)
        if self.match == "option":
            return find_option(conclusion, self.letters, self.options) in {str(each).strip() for each in self.answers}
        if self.match == "yes_no":
            return find_yes_no(conclusion) in {find_yes_no(str(each)) for each in self.answers}
        if self.match == "number":
            return any(self._is_close(find_number(conclusion), find_number(str(each))) for each in self.answers)
        return normalize_answer(conclusion) in {normalize_answer(str(each)) for each in self.answers}

    def _ask_function(self, match: MatchFunction, conclusion: str) -> bool:
        try:
            return bool(match(conclusion, self))
        except Exception as fault:
            why = f"{type(fault).__name__}: {' '.join(str(fault).split())}"
            raise UserError(
                f"the function {self.match_name} fails with the conclusion {shown(conclusion)} and the right answer "
                f"{shown(self.answers[0])} ({why}): let it return False"
            ) from fault

    def _is_close(self, found: Decimal | None, right: Decimal | None) -> bool:
        if found is None or right is None:
            return False
        return abs(found - right) <= Decimal(str(self.tolerance)) * abs(right)

    def _check_form(self, match: str) -> None:
        """Check that each right answer can be compared in the way of ``match``."""
        for answer in self.answers:
            text = str(answer).strip()
            if match == "option" and text not in (self.options or tuple(ascii_uppercase)):
                known = ", ".join(self.options) or "A to Z"
                raise UserError(f"the right answer {shown(answer)} is the letter of no option ({known})")
            if match == "yes_no" and find_yes_no(text) is None:
                raise UserError(f"the right answer {shown(answer)} is neither yes nor no")
            if match == "number" and find_number(text) is None:
                raise UserError(f"the right answer {shown(answer)} is not one number")


def form_of(answers: Sequence[AnswerValue], options: Mapping[str, str] | None = None) -> str:
    """Return the way to compare with right answers that say no way themselves, by their form.

    It is "option" where options are known, or where each is one of the letters A to D; "yes_no" where each is yes or
    no; "number" where each is a number and nothing else; and otherwise "exact".
    """
    texts = [str(answer).strip() for answer in answers]
    if options or all(text in tuple(DEFAULT_LETTERS) for text in texts):
        return "option"
    if all(text.casefold() in ("yes", "no") for text in texts):
        return "yes_no"
    if all(_NUMBER.fullmatch(text) and find_number(text) is not None for text in texts):
        return "number"
    return "exact"


def scored_text(text: str, format: StageFormat = LLAVA_COT, conclusion: str | None = None) -> str:
    """Return what is scored of an answer: its conclusion without tags and emphasis.

    Where the conclusion is missing or has nothing but tags, what follows the last closed stage is scored in its place,
    and where nothing follows, the whole text. It is empty where that has nothing but tags, and then no answer is right.

    Args:
        text: The whole answer.
        format: Format of its stages.
        conclusion: Body of the conclusion, where it is known; None looks for it in the text.
    """
    stages = locate_stages(text, format)
    if conclusion is None and format.conclusion in stages:
        conclusion = stages[format.conclusion].body
    after = max((stage.end for stage in stages.values() if stage.closed), default=len(text))
    parts = (conclusion or "", text[after:], text)
    return next((plain for part in parts if (plain := without_marks(part, format))), "")


def without_marks(text: str, format: StageFormat = LLAVA_COT) -> str:
    """Return a text without the openings and closings of stages, and without Markdown's marks of emphasis.

    No word is removed. A mark that stands alone, or between two characters of a word, stays.
    """
    for stage in format.stages:
        for mark in (stage.mark, (stage.closing or "").strip()):
            text = text.replace(mark, " ") if mark else text
    while (plain := _EMPHASIS.sub(r"\2", text)) != text:
        text = plain
    return text.strip()


def find_option(text: str, letters: str, options: Mapping[str, str] | None = None) -> str | None:
    """Return the letter of the option that a text chooses, or None where it chooses none, or several.

    The rule of letters comes first: exactly one of the letters is a word of its own, in upper case, and it is first met
    among the last four words. Where no letter is met so, the rule of texts follows: exactly one option's text occurs in
    the answer, in any case, and the answer is at most twice as long as the texts of all options together. An article
    "A" counts as the letter. These are the rules by which VLMEvalKit matches without a judge.

    Args:
        text: The text.
        letters: Letters of the options.
        options: Texts of the options by their letters.
    """
    words = text.translate(_OPTION_PUNCTUATION).split()
    named = [letter for letter in letters if letter in words]
    if len(named) == 1 and words.index(named[0]) >= len(words) - _LAST_WORDS:
        return named[0]
    if not named and _REFUSAL in words:
        return None
    spoken, texts = text.lower(), {letter: option.lower() for letter, option in (options or {}).items()}
    if len(spoken) > 2 * sum(map(len, texts.values())):
        return None
    told = [letter for letter, option in texts.items() if option in spoken]
    return told[0] if len(told) == 1 else None


def find_yes_no(text: str) -> str | None:
    """Return "yes" or "no", whichever is a word of a text, or None where both or neither are. Case does not matter."""
    said = {"yes", "no"} & set(re.findall(r"\w+", text.casefold()))
    return said.pop() if len(said) == 1 else None


def find_number(text: str) -> Decimal | None:
    """Return the number that a text has, or None where it has none, or several different ones.

    Commas, no-break and thin spaces may separate thousands, where three digits follow each of them; the point alone
    begins decimals. So "1,000" is one thousand, and "3,5" is no number. Whatever else stands beside a number is taken
    for words and units, which are not converted: "5 cm", "$5" and "5%" are 5.
    """
    found = set()
    for sign, digits, exponent in _NUMBER.findall(text):
        plain = digits.translate(dict.fromkeys(map(ord, f",{_SPACES}")))
        try:
            number = Decimal(sign.replace("\u2212", "-").replace("\u2013", "-") + plain + exponent)
        except InvalidOperation:
            return None
        if abs(number.adjusted()) > _LARGEST_EXPONENT:
            return None
        found.add(number)
    return found.pop() if len(found) == 1 else None
