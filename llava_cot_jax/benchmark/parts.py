"""The parts of a search, each timed alone beside its floors."""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from llava_cot_jax.benchmark.inputs import endless, request, tables
from llava_cot_jax.benchmark.measure import Timing, timed
from llava_cot_jax.benchmark.workload import TAG_TOKENS, Workload
from llava_cot_jax.costs import counts
from llava_cot_jax.inference.decoding import View, look, read
from llava_cot_jax.inference.ragged_tokens import Pieces
from llava_cot_jax.model.kv_cache import Layers, Memory, Prefix, empty
from llava_cot_jax.model.layers import Weights, linear
from llava_cot_jax.model.mllama import Mllama, logits
from llava_cot_jax.model.sharding import on_mesh
from llava_cot_jax.model.vision_tower import TOKEN_MULTIPLE
from llava_cot_jax.search.program import search, write_candidates
from llava_cot_jax.search.reasoner import chunk_for
from llava_cot_jax.search.strategies import Judge, StageBeam, Strategy
from llava_cot_jax.search.trace import Batch, Costs

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """A part, how long it took, and what it had to do.

    Attributes:
        name: what it is.
        timing: of the whole part.
        count: how many of ``unit`` it is.
        unit: "image", "token", "step", "pair", "question".
        flops: of the whole part, by ``counts``'s useful count.
        bytes: that it must read from memory: the weights once, or at each step of decoding, and then caches too.
            Of a whole search, those of its decoding steps alone: reading prompts is bound by arithmetic.
        bare: seconds of the same matrix products alone, with nothing between them; None where not taken.
        rows: sequences that a step of decoding brings on by a token.
    """

    name: str
    timing: Timing
    count: int
    unit: str
    flops: int
    bytes: int
    bare: float | None = None
    rows: int = 1


class Bench:
    """Times the parts of a search with one model.

    Args:
        model: in the unrolled layout; what ends an answer is never drawn.
        work: the lengths.
        runs: of each timing.
    """

    def __init__(self, model: Mllama, work: Workload, runs: int) -> None:
        self.model, self.work, self.runs = model, work, runs
        self.config = endless(model.config)
        self.request = request(self.config, work)
        self.params = model.params
        self.weight_bytes = _bytes_a_weight(self.params)
        self.cache_bytes = jnp.dtype(model.dtype).itemsize
        self.image_tokens = self.config.vision.image_tokens if work.tiles else 0

    def parts(self) -> Iterator[Part]:
        """Each in turn: the tower, the prompt, and the steps by number of candidates."""
        view = look(self.params, self.config, {}, self.request.lengths)
        if self.image_tokens:
            tower, view = self._tower()
            yield tower
        prefill, (layers, scores) = self._prefill(view)
        yield prefill
        # Where the longest stage begins; what the stages before it would have left there is empty.
        before = sum(self.work.stages[: self.work.stages.index(max(self.work.stages))])
        prefix = Prefix(layers, self.request.lengths + before)
        for count in self.work.candidates:
            yield self._steps(count, view, prefix, scores)
        if max(self.work.candidates) > 1:
            yield self._pair(view)

    def _run(self, function: Callable[..., T], *arguments: Any) -> tuple[Timing, T]:
        """Time ``function`` of the parameters and ``arguments``, compiled; its result, too."""

        @jax.jit
        def program(params: Weights, arguments: Any) -> T:
            with on_mesh(self.model.mesh):
                return function(params, *arguments)

        return timed(lambda: program(self.params, arguments), self.runs)

    def _tower(self) -> tuple[Part, View]:
        work = sum(counts.vision_flops(self.config, 1).values())
        timing, view = self._run(lambda p, r: look(p, self.config, r.inputs, r.lengths), self.request)
        sizes = counts.parameter_counts(self.config)
        read_bytes = (sizes["tower"] + sizes["projector"]) * self.cache_bytes
        bare = self._run(self._bare_tower)[0].median
        return Part("vision tower", timing, 1, "image", work, read_bytes, bare), view

    def _prefill(self, view: View) -> tuple[Part, tuple[Layers, jax.Array]]:
        tokens = self.work.prompt
        timing, begun = self._run(self._read_prompt, self.request, view)
        work = sum(counts.text_flops(self.config, tokens, self.image_tokens, scored=1).values())
        bare = self._run(lambda p: self._bare_text(p, tokens, 1))[0].median
        return Part("prefill", timing, tokens, "token", work, self._step_bytes(1, 0, 0)["weights"], bare), begun

    def _steps(self, count: int, view: View, prefix: Prefix, scores: jax.Array) -> Part:
        """The longest stage, with the prefix that the prompt and the stages before it leave."""
        steps = max(self.work.stages)
        plan = StageBeam(count, budget=steps, stages=("A",)).plan()
        stages, _ = tables(self.config, self.work, plan)
        own = empty(self.config.text, count, steps, self.model.dtype)

        def draw(params: Weights, scores: jax.Array, prefix: Prefix, view: View, reader: jax.Array, keys: Any) -> Any:
            written = write_candidates(
                params, self.config, plan, scores, prefix, own, view, reader, keys, jnp.int32(0)
            )[1]
            return written.tokens, written.log_probability

        keys = jax.vmap(jax.random.key)(self.request.seeds)
        timing, _ = self._run(draw, scores, prefix, view, stages.readers[0], keys)
        length = int(prefix.length[0])
        read_bytes = self._written_bytes(Batch(count, steps - 1, length, 0, blind=False))
        one = counts.text_flops(self.config, 1, self.image_tokens, prefix=length + steps // 2)
        bare = self._run(lambda p: self._bare_text(p, count, count))[0].median * (steps - 1)
        name = f"decode, N = {count}"
        return Part(name, timing, steps - 1, "step", count * sum(one.values()) * (steps - 1), read_bytes, bare, count)

    def _pair(self, view: View) -> Part:
        """What a token verdict on two candidates of the longest stage takes: both orders are read after the front."""
        judge, chunk = Judge(), chunk_for(self.model.mesh)
        _, judging = tables(self.config, self.work, StageBeam(2, judge, stages=("A",)).plan())
        assert judging is not None
        orders = judge.orders

        def words(*pieces: Pieces) -> int:
            return sum(int(piece.length.max()) for piece in pieces)

        own = 2 * (max(self.work.stages) + 2 * TAG_TOKENS) + words(judging.between, judging.ending)
        front = self.work.prompt + words(judging.intro, judging.middle, judging.label)
        texts = Pieces(jnp.ones((orders, own), jnp.int32), jnp.full(orders, own, jnp.int32))
        cache = functools.partial(empty, self.config.text, dtype=self.model.dtype)

        def verdict(params: Weights, view: View, texts: Pieces) -> jax.Array:
            prefix = Prefix(cache(1, front), jnp.full(1, front, jnp.int32))
            memory = Memory(cache(orders, own + chunk), jnp.zeros(orders, jnp.int32), prefix, view.images)
            return read(params, self.config, texts, memory, view, chunk=max(1, chunk // orders))[1]

        timing, _ = self._run(verdict, view, texts)
        one = counts.text_flops(self.config, own, self.image_tokens, prefix=front, scored=1)
        bare = self._run(lambda p: self._bare_text(p, orders * own, orders))[0].median
        read_bytes = self._step_bytes(1, 0, 0)["weights"]
        return Part("judge, a pair", timing, 1, "pair", orders * sum(one.values()), read_bytes, bare)

    def whole(self, name: str, strategy: Strategy) -> Part:
        """A whole search; its floor is that of its decoding steps and of what it reads."""
        plan = strategy.plan()
        stages, judging = tables(self.config, self.work, plan)
        static = {"config": self.config, "plan": plan, "chunk": chunk_for(self.model.mesh), "mesh": self.model.mesh}
        timing, found = timed(lambda: search(self.params, self.request, stages, judging, **static), self.runs)
        one = jax.tree.map(lambda x: x[:, 0], jax.device_get(found))
        costs = Costs(self.config, plan, one, images=1 if self.image_tokens else 0)
        read_bytes = sum(map(self._written_bytes, costs.batches))
        return Part(name, timing, 1, "question", sum(costs.flops.values()), read_bytes)

    def _written_bytes(self, batch: Batch) -> int:
        """Read from memory while rows are written side by side; each is half as long as it gets, on average."""
        one = self._step_bytes(batch.rows, batch.prefix, batch.own + batch.steps // 2, batch.blind)
        return batch.steps * sum(one.values())

    def _step_bytes(self, candidates: int, prefix: int, suffix: int, blind: bool = False) -> dict[str, int]:
        parts = counts.bytes_per_step(
            self.config,
            questions=1,
            candidates=candidates,
            prefix=prefix,
            suffix=suffix,
            image_tokens=0 if blind else self.image_tokens,
            weight_bytes=1,
            cache_bytes=self.cache_bytes,
        )
        return parts | {"weights": int(parts["weights"] * self.weight_bytes)}

    def _read_prompt(self, params: Weights, request: Any, view: View) -> tuple[Any, jax.Array]:
        chunk = chunk_for(self.model.mesh)
        prompt = Pieces(request.inputs["input_ids"], request.lengths)
        room = prompt.capacity + sum(self.work.stages) + chunk
        own = empty(self.config.text, len(request.lengths), room, self.model.dtype)
        memory = Memory(own, jnp.zeros_like(request.lengths), None, view.images)
        return read(params, self.config, prompt, memory, view, chunk=chunk)

    def _bare_text(self, params: Weights, rows: int, scored: int) -> jax.Array:
        """The products of the text layers and lm_head with ``rows`` rows, and nothing else."""
        text = params["language_model"]
        ones = functools.partial(jnp.ones, dtype=self.model.dtype)
        total = jnp.float32(0)
        for i, cross in enumerate(self.config.text.is_cross):
            if cross and not self.image_tokens:
                continue
            layer = text["model"]["layers"][str(i)]
            names = ("q_proj", "o_proj") if cross else ("q_proj", "k_proj", "v_proj", "o_proj")
            attention = layer["cross_attn" if cross else "self_attn"]
            for w in (*(attention[name] for name in names), *layer["mlp"].values()):
                # Each depends on the last, as in the model.
                x = ones((rows, w["weight"].shape[1])) * (1 + total * 0).astype(self.model.dtype)
                total = total + linear(x, w).max().astype(jnp.float32)
        hidden = ones((scored, self.config.text.hidden_size)) * (1 + total * 0).astype(self.model.dtype)
        return logits(params, hidden)

    def _bare_tower(self, params: Weights) -> jax.Array:
        """The products of the tower's blocks, the scores of attention among them, and nothing else."""
        tower, config = params["vision_model"], self.config.vision
        tokens = config.max_num_tiles * (config.tile_tokens + -config.tile_tokens % TOKEN_MULTIPLE)
        heads, dim, dtype = config.attention_heads, config.hidden_size // config.attention_heads, self.model.dtype
        total = jnp.float32(0)
        for stack in ("transformer", "global_transformer"):
            for w in tower[stack]["layers"].values():
                for part in (*w["self_attn"].values(), *w["mlp"].values()):
                    x = jnp.ones((tokens, part["weight"].shape[1]), dtype) * (1 + total * 0).astype(dtype)
                    total = total + linear(x, part).max().astype(jnp.float32)
                q = jnp.ones((heads, tokens, dim), dtype) * (1 + total * 0).astype(dtype)

                def block(q: jax.Array, k: jax.Array = q) -> jax.Array:
                    return jnp.einsum("hqs,hsd->hqd", jnp.einsum("hqd,hsd->hqs", q, k), k)

                queries = math.gcd(tokens, 512)
                blocks = jnp.swapaxes(q.reshape(heads, -1, queries, dim), 0, 1)
                total = total + jax.lax.map(block, blocks).max().astype(jnp.float32)
        return total


def _bytes_a_weight(params: Weights) -> float:
    """Bytes of a text layer's weight, on average: fewer where it is quantized."""
    leaves = jax.tree.leaves(params["language_model"]["model"]["layers"])
    return sum(x.nbytes for x in leaves) / sum(x.size for x in leaves)
