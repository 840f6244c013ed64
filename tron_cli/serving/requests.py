"""Bodies of requests: their form, their limits, and the refusals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from tron_cli.errors import shortened
from tron_cli.serving.settings import ServerSettings

ItemId = int | str
DEFAULT_K = 20
DEFAULT_SIMILAR = 10


class RefusedError(Exception):
    """Refusal of a request, with the status and the sentence that the client gets."""

    def __init__(self, status: int, sentence: str, **headers: str) -> None:
        super().__init__(sentence)
        self.status = status
        self.sentence = shortened(sentence)
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class RecommendRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of POST /recommend: one history (`items`) or several (`histories`)."""

    items: list[ItemId] | UnsetType = UNSET
    histories: list[list[ItemId]] | UnsetType = UNSET
    k: int | UnsetType = UNSET
    filter_rated: bool | None = None
    exclude: list[ItemId] = []
    candidates: list[ItemId] | None = None


class SimilarRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of POST /similar."""

    item: ItemId
    k: int | UnsetType = UNSET


class Recommended(msgspec.Struct):
    """Item ids, best first, and their scores."""

    items: list[ItemId]
    scores: list[float]


class Recommendations(msgspec.Struct):
    """An answer for each of `histories`, in their order."""

    recommendations: list[Recommended]


class Failure(msgspec.Struct):
    """One sentence: what was expected, what came, what to do."""

    error: str


_Body = TypeVar("_Body")


def parsed(decoder: msgspec.json.Decoder[_Body], body: bytes) -> _Body:
    """Return the body of a request. Raises RefusedError where it has not the expected form."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise RefusedError(400, f"the body does not have the expected form: {error}") from error
    except (ValueError, RecursionError) as error:
        reason = "it is empty" if not body else str(error)
        raise RefusedError(400, f"the body is not valid JSON: {reason}") from error


def checked_k(k: int | UnsetType, default: int, num_items: int, settings: ServerSettings) -> int:
    """Return k, or the default where none was given. Raises RefusedError."""
    highest = min(settings.max_k, num_items)
    if isinstance(k, UnsetType):
        return min(default, highest)
    if not 1 <= k <= highest:
        why = "the number of items" if highest == num_items else "the limit of this server"
        raise RefusedError(400, f"k must be from 1 to {highest} ({why}), got {k}")
    return k


def checked_histories(
    request: RecommendRequest, settings: ServerSettings
) -> Sequence[Sequence[ItemId]]:
    """Return the histories of a request. Raises RefusedError where they exceed a limit."""
    if isinstance(request.items, UnsetType) == isinstance(request.histories, UnsetType):
        raise RefusedError(400, "the body needs either items (one history) or histories (several)")
    if not isinstance(request.items, UnsetType):
        histories = [request.items]
    else:
        assert not isinstance(request.histories, UnsetType)
        histories = request.histories
    if len(histories) > settings.max_histories:
        raise RefusedError(
            400,
            f"a request may have up to {settings.max_histories} histories, got {len(histories)}; "
            "send several requests",
        )
    longest = max(map(len, histories), default=0)
    if longest > settings.max_history:
        raise RefusedError(
            400,
            f"a history may have up to {settings.max_history} events, got {longest}; send the "
            "last ones",
        )
    return histories
