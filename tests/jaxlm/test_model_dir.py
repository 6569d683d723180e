"""Model directories: staging, what killed processes left, shards, the manifest, and a line for each kind of damage."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jaxlm import model_dir
from jaxlm.model_dir import (
    INDEX,
    MANIFEST,
    ModelDirError,
    plan_shards,
    read_manifest,
    staged,
    verify,
    write_manifest,
    write_shards,
    write_tensors,
)
from jaxlm.tensor_file import Lazy, Planned, open_file, read_header

ROOT = Path(__file__).resolve().parents[2]
TENSORS = {
    "first": np.arange(600, dtype=np.float32).reshape(20, 30),
    "second": np.arange(7, dtype=np.float16),
    "third": np.arange(500, dtype=np.float64),
}
OTHERS = {"config.json": '{"d_model": 8}', "tokenizer.json": '{"model": {}}', "source/config.json": "{}"}


def plans() -> dict[str, Planned]:
    """TENSORS, to be written."""
    return {name: Planned.of(Lazy.of(value)) for name, value in TENSORS.items()}


def write(directory: Path, max_bytes: int = 3000) -> None:
    """Two shards, an index, other files, the manifest."""
    stored = write_shards(directory, plans(), "jaxlm", max_bytes)
    for name, text in OTHERS.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text)
    write_manifest(directory, "jaxlm", stored, {"source": "a test"})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A whole directory."""
    with staged(tmp_path / "model") as directory:
        write(directory)
    return tmp_path / "model"


def left_by_the_dead(tmp_path: Path, name: str) -> Path:
    """A half-written directory of a process that was killed while it held the lock."""
    code = f"""
import os, signal, sys
from pathlib import Path
from jaxlm.model_dir import staged
with staged(Path({str(tmp_path / name)!r})) as directory:
    (directory / "half").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == -9
    return next(tmp_path.glob(f".{name}.partial-*"))


def test_a_directory_appears_when_it_is_whole(tmp_path: Path) -> None:
    """Until the block ends the name does not exist; parents are made; nothing else is left."""
    target = tmp_path / "deep" / "model"
    with staged(target) as directory:
        write(directory)
        assert not target.exists() and directory.parent == target.parent
        assert directory.name.startswith(".")
    assert verify(target) == ([], 3)
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    """Neither the name nor the staging directory; with overwrite the old one stays as it was."""
    with pytest.raises(RuntimeError), staged(tmp_path / "model") as directory:
        write(directory)
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with staged(tmp_path / "model") as directory:
        write(directory)
    with pytest.raises(RuntimeError), staged(tmp_path / "model", overwrite=True) as directory:
        (directory / "new").write_text("x")
        raise RuntimeError
    assert verify(tmp_path / "model") == ([], 3) and len(list(tmp_path.iterdir())) == 1


def test_what_is_there_is_kept_unless_overwritten(model: Path) -> None:
    """Refused by name; an empty directory is none; overwrite replaces."""
    with pytest.raises(ModelDirError, match="is there already; .*--overwrite"), staged(model):
        pytest.fail("must not be entered")
    (model.parent / "empty").mkdir()
    for name, overwrite in (("empty", False), ("model", True)):
        with staged(model.parent / name, overwrite) as directory:
            (directory / "new").write_text("x")
        assert [path.name for path in (model.parent / name).iterdir()] == ["new"]
    assert sorted(path.name for path in model.parent.iterdir()) == ["empty", "model"]


@pytest.mark.parametrize("exchange", [True, False])
def test_overwriting_a_link_or_a_file_spares_what_it_leads_to(
    exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A symbolic link is replaced, never followed."""
    if not exchange:
        monkeypatch.setattr(model_dir, "_exchange", lambda one, other: False)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "file").write_text("x")
    for name in ("link", "file"):
        with staged(tmp_path / name, overwrite=True) as directory:
            write(directory)
        assert not (tmp_path / name).is_symlink() and verify(tmp_path / name) == ([], 3)
    assert (tmp_path / "outside" / "precious").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "outside"]


def test_only_the_leftovers_of_the_dead_are_removed(tmp_path: Path) -> None:
    """What a killed process left goes, also under this process' number; a writer at work and other names stay."""
    dead = left_by_the_dead(tmp_path, "model")
    reused = dead.with_name(f".model.partial-{os.getpid()}")  # numbers come again, in containers always
    dead.rename(reused)
    dead, other = left_by_the_dead(tmp_path, "model"), left_by_the_dead(tmp_path, "model2")
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / ".model.partial-1").symlink_to(outside)
    code = f"""
import sys
from pathlib import Path
from jaxlm.model_dir import staged
with staged(Path({str(tmp_path / "model")!r})) as directory:
    print(directory, flush=True)
    sys.stdin.read()
    (directory / "late").write_text("x")
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as alive:
        assert alive.stdin is not None and alive.stdout is not None
        at_work = Path(alive.stdout.readline().strip())
        with staged(tmp_path / "model") as directory:
            assert at_work.is_dir() and not dead.exists() and not list(directory.iterdir())
            assert directory == reused
            (directory / "early").write_text("x")
        alive.stdin.close()
        assert alive.wait() == 1  # the name was taken meanwhile: an error, not a mixture
    assert other.is_dir() and outside.is_dir()
    assert not at_work.exists() and [path.name for path in (tmp_path / "model").iterdir()] == ["early"]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    """A file where a directory is needed."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelDirError) as caught, staged(tmp_path / "file" / "model"):
        pytest.fail("must not be entered")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (4, [["a"], ["b"], ["c"], ["d"]]),
        (12, [["a"], ["b"], ["c", "d"]]),
        (47, [["a"], ["b", "c"], ["d"]]),
        (48, [["a", "b"], ["c", "d"]]),
        (51, [["a", "b"], ["c", "d"]]),
        (59, [["a", "b", "c"], ["d"]]),
        (60, [["a", "b", "c", "d"]]),
    ],
)
def test_shards_are_filled_to_the_limit_and_not_beyond(limit: int, expected: list[list[str]]) -> None:
    """8, 40, 4 and 8 bytes: in order; a tensor that is larger than the limit is alone."""
    sizes = {"a": 2, "b": 10, "c": 1, "d": 2}
    tensors = {name: Planned.of(Lazy.of(np.zeros(n, np.float32))) for name, n in sizes.items()}
    shards = plan_shards(tensors, limit)
    assert [list(shard) for shard in shards.values()] == expected
    n = len(expected)
    names = [f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)]
    assert list(shards) == (names if n > 1 else ["model.safetensors"])


def test_everything_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file and directory is flushed first: after a power cut a name never stands for less."""
    flushed: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        assert not (tmp_path / "model").exists() or "last" in flushed
        flushed.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with staged(tmp_path / "model") as out:
        (out / "inner").mkdir()
        for name in ("config.json", "inner/notes.txt"):
            (out / name).write_text("x")
        flushed.clear()
        monkeypatch.setattr(
            os, "rename", lambda *names, move=os.rename: (move(*names), flushed.append("last"))
        )
    assert {"config.json", "notes.txt", "inner", out.name} <= set(flushed[: flushed.index("last")])


def test_the_manifest_describes_every_byte(model: Path) -> None:
    """Hashes of tensors are those of their bytes, and the manifest's own is that of the rest."""
    manifest = json.loads((model / MANIFEST).read_text())
    own = manifest.pop("sha256")
    assert own == hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    assert manifest["tensors"].keys() == TENSORS.keys()
    for name, facts in manifest["tensors"].items():
        raw = (model / facts["file"]).read_bytes()[facts["offset"] : facts["offset"] + facts["nbytes"]]
        assert raw == TENSORS[name].tobytes() and facts["sha256"] == hashlib.sha256(raw).hexdigest()
    files = {path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()}
    assert manifest["files"].keys() == files - {MANIFEST}
    assert len([name for name in files if name.endswith(".safetensors")]) == 2


def test_the_hash_of_a_header_leaves_all_tensors_out(tmp_path: Path) -> None:
    """Of a file with several tensors, in any order of the ranges; an empty tensor is no trap."""
    tensors = plans() | {"none": Planned.of(Lazy.of(np.zeros((0, 3), np.float32)))}
    stored = write_tensors(tmp_path, "model.safetensors", tensors, "jaxlm")
    write_manifest(tmp_path, "jaxlm", dict(reversed(stored.items())))
    manifest = read_manifest(tmp_path)
    assert manifest is not None
    start = min(offset for _, _, offset in read_header(tmp_path / "model.safetensors").tensors.values())
    header = (tmp_path / "model.safetensors").read_bytes()[:start]
    assert manifest["files"]["model.safetensors"]["sha256"] == hashlib.sha256(header).hexdigest()
    assert verify(tmp_path) == ([], 4)


def flip(name: str, where: Callable[[Path], int]) -> Callable[[Path], None]:
    """One bit of one byte of a file."""

    def damage(directory: Path) -> None:
        raw = bytearray((directory / name).read_bytes())
        raw[where(directory)] ^= 1
        (directory / name).write_bytes(raw)

    return damage


def offset_of(tensor: str) -> Callable[[Path], int]:
    """Of a byte within a tensor."""
    return lambda directory: json.loads((directory / MANIFEST).read_text())["tensors"][tensor]["offset"] + 5


def added(name: str) -> Callable[[Path], None]:
    """A copy of a shard, under a name that is not in the manifest."""
    return lambda d: (d / name).write_bytes((d / LAST).read_bytes())


FIRST, LAST = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
DAMAGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a missing shard": (lambda d: (d / FIRST).unlink(), [f"{FIRST}: missing, and its 2 tensors with it"]),
    "a shard that became a directory": (
        lambda d: ((d / LAST).unlink(), (d / LAST).mkdir()),
        [f"{LAST}: missing, and its 1 tensors with it"],
    ),
    "a byte of a tensor": (
        flip(FIRST, offset_of("second")),
        [f"second: its bytes in {FIRST} have changed (SHA-256 differs)"],
    ),
    "a byte of a header": (flip(LAST, lambda d: 20), [f"{LAST}: its header has changed (SHA-256 differs)"]),
    "a byte of the length of a header": (
        flip(LAST, lambda d: 0),
        [f"{LAST}: its header has changed (SHA-256 differs)"],
    ),
    "a truncated shard": (
        lambda d: (d / LAST).write_bytes((d / LAST).read_bytes()[:-1]),
        [f"{LAST}: has ", f"third: its bytes in {LAST} have changed"],
    ),
    "bytes after the end": (
        lambda d: (d / LAST).write_bytes((d / LAST).read_bytes() + b"x"),
        [f"{LAST}: has "],
    ),
    "a changed configuration": (flip("config.json", lambda d: 12), ["config.json: has changed"]),
    "a changed index": (flip(INDEX, lambda d: 40), [f"{INDEX}: has changed"]),
    "a changed tokenizer": (flip("tokenizer.json", lambda d: 3), ["tokenizer.json: has changed"]),
    "a missing tokenizer": (lambda d: (d / "tokenizer.json").unlink(), ["tokenizer.json: missing"]),
    "a changed file of the source": (
        flip("source/config.json", lambda d: 0),
        ["source/config.json: has changed"],
    ),
    "a single file beside the shards": (
        added("model.safetensors"),
        ["model.safetensors: is not in manifest.json"],
    ),
    "a shard more": (added("source/x.safetensors"), ["source/x.safetensors: is not in manifest.json"]),
    "a pickle": (lambda d: (d / "pytorch_model.bin").write_bytes(b"x"), ["pytorch_model.bin: is not in"]),
    "an adapter": (
        lambda d: (d / "adapter_config.json").write_text("{}"),
        ["adapter_config.json: is not in"],
    ),
    "several": (
        lambda d: ((d / "tokenizer.json").unlink(), flip(FIRST, offset_of("first"))(d), added("a.gguf")(d)),
        [f"first: its bytes in {FIRST}", "tokenizer.json: missing", "a.gguf: is not in"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_names_the_damage(damage: str, model: Path) -> None:
    """A line for each fault and no other."""
    act, expected = DAMAGES[damage]
    act(model)
    problems, count = verify(model)
    assert count == 3 and len(problems) == len(expected), problems
    for start in expected:
        assert sum(problem.startswith(start) for problem in problems) == 1, (start, problems)


def test_what_people_add_for_people_is_no_damage(model: Path) -> None:
    """A README and hidden files of other tools."""
    for name in ("README.md", ".gitattributes", "LICENSE"):
        (model / name).write_text("x")
    assert verify(model) == ([], 3)


def change(**facts: object) -> Callable[[dict], object]:
    """Of one tensor's entry."""
    return lambda body: body["tensors"]["first"].update(facts)


@pytest.mark.parametrize(
    "edit",
    [
        lambda body: body["files"].update({"../outside": {"bytes": 1, "sha256": "0"}}),
        lambda body: body["files"].update({"/etc/hostname": {"bytes": 1, "sha256": "0"}}),
        lambda body: body["files"].update({"a": {"bytes": "many", "sha256": "0"}}),
        lambda body: body.update(files=["config.json"]),
        lambda body: body.pop("tensors"),
        change(file="../outside"),
        change(offset=-5),
        change(nbytes=2**70),
        change(file=["a"]),
        lambda body: body.update(schema=2),
    ],
)
def test_a_manifest_about_something_else_is_one_line(edit: Callable[[dict], object], model: Path) -> None:
    """Other files than the directory's, impossible numbers, missing facts, though its own hash is right."""
    body = json.loads((model / MANIFEST).read_text())
    del body["sha256"]
    edit(body)
    own = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (model / MANIFEST).write_text(json.dumps(body | {"sha256": own}))
    with pytest.raises(ModelDirError) as caught:
        verify(model)
    assert len(str(caught.value).splitlines()) == 1 and MANIFEST in str(caught.value)


def test_an_edited_or_missing_manifest_is_one_line(model: Path) -> None:
    """Its own hash sees any edit."""
    text = (model / MANIFEST).read_text()
    for changed in (text.replace("a test", "a tale"), text[:-30], "[]", "\\x00"):
        (model / MANIFEST).write_text(changed)
        with pytest.raises(ModelDirError, match=MANIFEST):
            verify(model)
    (model / MANIFEST).unlink()
    assert read_manifest(model) is None
    with pytest.raises(ModelDirError, match="nothing to verify against"):
        verify(model)


def test_written_shards_are_read_back(model: Path) -> None:
    """Bit for bit, through the index."""
    index = json.loads((model / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in TENSORS.values())
    for name, value in TENSORS.items():
        assert np.array_equal(open_file(model / index["weight_map"][name])[name].read(), value)
