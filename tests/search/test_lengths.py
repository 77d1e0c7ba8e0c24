"""Lengths of the judge's prompts: what they count, and that all who need them take them from one place."""

from dataclasses import fields, replace

import jax
import jax.numpy as jnp
import pytest

from llava_cot_jax.benchmark.search_benchmark import SearchBenchmark
from llava_cot_jax.benchmark.workload import Workload
from llava_cot_jax.errors import UserError
from llava_cot_jax.inference.ragged_tokens import RaggedTokens
from llava_cot_jax.planning.search_plan import plan_search
from llava_cot_jax.planning.slices import parse_topology
from llava_cot_jax.search.lengths import JudgeLengths, SearchLengths
from llava_cot_jax.search.program import search
from llava_cot_jax.search.request_builder import RequestBuilder
from llava_cot_jax.search.scorers import Judge
from llava_cot_jax.search.strategies import BestOfN, SearchSpec, StageBeam
from llava_cot_jax.search.tables import JudgeTables, StageTables
from tests.jaxprs import shapes
from tests.search.models import random_model, scene
from tests.tiers import in_tiers

RATIONALE = Judge("rationale", reason_tokens=12, check_tokens=9)


def ragged(capacity: int) -> RaggedTokens:
    return RaggedTokens(jnp.zeros((2, 1, capacity), jnp.int32), jnp.zeros((2, 1), jnp.int32))


def judge_tables(**capacities: int) -> JudgeTables:
    texts = {
        name: ragged(size) for name, size in {"intro": 3, "middle": 1, "label": 2, "between": 4, "ending": 5}.items()
    }
    texts |= {name: ragged(size) for name, size in capacities.items()}
    nothing = jnp.zeros(1)
    return JudgeTables(**texts, shows=nothing, checked=nothing, verdicts=nothing, stop_tables=nothing)


COUNTS = {"header": 7, "question": 10, "text": 20, "earlier": 40}


def judge_lengths(judge: Judge = RATIONALE, tables: JudgeTables | None = None, **counts: int) -> JudgeLengths:
    return JudgeLengths.of(judge, tables or judge_tables(), **{**COUNTS, **counts})


def test_lengths_of_a_judges_prompts():
    lengths = judge_lengths()
    assert (lengths.prefix, lengths.suffix, lengths.verdict) == (7 + 3 + 10 + 1 + 40 + 2, 20 + 4 + 20 + 5, 12)
    assert lengths.total == 63 + 49 + 12
    assert judge_lengths(Judge("token")).verdict == 1
    assert judge_lengths(replace(RATIONALE, check_tokens=15)).verdict == 15


@pytest.mark.parametrize("name", ["intro", "middle", "label", "between", "ending"])
def test_a_longer_text_makes_a_longer_prompt(name):
    assert judge_lengths(tables=judge_tables(**{name: 50})).total > judge_lengths().total


@pytest.mark.parametrize("name", COUNTS)
def test_a_longer_part_makes_a_longer_prompt(name):
    assert judge_lengths(**{name: COUNTS[name] + 1}).total > judge_lengths().total


def test_lengths_of_an_answer():
    spec = StageBeam(2, max_new_tokens=(5, 9, 6, 3)).to_spec()
    tables = StageTables(ragged(4), ragged(3), jnp.zeros(1))
    assert SearchLengths.of(spec, tables, prompt=64) == SearchLengths(
        candidate=9,
        text=4 + 9 + 3,
        pending=64 + 4,
        prefix=64 + (5 + 9 + 6) + 4 * 4 + 3 * 3,
        answer=64 + 23 + 4 * 7,
        earlier=3 * (4 + 9 + 3),
    )


WORK = Workload(prompt_tokens=9, image_tiles=1, stage_tokens=(3, 4), judge_prompt_tokens=5)

MORE = 1100
"""Tokens by which a length is made longer: a number that is no other array's size."""


def caches_of_the_program(model, builder: RequestBuilder) -> set[int]:
    """All sizes of axes in the compiled search."""
    image, question = scene(0)
    inputs, tables = builder.build([image], [question]).inputs, (builder.stage_tables, builder.scorer_tables)
    static = {"config": model.config, "spec": builder.spec, "prefill_chunk": 64, "mesh": None}
    program = jax.make_jaxpr(lambda params, x: search(params, x, *tables, **static))(model.params, inputs)
    return {size for shape in shapes(program.jaxpr) for size in shape}


def planned_bytes(model, spec: SearchSpec) -> int:
    return plan_search(spec, model.config, parse_topology("v6e-1"), work=WORK).memory["caches"]


@pytest.mark.parametrize("name", in_tiers([field.name for field in fields(JudgeLengths)], suite=["suffix"]))
def test_another_length_shows_wherever_it_is_used(prompts, monkeypatch, name):
    """The length is used by the program's caches, the check of the context, the plan's memory, and the benchmark."""
    model, processor = random_model(0)
    builder = RequestBuilder(processor, BestOfN(2, RATIONALE, max_new_tokens=8), prompts)
    benchmark = SearchBenchmark(model, WORK, runs=1)
    sizes, planned = caches_of_the_program(model, builder), planned_bytes(model, builder.spec)
    pair = benchmark._judge_pair(None)
    original = JudgeLengths.of

    def longer(*arguments, **counts) -> JudgeLengths:
        lengths = original(*arguments, **counts)
        return replace(lengths, **{name: getattr(lengths, name) + MORE})

    with pytest.raises(UserError, match=r"a judge's prompt may take 1\d\d\d tokens"), monkeypatch.context() as patch:
        patch.setattr(JudgeLengths, "of", longer)
        caches_of_the_program(model, builder)
    monkeypatch.setattr(JudgeLengths, "of", longer)
    monkeypatch.setattr(RequestBuilder, "fitting_spec", lambda self, *_: self.spec)
    assert max(caches_of_the_program(model, builder) - sizes) > MORE
    assert planned_bytes(model, builder.spec) > planned
    if name != "verdict":  # the benchmark measures a token verdict
        assert benchmark._judge_pair(None).flops > pair.flops
