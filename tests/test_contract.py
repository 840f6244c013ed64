"""The contract of every model, loss, sampler and sampling style: next = item % I + 1 is found.

On sessions that no training saw; the right answer is known by hand, and there is one for every
history, so that anything below nearly all of them is a defect.
"""

import itertools

import pytest
import torch
from helpers.datasets import cyclic_sessions, tiny_settings, write_dataset

from tron_cli.checkpoint import load_checkpoint
from tron_cli.config import ExperimentConfig
from tron_cli.errors import InputError
from tron_cli.registry import BASELINES, CATALOGUE_LOSSES, LOSSES, MODELS, SAMPLERS
from tron_cli.training.fit import fit
from tron_cli.training.loop import train

CYCLE = 8
CPU = torch.device("cpu")
STYLES = ("eventwise", "sessionwise", "batchwise")
# What each network needs to learn it in a second.
OF_MODEL = {
    "bert4rec": {"mask_probability": 0.2, "max_epochs": 10},
    "gru4rec": {"lr": 3e-2},
}
# gBCE's negatives: uniform, and a share of the items, for its beta undoes sampling.
PLAIN = {"num_uniform_negatives": 4, "num_batch_negatives": 0}


def make_config(**changes) -> ExperimentConfig:
    return ExperimentConfig(**tiny_settings(**changes))


def found_share(folder, **settings) -> float:
    """R@1 on the validation sessions after training with these settings."""
    dataset = write_dataset(
        folder,
        train=cyclic_sessions(600, seed=1, cycle=CYCLE),
        val=cyclic_sessions(40, seed=2, cycle=CYCLE),
    )
    config = make_config(
        **{
            "embedding_dim": 16,
            "num_blocks": 1,
            "num_uniform_negatives": 8,
            "num_batch_negatives": 4,
            # Nearly all items are inputs of some session of the batch: rejection would leave none.
            "reject_in_batch_items": False,
            "topk_sampling": False,
            "train_batch_size": 20,
            "max_epochs": 3,
            "lr": 2e-2,
            "metrics": ("R@1",),
            "val_metric": "R@1",
            "precision": "float32",
            **settings,
        }
    )
    run = fit if config.model in BASELINES else train
    options = {} if config.model in BASELINES else {"device": CPU}
    return load_checkpoint(run(config, dataset, folder / "run", **options)).metrics["R@1"]


# Of three factors all pairs of values meet, of two factors each value meets half of the others.
MODELS_LOSSES_STYLES = [
    (model, loss, STYLES[(place + number) % 3])
    for place, model in enumerate(MODELS)
    for number, loss in enumerate(LOSSES)
]
SAMPLERS_STYLES_LOGQ = [
    (sampler, style, bool((place + number) % 2))
    for place, sampler in enumerate(SAMPLERS)
    for number, style in enumerate(STYLES)
]


def half_of_the_pairs(models, losses):
    pairs = itertools.product(enumerate(models), enumerate(losses))
    return [(model, loss) for (m, model), (n, loss) in pairs if (m + n) % 2 == 0]


@pytest.mark.parametrize(("model", "loss", "style"), MODELS_LOSSES_STYLES)
def test_every_model_loss_and_sampling_style(tmp_path, model, loss, style):
    settings = {"model": model, "loss": loss, "sampling_style": style, **OF_MODEL.get(model, {})}
    if loss == "gbce":
        settings |= {**PLAIN, "max_epochs": 40 if model == "bert4rec" else 8}
    assert found_share(tmp_path, **settings) >= 0.95


@pytest.mark.parametrize("loss", CATALOGUE_LOSSES)
@pytest.mark.parametrize("model", MODELS)
def test_every_model_and_catalogue_loss(tmp_path, model, loss):
    settings = {"model": model, "loss": loss, **OF_MODEL.get(model, {})}
    found = found_share(tmp_path, num_uniform_negatives=0, num_batch_negatives=0, **settings)
    assert found >= 0.95


@pytest.mark.parametrize(("model", "loss"), half_of_the_pairs(MODELS, [*LOSSES, *CATALOGUE_LOSSES]))
def test_every_model_and_loss_by_cosine(tmp_path, model, loss):
    settings = {"model": model, "loss": loss, "score": "cosine", **OF_MODEL.get(model, {})}
    if loss == "gbce":
        settings |= {**PLAIN, "max_epochs": 40 if model == "bert4rec" else 8}
    elif loss in CATALOGUE_LOSSES:
        settings |= {"num_uniform_negatives": 0, "num_batch_negatives": 0}
    else:
        settings |= {"topk_sampling": True, "topk_sampling_k": 6, "optimizer": "row_adam"}
    assert found_share(tmp_path, **settings) >= 0.95


@pytest.mark.parametrize(("loss", "style"), [*zip(LOSSES, itertools.cycle(STYLES), strict=False)])
def test_session_parallel(tmp_path, loss, style):
    settings = {"loss": loss, "sampling_style": style, "max_epochs": 3, "lr": 4e-2}
    if loss == "gbce":
        settings |= {**PLAIN, "max_epochs": 8}
    found = found_share(tmp_path, model="gru4rec", session_parallel=True, **settings)
    assert found >= 0.95


@pytest.mark.parametrize(("sampler", "style", "logq"), SAMPLERS_STYLES_LOGQ)
def test_every_sampler_and_sampling_style(tmp_path, sampler, style, logq):
    found = found_share(
        tmp_path, negative_sampler=sampler, sampling_style=style, logq_correction=logq
    )
    assert found >= 0.95


@pytest.mark.parametrize(("model", "loss"), half_of_the_pairs(MODELS, sorted({*LOSSES} - {"gbce"})))
def test_top_k_of_a_separate_table_with_a_bias(tmp_path, model, loss):
    """Only the touched rows of the table have gradients."""
    settings = {"model": model, "loss": loss, **OF_MODEL.get(model, {})}
    settings["max_epochs"] = 16 if model == "bert4rec" else 7
    found = found_share(
        tmp_path, topk_sampling=True, topk_sampling_k=6, reuse_item_embeddings=False,
        output_bias=True, optimizer="row_adam", **settings,
    )  # fmt: skip
    assert found >= 0.95


@pytest.mark.parametrize("loss", sorted({*LOSSES} - {"gbce"}))
def test_final_activation(tmp_path, loss):
    settings = {"model": "gru4rec", "loss": loss, **OF_MODEL["gru4rec"]}
    assert found_share(tmp_path, final_activation=True, **settings) >= 0.95


def test_markov(tmp_path):
    """The one baseline that is asked what comes next, not what goes with the history."""
    assert found_share(tmp_path, model="markov") >= 0.95


@pytest.mark.parametrize("name", ["popularity", "mixed"])
@pytest.mark.parametrize("rejecting", ["reject_uniform_session_items", "reject_in_batch_items"])
def test_what_makes_no_sense_is_refused(name, rejecting):
    """The message names the setting to change."""
    with pytest.raises(InputError, match=f"negative_sampler={name}"):
        make_config(
            loss="gbce", negative_sampler=name, num_batch_negatives=0, topk_sampling=False,
            reject_in_batch_items=False,
        )  # fmt: skip
    style = "batchwise" if rejecting == "reject_in_batch_items" else "eventwise"
    with pytest.raises(InputError, match=f"logq_correction .*{rejecting}=True"):
        make_config(
            logq_correction=True, topk_sampling=False, sampling_style=style,
            **{"reject_in_batch_items": False, rejecting: True},
        )  # fmt: skip


@pytest.mark.parametrize("loss", CATALOGUE_LOSSES)
@pytest.mark.parametrize(
    "setting", ["num_uniform_negatives=4", "num_batch_negatives=4", "topk_sampling=True"]
)
def test_losses_of_the_whole_catalogue_refuse_negatives(loss, setting):
    name, _, value = setting.partition("=")
    settings = {"num_uniform_negatives": 0, "num_batch_negatives": 0, "topk_sampling": False}
    with pytest.raises(InputError, match=f"loss={loss} .*{setting}"):
        make_config(loss=loss, **{**settings, name: eval(value)})


@pytest.mark.parametrize(
    ("model", "setting"),
    [
        ("gru4rec", {"num_heads": 2}),
        ("gru4rec", {"key_padding_mask": False}),
        ("gsasrec", {"block": "post-norm"}),
        ("sasrec", {"session_parallel": True}),
        ("sasrec", {"mask_probability": 0.3}),
    ],
)
def test_settings_without_effect_are_refused(model, setting):
    (name,) = setting
    with pytest.raises(InputError, match=rf"{name}=.* has no effect on model={model}"):
        make_config(model=model, **setting)


def test_overfitted_batches_are_learned_by_heart(tmp_path):
    """Training and validation use the same sessions."""
    assert found_share(tmp_path, overfit_batches=2, max_epochs=60) >= 0.95
