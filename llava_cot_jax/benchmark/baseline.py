"""Baseline of a search: transformers with the same weights, in the same run.

Both methods generate as many tokens as our search does. ``sequential`` is upstream's loop of 10 N - 6 ``generate``
calls one after another, each with its own prefill and its own run of the vision tower. ``batched`` samples the N
candidates of a stage in one call, and judges none. Neither decodes the text after every token to look for a tag, as
upstream does.
"""

import contextlib
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llava_cot_jax.benchmark.workload import TAG_TOKENS, Workload
from llava_cot_jax.errors import UserError
from llava_cot_jax.model.mllama import Mllama
from llava_cot_jax.model.vision_tower import normalize
from llava_cot_jax.search.program import SearchInputs

SAMPLING = {"do_sample": True, "temperature": 0.6, "top_k": 50, "top_p": 0.9}


class TransformersBaseline:
    """transformers with the weights of a model of this package.

    Args:
        model: Model whose weights are taken.
        work: Lengths of the question and its search.
        inputs: Inputs of a search with one question.

    Raises:
        UserError: torch is not installed.
    """

    def __init__(self, model: Mllama, work: Workload, inputs: SearchInputs) -> None:
        try:
            import torch
            from transformers import MllamaForConditionalGeneration
        except ImportError as missing:
            raise UserError(f"--baseline transformers needs torch: pip install torch ({missing})") from None
        self._torch, self._work, self._config = torch, work, model.config
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(f"{folder}/model")
            dtype = getattr(torch, str(np.dtype(model.dtype)))
            theirs = MllamaForConditionalGeneration.from_pretrained(f"{folder}/model", dtype=dtype)
        self._model = theirs.eval().to(self._device)
        self._ours = model
        self._prompt = np.asarray(inputs.model_inputs["input_ids"])[:, : work.prompt_tokens]
        self._inputs = {name: np.asarray(x) for name, x in inputs.model_inputs.items() if name != "input_ids"}

    def logit_difference(self) -> tuple[float, float]:
        """Return the largest difference of a logit after the prompt, and the largest logit there."""
        given: dict[str, Any] = dict(self._inputs)
        if "cross_attention_mask" in given:
            given["cross_attention_mask"] = given["cross_attention_mask"][:, : self._work.prompt_tokens]
        ours = np.asarray(self._ours(self._prompt, **given))[0, -1]
        with self._torch.no_grad():
            theirs = self._model(**self._tensors(self._prompt, image=True)).logits[0, -1].float().cpu().numpy()
        return float(np.abs(ours - theirs).max()), float(np.abs(theirs).max())

    def sequential(self, candidates: int) -> tuple[float, int]:
        """Answer as upstream does. Return the seconds that it took, and the number of calls."""
        with self._counted() as counted:
            prefix, shown = self._prompt, 0
            judged = self._work.prompt_tokens + int(0.4 * self._work.judge_prompt_tokens)
            for number, budget in enumerate(self._work.stage_tokens):
                prefix = self._with_noise_tokens(prefix, TAG_TOKENS)
                for _ in range(candidates):
                    written = self._generate(prefix, budget, 1)
                text = budget + 2 * TAG_TOKENS
                after = int(0.6 * self._work.judge_prompt_tokens)
                for _ in range(candidates - 1):
                    if number == 2:  # both of a pair of reasonings are checked
                        for _ in range(2):
                            self._generate(
                                self._with_noise_tokens(self._prompt[:, :1], judged + shown + text + after - 1),
                                self._work.check_tokens,
                                1,
                                image=False,
                            )
                    self._generate(
                        self._with_noise_tokens(
                            self._prompt, judged + shown + 2 * text + after - self._work.prompt_tokens
                        ),
                        self._work.reason_tokens,
                        1,
                    )
                shown += budget if number > 0 else 0
                prefix = self._with_noise_tokens(written, TAG_TOKENS)
        return counted()

    def batched(self, candidates: int) -> tuple[float, int]:
        """Sample all candidates of a stage in one call. Return the seconds that it took, and the number of calls."""
        with self._counted() as counted:
            prefix = self._prompt
            for budget in self._work.stage_tokens:
                prefix = self._with_noise_tokens(prefix, TAG_TOKENS)
                written = self._generate(prefix, budget, candidates)[:1]
                prefix = self._with_noise_tokens(written, TAG_TOKENS)
        return counted()

    @contextlib.contextmanager
    def _counted(self) -> Iterator[Any]:
        self._calls, began = 0, time.perf_counter()
        end: list[float] = []
        yield lambda: (end[0], self._calls)
        end.append(time.perf_counter() - began)

    def _generate(self, ids: np.ndarray, new: int, count: int, image: bool = True) -> np.ndarray:
        self._calls += 1
        length = {"max_new_tokens": new, "min_new_tokens": new, "num_return_sequences": count, "pad_token_id": 0}
        with self._torch.no_grad():
            return self._model.generate(**self._tensors(ids, image), **length, **SAMPLING).cpu().numpy()

    def _with_noise_tokens(self, ids: np.ndarray, tokens: int) -> np.ndarray:
        """Return ``ids`` with a number of random tokens appended."""
        noise = np.random.default_rng(ids.shape[1]).integers(5, 500, (len(ids), tokens))
        return np.concatenate([ids, noise], axis=1)

    def _tensors(self, ids: np.ndarray, image: bool) -> dict[str, Any]:
        arrays = {"input_ids": ids.astype(np.int64), "attention_mask": np.ones_like(ids, np.int64)}
        if image and self._inputs:
            given = self._inputs
            images = jnp.asarray(given["pixel_values"]), jnp.asarray(given["aspect_ratio_ids"])
            pixels = normalize(self._config.vision, *images)
            mask = np.repeat(given["cross_attention_mask"][:, :1], ids.shape[1], axis=1)
            arrays |= {
                "pixel_values": np.asarray(jax.device_get(pixels), np.float32),
                "aspect_ratio_ids": given["aspect_ratio_ids"].astype(np.int64),
                "aspect_ratio_mask": given["aspect_ratio_mask"].astype(np.int64),
                "cross_attention_mask": mask.astype(np.int64),
            }
        dtype = self._model.dtype
        tensors = {name: self._torch.tensor(x).to(self._device) for name, x in arrays.items()}
        return {name: x.to(dtype) if x.is_floating_point() else x for name, x in tensors.items()}
