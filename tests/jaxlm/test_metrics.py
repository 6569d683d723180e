"""metrics.jsonl holds every step once and every bit; meters count what they say."""

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from jaxlm.cli import say
from jaxlm.metrics import (
    JsonlSink,
    MetricsError,
    Progress,
    Throughput,
    bits_per_byte,
    mfu,
    peak_flops,
    perplexity,
    read_metrics,
    short,
)

ROOT = Path(__file__).resolve().parents[2]


def write(path: Path, steps: range, resume_step: int | None = None) -> None:
    """Rows for those steps."""
    with JsonlSink(path, resume_step) as sink:
        for step in steps:
            sink.write({"step": step, "loss": 1 / (step + 1)})


def test_every_step_appears_once_after_a_resume(tmp_path: Path) -> None:
    """Killed at step 9, restored from 6: the lines beyond 6 are cut before they are written again."""
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 10))
    write(path, range(7, 13), resume_step=6)
    assert [row["step"] for row in read_metrics(path)] == list(range(1, 13))
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_cutting_keeps_the_other_lines_bytes(tmp_path: Path) -> None:
    """A resume changes no byte of what stays."""
    path = tmp_path / "metrics.jsonl"
    with JsonlSink(path, None) as sink:
        sink.write({"step": 1, "loss": np.float32(0.1), "load": [[0.25, 1 / 3]], "lr": 1e-300, "x": math.nan})
    before = path.read_bytes()
    write(path, range(2, 5), resume_step=1)
    assert path.read_bytes().startswith(before)


def test_line_cut_short_by_a_kill_is_dropped(tmp_path: Path) -> None:
    """The tail of a killed write is neither read nor kept; a bad line elsewhere is named."""
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4))
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]
    write(path, range(4, 5), resume_step=3)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4]
    path.write_text('{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n')
    with pytest.raises(MetricsError, match="line 2 is not a JSON object with a step"):
        read_metrics(path)


def test_a_sample_of_a_long_log_keeps_what_matters(tmp_path: Path) -> None:
    """Of 1,005 lines about 100, evenly, the last one, and every validation and skip."""
    path = tmp_path / "metrics.jsonl"
    with JsonlSink(path, None) as sink:
        for step in range(1, 1006):
            sink.write(
                {"step": step, "skipped": int(step == 333)} | ({"val_loss": 1.0} if step == 777 else {})
            )
    steps = [row["step"] for row in read_metrics(path, most=100)]
    assert steps == sorted({*range(1005, 0, -11), 333, 777})
    assert len(read_metrics(path, most=1005)) == len(read_metrics(path)) == 1005


def test_floats_round_trip_bitwise(tmp_path: Path) -> None:
    """Random float64 and float32 bit patterns, subnormals and non-finite values; and the file is strict JSON."""
    rng = np.random.default_rng(0)
    doubles = rng.integers(0, 2**63, 2000, dtype=np.int64).view(np.float64)
    singles = rng.integers(0, 2**32, 2000, dtype=np.uint32).view(np.float32)
    row = {"step": 1, "d": doubles, "s": singles, "one": np.float32(0.1), "inf": -math.inf, "none": None}
    path = tmp_path / "metrics.jsonl"
    with JsonlSink(path, None) as sink:
        sink.write(row)
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    (got,) = read_metrics(path)
    np.testing.assert_array_equal(np.array(got["d"]), doubles)
    assert (
        np.array(got["s"], np.float32)[~np.isnan(singles)].tobytes() == singles[~np.isnan(singles)].tobytes()
    )
    assert (np.float32(got["one"]), got["inf"], got["none"]) == (np.float32(0.1), -math.inf, None)


def test_an_old_file_is_not_written_over(tmp_path: Path) -> None:
    """A new run refuses a file with lines; a step is refused twice."""
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 3))
    with pytest.raises(MetricsError, match="exists already"):
        JsonlSink(path, None)
    with pytest.raises(MetricsError, match="step 2 is not beyond"):
        write(path, range(2, 3), resume_step=2)


def test_throughput_leaves_out_compilation_and_pauses() -> None:
    """100 s of compiling and 50 s of validation beside steps of 2 s at 10 tokens: 5 tokens per second throughout."""
    now = [0.0]
    meter = Throughput(10, clock=lambda: now[0])
    now[0] += 100
    meter.tick()
    assert meter.tokens_per_second() is None
    for _ in range(3):
        now[0] += 2
        meter.tick()
    assert meter.tokens_per_second() == 5.0
    now[0] += 2
    meter.tick()
    with meter.paused():
        now[0] += 50
        assert meter.tokens_per_second() == 5.0
        now[0] += 7
    now[0] += 2
    meter.tick()
    assert meter.tokens_per_second() == 5.0


def test_derived_numbers() -> None:
    """Perplexity, bits per byte and MFU against values worked out by hand."""
    assert perplexity(math.log(50_257)) == pytest.approx(50_257, rel=1e-12)
    assert perplexity(1e4) == math.inf
    assert math.isnan(perplexity(math.nan))
    assert bits_per_byte(math.log(256), bytes_per_token=1) == pytest.approx(8, rel=1e-15)
    assert bits_per_byte(2 * math.log(2), bytes_per_token=4) == 0.5
    peak = peak_flops("NVIDIA H200", "bfloat16")
    assert peak == 989.4e12
    assert mfu(1e5, 4.947e9, peak) == pytest.approx(0.5, rel=1e-12)
    assert peak_flops("NVIDIA H200", "float16") == peak
    assert peak_flops("NVIDIA H200", "float32") is None
    assert peak_flops("TPU v5p", "bfloat16") == 459e12 and peak_flops("TPU v5p", "float16") is None
    assert peak_flops("cpu", "bfloat16") is None
    assert mfu(1e5, 4.947e9, None) is None
    assert peak_flops("NVIDIA H100 PCIe", "bfloat16") == 756e12
    assert [short(x) for x in (7, 950, 12_345, 4_560_000, 1.2e9)] == ["7", "950", "12.3k", "4.56M", "1.2B"]


def test_progress_without_a_terminal_is_a_few_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """First report, validations and the end, on standard error; nothing for the hundred steps between."""
    with Progress(100, 0) as bar:
        for step in range(1, 101):
            values = {"loss": 5.0, "tokens_per_second": 12_345.0}
            bar.update(step, values | ({"val_loss": 4.5} if step == 50 else {}))
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert [line.split("  ")[0] for line in lines] == ["step 1/100", "step 50/100", "step 100/100"]
    assert "loss 5.000  val 4.500  12.3k tok/s" in lines[1]
    assert "left" in lines[1] and "in all" in lines[2]
    assert "\x1b" not in err


def test_progress_on_a_terminal_is_a_bar_with_losses() -> None:
    """The bar shows the count, both losses, speed and time left within 80 columns; messages stand above it."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, color_system=None, legacy_windows=False)
    console._environ = {"TERM": "xterm"}
    with Progress(100, 20, console=console) as bar:
        bar.update(21, {"loss": 9.0})  # the step that compiled: no estimate is made of its time
        seen = {"loss": 3.25, "val_loss": 3.5, "tokens_per_second": 51_000.0, "mfu": 0.417, "skips": 2}
        bar.update(30, seen)
        bar.message("saved")
        say("warning: of anyone")
    text = screen.getvalue()
    last = [line for line in text.replace("\r", "\n").split("\n") if "30/100" in line][-1]
    for part in ("loss 3.250", "val 3.500", "51k tok/s", "mfu 42 %", "2 skipped", "left"):
        assert part in last
    assert "saved" in text and "warning: of anyone" in text


def test_metrics_need_no_jax() -> None:
    """Scripts that read a log do not start an accelerator."""
    heavy = "{'jax', 'torch', 'matplotlib', 'wandb', 'tensorboard'}"
    modules = "jaxlm.metrics, jaxlm.plots_overlay, jaxlm.sinks, jaxlm.live_plots"
    check = f"import sys, {modules}; print({heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "set()\n", done.stderr
