"""The server: who may do what, what comes in, what goes out, and what stays when it is killed."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.profiles_db.lab import measured
from whichlora import estimate
from whichlora.api import answer
from whichlora.serve.tokens import Role, Tokens, tokens_path
from whichlora_profiles_db import (
    Measurement,
    RemoteError,
    open_remote,
    open_store,
    pull,
    push,
    remote_stats,
    write_pack,
)
from whichlora_profiles_db.measurement import measurement_to_json

from .conftest import Running, serving

CARD = "rtx-4090"
SMALL = "Qwen/Qwen2.5-0.5B"


def some(who: str, count: int = 3, card: str = CARD) -> list[Measurement]:
    return [measured(who, number, card) for number in range(count)]


def pack_of(who: str, folder: Path, count: int = 3) -> tuple[str, bytes]:
    made = write_pack(some(who, count), folder / f"{who}.parquet")
    return made.sha256, made.path.read_bytes()


def sent(client: httpx.Client, name: str, content: bytes) -> httpx.Response:
    return client.put(f"/v1/packs/{name}", content=content, params={"gpu": CARD, "month": "2026-01"})


# --- predictions ---


def test_estimates_are_the_library_s(server: Running) -> None:
    """The server says what the library says, the first time and from its cache."""
    fields = {"gpu": CARD, "model": SMALL, "method": "qlora", "batch_size": 3, "seq_len": 300}
    expected = answer(estimate(SMALL, CARD, method="qlora", batch_size=3, seq_len=300))
    with server.client() as client:
        for _ in range(2):
            found = client.post("/v1/estimate", json=fields)
            assert found.status_code == 200
            assert found.json() == json.loads(json.dumps(expected))


def test_caveats_of_mixtures_are_in_answers_and_beside_other_models(server: Running) -> None:
    """An estimate, an exploration and the comparison say of a mixture what one would not expect, and nothing of others."""
    mixture, said = "Qwen/Qwen1.5-MoE-A2.7B", "quantises none of the experts"
    with server.client() as client:
        for model, there in ((mixture, True), (SMALL, False)):
            fields = {"gpu": "h200-sxm-141gb", "model": model, "method": "qlora"}
            assert [said in text for text in client.post("/v1/estimate", json=fields).json()["caveats"]] == [
                True
            ] * there
            asked = {"gpu": "h200-sxm-141gb", "models": [model], "methods": ["qlora"]}
            rows = client.post("/v1/explore", json=asked).json()["rows"]
            assert all(("caveats" in row) == there for row in rows)
            page = client.get("/compare", params={"gpu": "h200-sxm-141gb", "model": model}).text
            assert (said in page) == there == ("worth knowing" in page)


def test_many_estimates_each_say_what_is_wrong(server: Running) -> None:
    """Of several workloads, one that is refused keeps nobody else from an answer, and order is kept."""
    good, bad = {"gpu": CARD, "model": SMALL}, {"gpu": CARD, "model": "no/such-model"}
    with server.client() as client:
        found = client.post("/v1/estimates", json={"requests": [good, bad, good]}).json()["predictions"]
    assert [("error" in each) for each in found] == [False, True, False]
    assert found[0] == found[2]


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "/etc/passwd"},
        {"model": "../../etc/passwd"},
        {"model": SMALL, "batch_size": "1"},
        {"model": SMALL, "batch_size": 10**9},
        {"model": SMALL, "unknown": 1},
        {"model": SMALL, "targets": "(a+)+$"},
        {"model": SMALL, "rank_pattern": {"(a+)+$": 3}},
        {"model": SMALL, "exclude_modules": "(a+)+$"},
        {"model": SMALL, "layer_replication": [[0, 200]] * 8},
        {"model": "x", "config": {"model_type": "llama", "num_hidden_layers": 10**8}},
        {"model": "x", "config": {"model_type": "llama"}},
        {"model": "\ud800"},
    ],
)
def test_what_cannot_be_asked(server: Running, fields: dict[str, object]) -> None:
    """Paths, expressions, endless work and unknown fields are refused as problems, not tried."""
    with server.client() as client:
        body = json.dumps({"gpu": CARD, **fields}).encode()
        found = client.post("/v1/estimate", content=body, headers={"content-type": "application/json"})
    assert found.status_code == 422
    assert found.json()["error"]["todo"]


def test_explored_rows_agree_with_pick(server: Running) -> None:
    """What the page draws are the rows of a search without limits."""
    from whichlora.pick import stage2_rows
    from whichlora.pickconfig import config_from_fields
    from whichlora.serve.work import BATCHES
    from whichlora_estimators.models import bundled_model

    config = config_from_fields({"gpu": CARD, "stage2_profile": {"batch_size": list(BATCHES)}})
    expected = [row.process_bytes for row in stage2_rows(config, bundled_model(SMALL))]
    with server.client() as client:
        rows = client.post("/v1/explore", json={"gpu": CARD, "models": [SMALL]}).json()["rows"]
    assert [row["process_bytes"] and tuple(row["process_bytes"]) for row in rows] == expected


def test_a_search_tells_how_far_it_is_and_ends(server: Running) -> None:
    """A search streams its progress, then its result; a cancelled one has none."""
    fields = {"gpu": CARD, "stage1_profile": {"model_names": [SMALL]}}
    with server.client() as client:
        id_ = client.post("/v1/picks", json=fields).json()["id"]
        text = client.get(f"/v1/picks/{id_}/events").text
        assert [line for line in text.splitlines() if line.startswith("event:")][-1] == "event: done"
        assert "stage 1" in text
        assert client.get(f"/v1/picks/{id_}").json()["result"]["kept"] == [SMALL]
        id_ = client.post("/v1/picks", json={"gpu": CARD}).json()["id"]
        assert client.delete(f"/v1/picks/{id_}").json()["state"] == "cancelled"
        assert client.get(f"/v1/picks/{id_}").json()["result"] is None
        local = {"gpu": CARD, "stage1_profile": {"model_names": ["/etc"]}}
        assert client.post("/v1/picks", json=local).status_code == 422


# --- tokens ---


def test_tokens_that_are_refused(server: Running, tmp_path: Path) -> None:
    """Writing with no token, a wrong one, one that is revoked, or a reader's is refused, and nothing is written."""
    name, content = pack_of("nobody", tmp_path)
    tokens = Tokens(tokens_path(server.store))
    revoked, reader, good = (server.token(role) for role in (Role.ADMIN, Role.READER, Role.CONTRIBUTOR))
    tokens.revoke(revoked.split("_")[1])
    forged = good[:-2] + ("AA" if not good.endswith("AA") else "BB")
    cases = [
        (None, 401),
        ("nothing", 401),
        ("whl_x", 401),
        (forged, 401),
        (revoked, 401),
        (reader, 403),
        (good + "x", 401),
    ]
    with server.client() as client:
        before = client.post("/v1/stats", json={}).json()["total"]
        for token, status in cases:
            headers = {} if token is None else {"Authorization": f"Bearer {token}"}
            found = client.put(f"/v1/packs/{name}", content=content, headers=headers)
            assert found.status_code == status, token
            assert client.get("/v1/tokens", headers=headers).status_code == status
        assert client.post("/v1/stats", json={}).json()["total"] == before


def test_revoked_is_refused_at_once(server: Running) -> None:
    """A token works until it is revoked, by the command line or over the network, and not once more."""
    tokens = Tokens(tokens_path(server.store))
    with server.client(Role.ADMIN) as admin, server.client() as client:
        for revoke in (tokens.revoke, lambda id_: admin.delete(f"/v1/tokens/{id_}").raise_for_status()):
            text = server.token(Role.READER)
            headers = {"Authorization": f"Bearer {text}"}
            assert client.get("/v1/packs", headers=headers).status_code == 200
            revoke(text.split("_")[1])
            assert client.get("/v1/packs", headers=headers).status_code == 401


def test_secrets_are_not_kept(server: Running) -> None:
    """Neither the file of tokens nor its listing holds what a token is."""
    text = server.token()
    secret = text.split("_", 2)[2]
    assert secret.encode() not in tokens_path(server.store).read_bytes()
    with server.client(Role.ADMIN) as admin:
        assert secret not in admin.get("/v1/tokens").text


def test_reading_by_token(serve: Callable[..., Running]) -> None:
    """With --read token nobody reads without one; only /health answers."""
    running = serve("--read", "token", "--read-only")
    fields = {"gpu": CARD, "model": SMALL}
    with running.client() as client, running.client(Role.READER) as reader:
        assert client.get("/health").status_code == 200
        for path in ("/v1/models", "/v1/packs", "/metrics", "/v1/measurements", "/"):
            assert client.get(path).status_code == 401, path
            assert reader.get(path).status_code == 200, path
        assert reader.post("/v1/estimate", json=fields).status_code == 200
        assert client.post("/v1/estimate", json=fields).status_code == 401
    with running.client(Role.ADMIN) as admin:
        given = {"measurements": [measurement_to_json(each) for each in some("late")]}
        assert admin.post("/v1/measurements", json=given).status_code == 403


# --- measurements and packs ---


def test_submitted_measurements_come_back(server: Running) -> None:
    """What was sent as JSON is there under its id, without names, once, and the ledger says by whose token."""
    given = some("json", 4)
    with server.client(Role.CONTRIBUTOR) as client, server.client(Role.ADMIN) as admin:
        body = {"measurements": [measurement_to_json(each) for each in given]}
        first, second = (client.post("/v1/measurements", json=body) for _ in range(2))
        assert [each.status_code for each in (first, second)] == [201, 201]
        assert [each.json()["added"] for each in (first, second)] == [4, 0]
        for each in given:
            assert client.get(f"/v1/measurements/{each.id}").json() == measurement_to_json(each.without_names())
        last = admin.get("/v1/submissions", params={"limit": 1}).json()["submissions"][0]
        assert (last["label"], last["rows"], last["pack"]) == ("tester", 4, first.json()["pack"])


def test_two_stores_converge_over_a_server(server: Running, tmp_path: Path) -> None:
    """Two stores that push and pull hold the same, and pushing again sends nothing."""
    stores = [open_store(tmp_path / f"{name}.duckdb") for name in "ab"]
    remote = open_remote(server.url, token=server.token())
    for number, store in enumerate(stores):
        store.add(some(f"user {number}", 5, ("rtx-4090", "a100-sxm-80gb")[number]))
        push(store, remote)
    for store in stores:
        pull(store, remote)
    ids = [{one.id for one in store.query()} for store in stores]
    assert ids[0] == ids[1]
    assert push(stores[0], remote).packs == ()
    assert sum(group.total for group in remote_stats(remote)) == len(ids[0])


def test_rows_from_before_the_server_are_in_packs(tmp_path: Path) -> None:
    """What a store held before it was served can be pulled."""
    open_store(tmp_path / "s.duckdb").add(some("before", 6))
    mine = open_store(tmp_path / "mine.duckdb")
    with serving(tmp_path / "s.duckdb") as running:
        pull(mine, open_remote(running.url))
    assert mine.count() == 6


def test_hostile_packs_leave_the_store_as_it_is(server: Running, tmp_path: Path) -> None:
    """Damaged, forged, foreign and truncated uploads add nothing but rows that the pack truly had, and those once."""
    draw = random.Random(0)
    name, content = pack_of("victim", tmp_path, 20)
    with server.client(Role.CONTRIBUTOR) as client:
        before = client.post("/v1/stats", json={}).json()
        for number in range(40):
            damaged = bytearray(content)
            for _ in range(draw.choice((1, 3, 50))):
                damaged[draw.randrange(len(damaged))] = draw.randrange(256)
            hostile = (bytes(damaged), content[: draw.randrange(len(content))], draw.randbytes(200), b"")[number % 4]
            if hostile == content:
                continue
            found = sent(client, hashlib.sha256(hostile).hexdigest(), hostile)
            assert found.status_code in (201, 422), found.text  # a byte that nothing reads may be any
            assert sent(client, name, hostile).status_code == 422
        for bad in ("..%2f..%2fetc", "A" * 64, "0" * 63):
            assert sent(client, bad, content).status_code in (404, 422)
        assert sent(client, name, content).status_code == 201
        genuine = {one.id for one in some("victim", 20)}
        held = client.get("/v1/measurements", params={"limit": 1000}).json()["measurements"]
        assert client.post("/v1/stats", json={}).json()["total"] == before["total"] + 20 == len(held)
        assert genuine <= {one["id"] for one in held}


def test_a_body_that_breaks_off_changes_nothing(server: Running, tmp_path: Path) -> None:
    """An upload whose link is cut leaves no row, and the same upload works afterwards."""
    import socket
    from urllib.parse import urlsplit

    name, content = pack_of("cut", tmp_path)
    place = urlsplit(server.url)
    with server.client(Role.CONTRIBUTOR) as client:
        before = client.post("/v1/stats", json={}).json()["total"]
        head = f"PUT /v1/packs/{name} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
        head += f"Authorization: {client.headers['authorization']}\r\n\r\n"
        with socket.create_connection((place.hostname, place.port)) as link:
            link.sendall(head.encode() + content[: len(content) // 2])
        assert client.post("/v1/stats", json={}).json()["total"] == before
        assert sent(client, name, content).json()["added"] == 3


def test_sizes_and_rates(serve: Callable[..., Running]) -> None:
    """Bodies beyond the limit and callers beyond the rate are refused, and told when to come again."""
    running = serve("--rate", "5", "--most-pack-mb", "1")
    with running.client(Role.CONTRIBUTOR) as client:
        huge = b"x" * 2_000_000
        assert sent(client, "0" * 64, huge).status_code == 413
        chunks = (huge[:65536] for _ in range(40))
        assert client.put(f"/v1/packs/{'0' * 64}", content=chunks).status_code == 413
        assert client.post("/v1/estimate", content=huge).status_code == 413
        found = [client.get("/health") for _ in range(60)]
        late = [each for each in found if each.status_code == 429]
        assert late
        assert int(late[0].headers["retry-after"]) >= 1


def test_a_killed_server_keeps_what_it_acknowledged(tmp_path: Path) -> None:
    """SIGKILL in the midst of writes: after a restart every acknowledged measurement is there, and each once."""
    packs = [pack_of(f"writer {number}", tmp_path, 2) for number in range(60)]
    acknowledged: list[int] = []

    def write(numbers: range, url: str, token: str) -> None:
        with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {token}"}, trust_env=False) as client:
            for number in numbers:
                try:
                    if sent(client, *packs[number]).status_code == 201:
                        acknowledged.append(number)
                except httpx.HTTPError:
                    return

    with serving(tmp_path / "s.duckdb") as running:
        token = running.token()
        writers = [threading.Thread(target=write, args=(range(i, 60, 3), running.url, token)) for i in range(3)]
        for each in writers:
            each.start()
        while len(acknowledged) < 6:
            time.sleep(0.01)
        running.process.kill()
        running.process.wait()
        for each in writers:
            each.join()
    incoming, partial = tmp_path / "s.duckdb.incoming", tmp_path / "s.duckdb.packs" / "gpu=x" / "month=y" / ".1.new"
    assert incoming.is_dir()  # as it was when the server died
    (incoming / "left.incoming").write_bytes(b"x")
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"x")
    with serving(tmp_path / "s.duckdb") as again:
        assert not partial.exists()
        assert not (incoming / "left.incoming").exists()
        held = open_store(tmp_path / "copy.duckdb")
        pull(held, open_remote(again.url))
        total = again.client().post("/v1/stats", json={}).json()["total"]
    assert not incoming.exists()
    notes = [one.notes for one in held.query()]
    assert len(notes) == len(set(notes)) == total
    assert {f"writer {number} {row}" for number in acknowledged for row in range(2)} <= set(notes)


def test_stopping_finishes_what_was_begun(tmp_path: Path) -> None:
    """On SIGTERM a submission that is under way is answered and kept."""
    name, content = pack_of("last", tmp_path, 200)
    with serving(tmp_path / "s.duckdb") as running, running.client(Role.CONTRIBUTOR) as client:
        answers: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: answers.append(sent(client, name, content)))
        thread.start()
        time.sleep(0.3)
        running.process.terminate()
        thread.join()
        running.process.wait(60)
    assert answers[0].json()["added"] == 200
    assert open_store(tmp_path / "s.duckdb").count() == 200


def test_the_store_belongs_to_the_server(server: Running) -> None:
    """While a server has a store nobody else opens it, and it says so."""
    from whichlora_profiles_db import StoreBusy

    with pytest.raises(StoreBusy):
        open_store(server.store, wait_s=0.1).count()


def test_an_address_in_use_is_no_crash(server: Running, tmp_path: Path) -> None:
    """A server that cannot listen says so, with what to do, before it touches a store."""
    store, port = tmp_path / "s.duckdb", server.url.rsplit(":", 1)[1]
    command = [sys.executable, "-m", "whichlora", "serve", "--db", str(store), "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "--port" in done.stderr
    assert not store.exists()


# --- the remote ---


def test_remote_says_what_is_wrong(server: Running, tmp_path: Path) -> None:
    """A server that is not there, refuses, or is none: each is an error of the remote with what to do."""
    store = open_store(tmp_path / "s.duckdb")
    store.add(some("x"))
    with pytest.raises(RemoteError, match="token"):
        push(store, open_remote(server.url))
    with pytest.raises(RemoteError, match="reached"):
        open_remote("http://127.0.0.1:9").list()
    with pytest.raises(RemoteError, match="URL"):
        open_remote("http://user:password@127.0.0.1")


# --- what protects the page, and what proxies need ---


def test_headers_and_prefix(serve: Callable[..., Running]) -> None:
    """Every answer forbids what is not ours; behind a prefix, with or without it, paths and links work."""
    running = serve("--prefix", "/lab")
    with running.client() as client:
        for path in ("/health", "/lab/health", "/no-such-place"):
            found = client.get(path)
            assert "default-src 'none'" in found.headers["content-security-policy"]
            assert found.headers["x-content-type-options"] == "nosniff"
        assert client.get("/lab/health").status_code == 200
        assert client.get("/openapi.json").json()["servers"] == [{"url": "/lab"}]
        assert 'src="/lab/static/' in client.get("/lab/").text


def test_metrics_count(server: Running) -> None:
    """Prometheus' text counts requests by route and tells how many measurements there are."""
    with server.client() as client:
        text, again = (client.get("/metrics").text for _ in range(2))
        total = client.post("/v1/stats", json={}).json()["total"]

    def value(text: str, name: str) -> float:
        return next((float(line.split()[-1]) for line in text.splitlines() if line.startswith(name)), 0.0)

    name = 'whichlora_requests_total{method="GET",route="/metrics",status="200"}'
    assert value(again, name) == value(text, name) + 1
    assert value(again, "whichlora_measurements ") == total


def test_corrections_are_strict_json(server: Running) -> None:
    """What no number is known for is null: browsers and other languages read no NaN."""

    def refuse(name: str) -> None:
        raise AssertionError(name)

    with server.client() as client:
        for path in ("/v1/corrections/current", "/v1/corrections"):
            json.loads(client.get(path).text, parse_constant=refuse)
