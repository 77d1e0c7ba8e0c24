"""The parts of a search, each timed alone beside its floors."""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from llava_cot_jax import hardware
from llava_cot_jax.benchmark.measure import Timing, timed
from llava_cot_jax.benchmark.workload import TAG_TOKENS, Workload, request, tables
from llava_cot_jax.model.cache import Memory, Prefix, empty
from llava_cot_jax.model.config import MllamaConfig
from llava_cot_jax.model.layers import Weights, linear
from llava_cot_jax.model.mllama import Mllama, logits
from llava_cot_jax.model.sharding import on_mesh
from llava_cot_jax.model.vision import TOKEN_MULTIPLE
from llava_cot_jax.search.decode import View, look, read
from llava_cot_jax.search.pieces import Pieces
from llava_cot_jax.search.program import search, write_candidates
from llava_cot_jax.search.reasoner import chunk_of
from llava_cot_jax.search.strategies import Plan, StageBeam, Strategy


@dataclass(frozen=True)
class Part:
    """A part, how long it took, and what it had to do.

    Attributes:
        name: what it is.
        timing: of the whole part.
        count: how many of ``unit`` it is.
        unit: "image", "token", "step", "question".
        flops: of the whole part, by ``hardware``'s useful count.
        bytes: that it must read, likewise; 0 where arithmetic binds by far.
        bare: seconds of the same matrix products alone, with nothing between them; None where not taken.
    """

    name: str
    timing: Timing
    count: int
    unit: str
    flops: int
    bytes: int
    bare: float | None = None


class Bench:
    """Times the parts of a search with one model.

    Args:
        model: in the unrolled layout; what ends an answer is never drawn.
        work: the lengths.
        runs: of each timing.
    """

    def __init__(self, model: Mllama, work: Workload, runs: int) -> None:
        self.model, self.work, self.runs = model, work, runs
        self.config: MllamaConfig = replace(model.config, text=replace(model.config.text, eos_token_ids=()))
        self.request = request(self.config, work)
        self.params = model.params
        self.weight_bytes = _bytes_a_weight(self.params)
        self.cache_bytes = jnp.dtype(model.dtype).itemsize
        self.image_tokens = self.config.vision.image_tokens if work.tiles else 0

    def parts(self) -> Iterator[Part]:
        """Each in turn: the tower, the prompt, and the steps by number of candidates."""
        if self.image_tokens:
            yield self._tower()
        yield self._prefill()
        view, prefix, scores = self._begun()
        for count in self.work.candidates:
            yield self._steps(count, view, prefix, scores)

    def _run(self, function: Callable[..., Any], *arguments: Any) -> Timing:
        @jax.jit
        def program(params: Weights, arguments: Any) -> Any:
            with on_mesh(self.model.mesh):
                return function(params, *arguments)

        return timed(lambda: program(self.params, arguments), self.runs)

    def _tower(self) -> Part:
        work = sum(hardware.vision_flops(self.config, 1).values())
        timing = self._run(lambda p, r: look(p, self.config, r.inputs, r.lengths).images, self.request)
        counts = hardware.parameter_counts(self.config)
        read_bytes = (counts["tower"] + counts["projector"]) * self.cache_bytes
        return Part("vision tower", timing, 1, "image", work, read_bytes, self._run(self._bare_tower).median)

    def _prefill(self) -> Part:
        tokens = self.work.prompt
        view = self._looked()
        timing = self._run(self._read_prompt, self.request, view)
        work = sum(hardware.text_flops(self.config, tokens, self.image_tokens, scored=1).values())
        bare = self._run(lambda p: self._bare_text(p, tokens, 1)).median
        return Part("prefill", timing, tokens, "token", work, self._step_bytes(1, 0, 0)["weights"], bare)

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
        timing = self._run(draw, scores, prefix, view, stages.readers[0], keys)
        length = int(prefix.length[0])
        read_bytes = sum(self._step_bytes(count, length, steps // 2).values()) * (steps - 1)
        one = hardware.text_flops(self.config, 1, self.image_tokens, prefix=length + steps // 2)
        bare = self._run(lambda p: self._bare_text(p, count, count)).median * (steps - 1)
        name = f"decode, N = {count}"
        return Part(name, timing, steps - 1, "step", count * sum(one.values()) * (steps - 1), read_bytes, bare)

    def whole(self, name: str, strategy: Strategy) -> Part:
        """A whole search; its floor is that of its decoding steps and of what it reads."""
        plan = strategy.plan()
        stages, judging = tables(self.config, self.work, plan)
        static = {"config": self.config, "plan": plan, "chunk": chunk_of(self.model), "mesh": self.model.mesh}
        timing = timed(lambda: search(self.params, self.request, stages, judging, **static), self.runs)
        flops, read_bytes = self._floor_of(plan)
        return Part(name, timing, 1, "question", flops, read_bytes)

    def _floor_of(self, plan: Plan) -> tuple[int, int]:
        """FLOPs of a whole search, and the bytes that its decoding steps read."""
        config, seen, judge = self.config, self.image_tokens, plan.judge
        flops = sum(hardware.vision_flops(config, 1).values()) if seen else 0
        read_bytes, length = 0, 0

        def reads(tokens: int, before: int, sees: int = seen) -> int:
            return sum(hardware.text_flops(config, tokens, sees, prefix=before, scored=1).values())

        def steps(rows: int, count: int, before: int, sees: int = seen) -> tuple[int, int]:
            one = hardware.text_flops(config, 1, sees, prefix=before + count // 2)
            loaded = sum(self._step_bytes(rows, before, count // 2).values())
            return rows * (count - 1) * sum(one.values()), (count - 1) * loaded

        tag = TAG_TOKENS if plan.stages else 0
        for number, (count, budget) in enumerate(zip(plan.candidates, plan.budgets, strict=True)):
            unread = self.work.prompt + tag if number == 0 else plan.budgets[number - 1] + 2 * tag
            flops += reads(unread, length)
            length += unread
            drawn = steps(count, budget, length)
            flops, read_bytes = flops + drawn[0], read_bytes + drawn[1]
            if judge is None or count == 1:
                continue
            text = budget + 2 * tag
            shown = sum(plan.budgets[1:number]) if number > 1 else 0
            front = self.work.prompt + int(0.4 * self.work.judge_words) + shown
            row = 2 * text + int(0.6 * self.work.judge_words)
            pairs = (count - 1) * judge.orders
            flops += reads(front, 0) + pairs * reads(row, front)
            if judge.verdict == "rationale":
                written = steps(pairs, judge.reason_tokens, front + row)
                flops, read_bytes = flops + written[0], read_bytes + written[1]
                if number == 2:
                    flops += reads(front, 0, 0) + count * reads(row - text, front, 0)
                    written = steps(count, judge.check_tokens, front + row - text, 0)
                    flops, read_bytes = flops + written[0], read_bytes + written[1]
        return flops, read_bytes

    def _step_bytes(self, candidates: int, prefix: int, suffix: int) -> dict[str, int]:
        parts = hardware.bytes_per_step(
            self.config,
            questions=1,
            candidates=candidates,
            prefix=prefix,
            suffix=suffix,
            image_tokens=self.image_tokens,
            weight_bytes=1,
            cache_bytes=self.cache_bytes,
        )
        return parts | {"weights": int(parts["weights"] * self.weight_bytes)}

    @functools.cache  # noqa: B019
    def _looked(self) -> View:
        return jax.jit(lambda p, r: look(p, self.config, r.inputs, r.lengths))(self.params, self.request)

    def _read_prompt(self, params: Weights, request: Any, view: View) -> tuple[Any, jax.Array]:
        chunk = chunk_of(self.model)
        prompt = Pieces(request.inputs["input_ids"], request.lengths)
        room = prompt.capacity + sum(self.work.stages) + chunk
        own = empty(self.config.text, len(request.lengths), room, self.model.dtype)
        memory = Memory(own, jnp.zeros_like(request.lengths), None, view.images)
        return read(params, self.config, prompt, memory, view, chunk=chunk)

    def _begun(self) -> tuple[View, Prefix, jax.Array]:
        """The state in which the longest stage begins; what the stages before it would have left is empty."""
        view = self._looked()
        layers, scores = jax.jit(self._read_prompt)(self.params, self.request, view)
        before = sum(self.work.stages[: self.work.stages.index(max(self.work.stages))])
        return view, Prefix(layers, self.request.lengths + before), scores

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
