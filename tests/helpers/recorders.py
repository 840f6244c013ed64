"""Stand-ins for the recording of CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU = torch.device("cpu")


class Tape(TorchDispatchMode):
    """Operations with the tensors that they read and write, to be done again in the same memory.

    So a replay knows no Python: what a step took from anywhere but its tensors stays as it was.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self._own: set[int] = set()  # memory of results
        self._before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if operation.namespace == "profiler":  # marks of torch.optim, which compute nothing
            return operation(*args, **(kwargs or {}))
        assert str(operation) not in ("aten._local_scalar_dense.default", "aten.nonzero.default")
        kwargs = kwargs or {}
        for place, argument in enumerate(operation._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[place] if place < len(args) else kwargs.get(argument.name)
                for tensor in tree_leaves(given):
                    memory = tensor.untyped_storage()._cdata
                    if memory not in self._own and memory not in self._before:
                        whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
                        self._before[memory] = (whole, whole.clone())
        results = operation(*args, **kwargs)
        self.operations.append((operation, args, kwargs, results))
        if self._is_new(operation):
            dense = [t for t in tree_leaves(results) if t is not None and not t.is_sparse]
            self._own |= {tensor.untyped_storage()._cdata for tensor in dense}
        return results

    @staticmethod
    def _is_new(operation: Any) -> bool:
        """Return True if results are neither views nor written in place."""
        return all(result.alias_info is None for result in operation._schema.returns)

    def undo(self) -> None:
        """Undo the effects of a recorded step, as recording on a device has none."""
        for whole, before in self._before.values():
            whole.copy_(before)

    @torch.no_grad()
    def play(self) -> None:
        for operation, args, kwargs, results in self.operations:
            found = operation(*args, **kwargs)
            if not self._is_new(operation):
                continue
            for result, new in zip(tree_leaves(results), tree_leaves(found), strict=True):
                if result is None:
                    continue
                if result.is_sparse:
                    result._indices().copy_(new._indices())
                    result, new = result._values(), new._values()
                result.copy_(new)


class TapeRecorder:
    """Replays the operations of a step, as a CUDA graph does, on the memory of the recording."""

    def __init__(self) -> None:
        self.replays = 0

    def run(self, work: Callable[[], object]) -> None:
        work()

    def record(self, work: Callable[[], object]) -> Callable[[], object]:
        numbers, tape = torch.get_rng_state(), Tape()
        with tape:
            work()
        tape.undo()
        torch.set_rng_state(numbers)

        def replay() -> None:
            self.replays += 1
            tape.play()

        return replay
