"""Random valid configurations through the suite: whatever the options allow together, the two frameworks must agree on.

hypothesis draws the configurations and, should one fail, shrinks it to the smallest that still does. Limits are
adaptive (see ask.py), since nobody chose these models to be well conditioned.
"""

import concurrent.futures
import dataclasses
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jaxlm.config import ModelConfig, MoEConfig, OptimConfig, RopeScaling, RunConfig, TrainConfig, to_dict

LENGTH = 29  # positions of a random model's batch
# Every rung that depends on the configuration; meshes have their own tests, and a trajectory is `updates`, longer.
RUNGS = (
    *("config", "tree", "conversion", "rope", "activations", "ties", "loss", "gradients", "accumulation"),
    *("clip", "schedule", "update", "updates", "handover", "decoding", "greedy", "sampling"),
)


@dataclass
class RandomReport:
    """What random configurations came to."""

    asked: int
    compared: int = 0
    seconds: float = 0.0
    worst: dict[str, float] = field(default_factory=dict)  # largest error over limit, by rung
    failures: list[dict[str, Any]] = field(default_factory=list)  # shrunk configurations and what they showed

    @property
    def passed(self) -> bool:
        """All were compared and none raised an alarm."""
        return self.compared >= self.asked and not self.failures

    def lines(self) -> list[str]:
        """For a terminal."""
        alarms = len(self.failures)
        rows = [
            f"{self.compared} random configurations, {alarms} false alarm{'' if alarms == 1 else 's'}, "
            f"{self.seconds:.0f} s"
        ]
        rows += [f"  {rung:<14} worst {share:.2g} of its limit" for rung, share in self.worst.items()]
        for failure in self.failures:
            rows += [f"  FAIL {failure['line']}", f"       {failure['config']}"]
        return rows

    def report(self) -> Any:
        """As a parity report, for the files."""
        from convert.parity.compare import Finding
        from convert.parity.limits import limit
        from convert.parity.precision import ledger, pinned
        from convert.parity.results import Report, Rung

        with pinned("float64"):
            report = Report(
                f"{self.asked} random configurations", "their twins", "float64", ledger("float64")
            )
        findings = [Finding(name, share, 1.0) for name, share in self.worst.items()]
        alarms = Finding("false alarms", float(len(self.failures)), limit("exact"))
        missing = Finding("not compared", float(max(0, self.asked - self.compared)), limit("exact"))
        report.rungs = [Rung("random", "", [*findings, alarms, missing], self.seconds)]
        report.seconds = self.seconds
        report.extra = {"random": {k: v for k, v in dataclasses.asdict(self).items()}}
        return report


def run_random(
    count: int, seed: int = 0, jobs: int = 2, progress: Callable[[str], None] = lambda text: None
) -> RandomReport:
    """Compares `count` random configurations, spread over processes; a pure function of count, seed and jobs."""
    started, jobs = time.perf_counter(), max(1, min(jobs, count))
    shares = [count // jobs + (i < count % jobs) for i in range(jobs)]
    total = RandomReport(count)
    if jobs == 1:
        parts = [compare_random(count, seed, progress)]
    else:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
            tasks = [pool.submit(_in_process, share, seed * 1_000 + i) for i, share in enumerate(shares)]
            parts = [task.result() for task in concurrent.futures.as_completed(tasks)]
    for part in parts:
        total.compared += part.compared
        total.failures += part.failures
        for rung, share in part.worst.items():
            total.worst[rung] = max(total.worst.get(rung, 0.0), share)
    total.seconds = time.perf_counter() - started
    return total


def _in_process(count: int, seed: int) -> RandomReport:
    os.environ["OMP_NUM_THREADS"] = "1"
    # A program that runs once or twice on a few numbers: compiling it well costs more than it gives.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0 --xla_cpu_multi_thread_eigen=false"
    os.environ["XLA_FLAGS"] = flags.strip()

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    return compare_random(count, seed, say)


def compare_random(count: int, seed: int, progress: Callable[[str], None]) -> RandomReport:
    """The configurations of one process."""
    import hypothesis

    found, started = RandomReport(count), time.perf_counter()

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        suppress_health_check=tuple(hypothesis.HealthCheck),  # type: ignore[arg-type]
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        report_multiple_bugs=False,
        print_blob=False,
    )
    @hypothesis.given(runs())
    def agree(run: RunConfig) -> None:
        compare_one(run, found, progress)

    try:
        agree()
    except Disagreement as error:
        found.failures.append(error.args[0])
    found.seconds = time.perf_counter() - started
    return found


class Disagreement(AssertionError):
    """A random configuration on which the frameworks part."""


def compare_one(run: RunConfig, found: RandomReport, progress: Callable[[str], None]) -> None:
    """One configuration through the suite. Raises Disagreement."""
    import jax

    from convert.parity.suite import Options, compare_decoders

    init = run.model.init
    options = Options(
        rungs=RUNGS, steps=3, length=LENGTH, seed=run.train.seed, limits="adaptive", inits=(init,)
    )
    report = compare_decoders(run, options=options)
    found.compared += 1
    for rung in report.rungs:
        share = rung.worst.severity
        found.worst[rung.name] = max(found.worst.get(rung.name, 0.0), share)
    if found.compared % 10 == 0:
        progress(f"{found.compared} of {found.asked} configurations agree")
        jax.clear_caches()  # hundreds of models would not fit
    if (first := report.divergence) is not None:
        changed = to_dict(run)["model"] | {"optim": to_dict(run)["optim"]}
        raise Disagreement({"line": first.line(), "config": changed, "divergence": first.to_json()})


def runs() -> Any:
    """A hypothesis strategy for whole runs: small decoders with every option in every combination that is valid."""
    from hypothesis import strategies as st

    return st.builds(_run, models(), st.integers(0, 2**16), st.sampled_from([0.0, 1e-4]), _decays())


def _decays() -> Any:
    from hypothesis import strategies as st

    return st.sampled_from(["matrices", "matrices_and_embeddings"])


def _run(model: ModelConfig, seed: int, z_loss: float, decay: Any) -> RunConfig:
    optim = OptimConfig(lr=1e-3, min_lr=1e-4, warmup_steps=2, z_loss_coef=z_loss, decay=decay)
    train = TrainConfig(batch_size=4, seq_len=min(LENGTH, model.context), seed=seed)
    return RunConfig(model=model, optim=optim, train=train)


def models() -> Any:
    """A hypothesis strategy for valid ModelConfigs."""
    from hypothesis import strategies as st

    @st.composite
    def model(draw: Any) -> ModelConfig:
        kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        position = draw(st.sampled_from(["rope", "rope", "rope", "learned"]))
        half = draw(st.integers(1, 6))
        layers = draw(st.integers(1, 3))
        return ModelConfig(
            vocab_size=draw(st.integers(11, 97)),
            d_model=draw(st.integers(6, 40)),
            n_layers=layers,
            n_heads=kv_heads * group,
            n_kv_heads=kv_heads,
            head_dim=2 * half if position == "rope" else draw(st.integers(1, 12)),
            d_ff=draw(st.integers(3, 48)),
            context=draw(st.integers(34, 64)),
            rope_theta=draw(st.sampled_from([100.0, 10_000.0, 50_000.0, 1e6])),
            norm_eps=draw(st.sampled_from([1e-6, 3e-6, 1e-5, 1e-3])),
            position=position,
            rope_scaling=draw(_scalings()) if position == "rope" else RopeScaling(),
            mlp=draw(st.sampled_from(["swiglu", "swiglu", "gelu_erf", "gelu_tanh"])),
            qkv_bias=draw(st.booleans()),
            attn_out_bias=draw(st.booleans()),
            mlp_bias=draw(st.booleans()),
            head_bias=draw(st.booleans()),
            attn_bias_table=draw(st.booleans()) and draw(st.booleans()),
            qk_norm=draw(st.booleans()),
            tied=draw(st.booleans()),
            windows=tuple(draw(st.lists(st.integers(0, 40), min_size=1, max_size=layers))),
            init=draw(st.sampled_from(["normal", "fan_in"])),
            init_std=draw(st.sampled_from([0.02, 0.1])),
            moe=draw(st.one_of(st.just(MoEConfig()), _moes(layers))),
        )

    return model()


def _scalings() -> Any:
    from hypothesis import strategies as st

    factor = st.sampled_from([1.5, 4.0, 8.0])
    return st.one_of(
        st.just(RopeScaling()),
        st.builds(lambda f: RopeScaling("linear", f), factor),
        st.builds(
            lambda f, n, low, high: RopeScaling("llama3", f, n, low_freq_factor=low, high_freq_factor=high),
            factor,
            st.integers(8, 64),
            st.sampled_from([0.5, 1.0]),
            st.sampled_from([2.0, 4.0]),
        ),
        st.builds(
            lambda f, n, fast, slow, a: RopeScaling(
                "yarn", f, n, beta_fast=fast, beta_slow=slow, attention_factor=a
            ),
            factor,
            st.integers(8, 64),
            st.sampled_from([4.0, 32.0]),
            st.sampled_from([0.25, 1.0]),
            st.sampled_from([0.0, 1.2]),
        ),
    )


def _moes(layers: int) -> Any:
    from hypothesis import strategies as st

    @st.composite
    def moe(draw: Any) -> MoEConfig:
        experts = draw(st.integers(1, 6))
        pattern = draw(st.lists(st.booleans(), min_size=1, max_size=layers))
        pattern[draw(st.integers(0, len(pattern) - 1))] = True
        shared = draw(st.sampled_from([0, 0, 8]))
        return MoEConfig(
            n_experts=experts,
            n_active=draw(st.integers(1, experts)),
            d_ff=draw(st.sampled_from([0, 7, 16])),
            pattern=tuple(pattern),
            renormalize=draw(st.booleans()),
            capacity_factor=draw(st.sampled_from([0.0, 0.0, 0.6, 1.25])),
            balance=draw(
                st.sampled_from(
                    ["none", "mixtral", "layer_mean", "layer_sum", "megatron", "levanter", "maxtext"]
                )
            ),
            balance_coef=draw(st.sampled_from([0.0, 0.02])),
            router_z_coef=draw(st.sampled_from([0.0, 1e-3])),
            expert_bias=draw(st.booleans()),
            shared_d_ff=shared,
            shared_gate=bool(shared) and draw(st.booleans()),
        )

    return moe()
