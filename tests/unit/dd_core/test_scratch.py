"""A directory of this user's own: nobody else may have made it, look into it, or lead us elsewhere."""

from pathlib import Path

import pytest

from dd_core.scratch import scratch_directory


def test_it_is_made_once_for_us_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    place = scratch_directory("inner")
    assert place == scratch_directory("inner") == scratch_directory() / "inner"
    assert [each.stat().st_mode & 0o777 for each in (place, place.parent)] == [0o700, 0o700]


def test_what_others_may_have_touched_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    place = scratch_directory()
    place.chmod(0o755)
    with pytest.raises(PermissionError, match=r"others may look into .*; chmod 700 it"):
        scratch_directory("inner")
    place.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError, match=r"is not ours; set TMPDIR"):
        scratch_directory()
    place.unlink()
    monkeypatch.setattr("os.getuid", lambda: 12345)
    with pytest.raises(PermissionError, match=r"ddiff-12345 is not ours; set TMPDIR"):
        scratch_directory()
