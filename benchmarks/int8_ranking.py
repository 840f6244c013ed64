"""Exact ranks and lists in a large catalogue, with int8 products first and with float32 alone.

    python -m benchmarks.int8_ranking [--items 1855603] [--dim 200] [--events 2048] [--output FILE]

Random embeddings of varied length. Half of the targets have a rank up to 20, the others one from 21
to 2,000; in random embeddings, unlike in trained ones, these are close to each other, which leaves
many items undecided. Ranks up to 20 and lists of 20 are compared before their times are reported.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.measure import Work, figure, in_turns, parser, report
from tron_cli.evaluation.ranking import Catalogue

_K = 20
_FAR = 2_000
_LISTS = 256


def measure(num_items: int, dim: int, num_events: int, repeats: int) -> list[dict[str, Any]]:
    """Measure ranks, long lists of requests and short ones."""
    torch.manual_seed(0)
    table = torch.randn(num_items + 1, dim) * 0.1 * (torch.rand(num_items + 1, 1) + 0.5)
    hidden_ED = torch.randn(num_events, dim)
    exact, by_int8 = Catalogue(table), Catalogue(table)
    if not by_int8.expect(1 << 20):
        raise SystemExit("this processor has no exact int8 products, or the catalogue is small")
    best_EK = by_int8.top_items(hidden_ED, None, min(_FAR, num_items))
    is_near_E = torch.rand(num_events) < 0.5
    rank_E = torch.where(
        is_near_E,
        torch.randint(0, _K, (num_events,)),
        torch.randint(_K, best_EK.shape[1], (num_events,)),
    )
    target_E = best_EK.gather(1, rank_E[:, None])[:, 0]

    def ranks(catalogue: Catalogue, limit: int | None) -> torch.Tensor:
        return catalogue.ranks(hidden_ED, target_E, limit=limit).clamp(max=_K + 1)

    def lists(catalogue: Catalogue, queries: int) -> torch.Tensor:
        # Without `expect`, a few hundred lists do not make the catalogue change over to int8.
        return catalogue.top_items(hidden_ED[:queries], None, _K)

    works: dict[str, tuple[Any, Any, int]] = {
        f"ranks up to {_K}": (
            lambda: ranks(by_int8, _K),
            lambda: ranks(exact, None),
            num_events,
        )
    }
    for queries in (1, 8, 64, _LISTS):
        works[f"lists of {_K}, {queries} at once"] = (
            lambda queries=queries: lists(by_int8, queries),
            lambda queries=queries: lists(exact, queries),
            queries,
        )
    figures = []
    for what, (first, second, events) in works.items():
        if not torch.equal(first(), second()):
            raise SystemExit(f"{what}: int8 products and float32 disagree")
        seconds = in_turns({"int8": first, "float32": second}, [()] * (repeats + 1))
        figures.append(
            figure(
                f"{what}, {num_items:,} x {dim}",
                seconds["int8"],
                seconds["float32"],
                work=Work(events=events),
            )
        )
    return figures


def main(words: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--items", type=int, default=1_855_603)
    options.add_argument("--dim", type=int, default=200)
    options.add_argument("--events", type=int, default=2_048)
    options.add_argument("--repeats", type=int, default=3)
    arguments = options.parse_args(words)
    with torch.inference_mode():
        figures = measure(arguments.items, arguments.dim, arguments.events, arguments.repeats)
    report(figures, arguments.output)


if __name__ == "__main__":
    main()
