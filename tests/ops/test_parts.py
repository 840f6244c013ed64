"""Parts of a step on threads of their own: in order, one thread each, the bits of one thread."""

import threading
from collections.abc import Iterator

import pytest
import torch

from tron_cli.ops.parts import on_threads

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_parts_are_shared_among_threads_and_come_back_in_order() -> None:
    meeting = threading.Barrier(2, timeout=10)

    def work(part: int) -> tuple[int, int, int]:
        meeting.wait()  # ends only if two are at work at once
        return part, threading.get_ident(), torch.get_num_threads()

    found = on_threads(work, range(6), CPU)
    assert [part for part, _, _ in found] == list(range(6))
    assert len({thread for _, thread, _ in found}) == 2
    assert {threads for _, _, threads in found} == {1}
    # The caller, and threads to come, have as many as before.
    counts = [torch.get_num_threads()]
    later = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert counts == [2, 2]


@pytest.mark.parametrize("threads", [1, 2])
def test_nothing_is_remembered_for_gradients(threads: int) -> None:
    torch.set_num_threads(threads)
    weights = torch.ones(3, requires_grad=True)
    found = on_threads(lambda part: weights * part, range(4), CPU)
    assert not any(values.requires_grad for values in found)
    assert (weights * 2).requires_grad


@pytest.mark.parametrize("threads", [1, 2])
def test_tensors_of_inference_mode_can_be_written_to(threads: int) -> None:
    torch.set_num_threads(threads)
    meeting = threading.Barrier(threads, timeout=10)
    with torch.inference_mode():
        counts = torch.zeros(2)

        def work(part: int) -> None:
            meeting.wait()  # each thread has one part
            counts[part] += part + 1

        on_threads(work, range(2), CPU)
        assert counts.tolist() == [1, 2]


@pytest.mark.parametrize("threads", [1, 2])
def test_what_a_part_raises_is_raised(threads: int) -> None:
    torch.set_num_threads(threads)
    with pytest.raises(ZeroDivisionError):
        on_threads(lambda part: 1 // part, [1, 0, 2], CPU)
