"""What is asked of the disk before a run begins."""

from pathlib import Path

import pytest

from jaxlm.checkpoint_files import DiskFullError, preflight
from jaxlm.disk import free_bytes


def test_a_disk_without_room_for_one_is_refused_before_a_run(tmp_path: Path) -> None:
    """An exabyte with both numbers, in a folder that is not there yet; room for one but not for all is a warning."""
    said: list[str] = []
    with pytest.raises(
        DiskFullError, match=r"no room for a checkpoint in .*/b: one needs 1e\+09 GB, .* GB are free"
    ):
        preflight(tmp_path / "a" / "b", 10**18, 2, 0, said.append)
    preflight(tmp_path, 1, 2, 0, said.append)
    assert not said
    preflight(tmp_path, free_bytes(tmp_path) * 2 // 3, 2, 1, said.append)
    assert len(said) == 1 and "has room for 1 more checkpoints but may hold 3 more" in said[0]
