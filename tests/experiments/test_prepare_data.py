"""Data sets become folders from the command line: every source, any kill, one clear line for everything else."""

import errno
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from entry import run, sentences

from experiments import prepare_data
from jaxlm.data import sources, writer
from jaxlm.data.shards import open_shards
from jaxlm.tokenizer import Tokenizer

MARKED = "<|im_start|>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """A small one, with the tokens of ChatML."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    Tokenizer.train([sentences(200)], 400).save(path)
    return path


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    """The entry point, in an empty directory."""
    monkeypatch.chdir(tmp_path)
    return lambda *words: run(prepare_data.main, [str(word) for word in words], capsys, monkeypatch)


def _jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _texts(n: int, lines: int = 5) -> list[dict]:
    return [{"id": i, "text": f"{i}: {sentences(i % lines + 1)}"} for i in range(n)]


def _files(folder: Path) -> dict[str, bytes]:
    paths = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "times.json"]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}


def _text_of(folder: Path) -> str:
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    stores = [open_shards(folder / split, tokenizer.vocab_size) for split in ("train", "val")]
    return "".join(tokenizer.decode(store[0 : len(store)]) for store in stores)


def test_a_folder_is_the_same_for_any_number_of_workers(call, tmp_path, tokenizer) -> None:
    """Bitwise, in every file but the notes of times; and made once."""
    source = _jsonl(tmp_path / "a.jsonl", _texts(400))
    for workers in (1, 2):
        done = call(
            source,
            "--out",
            f"o{workers}",
            "--tokenizer",
            tokenizer,
            "--workers",
            workers,
            "--shard-tokens",
            4000,
        )
        assert done.code == 0 and "train with --data.path" in done.out and "380 documents" in done.out, done
    assert _files(tmp_path / "o1") == _files(tmp_path / "o2")
    assert set(_files(tmp_path / "o1")) > {
        "tokenizer.json",
        "dataset.json",
        "train/shard_0000.npy",
        "val/documents.npy",
    }
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "o2").rglob("*")}
    done = call(source, "--out", "o2", "--tokenizer", tokenizer, "--shard-tokens", 4000)
    assert done.code == 0 and "as before" in done.out
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "o2").rglob("*")}


TURNS = [{"content": "Why?", "role": "user"}, {"content": "Because.", "role": "assistant"}]
# One row of each named source, with the columns that the hub's files have.
ROWS = {
    "tinystories": {"text": "Once upon a time"},
    "fineweb-edu": {
        "text": "Photosynthesis", "id": "<urn:uuid:0>", "dump": "CC-MAIN-2013-20", "url": "http://x", "file_path": "s3://x",
        "language": "en", "language_score": 0.98, "token_count": 5, "score": 3.5, "int_score": 4,
    },
    "slimpajama-6b": {"text": "def f():", "meta": {"redpajama_set_name": "RedPajamaGithub"}, "__index_level_0__": 7},
    "redpajama": {"text": "\\section{One}", "meta": "{'timestamp': '2020'}", "red_pajama_subset": "arxiv"},
    "openorca": {"id": "flan.1", "system_prompt": "Think.", "question": "Why?", "response": "Because."},
    "ultrachat": {"prompt": "Why?", "prompt_id": "0a", "messages": TURNS},
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_named_sources_stream_their_own_columns(call, tmp_path, tokenizer, monkeypatch, name) -> None:
    """By name through `datasets`, here from a local parquet; and the same rows as a local file with the same schema."""
    pytest.importorskip("datasets")
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows, path = [ROWS[name]] * 40, tmp_path / "rows.parquet"
    parquet.write_table(arrow.Table.from_pylist(rows), path)
    known = sources.NAMED[name]
    real = sources.HubSource

    def local(description, hub, schema, config, split, revision):
        assert (hub, config, split, revision) == (known.path, known.config, known.split, known.revision)
        return real(description, "parquet", schema, data_files=(str(path),))

    monkeypatch.setattr(sources, "HubSource", local)
    done = call(name, "--out", "streamed", "--tokenizer", tokenizer)
    assert done.code == 0, done.err
    words = ["--schema", known.schema, "--tokenizer", tokenizer]
    assert call(path, "--out", "read", *words).code == 0
    assert call(_jsonl(tmp_path / "rows.jsonl", rows), "--out", "lines", *words).code == 0
    text = _text_of(tmp_path / "streamed")
    assert text == _text_of(tmp_path / "read") == _text_of(tmp_path / "lines")
    wanted = str(rows[0].get("text") or "Because.")
    assert text.count(wanted) == 40
    assert text.count(f"{MARKED}assistant") == (40 if known.schema != "text" else 0)
    assert text.count("Think.") == (40 if name == "openorca" else 0)


BAD = {
    "no such name": (["tinystorys"], ["tinystorys", "did you mean 'tinystories'"]),
    "no such file": (["./good.json"], ["./good.json does not exist", "good.jsonl"]),
    "no such glob": (["*.parket"], ["*.parket matches no file"]),
    "no source": ([], ["SOURCE"]),
    "wrong column": (["good.jsonl", "--column", "texts"], ["no column 'texts'", "mean 'text'", "it has id, text"]),
    "wrong column of parquet": (["good.parquet", "--column", "body"], ["no column 'body'; it has id, text"]),
    "wrong schema": (["good.jsonl", "--schema", "openorca"], ["no column 'system_prompt'", "it has id, text"]),
    "column of a schema without one": (["good.jsonl", "--schema", "openorca", "--column", "x"], ["openorca", "'x'"]),
    "unknown schema": (["good.jsonl", "--schema", "alpaca"], ["alpaca"]),
    "parquet that is none": (["bad.parquet"], ["bad.parquet is not a readable parquet file"]),
    "parquet cut short": (["cut.parquet"], ["cut.parquet is not a readable parquet file"]),
    "gzip cut short": (["cut.jsonl.gz"], ["cut.jsonl.gz cannot be read"]),
    "line that is no JSON": (["bad.jsonl"], ["bad.jsonl line 31 is not JSON"]),
    "not UTF-8": (["latin.txt"], ["latin.txt is not UTF-8: byte 3 is 0xe9"]),
    "empty file": (["empty.jsonl"], ["empty.jsonl is empty"]),
    "no text": (["blank.jsonl"], ["blank.jsonl is empty: no text"]),
    "no messages": (["good.jsonl", "--schema", "messages", "--column", "text"], ["'text' holds str, not a list"]),
    "messages of other keys": (["odd.jsonl", "--schema", "messages"], ["odd.jsonl line 1: entry 0", "no message"]),
    "a tokenizer's folder": (["good.jsonl", "--out", "tok"], ["tok holds 'tokenizer.json', which is no"]),
    "part of a file": (["good.jsonl", "--split", "test"], ["--split test", "'good.jsonl' is none"]),
    "no tokenizer": (["good.jsonl", "--tokenizer", "nowhere.json"], ["nowhere.json"]),
    "no template": (["chat.jsonl", "--schema", "messages", "--template", "chatm"], ["chatm"]),
    "share": (["good.jsonl", "--val-fraction", "1.5"], ["--val-fraction 1.5"]),
    "workers": (["good.jsonl", "--workers", "-1"], ["--workers -1"]),
    "somebody's folder": (["good.jsonl", "--out", "mine"], ["mine holds 'thesis.tex'"]),
    "a file": (["good.jsonl", "--out", "good.txt"], ["good.txt is a file"]),
    "an unreachable hub": (["tinystories"], ["tinystories (roneneldan/TinyStories) cannot be loaded", "--schema text"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(call, tmp_path, tokenizer, name) -> None:
    """Exit code 2, what was wrong, and no file more than there were."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    if "hub" in name:
        pytest.importorskip("datasets")
    good = _jsonl(tmp_path / "good.jsonl", _texts(40))
    parquet.write_table(arrow.Table.from_pylist(_texts(400)), tmp_path / "good.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "good.parquet").read_bytes()[:-40])
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing PAR1")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(good.read_bytes())[:-40])
    (tmp_path / "bad.jsonl").write_text("".join(good.read_text().splitlines(True)[:30]) + '{"text": \n')
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "good.txt").write_text("text")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("dear")
    _jsonl(tmp_path / "blank.jsonl", [{"text": ""}] * 30)
    (tmp_path / "tok").mkdir()
    shutil.copy(tokenizer, tmp_path / "tok" / "tokenizer.json")
    _jsonl(tmp_path / "odd.jsonl", [{"messages": [{"role": "user", "text": "hi"}]}] * 30)
    _jsonl(tmp_path / "chat.jsonl", [{"messages": TURNS}] * 30)
    words, wanted = BAD[name]
    more = ["--out", "out"] if "--out" not in words else []
    more += ["--tokenizer", tokenizer] if "--tokenizer" not in words else []
    before = _files(tmp_path)
    done = call(*words, *more)
    assert done.code == 2 and done.err.startswith("error: ") and done.err.count("\n") == 1, done
    assert all(part in done.err for part in wanted), done.err
    assert not done.out and _files(tmp_path) == before


def test_missing_datasets_is_one_line(call, tokenizer, monkeypatch) -> None:
    """As where the extra is not installed."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    done = call("ultrachat", "--out", "out", "--tokenizer", tokenizer)
    assert done.code == 2 and "pip install 'jaxlm[datasets]'" in done.err and done.err.count("\n") == 1


def test_data_made_otherwise_is_refused_with_what_differs(call, tmp_path, tokenizer) -> None:
    """Another share, another source: nothing that was made is lost."""
    source = _jsonl(tmp_path / "a.jsonl", _texts(60))
    words = ["--out", "out", "--tokenizer", tokenizer]
    assert call(source, *words).code == 0
    before = _files(tmp_path / "out")
    done = call(source, *words, "--val-fraction", 0.1)
    assert (
        done.code == 2 and "val_fraction was 0.05, is 0.1; delete it or choose another --out" in done.err
    ), done.err
    done = call(_jsonl(tmp_path / "b.jsonl", _texts(61)), *words)
    assert done.code == 2 and "the source is another or has changed" in done.err and "a.jsonl" in done.err
    assert _files(tmp_path / "out") == before
    (tmp_path / "out" / "train" / "meta.json").write_text("{}")
    done = call(source, *words)
    assert done.code == 2 and "it is damaged or unfinished; delete it" in done.err


def _process(words: list) -> subprocess.Popen:
    command = [sys.executable, "-m", "experiments.prepare_data", *map(str, words)]
    environment = os.environ | {"PYTHONPATH": ":".join(sys.path)}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def test_a_full_disk_keeps_what_is_done(tmp_path, tokenizer, call, monkeypatch) -> None:
    """One line, exit code 2; with room, the same command goes on and gives the folder of an uninterrupted run."""
    source = _jsonl(tmp_path / "a.jsonl", _texts(300))
    words = [source, "--tokenizer", tokenizer, "--shard-tokens", 500]
    assert call(*words, "--out", "through").code == 0
    write, room = writer._Array.append, [40]

    def until_full(array, values) -> None:
        room[0] -= 1
        if room[0] < 0:
            write(array, values[: len(values) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(array, values)

    with monkeypatch.context() as patched:
        patched.setattr(writer._Array, "append", until_full)
        done = call(*words, "--out", "full")
    assert done.code == 2 and done.err.count("\n") == 1 and not (tmp_path / "full").exists(), done
    assert (
        "No space left on device" in done.err and ".full.partial" in done.err and "same command" in done.err
    )
    noted = json.loads((tmp_path / ".full.partial" / "progress.json").read_text())
    assert noted["documents"] > 20
    assert call(*words, "--out", "full").code == 0
    assert _files(tmp_path / "full") == _files(tmp_path / "through")


def _alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_as_if_it_had_run_through(tmp_path, tokenizer, call) -> None:
    """SIGKILL of the parent alone, again and again: its workers end with it, and the folder is that of one run."""
    source = _jsonl(tmp_path / "a.jsonl", _texts(120_000))
    words = [source, "--tokenizer", tokenizer, "--workers", 2, "--shard-tokens", 30_000]
    assert call(*words, "--out", "through").code == 0
    draw, killed, notes = random.Random(0), 0, tmp_path / ".out.partial" / "progress.json"
    while not (tmp_path / "out").exists() and killed < 60:
        process = _process([*words, "--out", tmp_path / "out"])
        deadline = time.monotonic() + 1 + draw.random()
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if process.poll() is None:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            process.kill()
            killed += 1
            patience = time.monotonic() + 20
            while any(_alive(int(child)) for child in children):
                assert time.monotonic() < patience, "workers outlived their parent"
                time.sleep(0.05)
        process.communicate(timeout=60)
        if notes.exists():
            json.loads(notes.read_text())  # whole at every moment
    assert killed >= 3
    assert _files(tmp_path / "out") == _files(tmp_path / "through")


def test_progress_is_lines_without_a_terminal(call, tmp_path, tokenizer, monkeypatch) -> None:
    """Documents, tokens, tokens per second and, where the end is known, the time left."""
    monkeypatch.setattr(prepare_data, "LINES_EVERY", 0.0)
    source = _jsonl(tmp_path / "a.jsonl", _texts(300))
    done = call(source, "--out", "out", "--tokenizer", tokenizer, "--shard-tokens", 2000)
    lines = done.err.splitlines()
    assert len(lines) > 2 and all("documents, " in line and " tokens/s" in line for line in lines)
    assert lines[-1].startswith("300 documents, ") and lines[-1].endswith(", 0 s left")


@pytest.mark.slow
def test_an_interrupt_ends_quietly(tmp_path, tokenizer) -> None:
    """Control-C: exit code 130, no traceback of any worker."""
    source = _jsonl(tmp_path / "a.jsonl", _texts(300_000))
    words = [
        source,
        "--tokenizer",
        tokenizer,
        "--workers",
        2,
        "--shard-tokens",
        5000,
        "--out",
        tmp_path / "out",
    ]
    process = _process(words)
    time.sleep(2.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, (process.returncode, err)
