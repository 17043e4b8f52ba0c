"""The manifest: what is written comes back, and whatever is done to its bytes does no harm."""

import copy
import json
import math
import pickle
import random
import resource
import tracemalloc
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from safetensors.numpy import load as load_safetensors
from support import fork

from shardwright.checkpoint import CheckpointError, DamagedError, manifest
from shardwright.checkpoint.archive import Archive, make_manifest, split
from shardwright.checkpoint.box import Box
from shardwright.checkpoint.files import Entry, FileLayout
from shardwright.checkpoint.manifest import BLOCK_BYTES, TensorInfo, decode, digest_blocks, encode
from shardwright.checkpoint.storage import LocalStorage

TENSORS = {
    "model.w": TensorInfo(torch.float32, (6, 10)),
    "model.b": TensorInfo(torch.bfloat16, (7,)),
    "model.scale": TensorInfo(torch.float64, ()),
    "model.none": TensorInfo(torch.int64, (0, 4)),
    "model.deep": TensorInfo(torch.uint8, (2, 3, 4, 2)),
}
VALUES = {"progress.step": 3, "progress.config": {"a": [1, None, "ü"], "b": {}}, "optimizer.lr": 1e-3}


def whole(info):
    return Box((0,) * len(info.shape), info.shape)


def build(tensors=TENSORS, values=VALUES, num_files=2, max_numel=16):
    """A manifest, and the bytes of its files."""
    entries = [Entry(n, info, box) for n, info in tensors.items() for box in split(whole(info), max_numel)]
    rng, files, data = np.random.default_rng(0), [], {}
    for number in range(num_files):
        layout = FileLayout(entries[number::num_files])
        name = f"{number:05d}-00000-abc.safetensors"
        data[name] = rng.integers(0, 256, layout.size, dtype=np.uint8)
        files.append((name, layout, digest_blocks(memoryview(data[name]))))
    return make_manifest(tensors, values, files), data


class InMemory(LocalStorage):
    """Files that are arrays."""

    def __init__(self, data):
        super().__init__(Path("memory"))
        self.data = data

    def read(self, name, start, into):
        part = self.data.get(name, ())[start : start + len(into)]
        if len(part) != len(into):
            raise DamagedError(f"{name} is too short")
        into[:] = memoryview(part)


def signed(body):
    """Give bytes the checksum that they should have."""
    return body + xxhash.xxh3_64_intdigest(body).to_bytes(8, "little")


def take_apart(data):
    """Header, its JSON parts, and the columns as lists, all free to be changed."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    parts = {key: json.loads(header["__metadata__"].pop(key)) for key in ("tensors", "values", "files")}
    arrays = load_safetensors(data)
    columns = {name: arrays[name].copy() for name in header if name not in ("__metadata__", "xxh3")}
    return header, parts, columns


def put_together(header, parts, columns):
    header = copy.deepcopy(header)
    if isinstance(header.get("__metadata__"), dict):
        header["__metadata__"] |= {key: json.dumps(part) for key, part in parts.items()}
    head = json.dumps(header).replace('"deep"', DEEP).replace('\\"deep\\"', DEEP).encode()
    body = b"".join(array.tobytes() for array in columns.values())
    return signed(len(head).to_bytes(8, "little") + head + body)


def changed(change):
    """The bytes of a manifest after `change(parts, columns)`, with everything else made to fit."""
    header, parts, columns = take_apart(encode(build()[0]))
    change(parts, columns)
    end = 0
    for name, array in columns.items():
        header[name] |= {"shape": list(array.shape), "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    header["xxh3"]["data_offsets"] = [end, end + 8]
    return put_together(header, parts, columns)


@pytest.mark.parametrize(
    ("tensors", "num_files"),
    [
        (TENSORS, 3),
        ({}, 0),
        ({"s": TensorInfo(torch.float32, ())}, 1),
        ({"none": TensorInfo(torch.float32, (0,))}, 1),
        ({"large": TensorInfo(torch.float8_e4m3fn, (3, BLOCK_BYTES))}, 2),
    ],
)
def test_what_is_encoded_comes_back(tensors, num_files):
    written, _ = build(tensors, num_files=num_files, max_numel=2 * BLOCK_BYTES if "large" in tensors else 16)
    read = decode(encode(written), "m")
    assert (read.tensors, read.values, read.files) == (written.tensors, written.values, written.files)
    for column in ("tensor", "file", "start", "offsets", "sizes"):
        ours, theirs = getattr(read.boxes, column), getattr(written.boxes, column)
        assert ours.shape == theirs.shape and (ours == theirs).all(), column
    for file in written.files:
        assert (read.digests_of(file) == written.digests_of(file)).all()
    for name, info in tensors.items():
        boxes = [read.boxes.box(row, len(info.shape)) for row in read.rows(name)]
        assert sum(box.numel for box in boxes) == math.prod(info.shape)
        assert all(read.names[read.boxes.tensor[row]] == name for row in read.rows(name))


def test_a_manifest_is_a_safetensors_file():
    written, _ = build()
    columns = load_safetensors(encode(written))
    assert (columns["box.start"] == written.boxes.start).all()
    assert (columns["block.xxh3"] == written.digests).all()


def test_every_flipped_bit_and_every_cut_is_detected():
    data = encode(build()[0])
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(DamagedError, match="m is damaged"):
            decode(bytes(damaged), "m")
        with pytest.raises(DamagedError, match="m is damaged"):
            decode(data[:position], "m")


NAMES = [
    "../x.safetensors", "/x.safetensors", "a\0b.safetensors", "a/b.safetensors", "..", ".", "", "x", "a.safetensors\n",
    "a\\b.safetensors", "~.safetensors", "$HOME.safetensors", "s3:x.safetensors", "ä.safetensors", ".safetensors",
    "x.safetensors/../../y.safetensors", "x" * 101 + ".safetensors", manifest.NAME, 7, None,
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_no_name_leads_out_of_the_folder(name):
    def rename(parts, columns):
        parts["files"][0][0] = name

    with pytest.raises(DamagedError, match=r"^m is "):
        decode(changed(rename), "m")


def put(part, *where, value):
    """A change of one node of the manifest's JSON."""

    def change(parts, columns):
        node = parts[part]
        for step in where[:-1]:
            node = node[step]
        node[where[-1]] = value

    return change


def put_column(name, value, row=0):
    def change(parts, columns):
        columns[name][row] = value

    return change


def twice(part):
    def change(parts, columns):
        parts[part].append(parts[part][0])

    return change


def shorten(name):
    def change(parts, columns):
        columns[name] = columns[name][:-1]

    return change


def overlap(parts, columns):
    """The second box of a tensor lies where its first does: as many elements as the tensor, and a hole."""
    columns["box.offsets"][1] = columns["box.offsets"][0]


WRONG = {
    "a tensor is there twice": [twice("tensors")],
    "a file is there twice": [twice("files")],
    "unknown dtypes": [put("tensors", 0, 1, value="float31")],
    "its values are no table": [lambda parts, columns: parts.update(values=[1])],
    "its columns differ in length": [shorten("box.start"), shorten("box.tensor"), shorten("box.sizes")],
    "checksums and files do not agree": [shorten("block.xxh3"), put("files", 0, 1, value=2 * BLOCK_BYTES)],
    "a tensor is too large": [put("tensors", 0, 2, value=[2**59]), put("tensors", 0, 2, value=[0, 2**59, 2**59])],
    "its columns lack a dim": [put("tensors", 0, 2, value=[1, 1, 1, 1, 60])],
    "its boxes are not in order": [put_column("box.tensor", 2)],
    "a box is of no tensor": [put_column("box.tensor", 99, row=-1)],
    "a box is in no file": [put_column("box.file", 2), put_column("box.file", 2**32 - 1)],
    "a box reaches out of its tensor": [
        put_column("box.offsets", -1), put_column("box.offsets", 2**62), put_column("box.sizes", 2**62),
        put_column("box.sizes", -(2**63)), put_column("box.sizes", 11),
    ],
    "boxes do not make up their tensor": [overlap, put_column("box.sizes", 1), put("tensors", 0, 2, value=[60, 10])],
    "a box reaches out of its file": [
        put_column("box.start", -1), put_column("box.start", 2**62), put("files", 0, 1, value=4100)
    ],
    "is malformed": [
        put("tensors", 0, 2, value=[2**63]), put("tensors", 0, 2, value=[-1]), put("tensors", 0, 2, value=[1] * 17),
        put("tensors", 0, value="x"), put("files", 0, 1, value=-1), put("files", 0, 1, value=2**60),
        put("files", 0, 1, value=1.5),
    ],
}  # fmt: skip


@pytest.mark.parametrize("words", WRONG)
def test_a_manifest_that_contradicts_itself_is_refused(words):
    for change in WRONG[words]:
        with pytest.raises(DamagedError, match=words):
            decode(changed(change), "m")


def test_another_format_is_not_called_damaged():
    header, parts, columns = take_apart(encode(build()[0]))
    header["__metadata__"]["format"] = "3"
    with pytest.raises(CheckpointError, match="format 3") as caught:
        decode(put_together(header, parts, columns), "m")
    assert not isinstance(caught.value, DamagedError)


def test_claims_are_not_believed():
    """What a few bytes say may not make the reader allocate much."""
    claims = [
        signed((2**62).to_bytes(8, "little") + b"{}"),
        changed(put("tensors", 0, 2, value=[2**50])),
        changed(put("files", 0, 1, value=2**55)),
        changed(put_column("box.file", 2**32 - 1)),
    ]
    for shape in ([2**55, 4], [0, 2**55], [0, 2**62], [0, 10**30], [1, 10**30]):
        header, parts, columns = take_apart(encode(build()[0]))
        header["box.offsets"] |= {"shape": shape, "data_offsets": [0, 8 * math.prod(shape)]}
        claims.append(put_together(header, parts, columns))
    tracemalloc.start()
    for data in claims:
        with pytest.raises(DamagedError):
            decode(data, "m")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


NUMBERS = [-1, 0, 1, 2, 3, 7, 255, 4096, 2**31, 2**32, 2**53, 2**60, 2**62, 2**63 - 1, -(2**63), 2**63, 2**64, 10**30]
NODES = [*NUMBERS, None, True, False, 1.5, "", "x", "../x", "float32", "1e999", [], {}, [[]], [0], [-1, 1], {"a": 1}]
DEEP = "[" * 50_000 + "]" * 50_000  # takes the place of "deep" in the text


def mutate_json(rng, root):
    """Replace, drop, repeat or swap a random node."""
    places = []

    def walk(node):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(root)
    node, key = rng.choice(places)
    action = rng.randrange(6)
    if action == 0:
        del node[key]
    elif action == 1 and isinstance(node, list):
        node.insert(key, copy.deepcopy(node[key]))
    elif action == 2:
        other, index = rng.choice(places)
        with suppress(LookupError):  # dropped before
            node[key] = copy.deepcopy(other[index])
    elif action == 3 and isinstance(node[key], int):
        node[key] += rng.choice([-8, -1, 1, 8, 4096])
    else:
        node[key] = copy.deepcopy(rng.choice([*NODES, "deep"]))


def mutate_column(rng, columns):
    name = rng.choice([name for name in columns if columns[name].size])
    column = columns[name]
    flat, limits = column.reshape(-1), np.iinfo(column.dtype)
    first, second = rng.randrange(len(flat)), rng.randrange(len(flat))
    action = rng.randrange(4)
    if action == 0:
        flat[first] = max(min(rng.choice(NUMBERS), limits.max), limits.min)
    elif action == 1:
        flat[[first, second]] = flat[[second, first]]
    elif action == 2:
        flat[first] = flat[second]
    else:
        columns[name] = column[: rng.randrange(len(column) + 1)]


def mutants(count):
    """Manifests with random damage of every kind."""
    rng, original = random.Random(5), encode(build()[0])
    header, parts, arrays = take_apart(original)
    texts = pickle.dumps((header, parts))
    for number in range(count):
        if number % 10 == 0:
            data = bytearray(original[: rng.randrange(len(original) + 1)])
            for _ in range(rng.randrange(3) if data else 0):
                data[rng.randrange(len(data))] = rng.randrange(256)
            yield bytes(data)
        elif number % 10 in (1, 2):
            data = bytearray(original[:-8])
            for _ in range(rng.randrange(1, 4)):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            yield signed(bytes(data) if number % 10 == 1 else bytes(data)[: rng.randrange(len(data))])
        else:
            (header, parts), columns = pickle.loads(texts), {name: array.copy() for name, array in arrays.items()}
            for _ in range(rng.choice([1, 1, 1, 2, 3])):
                if number % 10 < 6:
                    mutate_json(rng, rng.choice([header, parts, parts]))
                else:
                    mutate_column(rng, columns)
            yield put_together(header, parts, columns)


def coverage(read, name):
    """How often each element of a tensor is in a box."""
    info = read.tensors[name]
    counts = np.zeros(info.shape, dtype=int)
    for row in read.rows(name):
        counts[read.boxes.box(row, len(info.shape)).within(whole(info))] += 1
    return counts


def fuzz(count):
    """Return how many mutants were read, how many were refused, and what is wrong with those that were read."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 256 * 2**20,) * 2)
    written, files = build()
    archive, num_read, num_refused, wrong = Archive(InMemory(files), written), 0, 0, []
    for data in mutants(count):
        try:
            read = decode(data, "m")
            num_read += 1
            wrong += [
                name for name in read.tensors if read.tensors[name].num_bytes and not (coverage(read, name) == 1).all()
            ]
            archive.manifest = read
            for name in read.tensors:
                archive.read(name)
        except CheckpointError:
            num_refused += 1
    return num_read, num_refused, wrong


def test_mutants_raise_nothing_else_and_cost_no_memory():
    ((num_read, num_refused, wrong),) = fork(1, fuzz, 10_000)
    assert num_refused > 8_000 and num_read > 100 and not wrong
