"""Precision and arithmetic chosen for a device, with stand-ins for absent devices."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.datasets import tiny_settings, write_dataset

from tron_cli import cli
from tron_cli.config import ExperimentConfig
from tron_cli.errors import InputError, RunError
from tron_cli.evaluation.predict import float32_arithmetic
from tron_cli.ops.device import chosen_device
from tron_cli.training import start
from tron_cli.training.fit import fit

CPU = torch.device("cpu")


# --- precision=auto -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((7, 0), torch.float16),  # V100
        ((7, 5), torch.float16),  # T4
        ((8, 0), torch.bfloat16),  # A100
        ((8, 9), torch.bfloat16),  # L4
        ((9, 0), torch.bfloat16),  # H100
    ],
)
def test_bf16_is_chosen_where_the_hardware_has_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: torch.dtype
) -> None:
    """Not where PyTorch emulates it, which is_bf16_supported() says as well."""
    asked = []

    def properties(device: torch.device) -> SimpleNamespace:
        asked.append(device)
        return SimpleNamespace(major=capability[0], minor=capability[1])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    device = torch.device("cuda", 1)
    assert start._training_dtype("auto", device) is expected
    assert asked == [device]
    assert start._training_dtype("bf16", device) is torch.bfloat16
    assert start._training_dtype("float32", device) is torch.float32
    assert start._training_dtype("auto", CPU) is torch.float32


# --- --device -------------------------------------------------------------------------------------


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, torch.device]]:
    """A machine with two CUDA devices; what was asked of them."""
    asked: list[tuple[str, torch.device]] = []

    def zeros(*shape: int, device: torch.device) -> None:
        asked.append(("zeros", device))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.append(("set", device)))
    monkeypatch.setattr(torch, "zeros", zeros)
    return asked


def test_the_device_that_is_named_becomes_the_current_one(two_cards: list[Any]) -> None:
    """Before anything is put on it: graphs, streams and Triton's kernels use the current one."""
    device = torch.device("cuda", 1)
    assert chosen_device("cuda:1") == device
    assert two_cards == [("set", device), ("zeros", device)]


@pytest.mark.parametrize("name", ["auto", "cuda", "cpu"])
def test_without_a_number_the_current_device_stays(two_cards: list[Any], name: str) -> None:
    assert chosen_device(name).index is None
    assert [what for what, _ in two_cards] == ["zeros"]


@pytest.mark.parametrize("name", ["cuda:2", "cuda:7", "cuda:128", "cuda:256"])
def test_a_device_that_does_not_exist_is_refused(two_cards: list[Any], name: str) -> None:
    """torch.device has eight bits for the number: it takes cuda:256 for cuda:0."""
    with pytest.raises(InputError) as error:
        chosen_device(name)
    assert str(error.value) == f"--device {name} does not exist here; there is cuda:0, cuda:1"
    assert two_cards == []


@pytest.mark.parametrize("command", ["train", "evaluate", "compare"])
def test_every_command_that_computes_chooses_its_device_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str
) -> None:
    """Before it computes; each is stopped there."""

    class ChosenError(Exception):
        pass

    def choose(name: str) -> torch.device:
        assert name == "cuda:1"
        raise ChosenError

    dataset = write_dataset(tmp_path, train=[[1, 2, 3]] * 4, val=[[1, 2]], test=[[1, 2]])
    checkpoint = fit(
        ExperimentConfig(**tiny_settings(model="popular")), dataset, tmp_path / "run"
    )  # fmt: skip
    module = "training" if command == "train" else "evaluation"
    monkeypatch.setattr(f"tron_cli.api.{module}.chosen_device", choose)
    words = {
        "train": ["--config", "config_synthetic", "dataset_name=tiny"],
        "evaluate": [str(checkpoint)],
        "compare": [str(checkpoint), str(checkpoint)],
    }
    with pytest.raises(ChosenError):
        cli.app([command, *words[command], "--data-dir", str(tmp_path), "--device", "cuda:1"])


# --- evaluation in float32 ------------------------------------------------------------------------

BACKENDS = torch.backends
OPERATIONS = {
    "matmul": BACKENDS.cuda.matmul,
    "conv": BACKENDS.cudnn.conv,
    "rnn": BACKENDS.cudnn.rnn,
    "cpu matmul": BACKENDS.mkldnn.matmul,
    "cpu rnn": BACKENDS.mkldnn.rnn,
}  # fmt: skip

needs_new_settings = pytest.mark.skipif(
    not hasattr(BACKENDS, "fp32_precision"), reason="torch.backends.*.fp32_precision: torch 2.9"
)


def modes() -> dict[str, str]:
    return {name: operation.fp32_precision for name, operation in OPERATIONS.items()}


@needs_new_settings
@pytest.mark.parametrize("way", ["returns", "raises"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("before", ["as they come", "all tf32", "legacy high", "differing"])
def test_no_operation_of_evaluation_rounds_to_tf32(before: str, device: str, way: str) -> None:
    """Matrix products and cuDNN's GRU, however they were set; and then they are as they were."""
    own = [name for name in OPERATIONS if name.startswith("cpu") == (device == "cpu")]
    at_first = modes(), torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        if before == "all tf32":
            BACKENDS.fp32_precision = "tf32"
            for operation in OPERATIONS.values():
                operation.fp32_precision = "tf32"
        elif before == "legacy high":
            torch.set_float32_matmul_precision("high")
            BACKENDS.cudnn.allow_tf32 = True
        elif before == "differing":  # which makes torch refuse to say what the legacy flags are
            BACKENDS.cuda.matmul.fp32_precision = "tf32"
            BACKENDS.cudnn.rnn.fp32_precision = "ieee"
        outside = modes()
        try:
            with torch.autocast("cpu", torch.bfloat16), float32_arithmetic(torch.device(device)):
                assert {modes()[name] for name in own} <= {"ieee", "none"}
                assert torch.is_autocast_enabled("cpu") == (device == "cuda")
                if way == "raises":
                    raise RunError("in the middle of it")
        except RunError:
            assert way == "raises"
        assert modes() == outside
    finally:
        BACKENDS.fp32_precision = "none"
        BACKENDS.cudnn.allow_tf32 = at_first[2]
        torch.set_float32_matmul_precision(at_first[1])
        for name, operation in OPERATIONS.items():
            operation.fp32_precision = at_first[0][name]


@needs_new_settings
def test_threads_that_overlap_share_float32_arithmetic() -> None:
    """Whoever leaves first does not turn TF32 on again under the others."""
    operation = OPERATIONS["cpu matmul"]
    before = operation.fp32_precision
    first, second = float32_arithmetic(CPU), float32_arithmetic(CPU)
    try:
        operation.fp32_precision = "tf32"
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert operation.fp32_precision == "ieee"
        second.__exit__(None, None, None)
        assert operation.fp32_precision == "tf32"
    finally:
        operation.fp32_precision = before


@pytest.mark.parametrize("way", ["returns", "raises"])
def test_tf32_is_off_under_a_torch_that_has_the_legacy_flags_only(
    monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    flags = {"matmul": "high", "cudnn": True}
    backends = SimpleNamespace(cudnn=SimpleNamespace(allow_tf32=True))
    monkeypatch.setattr(torch, "backends", backends)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: flags["matmul"])
    monkeypatch.setattr(
        torch, "set_float32_matmul_precision", lambda value: flags.update(matmul=value)
    )
    try:
        with float32_arithmetic(CPU):
            assert flags["matmul"] == "highest"
            assert backends.cudnn.allow_tf32 is False
            if way == "raises":
                raise RunError("in the middle of it")
    except RunError:
        assert way == "raises"
    assert flags["matmul"] == "high"
    assert backends.cudnn.allow_tf32 is True
