"""Settings that a registered class or function receives from a configuration."""

import pytest
import torch
from helpers.datasets import tiny_settings

from tron_cli import registry
from tron_cli.config import ExperimentConfig
from tron_cli.errors import InputError
from tron_cli.training.optim import build_optimizer, gradients_are_sparse

# Owned by what the batches of the network ask for.
NOT_BUILT_WITH = {"mask_probability"}
CONFIG = ExperimentConfig(**tiny_settings(loss="bpr-max", bpr_penalty=0.25))


def asks(count_I, other=3, *, bpr_penalty, num_items, lr):
    """Keyword-only parameters are settings, others are not."""


def misspelt(*, embeding_dim=8):
    """A default is no way out, for the setting would never arrive."""


@pytest.fixture
def entry_of(monkeypatch):
    def entry(function):
        monkeypatch.setattr(registry, "load", lambda entry: function)
        return registry.Entry(f"here:{function.__name__}")

    return entry


def test_what_is_named_is_handed_over(entry_of):
    found = registry.settings_of(entry_of(asks), CONFIG, num_items=7, lr=3.0)
    assert found == {"bpr_penalty": 0.25, "num_items": 7, "lr": 3.0}


def test_a_parameter_that_is_no_setting_is_named(entry_of):
    with pytest.raises(
        InputError, match=r"here:misspelt .*'embeding_dim'.* did you mean embedding_dim"
    ):
        registry.settings_of(entry_of(misspelt), CONFIG)


class Base:
    def __init__(self, *, num_items, lr):
        pass


class Extended(Base):
    def __init__(self, *, bpr_penalty, **settings):
        super().__init__(**settings)


def test_a_class_needs_also_what_it_passes_on_to_the_one_that_it_extends(entry_of):
    found = registry.settings_of(entry_of(Extended), CONFIG, num_items=7)
    assert found == {"bpr_penalty": 0.25, "num_items": 7, "lr": CONFIG.lr}


@pytest.mark.parametrize(
    "table",
    ["MODELS", "BASELINES", "LOSSES", "CATALOGUE_LOSSES", "SAMPLERS"],
)
def test_every_entry_asks_for_settings_only(table):
    for entry in getattr(registry, table).values():
        more = {"num_items": 5}
        found = registry.settings_of(entry, CONFIG, **more)
        assert found.keys() <= {*vars(CONFIG), *more}


@pytest.mark.parametrize("key", ["model", "loss", "negative_sampler"])
def test_an_entry_owns_what_it_asks_for_of_what_only_some_have(key):
    """A setting that an entry needs but does not own would be refused; others would be ignored."""
    entries = registry.REGISTERED[key]
    only_some_have = {name for entry in entries.values() for name in entry.owns}
    for name, entry in entries.items():
        asked = registry.settings_of(entry, CONFIG, num_items=5).keys()
        assert set(entry.owns) - NOT_BUILT_WITH == asked & only_some_have, name


def test_a_model_may_own_a_setting_of_another_one(monkeypatch):
    """num_heads is an example; the configuration needs no line for it."""
    settings = tiny_settings(model="gru4rec", num_heads=2)
    with pytest.raises(InputError, match=r"num_heads=2 is a setting of .* no effect on"):
        ExperimentConfig(**settings)
    own = registry.Entry("tron_cli.models.gru4rec:GRU4Rec", owns=("num_heads",))
    monkeypatch.setitem(registry.REGISTERED["model"], "gru4rec", own)
    assert ExperimentConfig(**settings).num_heads == 2


def test_every_optimizer_is_built_by_name():
    for name, entry in registry.OPTIMIZERS.items():
        found = build_optimizer(name, [torch.nn.Parameter(torch.zeros(3, 2))], lr=0.1)
        assert type(found) is registry.load(entry)
        assert gradients_are_sparse(name) == (name in ("row_adam", "adagrad"))
        assert ExperimentConfig(**tiny_settings(optimizer=name)).optimizer == name
