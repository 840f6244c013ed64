"""`tron export`: a checkpoint as files that other runtimes read."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tron_cli.checkpoint import Checkpoint, load_checkpoint
from tron_cli.data.integrity import sha256_of_file
from tron_cli.errors import InputError, RunError
from tron_cli.evaluation.predict import check_weights
from tron_cli.files import locked
from tron_cli.models.mixed import MixedNetworks
from tron_cli.registry import MODELS
from tron_cli.serving.program import Program, Table

_LARGEST_FILE = 1 << 29  # bytes of weights; those of larger ONNX models have a file of their own
FORMATS = ("onnx", "safetensors", "torch")
TABLES = ("float32", "float16", "int8")
_MANIFEST_VERSION = 1
_NEEDS = {"onnx": ("onnx", "onnxscript"), "safetensors": ("safetensors",), "torch": ()}
_MODEL_FILE = {"onnx": "model.onnx", "safetensors": "model.safetensors", "torch": "model.pt2"}
_EMPTY = {
    True: "the items with the most training events, with scores of 0",
    False: "number 0 with score -inf: the checkpoint does not hold the popularity of items",
}


def export(
    path: Path,
    *,
    format: str,
    output: Path | None = None,
    table: str = "float32",
    force: bool = False,
) -> dict[str, Any]:
    """Write a checkpoint, or the best one of a run folder, into a new folder; return its manifest.

    format: one of FORMATS. table: one of TABLES, in which item tables are kept. output: the
    folder; None: METHOD-DATASET-FORMAT in the current one. force: replace an earlier export, once
    the new one is complete. Raises InputError where the checkpoint cannot be exported or the folder
    exists, and RunError where writing fails.
    """
    _check_packages(format)
    checkpoint = load_checkpoint(path)
    config = checkpoint.config
    if config.is_baseline:
        raise InputError(
            f"{checkpoint.path} is the baseline {config.model}, and only networks can be exported; "
            "use it with `tron recommend` or `tron serve`"
        )
    if checkpoint.knn is not None:
        raise InputError(
            f"{checkpoint.path} holds session-kNN, and only networks can be exported; use it with "
            "`tron recommend` or `tron serve`, or export its networks without session-kNN: "
            f"{' '.join(checkpoint.network_files)}"
        )
    for each in checkpoint.configs:
        if not MODELS[each.model].path.startswith("tron_cli."):
            raise InputError(
                f"{checkpoint.path} is model={each.model}, code from outside tron, and only the "
                "networks of tron can be exported; use it with `tron recommend` and --plugin"
            )
    if output is None:
        output = Path(f"{checkpoint.method}-{config.dataset_name}-{format}")
    with _new_folder(output, force=force) as folder:
        _write_model(checkpoint, folder / _MODEL_FILE[format], format, table)
        _write_items(checkpoint, folder)
        _write_json(folder / "config.json", dataclasses.asdict(config))
        manifest = _manifest(checkpoint, folder, format, table)
        _write_json(folder / "manifest.json", manifest)
    return {"folder": str(output), **manifest}


def _check_packages(format: str) -> None:
    for package in _NEEDS[format]:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise InputError(
                f"--format {format} needs the package {package}, which cannot be imported here "
                f"({error}); run: pip install 'tron-recsys[{format}]'"
            ) from error


@contextmanager
def _new_folder(path: Path, *, force: bool) -> Iterator[Path]:
    """Yield an empty folder that is renamed to `path` if the block ends without an error."""
    try:
        _check_free(path, force)
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {path.parent}: {error}") from error
    partial, replaced = (path.with_name(f".{path.name}.{end}") for end in ("partial", "replaced"))
    with locked(path.with_name(f".{path.name}.lock"), path, "name another --output"):
        if replaced.exists() and not path.exists():  # by a process that was killed
            replaced.rename(path)
        _check_free(path, force)  # again: another process may have written it meanwhile
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        try:
            partial.mkdir()
            yield partial
            if path.exists():
                path.rename(replaced)
            partial.rename(path)
        except OSError as error:
            raise RunError(f"cannot write {path}: {error}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            if path.exists():
                shutil.rmtree(replaced, ignore_errors=True)


def _check_free(path: Path, force: bool) -> None:
    if not path.exists() and not path.is_symlink():
        return
    if not force:
        raise InputError(
            f"{path} exists already; pass --force to replace it, or name another --output"
        )
    if path.is_symlink() or not (path / "manifest.json").is_file():
        raise InputError(
            f"--force replaces folders that tron export wrote, and {path} has no manifest.json; "
            "name another --output"
        )


def _write_model(checkpoint: Checkpoint, file: Path, format: str, table: str) -> None:
    model = checkpoint.build_model(torch.device("cpu"))
    checkpoint.weights.clear()  # memory may not hold further copies of large tables
    check_weights(model)
    if format == "safetensors":
        _write_safetensors(checkpoint, model, file, table)
        return
    popularity = checkpoint.popularity
    program = Program(_networks(model), table, None if popularity is None else popularity[1:])
    with _quiet():
        exported = torch.export.export(
            program.eval(),
            (torch.ones(2, 3, dtype=torch.int64), torch.tensor(1), torch.tensor(False)),
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}, None, None),
        )
        for module in exported.graph_module.modules():  # of loops too
            for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
                node.meta.pop("stack_trace", None)  # paths of this machine
        if format == "torch":
            # torch would abort the process on a full disk.
            content = io.BytesIO()
            torch.export.save(exported, content)
            file.write_bytes(content.getbuffer())
        else:
            _write_onnx(exported, file)


def _write_onnx(exported: torch.export.ExportedProgram, file: Path) -> None:
    program = torch.onnx.export(
        exported,
        dynamo=True,
        verbose=False,
        input_names=["histories", "k", "filter_rated"],
        output_names=["items", "scores"],
        dynamic_shapes=({0: "batch", 1: "length"}, None, None),
        custom_translation_table={torch.ops.aten.sort.stable: _stable_sort},
    )
    assert program is not None
    weights = sum(values.nbytes for values in exported.state_dict.values())
    program.save(file, external_data=weights > _LARGEST_FILE)


def _stable_sort(self: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """Translate torch's stable sort to TopK, which puts the lower index first among equals."""
    import onnxscript

    op: Any = onnxscript.opset18
    size = op.Gather(op.Shape(self), op.Constant(value_ints=[dim]), axis=0)
    return op.TopK(self, size, axis=dim, largest=int(descending), sorted=1)


def _networks(model: Any) -> list[Any]:
    """Return the networks of a mixed model, or the network."""
    return list(model.networks) if isinstance(model, MixedNetworks) else [model]


def _write_safetensors(checkpoint: Checkpoint, model: Any, file: Path, table: str) -> None:
    """Write each tensor once; the metadata describes the model and names shared tensors."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    places: dict[tuple[int, torch.Size], str] = {}
    tensors: dict[str, torch.Tensor] = {}
    shared: dict[str, str] = {}
    tables = ("item_embedding.weight", "output_embedding.weight")
    for name, values in model.state_dict().items():
        first = places.setdefault((values.data_ptr(), values.shape), name)
        if first != name:
            shared[name] = first
        elif name.endswith(tables) and table != "float32":
            network = model.get_submodule(".".join(name.split(".")[:-2]))
            has_bias = network.output_bias and values.shape[1] > network.embedding_dim
            kept = Table(values, table, with_bias=has_bias)
            for part, suffix in (("values_VD", ""), ("scale_V", ".scale"), ("bias_V", ".bias")):
                if getattr(kept, part) is not None:
                    tensors[name + suffix] = getattr(kept, part)
        else:
            tensors[name] = values.contiguous()
    described = {
        "config": dataclasses.asdict(checkpoint.config),
        **_networks_entry(checkpoint),
        "dataset": checkpoint.dataset,
        "metrics": checkpoint.metrics,
        "step": checkpoint.step,
        "table": table,
        "shared": shared,
    }
    metadata = {name: json.dumps(value) for name, value in described.items()}
    try:
        save_file(tensors, file, metadata={"format": "pt", **metadata})
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _write_items(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the original ids and the popularity, entry i - 1 for item i."""
    ids = checkpoint.item_ids
    if ids.dtype == torch.uint8:  # UTF-8, one id per line
        (folder / "item_ids.txt").write_bytes(ids.numpy().tobytes())
    else:
        np.save(folder / "item_ids.npy", ids.numpy())
    if checkpoint.popularity is not None:
        np.save(folder / "popularity.npy", checkpoint.popularity[1:].numpy())


def _manifest(checkpoint: Checkpoint, folder: Path, format: str, table: str) -> dict[str, Any]:
    config, num_items = checkpoint.config, checkpoint.dataset["num_items"]
    program: dict[str, Any] = {}
    if format != "safetensors":
        program = {
            "inputs": {
                "histories": f"int64 [batch, length], numbers 1 to {num_items} of the items of "
                "each history, oldest first; other values, such as the zeros of padding, are "
                f"skipped wherever they stand; the last {config.sequence_length} events are used",
                "k": f"int64 scalar, items per history, cut to 1 .. {num_items}",
                "filter_rated": "bool scalar, true: leave out the items of the whole history",
            },
            "outputs": {
                "items": "int64 [batch, k], numbers of the best items, equal scores by number; 0 "
                "where fewer are left",
                "scores": "float32 [batch, k]; -inf where items is 0",
            },
            "empty_histories": _EMPTY[checkpoint.popularity is not None],
        }
    return {
        "format": format,
        "manifest_version": _MANIFEST_VERSION,
        "torch_version": torch.__version__,
        "checkpoint": checkpoint.path.name,
        "method": checkpoint.method,
        **_networks_entry(checkpoint),
        "step": checkpoint.step,
        "metrics": checkpoint.metrics,
        "dataset": checkpoint.dataset,
        "num_items": num_items,
        "sequence_length": config.sequence_length,
        "filter_rated": config.filter_rated,
        "table": table,
        **program,
        "files": {
            file.name: {"bytes": file.stat().st_size, "sha256": sha256_of_file(file)}
            for file in sorted(folder.iterdir())
        },
    }


def _networks_entry(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the entry with the configurations of a mixed model's networks."""
    networks = [dataclasses.asdict(config) for config in checkpoint.networks]
    return {"networks": networks} if networks else {}


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' internal messages out of the log."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
