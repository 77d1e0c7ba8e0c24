"""Benchmark of a search: each of its components alone, and whole searches, with their FLOPs and bytes."""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from llava_cot_jax.benchmark.inputs import endless_tables, random_search_inputs, without_eos
from llava_cot_jax.benchmark.timing import ResultT, Timing, time_program
from llava_cot_jax.benchmark.workload import Workload
from llava_cot_jax.costs import model_costs
from llava_cot_jax.inference.decoding import Decoder, EndReason, Samples, encode_images, prefill
from llava_cot_jax.inference.ragged_tokens import RaggedTokens
from llava_cot_jax.model.image_context import ImageContext
from llava_cot_jax.model.kv_cache import CacheLayers, KVCache, Segment, init_cache
from llava_cot_jax.model.layers import linear
from llava_cot_jax.model.mllama import Mllama, compute_logits
from llava_cot_jax.model.parameters import Params
from llava_cot_jax.model.sharding import use_mesh
from llava_cot_jax.search.lengths import JudgeLengths, SearchLengths
from llava_cot_jax.search.program import SearchInputs, default_prefill_chunk, sample_candidates
from llava_cot_jax.search.reasoner import program_of
from llava_cot_jax.search.scorers import Judge, Verifier
from llava_cot_jax.search.strategies import StageBeam, Strategy
from llava_cot_jax.search.trace import DecodingRun, SearchCosts, split_stages
from llava_cot_jax.search.verifier import StageScores, score_candidates


@dataclass(frozen=True)
class BenchmarkRow:
    """Measurement of a component of a search, or of a whole search.

    Attributes:
        name: Name of the component.
        timing: Seconds that it takes.
        count: Number of units that it processes.
        unit: Unit of ``count``: "image", "token", "step", "candidate", "pair" or "question".
        flops: FLOPs of the whole component, by the useful count of ``model_costs``.
        bytes: Bytes that the component must read from memory: the weights once, or in each decoding step together with
            the KV caches. For a whole search these are the bytes of its decoding steps; prefill is bound by compute.
        matmul_seconds: Seconds of the same matrix products alone; None where they are not measured.
        sequences: Number of sequences that a decoding step extends by a token.
    """

    name: str
    timing: Timing
    count: int
    unit: str
    flops: int
    bytes: int
    matmul_seconds: float | None = None
    sequences: int = 1


class SearchBenchmark:
    """Times the components of a search with one model.

    Args:
        model: Model in the unrolled layout. Its tokens that end an answer are never sampled.
        work: Lengths of the question and its search.
        runs: Number of timed runs of each component.
    """

    def __init__(self, model: Mllama, work: Workload, runs: int) -> None:
        self.model, self.work, self.runs = model, work, runs
        self.config = without_eos(model.config)
        self.search_inputs = random_search_inputs(self.config, work)
        self.params = model.params
        self.weight_bytes = _mean_weight_bytes(self.params)
        self.cache_bytes = jnp.dtype(model.dtype).itemsize
        self.image_tokens = self.config.vision.image_tokens if work.image_tiles else 0

    def component_rows(self) -> Iterator[BenchmarkRow]:
        """Measure the vision tower, the prefill, decoding steps, the verifier on a stage, and the judge on a pair."""
        images = None
        if self.image_tokens:
            tower, images = self._vision_tower()
            yield tower
        row, (layers, logits) = self._prefill(images)
        yield row
        # The longest stage starts after the stages before it, whose part of the cache is left empty.
        before = sum(self.work.stage_tokens[: self.work.stage_tokens.index(max(self.work.stage_tokens))])
        prefix = Segment(layers, self.search_inputs.lengths + before)
        for count in self.work.num_candidates:
            yield self._decode_steps(count, images, prefix, logits)
        if (most := max(self.work.num_candidates)) > 1:
            yield self._verify(most, images)
            yield self._judge_pair(images)

    def _time(self, function: Callable[..., ResultT], *arguments: Any) -> tuple[Timing, ResultT]:
        """Compile ``function`` of the parameters and ``arguments``, and time it. Return its result as well."""

        @jax.jit
        def program(params: Params, arguments: Any) -> ResultT:
            with use_mesh(self.model.mesh):
                return function(params, *arguments)

        return time_program(lambda: program(self.params, arguments), self.runs)

    def _vision_tower(self) -> tuple[BenchmarkRow, ImageContext | None]:
        flops = sum(model_costs.vision_flops(self.config, 1).values())
        timing, images = self._time(
            lambda p, inputs: encode_images(p, self.config, inputs.model_inputs, inputs.lengths), self.search_inputs
        )
        sizes = model_costs.parameter_counts(self.config)
        read_bytes = (sizes["tower"] + sizes["projector"]) * self.cache_bytes
        matmuls = self._time(self._tower_matmuls)[0].median
        return BenchmarkRow("vision tower", timing, 1, "image", flops, read_bytes, matmuls), images

    def _prefill(self, images: ImageContext | None) -> tuple[BenchmarkRow, tuple[CacheLayers, jax.Array]]:
        tokens = self.work.prompt_tokens
        timing, result = self._time(self._prefill_prompt, self.search_inputs, images)
        flops = sum(model_costs.text_flops(self.config, tokens, self.image_tokens, scored=1).values())
        matmuls = self._time(lambda p: self._text_matmuls(p, tokens, 1))[0].median
        read_bytes = self._step_bytes(1, 0, 0)["weights"]
        return BenchmarkRow("prefill", timing, tokens, "token", flops, read_bytes, matmuls), result

    def _decode_steps(
        self, count: int, images: ImageContext | None, prefix: Segment, logits: jax.Array
    ) -> BenchmarkRow:
        """Measure the decoding steps of the longest stage, after the prompt and the stages before it."""
        steps = max(self.work.stage_tokens)
        spec = StageBeam(count, max_new_tokens=steps, stages=("A",)).to_spec()
        stage_tables, _ = endless_tables(self.config, self.work, spec)
        suffix = init_cache(self.config.text, count, steps, self.model.dtype)

        def sample_stage(
            params: Params,
            images: ImageContext | None,
            logits: jax.Array,
            prefix: Segment,
            tables: jax.Array,
            keys: Any,
        ) -> Any:
            decoder = self._decoder(params, images)
            stage = jnp.zeros(1, jnp.int32)
            _, samples = sample_candidates(decoder, spec, logits, (prefix,), suffix, tables, keys, stage)
            return samples.tokens, samples.log_prob

        keys = jax.vmap(jax.random.key)(self.search_inputs.seeds)
        timing, _ = self._time(sample_stage, images, logits, prefix, stage_tables.stop_tables, keys)
        length = int(prefix.lengths[0])
        read_bytes = self._decoding_bytes(DecodingRun(count, steps - 1, length, 0, text_only=False))
        one = model_costs.text_flops(self.config, 1, self.image_tokens, prefix=length + steps // 2)
        matmuls = self._time(lambda p: self._text_matmuls(p, count, count))[0].median * (steps - 1)
        flops = count * sum(one.values()) * (steps - 1)
        return BenchmarkRow(f"decode, N = {count}", timing, steps - 1, "step", flops, read_bytes, matmuls, count)

    def _verify(self, count: int, images: ImageContext | None) -> BenchmarkRow:
        """Measure the verifier on the candidates of the longest stage, after the prompt and the stages before it."""
        longest = max(self.work.stage_tokens)
        spec = StageBeam(count, Verifier(), max_new_tokens=longest, stages=("A",)).to_spec()
        stage_tables, scorer_tables = endless_tables(self.config, self.work, spec)
        tables = scorer_tables.verifier
        assert tables is not None
        prefix = self.work.prompt_tokens + sum(self.work.stage_tokens[: self.work.stage_tokens.index(longest)])
        closings = stage_tables.closings[0][jnp.zeros((1, count), jnp.int32)]
        numbers = jnp.full((1, count), longest, jnp.int32)
        ended = jnp.full_like(numbers, EndReason.MAX_NEW_TOKENS)
        tokens = jnp.ones((1, count, longest), jnp.int32)
        candidates = Samples(tokens, numbers, ended, jnp.zeros_like(numbers), jnp.zeros((1, count), jnp.float32))

        def scores(params: Params, images: ImageContext | None, candidates: Samples) -> StageScores:
            decoder = self._decoder(params, images)
            chain = (
                Segment(decoder.init_cache(1, prefix), jnp.full(1, prefix, jnp.int32)),
                Segment(decoder.init_cache(count, longest), candidates.num_cached.reshape(-1)),
            )
            return score_candidates(decoder, chain, candidates, closings, jnp.zeros(1, jnp.int32), tables)

        timing, found = self._time(scores, images, candidates)
        probe = int(found.probe_lengths[0, 0])
        one = model_costs.text_flops(self.config, probe, self.image_tokens, prefix=prefix + longest - 1, scored=1)
        matmuls = self._time(lambda p: self._text_matmuls(p, count * probe, count))[0].median
        read_bytes = self._step_bytes(1, 0, 0)["weights"]
        flops = count * sum(one.values())
        return BenchmarkRow(f"verifier, N = {count}", timing, count, "candidate", flops, read_bytes, matmuls)

    def _judge_pair(self, images: ImageContext | None) -> BenchmarkRow:
        """Measure a token verdict on two candidates of the longest stage: the prefill of both orders of the pair."""
        judge, chunk = Judge(), default_prefill_chunk(self.model.mesh)
        orders, lengths = judge.orders, self._judge_lengths(judge)
        tokens = (orders, lengths.suffix)
        suffixes = RaggedTokens(jnp.ones(tokens, jnp.int32), jnp.full(orders, lengths.suffix, jnp.int32))

        def verdict(params: Params, images: ImageContext | None, suffixes: RaggedTokens) -> jax.Array:
            decoder = replace(self._decoder(params, images), prefill_chunk=max(1, chunk // orders))
            prefix = Segment(decoder.init_cache(1, lengths.prefix), jnp.full(1, lengths.prefix, jnp.int32))
            cache = KVCache(decoder.init_cache(orders, lengths.suffix + chunk), jnp.zeros(orders, jnp.int32), (prefix,))
            return prefill(decoder, suffixes, cache)[1]

        timing, _ = self._time(verdict, images, suffixes)
        one = model_costs.text_flops(self.config, lengths.suffix, self.image_tokens, prefix=lengths.prefix, scored=1)
        matmuls = self._time(lambda p: self._text_matmuls(p, orders * lengths.suffix, orders))[0].median
        read_bytes = self._step_bytes(1, 0, 0)["weights"]
        return BenchmarkRow("judge, a pair", timing, 1, "pair", orders * sum(one.values()), read_bytes, matmuls)

    def _judge_lengths(self, judge: Judge) -> JudgeLengths:
        """Lengths of a judge's prompts on the longest stage, without earlier stages."""
        spec = StageBeam(2, judge, max_new_tokens=max(self.work.stage_tokens), stages=("A",)).to_spec()
        stage_tables, scorer_tables = endless_tables(self.config, self.work, spec)
        assert scorer_tables.judge is not None
        return JudgeLengths.of(
            judge,
            scorer_tables.judge,
            header=self.search_inputs.chat_headers.capacity,
            question=int(self.search_inputs.question.lengths.max()),
            text=SearchLengths.of(spec, stage_tables, self.work.prompt_tokens).text,
            earlier=0,
        )

    def whole_search(self, name: str, strategy: Strategy) -> BenchmarkRow:
        """Measure a whole search."""
        spec = strategy.to_spec()
        stage_tables, scorer_tables = endless_tables(self.config, self.work, spec)
        mesh = self.model.mesh
        static = {"config": self.config, "spec": spec, "prefill_chunk": default_prefill_chunk(mesh), "mesh": mesh}
        timing, found = time_program(
            lambda: program_of(spec)(self.params, self.search_inputs, stage_tables, scorer_tables, **static), self.runs
        )
        costs = SearchCosts(
            self.config, spec, split_stages(jax.device_get(found), 0), num_images=1 if self.image_tokens else 0
        )
        read_bytes = sum(map(self._decoding_bytes, costs.decoding_runs))
        return BenchmarkRow(name, timing, 1, "question", sum(costs.flops.values()), read_bytes)

    def _decoding_bytes(self, run: DecodingRun) -> int:
        """Bytes read in the steps of a decoding run, in which a sequence has half its final length on average."""
        one = self._step_bytes(run.num_sequences, run.prefix_tokens, run.suffix_tokens + run.steps // 2, run.text_only)
        return run.steps * sum(one.values())

    def _step_bytes(self, candidates: int, prefix: int, suffix: int, text_only: bool = False) -> dict[str, int]:
        parts = model_costs.bytes_per_step(
            self.config,
            questions=1,
            candidates=candidates,
            prefix=prefix,
            suffix=suffix,
            image_tokens=0 if text_only else self.image_tokens,
            weight_bytes=1,
            cache_bytes=self.cache_bytes,
        )
        return parts | {"weights": int(parts["weights"] * self.weight_bytes)}

    def _decoder(self, params: Params, images: ImageContext | None) -> Decoder:
        return Decoder(params, self.config, images, prefill_chunk=default_prefill_chunk(self.model.mesh))

    def _prefill_prompt(
        self, params: Params, inputs: SearchInputs, images: ImageContext | None
    ) -> tuple[Any, jax.Array]:
        decoder = self._decoder(params, images)
        prompt = RaggedTokens(inputs.model_inputs["input_ids"], inputs.lengths)
        room = prompt.capacity + sum(self.work.stage_tokens) + decoder.prefill_chunk
        cache = KVCache(decoder.init_cache(len(inputs.lengths), room), jnp.zeros_like(inputs.lengths))
        return prefill(decoder, prompt, cache)

    def _text_matmuls(self, params: Params, rows: int, scored: int) -> jax.Array:
        """Compute the matrix products of the text layers and lm_head for ``rows`` tokens, and nothing else."""
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
                # Each product depends on the last one, as in the model.
                x = ones((rows, w["weight"].shape[1])) * (1 + total * 0).astype(self.model.dtype)
                total = total + linear(x, w).max().astype(jnp.float32)
        hidden = ones((scored, self.config.text.hidden_size)) * (1 + total * 0).astype(self.model.dtype)
        return compute_logits(params, hidden)

    def _tower_matmuls(self, params: Params) -> jax.Array:
        """Compute the matrix products of the vision tower's blocks, those of attention too, and nothing else."""
        tower, config = params["vision_model"], self.config.vision
        tokens = model_costs.padded_tower_tokens(self.config)
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


def _mean_weight_bytes(params: Params) -> float:
    """Mean number of bytes of a text layer's weight, which is lower where it is quantized."""
    leaves = jax.tree.leaves(params["language_model"]["model"]["layers"])
    return sum(x.nbytes for x in leaves) / sum(x.size for x in leaves)
