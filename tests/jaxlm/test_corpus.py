"""Sources become documents in a fixed order; the split is deterministic; bad sources are named in one line."""

import json
import subprocess
import sys

import pytest

from jaxlm.config import ConfigError
from jaxlm.data.corpus import DataError, is_validation, open_corpus


def _texts(path, column="text") -> list[str]:
    return [document.text for document in open_corpus(str(path), column)]


def test_default_corpus_is_the_standard_library_without_tests():
    """Sorted, readable, no third-party files."""
    names = [document.name for document in open_corpus("", "text")]
    assert len(names) > 400 and names == sorted(names) and "argparse.py" in names
    parts = {part for name in names for part in name.split("/")[:-1]}
    assert not parts & {"test", "tests", "site-packages", "idlelib", "__pycache__"}


def test_every_format_gives_the_same_documents(tmp_path):
    """jsonl, and a directory of text files; parquet has its own test."""
    texts = ["one", "zwei 你好", "three\nlines\n"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"id": 1, "body": t}) for t in texts) + "\n\n")
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    for name, text in zip(("a.txt", "b.md", "sub/c.py"), texts, strict=True):
        (folder / name).write_bytes(text.encode())
    (folder / "image.bin").write_bytes(b"\xff\xfe")
    (folder / "empty.txt").touch()
    assert _texts(tmp_path / "a.jsonl", "body") == _texts(folder) == texts
    assert [d.name for d in open_corpus(str(tmp_path / "a.jsonl"), "body")] == [
        "a.jsonl:1",
        "a.jsonl:2",
        "a.jsonl:3",
    ]
    (tmp_path / "story").write_bytes(b"any extension\r\n")
    assert _texts(tmp_path / "story") == ["any extension\r\n"]


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.3, 0.5, 0.9])
def test_split_holds_out_the_exact_share_whatever_follows(fraction):
    """One document of every run of 1/fraction, so that 20 documents at 5 % always hold out one."""
    for n in (20, 21, 1000):
        held_out = sum(is_validation(i, fraction) for i in range(n))
        assert abs(held_out - n * fraction) <= 1 and 0 < held_out < n
    gaps = {i % 20 for i in range(400) if is_validation(i, 0.05)}
    assert len(gaps) > 5, "held-out documents must not sit at a fixed stride"


def test_split_does_not_depend_on_the_process():
    """Python's own hash() differs between processes."""
    code = "from jaxlm.data.corpus import is_validation as v; print([i for i in range(200) if v(i, 0.05)])"
    env = {"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "123"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout) == [i for i in range(200) if is_validation(i, 0.05)]


def test_tokenizer_learns_from_training_documents_only(tmp_path):
    """With few documents, from all but the last characters."""
    (tmp_path / "many.jsonl").write_text("".join(json.dumps({"text": f"d{i}"}) + "\n" for i in range(100)))
    corpus = open_corpus(str(tmp_path / "many.jsonl"), "text")
    held_out = {d.text for d in corpus.documents("val", 0.05)}
    assert held_out == {f"d{i}" for i in range(100) if is_validation(i, 0.05)}
    assert {d.text for d in corpus.documents("train", 0.05)} == {f"d{i}" for i in range(100)} - held_out
    (tmp_path / "few.jsonl").write_text('{"text": "abcdef"}\n{"text": "ghij"}\n')
    corpus = open_corpus(str(tmp_path / "few.jsonl"), "text")
    assert [d.text for d in corpus.documents("train", 0.3)] == ["abcdef", "g"]
    assert [d.text for d in corpus.documents("val", 0.3)] == ["hij"]


def test_fingerprint_sees_contents_names_and_column(tmp_path):
    """But neither time nor the folder's own place."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("text")
    one, two = (open_corpus(str(tmp_path / name), "text").fingerprint for name in ("one", "two"))
    assert one == two
    (tmp_path / "two" / "a.txt").write_text("texT")
    assert open_corpus(str(tmp_path / "two"), "text").fingerprint != one
    assert open_corpus(str(tmp_path / "one"), "body").fingerprint != one
    (tmp_path / "one" / "a.txt").rename(tmp_path / "one" / "b.txt")
    assert open_corpus(str(tmp_path / "one"), "text").fingerprint != one


BAD = {
    "empty.txt": (b"", "is empty"),
    "latin.txt": (b"caf\xe9 au lait", "not UTF-8: byte 3 is 0xe9"),
    "utf16.txt": ("hi".encode("utf-16"), "UTF-16"),
    "line.jsonl": (b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
    "byte.jsonl": (b'{"text": "a"}\n{"text": "\xe9"}\n', "line 2 is not UTF-8: byte 10 is 0xe9"),
    "list.jsonl": (b"[1]\n", "line 1 is a JSON list, not an object"),
    "column.jsonl": (
        b'{"texts": "a", "id": 1}\n',
        "no column 'text' .did you mean 'texts'.*it has texts, id",
    ),
    "number.jsonl": (b'{"text": 5}\n', "holds int, not text"),
    "blank.jsonl": (b'{"text": ""}\n', "is empty: no text"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_sources_are_named_in_one_line(tmp_path, name):
    """The file, and the place in it."""
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        _texts(tmp_path / name)
    assert name in str(error.value) and "\n" not in str(error.value) and isinstance(error.value, ConfigError)


def test_missing_paths_columns_and_texts_are_named(tmp_path):
    """With the nearest name there is."""
    (tmp_path / "shakespeare.txt").write_text("x")
    with pytest.raises(DataError, match="does not exist .did you mean 'shakespeare.txt'"):
        open_corpus(str(tmp_path / "shakespear.txt"), "text")
    with pytest.raises(DataError, match="does not exist"):
        open_corpus(str(tmp_path / "no" / "where"), "text")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"holds none of \.txt"):
        open_corpus(str(tmp_path / "folder"), "text")
    with pytest.raises(DataError, match="matches no file"):
        open_corpus(str(tmp_path / "*.md"))


def test_prepared_data_where_text_is_wanted_is_recognised(tmp_path):
    """A split instead of its folder, and a folder that is not finished."""
    (tmp_path / "out" / "train").mkdir(parents=True)
    (tmp_path / "out" / "train" / "meta.json").write_text("{}")
    with pytest.raises(DataError, match=f"one split of prepared data; give its folder, {tmp_path / 'out'}"):
        open_corpus(str(tmp_path / "out" / "train"))
    (tmp_path / ".new.partial").mkdir()
    with pytest.raises(DataError, match="new is not prepared to its end; give the same prepare_data command"):
        open_corpus(str(tmp_path / "new"))


def test_globs_are_taken_in_the_order_of_their_paths(tmp_path):
    """Any depth, names relative to what stands before the first special character."""
    for name in ("b/2.txt", "b/1.txt", "a/9.txt", "a/x.md"):
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_text(name)
    corpus = open_corpus(str(tmp_path / "texts" / "**" / "*.txt"))
    assert [d.name for d in corpus] == [d.text for d in corpus] == ["a/9.txt", "b/1.txt", "b/2.txt"]
    assert [d.name for d in open_corpus(str(tmp_path / "texts" / "b" / "[1]*"))] == ["1.txt"]


def test_parquet_gives_its_column_and_names_its_faults(tmp_path):
    """Rows without text are left out; a wrong column, another type and damage are one line each."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"body": ["one", None, "zwei 你好"], "n": [1, 2, 3]}), path)
    assert _texts(path, "body") == ["one", "zwei 你好"]
    with pytest.raises(DataError, match="no column 'text'; it has body, n"):
        _texts(path)
    with pytest.raises(DataError, match="row 0: column .n. holds int, not text"):
        _texts(path, "n")
    path.write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(DataError, match="is not a readable parquet file") as error:
        _texts(path)
    assert "\n" not in str(error.value)
