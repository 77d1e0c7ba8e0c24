"""The place in the data is rows: whatever changes on the way, each row is seen once in an epoch."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from llava_cot_jax.errors import UserError
from tests.training.stepless import ROWS, Place, stepless_place  # noqa: F401 - a fixture

SOME: dict[str, Any] = {"steps": None, "epochs": 2, "loader.batch_size": 8}


def go_on(place: Place, name: str, stop: int = 1_000_000, **changes: Any) -> tuple[list[str], list[int]]:
    """What a run says that is cut off after ``stop`` steps, and the rows that it sees."""
    place.stop = stop
    said = place.run(name, accept_changes=True, **{**SOME, **changes})
    return said, [row for rows in place.rows for row in rows]


def test_a_changed_setting_is_refused_unless_told(place):
    go_on(place, "refused", 2)
    kept = (place / "refused/config.yaml").read_bytes()
    with pytest.raises(UserError, match=r"loader\.batch_size was 8, now 16.*--accept_changes"):
        place.run("refused", **{**SOME, "loader.batch_size": 16})
    assert (place / "refused/config.yaml").read_bytes() == kept


@pytest.mark.slow
def test_each_row_is_seen_once_in_an_epoch_through_several_changes(place):
    """Batches of 8, from the sixth on of 16, with another seed from the eighth on, and of 24 in the second epoch."""
    _, first = go_on(place, "changed", 5)
    said, second = go_on(place, "changed", 7, **{"loader.batch_size": 16})
    assert any(line.startswith("resuming with changes: ") and "batch_size was 8, now 16" in line for line in said)
    _, third = go_on(place, "changed", 8, **{"loader.batch_size": 16, "loader.seed": 7})
    _, fourth = go_on(place, "changed", **{"loader.batch_size": 24, "loader.seed": 7})
    sizes = [len(rows) for rows in (first, second, third, fourth)]
    assert sizes[:3] == [40, 32, 16]
    left = ROWS - sum(sizes[:3])  # 12 rows of the first epoch, which fill no batch of 24
    epoch = [*first, *second, *third]
    assert left == 12 and len(set(epoch)) == len(epoch) == ROWS - left
    assert sizes[3] == ROWS // 24 * 24 and len(set(fourth)) == sizes[3]  # all of the second
    assert place.stored("changed")["place"]["now"] == {"batches": 5 + 2 + 1 + 4, "epoch": 2, "seen": None}
    said, none = go_on(place, "changed", **{"loader.batch_size": 8, "loader.seed": 7})
    assert none == [] and said[-1] == (
        "nothing is left to do: the run has seen its data 2 times, in 12 steps; set more epochs to go on"
    )


@pytest.mark.slow
def test_other_rows_begin_the_epoch_anew(place, monkeypatch):
    go_on(place, "other", 5)
    monkeypatch.setattr("tests.training.stepless.ROWS", 60)
    said, rows = go_on(place, "other")
    assert any("the data has other rows than before: epoch 1 begins anew" in line for line in said)
    assert len(rows) == 2 * 56 and max(Counter(rows).values()) == 2


@pytest.mark.slow
def test_a_checkpoint_without_a_place_is_refused_only_if_the_batches_are_others(place, monkeypatch):
    monkeypatch.setattr("tests.training.stepless.place_description", lambda loader, step: None)
    _, first = go_on(place, "old", 5)
    with pytest.raises(UserError, match="of a version that stored no place in the data"):
        go_on(place, "old", **{"loader.batch_size": 16})
    _, rest = go_on(place, "old")
    assert len(first) + len(rest) == 2 * 96 and len(set(first) | set(rest[: 7 * 8])) == 96


def test_a_schedule_goes_on_at_the_share_of_the_data_that_was_seen():
    """Half of the data in 50 small batches, the rest in 25 of twice the size: as 25 of 50 large ones were before."""
    from llava_cot_jax.training.optimizer import make_schedule
    from llava_cot_jax.training.settings import OptimizerSettings

    for schedule in ("step", "cosine", "linear"):
        settings = OptimizerSettings(schedule=schedule, warmup_steps=4)
        plain = make_schedule(settings, 50, 25)
        shifted = make_schedule(settings, 75, 25, shift=-25)
        for updates in range(50, 75):
            assert float(shifted(np.int32(updates))) == float(plain(np.int32(updates - 25)))


def test_an_adapter_for_the_verifier_alone_learns_nothing_of_answers(place):
    with pytest.raises(UserError, match=r"^lora\.tokens is probe, so that answers teach the adapter nothing: give"):
        place.run("probe", **{"lora.rank": 2, "lora.tokens": "probe"})


@pytest.mark.parametrize(
    ("setting", "pattern", "nearest"),
    [
        ("frozen_params", "vison_model", r"vision_model\.\S+, vision_model\.\S+, vision_model\.\S+$"),
        (
            "lora.targets",
            "self_attn.qproj",
            r"vision_model\.\S+, .*language_model\.model\.\S+\.self_attn\.q_proj\.weight$",
        ),
        ("lora.targets", r"\.gate$", "mlp.gate_proj.weight"),
        ("lora.targets", "norm", "and nothing else can carry an adapter; the nearest are "),
    ],
)
def test_patterns_that_match_nothing_are_answered_first(place, monkeypatch, setting, pattern, nearest):
    """Before the data is read, or anything is written."""
    monkeypatch.setattr("llava_cot_jax.training.loop.open_training_rows", None)
    lora = {"lora.rank": 2} if setting.startswith("lora") else {}
    with pytest.raises(UserError, match=rf"^{setting}: '\S+' matches no .*{nearest}"):
        place.run("never", **{setting: [pattern], **lora})
    assert not (place / "never").exists()
