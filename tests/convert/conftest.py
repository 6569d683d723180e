"""Fixtures of the tests of conversion; what needs PyTorch is imported inside, since these files may be left out."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dense and moe: runs; gptoss: latest.pt with moments, and a tokenizer beside it."""
    from command_line import GPTOSS, MODELS, make_run
    from gptoss_files import checkpoint, save

    root = tmp_path_factory.mktemp("sources")
    for name in MODELS:
        make_run(root / name, name)
    (root / "gptoss").mkdir()
    sizes = {"context_length": 64, "vocabulary_size": 280, "transformer_blocks": 1}
    save(root / "gptoss", checkpoint(GPTOSS, moments=True, cfg=sizes))
    shutil.copyfile(root / "dense" / "tokenizer.json", root / "gptoss" / "tokenizer.json")
    return root


@pytest.fixture
def convert(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """`python -m convert WORDS` in this process; `code` is what it must exit with."""

    from entry import Outcome

    from convert import __main__ as entry_point
    from jaxlm.cli import main_guard

    def call(*words: object, code: int = 0) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main_guard(entry_point.main, failures=(entry_point.CheckFailed,))
        captured = capsys.readouterr()
        said = Outcome(int(stop.value.code or 0), captured.out, captured.err)
        assert said.code == code, said.err
        assert "Traceback" not in said.err and (code == 0 or said.err.strip())
        return said

    return call
