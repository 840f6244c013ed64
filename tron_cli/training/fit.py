"""Training of a baseline: fit, validate, save. There are no steps and no epochs.

The run folder has the same files as that of a network, except last.pt: fitting again is as fast as
resuming.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from tron_cli.baselines import build_baseline
from tron_cli.checkpoint import (
    checkpoint_name,
    dataset_identity,
    encode_item_ids,
    save_checkpoint,
)
from tron_cli.config import ExperimentConfig
from tron_cli.data.dataset import Dataset
from tron_cli.errors import counted
from tron_cli.training.run import RunFiles
from tron_cli.training.start import training_splits
from tron_cli.training.validation import validate, with_measures

log = logging.getLogger("tron")


def fit(
    config: ExperimentConfig,
    dataset: Dataset,
    run_dir: Path,
    *,
    final: dict[str, Any] | None = None,
) -> Path:
    """Fit the baseline that `config.model` names, and return the path of its checkpoint.

    final: record of a `FinalStart`, on whose sessions it is fitted.
    run_dir is created if it does not exist, once config and dataset have been checked. Raises
    InputError where they do not fit, or where the catalogue is too large for the baseline.
    """
    sessions, validation = training_splits(config, dataset)
    config, measures = with_measures(config)
    item_ids = encode_item_ids(dataset.item_ids)
    baseline = build_baseline(config, dataset.num_items)
    origin = {} if final is None else {"final": final}
    run = RunFiles(run_dir, config, origin)
    with run.logged():
        log.info(
            "%s on %s: %s, %s", config.method, dataset.name,
            counted(len(sessions), "session"), counted(dataset.num_items, "item"),
        )  # fmt: skip
        clock = time.perf_counter()
        baseline.fit(sessions)
        log.info("fitted in %.1f s", time.perf_counter() - clock)
        values = validate(baseline, validation, dataset, config, measures)
        path = run_dir / checkpoint_name(config, 0, values, final=final is not None)
        save_checkpoint(
            path,
            config=config,
            model=baseline,
            step=0,
            epoch=0,
            metrics=values,
            dataset=dataset_identity(dataset),
            item_ids=item_ids,
            training={},
            origin=origin,
        )
        if values:
            run.write_metrics(step=0, epoch=0, validation=values)
            shown = ", ".join(f"{name} {figure:.4f}" for name, figure in values.items())
            log.info("validation: %s", shown)
        log.info("checkpoint: %s", path)
    return path
