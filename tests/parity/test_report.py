"""A parity report's files say what the report says: verdict, place, values; names in it are only text."""

import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from convert.parity.compare import Finding, compare
from convert.parity.report import markdown, number, plain, write_report
from convert.parity.results import Report, Rung

HOSTILE = "blocks.0.<script>alert(1)</script>|`x`&\"'"
VOID = {"meta", "img", "br", "hr", "link", "input"}


def a_report(error: float = 1e-15, name: str = "blocks.1.attn.q", **more: Any) -> Report:
    """Two layers forward and backward in two cases; the tensor `name` is off by `error`."""
    names = ("embed", "blocks.0.attn.q", "blocks.0.mlp", "blocks.0", name, "blocks.1", "logits")
    rungs = [Rung("config", "", [Finding("vocab_size", 0.0, 0.0)])]
    for case in ("normal", "fan_in"):
        found = [Finding(n, 0.0 if n == "embed" else 2e-16, 1e-12) for n in names if n != name]
        jax, torch = np.array([[1.0, 3.0]]), np.array([[1.0, 3.0 * (1 + error)]])
        rungs.append(
            Rung("activations", case, [*found[:4], compare(name, jax, torch, 1e-12), *found[4:]], 1.5)
        )
    grads = [Finding(n + ".weight", 1e-15, 1e-12) for n in ("lm_head", "blocks.1.moe.router", "embed")]
    rungs += [Rung("gradients", "normal", grads), Rung("trajectory", "normal", grads, 2.0, {"drift": 3e-8})]
    ledger = {"computation": "float64", "jax": {"version": "1", "x64": True}, "torch": {"version": "2"}}
    report = Report("a preset", "its twin", "float64", ledger, rungs, seconds=61.4)
    report.inputs = {"seed": 7, "flips_normal": {"decisions": 228, "jax": 3, "torch": 4}}
    report.blind_spots, report.zero_gradients = ["the context is 32"], ["blocks.0.attn.k_proj.bias"]
    report.curves = {"loss_jax": [4.0, 3.9, 3.8], "loss_torch": [4.0, 3.9, 3.8 * (1 + error)]}
    for field, value in more.items():
        setattr(report, field, value)
    return report


class Page(HTMLParser):
    """Reads a page; every tag has to be closed in order, and what is seen is text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open, self.seen, self.tags = [], "", set()
        self.attributes: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Opens."""
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Closes what was opened last."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Text outside of the style sheet."""
        self.seen += "" if self.open[-1:] == ["style"] else data + "\n"


def written(report: Report, folder: Path) -> tuple[dict[str, Any], str, str]:
    """The three files of a report; nothing unfinished lies beside them."""
    write_report(report, folder)
    assert {p.name for p in folder.iterdir()} == {"report.json", "report.md", "report.html", "plots"}
    texts = [(folder / f"report.{kind}").read_text(encoding="utf-8") for kind in ("json", "md", "html")]
    return json.loads(texts[0], parse_constant=pytest.fail), texts[1], texts[2]


def drawn(folder: Path) -> list[str]:
    """Names of the figures; each is a whole PNG."""
    files = sorted((folder / "plots").iterdir())
    assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for path in files)
    return [path.stem for path in files]


def test_passing_report_says_agree(tmp_path: Path) -> None:
    """JSON holds the contract's keys, both texts agree and show no divergence, the figures are drawn and embedded."""
    data, md, html = written(a_report(), tmp_path)
    assert data == plain(a_report().to_json())
    assert data.keys() >= {"schema", "target", "dtype", "passed", "ledger", "rungs"}
    assert all(rung.keys() >= {"name", "passed", "value", "limit", "worst"} for rung in data["rungs"])
    assert (data["schema"], data["passed"]) == (1, True)
    seen = Page(html).seen
    for text in (md, seen):
        assert "AGREE" in text and "DISAGREE" not in text and "irst divergence" not in text
        for part in (
            "its twin",
            "61 seconds",
            "the context is 32",
            "k_proj.bias",
            "228",
            "3.0e-08",
            "rounding is 1e-15",
        ):
            assert part in text, part
    assert drawn(tmp_path) == ["activations", "gradients", "rungs", "trajectory"]
    assert html.count("data:image/png;base64,") == md.count("![") == 4


def test_failing_report_tells_where_and_what(tmp_path: Path) -> None:
    """Rung, layer, operation, both values, the index and the guess stand in both texts, before the table of rungs."""
    report = a_report(error=0.5)
    data, md, html = written(report, tmp_path)
    assert data["first_divergence"]["layer"] == 1 and not data["passed"]
    seen = Page(html).seen
    for text in (md, re.sub(r"\n+", "\n", seen)):
        box = text[: text.index("In order of blame")]
        assert "DISAGREE" in box and "First divergence" in box
        assert re.search(r"rung\W+activations.*layer\W+1\b.*operation\W+attn\.q\b", box, re.S)
        assert re.search(r"index\W+0, 1\b.*jax\W+3\.0\b.*torch\W+4\.5\b", box, re.S)
        assert "half-split RoPE" in box  # a likely cause
        assert "forward" in box and "backward" not in box
    assert drawn(tmp_path) == ["activations", "gradients", "rungs", "trajectory"]


def test_values_that_are_nearly_the_same_keep_their_digits() -> None:
    """Two values that differ in the tenth digit are shown different."""
    md = markdown(plain(a_report(error=1e-10).to_json()))
    values = re.findall(r"^- (?:jax|torch): `(.*)`$", md, re.M)
    assert len(values) == 2 and len(set(values)) == 2


def test_page_stands_alone_and_names_are_text(tmp_path: Path) -> None:
    """No request leaves the page, no script is in it, and hostile names are shown as they are."""
    report = a_report(error=0.5, name=HOSTILE, target="<b>target</b>", blind_spots=["<img src=x> a|b"])
    report.extra = {"faults": [fault(name=HOSTILE, kind="<i>", caught=False)], "false_alarms": [HOSTILE]}
    _, md, html = written(report, tmp_path)
    page = Page(html)
    assert not re.search(r"https?:|//|@import|url\(", re.sub(r"base64,[^\"]+", "", html))
    assert not page.tags & {"script", "b", "i", "link", "iframe"}
    assert all(value.startswith("data:") for name, value in page.attributes if name in ("src", "href"))
    assert HOSTILE in page.seen and "<b>target</b>" in page.seen and "<img src=x>" in page.seen
    outside_code = re.sub(r"`[^`\n]*`", "", md)
    assert "<" not in outside_code
    for block in re.findall(r"(?:^\|.*\n)+", md, re.M):
        borders = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(borders) == 1, block


def fault(**more: Any) -> dict[str, Any]:
    """One planted fault as the self-test tells it."""
    made = {"name": "f", "kind": "forward", "caught": True, "caught_by": "activations", "located": True}
    return made | more


def test_self_test_is_a_table_by_kind(tmp_path: Path) -> None:
    """Planted, caught and located by kind, each missed fault by name, and a figure."""
    faults = [
        fault(),
        fault(located=False, name="a wrong theta"),
        fault(kind="mesh", caught=False, name="a lost sum"),
    ]
    random = {"asked": 9, "compared": 9, "worst": {"loss": 0.25}, "failures": []}
    rungs = [Rung("config", "", [Finding("vocab_size", 0.0, 0.0)])]
    extra = {"faults": faults, "false_alarms": ["a reordered sum"], "random": random}
    report = a_report(rungs=rungs, curves={}, extra=extra)
    data, md, html = written(report, tmp_path)
    assert data["faults"] == faults
    assert "2 of 3 planted faults caught, 1 false alarms" in md
    assert "| forward | 2 | 2 | **1** | activations 2 |" in md
    assert "| mesh | 1 | **0** | **0** |" in md
    for part in ("a wrong theta", "a lost sum", "a reordered sum", "compared: 9", "failures: 0", "loss 0.25"):
        assert part in md and part in Page(html).seen
    assert "faults" in drawn(tmp_path)


def test_report_without_most_rungs_is_written(tmp_path: Path) -> None:
    """One rung that ended with an error, none at all, infinities, NaN and numpy's numbers are no obstacle."""
    broken = Rung(
        "mesh", "", [Finding("error", math.inf, 0.0, {"error": "ValueError: a\nb", "jax": math.inf})]
    )
    odd = Rung(
        "activations", "", [Finding("embed", math.nan, 1e-12), Finding("logits", np.float64(2e-15), 1e-12)]
    )
    report = a_report(rungs=[broken, odd], curves={})
    data, md, _ = written(report, tmp_path / "some")
    assert (
        data["rungs"][1]["findings"][0]["value"] == "nan"
        and data["rungs"][1]["findings"][1]["passed"] is True
    )
    assert "ValueError: a" in md
    assert data["rungs"][0]["findings"][0]["detail"]["jax"] == "inf"
    assert drawn(tmp_path / "some") == ["activations", "rungs"]
    data, md, _ = written(a_report(rungs=[], curves={}), tmp_path / "none")
    assert not data["passed"] and "DISAGREE" in md


def test_a_second_report_leaves_no_figure_of_the_first(tmp_path: Path) -> None:
    """Written into the same directory, a smaller report removes the figures that it does not have."""
    rungs = a_report().rungs
    write_report(a_report(rungs=rungs[:1]), tmp_path)
    assert drawn(tmp_path) == ["rungs", "trajectory"]
    write_report(a_report(rungs=rungs[:1], curves={}), tmp_path)
    assert drawn(tmp_path) == ["rungs"]


def test_without_matplotlib_the_texts_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All three files are written where matplotlib cannot be imported, with one line on how to get figures."""
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    write_report(a_report(), tmp_path)
    for kind in ("md", "html"):
        text = (tmp_path / f"report.{kind}").read_text(encoding="utf-8")
        assert text.count("No figures: plots need matplotlib") == 1 and "AGREE" in text
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["passed"]
    assert not (tmp_path / "plots").exists()


def test_numbers_have_one_format() -> None:
    """Short scientific notation for the small and the large, nothing for what is absent."""
    shown = [number(x) for x in (1.23e-15, 0.0, 2.0, 5e-7, 123456.0, "inf", "nan", None, True, [1, 2], 3)]
    assert shown == ["1.2e-15", "0", "2", "5.0e-07", "1.2e+05", "∞", "nan", "-", "yes", "1, 2", "3"]


def test_markdown_needs_the_json_alone() -> None:
    """The text is the same from a report and from its file read back."""
    data = plain(a_report(error=0.5).to_json())
    assert markdown(json.loads(json.dumps(data))) == markdown(data)
