"""The adapters of `experiments.sample`: one that is merged into the model, or several by name on one base."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from convert.adapters import OpenedAdapter, merged, open_adapter
from convert.targets import Target
from experiments.loading import Dtype, Framework, Quant, load_model, load_split
from jaxlm.config import ConfigError, nearest


def with_adapters(target: Target, given: Sequence[str]) -> tuple[Target, dict[str, OpenedAdapter]]:
    """What `--adapter` says: DIR is merged into the target; of NAME=DIR, one or several, none is yet.

    Raises ConfigError on names that cannot be, InputError where an adapter belongs to another model.
    """
    named: dict[str, OpenedAdapter] = {}
    for text in given:
        name, equals, place = text.partition("=")
        if not equals or Path(text).exists():
            if len(given) > 1:
                raise ConfigError(f"--adapter {text}: several adapters have names, --adapter NAME={text}")
            return merged(target, open_adapter(Path(text), target)), {}
        if not name or name in named:
            raise ConfigError(f"--adapter {text}: the name {name!r} {'stands twice' if name else 'is empty'}")
        named[name] = open_adapter(Path(place), target)
        merged(target, named[name])  # refused now where it belongs to another model
    return target, named


class Switch:
    """Models of several adapters on one base, which jaxlm holds once; PyTorch holds the one that was asked for last."""

    def __init__(
        self,
        target: Target,
        adapters: Mapping[str, OpenedAdapter],
        framework: Framework,
        dtype: Dtype,
        quant: Quant,
    ):
        self.target, self.adapters = target, dict(adapters)
        self._how = (framework, dtype, quant)
        self._last: tuple[str, Any] | None = None

    def require(self, name: str) -> None:
        """Raises ConfigError where no adapter has the name; '' is the base without any."""
        if name and name not in self.adapters:
            known = ", ".join(self.adapters) or "none: give --adapter NAME=DIR"
            raise ConfigError(f"no adapter {name!r}{nearest(name, self.adapters)}; there is {known}")

    def model(self, name: str) -> Any:
        """The model with the adapter of this name, as its framework's functions take it; '' = without any."""
        self.require(name)
        if self._last is None or self._last[0] != name:
            self._last = None  # before the next one is read
            self._last = name, self._load(name)
        return self._last[1]

    def _load(self, name: str) -> Any:
        framework, dtype, quant = self._how
        if framework == "jax" and self.adapters:
            return self._on_one_base.model(name or None)
        target = merged(self.target, self.adapters[name]) if name else self.target
        return load_model(target, framework, dtype, quant)

    @functools.cached_property
    def _on_one_base(self) -> Any:
        import jax.numpy as jnp

        from jaxlm.finetune.lora import Adapters

        _, dtype, quant = self._how
        factors = {
            name: (
                dataclasses.replace(opened.facts.adapter, dropout=0.0),
                {path: jnp.asarray(x) for path, x in opened.factors.items()},
            )
            for name, opened in self.adapters.items()
        }
        return Adapters(self.target.config, load_split(self.target, dtype, quant).params, factors, quant)
