"""The demo's model, exported, fine-tuned in both ways, and opened by transformers and peft themselves."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from helpers import relative_error  # noqa: E402
from tolerances import tolerance  # noqa: E402
from tuning_files import exported, write_chats  # noqa: E402

from convert.targets import open_target  # noqa: E402
from experiments import pretrain, sft  # noqa: E402
from jaxlm.metrics import read_metrics  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
DEMO = Path(os.environ.get("JAXLM_DEMO", ROOT / "runs" / "quickstart"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.torch,
    # peft looks for patterns of parameters among the modules only, and applies them all the same.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `make demo`, or where there is none a short one of its model, as a Hugging Face directory."""
    folder = tmp_path_factory.mktemp("demo")
    if (DEMO / "checkpoints").is_dir():
        return exported(DEMO, folder / "hf")
    words = ["--data.path", str(ROOT / "README.md"), "--train.steps", "5", "--run-dir", str(folder / "run")]
    pretrain.main(["quickstart", *words, "--train.plots", "False"])
    return exported(folder / "run", folder / "hf")


def logits(model: Any, ids: np.ndarray) -> np.ndarray:
    """Of a transformers or peft model, in float32."""
    with torch.no_grad():
        return model.eval()(torch.tensor(ids)).logits.numpy()


def test_it_is_tuned_and_opens_in_transformers_and_peft(base: Path, tmp_path: Path) -> None:
    """All weights and LoRA: losses fall; transformers gives our logits from what is merged, peft from the adapter."""
    chats = write_chats(tmp_path / "chats.jsonl")
    common = [
        str(base),
        "--data",
        str(chats),
        "--train.steps",
        "8",
        "--train.seq-len",
        "64",
        "--train.batch-size",
        "8",
    ]
    ids = np.random.default_rng(0).integers(0, 250, (2, 24))
    for name, more in (("all", ["--optim.lr", "3e-4"]), ("lora", ["--optim.lr", "3e-3", "--lora.rank", "8"])):
        run_dir = tmp_path / name
        sft.main([*common, *more, "--train.plots", "False", "--run-dir", str(run_dir)])
        rows = read_metrics(run_dir / "metrics.jsonl")
        assert rows[-1]["val_loss"] < rows[0]["loss"]
        out = exported(run_dir, tmp_path / f"{name}-hf")
        ours = open_target(run_dir).decoder
        with torch.no_grad():
            expected = ours.eval()(torch.tensor(ids))[0].numpy()
        merged = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        assert relative_error(logits(merged, ids), expected) < tolerance("f32_transformers")
        assert transformers.AutoTokenizer.from_pretrained(out).chat_template
        if name == "lora":
            adapter = exported(run_dir, tmp_path / "adapter", "peft")
            plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            assert relative_error(logits(plain, ids), expected) > 1e-3
            adapted = peft.PeftModel.from_pretrained(plain, str(adapter))
            assert relative_error(logits(adapted, ids), expected) < tolerance("f32_transformers")
