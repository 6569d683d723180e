"""Reading prompts and decoding, as a user of jaxlm would, beside PyTorch.

Sides of PyTorch: `compile` is a static cache with one compiled graph per token (CUDA graphs where there is CUDA),
the experts of a prompt as grouped products in bfloat16,
`eager` torchref's own decoding.
"""

import jax
import jax.numpy as jnp
import numpy as np
import torch

from convert.bench import torch_parts
from convert.bench.cases import Case
from convert.bench.results import OURS
from convert.bench.side import Side
from jaxlm import cached
from jaxlm.decode_form import for_decoding
from jaxlm.generate import decode
from jaxlm.model import Params, Split, abstract_model, init_params
from jaxlm.sampling import Sampling
from jaxlm.train import cast_params
from torchref import cached as torch_cached
from torchref.generate import decode as torch_decode

SHOWN = 16  # logits in a trace


def make(case: Case, name: str) -> Side:
    """A side of a prefill or decode case."""
    assert case.run is not None
    config, dtype = case.run.model, jnp.dtype(case.dtype)
    params = jax.jit(lambda: cast_params(init_params(config, 0), dtype))()  # as loading does
    if name == OURS:
        model = Split(abstract_model(config).graphdef, params)
        return _ours(case, model if jax.default_backend() == "cpu" else for_decoding(model))
    return _static(case, params) if name.endswith(":compile") else _eager(case, params)


def _prompts(case: Case) -> np.ndarray:
    assert case.run is not None
    o = case.options
    return np.random.default_rng(0).integers(1, case.run.model.vocab_size, (o["batch"], o["prompt"]))


def _ours(case: Case, model: Split) -> Side:
    o, prompts = case.options, _prompts(case)
    settings, lists = Sampling(max(1, o["new"]), greedy=True), prompts.tolist()
    slots = o["prompt"] + max(1, o["new"])

    def run(n: int) -> None:
        for _ in range(n):
            if o["what"] == "decode":
                decode(model, lists, settings)
            else:
                jax.block_until_ready(cached.prefill(model, lists, slots)[0])

    def trace() -> list[float]:
        first, state = cached.prefill(model, lists, slots)
        second, _ = cached.decode_step(model, jnp.asarray(prompts[:, 0], jnp.int32), state)
        return _told(np.asarray(first, np.float32), np.asarray(second, np.float32))

    return Side(run, trace)


def _static(case: Case, params: Params) -> Side:
    o, prompts = case.options, _prompts(case)
    assert case.run is not None
    experts = "grouped" if case.run.model.moe.n_experts and case.dtype == "bfloat16" else "loop"
    model = torch_parts.twin(case.run.model, params, experts)
    ids = torch.from_numpy(prompts).to(torch_parts.device())
    decoder = torch_parts.StaticDecoder(model, o["batch"], o["prompt"] + max(1, o["new"]))

    def run(n: int) -> None:
        for _ in range(n):
            if o["what"] == "decode":
                decoder.generate(ids, o["new"]).cpu()
            else:
                decoder.read(ids)
        torch_parts.wait()

    def trace() -> list[float]:
        first = decoder.read(ids).float().cpu().numpy()
        return _told(first, decoder.read(ids[:, :1], o["prompt"]).float().cpu().numpy())

    return Side(run, trace)


def _eager(case: Case, params: Params) -> Side:
    o, prompts = case.options, _prompts(case).tolist()
    assert case.run is not None
    model = torch_parts.twin(case.run.model, params)
    settings, slots = Sampling(max(1, o["new"]), greedy=True), o["prompt"] + max(1, o["new"])

    def run(n: int) -> None:
        for _ in range(n):
            if o["what"] == "decode":
                torch_decode(model, prompts, settings)
            else:
                torch_cached.prefill(model, prompts, slots)
        torch_parts.wait()

    def trace() -> list[float]:
        first, state = torch_cached.prefill(model, prompts, slots)
        fed = torch.tensor([prompt[0] for prompt in prompts], device=first.device)
        second, _ = torch_cached.decode_step(model, fed, state)
        return _told(first.float().cpu().numpy(), second.float().cpu().numpy())

    return Side(run, trace)


def _told(first: np.ndarray, second: np.ndarray) -> list[float]:
    """Logits after the prompts and after one more token through the cache."""
    return [float(x) for x in (*first[-1, :SHOWN], *second[-1, :SHOWN])]
