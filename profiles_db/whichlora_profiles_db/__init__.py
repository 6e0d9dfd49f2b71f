"""What was measured, by whom and where, kept for good: the measurement, and the store of them in one DuckDB file."""

from .environment import Environment, environment_from_json, environment_to_json, local_environment
from .errors import BadPack, NotAStore, StoreBusy, StoreError, StoreTooNew, UnknownMeasurement
from .filters import Filters
from .location import default_path
from .measurement import Measurement, PhasePeak, measurement_from_json, measurement_to_json
from .packs import Manifest, Pack, export_pack, read_manifest, read_pack, write_pack
from .publications import PublishedFacts, published, published_facts
from .store import GroupStats, Store, StoreStats, open_store
from .times import TimeStats
from .workload_form import config_id, workload_id, workload_to_json

__all__ = [
    "BadPack",
    "Environment",
    "Filters",
    "GroupStats",
    "Manifest",
    "Measurement",
    "NotAStore",
    "Pack",
    "PhasePeak",
    "PublishedFacts",
    "Store",
    "StoreBusy",
    "StoreError",
    "StoreStats",
    "StoreTooNew",
    "TimeStats",
    "UnknownMeasurement",
    "config_id",
    "default_path",
    "environment_from_json",
    "environment_to_json",
    "export_pack",
    "local_environment",
    "measurement_from_json",
    "measurement_to_json",
    "open_store",
    "published",
    "published_facts",
    "read_manifest",
    "read_pack",
    "workload_id",
    "workload_to_json",
    "write_pack",
]
