"""The guard of a training state across the frameworks: arrays on one side, Python numbers on the other, bit for bit."""

from typing import Any

import numpy as np

from convert.tree import to_numpy, to_tensor
from jaxlm import guard
from torchref import guard as twin


def guard_to_torch(found: guard.Guard) -> twin.Guard:
    """jaxlm's guard as the twin's, in tensors of its own."""
    return twin.Guard(
        skipped=int(found.skipped),
        in_a_row=int(found.in_a_row),
        loss_scale=float(found.loss_scale),
        good_steps=int(found.good_steps),
        losses=to_tensor(np.array(found.losses)),
        norms=to_tensor(np.array(found.norms)),
        seen=int(found.seen),
    )


def guard_to_jax(found: twin.Guard) -> guard.Guard:
    """The twin's guard as jaxlm's, in host arrays of its own; jax places them."""
    parts: dict[str, Any] = {
        name: np.asarray(getattr(found, name), np.int32)
        for name in ("skipped", "in_a_row", "good_steps", "seen")
    }
    parts |= {name: to_numpy(getattr(found, name)).copy() for name in ("losses", "norms")}
    parts["loss_scale"] = np.asarray(found.loss_scale, np.float32)
    return guard.Guard(**parts)
