"""What recipes take for granted against the config classes of Transformers."""

from __future__ import annotations

from typing import Any

import pytest

from whichlora_estimators.families import all_families

FAMILIES = ("bert", "bloom", "falcon", "gpt2", "gpt_neox", "mt5", "opt", "roberta", "t5", "xlm-roberta")


@pytest.mark.stack
@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults_are_those_of_the_config_class(model_type: str) -> None:
    """A key that config.json leaves out has the value that Transformers gives it."""
    import transformers

    real = transformers.AutoConfig.for_model(model_type)
    assert {key: getattr(real, key) for key in all_families()[model_type].defaults} == all_families()[
        model_type
    ].defaults


@pytest.mark.stack
@pytest.mark.parametrize("model_type", FAMILIES)
def test_default_targets_are_those_of_peft(model_type: str) -> None:
    """Targets that nobody names are those that PEFT adapts."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TARGETS

    assert set(TARGETS[model_type]) == set(all_families()[model_type].default_targets)


@pytest.mark.stack
@pytest.mark.parametrize("model_type", FAMILIES)
def test_aliases_are_those_of_the_config_class(model_type: str) -> None:
    """Another spelling of a key means what Transformers takes it for."""
    import transformers

    config_class: Any = type(transformers.AutoConfig.for_model(model_type))
    aliases = dict(all_families()[model_type].aliases)
    if aliases.pop("n_embed", None):
        assert config_class(n_embed=256).hidden_size == 256
    assert aliases == config_class.attribute_map
