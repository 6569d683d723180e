"""A run's figures are drawn from its metrics, and only those that the metrics have."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm.config import InputError
from jaxlm.curves import RunLog, short_names, thin
from jaxlm.live_plots import LivePlots
from jaxlm.metrics import JsonlSink, MetricsError
from jaxlm.plots import BASELINES, DARK, LIGHT, Painter, PlotError, Theme, draw_all
from jaxlm.plots_axes import amount
from jaxlm.plots_overlay import plot_runs
from jaxlm.plots_parity import FAIL, JAX, TORCH, Span, plot_parity
from jaxlm.plots_run import Figures, plot_run

ROOT = Path(__file__).resolve().parents[2]
ALL = ["loss", "perplexity", "bits_per_byte", "learning_rate", "tokens_seen", "throughput", "memory", "norms"]
ALL += ["norms_by_group", "update_ratio", "entropy", "other_losses", "expert_load", "scaling"]


def a_run(path: Path, steps: int = 30, **more: Any) -> Path:
    """A run directory with metrics of the losses alone; `more` adds to every row."""
    path.mkdir(parents=True)
    with JsonlSink(path / "metrics.jsonl", None) as sink:
        for step in range(1, steps + 1):
            row = {"step": step, "loss": 5 / step + 1, "grad_norm": 1.0, "tokens_per_second": None}
            sink.write(row | ({"val_loss": 5 / step + 1.1} if step % 10 == 0 else {}) | more)
    return path


def pixels(path: Path) -> np.ndarray:
    """A PNG as [height, width, channel] in 0..255."""
    from matplotlib.image import imread

    return (np.asarray(imread(path)) * 255).round().astype(int)


def has_colour(image: np.ndarray, colour: str) -> bool:
    """Whether a pixel is of the colour '#rrggbb', up to antialiasing."""
    want = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return bool((np.abs(image[..., :3] - want).max(-1) <= 6).any())


def a_full_row(step: int) -> dict[str, Any]:
    """A line with everything a run of experts logs."""
    norms = {"grad_norm": 1 / step, "param_norm": 50.0, "update_norm": 0.1, "update_ratio": 0.002}
    groups = {f"{key}/{group}": value / 2 for key, value in norms.items() for group in ("embed", "experts")}
    row = {"step": step, "tokens": 100 * step, "flops": 1e9 * step, "loss": 5 / step + 1, "lr": 1e-3}
    row |= {"bits_per_byte": 2 / step, "tokens_per_second": 5e4, "mfu": 0.4, "peak_memory_bytes": 2 << 30}
    row |= {"logit_entropy": 3.0, "router_entropy": 1.0, "balance": 1.1, "router_z": 0.0, "skipped": 0}
    return row | norms | groups | {"expert_load": [[0.5, 0.25, 0.25], [0.1, 0.3, 0.6]]}


def a_full_run(path: Path, steps: int = 20, skipped: int = 0) -> Path:
    """A run directory with metrics of everything; `skipped` names a step without an update."""
    path.mkdir(parents=True)
    with JsonlSink(path / "metrics.jsonl", None) as sink:
        for step in range(1, steps + 1):
            row = a_full_row(step) | {"skipped": int(step == skipped)}
            sink.write(row | ({"val_loss": 5 / step + 1.1} if step % 10 == 0 else {}))
    return path


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The figures of a run that has everything, an update that was skipped too."""
    path = a_full_run(tmp_path_factory.mktemp("full") / "r", skipped=7)
    assert all(file.is_file() for file in plot_run(path))
    return path / "plots"


def figures(path: Path, theme: Theme = DARK) -> dict[str, Painter]:
    """What would be drawn of a run directory."""
    baselines = path / "baselines.json"
    losses = json.loads(baselines.read_text()) if baselines.is_file() else {}
    return Figures(RunLog.read(path), theme, losses).painters()


def test_all_figures_are_drawn_dark_and_light(full: Path) -> None:
    """Fourteen PNGs in each theme's colours of background, text and curves; no temporary file is left."""
    for folder, theme in ((full, DARK), (full / "light", LIGHT)):
        files = sorted(path for path in folder.iterdir() if path.is_file())
        assert [path.name for path in files] == sorted(f"{name}.png" for name in ALL)
        for path in files:
            image = pixels(path)
            assert image.shape[1] >= 1200
            assert has_colour(image[:1, :1], theme.background)
            assert has_colour(image[:200], theme.text), f"no title in {path}"
            assert path.stem != "norms" or has_colour(image, theme.lines[0])


def test_skipped_updates_are_marked(full: Path) -> None:
    """The colour of alarm is in the losses and the norms, and nowhere else."""
    for path in full.glob("*.png"):
        marked = path.stem in ("loss", "perplexity", "bits_per_byte", "norms")
        assert has_colour(pixels(path), DARK.alarm) == marked, path


def test_curves_and_baselines_are_in_the_loss(tmp_path: Path) -> None:
    """Train, validation and a dashed baseline each leave their colour; without it, it is absent."""
    path = a_run(tmp_path / "r")
    (path / "baselines.json").write_text(json.dumps({"unigram": 4.0, "bigram": 3.0}))
    for theme in (DARK, LIGHT):
        both = {name: figures(path, theme)[name] for name in ("loss", "perplexity")}
        for file in draw_all(both, tmp_path / theme.background, theme):
            image = pixels(file)
            assert all(
                has_colour(image, colour) for colour in (theme.train, theme.validation, theme.baselines[1])
            )
    (path / "baselines.json").unlink()
    (file,) = draw_all({"loss": figures(path)["loss"]}, tmp_path)
    assert not has_colour(pixels(file), BASELINES[1])


def test_only_what_the_metrics_hold_is_drawn(tmp_path: Path) -> None:
    """A dense run has no expert load; one logged step and a diverged one are drawn as well."""
    assert [*figures(a_run(tmp_path / "dense"))] == ["loss", "perplexity", "norms"]
    single = figures(a_run(tmp_path / "single", steps=1, expert_load=[[0.5, 0.5]]))
    assert [*single] == ["loss", "perplexity", "norms", "expert_load"]
    diverged = a_run(tmp_path / "diverged", steps=3)
    with JsonlSink(diverged / "metrics.jsonl", 3) as sink:
        sink.write({"step": 4, "loss": math.nan, "lr": 1e-3, "expert_load": None})
        sink.write({"step": 5, "loss": math.inf, "lr": 1e-3, "grad_norm": math.inf})
    for name, chosen in (("single", single), ("diverged", figures(diverged))):
        assert draw_all(chosen, tmp_path / name / "plots")


def test_long_logs_are_thinned_to_means_and_ranges() -> None:
    """10 values in 4 points: means of neighbours, their least and largest, the last line last; NaN breaks the curve."""
    curve = thin(
        [*map(float, range(10))], [1.0, 3.0, 8.0, 4.0, 5.0, 6.0, math.nan, math.inf, math.nan, 9.0], 4
    )
    assert curve.x == [2, 5, 8, 9]
    assert (curve.y[:2], curve.low[:2], curve.high[:2]) == ([4.0, 5.0], [1.0, 4.0], [8.0, 6.0])
    assert math.isnan(curve.y[2]) and curve.last == curve.y[3] == 9.0
    assert curve.thinned and not thin([1.0, 2.0], [1.0, 2.0], 4).thinned
    assert thin([], [], 4).x == []


def test_hours_of_training_leave_out_pauses() -> None:
    """3,600 tokens a step at 2 tokens/s: half an hour each, also where the rate is not known yet."""
    rows = [{"step": i, "tokens": 3600 * i, "tokens_per_second": None if i < 3 else 2.0} for i in range(1, 5)]
    assert RunLog("r", rows, "time").positions == [0.5, 1.0, 1.5, 2.0]
    assert RunLog("r", rows, "tokens").positions == [3600, 7200, 10800, 14400]


def test_several_runs_are_overlaid(tmp_path: Path) -> None:
    """A figure for each metric with a curve in each run's colour, in both themes; a single run has one of them only."""
    runs = [a_full_run(tmp_path / name, steps) for name, steps in (("a", 20), ("b", 12))]
    keys = ["loss", "grad_norm/embed"]
    files = plot_runs(runs, tmp_path / "out", keys, "tokens")
    assert [str(f.relative_to(tmp_path / "out")) for f in files] == [
        *("loss.png", "grad_norm_embed.png", "light/loss.png", "light/grad_norm_embed.png")
    ]
    for file, theme in zip(files, (DARK, DARK, LIGHT, LIGHT)):
        assert all(has_colour(pixels(file), colour) for colour in theme.lines[:2])
    (alone, _) = plot_runs(runs[:1], tmp_path / "alone", ["loss"])
    assert not has_colour(pixels(alone), DARK.lines[1])
    assert {f.stem for f in plot_runs(runs, tmp_path / "all")} >= {
        "loss",
        "val_loss",
        "mfu",
        "router_entropy",
    }
    with pytest.raises(
        InputError, match=r"no run has the metric 'los' \(did you mean 'loss'\?\); there are tokens"
    ):
        plot_runs(runs, tmp_path / "none", ["los"])
    assert not (tmp_path / "none").exists()


def test_runs_of_one_name_are_told_apart() -> None:
    """As many folders as it takes."""
    assert short_names([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert short_names([Path("/x/p/a"), Path("/x/q/a"), Path("/x/b")]) == ["p/a", "q/a", "x/b"]


def test_numbers_fit_a_tick() -> None:
    """Four digits or so at any size."""
    values = (0, 2.5e-7, 1e-4, 0.0123, 7, 12.345, 45_678, 3.3e9, 1.25e18, math.inf)
    assert [*map(amount, values)] == [
        *("0", "2.5e-7", "1e-4", "0.0123", "7", "12.35", "45.7k", "3.3B", "1.25e18", "inf")
    ]


def test_live_plots_never_hold_a_run_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Asking returns at once while another process draws; after `close` the figures show what was logged last."""
    path = a_run(tmp_path / "r", steps=10)
    plots = LivePlots(path)
    before = time.perf_counter()
    plots()
    plots()
    assert time.perf_counter() - before < 0.5
    with JsonlSink(path / "metrics.jsonl", 10) as sink:
        sink.write({"step": 11, "loss": 1.0, "lr": 1e-3})
    plots()
    plots.close()
    assert (path / "plots" / "learning_rate.png").is_file(), "the last line was not drawn"
    assert capsys.readouterr().err == ""


def test_live_plots_that_fail_are_one_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run without metrics: one line with the reason, however often figures are asked for."""
    plots = LivePlots(tmp_path / "nothing")
    for _ in range(2):
        plots()
        plots.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: the figures were not drawn: ") and "metrics.jsonl: No such file" in line


def test_missing_input_is_one_line(tmp_path: Path) -> None:
    """No metrics, and baselines that are no numbers, are named."""
    with pytest.raises(MetricsError, match=r"metrics\.jsonl: No such file"):
        plot_run(tmp_path)
    path = a_run(tmp_path / "r")
    (path / "baselines.json").write_text("[1]")
    with pytest.raises(PlotError, match=r"baselines\.json is not a JSON object"):
        plot_run(path)


def test_missing_matplotlib_names_the_extra(tmp_path: Path) -> None:
    """In a process where matplotlib cannot be imported: one line with the extra's name, nothing written."""
    path = a_run(tmp_path / "r")
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from jaxlm.plots_run import PlotError, plot_run\n"
        "try: plot_run(sys.argv[1])\n"
        "except PlotError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "plots need matplotlib; install it with pip install 'jaxlm[plots]'\n"
    assert not (path / "plots").exists()


def a_rung(name: str, values: dict[str, Any], case: str = "", limit: float = 1e-12) -> dict[str, Any]:
    """A rung as report.json has it."""
    found = [{"name": n, "value": v, "limit": limit, "passed": float(v) <= limit} for n, v in values.items()]
    worst = max(found, key=lambda finding: float(finding["value"]))
    passed = all(finding["passed"] for finding in found)
    return {
        "name": name,
        "case": case,
        "passed": passed,
        "value": worst["value"],
        "limit": limit,
        "findings": found,
    }


def a_parity_report(folder: Path, *rungs: dict[str, Any], **more: Any) -> Path:
    """A directory with a report.json."""
    folder.mkdir()
    report = {"dtype": "float64", "rungs": list(rungs), "curves": {}} | more
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def test_parity_figures_show_what_is_over_its_limit(tmp_path: Path) -> None:
    """Passing rungs leave no mark in the colour of failure; one failing tensor does, in both of its figures."""
    good = {"embed": 0.0, "blocks.0.attn.q": 1e-15, "logits": 2e-15}
    for folder, values in (("good", good), ("bad", good | {"logits": "inf"})):
        rungs = [a_rung("activations", values, case) for case in ("normal", "fan_in")]
        files = plot_parity(a_parity_report(tmp_path / folder, *rungs))
        assert [path.name for path in files] == ["activations.png", "rungs.png"]
        for path in files:
            assert has_colour(pixels(path), FAIL) == (folder == "bad"), path
        assert has_colour(pixels(files[1]), JAX) == (folder == "good")


def test_parity_figures_are_only_those_that_the_report_holds(tmp_path: Path) -> None:
    """Both frameworks' losses are drawn, faults too; a report of nothing draws nothing."""
    curves = {"loss_jax": [4.0, 3.0, "nan"], "loss_torch": [4.0, 3.1, 2.0]}
    faults = [{"kind": "mesh", "caught": True, "caught_by": "mesh", "located": True}]
    full = a_parity_report(
        tmp_path / "full", a_rung("gradients", {"embed": 1.0}), curves=curves, faults=faults
    )
    drawn = plot_parity(full)
    assert [path.stem for path in drawn] == ["gradients", "rungs", "trajectory", "faults"]
    assert all(has_colour(pixels(drawn[2]), colour) for colour in (JAX, TORCH))
    assert not has_colour(pixels(drawn[3]), FAIL)
    faults.append({"kind": "mesh", "caught": False, "caught_by": "", "located": False})
    (path,) = plot_parity(a_parity_report(tmp_path / "missed", faults=faults))
    assert has_colour(pixels(path), FAIL)
    assert plot_parity(a_parity_report(tmp_path / "nothing")) == []


def test_zero_and_infinity_have_places_on_log_axes() -> None:
    """What has no logarithm is drawn at the ends, never left out."""
    span = Span(1e-17, 10.0, True, True)
    assert [span.place(x) for x in (0.0, 2e-16, "inf", "nan")] == [1e-17, 2e-16, 10.0, 10.0]


def test_missing_parity_report_is_one_line(tmp_path: Path) -> None:
    """No report.json, and one that is none, are named."""
    with pytest.raises(PlotError, match=r"report\.json: No such file"):
        plot_parity(tmp_path)
    (tmp_path / "report.json").write_text("[1]")
    with pytest.raises(PlotError, match=r"report\.json is not a parity report"):
        plot_parity(tmp_path)
