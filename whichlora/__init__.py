"""Which base model, LoRA variant and batch size fit a GPU and finish in time: predicted before anything runs.

>>> import whichlora
>>> prediction = whichlora.estimate("meta-llama/Llama-3.1-8B", "rtx-4090", method="qlora", batch_size=2, seq_len=2048)
>>> prediction.verdict.value
'fits'
"""

from whichlora_calibration import Interval, Prediction, Verdict
from whichlora_estimators.errors import BadValue, UnknownName, Unsupported, WhichloraError
from whichlora_estimators.estimate import Estimate, Peak, Times
from whichlora_estimators.gpus import Gpu, all_gpus, find_gpu, gpu_from_fields, search_gpus
from whichlora_estimators.models import ModelShape, all_models, load_model, search_models, shape_from_config
from whichlora_estimators.workload import Workload, workload_from_json

from .api import estimate, make_workload
from .pick import PickResult, Row, pick
from .pickconfig import MethodChoice, PickConfig, Stage1, Stage2, config_from_fields, read_config

__version__ = "0.1.0"

__all__ = [
    "BadValue",
    "Estimate",
    "Gpu",
    "Interval",
    "MethodChoice",
    "ModelShape",
    "Peak",
    "PickConfig",
    "PickResult",
    "Prediction",
    "Row",
    "Stage1",
    "Stage2",
    "Times",
    "UnknownName",
    "Unsupported",
    "Verdict",
    "WhichloraError",
    "Workload",
    "all_gpus",
    "all_models",
    "config_from_fields",
    "estimate",
    "find_gpu",
    "gpu_from_fields",
    "load_model",
    "make_workload",
    "pick",
    "read_config",
    "search_gpus",
    "search_models",
    "shape_from_config",
    "workload_from_json",
]
