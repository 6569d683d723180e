"""Preparation in processes that fill the disk, are killed, or meet: all or nothing, and once."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from jaxlm.data.corpus import open_corpus
from jaxlm.data.prepare import prepare
from jaxlm.data.shards import ShardError, open_shards
from jaxlm.tokenizer import SPECIAL_TOKENS, Tokenizer

BYTES = Tokenizer.train(["x"], 256 + len(SPECIAL_TOKENS))  # one token per byte

PREPARE = """
import resource, signal, sys, time
from jaxlm.data.corpus import open_corpus
from jaxlm.data.prepare import prepare
from jaxlm.data.shards import ShardError
from jaxlm.tokenizer import SPECIAL_TOKENS, Tokenizer
path, out, mode = sys.argv[1:]
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
if mode == "full": resource.setrlimit(resource.RLIMIT_FSIZE, (15000, limits[1]))
def slow(documents, tokens):
    if mode == "slow" and documents >= 30: print("half", flush=True); time.sleep(60)
try: prepare(open_corpus(path, "text"), Tokenizer.train(["x"], 263), out, 0.1, 10, slow, shard_tokens=8000)
except ShardError as error: print(error)
"""


def _prepare_process(tmp_path, mode):
    (tmp_path / "big.jsonl").write_text((json.dumps({"text": "0123456789" * 50}) + "\n") * 60)
    command = [sys.executable, "-c", PREPARE, str(tmp_path / "big.jsonl"), str(tmp_path / "d" / "out"), mode]
    env = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_full_disk_leaves_nothing_and_one_line(tmp_path):
    """A limit on file sizes stands for the disk: the write of the first shard fails."""
    out, err = _prepare_process(tmp_path, "full").communicate(timeout=60)
    assert "no space for the tokenised data" in out and "data.cache" in out and out.count("\n") == 1, (
        out,
        err,
    )
    assert os.listdir(tmp_path / "d") == []


def test_a_kill_leaves_nothing_that_looks_finished_and_the_next_run_cleans_up(tmp_path):
    """SIGKILL in the middle of the text, then an ordinary run."""
    process = _prepare_process(tmp_path, "slow")
    assert process.stdout.readline() == "half\n"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (tmp_path / "d" / "out").exists()
    with pytest.raises(ShardError, match=r"meta\.json is missing"):
        open_shards(tmp_path / "d" / "out" / "train", 263)
    prepare(
        open_corpus(str(tmp_path / "big.jsonl")), BYTES, tmp_path / "d" / "out", 0.1, 10, shard_tokens=8000
    )
    assert os.listdir(tmp_path / "d") == ["out"]
    assert open_shards(tmp_path / "d" / "out" / "train", 263).meta["documents"] == 54


def test_two_processes_prepare_the_same_folder_once(tmp_path):
    """The second waits for the first and uses its files."""
    first = _prepare_process(tmp_path, "slow")
    assert first.stdout.readline() == "half\n"
    second = _prepare_process(tmp_path, "plain")
    time.sleep(1.5)
    assert second.poll() is None, "the second must wait while the first writes"
    first.kill()
    first.communicate(timeout=60)
    out, err = second.communicate(timeout=60)
    assert out == "" and err.startswith("waiting for another process") and err.count("\n") == 1
    assert open_shards(tmp_path / "d" / "out" / "val", 263).meta["documents"] == 6
