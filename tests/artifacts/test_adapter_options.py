"""Options of PEFT that training and recovery refuse, for the same reasons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from loram_ray.artifacts.adapter import CONFIG_FILE, Adapter
from loram_ray.config import LoraConfig
from loram_ray.errors import LoramError
from loram_ray.peft_options import NOT_RECOVERED

CHOSEN: dict[str, Any] = {
    "bias": "all",
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [1],
    "layer_replication": [[0, 1]],
    "target_parameters": ["weight"],
    "alora_invocation_tokens": [1],
    **{name: {"some": 1} for name in NOT_RECOVERED if name.endswith("_config")},
}


@pytest.mark.parametrize("option", NOT_RECOVERED)
def test_training_refuses_what_cannot_be_recovered(option: str) -> None:
    with pytest.raises(ValidationError) as caught:
        LoraConfig.model_validate({option: CHOSEN.get(option, True)})
    assert f"{option} cannot be recovered: {NOT_RECOVERED[option]}; remove" in str(caught.value)


@pytest.mark.parametrize("option", NOT_RECOVERED)
def test_recovery_refuses_what_training_refuses(option: str, tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 8, option: CHOSEN.get(option, True)}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(LoramError) as caught:
        Adapter(tmp_path, "recover.adapter")
    assert f"trained with {option} = " in str(caught.value)
    assert f"cannot be recovered: {NOT_RECOVERED[option]}; train" in str(caught.value)


@pytest.mark.parametrize("value", [None, False, "none", {}, []])
def test_options_that_are_off_are_no_reason(value: object, tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"peft_type": "LORA", "loftq_config": {}}))
    with pytest.raises(LoramError, match=r"adapter_model\.safetensors"):
        Adapter(tmp_path, "recover.adapter")
    with pytest.raises(ValidationError) as caught:
        LoraConfig.model_validate({"use_dora": value, "r": 0})
    assert "cannot be recovered" not in str(caught.value)
