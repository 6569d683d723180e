"""Shape annotations: jaxtyping where it is installed, plain markers elsewhere.

Tests execute them; training never does.
"""

from typing import Any

try:
    from jaxtyping import Bool, Float, Int
except ImportError:

    class _Marker:
        """Stands in for a jaxtyping type: `Float[Array, "B T D"]` is then just Any."""

        def __class_getitem__(cls, item: Any) -> Any:
            return Any

    Bool = Float = Int = _Marker  # type: ignore[misc, assignment]

__all__ = ["Bool", "Float", "Int"]
