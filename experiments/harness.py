"""Runs tasks of EleutherAI's lm-evaluation-harness (lm_eval) on a trained model, in JAX or PyTorch.

    python -m experiments.harness runs/quickstart --tasks my_task --include-path tasks/ --limit 100 --out results.json
    python -m experiments.harness model-dir --tasks hellaswag arc_easy --framework torch --download

--include-path holds task files (YAML) of one's own; their data may be local files too. Nothing is fetched from the
network without --download. The table goes to standard output; --out keeps everything that lm_eval reports.
"""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from convert.targets import Target, open_target
from experiments.cli import main_guard, need, parse, say
from experiments.loading import (
    Dtype,
    Framework,
    Front,
    Quant,
    TargetPath,
    check_place,
    devices,
    front_id,
    load_model,
    precision,
    print_any_name,
)
from jaxlm.config import ConfigError, InputError, nearest
from jaxlm.run_dir import environment


@dataclass(frozen=True)
class HarnessOptions:
    """Options of the harness."""

    target: TargetPath  # run, model directory or .gguf
    tasks: tuple[str, ...]  # names of tasks, groups or tags
    include_path: str = ""  # directory with task files of one's own
    limit: int | None = None  # examples of each task at most; left out = all
    num_fewshot: int | None = None  # solved examples before each question; left out = as the task says
    batch_size: int = 8  # requests computed together; no likelihood depends on it
    max_length: int | None = None  # tokens that the model reads at once; left out = its context
    framework: Framework = "jax"  # which of the two models computes
    dtype: Dtype = "float32"  # of the computation
    quant: Quant = "none"  # weights rounded to this before anything is computed
    front: Front = (
        "auto"  # token before a text without context; auto = bos where texts start with it, else eos
    )
    seed: int = 0  # of tasks that sample
    checkpoint: Literal["latest", "best"] = "latest"  # of a run: newest, or lowest validation loss
    download: bool = False  # data sets and metrics may be fetched from the network
    samples: bool = False  # --out also holds every example with the model's answers
    out: str = ""  # JSON file for everything that lm_eval reports


def main(argv: list[str]) -> int:
    """Entry point."""
    options = parse(HarnessOptions, argv, "python -m experiments.harness", __doc__ or "")
    for name, value in (("limit", options.limit), ("batch-size", options.batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"--{name} {value} must be at least 1")
    if options.num_fewshot is not None and options.num_fewshot < 0:
        raise ConfigError(f"--num-fewshot {options.num_fewshot} must not be negative")
    if options.include_path and not Path(options.include_path).is_dir():
        raise ConfigError(f"--include-path {options.include_path} is no directory")
    if options.out:
        check_place(Path(options.out), directory=False)
    print_any_name()
    target = open_target(options.target, options.checkpoint, optimizer=False)
    need("lm_eval", "eval")
    # Read when the libraries are imported.
    if not options.download:
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    os.environ.setdefault("LMEVAL_LOG_LEVEL", "WARNING")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from lm_eval.utils import make_table

    results = evaluate(target, options)
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    if options.out:
        write(Path(options.out), results, target, options)
    return 0


def evaluate(target: Target, options: HarnessOptions) -> dict[str, Any]:
    """lm_eval's results. Raises InputError on tasks that are unknown or whose data cannot be had."""
    from lm_eval.evaluator import simple_evaluate

    from experiments.harness_lm import JaxlmLM

    manager = find_tasks(options)
    with precision(options.framework, options.dtype):
        model = load_model(target, options.framework, options.dtype, options.quant)
        adapter = JaxlmLM(
            model,
            options.framework,
            target.config,
            target.tokenizer,
            target.specials,
            front_id(target, options.front),
            options.batch_size,
            options.max_length,
            options.seed,
        )
        try:
            results = simple_evaluate(
                adapter,
                tasks=list(options.tasks),
                task_manager=manager,
                limit=options.limit,
                num_fewshot=options.num_fewshot,
                log_samples=options.samples,
                random_seed=options.seed,
            )
        except OSError as error:  # data that is not there, or not without a network
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            hint = "" if options.download else "; --download lets the network be asked"
            raise InputError(
                f"the data of {', '.join(options.tasks)} cannot be had: {reason}{hint}"
            ) from None
    assert results is not None, "only the first of several processes gets none"
    return dict(results)


def find_tasks(options: HarnessOptions) -> Any:
    """lm_eval's index of tasks. Raises ConfigError where it lacks one, or a task file cannot be read."""
    from lm_eval.tasks import TaskManager

    # Its own thousands of tasks are read only where they are asked for.
    for defaults in (False, True):
        manager = TaskManager(include_path=options.include_path or None, include_defaults=defaults)
        known = list(manager.task_index)
        missing = [name for name in options.tasks if name not in known]
        if not missing:
            break
    else:
        raise ConfigError(f"lm_eval knows no task {missing[0]!r}{nearest(missing[0], known)}")
    if not defaults:
        try:
            manager.load(list(options.tasks))
        except Exception as error:  # whatever a task file of one's own makes the library stumble over
            reason = (str(error).splitlines() or [""])[0]
            raise ConfigError(
                f"{', '.join(options.tasks)} of {options.include_path}: {type(error).__name__}: {reason}"
            ) from None
    return manager


def write(path: Path, results: dict[str, Any], target: Target, options: HarnessOptions) -> None:
    """Everything that lm_eval reports, with what it was told and by what it was computed."""
    from lm_eval.utils import handle_non_serializable

    where = environment(devices(options.framework), options.seed)
    where["versions"]["lm_eval"] = results.get("lm_eval_version")
    about = {
        "target": str(target.path.absolute()),
        "options": dataclasses.asdict(options),
        "environment": where,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(
        results | {"jaxlm": about}, indent=2, default=handle_non_serializable, ensure_ascii=False
    )
    path.write_text(text + "\n", encoding="utf-8")
    say(f"wrote {path}")


if __name__ == "__main__":
    main_guard(main)
