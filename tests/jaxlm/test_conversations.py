"""Conversations and preferences from files: what rows mean, what is refused and where, what carries loss, the split."""

import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from jaxlm.chat import LLAMA3, Chat, chatml, special_tokens
from jaxlm.data import conversations
from jaxlm.data.blocks import DataError
from jaxlm.data.chat_report import marked, show
from jaxlm.data.chat_rows import Conversation, Preference, chat_row
from jaxlm.data.conversations import (
    encode_conversations,
    encode_preferences,
    open_conversations,
    split_validation,
)
from jaxlm.tokenizer import PATTERN, Tokenizer
from jaxlm.tune_config import ChatConfig

Row = dict[str, Any]
CHATML = chatml()
NAMES = special_tokens(LLAMA3, ["<|im_start|>", "<|im_end|>"])
TOKENIZER = Tokenizer(
    PATTERN, {bytes([b]): b for b in range(256)}, {text: 256 + n for n, text in enumerate(NAMES)}
)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def talk(*contents: str, system: str = "") -> list[dict[str, str]]:
    """User and assistant in turn."""
    first = [turn("system", system)] if system else []
    return first + [turn(("user", "assistant")[n % 2], content) for n, content in enumerate(contents)]


def write(path: Path, rows: list[Any], between: str = "\n") -> str:
    """Lines of JSON."""
    path.write_text(between.join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return str(path)


def learnt(data: conversations.Examples, i: int = 0) -> str:
    """An example as text, what carries loss between ⟦ and ⟧."""
    return marked(TOKENIZER, *data.example(i))


SHAREGPT = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
SCHEMAS: dict[str, tuple[str, Row, list[dict[str, str]]]] = {
    "messages": ("messages", {"messages": talk("q", "a", system="s")}, talk("q", "a", system="s")),
    "null content": ("messages", {"messages": [turn("system", ""), *talk("q", "a")], "prompt": "x"},
                     [turn("system", ""), *talk("q", "a")]),
    "parts": ("messages", {"messages": [turn("user", [{"type": "text", "text": "q"}, {"text": "!"}]),
                                        turn("assistant", "a")]}, talk("q!", "a")),
    "sharegpt": ("sharegpt", {"conversations": SHAREGPT}, talk("q", "a", system="s")),
    "sharegpt with system": ("sharegpt", {"conversations": SHAREGPT[1:], "system": "s"}, talk("q", "a", system="s")),
    "alpaca": ("instruction", {"instruction": "i", "input": "n", "output": "o"}, talk("i\n\nn", "o")),
    "alpaca without input": ("instruction", {"instruction": "i", "input": "", "output": "o"}, talk("i", "o")),
    "dolly": ("instruction", {"instruction": "i", "context": "c", "response": "r", "category": "x"},
              talk("i\n\nc", "r")),
    "prompt": ("instruction", {"prompt": "p", "completion": "c"}, talk("p", "c")),
    "prompt as messages": ("instruction", {"prompt": talk("p", "x", "y"), "completion": [turn("assistant", "c")]},
                           talk("p", "x", "y", "c")),
    "prompt with a system of its own": (
        "instruction", {"system": "x", "prompt": talk("q", system="s"), "completion": "a"}, talk("q", "a", system="s")),
    "question": ("instruction", {"question": "q", "answer": "a"}, talk("q", "a")),
    "openorca": ("openorca", {"id": 1, "system_prompt": "s", "question": "q", "response": "a"},
                 talk("q", "a", system="s")),
    "openorca without system": ("openorca", {"system_prompt": "", "question": "q", "response": "a"}, talk("q", "a")),
    "ultrachat": ("ultrachat", {"id": 1, "data": ["q", "a", "r", "b"]}, talk("q", "a", "r", "b")),
    "ultrachat 200k": ("ultrachat", {"prompt": "q", "prompt_id": "x", "messages": talk("q", "a")}, talk("q", "a")),
}  # fmt: skip


@pytest.mark.parametrize(("schema", "row", "messages"), SCHEMAS.values(), ids=SCHEMAS)
def test_rows_of_every_schema_are_conversations(
    schema: str, row: Row, messages: list[dict[str, str]]
) -> None:
    """By its name and by its keys alone."""
    for how in (schema, "auto"):
        assert chat_row(row, "here", how) == Conversation(messages, "here")


def test_what_else_a_template_may_read_is_kept() -> None:
    """Calls of tools and thoughts; a call alone is an answer."""
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"name": "f"}],
        "reasoning_content": "t",
        "x": 1,
    }
    read = chat_row(
        {"messages": [turn("user", "q"), call, {"role": "tool", "content": "r", "name": None}]}, ""
    )
    assert isinstance(read, Conversation)
    assert read.messages[1:] == [
        {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}], "reasoning_content": "t"},
        turn("tool", "r"),
    ]


A, B = turn("assistant", "yes"), turn("assistant", "no")
PREFERENCES: dict[str, tuple[Row, tuple[list, list, list]]] = {
    "texts": ({"prompt": "q", "chosen": "yes", "rejected": "no"}, (talk("q"), [A], [B])),
    "system": ({"system": "s", "question": "q", "chosen": "yes", "rejected": "no"}, (talk("q", system="s"), [A], [B])),
    "prompt of messages": ({"prompt": talk("q"), "chosen": "yes", "rejected": "no"}, (talk("q"), [A], [B])),
    "all messages": ({"prompt": talk("q"), "chosen": [A], "rejected": [B]}, (talk("q"), [A], [B])),
    "lists that hold the prompt": (
        {"prompt": "q", "chosen": talk("q", "yes"), "rejected": talk("q", "no")}, (talk("q"), [A], [B])),
    "implicit": ({"chosen": talk("q", "a", "r", "yes"), "rejected": talk("q", "a", "r", "no")},
                 (talk("q", "a", "r"), [A], [B])),
    "several turns differ": (
        {"chosen": talk("q", "yes", "r", "yes"), "rejected": talk("q", "no", "s", "no")},
        (talk("q"), [A, turn("user", "r"), A], [B, turn("user", "s"), B])),
    "one goes on": ({"chosen": talk("q", "yes", "r", "yes"), "rejected": talk("q", "yes")},
                    (talk("q"), [A, turn("user", "r"), A], [A])),
    "answers alone": ({"instruction": "q", "chosen": [A], "rejected": [B]}, (talk("q"), [A], [B])),
    "lists with a system before the prompt": (
        {"prompt": talk("q"), "chosen": talk("q", "yes", system="s"), "rejected": talk("q", "no", system="s")},
        (talk("q", system="s"), [A], [B])),
    "lists with the prompt otherwise spaced": (
        {"prompt": talk("q"), "chosen": talk("q ", "yes"), "rejected": talk("q ", "no")}, (talk("q "), [A], [B])),
    "a system that lists leave out": (
        {"prompt": talk("q", system="s"), "chosen": talk("q", "yes"), "rejected": talk("q", "no")},
        (talk("q", system="s"), [A], [B])),
    "lists that hold a prompt of the assistant": (
        {"prompt": [A, *talk("q")], "chosen": [A, *talk("q", "yes")], "rejected": [A, *talk("q", "no")]},
        ([A, *talk("q")], [A], [B])),
    "answers to a call": (
        {"prompt": [*talk("q"), A], "chosen": [turn("tool", "r"), A], "rejected": [turn("tool", "r"), B]},
        ([*talk("q"), A], [turn("tool", "r"), A], [turn("tool", "r"), B])),
    "a column and a system": (
        {"system": "other", "prompt": talk("q", system="s"), "chosen": "yes", "rejected": "no"},
        (talk("q", system="s"), [A], [B])),
    "a column and a system in lists": (
        {"system": "other", "chosen": talk("q", "yes", system="s"), "rejected": talk("q", "no", system="s")},
        (talk("q", system="s"), [A], [B])),
}  # fmt: skip


@pytest.mark.parametrize(("row", "expected"), PREFERENCES.values(), ids=PREFERENCES)
def test_rows_of_preferences(row: Row, expected: tuple[list, list, list]) -> None:
    """A prompt, and what follows it on either side; by their schema's name and their keys."""
    for how in ("preference", "auto"):
        assert chat_row(row, "here", how) == Preference(*expected, "here")


@pytest.mark.slow
def test_an_implicit_prompt_is_the_one_that_trl_extracts() -> None:
    """Its rule for conversations: the messages that both lists have in common."""
    extract = pytest.importorskip("trl.data_utils").extract_prompt
    for n in range(1, 4):
        same = [f"m{i}" for i in range(2 * n - 1)]
        row = {"chosen": talk(*same, "yes", "more", "yes"), "rejected": talk(*same, "no")}
        read, expected = chat_row(row, ""), extract(row)
        assert isinstance(read, Preference)
        found = {"prompt": read.prompt, "chosen": read.chosen, "rejected": read.rejected}
        assert found == {name: expected[name] for name in found}


BAD: dict[str, tuple[Any, str, str]] = {
    "not JSON": ("{", "no row of JSON", "not JSON"),
    "a list": ("[1]", "no row of JSON", "a JSON list, not an object"),
    "no column": ({"a": 1}, "no row of JSON", "no column of a conversation, such as messages.*it has a"),
    "half a schema": ({"instruction": "i"}, "other columns", "no conversation: has instruction, not messages"),
    "no list": ({"messages": "hi"}, "no messages", "column 'messages' holds str, not a list"),
    "no message": ({"messages": [{"a": 1}]}, "no messages", "entry 1 of 'messages' is no message"),
    "unknown role": (
        {"messages": [turn("user", "q"), turn("asistant", "a")]},
        "unknown role",
        r"message 2 has the unknown role 'asistant' \(did you mean 'assistant'\?\); known are system",
    ),
    "no answer": ({"messages": talk("q")}, "no assistant turn", "no message is the assistant's.*user"),
    "empty answer": ({"messages": talk("q", " \n", "r", "b")}, "empty answer", "message 2, the assistant's, is empty"),
    "no text": ({"messages": [turn("user", ""), turn("assistant", "")]}, "no text", "holds no text"),
    "an image": (
        {"messages": [turn("user", [{"type": "image"}]), turn("assistant", "a")]}, "no text", "user says is list, not",
    ),
    "a number": ({"prompt": 3, "completion": "c"}, "no text", "user says is int, not text: '3'"),
    "a preference": ({"prompt": "p", "chosen": "a", "rejected": "b"}, "not a conversation", "it is a preference"),
}  # fmt: skip


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("row", "reason", "message"), BAD.values(), ids=BAD)
def test_a_bad_row_is_refused_by_its_line_or_counted(
    tmp_path: Path, row: Any, reason: str, message: str
) -> None:
    """The true number of the line, with empty lines before it; dropped on request, under one reason."""
    good = {"messages": talk("q", "a")}
    path = write(tmp_path / "chats.jsonl", [good, "", "  ", row, good])
    with pytest.raises(DataError, match=message) as caught:
        encode_conversations(open_conversations([path]), TOKENIZER, chatml(), ChatConfig(), 100)
    assert one_line(caught).startswith(f"{path}, line 4: ")
    examples, statistics = encode_conversations(
        open_conversations([path]), TOKENIZER, chatml(), ChatConfig(bad_rows="drop"), 100
    )
    assert len(examples) == 2 and statistics.dropped == {reason: 1}
    assert f"1 dropped: 1 {reason}" in statistics.lines()[-1]


BAD_PAIRS: dict[str, tuple[Row, str]] = {
    "equal": (
        {"prompt": "p", "chosen": "a", "rejected": "a"},
        "chosen and rejected are the same, which teaches",
    ),
    "equal lists": (
        {"chosen": talk("q", "a"), "rejected": talk("q", "a")},
        "chosen and rejected are the same",
    ),
    "equal when trimmed": ({"prompt": "p", "chosen": "a", "rejected": "a "}, "are the same tokens"),
    "empty": (
        {"prompt": "p", "chosen": "a", "rejected": ""},
        "rejected: message 2, the assistant's, is empty",
    ),
    "no prompt": ({"chosen": "a", "rejected": "b"}, "a prompt is needed"),
    "nothing in common": (
        {"chosen": talk("q", "a"), "rejected": talk("r", "a")},
        "no first message in common",
    ),
    "nothing but a column in common": (
        {"system": "s", "chosen": talk("q", "a", system="t"), "rejected": talk("q", "b", system="u")},
        "no first message in common",
    ),
    "mixed": ({"prompt": "p", "chosen": "a", "rejected": talk("q", "a")}, "one is text, the other a list"),
    "no answer": (
        {"chosen": talk("q", "a"), "rejected": talk("q")},
        "rejected: no message is the assistant's",
    ),
    "equal but for a question": ({"chosen": talk("q", "a"), "rejected": talk("q", "a", "r")}, "are the same"),
    "a conversation": ({"messages": talk("q", "a")}, "it is a conversation, not a preference"),
}


@pytest.mark.parametrize(("row", "message"), BAD_PAIRS.values(), ids=BAD_PAIRS)
def test_a_bad_pair_is_refused_by_its_line(tmp_path: Path, row: Row, message: str) -> None:
    """Chosen equal to rejected, an empty answer, no prompt."""
    path = write(tmp_path / "pairs.jsonl", ["", row])
    with pytest.raises(DataError, match=message) as caught:
        encode_preferences(open_conversations([path]), TOKENIZER, LLAMA3, ChatConfig(), 100)
    assert one_line(caught).startswith(f"{path}, line 2: ")


def test_a_template_that_fails_names_the_row(tmp_path: Path) -> None:
    """A refusal of the template's own, and one that cannot work at all; with all rows dropped the first is shown."""
    template = "{{ raise_exception('roles must alternate') }}"
    path = write(tmp_path / "chats.jsonl", [{"messages": talk("q", "a")}] * 2)
    with pytest.raises(DataError, match="roles must alternate") as caught:
        encode_conversations(open_conversations([path]), TOKENIZER, template, ChatConfig(), 100)
    assert one_line(caught).startswith(f"{path}, line 1: ")
    with pytest.raises(
        DataError, match=r"nothing to learn from: all 2 rows .* line 1: .*roles must"
    ) as caught:
        encode_conversations(
            open_conversations([path]), TOKENIZER, template, ChatConfig(bad_rows="drop"), 100
        )
    one_line(caught)


def test_sources_are_files_folders_globs_and_data_sets(tmp_path: Path) -> None:
    """jsonl packed or not, parquet, a folder with a README, a pattern, what `datasets` reads; each row is placed."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": talk(f"q{n}", "a")} for n in range(3)]
    write(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    (tmp_path / "README.md").write_text("no conversation")
    expected = [chat_row(row, "").messages for row in rows]
    places = {"a.jsonl": "line 3", "b.jsonl.gz": "line 3", "c.parquet": "row 2"}
    for name, place in places.items():
        found = list(open_conversations([str(tmp_path / name)]))
        assert [row.messages for row in found] == expected
        assert found[-1].where == f"{tmp_path / name}, {place}"
    for spec in (str(tmp_path), f"{tmp_path}/*.*"):
        several = open_conversations([spec])
        assert [row.messages for row in several] == expected * 3 == [row.messages for row in several]
    pytest.importorskip("datasets")
    folder = tmp_path / "named"
    folder.mkdir()
    write(folder / "train.jsonl", rows)
    found = list(open_conversations([f"hf:{folder}:train"]))
    assert [row.messages for row in found] == expected and found[1].where.endswith(", row 1")


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([], "no conversations are given"),
        (["nowhere.jsonl"], "nowhere.jsonl"),
        (["chats.txt"], "chats.txt is neither jsonl nor parquet"),
        (["hf:"], "'hf:' names no data set"),
        (["openorka"], "did you mean 'openorca'"),
    ],
)
def test_a_source_that_is_none_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paths: list[str], message: str
) -> None:
    """When it is opened, in one line."""
    (tmp_path / "chats.txt").write_text("[1]")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        open_conversations(paths)
    one_line(caught)


def encoded(
    rows: list[Row], limit: int = 1000, template: str | Chat = CHATML, **policy: Any
) -> tuple[Any, conversations.Statistics]:
    """Rows that hold conversations or preferences, encoded."""
    read = [chat_row(row, f"row {n}") for n, row in enumerate(rows)]
    encode = encode_preferences if isinstance(read[0], Preference) else encode_conversations
    return encode(read, TOKENIZER, template, ChatConfig(**policy), limit)


def test_only_the_assistants_words_carry_loss() -> None:
    """Several turns; thoughts by choice; a Chat brings the special tokens of its model."""
    row = {"messages": talk("q", "<think>t</think>a", "r", "b", system="s")}
    examples, statistics = encoded([row])
    assert learnt(examples) == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
        "⟦<think>t</think>a<|im_end|>⟧\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n⟦b<|im_end|>⟧\n"
    )
    assert (statistics.tokens, statistics.loss_tokens) == (len(examples.ids), 5 + 2)
    assert statistics.share == 7 / len(examples.ids)
    silent, _ = encoded([row], think=False)
    assert "<think>t</think>⟦a<|im_end|>⟧" in learnt(silent)
    named = Chat.of(TOKENIZER, LLAMA3, bos=TOKENIZER.special_id("<|eos|>"))
    assert learnt(encoded([row], template=named)[0]).startswith("<|eos|><|start_header_id|>system")


def test_of_a_preference_only_the_answer_carries_loss() -> None:
    """Not what the assistant said in the prompt; what both sides share is the prompt with the generation prompt."""
    row = {"chosen": talk("q", "a", "r", "yes"), "rejected": talk("q", "a", "r", "no!")}
    for template in (chatml(), LLAMA3):
        pairs, statistics = encoded([row], template=template)
        prompt = Chat.of(TOKENIZER, template, bos=TOKENIZER.bos_id).encode(talk("q", "a", "r"))
        for side in (pairs.chosen, pairs.rejected):
            assert side.ids[: len(prompt)].tolist() == prompt
            assert int(side.carries.argmax()) == len(prompt)
        assert pairs.chosen.carries.sum() == len("yes") + 1 and pairs.rejected.carries.sum() == len("no!") + 1
        assert (statistics.examples, statistics.sequences) == (1, 2)
        assert statistics.tokens == len(pairs.chosen.ids) + len(pairs.rejected.ids)
    several = {"chosen": talk("q", "x", "r", "yes"), "rejected": talk("q", "no")}
    assert learnt(encoded([several])[0].chosen).count("⟦") == 2


def test_too_long_examples_are_cut_dropped_or_refused() -> None:
    """The end is cut off; what then holds no answer is dropped; each under its name."""
    rows = [
        {"messages": talk("q", "a" * 20)},
        {"messages": talk("q" * 80, "a")},
        {"messages": talk("q", "a")},
    ]
    whole, _ = encoded(rows)
    limit = int(whole.lengths[0]) - 5
    cut, statistics = encoded(rows, limit)
    assert cut.lengths.tolist() == [limit, int(whole.lengths[2])] == [limit, whole.lengths[2]]
    np.testing.assert_array_equal(cut.example(0)[0], whole.example(0)[0][:limit])
    assert (statistics.truncated, statistics.dropped) == (1, {"too long to reach an answer": 1})
    dropped, statistics = encoded(rows, limit, too_long="drop")
    assert len(dropped) == 1 and statistics.dropped == {"too long": 2}
    with pytest.raises(
        DataError, match=rf"^row 0: it has {limit + 5} tokens, more than the {limit} of an example"
    ):
        encoded(rows, limit, too_long="refuse")
    assert encoded(rows[:1], limit + 5, too_long="refuse")[1].longest == limit + 5
    pair = {"prompt": "q", "chosen": "a" * 30 + "b", "rejected": "a" * 30 + "c"}
    with pytest.raises(DataError, match="too long|both answers are the same"):
        encoded([pair], limit)


def test_statistics_are_those_of_a_loop() -> None:
    """Counted by hand."""
    rows = [{"messages": talk("q" * n, "a" * (n + 1))} for n in range(1, 5)] + [{"messages": []}]
    examples, statistics = encoded(rows, bad_rows="drop")
    lengths, loss = [], 0
    for i in range(4):
        ids, carries = examples.example(i)
        lengths.append(len(ids))
        loss += sum(map(bool, carries[1:]))
    assert (statistics.examples, statistics.tokens, statistics.longest) == (4, sum(lengths), max(lengths))
    assert statistics.mean == sum(lengths) / 4 and statistics.loss_tokens == loss == 2 + 3 + 4 + 5 + 4
    assert statistics.lines()[0].startswith(f"4 examples, {sum(lengths)} tokens: ")
    assert statistics.lines()[1:] == [
        f"{loss} tokens carry loss, {loss / sum(lengths):.1%}",
        "0 truncated, 1 dropped: 1 no text",
    ]


def test_long_work_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line now and then."""
    monkeypatch.setattr(conversations, "_EVERY", 0.0)
    said: list[str] = []
    row = chat_row({"messages": talk("q", "a")}, "")
    encode_conversations([row, row], TOKENIZER, chatml(), ChatConfig(), 100, said.append)
    assert said == ["1 examples, 0 rows dropped so far", "2 examples, 0 rows dropped so far"]


def contents(data: Any) -> list[bytes]:
    return [data.example(i)[0].tobytes() for i in range(len(data))]


def test_the_validation_share_is_held_out_by_content() -> None:
    """The share of different contents, the same in any order; what is there twice is never on both sides."""
    rows = [{"messages": talk(f"q{n % 60}", "a")} for n in range(100)]
    train, val = split_validation(encoded(rows)[0], 0.2, 3)
    assert set(contents(train)).isdisjoint(contents(val)) and len(train) + len(val) == 100
    assert (len(set(contents(train))), len(set(contents(val)))) == (48, 12)
    turned = split_validation(encoded(rows[::-1])[0], 0.2, 3)
    assert sorted(contents(turned[1])) == sorted(contents(val))
    other = split_validation(encoded(rows)[0], 0.2, 4)[1]
    assert set(contents(other)) != set(contents(val))
    few = encoded([{"messages": talk(q, "a")} for q in "xy"])[0]
    assert [len(side) for side in split_validation(few, 0.01, 0)] == [1, 1]
    with pytest.raises(DataError, match="only one example"):
        split_validation(encoded([rows[0]] * 3)[0], 0.2, 0)


def test_preferences_of_one_prompt_are_on_one_side() -> None:
    """Several pairs for a question are not torn apart."""
    rows = [{"prompt": f"q{n % 10}", "chosen": f"y{n}", "rejected": "n"} for n in range(40)]
    train, val = split_validation(encoded(rows)[0], 0.3, 0)
    prompts = [{learnt(side.chosen, i).partition("⟦")[0] for i in range(len(side))} for side in (train, val)]
    assert prompts[0].isdisjoint(prompts[1]) and (len(train), len(val)) == (28, 12)
    for side in (train, val):
        assert learnt(side.rejected).endswith("⟦n<|im_end|>⟧\n")


def test_a_thought_without_loss_is_no_part_of_the_prompt() -> None:
    """Pairs of one prompt are on one side however their answers think, with loss on thoughts and without."""
    said = [talk(f"q{n % 10}", f"<think>{n}</think>a", f"r{n}", "b") for n in range(40)]
    rows = [{"chosen": turns, "rejected": talk(turns[0]["content"], "c")} for turns in said]
    for think in (True, False):
        sides = split_validation(encoded(rows, think=think)[0], 0.3, 0)
        prompts = [{prompt_of(side.chosen, i) for i in range(len(side))} for side in sides]
        assert prompts[0].isdisjoint(prompts[1]) and [len(side) for side in sides] == [28, 12]


def prompt_of(data: conversations.Examples, i: int) -> str:
    """Before the first answer's thought, read from the text."""
    ids = data.example(i)[0]
    prompt = TOKENIZER.decode(ids).partition("<think>")[0]
    assert TOKENIZER.decode(ids[: data.answers[i, 0]]) == prompt
    return prompt


def test_where_answers_begin_is_kept() -> None:
    """The first and the last, thought and all, of what is to be learnt; of what is cut off, the last that is left."""
    row = {"messages": talk("q", "<think>t</think>a", "r", "<|think|>u<|/think|>b", system="s")}
    chat = Chat.of(TOKENIZER, CHATML)
    before = [len(chat.encode(row["messages"][:n])) for n in (2, 4)]
    for think in (True, False):
        data = encoded([row, row], think=think)[0]
        assert data.answers.tolist() == [before, before]
        cut = encoded([row], int(data.answers[0, 1]) + 1, think=False)[0]
        assert cut.answers.tolist() == [before[:1] * 2]
    pair = {"chosen": talk("q", "a", "r", "<think>t</think>b"), "rejected": talk("q", "a", "r", "c")}
    for side in (pairs := encoded([pair], think=False)[0]).chosen, pairs.rejected:
        first, last = side.answers[0]
        assert first == last == len(chat.encode(pair["chosen"][:3]))


def printed(data: Any, statistics: conversations.Statistics, terminal: bool) -> str:
    """What `show` prints."""
    console = Console(
        file=io.StringIO(), force_terminal=terminal, color_system="truecolor" if terminal else None
    )
    show(TOKENIZER, data, statistics, console=console)
    return console.file.getvalue()


def test_an_example_is_shown_with_its_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Green on a terminal, in marks elsewhere and with NO_COLOR; no control character of a file gets through."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    examples, statistics = encoded([{"messages": talk("\x1b[31mq[bold]", "a😀")}])
    on_terminal, in_file = printed(examples, statistics, True), printed(examples, statistics, False)
    assert "⟦a😀<|im_end|>⟧" in in_file and "\x1b" not in in_file
    assert r"\x1b[31mq[bold]" in in_file and "1 examples, " in in_file
    assert "⟦" not in on_terminal and "\x1b[32ma😀<|im_end|>" in on_terminal
    assert "\x1b[31m" not in on_terminal
    monkeypatch.setenv("NO_COLOR", "1")
    assert "⟦a😀<|im_end|>⟧" in printed(examples, statistics, True)
    pairs, statistics = encoded([{"prompt": "q", "chosen": "y" * 500, "rejected": "n"}])
    text = printed(pairs, statistics, False)
    assert "example 1, chosen, its first 400 of " in text and "⟦n<" in text
