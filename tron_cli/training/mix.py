"""`tron mix`: a network whose scores session-kNN boosts, by a weight that validation chooses."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from tron_cli.baselines.knn_boost import KNNBoost, weighted
from tron_cli.checkpoint import Checkpoint, checkpoint_name, dataset_identity, save_checkpoint
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
from tron_cli.training.run import RunFiles
from tron_cli.training.validation import with_measures

# Boosts of the item with the most votes, in units of logits. 0 is the network alone; the last ones
# rank most items with votes above all others.
WEIGHTS = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 11.0, 16.0, 23.0, 32.0)

log = logging.getLogger("tron")


def mix(
    network: Checkpoint, knn: Checkpoint, dataset: Dataset, run_dir: Path, device: torch.device
) -> tuple[Path, dict[float, dict[str, float]]]:
    """Write a checkpoint of both; return its path and the validation figures of each weight.

    The weight is the one with the highest val_metric of the network's config, the lowest of equals.
    """
    config, measures = with_measures(network.config)
    model = network.build_model(device)
    fitted = knn.build_model(torch.device("cpu"))
    origin = {
        **network.origin,
        "mixed": {"network": _record(network), "session_knn": _record(knn)},
    }
    run = RunFiles(run_dir, config, origin)
    with run.logged():
        log.info("%s and session_knn on %s", config.method, dataset.name)
        rank, session_E = _ranks(
            model,
            KNNBoost(fitted, 1.0),
            dataset,
            filter_rated=config.filter_rated,
            limit=max(measure["cutoff"] for measure in measures),
            batch_size=config.eval_batch_size,
        )
        values = {
            weight: {
                name: figure.value for name, figure in score(rank_E, session_E, measures).items()
            }
            for weight, rank_E in rank.items()
        }
        for weight, figures in values.items():
            shown = ", ".join(f"{name} {figure:.4f}" for name, figure in figures.items())
            log.info("weight %g: %s", weight, shown)
            run.write_metrics(weight=weight, validation=figures)
        best = max(values, key=lambda weight: values[weight][config.val_metric])
        path = run_dir / checkpoint_name(config, network.step, values[best], knn_weight=best)
        settings = {"knn_neighbors": fitted.neighbors, "knn_sample_size": fitted.sample_size}
        save_checkpoint(
            path,
            config=config,
            model=model,
            step=network.step,
            epoch=network.epoch,
            metrics=values[best],
            dataset=network.dataset,
            item_ids=network.item_ids,
            training={},
            origin=origin,
            popularity=network.popularity if knn.popularity is None else knn.popularity,
            knn={"weight": best, "settings": settings, "arrays": dict(knn.weights)},
        )
        log.info("checkpoint, with weight %g: %s", best, path)
    return path, values


def _ranks(
    model: Model,
    boost: KNNBoost,
    dataset: Dataset,
    *,
    filter_rated: bool,
    limit: int,
    batch_size: int,
) -> tuple[dict[float, np.ndarray], np.ndarray]:
    """Return the ranks of all validation events by weight, and their sessions, both int64 [E]."""
    sessions = dataset.checked_split("val")
    check_weights(model)
    device = model.item_table.device
    parts: dict[float, list[np.ndarray]] = {weight: [] for weight in WEIGHTS}
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
            for weight in WEIGHTS:
                pairs = (torch.from_numpy(each).to(device) for each in weighted(*shares, weight))
                boosted = BoostedCatalogue(catalogue, *pairs)
                rank_E, _ = ranked(boosted, histories, hidden_ED, filter_rated, 0, limit)
                parts[weight].append(rank_E)
            session.append(histories.session_E)
            bar.update(len(histories))
    return {weight: np.concatenate(each) for weight, each in parts.items()}, np.concatenate(session)


def check_parts(network: Checkpoint, knn: Checkpoint) -> None:
    """Raise InputError where the checkpoints are not a network and a session-kNN of one dataset."""
    if network.config.is_baseline:
        raise InputError(
            f"{network.path} is the baseline {network.config.model}; name the checkpoint of a "
            "network first, and then that of session_knn"
        )
    if knn.config.model != "session_knn":
        raise InputError(
            f"{knn.path} is model={knn.config.model}; name the checkpoint of a network first, and "
            "then that of session_knn, which `tron train model=session_knn` fits"
        )
    if network.knn is not None:
        raise InputError(
            f"{network.path} is a mixed model already; name the network that it was made of, "
            f"{network.origin['mixed']['network']['file']}"
        )
    if network.training:
        raise InputError(
            f"{network.path} holds the latest weights of a run, not those that validation chose; "
            "name the run's folder or its best checkpoint"
        )
    for part in (network, knn):
        if "final" in part.origin:
            raise InputError(
                f"{part.path} is a final model, trained on the validation sessions that would "
                "choose the weight; name the run that it came from"
            )
    names = ("catalogue_fingerprint", "train_fingerprint")
    if [network.dataset.get(name) for name in names] != [knn.dataset.get(name) for name in names]:
        shown = [
            f"{part.path} on {part.dataset['name']} ({part.dataset['num_items']:,} items)"
            for part in (network, knn)
        ]
        raise InputError(
            f"the two were trained on different data: {' and '.join(shown)}; train both on the "
            "same prepared dataset"
        )


def check_dataset(network: Checkpoint, dataset: Dataset) -> None:
    """Raise InputError where the dataset is not that of the network, or validates nothing."""
    if network.dataset != dataset_identity(dataset):
        raise InputError(
            f"{network.path} was trained on another version of {dataset.path}; prepare the dataset "
            "as it was, or train again"
        )
    validation = dataset.checked_split("val")
    if not count_predicted(
        validation, window=network.config.sequence_length, protocol=dataset.protocol
    ):
        raise InputError(
            f"the validation split of {dataset.path} has no event to predict, and only validation "
            "can choose the weight of session-kNN; prepare the dataset with one"
        )


def _record(part: Checkpoint) -> dict[str, Any]:
    return {
        "file": str(part.path),
        "sha256": sha256_of_file(part.path),
        "metrics": part.metrics,
        "step": part.step,
    }
