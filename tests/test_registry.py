"""What a registered class or function gets of a configuration."""

import pytest
from conftest import tiny_settings

from tron_cli import registry
from tron_cli.config import ExperimentConfig
from tron_cli.errors import InputError

CONFIG = ExperimentConfig(**tiny_settings(loss="bpr-max", bpr_penalty=0.25))


def asks(count_I, other=3, *, bpr_penalty, num_items, lr):
    """Keyword-only parameters are settings, others are not."""


def misspelt(*, embeding_dim=8):
    """A default is no way out, for the setting would never arrive."""


@pytest.fixture
def entry_of(monkeypatch):
    def entry(function):
        monkeypatch.setattr(registry, "load", lambda entry: function)
        return f"here:{function.__name__}"

    return entry


def test_what_is_named_is_handed_over(entry_of):
    found = registry.settings_of(entry_of(asks), CONFIG, num_items=7, lr=3.0)
    assert found == {"bpr_penalty": 0.25, "num_items": 7, "lr": 3.0}


def test_a_parameter_that_is_no_setting_is_named(entry_of):
    with pytest.raises(
        InputError, match=r"here:misspelt .*'embeding_dim'.* did you mean embedding_dim"
    ):
        registry.settings_of(entry_of(misspelt), CONFIG)


@pytest.mark.parametrize(
    "table",
    ["MODELS", "BASELINES", "LOSSES", "CATALOGUE_LOSSES", "SAMPLERS"],
)
def test_every_entry_asks_for_settings_only(table):
    for entry in getattr(registry, table).values():
        more = {"num_items": 5}
        found = registry.settings_of(entry, CONFIG, **more)
        assert found.keys() <= {*vars(CONFIG), *more}
