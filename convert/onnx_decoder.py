"""An exported decoder in onnxruntime: numpy in, numpy out, no torch, no jax. `convert.onnx_graph` makes the file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from convert.rules import ConversionError

CONFIG_KEY = "jaxlm.config"  # metadata entry with the ModelConfig as JSON


class OnnxCache(NamedTuple):
    """What decoding remembers: which cached slots are tokens [B, S] int64, keys and values [B, K, S, H] by layer."""

    mask: np.ndarray
    past: list[np.ndarray]  # key and value of block 0, of block 1, ...


class OnnxDecoder:
    """An exported decoder in onnxruntime: numpy in, numpy out, without torch and jax.

        decoder = OnnxDecoder("model.onnx")
        logits, cache = decoder.prefill(ids)  # ids [B, T]
        for _ in range(16):
            ids = logits[:, -1:].argmax(-1)
            logits, cache = decoder.step(ids, cache)

    Raises ConversionError where onnxruntime is missing or the file is not such a model.
    """

    def __init__(self, path: str | Path, providers: Sequence[str] = ("CPUExecutionProvider",)):
        try:
            import onnxruntime
        except ImportError:
            raise ConversionError("onnxruntime is not installed; pip install 'jaxlm[export]'") from None
        if not Path(path).is_file():
            raise ConversionError(f"{path}: there is no such file")
        try:
            self.session = onnxruntime.InferenceSession(str(path), providers=list(providers))
            self.config = json.loads(self.session.get_modelmeta().custom_metadata_map[CONFIG_KEY])
        except KeyError:
            raise ConversionError(f"{path}: no entry {CONFIG_KEY!r}; export it with jaxlm") from None
        except Exception as error:  # onnxruntime's errors have no common class of their own
            raise ConversionError(f"{path}: {str(error).splitlines()[0]}") from None
        inputs = {value.name: value.type for value in self.session.get_inputs()}
        self.past_names = [name for name in inputs if name.startswith("past_key_values.")]
        self.dtype = np.dtype({"tensor(double)": "float64"}.get(inputs[self.past_names[0]], "float32"))

    def prefill(self, ids: np.ndarray, mask: np.ndarray | None = None) -> tuple[np.ndarray, OnnxCache]:
        """Reads prompts ids [B, T]: logits [B, T, V] and the cache.

        mask [B, T] is 0 at padding, which stands on the left; logits there mean nothing. Raises as `step`.
        """
        empty = (len(ids), self.config["n_kv_heads"], 0, self.config["head_dim"])
        past = [np.zeros(empty, self.dtype) for _ in self.past_names]
        return self.step(ids, OnnxCache(np.zeros((len(ids), 0), np.int64), past), mask)

    def step(
        self, ids: np.ndarray, cache: OnnxCache, mask: np.ndarray | None = None
    ) -> tuple[np.ndarray, OnnxCache]:
        """Appends tokens ids [B, T] (T = 1: a decoding step): their logits [B, T, V] and the longer cache.

        Raises ConversionError on ids outside the vocabulary, shapes that do not fit and rows longer than the context.
        """
        ids = np.asarray(ids, np.int64)
        mask = np.ones_like(ids) if mask is None else np.asarray(mask, np.int64)
        self._check(ids, cache, mask)
        whole = np.concatenate([cache.mask, mask], axis=1)
        feed = {"input_ids": ids, "attention_mask": whole} | dict(zip(self.past_names, cache.past))
        logits, *past = self.session.run(None, feed)
        return np.asarray(logits), OnnxCache(whole, [np.asarray(part) for part in past])

    def _check(self, ids: np.ndarray, cache: OnnxCache, mask: np.ndarray) -> None:
        V, context = self.config["vocab_size"], self.config["context"]
        if ids.ndim != 2 or ids.size == 0 or mask.shape != ids.shape or len(cache.mask) != len(ids):
            raise ConversionError(
                f"ids {ids.shape}, mask {mask.shape} and a cache of {len(cache.mask)} rows do not fit; "
                "ids and mask are [batch, length] of at least one token"
            )
        slots = (len(ids), self.config["n_kv_heads"], cache.mask.shape[1], self.config["head_dim"])
        if len(cache.past) != len(self.past_names) or any(part.shape != slots for part in cache.past):
            raise ConversionError(
                f"the cache is not of this model: it needs {len(self.past_names)} arrays {slots}"
            )
        if ids.min() < 0 or ids.max() >= V:
            raise ConversionError(f"ids from {ids.min()} to {ids.max()} exceed the vocabulary of {V}")
        longest = int((cache.mask.astype(bool).sum(1) + mask.astype(bool).sum(1)).max())
        if longest > context:
            raise ConversionError(f"a row of {longest} tokens exceeds the model's context of {context}")
