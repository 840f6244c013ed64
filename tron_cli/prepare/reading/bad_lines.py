"""Lines that cannot be read: refused, or skipped and counted by kind."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from tron_cli.errors import InputError, counted


class BadLines:
    """Policy for lines that cannot be read: raise InputError, or skip and count them by kind.

    max_share: the largest share of all lines that may be skipped; None sets no limit.
    """

    def __init__(self, *, skip: bool = False, max_share: float | None = None) -> None:
        if max_share is not None and not skip:
            raise InputError("--max-bad-share goes with --skip-bad-lines: give both or none")
        self.skip = skip
        self.max_share = max_share
        self.kinds: Counter[str] = Counter()
        self.first: str | None = None

    @property
    def count(self) -> int:
        """Number of skipped lines."""
        return self.kinds.total()

    def info(self) -> dict[str, Any]:
        """Return the record in dataset.json: how many lines were skipped, why, and the first."""
        kinds = dict(self.kinds.most_common())
        return {"count": self.count, "kinds": kinds, "first": self.first}

    def reject(
        self,
        file: Path,
        line: int,
        problem: str,
        *,
        kind: str = "unreadable line",
        unit: str = "line",
        advice: str | None = None,
    ) -> None:
        """Refuse, or skip and count, one bad line (of a Parquet file: row), numbered from 1.

        kind: that of the problem, under which the line is counted. advice: what to do, where
        correcting or skipping the line does not help.
        """
        if not self.skip:
            advice = advice or "correct it, or pass --skip-bad-lines"
            raise InputError(f"{file}, {unit} {line}: {problem}; {advice}")
        self.kinds[kind] += 1
        if self.first is None:
            self.first = f"{file.name}, {unit} {line}: {problem}" + (
                f"; {advice}" if advice else ""
            )

    def check_share(self, good: int) -> None:
        """Raise InputError if too large a share of lines was bad; good: number of other lines."""
        lines = good + self.count
        if self.max_share is not None and self.count > self.max_share * lines:
            raise InputError(
                f"{self.count:,} of {lines:,} lines ({self.count / lines:.2g} of them) are bad, "
                f"more than --max-bad-share {self.max_share:g} allows; the first: {self.first}"
            )


def skipped_lines(bad: dict[str, Any]) -> str:
    """Return a sentence about `BadLines.info()`; datasets of earlier versions name no kinds."""
    kinds = bad.get("kinds", {})
    shown = [f"{kind}: {count:,}" for kind, count in kinds.items()]
    why = f" ({', '.join(shown if bad['count'] > 1 else kinds)})" if kinds else ""
    were = "was" if bad["count"] == 1 else "were"
    return f"{counted(bad['count'], 'bad line')} {were} skipped{why}; the first: {bad['first']}"
