"""What a model will be fine-tuned on, for a reader: one example with the tokens that carry loss, and the statistics."""

import functools
import re
from typing import TYPE_CHECKING

import numpy as np

from jaxlm.data.conversations import Statistics
from jaxlm.data.examples import Examples, Pairs
from jaxlm.tokenizer import Tokenizer

if TYPE_CHECKING:
    import rich.console

_MOST = 400  # tokens that are shown
_MARKS = ("⟦", "⟧")  # around what carries loss, where there are no colours
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # would act on a terminal; line ends and tabs may


def runs(tokenizer: Tokenizer, ids: np.ndarray, carries: np.ndarray) -> list[tuple[str, bool]]:
    """The text of an example in runs of tokens that carry loss or do not: [(text, carries)].

    A character that is cut in two by a border becomes U+FFFD; control characters are spelled out.
    """
    borders = np.flatnonzero(np.diff(carries)) + 1
    found = []
    for part, carry in zip(np.split(ids, borders), np.split(carries, borders)):
        text = tokenizer.decode_bytes(part).decode("utf-8", errors="replace")
        found.append((_CONTROL.sub(lambda m: repr(m[0])[1:-1], text), bool(carry[0])))
    return found


def marked(tokenizer: Tokenizer, ids: np.ndarray, carries: np.ndarray) -> str:
    """The text of an example, what carries loss between ⟦ and ⟧."""
    first, last = _MARKS
    return "".join(f"{first}{text}{last}" if carry else text for text, carry in runs(tokenizer, ids, carries))


def show(
    tokenizer: Tokenizer,
    data: Examples | Pairs,
    statistics: Statistics,
    example: int = 0,
    console: "rich.console.Console | None" = None,
) -> None:
    """Prints the statistics and one example, of preferences both sides.

    What carries loss is green on a terminal that shows colours, and between ⟦ and ⟧ elsewhere or with NO_COLOR
    (no-color.org).

    Args:
        console: a rich one in place of standard output.
    """
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    print_ = functools.partial(console.print, highlight=False, markup=False, soft_wrap=True)
    colours = console.is_terminal and not console.no_color and console.color_system is not None
    how = "green" if colours else f"between {' and '.join(_MARKS)}"
    for line in statistics.lines():
        print_(line)
    sides = {"": data} if isinstance(data, Examples) else {"chosen": data.chosen, "rejected": data.rejected}
    for name, side in sides.items():
        ids, carries = side.example(example)
        cut = f"its first {_MOST} of {len(ids):,} tokens" if len(ids) > _MOST else f"{len(ids):,} tokens"
        print_(f"example {example + 1}{f', {name}' if name else ''}, {cut}; what carries loss is {how}:")
        ids, carries = ids[:_MOST], carries[:_MOST]
        if colours:
            styled = ((text, "green" if carry else "dim") for text, carry in runs(tokenizer, ids, carries))
            print_(Text.assemble(*styled))
        else:
            print_(marked(tokenizer, ids, carries))
