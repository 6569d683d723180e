"""Runs llama.cpp on GGUF files: `python llama_worker.py JOB.json OUT.npz`, in an interpreter that has llama_cpp.

JOB: a list of {"model": path, "ids": [[...], ...]} or {"model": path, "texts": [...]}. OUT: `logits.{job}.{row}` [T, V]
float32, or `ids.{job}` and `lengths.{job}`, the ids of all texts in a row and how many each has.
"""

import json
import sys

import numpy as np
from llama_cpp import Llama

FLOAT32 = 0  # ggml's type of the cache, so that keys and values are not rounded to half precision


def logits(job: dict) -> list[np.ndarray]:
    """All positions of every row."""
    context = max(map(len, job["ids"]))
    model = Llama(
        job["model"],
        n_ctx=context,
        n_batch=context,
        n_ubatch=context,
        logits_all=True,
        type_k=FLOAT32,
        type_v=FLOAT32,
        n_threads=1,
        n_threads_batch=1,
        verbose=False,
    )
    rows = []
    for ids in job["ids"]:
        model.reset()
        model.eval(ids)
        rows.append(np.array(model.scores[: len(ids)], np.float32))
    return rows


def token_ids(job: dict) -> list[list[int]]:
    """Every text as ordinary text."""
    model = Llama(job["model"], vocab_only=True, verbose=False)
    return [model.tokenize(text.encode(), add_bos=False, special=False) for text in job["texts"]]


def main(job_file: str, out_file: str) -> None:
    """Does all jobs."""
    with open(job_file, encoding="utf-8") as file:
        jobs = json.load(file)
    out = {}
    for number, job in enumerate(jobs):
        if "texts" in job:
            ids = token_ids(job)
            out[f"ids.{number}"] = np.array([i for row in ids for i in row], np.int64)
            out[f"lengths.{number}"] = np.array([len(row) for row in ids], np.int64)
        else:
            out |= {f"logits.{number}.{row}": x for row, x in enumerate(logits(job))}
    np.savez(out_file, **out)


if __name__ == "__main__":
    main(*sys.argv[1:])
