"""Packs that must not enter a store, made one way each: two hundred and more."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import tempfile
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from functools import cache
from pathlib import Path
from typing import Any

import duckdb

from whichlora_estimators.workload import Workload
from whichlora_profiles_db import Measurement, PhasePeak, TimeStats, write_pack
from whichlora_profiles_db.packs import FORMAT, KEY, PACK_COLUMNS

from .records import ENVIRONMENT, FULL, numbered

Maker = Callable[[Path], object]
GOOD = [FULL, *(numbered(number, environment=ENVIRONMENT) for number in range(5))]
FINE = FULL.with_(outcome="ok", error="", notes="fine")
TEXTS = [name for name, kind in PACK_COLUMNS.items() if kind == "VARCHAR"]
NUMBERS = [name for name, kind in PACK_COLUMNS.items() if kind in ("BIGINT", "DOUBLE")]
LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def altered(
    sql: str, *, manifest: dict[str, Any] | bytes | None = None, order: str = "id", sizes: int = 100_000
) -> Maker:
    """Return what writes a good pack's rows (table `good`) as `sql` selects them, under a manifest that fits them.

    `manifest` replaces fields of it, or all of it.
    """

    def make(path: Path) -> None:
        good = path.with_name("good.parquet")
        good.write_bytes(_good())
        with duckdb.connect(config={"threads": 1}) as connection:
            connection.execute(f"CREATE TABLE good AS SELECT * FROM '{good}'")
            good.unlink()
            connection.execute(f"CREATE TABLE bad AS {sql}")
            content = manifest if isinstance(manifest, bytes) else _manifest(connection, manifest or {})
            text = content.decode().replace("'", "''")
            connection.execute(
                f"COPY (SELECT * FROM bad ORDER BY {order}) TO '{path}' "
                f"(FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE {sizes}, KV_METADATA {{{KEY}: '{text}'}})"
            )

    return make


@cache
def _good() -> bytes:
    """Return the bytes of a good pack."""
    with tempfile.TemporaryDirectory() as folder:
        return make(GOOD, Path(folder) / "good").read_bytes()


def _manifest(connection: duckdb.DuckDBPyConnection, changes: dict[str, Any]) -> bytes:
    def fetch(sql: str) -> list[tuple[Any, ...]]:
        try:
            return connection.execute(sql).fetchall()
        except duckdb.Error:  # a column that was taken out
            return []

    ids = [str(id_) for (id_,) in fetch("SELECT id FROM bad ORDER BY id LIMIT 1000")]
    counts = {name: dict(fetch(f"SELECT {name}, count(*) FROM bad GROUP BY 1")) for name in ("evidence", "outcome")}
    fields = {
        "rows": fetch("SELECT count(*) FROM bad")[0][0],
        "ids_sha256": hashlib.sha256("".join(f"{id_}\n" for id_ in ids).encode()).hexdigest(),
        "counts": counts,
        "with_names": False,
        "producer": "somebody",
        "format": FORMAT,
        "schema": 1,
    }
    return json.dumps({**fields, **changes}, default=str).encode()


def measured(**changes: Any) -> Maker:
    """Return what writes a pack, with right hashes and all, of a measurement that cannot be true."""
    return lambda path: write_pack([*GOOD, FINE.with_(**changes)], path)


def environment(**changes: Any) -> Maker:
    """Return what writes a pack of a measurement in an environment that cannot be."""
    return measured(environment=dataclasses.replace(ENVIRONMENT, **changes))


def damaged(change: Callable[[bytes], bytes]) -> Maker:
    """Return what writes a good pack's bytes, changed."""

    def make(path: Path) -> None:
        path.write_bytes(change(_good()))

    return make


def cut_at(share: float) -> Maker:
    """Return what writes the first part of a good pack."""
    return damaged(lambda content: content[: int(len(content) * share)])


def scribbled(share: float) -> Maker:
    """Return what writes a good pack with 24 of its bytes overwritten."""

    def change(content: bytes) -> bytes:
        start = int((len(content) - 24) * share)
        return content[:start] + random.Random(share).randbytes(24) + content[start + 24 :]

    return damaged(change)


def set_to(column: str, value: str) -> Maker:
    """Return what writes a good pack with one column replaced by an SQL expression."""
    return altered(f'SELECT * REPLACE (({value})::{PACK_COLUMNS[column]} AS "{column}") FROM good')


def in_one_row(column: str, value: str) -> Maker:
    """Return what replaces one column of the first row alone."""
    replaced = f'CASE WHEN id = (SELECT min(id) FROM good) THEN {value} ELSE "{column}" END::{PACK_COLUMNS[column]}'
    return altered(f'SELECT * REPLACE ({replaced} AS "{column}") FROM good')


def retyped(column: str, kind: str) -> Maker:
    """Return what writes a column in another type."""
    return altered(f'SELECT * REPLACE (NULL::{kind} AS "{column}") FROM good', order="ALL" if column == "id" else "id")


def nested(depth: int) -> str:
    """Return JSON that is nested so deep."""
    return "[" * depth + "]" * depth


def hostile() -> dict[str, Maker]:
    """Return every hostile pack's maker by what is wrong with it."""
    return {**_files(), **_columns(), **_manifests(), **_rows(), **_texts(), **_bombs(), **_tricks(), **_impossible()}


def _files() -> dict[str, Maker]:
    made: dict[str, Maker] = {f"cut at {percent} %": cut_at(percent / 100) for percent in range(0, 100, 4)}
    made |= {
        "empty": lambda path: path.write_bytes(b""),
        "text": lambda path: path.write_text("id,model\n1,2\n", encoding="utf-8"),
        "only magic": lambda path: path.write_bytes(b"PAR1PAR1"),
        "magic and zeros": lambda path: path.write_bytes(b"PAR1" + bytes(1000) + b"PAR1"),
        "a footer longer than the file": lambda path: path.write_bytes(b"PAR1" + b"\xff" * 60 + b"PAR1"),
        "a footer of noise": lambda path: path.write_bytes(
            b"PAR1" + random.Random(1).randbytes(500) + (400).to_bytes(4, "little") + b"PAR1"
        ),
        "encrypted": damaged(lambda content: b"PARE" + content[4:-4] + b"PARE"),
        "two packs in one": damaged(lambda content: content + b"PAR1" + content[:-9] + b"PAR1"),
        "a footer of ones": damaged(lambda content: content[:-400] + b"\xff" * 392 + content[-8:]),
        "a store": _store,
        "csv in a zip's clothes": lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)),
        "json": lambda path: path.write_text("[{}]", encoding="utf-8"),
        "a database": lambda path: duckdb.connect(str(path)).close(),
        "a folder": lambda path: path.mkdir(),
        "nothing": lambda path: None,
    }
    return made


def _store(path: Path) -> None:
    from whichlora_profiles_db import open_store

    open_store(path).add(GOOD)


def _columns() -> dict[str, Maker]:
    made: dict[str, Maker] = {}
    for column in PACK_COLUMNS:
        other = {"VARCHAR": "BLOB", "BIGINT": "DOUBLE", "DOUBLE": "VARCHAR"}.get(PACK_COLUMNS[column], "VARCHAR")
        made[f"{column} as {other}"] = retyped(column, other)
    for column in [name for name in PACK_COLUMNS if name != "id"][::3]:
        made[f"no {column}"] = altered(f'SELECT * EXCLUDE ("{column}") FROM good')
    made["a column too many"] = altered("SELECT *, 1 AS extra FROM good")
    made["four thousand columns"] = altered(
        "SELECT *, " + ", ".join(f"1 AS c{number}" for number in range(4000)) + " FROM good"
    )
    made["columns in another order"] = altered("SELECT model, * EXCLUDE (model) FROM good")
    made["a struct for a text"] = retyped("notes", "STRUCT(a INT)")
    made["a list of lists"] = retyped("step_samples_s", "DOUBLE[][]")
    made["a map"] = retyped("versions", "MAP(VARCHAR, VARCHAR)")
    made["a name of another case"] = altered("SELECT * RENAME (notes AS Notes) FROM good")
    return made


def _manifests() -> dict[str, Maker]:
    fields: dict[str, dict[str, Any]] = {
        "too many rows": {"rows": 10**12},
        "negative rows": {"rows": -1},
        "rows as text": {"rows": "6"},
        "another hash": {"ids_sha256": "0" * 64},
        "counts that are not its own": {"counts": {"evidence": {"measured": 6}, "outcome": {"ok": 6}}},
        "counts as a list": {"counts": []},
        "another schema": {"schema": 99},
        "a later format": {"format": FORMAT + 1},
        "a format before the first": {"format": 0},
        "a format that is a truth value": {"format": True},
        "the format before, with the columns of this one": {"format": FORMAT - 1},
        "rows as a truth value": {"rows": True},
        "a producer that clears the screen": {"producer": "whichlora\x1b[2J\x1b[H0 rejected"},
        "a producer of a megabyte": {"producer": "a" * (1 << 20)},
        "a count that is no number": {"counts": {"evidence": {"measured": "6"}, "outcome": {"ok": "6"}}},
        "a field too many": {"also": 1},
    }
    made: dict[str, Maker] = {f"manifest: {what}": altered("FROM good", manifest=one) for what, one in fields.items()}
    contents = {"no JSON": b"{", "a list": b"[]", "a number": b"1", "deep": nested(100_000).encode(), "empty": b""}
    made |= {f"manifest: {what}": altered("FROM good", manifest=one) for what, one in contents.items()}
    made["no manifest"] = lambda path: duckdb.execute(f"COPY (SELECT 1 AS id) TO '{path}' (FORMAT parquet)")
    made["names that the manifest denies"] = set_to("host_name", "'me'")
    return made


def _rows() -> dict[str, Maker]:
    made: dict[str, Maker] = {
        "no row": altered("SELECT * FROM good WHERE false"),
        "a row twice": altered("SELECT * FROM good UNION ALL (SELECT * FROM good LIMIT 1)"),
        "an id twice with other content": altered(
            "SELECT * FROM good UNION ALL (SELECT * REPLACE (1::BIGINT AS weights_bytes) FROM good LIMIT 1)"
        ),
        "an id of the store with other content": altered(
            f"SELECT * REPLACE (CASE WHEN id = '{FULL.id}' THEN 'forged' ELSE notes END AS notes) FROM good"
        ),
        "ids out of order": altered("FROM good", order="id DESC"),
        "ids in capitals": set_to("id", "upper(id)"),
        "ids of another content": set_to("id", "sha256(id)"),
        "ids with spaces": set_to("id", "id || ' '"),
        "configs of one id": altered(
            "SELECT * REPLACE (CASE WHEN id = (SELECT min(id) FROM good) THEN '{}' ELSE config END AS config, "
            "config_id[:1] AS config_id) FROM good"
        ),
    }
    copies = ("workload_id", "model", "task", "phase", "method", "precision", "quantization", "evidence", "device")
    made |= {f"{name} that is not its own": in_one_row(name, "'other'") for name in copies}
    for name in NUMBERS:
        made[f"a changed {name}"] = set_to(name, f'coalesce("{name}", 0) + 1')
    made["no moment"] = set_to("measured_at", "NULL")
    made["a moment without end"] = set_to("measured_at", "'infinity'")
    made["a moment before Christ"] = set_to("measured_at", "'0044-03-15 (BC) 12:00:00'")
    made |= {f"{name} is null": in_one_row(name, "NULL") for name in ("id", "config", "config_id", "workload", "notes")}
    return made


def _texts() -> dict[str, Maker]:
    made: dict[str, Maker] = {}
    for name in ("workload", "versions", "phase_peaks"):
        for what, text in {
            "no JSON": "{",
            "a list": "[]",
            "null": "null",
            "deep": nested(200_000),
            "not canonical": '{ "a" : 1 }',
            "a key twice": '{"a":"1","a":"2"}',
            "a number without end": '{"a":1e999}',
        }.items():
            made[f"{name} is {what}"] = in_one_row(name, f"'{text}'")
    for what, text in {"other": "{}", "deep": nested(60_000), "no object": "[]"}.items():
        made[f"a config that is {what}, under its own hash"] = altered(
            f"SELECT * REPLACE ('{text} ' AS config, sha256('{text} ') AS config_id) FROM good"
        )
        made[f"a config that is {what}, under another's hash"] = set_to("config", f"'{text} '")
    return made


def _bombs() -> dict[str, Maker]:
    long = "repeat('a', {size})"
    return {
        "a text of two megabytes": in_one_row("notes", long.format(size=2 << 20)),
        "a name of a hundred kilobytes": in_one_row("model", long.format(size=100_000)),
        "a hundred kilobytes in every row, from one word of a dictionary": altered(
            f"SELECT good.* REPLACE ({long.format(size=100_000)} AS notes) FROM good, range(50)"
        ),
        "a hundred thousand samples in every row": altered(
            "SELECT good.* REPLACE (list_resize([]::DOUBLE[], 100000, 0.5) AS step_samples_s) FROM good, range(5)"
        ),
        "two million samples": in_one_row("step_samples_s", "list_resize([]::DOUBLE[], 2000000, 0.5)"),
        "ten thousand equal rows": altered("SELECT good.* FROM good, range(2000)"),
        "more rows than a pack may have": altered(
            "SELECT max(COLUMNS(*)) FROM good, range(1)", manifest={"rows": 10**9}
        ),
        "a group for every row": altered("SELECT good.* FROM good, range(3000)", sizes=2048),
        "empty lists and texts": set_to("step_samples_s", "[]::DOUBLE[]"),
    }


def forged(column: str, text: str) -> Maker:
    """Return what writes a config, or a JSON text, that a clever program put there, the hash of a config made to fit."""
    quoted = text.replace("'", "''")
    if column == "config":
        return altered(f"SELECT * REPLACE ('{quoted}' AS config, sha256('{quoted}') AS config_id) FROM good")
    return in_one_row(column, f"'{quoted}'")


def _batch_of(text: str) -> Maker:
    replaced = f"""regexp_replace(workload, '"batch_size":[0-9]+', '"batch_size":{text}')"""
    return altered(f"SELECT * REPLACE ({replaced} AS workload) FROM good")


def _tricks() -> dict[str, Maker]:
    """Return what JSON, Unicode, numbers and types allow and no measurement holds."""
    digits = "9" * 4000
    return {
        "a config with a number of four thousand digits": forged("config", f'{{"hidden_size":{digits}}}'),
        "a config with a number of five thousand digits": forged(
            "config", f'{{"hidden_size":{digits}{digits[:1000]}}}'
        ),
        "a config with NaN": forged("config", '{"hidden_size":NaN}'),
        "a config without end": forged("config", '{"rope_theta":-Infinity}'),
        "a config with a key twice": forged("config", '{"hidden_size":1,"hidden_size":2}'),
        "a config with half a character": forged("config", '{"a":"\\ud800"}'),
        "versions with half a character": forged("versions", '{"torch":"\\udfff"}'),
        "a phase that clears the screen": forged("phase_peaks", '{"\\u001b[2J":{"allocated_peak_bytes":0}}'),
        "a phase of a number that is none": forged("phase_peaks", '{"load":{"allocated_peak_bytes":true}}'),
        "a batch of four thousand digits": _batch_of(digits),
        "a batch below nothing": _batch_of("-1"),
        "samples of which one is unknown": in_one_row("step_samples_s", "[0.5, NULL]"),
        "samples that are no numbers": in_one_row("step_samples_s", "['nan'::DOUBLE, 0.5]"),
        "samples without end": in_one_row("step_samples_s", "['inf'::DOUBLE, 0.5]"),
        "samples below nothing": in_one_row("step_samples_s", "[-0.5]"),
        "a mean that is no number": in_one_row("prefill_mean_s", "'nan'"),
        "bytes in 128 bits": retyped("weights_bytes", "HUGEINT"),
        "bytes without a sign": retyped("weights_bytes", "UBIGINT"),
        "a moment with a time zone": retyped("measured_at", "TIMESTAMPTZ"),
        "a moment in nanoseconds": retyped("measured_at", "TIMESTAMP_NS"),
        "a text from a list of allowed ones": retyped("evidence", "ENUM('measured')"),
        "samples in single precision": retyped("step_samples_s", "FLOAT[]"),
        "a struct with a key that clears the screen": retyped("notes", 'STRUCT("\x1b[2J" INT)'),
        "managed bytes below nothing": in_one_row("managed_peak_bytes", "-1"),
    }


def _impossible() -> dict[str, Maker]:
    billions = Workload(model="meta-llama/Llama-3.1-8B", config=LLAMA, batch_size=4, seq_len=4096)
    now = datetime.now(timezone.utc)
    return {
        "an allocated peak below the weights": measured(weights_bytes=10**9),
        "an allocated peak below the model": measured(model_bytes=10**9),
        "eight billion parameters in a megabyte": measured(
            workload=billions, allocated_peak_bytes=1 << 20, reserved_peak_bytes=1 << 20
        ),
        "a step faster than the roofline": measured(workload=billions, allocated_peak_bytes=None, step=_took(1e-3)),
        "a prefill faster than the roofline": measured(
            workload=billions.with_(phase="generate", prefill_len=4096),
            allocated_peak_bytes=None,
            prefill=_took(1e-4),
        ),
        "a step in no time": measured(step=_took(1e-12)),
        "a step of ten years": measured(step=_took(3e8)),
        "a sample in no time": measured(step=TimeStats(samples_s=(1.0, 1e-200))),
        "a peak of an exabyte": measured(allocated_peak_bytes=None, reserved_peak_bytes=10**18),
        "a process of an exabyte": measured(process_bytes=10**18),
        "a phase of an exabyte": measured(phase_peaks={"forward": PhasePeak(allocated_peak_bytes=10**18)}),
        "a peak far above the card": measured(allocated_peak_bytes=1 << 44, reserved_peak_bytes=1 << 44),
        "a card of an exabyte": environment(gpu_total_bytes=10**18),
        "trainable parameters of an exabyte": measured(trainable_params=10**18),
        "measured in the Middle Ages": measured(measured_at=datetime(1066, 10, 14, tzinfo=timezone.utc)),
        "measured next year": measured(measured_at=now + timedelta(days=400)),
        **{f"a card called {name!r}": environment(gpu=name) for name in PATHS},
        "a card's name that clears the screen": environment(gpu_name="\x1b[2J"),
        "a version with a line feed": environment(versions={"torch": "1\n2"}),
        "a model with a zero byte": measured(workload=FULL.workload.with_(model="a\0b")),
        "a processor that reads backwards": environment(cpu_name="\u202egnp.exe"),
        "a model with a letter of no width": measured(
            workload=FULL.workload.with_(model="meta-llama/Llama\u200b-3.1-8B")
        ),
        "a model with a mark of direction": measured(workload=FULL.workload.with_(model="a\u200fb")),
        "a version of invisible letters": environment(versions={"torch": "2.6\U000e0041"}),
        "a card with a letter of another script": environment(gpu="rt\u0445-4090"),
        "a card in wide letters": environment(gpu="\uff52\uff54\uff58-4090"),
        "a host that starts with a mark of order": environment(os_name="\ufeffLinux"),
        "a config of our own with a number of a thousand digits": measured(
            workload=FULL.workload.with_(config={"hidden_size": 10**1000})
        ),
        "a config of our own with such a number deep within": measured(
            workload=FULL.workload.with_(config={"a": [{"b": [1, -(1 << 70)]}]})
        ),
        "managed bytes of an exabyte": measured(managed_peak_bytes=10**18),
    }


PATHS = (
    "../../etc/passwd",
    "/etc/passwd",
    "..",
    "s3://elsewhere/x",
    "a\\b",
    "x' OR 1=1 --",
    "%2e%2e/x",
    "*",
    "\0",
    "a" * 300,
)


def _took(seconds: float) -> TimeStats:
    return TimeStats(median_s=seconds)


def make(measurements: list[Measurement], path: Path) -> Path:
    """Write a good pack."""
    return write_pack(measurements, path).path
