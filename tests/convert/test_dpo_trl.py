"""Preferences against TRL: our loss on its log-probabilities, and the same pairs through both from end to end."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what TRL thinks of its own dependencies
    trl = pytest.importorskip("trl")

import jax.numpy as jnp  # noqa: E402
from helpers import assert_close, quick_jit, relative_error, tree_errors  # noqa: E402
from hf_models import CASES, V, build  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from tolerances import tolerance  # noqa: E402

from convert import hf, rules, stream  # noqa: E402
from convert.hf.families import pairs  # noqa: E402
from convert.tree import to_numpy  # noqa: E402
from jaxlm.config import TrainConfig  # noqa: E402
from jaxlm.finetune.dpo import dpo_task, preference_loss, reference_log_probs  # noqa: E402
from jaxlm.layers import Backends  # noqa: E402
from jaxlm.train import make_gradient_fn  # noqa: E402
from jaxlm.tune_config import DpoConfig, TuneConfig, TuneRun  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore::FutureWarning")]

LOOP, PAIRS = Backends(experts="loop"), 4
# name -> our configuration and what TRL calls it. TRL 1.16's sigmoid does not read label_smoothing; its aot does, and
# aot of a batch of one pair, which there is nothing to sort in, is conservative DPO.
LOSSES = {
    "sigmoid": (DpoConfig(beta=0.3), "sigmoid"),
    "label_smoothing": (DpoConfig(beta=0.3, label_smoothing=0.2), "aot"),
    "ipo": (DpoConfig(beta=0.3, loss="ipo"), "ipo"),
}


def tokenized() -> list[dict[str, list[int]]]:
    """Prompts, and answers of unequal lengths; of one pair the chosen answer is the longer one, of another a token."""
    rng = np.random.default_rng(0)
    lengths = [(3, 6, 2), (7, 1, 9), (1, 4, 4), (5, 3, 5)]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [dict(zip(names, [rng.integers(6, V, n).tolist() for n in row])) for row in lengths]


class Trained(NamedTuple):
    """A TRL trainer with a policy and a reference of its own, and a batch of all pairs."""

    trainer: Any
    policy: Any
    reference: Any
    batch: dict[str, Any]


def trainer_of(family: str, directory: Path) -> Trained:
    """Two models of a family in float32, near each other as in training, under TRL's trainer on the CPU."""
    policy, reference = (build(CASES[family], num_hidden_layers=2).float() for _ in range(2))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.02)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w1", eos_token="w5", unk_token="w0"
    )
    arguments = trl.DPOConfig(
        str(directory), use_cpu=True, report_to=[], bf16=False, disable_tqdm=True, disable_dropout=False
    )
    rows = [{name: f"w{i}" for name in ("prompt", "chosen", "rejected")} for i in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        datasets.disable_progress_bars()
        trainer = trl.DPOTrainer(
            policy,
            reference,
            arguments,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
        )
    policy.train()
    return Trained(trainer, policy, reference, trainer.data_collator(tokenized()))


def of_loss(trainer: Any, name: str) -> DpoConfig:
    """Sets TRL's loss; our configuration of it."""
    ours, theirs = LOSSES[name]
    trainer.loss_types, trainer.beta, trainer.label_smoothing = [theirs], ours.beta, ours.label_smoothing
    return ours


def metrics_of(trainer: Any) -> dict[str, float]:
    """What TRL has noted since it was last asked, means over its batches."""
    noted = {name: float(np.mean(values)) for name, values in trainer._metrics["train"].items()}
    trainer._metrics["train"].clear()
    return noted


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    """Of a dense model."""
    yield trainer_of("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("spread", [1.0, 300.0])
def test_the_loss_is_trls_on_its_own_log_probabilities(name: str, spread: float, llama: Trained) -> None:
    """Loss and rewards of single pairs, of references near the policy and so far away that an exponential overflows."""
    trainer, config = llama.trainer, of_loss(llama.trainer, name)
    with torch.no_grad():
        policy = torch.stack(trainer.compute_ref_log_probs(llama.policy, llama.batch), 1).numpy()
    noise = np.random.default_rng(1).standard_normal(policy.shape)
    reference = (policy + spread * noise).astype(np.float32)
    lengths = llama.batch["completion_mask"].sum(1).reshape(2, PAIRS).T.numpy().astype(np.float32)
    ours, rewards = preference_loss(config, *(jnp.asarray(x) for x in (policy, reference, lengths)))
    assert ours.dtype == jnp.float32
    trainer.precompute_ref_logps = True
    try:
        for i in range(PAIRS):
            batch = {k: v[i::PAIRS] for k, v in llama.batch.items()}
            stored = {
                f"ref_{side}_logps": torch.tensor(reference[i : i + 1, j])
                for j, side in enumerate(("chosen", "rejected"))
            }
            loss = float(trainer.compute_loss(llama.policy, batch | stored).detach())
            noted = metrics_of(trainer)
            limit = tolerance("f32_trl_loss")
            assert relative_error(ours[i], loss, 1.0) <= limit, (i, float(ours[i]), loss)
            for j, side in enumerate(("chosen", "rejected")):
                assert relative_error(rewards[i, j], noted[f"rewards/{side}"], 1.0) <= limit
    finally:
        trainer.precompute_ref_logps = False


def our_batch(batch: dict[str, Any]) -> dict[str, np.ndarray]:
    """TRL's batch as ours: all tokens are inputs, as there, so that routers see the same ones."""
    ids, valid, completion = (
        batch[name].numpy().reshape(2, PAIRS, -1).swapaxes(0, 1)
        for name in ("input_ids", "attention_mask", "completion_mask")
    )

    def shifted(x: np.ndarray) -> np.ndarray:
        return np.concatenate([x[..., 1:], np.zeros_like(x[..., :1])], -1)

    return {
        "inputs": ids.astype(np.int32),
        "targets": shifted(ids).astype(np.int32),
        "loss_mask": shifted(completion).astype(np.float32),
        "segments": valid.astype(np.int32),
    }


def ours_of(model: Any, directory: Path) -> tuple[hf.Source, dict[str, Any]]:
    """A transformers model saved and opened here."""
    model.save_pretrained(directory)
    source = hf.read(directory)
    return source, {path: jnp.asarray(stream.array(planned)) for path, planned in source.tensors.items()}


def compare(trained: Trained, name: str, directory: Path) -> None:
    """Loss, rewards, log-probabilities and the gradient of every parameter of the policy."""
    trainer, config = trained.trainer, of_loss(trained.trainer, name)
    if name == "label_smoothing":  # see LOSSES
        batches = [{k: v[i::PAIRS] for k, v in trained.batch.items()} for i in range(PAIRS)]
    else:
        batches = [trained.batch]
    trained.policy.zero_grad()
    losses = [trainer.compute_loss(trained.policy, batch) / len(batches) for batch in batches]
    torch.stack(losses).sum().backward()
    theirs, noted = float(sum(loss.detach() for loss in losses)), metrics_of(trainer)

    source, policy = ours_of(trained.policy, directory / "policy")
    _, reference = ours_of(trained.reference, directory / "reference")
    train = TrainConfig(batch_size=PAIRS, seq_len=16, dtype="float32", param_dtype="float32")
    tune = TuneConfig("dpo", "here", dpo=config)
    run = TuneRun(source.config, train=train, tune=tune)
    batch = our_batch(trained.batch)
    batch["reference"] = reference_log_probs(run, reference, [batch], LOOP)
    grads, metrics = quick_jit(make_gradient_fn(run, task=dpo_task(run, LOOP)))(policy, batch)

    limit = tolerance("f32_trl")
    assert relative_error(metrics["total_loss"], theirs) <= limit
    for ours, called in {
        "rewards/chosen": "rewards/chosen",
        "rewards/rejected": "rewards/rejected",
        "rewards/margin": "rewards/margins",
        "rewards/accuracy": "rewards/accuracies",
        "logps/chosen": "logps/chosen",
        "logps/rejected": "logps/rejected",
    }.items():
        assert relative_error(metrics[ours], noted[called], 1.0) <= limit, ours
    if "aux_loss" in noted:
        assert source.config.moe.balance_coef == trainer.router_aux_loss_coef > 0
        assert relative_error(metrics["balance"], noted["aux_loss"]) <= limit
    mine = rules.convert(
        pairs(source.config, source.family, "fused"), {k: np.asarray(g) for k, g in grads.items()}
    )
    oracle = {name: to_numpy(p.grad) for name, p in trained.policy.named_parameters()}
    assert_close(tree_errors(mine, oracle), tolerance("f32_trl_gradients"), "gradients")


@pytest.mark.parametrize("name", LOSSES)
def test_pairs_through_a_dense_model_give_trls_loss_and_gradients(
    name: str, llama: Trained, tmp_path: Path
) -> None:
    """The same weights, the same pairs, each framework with its own forward and backward pass in float32."""
    compare(llama, name, tmp_path)


def test_pairs_through_a_mixture_give_trls_loss_and_gradients(tmp_path: Path) -> None:
    """With the routers' balance loss, which TRL adds by the model's own coefficient."""
    compare(trainer_of("mixtral", tmp_path / "trl"), "sigmoid", tmp_path)
