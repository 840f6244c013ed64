"""Files that a person names: whole, whatever other processes do meanwhile."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tron_cli.errors import InputError
from tron_cli.files import check_writable, written_alone

WRITE_AS_WELL = """
import sys
from pathlib import Path
from tron_cli.files import written_alone
print("ready", flush=True)
with written_alone(Path(sys.argv[1])) as file:
    file.write("second\\n" * 9)
"""


def test_two_processes_that_write_one_file_come_one_after_the_other(tmp_path: Path) -> None:
    path = tmp_path / "run.trec"
    with written_alone(path) as file:
        file.write("first\n")
        file.flush()
        other = subprocess.Popen(
            [sys.executable, "-c", WRITE_AS_WELL, str(path)], stdout=subprocess.PIPE
        )
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(0.3)
        file.write("first\n" * 9)
    assert path.read_text() in ("first\n" * 10, "second\n" * 9)
    assert other.wait(60) == 0
    assert path.read_text() == "second\n" * 9
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.trec"]
    other.stdout.close()


def test_looking_whether_a_file_can_be_written_leaves_another_process_s_alone(
    tmp_path: Path,
) -> None:
    path = tmp_path / "run.trec"
    with written_alone(path) as file:
        file.write("first\n")
        with pytest.raises(InputError, match="being written by this process"):
            check_writable(path)
    assert path.read_text() == "first\n"
    check_writable(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.trec"]
