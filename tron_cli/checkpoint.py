"""Checkpoints: self-contained, safe to load, never half-written.

A checkpoint holds tensors and plain data only, and is read with weights_only=True. Its name is a
label for people; its content is authoritative.
"""

from __future__ import annotations

import dataclasses
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tron_cli.baselines import build_baseline
from tron_cli.baselines.base import Baseline
from tron_cli.baselines.knn_boost import KNNBoost
from tron_cli.baselines.session_knn import SessionKNN
from tron_cli.config import ExperimentConfig, config_from_dict
from tron_cli.config.plugins import UnnamedCodeError, label
from tron_cli.data.dataset import Dataset
from tron_cli.data.final import TrainAndValidation
from tron_cli.distributed.tables import TableShard
from tron_cli.errors import InputError, RunError
from tron_cli.files import LAST as LAST  # which was defined here
from tron_cli.files import best_checkpoint, written_aside
from tron_cli.models.base import Model, build_model
from tron_cli.models.mixed import MixedNetworks
from tron_cli.models.tables import dividing_tables
from tron_cli.ops import row_adam
from tron_cli.registry import BASELINES, settings_of

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Content of a checkpoint file.

    weights: those to evaluate; with ema_decay, the average. A published file may store them as
    float16; `build_model` returns a float32 network with these rounded values. training: the state
    that resuming needs, empty in a best checkpoint; with ema_decay, its "weights" are those to
    train on; with table_sharding=rows, "tables" may name a folder with what it has by rows of item
    tables. origin: records of what the weights come from besides the training sessions, such as
    "init_from".

    popularity: int64 [I + 1], training events of each item; None in files of earlier versions.

    Files of `tron mix` have one or both of these. knn: a session-kNN whose votes are added to the
    scores: "weight", "settings" (its own) and "arrays". networks: the configurations of several
    networks, whose scores are averaged; `config` is the first of them.

    The tensors are mapped: they are read when they are used, and as long as they exist the file
    occupies its space on the disk, even if it is deleted.
    """

    path: Path
    config: ExperimentConfig
    weights: dict[str, torch.Tensor]
    step: int
    epoch: int
    metrics: dict[str, float]
    dataset: dict[str, Any]
    item_ids: torch.Tensor
    training: dict[str, Any]
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)
    popularity: torch.Tensor | None = None
    knn: dict[str, Any] | None = None
    networks: tuple[ExperimentConfig, ...] = ()

    @property
    def configs(self) -> tuple[ExperimentConfig, ...]:
        """Configurations of all networks, or of the baseline."""
        return self.networks or (self.config,)

    @property
    def is_mixed(self) -> bool:
        """True if `tron mix` wrote it."""
        return bool(self.networks) or self.knn is not None

    @property
    def parts(self) -> list[str]:
        """Files that a mixed model was made of, as they were called."""
        mixed = self.origin.get("mixed", {})
        # Earlier versions mixed a single "network".
        records = [*mixed.get("networks", []), mixed.get("network"), mixed.get("session_knn")]
        return [record["file"] for record in records if record]

    @property
    def network_files(self) -> list[str]:
        """Files of the networks among `parts`, which are the first of them."""
        return self.parts[: len(self.configs)]

    @property
    def method(self) -> str:
        """Name of what was trained, such as tron, or 2xtron+session_knn for a mixed model."""
        return method_of(self.configs, with_knn=self.knn is not None)

    def build_model(self, device: torch.device, *, mapped: bool = False) -> Any:
        """Return the `Model` with its weights, ready to evaluate, or the `Baseline`, on the CPU.

        Updates of RowAdam that were pending when a last.pt was written are applied. mapped: a
        network on the CPU without such updates has `weights` themselves, which it must not change,
        instead of copies. Raises InputError where the state of the optimizer is that of another
        version of tron.
        """
        if self.config.is_baseline:
            baseline = build_baseline(self.config, self.dataset["num_items"])
            arrays = {name: values.numpy() for name, values in self.weights.items()}
            try:
                baseline.load_state_dict(arrays)
            except (KeyError, ValueError, IndexError, TypeError) as error:
                raise self._misfit(f"{type(error).__name__}: {error}") from error
            if len(arrays["popularity"]) != baseline.num_items + 1:
                raise self._misfit("counts of another number of items")
            return baseline
        if self.training and self.config.optimizer == "row_adam":
            model = self.build_saved_model(device)
            self._apply_pending_updates(model)
        else:
            model = self.build_saved_model(device, mapped=mapped and device.type == "cpu")
        if self.knn is not None:
            model.boost = self._boost(self.knn, model)
        return model.eval()

    def _boost(self, knn: dict[str, Any], model: Model) -> KNNBoost:
        """Return what session-kNN adds to the scores; it sees the histories that the network sees.

        Raises InputError where its arrays are not those of a session-kNN.
        """
        try:
            fitted = SessionKNN(
                num_items=model.num_items,
                sequence_length=model.sequence_length,
                **knn["settings"],
            )
            fitted.load_state_dict({name: each.numpy() for name, each in knn["arrays"].items()})
            return KNNBoost(fitted, knn["weight"])
        except (AttributeError, KeyError, ValueError, IndexError, TypeError) as error:
            raise self._misfit(f"session-kNN: {type(error).__name__}: {error}") from error

    def _apply_pending_updates(self, model: Model) -> None:
        """Apply the updates that were pending in a last.pt, and leave its saved state as it is."""
        saved = self.training["optimizer"]
        expected = row_adam.fresh_state(
            (weights.to("meta") for weights in model.parameters()),
            decays=self.config.weight_decay > 0,
        )
        if not row_adam.same_shapes(saved, expected):
            raise InputError(
                f"{self.path}: the saved state of the optimizer is that of another optimizer or of "
                "another version of tron; start a new run"
            )
        for weights, tensors in zip(model.parameters(), saved["state"], strict=True):
            state = {name: values.to(weights.device) for name, values in tensors.items()}
            # Older files store these as floats.
            state["touched"] = state["touched"].long()
            # These are changed, but the saved state is not.
            state |= {name: state[name].clone() for name in ("moved", "decayed") if name in state}
            shared = {name: saved[name].to(weights.device) for name in saved.keys() - {"state"}}
            rows = torch.arange(len(weights), device=weights.device)
            row_adam.catch_up(weights, rows, **state, **shared)

    def build_saved_model(
        self,
        device: torch.device,
        *,
        mapped: bool = False,
        to_resume: bool = False,
        divide: Callable[[int], TableShard] | None = None,
    ) -> Model:
        """Return the model with its weights just as they were when the file was written.

        mapped: they are `weights`, not copies, unless these are stored in half precision; the
        model computes with float32 weights in both cases. to_resume: they are those to train on.
        divide: returns the rows of item tables, for their number, that this process is to hold.
        """
        if "tables" in self.training:
            raise InputError(
                f"{self.path} lacks the item tables, which are in {self.training['tables']} beside "
                "it, for several processes to resume from (table_sharding=rows); name the best "
                "checkpoint of the run instead"
            )
        weights = self.training.get("weights", self.weights) if to_resume else self.weights
        dividing = nullcontext() if divide is None else dividing_tables(divide)
        with torch.device("meta"), dividing:  # no random weights, only to be replaced
            models = [build_model(config, self.dataset["num_items"]) for config in self.configs]
            model = MixedNetworks(models) if self.networks else models[0]
        expected = model.state_dict()
        weights = _widened(_own_rows(weights, model), expected)
        self._check_shapes(weights, expected)
        if not mapped:
            model.to_empty(device=device)
        model.load_state_dict(weights, assign=mapped)
        return model

    def _check_shapes(
        self, weights: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
    ) -> None:
        """Raise an InputError where weights are not those of the configuration's network."""
        if expected.keys() != weights.keys():
            raise self._misfit(f"{min(expected.keys() ^ weights.keys())} is missing or unknown")
        for name, values in weights.items():
            if values.shape != expected[name].shape or values.dtype != expected[name].dtype:
                shapes = [f"{v.dtype} {list(v.shape)}" for v in (values, expected[name])]
                raise self._misfit(f"{name} is {shapes[0]}, not {shapes[1]}".replace("torch.", ""))

    def _misfit(self, reason: str) -> InputError:
        return InputError(
            f"the weights in {self.path} do not fit its configuration ({reason}): the file is "
            "damaged, or was written by another version of tron or of the model's code; train again"
        )

    def decoded_item_ids(self) -> np.ndarray:
        """Original ids, entry i - 1 for item i: int64, or str objects."""
        if self.item_ids.dtype == torch.uint8:
            lines = self.item_ids.numpy().tobytes().decode().split("\n")
            return np.array(lines[:-1], dtype=object)
        return self.item_ids.numpy()


def _own_rows(weights: Mapping[str, torch.Tensor], model: Model) -> Mapping[str, torch.Tensor]:
    """Return weights with only the rows of divided tables that this process is to hold."""
    shard, divided = model.shard, model.divided_tables
    if shard is None:
        return weights
    named = model.named_parameters(remove_duplicate=False)
    names = {name for name, each in named if any(each is table for table in divided)}
    return {
        name: values[shard.first : shard.last]
        if name in names and len(values) == shard.num_rows
        else values
        for name, values in weights.items()
    }


def _widened(
    weights: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return float32 in place of weights that are stored as float16."""
    return {
        name: values.float()
        if values.dtype == torch.float16
        and name in expected
        and expected[name].dtype == torch.float32
        else values
        for name, values in weights.items()
    }


def method_of(configs: Sequence[ExperimentConfig], *, with_knn: bool = False) -> str:
    """Return the methods of a model's networks, each once with their number, and session_knn."""
    counts = Counter(config.method for config in configs)
    names = [f"{count}x{name}" if count > 1 else name for name, count in counts.items()]
    return "+".join([*names, "session_knn"] if with_knn else names)


def checkpoint_name(
    config: ExperimentConfig,
    step: int,
    metrics: dict[str, float],
    *,
    final: bool = False,
    knn_weight: float | None = None,
    networks: Sequence[ExperimentConfig] = (),
) -> str:
    """Return a name such as tron-otto-step=12000-loss=ssm-negs=16384+127-...-R@20=0.4720.pt.

    final: trained on validation sessions too, which the name then says. knn_weight: of a mixed
    model's session-kNN. networks: a mixed model's, if several.
    """
    is_mixed = knn_weight is not None
    parts = [method_of(networks or (config,), with_knn=is_mixed), config.dataset_name]
    if config.is_baseline:
        settings = settings_of(BASELINES[config.model], config, num_items=0)
        own = settings.keys() - {"num_items", "sequence_length"}
        parts += [f"{name}={_shown(settings[name])}" for name in sorted(own)]
    elif not networks:  # the settings of each are its own
        parts += _settings_of_training(config, step)
    if is_mixed:
        parts.append(f"knn_weight={knn_weight:g}")
    if config.val_metric in metrics:
        parts.append(f"{config.val_metric}={metrics[config.val_metric]:.4f}")
    if final:
        parts.append("final")
    return "-".join(parts) + ".pt"


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else label(str(value))


def _settings_of_training(config: ExperimentConfig, step: int) -> list[str]:
    parts = [
        f"step={step}",
        f"loss={label(config.loss)}",
        f"negs={config.num_uniform_negatives}+{config.num_batch_negatives}",
    ]
    if config.topk_sampling:
        parts.append(f"topk={config.topk_sampling_k}")
    parts += [
        f"emb={config.embedding_dim}",
        f"blocks={config.num_blocks}",
        f"dropout={config.dropout_rate:g}",
    ]
    return parts


def dataset_identity(dataset: Dataset) -> dict[str, Any]:
    """Return the facts by which a checkpoint recognizes its dataset."""
    identity = {
        "name": dataset.name,
        "protocol": dataset.protocol,
        "num_items": dataset.num_items,
        "catalogue_fingerprint": dataset.catalogue_fingerprint,
        "train_fingerprint": dataset.split_info("train")["fingerprint"],
    }
    if isinstance(dataset, TrainAndValidation):
        identity |= {"trained_on": "train+val", "val_fingerprint": dataset.val_fingerprint}
    return identity


def encode_item_ids(item_ids: np.ndarray) -> torch.Tensor:
    """Return int64 ids as they are, and text ids as UTF-8 bytes, one per line."""
    if np.issubdtype(item_ids.dtype, np.integer):
        return torch.from_numpy(np.array(item_ids, dtype=np.int64))
    text = "".join(f"{item}\n" for item in item_ids).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def save_checkpoint(
    path: Path,
    *,
    config: ExperimentConfig,
    model: torch.nn.Module | Baseline,
    step: int,
    epoch: int,
    metrics: dict[str, float],
    dataset: dict[str, Any],
    item_ids: torch.Tensor,
    training: dict[str, Any],
    origin: Mapping[str, Any] | None = None,
    popularity: torch.Tensor | None = None,
    knn: dict[str, Any] | None = None,
    networks: Sequence[ExperimentConfig] = (),
    weights: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write a checkpoint atomically. Raises RunError where that fails.

    weights: those to write; None: all of the model.
    """
    content = {
        "format_version": FORMAT_VERSION,
        "config": _settings(config),
        "weights": _on_cpu(model.state_dict() if weights is None else weights),
        "step": step,
        "epoch": epoch,
        "metrics": metrics,
        "dataset": dataset,
        "item_ids": item_ids,
        "training": training,
        **({"origin": dict(origin)} if origin else {}),
    }
    if popularity is not None:
        content["popularity"] = popularity
    if knn is not None:
        content["knn"] = knn
    if networks:
        content["networks"] = [_settings(each) for each in networks]
    try:
        with written_aside(path, "wb") as file:
            torch.save(content, file)  # a zip file with checksums, which load_checkpoint compares
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError where a disk is full
        reason = str(error).splitlines()[0]
        raise RunError(f"cannot write {path} ({reason}); make room for it") from error


def _settings(config: ExperimentConfig) -> dict[str, Any]:
    return {**dataclasses.asdict(config), "metrics": list(config.metrics)}


def _on_cpu(state: Mapping[str, torch.Tensor | np.ndarray]) -> dict[str, torch.Tensor]:
    """Return tensors on the CPU; those that share memory still do, and are stored once."""
    weights = {name: torch.as_tensor(values) for name, values in state.items()}
    copies: dict[tuple[int, torch.Size], torch.Tensor] = {}
    for value in weights.values():
        place = (value.data_ptr(), value.shape)
        if place not in copies:
            copies[place] = value.cpu()
    return {key: copies[value.data_ptr(), value.shape] for key, value in weights.items()}


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint, or the best one of a run folder. Raises InputError."""
    if path.is_dir():
        path = best_checkpoint(path)
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}: expected a .pt file or a run folder")
    try:
        damaged = damaged_part(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch's own message advises unsafe loading
        raise InputError(
            f"{path} is truncated or no tron checkpoint ({type(error).__name__}); name another "
            "file, or train again"
        ) from error
    if damaged is not None:
        raise InputError(
            f"{path} is damaged: {damaged} in it does not have its checksum; take another copy, or "
            "train again"
        )
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise InputError(
            f"{path} is not a tron checkpoint of format version {FORMAT_VERSION} "
            f"(found {version}); train again or name another file"
        )
    del content["format_version"]
    content.setdefault("origin", {})  # saved only if it is not empty
    expected = {field.name for field in dataclasses.fields(Checkpoint)} - {"path"}
    wrong = ", ".join(sorted((set(content) ^ expected) - {"popularity", "knn", "networks"}))
    if wrong:
        raise InputError(f"{path} is not a whole tron checkpoint: {wrong} missing or unknown")
    flaw = _flaw(content)
    if flaw is not None:
        raise InputError(f"{path} is not a whole tron checkpoint: {flaw}")
    try:
        config = config_from_dict(content.pop("config"))
        networks = tuple(config_from_dict(each) for each in content.pop("networks", ()))
    except UnnamedCodeError as error:
        raise UnnamedCodeError(f"{path} needs {error}") from error
    except (InputError, TypeError) as error:
        raise InputError(
            f"{path} was written by another version of tron, or with a package that is not "
            f"installed here: {error}"
        ) from error
    if config.is_baseline:
        content["popularity"] = content["weights"].get("popularity")
    return Checkpoint(path=path, config=config, networks=networks, **content)


def damaged_part(path: Path) -> str | None:
    """Name a part whose content does not have its checksum; older last.pt files have none."""
    with zipfile.ZipFile(path) as archive:
        if not any(member.CRC for member in archive.infolist()):
            return None
        return archive.testzip()


def _flaw(content: dict[str, Any]) -> str | None:
    """Look for entries of a wrong kind; return the first in a few words."""
    kinds: dict[str, type] = {
        **dict.fromkeys(("config", "weights", "metrics", "dataset", "training", "origin"), dict),
        **dict.fromkeys(("step", "epoch"), int),
        "item_ids": torch.Tensor,
    }
    for name, kind in kinds.items():
        if not isinstance(content[name], kind):
            return f"{name} is no {kind.__name__}"
    networks = content.get("networks", [])
    if not isinstance(networks, list) or not all(isinstance(each, dict) for each in networks):
        return "its networks are not a list of configurations"
    if not all(isinstance(values, torch.Tensor) for values in content["weights"].values()):
        return "its weights are not all tensors"
    training = content["training"]
    needed = {"optimizer", "scaler", "progress"}
    if content["config"].get("ema_decay"):
        needed.add("weights")
    if training and training.keys() - {"tables"} != needed:
        return "its state for resuming is incomplete"
    weights = training.get("weights", {})
    if not isinstance(weights, dict) or not all(map(torch.is_tensor, weights.values())):
        return "its weights to train on are not all tensors"
    dataset, ids = content["dataset"], content["item_ids"]
    if not isinstance(dataset.get("name"), str) or not isinstance(dataset.get("num_items"), int):
        return "its dataset has no name or no number of items"
    if ids.ndim != 1 or ids.dtype not in (torch.int64, torch.uint8):
        return "its item ids are neither numbers nor text"
    # Text has one id per line.
    count = len(ids) if ids.dtype == torch.int64 else int((ids == ord("\n")).sum())
    if count != dataset["num_items"]:
        return f"it has {count:,} item ids for {dataset['num_items']:,} items"
    popularity = content.get("popularity")
    if popularity is not None and not (
        isinstance(popularity, torch.Tensor)
        and popularity.dtype == torch.int64
        and popularity.shape == (count + 1,)
        and bool((popularity >= 0).all())
    ):
        return "its popularity is not a number of training events for each item"
    return None
