"""Measurements to test with: one that fills every field, and a strategy for arbitrary ones."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from hypothesis import strategies as st

from whichlora_estimators.workload import Workload
from whichlora_profiles_db import Environment, Measurement, PhasePeak, TimeStats

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-05,
    "architectures": ["LlamaForCausalLM"],
    "rope_scaling": {"factor": 32.0, "type": "yarn"},
    "sliding_window": None,
    "tie_word_embeddings": True,
}
WORKLOAD = Workload(
    model="meta-llama/Llama-3.2-1B",
    config=CONFIG,
    id="line-1",
    task="seq2seq",
    phase="generate",
    method="dora",
    rank=8,
    targets=("q_proj", "v_proj"),
    target_parameters=("experts.down_proj",),
    rank_pattern={"v_proj": 4},
    exclude_modules=("k_proj",),
    layers_to_transform=(0, 2),
    layer_replication=((0, 2), (1, 3)),
    trainable_tokens=3,
    modules_to_save=("lm_head",),
    ensure_weight_tying=True,
    bias="lora_only",
    lora_bias=True,
    num_virtual_tokens=30,
    encoder_hidden_size=96,
    prefix_projection=True,
    dropout=0.05,
    precision="fp16-mixed",
    quantization="nf4",
    double_quantization=False,
    kbit_preparation=False,
    checkpointing=True,
    reentrant=True,
    attention="eager",
    optimizer="adamw-8bit",
    accumulation=4,
    clip_grad_norm=1.0,
    output_kept=False,
    previous_kept=True,
    batch_size=3,
    seq_len=77,
    target_len=5,
    padded=True,
    prefill_len=99,
    decode_len=7,
    cache="static",
    last_logits_only=False,
)
ENVIRONMENT = Environment(
    gpu="rtx-4090",
    gpu_name="NVIDIA GeForce RTX 4090",
    gpu_total_bytes=25_386_352_640,
    compute_capability=(8, 9),
    driver_version="570.86.15",
    host_name="node-7",
    cpu_name="A processor",
    user_name="somebody",
    os_name="Linux-6.1",
    python_version="3.11.7",
    whichlora_version="0.1.0",
    versions={"torch": "2.14.1", "cuda": "13.0", "peft": "0.21.2"},
)
# Every field differs from its default.
FULL = Measurement(
    workload=WORKLOAD,
    environment=ENVIRONMENT,
    evidence="measured",
    device="cuda",
    outcome="oom",
    measured_at=datetime(2026, 3, 1, 12, 30, 15, 123456, tzinfo=timezone.utc),
    error="CUDA out of memory.\nTried to allocate 2.00 GiB",
    trainable_params=1_000,
    weights_bytes=2_000,
    model_bytes=3_000,
    allocated_peak_bytes=4_000,
    reserved_peak_bytes=5_000,
    process_bytes=6_000,
    managed_peak_bytes=7_000,
    phase_peaks={"load": PhasePeak(allocated_peak_bytes=1_500), "backward": PhasePeak(reserved_peak_bytes=4_500)},
    step=TimeStats(samples_s=(0.25, 0.125, 1 / 3)),
    prefill=TimeStats(mean_s=0.5),
    decode_per_token=TimeStats(min_s=0.001, median_s=0.002, max_s=0.004),
    source="a paper, table 3",
    notes="nothing of note",
)
PLAIN = Measurement(
    workload=Workload(model="m", config={}),
    environment=Environment(),
    evidence="rehearsed",
    device="null",
    outcome="ok",
    measured_at=datetime(2026, 1, 1, tzinfo=timezone.utc),
)


def numbered(number: int, **changes: Any) -> Measurement:
    """Return a measurement of its own for every number."""
    return PLAIN.with_(notes=f"number {number}", **changes)


_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
configs = st.dictionaries(st.text(), _json, max_size=4)
workloads = st.builds(
    Workload,
    model=st.text(min_size=1),
    config=configs,
    id=st.text(),
    targets=st.none() | st.just("all-linear") | st.lists(st.text(), min_size=1, max_size=3).map(tuple),
    dropout=st.just(0) | st.floats(0, 0.99),
    rank=st.integers(1, 2**40),
    target_len=st.none() | st.integers(1, 9),
    padded=st.booleans(),
)
_name = st.none() | st.text(min_size=1)
environments = st.builds(
    Environment,
    **dict.fromkeys(("gpu", "gpu_name", "driver_version", "host_name", "cpu_name", "user_name", "os_name"), _name),
    gpu_total_bytes=st.none() | st.integers(1, 2**63 - 1),
    compute_capability=st.none() | st.tuples(st.integers(0, 99), st.integers(0, 99)),
    versions=st.dictionaries(st.text(min_size=1), st.text(min_size=1), max_size=3),
)
_seconds = st.floats(min_value=0, exclude_min=True, allow_infinity=False, max_value=1e300)
times = st.lists(_seconds, min_size=1, max_size=4).map(lambda samples: TimeStats(samples_s=tuple(samples)))
times |= _seconds.map(lambda mean_s: TimeStats(mean_s=mean_s))
_bytes = st.none() | st.integers(1, 2**63 - 1)
_peaks: st.SearchStrategy[dict[str, Any]] = st.tuples(st.integers(1, 2**62), st.integers(0, 2**62 - 1)).map(
    lambda drawn: {"allocated_peak_bytes": drawn[0], "reserved_peak_bytes": drawn[0] + drawn[1]}
)


@st.composite
def measurements(draw: st.DrawFn) -> Measurement:
    """Draw any measurement that there can be."""
    device = draw(st.sampled_from(("null", "cuda", "cpu")))
    evidence = "rehearsed" if device == "null" else draw(st.sampled_from(("measured", "published")))
    outcome = draw(st.sampled_from(("ok", "oom", "failed")))
    moments = st.datetimes(timezones=st.sampled_from((timezone.utc,)) | st.timezones())
    moments = moments.filter(lambda moment: 2 < moment.year < 9998)
    return Measurement(
        workload=draw(workloads),
        environment=draw(environments),
        evidence=evidence,
        device=device,
        outcome=outcome,
        measured_at=draw(st.none() | moments if evidence == "published" else moments),
        error="" if outcome == "ok" else draw(st.text()),
        trainable_params=draw(st.none() | st.integers(0, 2**63 - 1)),
        weights_bytes=draw(_bytes),
        model_bytes=draw(_bytes),
        process_bytes=draw(_bytes),
        managed_peak_bytes=draw(st.none() | st.integers(0, 2**40)),
        phase_peaks=draw(
            st.dictionaries(st.text(min_size=1), _peaks.map(lambda peaks: PhasePeak(**peaks)), max_size=2)
        ),
        step=draw(st.none() | times) if device != "null" else None,
        prefill=draw(st.none() | times) if device != "null" else None,
        source=draw(st.text(min_size=1)),
        notes=draw(st.text()),
        **draw(st.just({}) | _peaks),
    )
