"""What a run trains, and towards what."""

from jaxlm.config import RunConfig
from jaxlm.finetune.dpo import dpo_task
from jaxlm.finetune.sft import sft_task
from jaxlm.layers import Backends
from jaxlm.train import Task, pretraining
from jaxlm.tune_config import TuneRun


def task_of(run: RunConfig, backends: Backends = Backends()) -> Task:
    """The task of a run, by its configuration alone."""
    if not isinstance(run, TuneRun):
        return pretraining(run, backends)
    return (dpo_task if run.tune.method == "dpo" else sft_task)(run, backends)
