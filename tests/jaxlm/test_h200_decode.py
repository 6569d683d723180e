"""Decoding of one row as it compiles for an H200 that is not there: kernels per token, and what is written to memory.

    pytest -m h200 tests/jaxlm/test_h200_decode.py

At one row the number of kernels is what a token costs (about 1.3 us each), beside the weights that it reads.
"""

import dataclasses

import hlo
import pytest

from jaxlm.config import ConfigError
from jaxlm.hlo import instructions
from jaxlm.plan import compile_decode, require_plugin
from jaxlm.presets import preset


def plugin() -> str:
    """Why the tests cannot run here; empty where they can."""
    try:
        require_plugin()
    except ConfigError as error:
        return str(error)
    return ""


pytestmark = [pytest.mark.h200, pytest.mark.skipif(plugin() != "", reason=plugin())]

# Kernels of a layer, and of everything else. Of a layer with weights [in, out] they were 23, 25 and 31.
LIMITS = {"minigpt-124m": (14, 8), "llama-1.1b": (20, 8), "gptoss": (26, 8)}


@pytest.mark.parametrize("name", LIMITS)
def test_a_token_is_few_kernels_and_writes_little(name: str) -> None:
    """Two layers, 1,024 slots: a loop that is not asked each token, no cache is copied, nothing large is written."""
    layers, (per_layer, rest) = 2, LIMITS[name]
    model = dataclasses.replace(preset(name).model, n_layers=layers)
    compiled = compile_decode(model, None, 1024, 1)
    kernels = hlo.kernels_in_loop(compiled.text)
    print(
        f"\n{name}, {layers} layers: {len(kernels)} kernels a token, {compiled.temporary_bytes:,} bytes temporary"
    )
    assert len(kernels) <= layers * per_layer + rest
    # Logits in float32 and what softmaxes take; the products of a projection or a turned cache would be megabytes.
    assert compiled.temporary_bytes < 1e6
    cache = (1, model.n_kv_heads, 1024, model.head_dim)
    found = (one for one in instructions(compiled.text) if one.operation in ("copy", "transpose"))
    assert [one.name for one in found if cache in (shape for _, shape in one.arrays)] == []


@pytest.mark.parametrize("name", ["llama-1.1b", "gptoss"])
def test_int8_weights_are_not_written_out_again(name: str) -> None:
    """Codes become activations' dtype inside the product: a weight in bfloat16 would be megabytes."""
    model = dataclasses.replace(preset(name).model, n_layers=2)
    assert compile_decode(model, "int8", 1024, 1).temporary_bytes < 1e6
