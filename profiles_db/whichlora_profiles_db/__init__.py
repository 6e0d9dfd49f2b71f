"""What was measured, by whom and where, kept for good: the measurement, and the store of them in one DuckDB file."""

from .environment import Environment, environment_from_json, environment_to_json, local_environment
from .errors import BadPack, NotAStore, StoreBusy, StoreError, StoreTooNew, UnknownMeasurement
from .filters import Filters
from .imports import CheckedPack, Imported, check_pack, import_pack
from .location import default_path
from .measurement import Measurement, PhasePeak, measurement_from_json, measurement_to_json
from .merge import Merged, merge_store
from .pack_checks import Rejected
from .packs import Manifest, Pack, export_pack, read_manifest, read_pack, write_pack
from .publications import PublishedFacts, published, published_facts
from .remote_stats import remote_stats
from .remotes import Remote, RemoteError, open_remote
from .store import GroupStats, Store, StoreStats, open_store
from .sync import Pulled, Pushed, pull, push
from .times import TimeStats
from .workload_form import config_id, workload_id, workload_to_json

__all__ = [
    "BadPack",
    "CheckedPack",
    "Environment",
    "Filters",
    "GroupStats",
    "Imported",
    "Manifest",
    "Measurement",
    "Merged",
    "NotAStore",
    "Pack",
    "PhasePeak",
    "PublishedFacts",
    "Pulled",
    "Pushed",
    "Rejected",
    "Remote",
    "RemoteError",
    "Store",
    "StoreBusy",
    "StoreError",
    "StoreStats",
    "StoreTooNew",
    "TimeStats",
    "UnknownMeasurement",
    "check_pack",
    "config_id",
    "default_path",
    "environment_from_json",
    "environment_to_json",
    "export_pack",
    "import_pack",
    "local_environment",
    "measurement_from_json",
    "measurement_to_json",
    "merge_store",
    "open_remote",
    "open_store",
    "published",
    "published_facts",
    "pull",
    "push",
    "read_manifest",
    "read_pack",
    "remote_stats",
    "workload_id",
    "workload_to_json",
    "write_pack",
]
