"""`python -m experiments.plots` draws one run again and several over each other, and names what it cannot find."""

from pathlib import Path

import pytest
from entry import Outcome, run

from experiments.plots import main
from jaxlm.metrics import JsonlSink


@pytest.fixture
def plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """The entry point in a folder with runs/book and runs/muon."""
    for name in ("book", "muon"):
        path = tmp_path / "runs" / name
        path.mkdir(parents=True)
        with JsonlSink(path / "metrics.jsonl", None) as sink:
            for step in range(1, 6):
                sink.write({"step": step, "tokens": 9 * step, "tokens_per_second": 3.0, "lr": 0.1})
    monkeypatch.chdir(tmp_path)
    return lambda *argv: run(main, [*argv], capsys, monkeypatch)


def drawn(outcome: Outcome) -> list[str]:
    """The files that were named, which all exist."""
    assert outcome.code == 0, outcome.err
    assert all(Path(line).is_file() for line in outcome.out.split())
    return outcome.out.split()


def test_one_run_is_drawn_again(plots) -> None:
    """By path into its own plots/, dark and light; by name and with another x axis into another folder."""
    whole = drawn(plots("runs/book"))
    assert {"runs/book/plots/throughput.png", "runs/book/plots/light/throughput.png"} <= {*whole}
    assert "elsewhere/learning_rate.png" in drawn(plots("book", "--out", "elsewhere", "--x", "time"))


def test_several_runs_are_drawn_over_each_other(plots) -> None:
    """Beside the first run, or where --out says; --keys chooses."""
    assert drawn(plots("book", "runs/muon", "--keys", "lr")) == [
        "runs/overlay/lr.png",
        "runs/overlay/light/lr.png",
    ]
    assert len(drawn(plots("book", "muon", "--out", "o", "--x", "tokens"))) == 4
    assert drawn(plots("book", "--keys", "lr,tokens")) == [
        f"runs/book/plots/{name}.png" for name in ("lr", "tokens", "light/lr", "light/tokens")
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        pytest.param([], "name a run first", id="no-run"),
        pytest.param(["bok"], "there is no run 'bok' (did you mean 'runs/book'?)", id="typo"),
        pytest.param(
            ["runs/mun"], "there is no run 'runs/mun' (did you mean 'runs/muon'?)", id="typo-in-path"
        ),
        pytest.param(
            ["runs"], "runs is not the directory of a run: it has no metrics.jsonl", id="no-metrics"
        ),
        pytest.param(
            ["book", "--keys", "token"], "no run has the metric 'token' (did you mean 'tokens'?)", id="metric"
        ),
        pytest.param(["book", "--x", "weeks"], "invalid choice 'weeks'", id="axis"),
        pytest.param(
            ["book", "--out", "runs/book/metrics.jsonl"], "is a file; choose another --out", id="out"
        ),
        pytest.param(["broken"], "line 1 is not a JSON object with a step", id="damaged"),
        pytest.param(["empty"], "nothing that can be drawn was logged yet", id="empty"),
    ],
)
def test_bad_input_is_one_line(plots, argv: list[str], message: str) -> None:
    """Exit code 2 and what to do about it, nothing on standard output."""
    for name, text in (("broken", "[]\n"), ("empty", "")):
        Path("runs", name).mkdir()
        Path("runs", name, "metrics.jsonl").write_text(text)
    outcome = plots(*argv)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err and len(outcome.err.splitlines()) == 1
