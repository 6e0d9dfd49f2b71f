"""Laws of the GPU data, of the names that find a card, and of what a process holds beside PyTorch's memory."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from whichlora_estimators import gpus
from whichlora_estimators.errors import BadValue, UnknownName
from whichlora_estimators.gpus import (
    AmbiguousName,
    Gpu,
    all_gpus,
    context_bytes,
    find_gpu,
    gpu_from_fields,
    search_gpus,
)
from whichlora_estimators.units import GIB, MIB

DATA = Path(gpus.__file__).with_name("data")
DOCUMENT = json.loads((DATA / "gpus.json").read_text(encoding="utf-8"))
CARDS = DOCUMENT["cards"]
CONTEXT = json.loads((DATA / "cuda_context.json").read_text(encoding="utf-8"))
DTYPES = ("bf16", "fp16", "tf32", "fp32")

FIELDS = {
    "name": str,
    "aliases": list,
    "shared_names": list,
    "architecture": str,
    "compute_capability": str,
    "segment": str,
    "sm_count": int,
    "boost_clock_hz": int,
    "tensor_clock_hz": int,
    "rate_class": str,
    "matmul_flops_per_s": dict,
    "memory_type": str,
    "nominal_gb": int,
    "total_bytes": int,
    "memory_basis": str,
    "memory_as": str | None,
    "memory_source": str,
    "memory_bus_bits": int,
    "memory_bits_per_s_per_pin": int,
    "hbm_bytes_per_s": int,
    "l2_bytes": int | None,
    "power_w": int | float | None,
    "source": str,
    "as_of": str,
}

# slug: what torch.cuda.get_device_name(), nvidia-smi, Slurm's generic resources and people call it
SPELLINGS = """
    a100-sxm-80gb: NVIDIA A100-SXM4-80GB | A100 SXM4 80 GB | nvidia_a100-sxm4-80gb
    a100-sxm-40gb: NVIDIA A100-SXM4-40GB | A100-SXM4-40GB
    a100-pcie-80gb: NVIDIA A100 80GB PCIe | a100 80gb pci-e | nvidia_a100_80gb_pcie
    a100-pcie-40gb: NVIDIA A100-PCIE-40GB | A100 PCIe 40GB
    t4: Tesla T4 | NVIDIA T4 | tesla_t4
    h100-sxm-80gb: NVIDIA H100 80GB HBM3 | H100 SXM | H100 SXM5 80GB | h100-80gb-hbm3 | nvidia_h100_80gb_hbm3
    h100-pcie-80gb: NVIDIA H100 PCIe | H100 PCIe 80GB
    h100-nvl-94gb: NVIDIA H100 NVL | H100 NVL 94GB
    h200-sxm-141gb: NVIDIA H200 | H200 141GB HBM3e | h200
    h200-nvl-141gb: NVIDIA H200 NVL
    h20-96gb: NVIDIA H20
    gh200-96gb: NVIDIA GH200 480GB | GH200 96GB | Grace Hopper
    b200-180gb: NVIDIA B200
    gb200-186gb: NVIDIA GB200
    l40s: NVIDIA L40S | l40s
    l40: NVIDIA L40
    l4: NVIDIA L4 | L4 24GB
    a10: NVIDIA A10 | a10
    a10g: NVIDIA A10G
    a2: NVIDIA A2
    v100-sxm2-16gb: Tesla V100-SXM2-16GB
    v100-pcie-32gb: Tesla V100-PCIE-32GB
    rtx-4090: 4090 | rtx4090 | RTX 4090 | RTX_4090 | RTX 4090 24GB | rtx 4090 24 gb
    rtx-4090: geforce-rtx-4090 | NVIDIA GeForce RTX 4090 | GeForce(R) RTX(TM) 4090
    rtx-3090: GeForce RTX 3090 | nvidia_geforce_rtx_3090
    rtx-4090-laptop: NVIDIA GeForce RTX 4090 Laptop GPU | 4090 laptop | RTX 4090 Mobile
    rtx-4090-d: NVIDIA GeForce RTX 4090 D | 4090D
    rtx-5090: NVIDIA GeForce RTX 5090
    titan-rtx: NVIDIA TITAN RTX
    quadro-rtx-6000: Quadro RTX 6000
    rtx-a6000: NVIDIA RTX A6000 | A6000 | Quadro RTX A6000
    rtx-a2000-6gb: NVIDIA RTX A2000
    rtx-a2000-12gb: NVIDIA RTX A2000 12GB
    rtx-6000-ada: NVIDIA RTX 6000 Ada Generation | NVIDIA RTX 6000 Ada Gene... | 6000 Ada | RTX 6000 Ada 48GB GDDR6
    rtx-4000-sff-ada: NVIDIA RTX 4000 SFF Ada Generation
    rtx-pro-6000-blackwell-workstation: NVIDIA RTX PRO 6000 Blackwell Workstation Edition
    rtx-pro-6000-blackwell-max-q: NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition | RTX PRO 6000 Max-Q
    rtx-pro-6000-blackwell-server: NVIDIA RTX PRO 6000 Blackwell Server Edition
    rtx-3080-ti: 3080ti
    rtx-3080-12gb: RTX 3080 12GB
    rtx-3080-10gb: rtx3080-10g
    rtx-3080-laptop-16gb: 3080 Laptop 16GB
    rtx-2080-ti: 2080 Ti
    rtx-4070-ti-super: 4070 Ti Super
    rtx-4060-ti-16gb: RTX 4060 Ti 16GB
    rtx-5060-ti-8gb: 5060ti 8gb
    v100-sxm2-32gb: V100 SXM2 32GB
    rtx-a5000: rtx_a5000
"""


def spellings() -> list[tuple[str, str]]:
    rows = (line.strip().split(": ") for line in SPELLINGS.strip().splitlines())
    return [(spelling, slug) for slug, written in rows for spelling in written.split(" | ")]


AMBIGUOUS = {
    "a100": {"a100-pcie-40gb", "a100-sxm-40gb", "a100-pcie-80gb", "a100-sxm-80gb"},
    "a100_80gb": {"a100-pcie-80gb", "a100-sxm-80gb"},
    "A100 SXM": {"a100-sxm-40gb", "a100-sxm-80gb"},
    "NVIDIA A100-SXM...": {"a100-dgx-station", "a100-sxm-40gb", "a100-sxm-80gb"},
    "H100": {"h100-pcie-80gb", "h100-sxm-80gb", "h100-nvl-94gb"},
    "H100 80GB": {"h100-pcie-80gb", "h100-sxm-80gb"},
    "Tesla V100": {"v100-pcie-16gb", "v100-pcie-32gb", "v100-sxm2-16gb", "v100-sxm2-32gb"},
    "RTX 6000": {"quadro-rtx-6000", "rtx-6000-ada", "rtx-pro-6000-blackwell-workstation"},
    "rtx pro 6000": {
        "rtx-pro-6000-blackwell-workstation",
        "rtx-pro-6000-blackwell-max-q",
        "rtx-pro-6000-blackwell-server",
    },
    "NVIDIA GeForce RTX 4060 Ti": {"rtx-4060-ti-8gb", "rtx-4060-ti-16gb"},
    "NVIDIA GeForce RTX 3080": {"rtx-3080-10gb", "rtx-3080-12gb"},
}

CUSTOM = {
    "name": "Modded RTX 4090",
    "compute_capability": "8.9",
    "sm_count": 128,
    "total_bytes": "47.37GiB",
    "hbm_bytes_per_s": "1008GB/s",
    "matmul_flops_per_s": {"fp32": 82.6e12, "bf16": 165.2e12, "fp16": 165.2e12, "tf32": 82.6e12},
}


def each_card() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("slug", CARDS)


def test_there_are_cards_of_every_architecture() -> None:
    """At least 100 cards are known, from Volta to Blackwell, and 60 spellings of them are checked."""
    assert len(all_gpus()) >= 100
    assert len(set(spellings())) >= 60
    assert {gpu.architecture for gpu in all_gpus()} == {"volta", "turing", "ampere", "ada", "hopper", "blackwell"}


@each_card()
def test_a_card_has_every_field(slug: str) -> None:
    """Every card has exactly the fields of the schema, each of its type, and no empty text."""
    card = CARDS[slug]
    assert list(card) == list(FIELDS)
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug)
    for field, kind in FIELDS.items():
        assert isinstance(card[field], kind), field
        assert not isinstance(card[field], str) or card[field].strip(), field
    assert card["segment"] in {"consumer", "workstation", "datacenter", "laptop"}
    assert re.fullmatch(r"20\d\d-\d\d", card["as_of"])
    assert set(card["matmul_flops_per_s"]) == set(DTYPES)


@each_card()
def test_units_are_plausible(slug: str) -> None:
    """Every quantity lies where no other unit would put it."""
    card = CARDS[slug]
    assert 8 <= card["sm_count"] <= 200
    assert 0.8e9 <= card["tensor_clock_hz"] <= card["boost_clock_hz"] <= 3e9
    assert 128e9 <= card["hbm_bytes_per_s"] <= 10e12
    assert card["l2_bytes"] is None or 2 * MIB <= card["l2_bytes"] <= 128 * MIB
    assert card["power_w"] is None or 35 <= card["power_w"] <= 1400
    assert all(rate is None or 4e12 <= rate <= 3e15 for rate in card["matmul_flops_per_s"].values())


@each_card()
def test_rates_are_what_the_chip_can_do(slug: str) -> None:
    """A rate is SMs x FLOP per clock per SM x clock within 1.5%, and null just where the chip has no such product."""
    card = CARDS[slug]
    per_clock = DOCUMENT["flops_per_clock_per_sm"][card["rate_class"]]
    for dtype, rate in card["matmul_flops_per_s"].items():
        if per_clock[dtype] is None:
            assert rate is None
            continue
        clock_hz = card["boost_clock_hz" if dtype == "fp32" else "tensor_clock_hz"]
        assert rate == pytest.approx(card["sm_count"] * per_clock[dtype] * clock_hz, rel=0.015), dtype


@each_card()
def test_bandwidth_is_bus_times_rate(slug: str) -> None:
    """Memory bandwidth is bus width x bits per second per pin within 1%."""
    card = CARDS[slug]
    expected = card["memory_bus_bits"] * card["memory_bits_per_s_per_pin"] / 8
    assert card["hbm_bytes_per_s"] == pytest.approx(expected, rel=0.01)


@each_card()
def test_memory_is_below_nominal(slug: str) -> None:
    """PyTorch sees less than the nominal memory, but at least 91% of it (ECC on GDDR6 takes 6%)."""
    card = CARDS[slug]
    assert 0.91 <= card["total_bytes"] / (card["nominal_gb"] * GIB) < 1


@each_card()
def test_memory_by_rule_follows_its_card(slug: str) -> None:
    """Memory by rule is the share of the nominal size that the named card reports itself, in whole MiB."""
    card = CARDS[slug]
    if card["memory_basis"] == "reported":
        assert card["memory_as"] is None
        return
    assert card["memory_basis"] == "rule"
    like = CARDS[card["memory_as"]]
    assert like["memory_basis"] == "reported"
    assert card["memory_as"] in card["memory_source"]
    expected = card["nominal_gb"] * like["total_bytes"] / like["nominal_gb"]
    assert card["total_bytes"] % MIB == 0
    assert 0 <= expected - card["total_bytes"] < MIB


@each_card()
def test_bf16_needs_compute_capability_8(slug: str) -> None:
    """Tensor cores multiply bf16 and tf32 from compute capability 8.0 on, and fp16 on every card."""
    gpu = find_gpu(slug)
    assert gpu.has_bf16 == (gpu.compute_capability >= (8, 0))
    assert (gpu.matmul_flops_per_s.tf32 is not None) == gpu.has_bf16
    assert gpu.matmul_flops_per_s.fp16 is not None


@pytest.mark.parametrize(
    ("slug", "dtype", "flops_per_s", "source"),
    [
        ("rtx-4090", "bf16", 165.2e12, "Ada whitepaper v2.1, table 2"),
        ("rtx-3090", "fp16", 71e12, "GA102 whitepaper"),
        ("rtx-a6000", "bf16", 154.8e12, "GA102 whitepaper"),
        ("titan-rtx", "fp16", 130.5e12, "Turing whitepaper"),
        ("rtx-2080-ti", "fp16", 53.8e12, "Turing whitepaper, reference card"),
        ("a100-sxm-80gb", "bf16", 312e12, "A100 datasheet"),
        ("a100-pcie-40gb", "tf32", 156e12, "A100 datasheet"),
        ("h100-sxm-80gb", "bf16", 989e12, "H100 datasheet, half of 1979"),
        ("h100-pcie-80gb", "bf16", 756e12, "H100 datasheet, half of 1513"),
        ("h100-nvl-94gb", "bf16", 835e12, "H100 datasheet, half of 1671"),
        ("b200-180gb", "bf16", 2.25e15, "Blackwell datasheet, half of 4.5e15"),
        ("l4", "bf16", 121e12, "L4 datasheet, half of 242"),
        ("l40", "bf16", 181.05e12, "L40 datasheet"),
        ("l40s", "bf16", 362e12, "L40S datasheet"),
        ("a10g", "bf16", 70e12, "A10G datasheet of AWS"),
        ("t4", "fp16", 65e12, "T4 datasheet"),
        ("v100-sxm2-16gb", "fp16", 125e12, "V100 datasheet"),
        ("h20-96gb", "bf16", 148e12, "H20 specification"),
    ],
)
def test_stated_rates(slug: str, dtype: str, flops_per_s: float, source: str) -> None:
    """The dense rates that makers state are the rates of the data, to 0.2%."""
    assert find_gpu(slug).matmul_flops_per_s.for_dtype(dtype) == pytest.approx(flops_per_s, rel=0.002), source


@pytest.mark.parametrize(
    ("slug", "total_gib", "tolerance", "source"),
    [
        ("rtx-6000-ada", 50_865_307_648 / GIB, 0, "unslothai/unsloth-zoo pull request 1053, both interfaces"),
        ("h100-sxm-80gb", 79.179, 0.003, "unsloth banner, torch 2.11"),
        ("a100-sxm-40gb", 39.494, 0.003, "unsloth banner, torch 2.9"),
        ("rtx-5090", 31.36, 0.02, "out-of-memory messages"),
        ("b200-180gb", 178.35, 0.01, "out-of-memory messages"),
        ("t4", 14.563, 0.003, "unsloth banner, torch 2.11"),
    ],
)
def test_reported_memory(slug: str, total_gib: float, tolerance: float, source: str) -> None:
    """Two independent reports of one card's memory agree with the data."""
    assert find_gpu(slug).total_bytes / GIB == pytest.approx(total_gib, abs=tolerance), source


def test_memory_counts_are_honest() -> None:
    """Most cards carry a memory figure that somebody's PyTorch or CUDA reported."""
    reported = sum(card["memory_basis"] == "reported" for card in CARDS.values())
    assert reported >= 0.6 * len(CARDS)


def test_a_product_without_tensor_cores_counts_at_the_fp32_rate() -> None:
    """bf16 on a T4 counts at the fp32 rate; an unknown dtype is refused."""
    rates = find_gpu("t4").matmul_flops_per_s
    assert rates.for_dtype("bf16") == rates.fp32 == rates.for_dtype("tf32")
    with pytest.raises(UnknownName, match="fp8"):
        rates.for_dtype("fp8")


# --- names ---


@each_card()
def test_every_spelling_of_a_card_finds_it(slug: str) -> None:
    """Slug and aliases find their card and no other, in any case and with any separators."""
    for spelling in (slug, *CARDS[slug]["aliases"]):
        for written in (spelling, spelling.upper(), spelling.replace("-", "_"), spelling.replace("-", " ")):
            assert find_gpu(written).slug == slug, written


@each_card()
def test_a_device_name_finds_its_card_or_asks(slug: str) -> None:
    """The device name finds its card, or asks between the cards that share it; the reported memory then tells."""
    card = CARDS[slug]
    sharing = {other for other, record in CARDS.items() if record["name"] == card["name"]}
    if sharing == {slug}:
        assert find_gpu(card["name"]).slug == slug
    else:
        with pytest.raises(AmbiguousName) as caught:
            find_gpu(card["name"])
        assert set(caught.value.candidates) == sharing
    assert find_gpu(card["name"], reported_bytes=card["total_bytes"]).slug == slug


@each_card()
def test_a_shared_name_asks(slug: str) -> None:
    """A name that cards share is refused with the list of those that go by it, this one among them."""
    for name in CARDS[slug]["shared_names"]:
        with pytest.raises(AmbiguousName) as caught:
            find_gpu(name)
        assert slug in caught.value.candidates


@pytest.mark.parametrize(("spelling", "slug"), spellings())
def test_spellings(spelling: str, slug: str) -> None:
    """Names of torch, nvidia-smi, Slurm and people find the card that they mean."""
    assert find_gpu(spelling).slug == slug


@pytest.mark.parametrize(("name", "candidates"), AMBIGUOUS.items())
def test_ambiguous_names_ask(name: str, candidates: set[str]) -> None:
    """A name that fits several cards is refused with exactly those."""
    with pytest.raises(AmbiguousName) as caught:
        find_gpu(name)
    assert set(caught.value.candidates) == candidates
    assert all(slug in str(caught.value) for slug in candidates)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "  ",
        "...",
        "rtx",
        "nvidia",
        "GeForce",
        "24GB",
        "MI300X",
        "RTX 4090 48GB",
        "A100 24GB",
        "RTX 5095",
        "A10 G 7",
        "GTX 1080",
    ],
)
def test_unknown_names_are_refused(name: str) -> None:
    """A name of no known card, or of one with another memory, is unknown and never guessed."""
    with pytest.raises(UnknownName):
        find_gpu(name)


def test_an_unknown_name_tells_the_nearest() -> None:
    """A mistyped name is answered with the card that looks most like it."""
    with pytest.raises(UnknownName) as caught:
        find_gpu("rtx-40900")
    assert caught.value.nearest[0] == "rtx-4090"


def test_reported_memory_that_fits_no_card_does_not_choose() -> None:
    """A reported memory that none of the candidates has leaves the name ambiguous."""
    with pytest.raises(AmbiguousName):
        find_gpu("NVIDIA GeForce RTX 3080", reported_bytes=20 * GIB)


def test_search_finds_by_every_word() -> None:
    """A search gives the cards with a word that begins with each word sought, and every card for none."""
    assert search_gpus("") == all_gpus()
    assert {gpu.slug for gpu in search_gpus("hopper 80GB")} == {"h100-pcie-80gb", "h100-sxm-80gb"}
    assert {gpu.segment for gpu in search_gpus("ada laptop sm89")} == {"laptop"}
    assert search_gpus("no such card") == ()


# --- custom cards ---


def test_a_custom_card_takes_its_fields() -> None:
    """A custom card has the values that were given, with units converted, and names itself by its slug."""
    gpu = gpu_from_fields(CUSTOM)
    assert gpu.slug == "modded-rtx-4090"
    assert gpu.compute_capability == (8, 9)
    assert gpu.architecture == "ada"
    assert gpu.total_bytes == int(47.37 * GIB)
    assert gpu.hbm_bytes_per_s == 1008e9
    assert gpu.matmul_flops_per_s.for_dtype("bf16") == 165.2e12
    assert (gpu.memory_basis, gpu.l2_bytes, gpu.power_w) == ("given", None, None)


def test_a_known_card_can_be_given_as_fields() -> None:
    """Describing a known card by its fields gives its numbers again."""
    for known in all_gpus():
        rates = {dtype: getattr(known.matmul_flops_per_s, dtype) for dtype in DTYPES}
        major, minor = known.compute_capability
        fields = {key: getattr(known, key) for key in ("slug", "name", "sm_count", "total_bytes", "hbm_bytes_per_s")}
        fields |= {key: getattr(known, key) for key in ("architecture", "segment", "l2_bytes", "power_w", "source")}
        custom = gpu_from_fields({**fields, "compute_capability": [major, minor], "matmul_flops_per_s": rates})
        for key in (*fields, "compute_capability", "matmul_flops_per_s"):
            assert getattr(custom, key) == getattr(known, key), (known.slug, key)


@pytest.mark.parametrize(
    "change",
    [
        {"name": None},
        {"name": " "},
        {"name": 4090},
        {"colour": "green"},
        {"sm_count": 0},
        {"sm_count": 12.5},
        {"sm_count": True},
        {"sm_count": "many"},
        {"total_bytes": 24},
        {"total_bytes": "24 apples"},
        {"total_bytes": float("nan")},
        {"hbm_bytes_per_s": 1008},
        {"hbm_bytes_per_s": -1e12},
        {"l2_bytes": 72},
        {"power_w": 0},
        {"compute_capability": "8.8"},
        {"compute_capability": 4},
        {"compute_capability": "7.5"},  # which has no tensor cores for the bf16 rate given
        {"matmul_flops_per_s": 165.2e12},
        {"matmul_flops_per_s": {"bf16": 165.2e12}},
        {"matmul_flops_per_s": {"fp32": 82.6}},
        {"matmul_flops_per_s": {"fp32": "fast"}},
        {"matmul_flops_per_s": {"fp32": 82.6e12, "fp8": 330e12}},
    ],
    ids=str,
)
def test_bad_fields_are_refused(change: dict[str, object]) -> None:
    """A custom card with a missing, unknown or senseless field is refused, saying what to do."""
    with pytest.raises(BadValue) as caught:
        gpu_from_fields({**CUSTOM, **change})
    assert caught.value.todo


# --- context ---


def _observed() -> tuple[list[Gpu], np.ndarray, np.ndarray]:
    rows = CONTEXT["observations"]
    cards = [find_gpu(row["gpu"]) for row in rows]
    threads = [gpu.sm_count * CONTEXT["threads_per_sm"]["{}.{}".format(*gpu.compute_capability)] for gpu in cards]
    beside = [row["process_bytes"] - row["allocated_bytes"] - row["unallocated_bytes"] for row in rows]
    return cards, np.array([np.ones(len(threads)), threads]).T, np.array(beside, dtype=float)


def test_the_context_line_is_the_fit_of_its_readings() -> None:
    """The stored line is the least-squares line of the stored readings, and context_bytes lies on it."""
    cards, threads, beside = _observed()
    (base, slope), *_ = np.linalg.lstsq(threads, beside, rcond=None)
    assert CONTEXT["base_bytes"] == pytest.approx(base, abs=1)
    assert CONTEXT["bytes_per_thread"] == pytest.approx(slope, abs=0.01)
    for gpu, row in zip(cards, threads, strict=True):
        assert context_bytes(gpu) == pytest.approx(base + slope * row[1], abs=4096)


def test_the_context_of_a_held_out_card_is_foretold() -> None:
    """A line without a card's readings misses them by 35 MiB in the mean and 105 MiB at most."""
    cards, threads, beside = _observed()
    misses = []
    for slug in {gpu.slug for gpu in cards}:
        held_out = np.array([gpu.slug == slug for gpu in cards])
        line, *_ = np.linalg.lstsq(threads[~held_out], beside[~held_out], rcond=None)
        misses.extend(abs(threads[held_out] @ line - beside[held_out]))
    assert np.mean(misses) <= 35 * MIB
    assert np.max(misses) <= 105 * MIB


def test_readings_say_where_they_are_from() -> None:
    """Every reading is positive, has a source, and the readings cover every architecture."""
    cards, _, beside = _observed()
    assert (beside > 50 * MIB).all()
    assert all(row["source"].strip() for row in CONTEXT["observations"])
    assert {gpu.architecture for gpu in cards} == {gpu.architecture for gpu in all_gpus()}


@each_card()
def test_every_card_has_a_context(slug: str) -> None:
    """The context of any card is between 60 MiB and 1 GiB, and less than a sixteenth of its memory."""
    gpu = find_gpu(slug)
    assert 60 * MIB <= context_bytes(gpu) <= min(GIB, gpu.total_bytes / 16)


def test_a_custom_card_has_the_context_of_its_chip() -> None:
    """Context follows the chip and not its memory: a modded card holds what the original does."""
    assert context_bytes(gpu_from_fields(CUSTOM)) == context_bytes(find_gpu("rtx-4090"))
