"""Messages that would teach something else than they say are refused."""

from typing import Any

import pytest

from jaxlm.data.chat_rows import BadRow, Conversation, chat_row

ASKED = {"role": "user", "content": "say cat"}


@pytest.mark.parametrize(
    "message, reason",
    [
        ({"role": "assistant", "text": "cat"}, "neither 'content' nor 'value', but 'role', 'text'"),
        ({"role": "assistant"}, "neither 'content' nor 'value'"),
        ({"role": "assistant", "content": "cat", "weight": 0}, "'weight': 0"),
        ({"role": "assistant", "content": "cat", "train": False}, "'train': False"),
    ],
)
def test_a_message_that_is_not_what_it_says_is_refused(message: dict[str, Any], reason: str) -> None:
    """Its text under another name would be an empty turn; a turn that is to carry no loss would carry it."""
    found = chat_row({"messages": [ASKED, message]}, "chats.jsonl, line 3")
    assert isinstance(found, BadRow) and reason in str(found), found


@pytest.mark.parametrize("more", [{"weight": 1}, {"train": True}, {"weight": None}, {}])
def test_a_turn_that_carries_loss_is_taken(more: dict[str, Any]) -> None:
    """Said or not."""
    answer = {"role": "assistant", "content": "cat"} | more
    assert isinstance(chat_row({"messages": [ASKED, answer]}, "line 1"), Conversation)
