"""A hundred million records in 200,000 shards, simulated: one small shard represents each of them."""

import subprocess
import sys
from dataclasses import replace

import torch

from shards.manifest import Manifest, write_manifest
from shards.writer import shard_file_name
from tests.shards.data_sets import ENCODER, SPEC, TEXT_DIM, make_shards

SHARDS, RECORDS = 200_000, 500
SCRIPT = """
import resource, sys
from pathlib import Path
from shards.storage.open import LocalStorage
from shards.dataset import MAX_CACHED_RECORDS, open_data_set
from shards.mixture import RecordStream

def peak_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MB

imported = peak_memory()
data = open_data_set(sys.argv[1])
opened = peak_memory()

class OneShard(LocalStorage):
    def read(self, name, *span, fresh=False):
        return super().read(f"shard-000000{Path(name).suffix}", *span)

data.storage = OneShard(sys.argv[1])
stream = RecordStream(data, seed=1)
indices = [stream.record_index(position * 99_991) for position in range(600)]
keys = [stream.data.read_record(index).key for index in indices]
assert keys == [f"clip-{index % 500:06d}" for index in indices]
assert data._load_offsets.cache_info().currsize == MAX_CACHED_RECORDS // 500 < len({index // 500 for index in indices})
print(data.num_records, len(set(indices)), round(opened - imported), round(peak_memory() - opened))
"""


def test_a_hundred_million_records(tmp_path):
    shard = make_shards(tmp_path, [RECORDS])[0].shard
    shards = tuple(replace(shard, name=shard_file_name(number)) for number in range(SHARDS))
    write_manifest(tmp_path, Manifest(1, SPEC, ENCODER, shards, 0), torch.zeros(2, TEXT_DIM))
    completed = subprocess.run([sys.executable, "-c", SCRIPT, tmp_path], capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr
    records, different, opening, reading = (int(word) for word in completed.stdout.split())
    assert records == SHARDS * RECORDS and different == 600
    assert opening < 260 and reading < 140  # MB beside the libraries, of the 500 a rank may take
