"""Read an offline run of Weights & Biases: a log in 32 KiB blocks of checksummed, possibly split records."""

import json
import struct

from wandb.proto import wandb_internal_pb2 as protocol

BLOCK = 32768
FULL, FIRST, _, LAST = 1, 2, 3, 4


def read_records(path):
    data, place, parts = path.read_bytes(), 7, []
    while place + 7 <= len(data):
        if BLOCK - place % BLOCK < 7:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        body = data[place + 7 : place + 7 + length]
        place += 7 + length
        parts = [body] if kind in (FULL, FIRST) else [*parts, body]
        if kind in (FULL, LAST):
            record = protocol.Record()
            record.ParseFromString(b"".join(parts))
            yield record


def read_run(path):
    """Return (run id, config, history rows) of a .wandb file."""
    run_id, config, history = None, {}, []
    for record in read_records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run_id = record.run.run_id
            config.update({item.key: json.loads(item.value_json) for item in record.run.config.update})
        elif kind == "history":
            items = record.history.item
            history.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return run_id, config, history
