"""`tron mix`: networks whose scores are averaged, and boosted by session-kNN."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from tron_cli.baselines.knn_boost import MOST, KNNBoost, weighted
from tron_cli.checkpoint import (
    Checkpoint,
    checkpoint_name,
    dataset_identity,
    method_of,
    save_checkpoint,
)
from tron_cli.config import ExperimentConfig
from tron_cli.data.dataset import Dataset
from tron_cli.data.histories import count_predicted
from tron_cli.data.integrity import sha256_of_file
from tron_cli.errors import InputError
from tron_cli.evaluation.boosted import BoostedCatalogue
from tron_cli.evaluation.metrics import score
from tron_cli.evaluation.predict import (
    check_weights,
    float32_arithmetic,
    predicted_states,
    ranked,
)
from tron_cli.evaluation.ranking import Catalogue
from tron_cli.models.base import Model
from tron_cli.models.mixed import MixedNetworks
from tron_cli.registry import REGISTERED
from tron_cli.training.run import RunFiles
from tron_cli.training.validation import validate, with_measures

# Boosts of the item with the most votes, in units of logits. 0 is the network alone; the last ones
# rank most items with votes above all others.
WEIGHTS = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 11.0, 16.0, 23.0, 32.0)

log = logging.getLogger("tron")


@dataclass(frozen=True)
class Parts:
    """Checkpoints of a mixed model: one or more networks, and a session-kNN or none."""

    networks: tuple[Checkpoint, ...]
    knn: Checkpoint | None

    @property
    def are_final(self) -> bool:
        """True if they are final models; then all of them are."""
        return "final" in self.networks[0].origin


def mix(
    parts: Parts,
    dataset: Dataset | None,
    run_dir: Path,
    device: torch.device,
    *,
    weight: float | None = None,
) -> tuple[Path, dict[float, dict[str, float]]]:
    """Write a checkpoint of all parts; return its path and validation figures by kNN weight.

    The weight is the one with the highest val_metric of the first network's config, the lowest of
    equals, unless it is given. Without a session-kNN it is 0. dataset: the one to validate on; None
    for final models, which have no figures.
    """
    first, knn = parts.networks[0], parts.knn
    config, measures = with_measures(first.config)
    configs = tuple(network.config for network in parts.networks)
    models = [network.build_model(device) for network in parts.networks]
    model = MixedNetworks(models).eval() if len(models) > 1 else models[0]
    origin = _origin(parts)
    run = RunFiles(run_dir, config, origin)
    with run.logged():
        log.info("%s on %s", method_of(configs, with_knn=knn is not None), first.dataset["name"])
        weights = WEIGHTS if weight is None else (float(weight),)
        if knn is None:
            weights = (0.0,)
        if dataset is None or not _validates(parts, dataset):
            values: dict[float, dict[str, float]] = {each: {} for each in weights}
        elif knn is None:
            values = {0.0: validate(model, dataset.checked_split("val"), dataset, config, measures)}
        else:
            values = _by_weight(model, knn, weights, dataset, config, measures)
        for weight, figures in values.items() if any(values.values()) else ():
            shown = ", ".join(f"{name} {figure:.4f}" for name, figure in figures.items())
            log.info("%s: %s", "validation" if knn is None else f"weight {weight:g}", shown)
            named = {} if knn is None else {"weight": weight}
            run.write_metrics(**named, validation=figures)
        best = max(values, key=lambda weight: values[weight].get(config.val_metric, 0.0))
        if len(values) > 1:
            _advise(best, parts)
        step = sum(network.step for network in parts.networks)
        networks = configs if len(configs) > 1 else ()
        name = checkpoint_name(
            config,
            step,
            values[best],
            knn_weight=None if knn is None else best,
            networks=networks,
            final=parts.are_final,
        )
        known = [part.popularity for part in (*parts.networks, knn) if part is not None]
        save_checkpoint(
            run_dir / name,
            config=config,
            networks=networks,
            model=model,
            step=step,
            epoch=max(network.epoch for network in parts.networks),
            metrics=values[best],
            dataset=first.dataset,
            item_ids=first.item_ids,
            training={},
            origin=origin,
            popularity=next((counts for counts in known if counts is not None), None),
            knn=None if knn is None else _kept(knn, best),
        )
        log.info("checkpoint: %s", run_dir / name)
    return run_dir / name, values


def _advise(best: float, parts: Parts) -> None:
    """Log what to do where the best weight is the largest or the smallest of those tried."""
    if best == max(WEIGHTS):
        log.warning(
            "weight %g, the largest tried, scores highest: a larger one may score higher still; "
            "compare it: --weight %g",
            best, 2 * best,
        )  # fmt: skip
    elif not best:
        paths = " ".join(str(network.path) for network in parts.networks)
        log.warning(
            "weight 0 scores highest: session-kNN adds nothing to the networks; %s, which takes "
            "less time and memory",
            f"use {paths}" if len(parts.networks) == 1 else f"mix them alone: tron mix {paths}",
        )  # fmt: skip


def _kept(knn: Checkpoint, weight: float) -> dict[str, Any]:
    """Return what the new checkpoint holds of a session-kNN."""
    fitted = knn.build_model(torch.device("cpu"))
    settings = {"knn_neighbors": fitted.neighbors, "knn_sample_size": fitted.sample_size}
    return {"weight": weight, "settings": settings, "arrays": dict(knn.weights)}


def _by_weight(
    model: Model,
    knn: Checkpoint,
    weights: Sequence[float],
    dataset: Dataset,
    config: ExperimentConfig,
    measures: list[Any],
) -> dict[float, dict[str, float]]:
    """Return the validation figures of each weight of session-kNN."""
    rank, session_E = _ranks(
        model,
        KNNBoost(knn.build_model(torch.device("cpu")), 1.0),
        weights,
        dataset,
        filter_rated=config.filter_rated,
        limit=max(measure["cutoff"] for measure in measures),
        batch_size=config.eval_batch_size,
    )
    return {
        weight: {name: figure.value for name, figure in score(rank_E, session_E, measures).items()}
        for weight, rank_E in rank.items()
    }


def _ranks(
    model: Model,
    boost: KNNBoost,
    weights: Sequence[float],
    dataset: Dataset,
    *,
    filter_rated: bool,
    limit: int,
    batch_size: int,
) -> tuple[dict[float, np.ndarray], np.ndarray]:
    """Return the ranks of all validation events by weight, and their sessions, both int64 [E]."""
    sessions = dataset.checked_split("val")
    check_weights(model)
    device = next(model.parameters()).device
    parts: dict[float, list[np.ndarray]] = {weight: [] for weight in weights}
    session: list[np.ndarray] = []
    expected = count_predicted(sessions, window=model.sequence_length, protocol=dataset.protocol)
    with (
        torch.inference_mode(),
        float32_arithmetic(device),
        tqdm(total=expected, desc="validation", unit=" events", disable=None) as bar,
    ):
        catalogue = Catalogue(model.scored_table())
        for histories, hidden_ED in predicted_states(
            model, sessions, protocol=dataset.protocol, batch_size=batch_size
        ):
            shares = boost.shares(histories)
            for weight in weights:
                pairs = (torch.from_numpy(each).to(device) for each in weighted(*shares, weight))
                boosted = BoostedCatalogue(catalogue, *pairs)
                rank_E, _ = ranked(boosted, histories, hidden_ED, filter_rated, 0, limit)
                parts[weight].append(rank_E)
            session.append(histories.session_E)
            bar.update(len(histories))
    return {weight: np.concatenate(each) for weight, each in parts.items()}, np.concatenate(session)


def sorted_parts(checkpoints: Sequence[Checkpoint], weight: float | None = None) -> Parts:
    """Return the parts of a mixed model. Raises InputError where they are none.

    weight: that of session-kNN, if it is given.
    """
    if len(checkpoints) < 2:
        raise InputError(
            f"expected two or more checkpoints to mix, got {len(checkpoints)}; name networks, and "
            "at most one session_knn"
        )
    for part in checkpoints:
        _check_part(part)
    networks = tuple(part for part in checkpoints if not part.config.is_baseline)
    baselines = [part for part in checkpoints if part.config.is_baseline]
    if not networks:
        raise InputError(
            f"{baselines[0].path} and all other parts are session_knn, which boosts the scores of "
            "a network; name the checkpoint of at least one network"
        )
    if len(baselines) > 1:
        raise InputError(
            f"{baselines[0].path} and {baselines[1].path} are both session_knn; name at most one"
        )
    _check_distinct(checkpoints)
    _check_final(checkpoints)
    _check_data(checkpoints)
    for other in networks[1:]:
        _check_alike(networks[0], other)
    parts = Parts(networks, baselines[0] if baselines else None)
    _check_weight(parts, weight)
    return parts


def _check_weight(parts: Parts, weight: float | None) -> None:
    if weight is not None and parts.knn is None:
        raise InputError(
            f"weight is that of session-kNN, and no part is one; leave out weight={weight:g}, or "
            "name a checkpoint of session_knn"
        )
    if weight is not None and not 0 <= weight <= MOST:
        raise InputError(f"weight must be from 0 to {MOST:g}, got {weight:g}")
    if weight is None and parts.knn is not None and parts.are_final:
        raise InputError(
            f"{parts.knn.path} and the other parts are final models, trained on the validation "
            "sessions that would choose the weight of session-kNN; give it with --weight, as "
            "`tron mix` chose it for the runs that they came from"
        )


def _check_part(part: Checkpoint) -> None:
    if part.is_mixed:
        raise InputError(
            f"{part.path} is a mixed model already; name what it was made of: "
            f"{' '.join(part.parts) or 'its networks'}"
        )
    if part.config.is_baseline and part.config.model != "session_knn":
        raise InputError(
            f"{part.path} is the baseline {part.config.model}; name networks, and at most one "
            "session_knn, which `tron train model=session_knn` fits"
        )
    if part.training:
        raise InputError(
            f"{part.path} holds the latest weights of a run, not those that validation chose; "
            "name the run's folder or its best checkpoint"
        )


def _check_final(checkpoints: Sequence[Checkpoint]) -> None:
    final = [part.path for part in checkpoints if "final" in part.origin]
    others = [part.path for part in checkpoints if "final" not in part.origin]
    if final and others:
        raise InputError(
            f"{final[0]} is a final model, trained on the validation sessions too, and {others[0]} "
            "is not; mix final models with each other, or name the runs that they came from"
        )


def _check_distinct(checkpoints: Sequence[Checkpoint]) -> None:
    paths: dict[str, Path] = {}
    for part in checkpoints:
        earlier = paths.setdefault(sha256_of_file(part.path), part.path)
        if earlier is not part.path:
            raise InputError(
                f"{part.path} {_same(earlier, part.path)}, and a part counts once; name another"
            )


def _same(earlier: Path, path: Path) -> str:
    is_path = earlier.resolve() == path.resolve()
    return "is named twice" if is_path else f"has the same content as {earlier}"


def _check_data(checkpoints: Sequence[Checkpoint]) -> None:
    names = ("catalogue_fingerprint", "train_fingerprint", "val_fingerprint")
    first = checkpoints[0]
    for other in checkpoints[1:]:
        if any(first.dataset.get(name) != other.dataset.get(name) for name in names):
            shown = [
                f"{part.path} on {part.dataset['name']} ({part.dataset['num_items']:,} items)"
                for part in (first, other)
            ]
            raise InputError(
                f"the two were trained on different data: {' and '.join(shown)}; train both on the "
                "same prepared dataset"
            )


def _check_alike(first: Checkpoint, other: Checkpoint) -> None:
    """Raise InputError where two networks predict from, or filter, different histories."""
    for name in ("sequence_length", "filter_rated"):
        values = [getattr(part.config, name) for part in (first, other)]
        if values[0] != values[1]:
            raise InputError(
                f"{first.path} has {name}={values[0]} and {other.path} {name}={values[1]}; mix "
                "networks that share it"
            )
    masks = [REGISTERED["model"][part.config.model].masks_inputs for part in (first, other)]
    if masks[0] != masks[1]:
        masked, causal = (first, other) if masks[0] else (other, first)
        raise InputError(
            f"{masked.path} is model={masked.config.model}, which predicts from a mask after each "
            f"history, and {causal.path} is model={causal.config.model}, which predicts from the "
            "last event; mix networks of one kind"
        )


def check_dataset(parts: Parts, dataset: Dataset, weight: float | None) -> None:
    """Raise InputError where the dataset is not that of the parts, or cannot choose the weight."""
    network = parts.networks[0]
    if network.dataset != dataset_identity(dataset):
        raise InputError(
            f"{network.path} was trained on another version of {dataset.path}; prepare the dataset "
            "as it was, or train again"
        )
    if parts.knn is not None and weight is None and not _validates(parts, dataset):
        raise InputError(
            f"the validation split of {dataset.path} has no event to predict, and only validation "
            "can choose the weight of session-kNN; prepare the dataset with one, or give --weight"
        )


def _validates(parts: Parts, dataset: Dataset) -> bool:
    """Return True if validation has events to predict."""
    window = parts.networks[0].config.sequence_length
    sessions = dataset.checked_split("val")
    return count_predicted(sessions, window=window, protocol=dataset.protocol) > 0


def _origin(parts: Parts) -> dict[str, Any]:
    """Return the records that the new checkpoint keeps of its parts."""
    mixed: dict[str, Any] = {"networks": [_record(network) for network in parts.networks]}
    if parts.knn is not None:
        mixed["session_knn"] = _record(parts.knn)
    if not parts.are_final:
        return {"mixed": mixed}
    return {"mixed": mixed, "final": {"parts": len(parts.networks) + (parts.knn is not None)}}


def _record(part: Checkpoint) -> dict[str, Any]:
    return {
        "file": str(part.path),
        "sha256": sha256_of_file(part.path),
        "method": part.method,
        "metrics": part.metrics,
        "step": part.step,
        **({"origin": part.origin} if part.origin else {}),
    }
