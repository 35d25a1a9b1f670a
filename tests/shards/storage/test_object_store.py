import logging
import random

import aiohttp
import boto3
import botocore.exceptions
import fsspec
import gcsfs.retry
import google.auth.exceptions
import pytest
import torch
from moto.server import ThreadedMotoServer

from shards.dataset import open_data_set, prefetch_ordered
from shards.mixture import RecordStream
from shards.storage import object_store, open
from shards.storage.cache import DiskCache
from shards.storage.object_store import ObjectStore, is_permanent
from shards.storage.open import open_storage, url_scheme
from tests.shards.data_sets import make_data_set, make_record
from tests.shards.server import serve

RECORDS = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_data_set(tmp_path_factory.mktemp("data"), [5, 4, 7])


@pytest.fixture
def server(folder):
    with serve(folder) as server:
        yield server


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch, tmp_path):
    """Short pauses, and a cache of this test's own."""
    monkeypatch.setattr(object_store, "STALL_SECONDS", 0.5)
    monkeypatch.setattr(object_store, "MAX_ATTEMPTS", 4)
    monkeypatch.setattr(object_store, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(open, "cache_folder", lambda: tmp_path / "cache")


def assert_same_records(data, indices=range(RECORDS)):
    for index in indices:
        record, expected = data.read_record(index), make_record(index)
        assert (record.key, record.source) == (expected.key, expected.source)
        assert torch.equal(record.first_frame, expected.first_frame) and torch.equal(record.text, expected.text)
    return True


def test_http_gives_the_records_by_ranges(server, folder):
    data = open_data_set(server.url)
    assert data.num_records == RECORDS and assert_same_records(data)
    asked = [span for name, span in server.asked if name.endswith(".tar")]
    assert len(asked) == RECORDS and all(asked)  # one range a record, never a whole tar
    assert torch.equal(data.negative, open_data_set(folder).negative)


@pytest.mark.parametrize("fault", ["503", "429", "reset", "cut", "stall", "flip"])
def test_a_fault_that_passes_changes_nothing(server, fault):
    server.fault = lambda name, number: fault if number % 2 else ""
    assert assert_same_records(
        open_data_set(server.url, cache_bytes=0), range(3) if fault == "stall" else range(RECORDS)
    )


def test_random_faults_under_threads(server, monkeypatch):
    draw = random.Random(0)
    server.fault = lambda name, number: draw.choice(["", "503", "cut", "reset"]) if number % 4 else ""
    data = open_data_set(server.url, cache_bytes=0)
    monkeypatch.setattr(object_store, "MAX_ATTEMPTS", 12)  # threads that ask for one range share its faults
    monkeypatch.setattr(object_store, "FIRST_DELAY", 0.001)
    stream = RecordStream(data, seed=5)
    plans = [[p, p + 1, p + 2] for p in range(0, 48, 3)]
    batches = list(prefetch_ordered(stream.read_batch, plans, depth=4, threads=4))
    expected = [make_record(stream.record_index(position)).first_frame for position in range(48)]
    assert torch.equal(torch.cat([batch.first_frame for batch in batches]), torch.stack(expected))


def test_a_lost_server_is_named_after_the_last_try(server, caplog):
    data = open_data_set(server.url)
    server.fault = lambda name, number: "503" if name.endswith(".tar") else ""
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(ConnectionError, match=r"shard-00000\d.tar.*503.*tried 4 times"),
    ):
        data.read_record(0)
    assert sum(name.endswith(".tar") for name, _ in server.asked) == 4
    pauses = [record.getMessage().split("again in ")[1] for record in caplog.records]
    assert len(pauses) == 3  # after each try but the last


@pytest.mark.parametrize("status", ["400", "401", "403", "410"])
def test_an_answer_that_no_waiting_changes_is_final(server, caplog, status):
    server.fault = lambda name, number: status
    with pytest.raises(ValueError, match=rf"^shards={server.url}/manifest.json: .*{status}.*; check the address"):
        open_data_set(server.url)
    assert len(server.asked) == 1 and not caplog.messages


@pytest.mark.parametrize(
    ("error", "permanent"),
    [
        (botocore.exceptions.NoCredentialsError(), True),
        (botocore.exceptions.PartialCredentialsError(provider="env", cred_var="x"), True),
        (botocore.exceptions.ProfileNotFound(profile="x"), True),
        (botocore.exceptions.NoRegionError(), True),
        (botocore.exceptions.EndpointConnectionError(endpoint_url="x"), False),
        (botocore.exceptions.ReadTimeoutError(endpoint_url="x"), False),
        (botocore.exceptions.IncompleteReadError(actual_bytes=1, expected_bytes=2), False),
        (google.auth.exceptions.DefaultCredentialsError("none"), True),
        (google.auth.exceptions.TransportError("reset"), False),
        (gcsfs.retry.HttpError({"code": 401, "message": "no"}), True),
        (gcsfs.retry.HttpError({"code": 429, "message": "slow"}), False),
        (gcsfs.retry.HttpError({"code": 503, "message": "busy"}), False),
        (aiohttp.InvalidURL("http://["), True),
        (aiohttp.ServerDisconnectedError(), False),
        (PermissionError("Access Denied"), True),
        (ConnectionResetError(), False),
        (OSError("received 1 of 2 bytes"), False),
        (TimeoutError(), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_permanent_and_transient_errors(error, permanent):
    assert is_permanent(error) is permanent


def test_the_status_of_a_cause_decides():
    for status, permanent in ((400, True), (301, True), (503, False)):
        cause = botocore.exceptions.ClientError({"ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")
        error = OSError("translated")
        error.__cause__ = cause
        assert is_permanent(error) is permanent


def test_s3_without_credentials_fails_at_once(monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(object_store, "FIRST_DELAY", 60)
    with pytest.raises(ValueError, match=r"^shards=s3://no-bucket/x/manifest.json: NoCredentialsError: .*AWS_PROFILE"):
        open_data_set("s3://no-bucket/x")


def test_pauses_double(monkeypatch, tmp_path):
    slept = []
    monkeypatch.setattr(object_store.time, "sleep", slept.append)
    monkeypatch.setattr(object_store, "MAX_ATTEMPTS", 5)
    monkeypatch.setattr(object_store, "FIRST_DELAY", 0.5)
    nowhere = ObjectStore("http://127.0.0.1:9/data", cache=DiskCache(tmp_path, 0))
    with pytest.raises(ConnectionError):
        nowhere.read("manifest.json")
    assert slept == [0.5, 1, 2, 4]


def test_damage_that_stays_is_read_twice_and_named(server):
    data = open_data_set(server.url)
    server.fault = lambda name, number: "flip" if name == "shard-000001.tar" else ""
    with pytest.raises(ValueError, match=r"shard-000001.tar: damaged at clip-000006.safetensors .*read twice"):
        data.read_record(6)
    assert sum(name == "shard-000001.tar" for name, _ in server.asked) == 2
    assert assert_same_records(data, [0, 12])
    server.fault = lambda name, number: "flip" if name == "shard-000001.json" else ""
    with pytest.raises(ValueError, match="shard-000001.json: damaged at the whole file"):
        open_data_set(server.url, cache_bytes=0).read_record(6)


@pytest.mark.parametrize("damaged", ["manifest.json", "negative.safetensors"])
def test_a_damaged_or_missing_opening_is_refused(server, folder, damaged):
    server.fault = lambda name, number: "flip" if name == damaged else ""
    with pytest.raises(ValueError, match=f"{damaged}.*damaged"):
        open_data_set(server.url)
    server.fault = lambda name, number: "404" if name == damaged else ""
    with pytest.raises(ValueError, match=damaged):
        open_data_set(server.url)
    server.fault = lambda name, number: "500" if name == damaged else ""
    with pytest.raises(ValueError, match=f"{damaged}.*500"):
        open_data_set(server.url)


def test_a_server_without_ranges_is_refused(server):
    server.fault = lambda name, number: "whole"
    with pytest.raises(ValueError, match="whole files instead of byte ranges"):
        open_data_set(server.url).read_record(0)


def test_the_cache_spares_the_second_epoch(server):
    data = open_data_set(server.url)
    assert assert_same_records(data)
    before = len(server.asked)
    assert assert_same_records(data) and assert_same_records(open_data_set(server.url))
    assert [name for name, _ in server.asked[before:]] == ["manifest.json"]  # what is said anew each time


def test_a_damaged_or_stale_cache_is_not_believed(server, tmp_path):
    assert assert_same_records(open_data_set(server.url))
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(path.read_bytes()[::-1])
    assert assert_same_records(open_data_set(server.url)) and assert_same_records(open_data_set(server.url))


def test_the_cache_is_bounded_and_forgets_what_is_oldest(tmp_path):
    cache = DiskCache(tmp_path / "cache", 3200)
    for number in range(200):
        cache.put(f"key {number}", bytes([number]) * 100)
        cache.get("key 3")
        held = sum(path.stat().st_size for path in (tmp_path / "cache").iterdir())
        assert held <= 3200 + 3200 // 16
    assert held > 2800
    assert cache.get("key 3") == bytes([3]) * 100 and cache.get("key 199") == bytes([199]) * 100
    assert cache.get("key 4") is None
    cache.put("large", bytes(300))
    assert cache.get("large") is None  # would push out too much


def test_a_cache_that_cannot_be_written_stops_nothing(server, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(NotADirectoryError):
        list((tmp_path / "cache").iterdir())
    assert assert_same_records(open_data_set(server.url))


@pytest.fixture(scope="module")
def s3_server(folder):
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    environment = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    client = boto3.client(
        "s3",
        region_name="us-east-1",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id="a",
        aws_secret_access_key="b",
    )
    client.create_bucket(Bucket="clips")
    for path in folder.iterdir():
        client.put_object(Bucket="clips", Key=f"deep/data/{path.name}", Body=path.read_bytes())
    yield client, environment
    server.stop()


def test_s3_gives_the_records_and_names_damage(s3_server, folder, monkeypatch):
    client, environment = s3_server
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    data = open_data_set("s3://clips/deep/data/", cache_bytes=0)
    assert assert_same_records(data)
    with pytest.raises(ValueError, match=r"shards=s3://clips/shallow: .*manifest.json"):
        open_data_set("s3://clips/shallow")
    tar = (folder / "shard-000002.tar").read_bytes()
    client.put_object(Bucket="clips", Key="deep/data/shard-000002.tar", Body=tar.replace(b"prompt 10", b"prompt 11"))
    with pytest.raises(ValueError, match=r"s3://clips/deep/data/shard-000002.tar: damaged at clip-000010.json"):
        data.read_record(10)
    client.put_object(Bucket="clips", Key="deep/data/shard-000002.tar", Body=tar)
    assert assert_same_records(data, [10])


@pytest.mark.parametrize("bad", ["pipe:cat /etc/hostname", "pipe:rm -rf x", "|cat x", "ssh://host/x", "sftp://host/x"])
@pytest.mark.parametrize("opened", [open_data_set, lambda prefix: open_storage(prefix, cache_bytes=0)])
def test_what_runs_a_program_is_refused(bad, opened):
    with pytest.raises(ValueError, match="cannot be read; give a folder or one of https://"):
        opened(bad)


@pytest.mark.parametrize("bad", ["file:///etc", "simplecache::s3://b/x", "s3://b/x::zip://y", "s3:bucket", "ftp://h/x"])
def test_other_schemes_are_refused(bad):
    with pytest.raises(ValueError, match="cannot be read"):
        url_scheme(bad)


def test_known_schemes():
    assert [url_scheme(p) for p in ("data", "/a/b", "./a:b", "C:/data", "s3://b/x", "HF://datasets/a/b", "gs://b")] == [
        *("", "", "", "", "s3", "hf", "gs")
    ]


@pytest.mark.parametrize(
    "prefix, module", [("gs://bucket/data", "gcsfs"), ("hf://datasets/owner/name/data", "huggingface_hub")]
)
def test_gs_and_hf_open_their_own_clients(prefix, module, tmp_path, monkeypatch):
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
    opened = ObjectStore(prefix, cache=DiskCache(tmp_path, 0))
    assert type(opened.filesystem).__module__.split(".")[0] == module and opened.root.endswith("/data")


def test_a_missing_client_names_the_extra(monkeypatch, tmp_path):
    def absent(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(object_store, "import_module", absent)
    with pytest.raises(ValueError, match=r"pip install 'ti2v-distill\[remote\]'"):
        ObjectStore("https://host/data", cache=DiskCache(tmp_path, 0))
