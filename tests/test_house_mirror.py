"""The twins look alike: a mirrored file has the same classes, functions and arguments in the same order."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MIRRORED = [
    "layers",
    "attention",
    "moe",
    "model",
    "loss",
    "guard",
    "vitals",
    "logits",
    "cached",
    "generate",
    "beam",
    "quant",
    "muon",
    "moments8",
    "evaluate",
    "finetune/lora",
    "finetune/sft",
    "finetune/dpo",
]
SAME_NAMES = ["optim", "train"]
# What one framework needs and the other has no word for.
IGNORED_ARGUMENTS = {"rngs", "key", "mesh", "sharding", "device"}
# Every other difference, as file.name or file.name(argument); *(argument) is meant everywhere.
EXCEPTIONS: dict[str, str] = {
    "*(axes)": "logical axis names say how jax shards a parameter; the reference runs on one device",
    "layers.add_bias": "how jax is told to sum a bias's gradient in float32; torch does so by itself",
    "layers.split_key": "jax's random keys are split by hand; a torch.Generator carries its own state",
    "attention.cudnn_attention": "cuDNN's kernel through jax; torch's counterpart is sdpa_attention",
    "attention.sdpa_attention": "torch's own fused kernel; jax's counterpart is cudnn_attention",
    "generate.lower_greedy": "how jaxlm.plan compiles decoding for a device that is not there",
    "moe.Experts.weights": "jaxlm hands the stacked weights to a grouped product",
    "moe.apply_experts": "what three forms of the stacked weights share; torch loops over the experts",
    "moe.Experts.local": "the part of the experts that one device of an expert-parallel mesh computes",
    "moe.Experts.expert": "the reference loops over the experts, one at a time",
    "model.Split": "jax trains a pure function of the parameters, so a model is split into its graph and its state",
    "model.split_model": "see model.Split",
    "model.merge_model": "see model.Split",
    "model.Abstract": "shapes without memory, from which jax restores and shards",
    "model.abstract_model": "see model.Abstract",
    "model.abstract_of": "see model.Abstract",
    "model.init_params": "parameters born inside jit, so that none is ever whole on one device",
    "cached.step": "what a traced loop over tokens contains; torch runs its steps one by one",
    "optim.as_arrays": "step-dependent scalars enter a jitted step as arrays",
    "optim.clip_by_global_norm": "a link of the optax chain; the reference calls the formula directly",
    "optim.scale_by_exact_adamw": "a link of the optax chain; the reference has it in its optimizer's step",
    "optim.scale_by_muon": "see optim.scale_by_exact_adamw",
    "optim.MuonState": "state of a link of the optax chain; the reference keeps it with the parameter",
    "optim.opt_state_shardings": "how jax lays the optimizer's state over its mesh",
    "optim.PolicyOptimizer": "torch's class of optimizers; jaxlm has a chain of functions",
    "optim.expected_state": "torch makes an optimizer's state at its first step; jax at the start",
    "optim.state_tensors": "how the reference names its optimizer's state in files; orbax takes jax's tree",
    "optim.load_state_tensors": "see optim.state_tensors",
    "*(transposed)": "jaxlm keeps a matrix as [in, out]; the reference as the blocks run, [out, in]",
    "finetune/sft.sft_task(backends)": "torchref's decoder comes built, with backends of its own",
    "finetune/dpo.dpo_task(backends)": "see finetune/sft.sft_task(backends)",
    "finetune/dpo.dpo_task(reference)": "the weights that jaxlm is given as frozen are a decoder in torchref",
    "finetune/dpo.reference_log_probs(backends)": "see finetune/sft.sft_task(backends)",
    "guard.corrected": "bias corrections are told to the optax chain; torch.optim counts its own steps",
    "guard.keep": "a jitted step computes the update and then chooses; the reference does not step",
    "quant.QuantWeight.product": "its gradient dequantises again; torch multiplies with the weight itself",
    "quant.QuantExperts.local": "see moe.Experts.local",
    "quant.check_tensors": "jaxlm's adapters read their base tensor by tensor too; torch quantises a decoder",
    "quant.quantize_weight": "see quant.check_tensors",
    "quant.quantized_modules": "jaxlm's adapters are built on shapes; torch adapts a decoder that is there",
    "finetune/lora.LoraWeight.factors": "where a mesh has the factors while they are used",
    "finetune/lora.LoraWeight.shape": "an nnx module is asked for its weight alone",
    "finetune/lora.LoraWeight.T": "torch's head is the transpose of its weight",
    "finetune/lora.Adapted": "see model.Abstract",
    "finetune/lora.adapted": "see model.Abstract",
    "finetune/lora.init_factors": "see model.init_params",
    "finetune/lora.adapted_decoder": "see model.merge_model",
    "finetune/lora.adapt": "torch's modules are exchanged in the decoder itself, whose factors are fresh then",
    "finetune/lora.set_key": "jaxlm gives the key of a step to adapted_decoder",
    "finetune/lora.freeze(tensors)": "jaxlm casts or quantises one tensor at a time as it is read",
    "finetune/lora.freeze(decoder)": "torch casts or quantises the decoder's own",
    "finetune/lora.generation_model": "see model.Split; torch decodes with the adapted decoder",
    "finetune/lora.Adapters": "switched without being compiled again, which torch does by loading other factors",
    "train.state_shapes": "shapes without memory, from which jax restores a checkpoint",
    "train.state_shardings": "how jax lays the state over its mesh",
    "train.frozen_shardings": "see train.state_shardings",
}


def signatures(source: str, file: str) -> dict[str, list[str]]:
    """Public name -> its argument names; a NamedTuple or dataclass -> its fields; `forward` stands for `__call__`."""
    found: dict[str, list[str]] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            found[f"{file}.{node.name}"] = _arguments(node)
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            fields = [
                n.target.id
                for n in node.body
                if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
            ]
            found[f"{file}.{node.name}"] = fields
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and _is_public(method.name):
                    name = {"__call__": "forward"}.get(method.name, method.name)
                    found[f"{file}.{node.name}.{name}"] = _arguments(method)
    return found


def _is_public(name: str) -> bool:
    return not name.startswith("_") or name in ("__init__", "__call__")


def _arguments(node: ast.FunctionDef) -> list[str]:
    spec = node.args
    every = [
        *spec.posonlyargs,
        *spec.args,
        *filter(None, [spec.vararg]),
        *spec.kwonlyargs,
        *filter(None, [spec.kwarg]),
    ]
    return [argument.arg for argument in every if argument.arg not in IGNORED_ARGUMENTS]


def differences(ours: str, theirs: str, file: str, used: set[str]) -> list[str]:
    """How two mirrored sources differ beyond EXCEPTIONS, one line each; adds the exceptions it took to `used`."""

    def excused(*names: str) -> bool:
        hit = [name for name in names if name in EXCEPTIONS]
        used.update(hit)
        return bool(hit)

    left, right = signatures(ours, file), signatures(theirs, file)
    broken: list[str] = []
    for name in sorted(left.keys() ^ right.keys()):
        owner = name.rpartition(".")[0]
        if owner in left.keys() ^ right.keys() or excused(name):
            continue  # the whole class stands on one side, and is said once
        side = "torchref" if name in left else "jaxlm"
        broken.append(f"{name} is missing in {side}")
    common = [name for name in left if name in right]
    order = [name for name in right if name in left]
    if common != order:
        first = next(a for a, b in zip(common, order, strict=True) if a != b)
        broken.append(f"{file}: order differs from {first} on")
    for name in common:
        here, there = (
            [a for a in arguments if not (a not in other and excused(f"{name}({a})", f"*({a})"))]
            for arguments, other in ((left[name], right[name]), (right[name], left[name]))
        )
        if here != there:
            broken.append(f"{name}: jaxlm has {here}, torchref has {there}")
    return broken


def pair(file: str) -> tuple[str, str]:
    """The two sources of a mirrored file. Skips while neither exists, fails while only one does."""
    paths = [ROOT / column / f"{file}.py" for column in ("jaxlm", "torchref")]
    if not any(path.exists() for path in paths):
        pytest.skip(f"{file}.py does not exist yet")
    alone = [str(path.relative_to(ROOT)) for path in paths if not path.exists()]
    assert not alone, f"{alone[0]} is missing"
    return paths[0].read_text(encoding="utf-8"), paths[1].read_text(encoding="utf-8")


@pytest.mark.parametrize("file", MIRRORED)
def test_twin_files_mirror_each_other(file: str) -> None:
    """Same public names in the same order with the same arguments."""
    broken = differences(*pair(file), file, set())
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("file", SAME_NAMES)
def test_twin_files_expose_the_same_names(file: str) -> None:
    """Optimizer and step differ inside, not in what they offer."""
    left, right = (
        {name for name in signatures(source, file) if name.count(".") == 1 and name not in EXCEPTIONS}
        for source in pair(file)
    )
    assert left == right


def test_every_exception_is_needed() -> None:
    """An exception whose difference is gone is removed from the list."""
    used: set[str] = set()
    for file in MIRRORED:
        paths = [ROOT / column / f"{file}.py" for column in ("jaxlm", "torchref")]
        if all(path.exists() for path in paths):
            differences(*(path.read_text(encoding="utf-8") for path in paths), file, used)
    for file in SAME_NAMES:
        left, right = (signatures(source, file).keys() for source in pair(file))
        used |= (left ^ right) & EXCEPTIONS.keys()
    assert sorted(EXCEPTIONS.keys() - used) == []


OURS = """
class Box(nnx.Module):
    def __init__(self, size, *, rngs): ...
    def __call__(self, x, key=None): ...
class Pair(NamedTuple):
    first: int
    second: int
def fold(a, b): ...
def _private(): ...
"""
THEIRS = OURS.replace("__call__", "forward").replace("nnx", "nn")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(("def fold(a, b)", "def fold(b, a)"), "file.fold: jaxlm has", id="argument-order"),
        pytest.param(("def fold(a, b)", "def fold(a, b, c)"), "file.fold: jaxlm has", id="extra-argument"),
        pytest.param(
            ("def fold(a, b)", "def unfold(a, b)"), "file.fold is missing in torchref", id="renamed-function"
        ),
        pytest.param(
            ("forward(self, x,", "forward(self, y,"), "file.Box.forward", id="renamed-argument-of-forward"
        ),
        pytest.param(("second: int", "third: int"), "file.Pair: jaxlm has", id="renamed-field"),
        pytest.param(("class Box", "class Bin"), "file.Bin is missing in jaxlm", id="renamed-class"),
        pytest.param(
            ("def forward", "def __len__(self): ...\n    def go"), "Box.forward is missing", id="no-forward"
        ),
    ],
)
def test_planted_difference_is_caught(change: tuple[str, str], reason: str) -> None:
    """The checker goes red on each kind of difference."""
    planted = THEIRS.replace(*change)
    assert planted != THEIRS
    assert any(reason in line for line in differences(OURS, planted, "file", set()))


def test_planted_order_is_caught() -> None:
    """The same names in another order are a difference."""
    parts = THEIRS.split("class Pair")
    swapped = "class Pair" + parts[1] + parts[0]
    assert differences(OURS, swapped, "file", set()) == ["file: order differs from file.Box on"]


def test_true_twins_pass() -> None:
    """forward answers to __call__, and what only one framework needs is ignored."""
    assert differences(OURS, THEIRS.replace(", *, rngs", ", *, device"), "file", set()) == []
