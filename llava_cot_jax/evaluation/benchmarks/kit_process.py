"""Process in which VLMEvalKit's own classes score predictions. It is run by its path, and imports nothing of ours.

Its working folder has ``job.json``, which says what to score, and the file of predictions; the kit's own files and
``unread.json`` are its result. The kit's packages take a minute to import and need torch, which its scorers do not. So
empty modules stand in their places, and only the modules of the scorers are imported.
"""

import ast
import importlib
import json
import os
import random
import sys
import threading
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

TOKEN_VARIABLE = "LLAVA_COT_JAX_RELAY_TOKEN"
"""Environment variable with the password of the relay that asks the judge."""

_EMPTY = ("vlmeval", "vlmeval.dataset", "vlmeval.api")
"""Packages whose own modules import everything that the kit has."""

_THREADS = 8
"""Number of rows that are scored at a time where a judge is asked."""

_SECONDS = 1e6
"""Time that the kit waits for a reply: the relay alone decides when a request has failed."""

_FAILED = "All 5 retries failed."
"""Words in the kit's notes on a row whose judge gave no reply that it could read."""


def main() -> None:
    """Score the predictions that ``job.json`` names."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job = json.loads(Path("job.json").read_text())
    _prepare_imports()
    unread = Unread()
    settings: dict[str, Any] = {"model": "exact_matching"}
    if job["relay"]:
        _connect(unread)
        settings = {
            "model": "judge",  # a part of the names of files
            "api_base": job["relay"],
            "key": os.environ[TOKEN_VARIABLE],
            "retry": 1,
            "timeout": _SECONDS,
            "verbose": False,
            "nproc": _THREADS,
        }
    scorer = getattr(importlib.import_module(job["module"]), job["scorer"])
    multiple_choice: Any = importlib.import_module("vlmeval.dataset.utils.multiple_choice")
    multiple_choice.rd = unread
    temporary = f"{os.getpid()}-{random.SystemRandom().getrandbits(64):x}"
    multiple_choice.timestr = lambda *_: temporary  # by default the second, which another process may have too
    scorer.DATASET_MD5 = dict.fromkeys(scorer.DATASET_MD5)  # the file was checked, and has no images here
    try:
        scorer(job["dataset"]).evaluate(job["predictions"], **settings)
    finally:
        Path(f"/tmp/{temporary}.xlsx").unlink(missing_ok=True)
    Path("unread.json").write_text(json.dumps(unread.counts(job)))


def _end_with_parent() -> None:
    """End this process when the one that started it has ended."""
    sys.stdin.read()
    os._exit(1)


def _prepare_imports() -> None:
    """Put empty modules in the places of the kit's packages, and keep it from reading a file of variables."""
    spec = find_spec("vlmeval")
    assert spec is not None and spec.submodule_search_locations is not None
    (folder,) = spec.submodule_search_locations
    for name in _EMPTY:
        module = ModuleType(name)
        module.__path__ = [str(Path(folder, *name.split(".")[1:]))]
        sys.modules[name] = module
    importlib.import_module("vlmeval.dataset.utils.judge_util").load_env = lambda: None  # type: ignore[attr-defined]


def _connect(unread: "Unread") -> None:
    """Let the kit ask the relay, and nothing else, whatever the judge is called."""
    gpt: Any = importlib.import_module("vlmeval.api.gpt")

    class RelayedJudge(gpt.OpenAIWrapper):
        """Judge of the kit whose requests all go to the relay."""

        def __init__(self, model: str, *, api_base: str, **more: Any) -> None:
            super().__init__(model, api_base=api_base, **more)
            self.api_base = api_base

        def working(self) -> bool:
            """Say that the judge answers. Where it does not, the relay ends this process."""
            return True

        def generate(self, message: Any, **more: Any) -> str:
            """Ask the judge."""
            unread.note(message)
            return str(super().generate(message, **more))

    api = sys.modules["vlmeval.api"]
    api.OpenAIWrapper = RelayedJudge  # type: ignore[attr-defined]
    api.HFChatModel = api.SiliconFlowAPI = None  # type: ignore[attr-defined]


class Unread:
    """Questions to the judge, and those whose replies the kit could not read.

    It also stands in the place of the module ``random`` where the kit chooses an option by chance: the choice is that
    of the row's question to the judge, so that a second scoring makes the same.
    """

    def __init__(self) -> None:
        self._messages: set[str] = set()
        self._asked = threading.local()
        self._lock = threading.Lock()
        self._chosen = self._requests = 0

    def note(self, message: Any) -> None:
        """Note a question to the judge, which this thread asks."""
        self._asked.message = str(message)
        with self._lock:
            self._messages.add(self._asked.message)
            self._requests += 1

    def choice(self, options: Any) -> Any:
        """Choose one of the options."""
        with self._lock:
            self._chosen += 1
        return random.Random(self._asked.message).choice(options)

    def counts(self, job: dict[str, Any]) -> dict[str, int]:
        """Return how many requests and questions there were, and how many rows have no reply that could be read."""
        unread = self._chosen + (self._rows(job) if job["relay"] else 0)
        return {"sent": self._requests, "asked": len(self._messages), "unread": unread}

    def _rows(self, job: dict[str, Any]) -> int:
        """Return how many rows of the kit's own table of replies have none that could be read."""
        load = importlib.import_module("vlmeval.smp").load
        stem = Path(job["predictions"]).stem
        if job["scorer"] == "ImageYORNDataset":
            return int((load(f"{stem}_auxmatch.xlsx")["extracted"] == "Unknown").sum())
        if job["scorer"] == "MMVet":
            return sum(_FAILED in str(log) for log in load(f"{stem}_judge.xlsx")["log"])
        if job["scorer"] == "MathVista":
            return sum(not _can_be_read(row) for row in load(f"{stem}_judge.xlsx").to_dict("records"))
        return 0


def _can_be_read(row: dict[str, Any]) -> bool:
    """Return whether the kit could take a MathVista answer out of what it took for one, with its own rules."""
    if row["log"] == "Prefetch succeed":
        return True
    found = row["res"]
    if row["question_type"] == "multi_choice":
        choices = {chr(ord("A") + number): text for number, text in enumerate(ast.literal_eval(row["choices"]))}
        return bool(importlib.import_module("vlmeval.utils").can_infer(found, choices))
    number = {"integer": int, "float": float}.get(row["answer_type"])
    try:
        return number(found) == number(found) if number else str(found) not in ("", "nan")
    except ValueError:
        return False


if __name__ == "__main__":
    main()
