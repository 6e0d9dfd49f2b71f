"""Methods of PEFT's MetaMathQA comparison: the configurations of its experiments, and what a step of each took on an L40S.

huggingface/peft, method_comparison/MetaMathQA: experiments/*/adapter_config.json and results/*.json at 51c2ff6
(2026-07-20). A step is the mean over 20 windows of 250 steps ("train time"), run on 2026-07-14 and -15 with PyTorch
2.13.0, Transformers 5.13.1 and PEFT 0.19.2.dev0 (d787f51).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

#: The methods that the project is judged by; no constant may be chosen on their times.
JUDGED = ("ia3", "lora", "dora", "adalora", "lora-fa", "full")


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """A class of PEFT's configurations with its fields ("" trains the whole model), and the measured milliseconds a step.

    `trained` is the published number of trained parameters, where it is checked.
    """

    config: str
    measured_ms: float
    fields: dict[str, Any] = field(default_factory=dict)
    trained: int | None = None


_QV = ["q_proj", "v_proj"]
_LORA = {"r": 32, "lora_alpha": 64, "target_modules": _QV}

EXPERIMENTS = {
    "ia3": Experiment(config="IA3Config", measured_ms=116.2),
    "lora": Experiment(config="LoraConfig", measured_ms=117.0, fields=_LORA, trained=9_175_040),
    "dora": Experiment(config="LoraConfig", measured_ms=141.3, fields=_LORA | {"use_dora": True}, trained=9_289_728),
    "adalora": Experiment(
        config="AdaLoraConfig",
        measured_ms=142.5,
        fields={"init_r": 64, "target_r": 32, "total_step": 5000, "tinit": 200, "tfinal": 500},
        trained=18_353_664,
    ),
    "lora-fa": Experiment(config="LoraConfig", measured_ms=155.1, fields=_LORA),
    "full": Experiment(config="", measured_ms=362.6, trained=3_212_749_824),
    "lora-mlp": Experiment(
        config="LoraConfig",
        measured_ms=133.1,
        fields={"r": 10, "lora_alpha": 20, "target_modules": ["gate_proj", "up_proj", "down_proj"]},
    ),
    "ln-tuning": Experiment(config="LNTuningConfig", measured_ms=105.4),
    "trainable-tokens": Experiment(
        config="TrainableTokensConfig", measured_ms=112.7, fields={"token_indices": [128000, 128001]}
    ),
    "miss": Experiment(config="MissConfig", measured_ms=112.3, fields={"r": 64, "mini_r": 1}),
    "road": Experiment(config="RoadConfig", measured_ms=122.1, fields={"group_size": 64, "variant": "road_2"}),
    "oft": Experiment(
        config="OFTConfig", measured_ms=147.3, fields={"r": 32, "oft_block_size": 0, "target_modules": _QV}
    ),
    "delora": Experiment(config="DeloraConfig", measured_ms=133.8, fields={"r": 32, "delora_lambda": 15}),
    "vblora": Experiment(
        config="VBLoRAConfig",
        measured_ms=155.0,
        fields={"r": 4, "num_vectors": 256, "vector_length": 256, "topk": 2, "target_modules": _QV},
    ),
    "adaption-prompt": Experiment(
        config="AdaptionPromptConfig", measured_ms=138.3, fields={"adapter_len": 100, "adapter_layers": 28}
    ),
    "p-tuning": Experiment(
        config="PromptEncoderConfig",
        measured_ms=115.8,
        fields={"num_virtual_tokens": 20, "encoder_hidden_size": 3072, "encoder_reparameterization_type": "MLP"},
    ),
    "beft": Experiment(config="BeftConfig", measured_ms=104.1, fields={"target_modules": ["v_proj"]}),
    "pvera": Experiment(config="PveraConfig", measured_ms=133.6, fields={"r": 256, "d_initial": 0.1}),
    "gralora": Experiment(config="GraloraConfig", measured_ms=137.1, fields={"r": 32, "alpha": 64, "gralora_k": 2}),
    "tinylora": Experiment(config="TinyLoraConfig", measured_ms=121.4, fields={"r": 2, "u": 64}),
}
