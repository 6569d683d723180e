"""Supervised fine-tuning: the pretraining loss on the tokens that carry loss, of all weights or of an adapter.

Twin: jaxlm/finetune/sft.py. What carries loss is said by the batch, so nothing else is new here.
"""

import torch
from torch import Tensor

from jaxlm.tune_config import TuneRun
from torchref.finetune.lora import set_key
from torchref.loss import Counts
from torchref.model import Decoder
from torchref.train import Batch, Params, Task, evaluation, loss_and_metrics, pretraining


def sft_task(run: TuneRun) -> Task:
    """All weights where the run has no adapter; else the factors of an adapted decoder, whose base is frozen."""
    adapter = run.tune.adapter
    if adapter is None:
        return pretraining(run)

    def loss(
        decoder: Decoder,
        params: Params,
        batch: Batch,
        counts: Counts,
        train: bool,
        key: torch.Generator | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        set_key(decoder, key)
        return loss_and_metrics(run, decoder, params, batch, counts, train, key)

    def evaluate(decoder: Decoder, params: Params, batch: Batch) -> dict[str, Tensor]:
        set_key(decoder, None)
        return evaluation(decoder, params, batch)

    return Task(loss, evaluate, bool(run.model.dropout or adapter.dropout))
