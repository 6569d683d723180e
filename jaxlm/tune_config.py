"""What a fine-tuning run is told beside what every run is told: its data, its base, its adapter. No framework here."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from jaxlm import config as configs
from jaxlm.adapter_config import AdapterConfig
from jaxlm.config import ConfigError, RunConfig, require
from jaxlm.json_file import read_object

ChatSchema = Literal["auto", "messages", "sharegpt", "instruction", "openorca", "ultrachat", "preference"]
Quant = Literal["none", "int8", "int4", "nf4"]
Reference = Literal["auto", "frozen", "adapter_off", "stored"]


@dataclass(frozen=True)
class ChatConfig:
    """How conversations become examples."""

    schema: ChatSchema = "auto"  # what rows hold; auto = by their keys
    template: str = ""  # chatml, llama3 or a file of Jinja; '' = the model's own, or ChatML
    think: bool = True  # thoughts, <think> to </think>, carry loss
    too_long: Literal["truncate", "drop", "refuse"] = "truncate"  # over seq_len: lose their end, ...
    bad_rows: Literal["refuse", "drop"] = "refuse"  # rows that are no conversation to learn from
    packing: bool = True  # several examples in a row, set apart; False = one, padded (preferences always)


@dataclass(frozen=True)
class DpoConfig:
    """Direct preference optimisation (arXiv:2305.18290)."""

    beta: float = 0.1  # how strongly the policy is held to the reference
    loss: Literal["sigmoid", "ipo"] = "sigmoid"  # ipo: arXiv:2310.12036, log-probabilities per token
    label_smoothing: float = 0.0  # share of preferences taken to be flipped (conservative DPO; sigmoid only)
    reference: Reference = "auto"  # auto = adapter_off with an adapter, stored without

    def __post_init__(self) -> None:
        require(self.beta > 0, f"dpo.beta={self.beta} must be positive")
        require(
            0 <= self.label_smoothing < 0.5,
            f"dpo.label_smoothing={self.label_smoothing} must be in [0, 0.5)",
        )
        require(
            self.loss == "sigmoid" or not self.label_smoothing,
            f"dpo.label_smoothing={self.label_smoothing} has no effect with dpo.loss={self.loss!r}",
        )


@dataclass(frozen=True)
class TuneConfig:
    """What is tuned, on what, how."""

    method: Literal["sft", "dpo"]  # supervised fine-tuning, or direct preference optimisation
    base: str  # the model that it starts from: run, model directory or Hugging Face directory
    checkpoint: str = "latest"  # of a base that is a run: latest or best
    data: tuple[str, ...] = ()  # conversations or preferences: jsonl, parquet, folders, globs, hf:NAME
    val: tuple[str, ...] = ()  # likewise, to validate on; () = a share of the data
    epochs: float = 0.0  # passes over the data that train.steps stands for
    chat: ChatConfig = field(default_factory=ChatConfig)  # how conversations become examples
    adapter: AdapterConfig | None = None  # LoRA; None = all weights are trained
    quant: Quant = "none"  # of the frozen base under an adapter; none = train.dtype
    dpo: DpoConfig = field(default_factory=DpoConfig)  # of method dpo

    def __post_init__(self) -> None:
        require(bool(self.base), "tune.base is empty; name the model to start from")
        require(
            self.adapter is not None or self.quant == "none",
            f"tune.quant={self.quant!r} needs an adapter: quantised weights cannot be trained; set --lora.rank",
        )
        require(
            self.method == "sft" or self.adapter is not None or self.dpo.reference != "adapter_off",
            "dpo.reference='adapter_off' needs an adapter; set --lora.rank, or choose frozen or stored",
        )

    @property
    def reference(self) -> Reference:
        """Where DPO's reference comes from, `auto` resolved."""
        if self.dpo.reference != "auto":
            return self.dpo.reference
        return "stored" if self.adapter is None else "adapter_off"


@dataclass(frozen=True)
class TuneRun(RunConfig):
    """A run that fine-tunes; config.json of its directory has the key `tune`."""

    tune: TuneConfig = field(kw_only=True)  # what is tuned, on what, how

    @classmethod
    def of(cls, run: RunConfig, tune: TuneConfig) -> "TuneRun":
        """A run, its model, optimizer, loop and mesh, put to fine-tuning. Raises ConfigError where they do not fit."""
        return cls(**{f.name: getattr(run, f.name) for f in fields(RunConfig)}, tune=tune)

    def __post_init__(self) -> None:
        super().__post_init__()
        adapter, chat = self.tune.adapter, self.tune.chat
        require(
            self.tune.method == "dpo" or not (chat.packing and self.model.attn_bias_table),
            "model.attn_bias_table tells places in a row apart: packed examples would learn other biases than those "
            "they are answered with; set --chat.packing False",
        )
        require(
            self.mesh.size == 1 or self.tune.quant == "none" or self.mesh.size == self.mesh.data,
            f"mesh {self.mesh}: a quantised base is not split; use data=N, or no --quant",
        )
        if adapter is not None and adapter.dropout:
            layers = filter(self.model.is_moe, range(self.model.n_layers))
            experts = [f"blocks.{i}.moe.experts.{name}" for i in layers for name in ("gate_up", "up", "down")]
            require(
                not any(map(adapter.adapts, experts)),
                f"lora.dropout={adapter.dropout}: adapters of experts have no dropout; set it to 0, or leave experts "
                "out of --lora.targets",
            )


def load_run(path: Path) -> RunConfig:
    """config.json of any run: a TuneRun where it fine-tunes. Raises ConfigError with the file's name."""
    try:
        values = read_object(path)
        return configs.from_dict(TuneRun if "tune" in values else RunConfig, values)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ValueError as error:  # not UTF-8, not JSON, or refused by the config itself
        raise ConfigError(f"{path}: {error}") from None
