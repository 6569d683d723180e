"""What the tests of `python -m convert` share: tiny runs, directories of every kind, and their weights."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch
from entry import Outcome
from gptoss_files import Sizes
from helpers import random_params, tiny
from safetensors.torch import load_file as load_torch_file

from convert import hf
from jaxlm import optim
from jaxlm.checkpoint import Checkpoints
from jaxlm.config import ModelConfig, RunConfig, TrainConfig, save
from jaxlm.run_dir import RunDir
from jaxlm.tensor_file import Lazy, Planned, write_file
from jaxlm.tokenizer import Tokenizer
from jaxlm.train import init_state

SIZES = {"n_layers": 1, "vocab_size": 280, "context": 64}  # 10 more ids than the tokenizer has
MODELS = {"dense": tiny(init="fan_in", **SIZES), "moe": tiny({"d_ff": 0}, d_ff=20, init="fan_in", **SIZES)}
GPTOSS = Sizes(V=280, L=1, C=64)
Arrays = dict[str, np.ndarray]
Convert = Callable[..., Outcome]


def drawn(name: str, seed: int = 0) -> Arrays:
    """The weights of a run's best checkpoint (0), its moments (1, 2), by parameter path; the latest weights are -0."""
    params = random_params(MODELS[name], seed, dtype=np.float32)
    return params if seed == 0 else {path: np.abs(x) * 1e-3 for path, x in params.items()}


def make_run(path: Path, name: str) -> None:
    """A run directory: two checkpoints, of which the first is the best, with moments and a tokenizer."""
    path.mkdir()
    directory, config = RunDir(path), RunConfig(MODELS[name], train=TrainConfig(seq_len=16))
    save(config, directory.config)
    Tokenizer.train(["ab abc abcd"] * 3, 270).save(directory.tokenizer)
    m, v, params = ({k: jnp.asarray(x) for k, x in drawn(name, seed).items()} for seed in (1, 2, 0))
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(lambda: init_state(config)))
    chain = tuple(optim.AdamState(m, v) if isinstance(s, optim.AdamState) else s for s in state.opt_state)
    state = state._replace(step=jnp.int32(1), params=params, opt_state=chain)
    checkpoints = Checkpoints(directory.checkpoints)
    checkpoints.save(1, state, {}, metric=1.0)
    checkpoints.save(
        2, state._replace(step=jnp.int32(2), params={k: -x for k, x in params.items()}), {}, metric=2.0
    )
    checkpoints.close()


def weights(directory: Path) -> Arrays:
    """Every tensor of a directory's weights, by the format's own library; bfloat16 as such."""
    found: dict[str, Any] = {}
    for file in sorted(directory.glob("model*.safetensors")):
        found |= load_torch_file(file)
    return {
        name: t.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        if t.dtype == torch.bfloat16
        else t.numpy()
        for name, t in found.items()
    }


def ours(directory: Path, config: ModelConfig, params: Mapping[str, np.ndarray]) -> Path:
    """A model directory of jaxlm's."""
    directory.mkdir()
    write_file(
        directory / "model.safetensors",
        {k: Planned.of(Lazy.of(x)) for k, x in params.items()},
        {"format": "jaxlm"},
    )
    save(config, directory / "config.json")
    return directory


def foreign(directory: Path, config: ModelConfig, params: Mapping[str, np.ndarray], **more: Any) -> Path:
    """A Hugging Face directory."""
    directory.mkdir()
    hf.write(directory, config, {k: Lazy.of(x) for k, x in params.items()}, **more)
    return directory


def negated(params: Arrays) -> Arrays:
    """The latest checkpoint's weights from the best one's."""
    return {path: -x for path, x in params.items()}
