"""A run's figures are drawn from its metrics, and only those that the metrics have."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm.metrics import JsonlSink, MetricsError
from jaxlm.plots import BACKGROUND, BASELINES, TRAIN, VALIDATION, PlotError, plot_run
from jaxlm.plots_parity import FAIL, JAX, TORCH, Span, plot_parity

ROOT = Path(__file__).resolve().parents[2]
ALL = ["loss", "perplexity", "learning_rate", "throughput", "tokens_seen", "expert_load"]


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


def test_all_figures_are_drawn_dark_and_legible(tmp_path: Path) -> None:
    """Six PNGs of the theme's background, no file cut short, no temporary file left."""
    load = [[0.5, 0.25, 0.25], [0.1, 0.3, 0.6]]
    files = plot_run(a_run(tmp_path / "r", expert_load=load, lr=1e-3, tokens=100, tokens_per_second=5e4))
    assert [p.name for p in files] == [f"{name}.png" for name in ALL]
    assert sorted(files) == sorted((tmp_path / "r" / "plots").iterdir())
    for path in files:
        image = pixels(path)
        assert image.shape[1] >= 1200
        assert [*image[0, 0, :3]] == [int(BACKGROUND[i : i + 2], 16) for i in (1, 3, 5)]
        assert (image[..., :3].min(-1) > 200).any(), "no text in the light colour"


def test_curves_and_baselines_are_in_the_loss(tmp_path: Path) -> None:
    """Train, validation and a dashed baseline each leave their colour; without them it is absent."""
    path = a_run(tmp_path / "r")
    (path / "baselines.json").write_text(json.dumps({"unigram": 4.0, "bigram": 3.0}))
    plot_run(path)
    for name in ("loss", "perplexity"):
        image = pixels(path / "plots" / f"{name}.png")
        assert all(has_colour(image, colour) for colour in (TRAIN, VALIDATION, BASELINES[1]))
    (path / "baselines.json").unlink()
    plot_run(path)
    assert not has_colour(pixels(path / "plots" / "loss.png"), BASELINES[1])


def test_only_what_the_metrics_hold_is_drawn(tmp_path: Path) -> None:
    """A dense run has no expert load; one logged step and a diverged one are drawn as well."""
    names = [p.stem for p in plot_run(a_run(tmp_path / "dense"))]
    assert names == ALL[:2]
    single = a_run(tmp_path / "single", steps=1, expert_load=[[0.5, 0.5]])
    assert [p.stem for p in plot_run(single)] == ["loss", "perplexity", "expert_load"]
    diverged = a_run(tmp_path / "diverged", steps=3)
    with JsonlSink(diverged / "metrics.jsonl", 3) as sink:
        sink.write({"step": 4, "loss": math.nan, "lr": 1e-3, "expert_load": None})
        sink.write({"step": 5, "loss": math.inf, "lr": 1e-3})
    assert "perplexity" in [p.stem for p in plot_run(diverged)]


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
        "from jaxlm.plots import PlotError, plot_run\n"
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
