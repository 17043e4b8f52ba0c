"""Order, packing and position of the data."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest

from shardwright.conf.load import load_config
from shardwright.data import DataError
from shardwright.data.loader import Loader, Position, Share, held_out_batches, merge_lanes, tokenize_document
from shardwright.data.pack import IGNORED, Document, pack, stack
from shardwright.data.text import load_text
from shardwright.data.tokenize import ByteTokenizer, load_tokenizer

TOKENS = 64


def share(rank=0, degree=1, batch=12, microbatch=1):
    return Share(
        sequence_length=TOKENS,
        global_batch_sequences=batch,
        microbatch_sequences=microbatch,
        data_rank=rank,
        data_degree=degree,
    )


def text(kind, corpus, lanes=12, seed=0):
    source = [f"data.path={corpus}"] if kind == "files" else [f"data.name={corpus.parent}"]
    config = load_config([f"data={kind}", *source, "data.holdout_documents=16"])
    return load_text(config.data, vocab_size=257, num_lanes=lanes, seed=seed)


def batches(source, position, rank, degree, count, batch=12, microbatch=1):
    """Rows of each global batch that one process takes, and the loader's position after them."""
    mine = share(rank, degree, batch, microbatch)
    loader = Loader(source.open(position, mine), source.tokenizer, mine, position)
    rows = [
        [row for b in batch for row in zip(b.ids.numpy(), b.labels.numpy(), b.positions.numpy(), strict=True)]
        for batch in itertools.islice(loader, count)
    ]
    loader.close()
    return rows, loader.position


def run(source, position, degree, count, **kwargs):
    """Global batches as sorted bytes, over all processes, and the position after them, merged."""
    parts = [batches(source, position, rank, degree, count, **kwargs) for rank in range(degree)]
    merged = [sorted(b"".join(x.tobytes() for x in row) for rows, _ in parts for row in rows[i]) for i in range(count)]
    lanes = sum(merge_lanes(p, share(r, degree), lambda t: t).lanes for r, (_, p) in enumerate(parts))
    return merged, Position(parts[0][1].cursor, lanes)


@pytest.mark.parametrize("kind", ["files", "hub"])
def test_global_batches_do_not_depend_on_processes_or_interruptions(corpus, kind):
    source = text(kind, corpus)
    expected, _ = run(source, Position.start(12), 1, 9)
    for degrees in ([2], [4, 1, 3], [3, 6, 2], [12]):
        found, position = [], Position.start(12)
        for degree in degrees:
            part, position = run(source, position, degree, 9 // len(degrees))
            found += part
        assert found == expected[: len(found)]
    assert run(source, Position.start(12), 2, 3, microbatch=3)[0] == expected[:3]


@pytest.mark.parametrize("kind", ["files", "hub"])
def test_a_run_may_be_interrupted_anywhere_also_between_two_epochs(tmp_path, kind):
    """Documents of very different lengths, so that lanes enter an epoch at different times."""
    lengths = np.random.default_rng(0).integers(5, 300, 60)
    path = tmp_path / "few.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"{i} " + chr(97 + i % 26) * int(n)}) + "\n" for i, n in enumerate(lengths))
    )
    source = text(kind, path, lanes=4)
    expected, end = run(source, Position.start(4), 1, 90, batch=4)
    assert end.lanes[:, 0].min() >= 2, "three epochs begun"
    for interrupted in range(5, 90, 6):
        first, position = run(source, Position.start(4), 2, interrupted, batch=4)
        rest, _ = run(source, position, 4, 90 - interrupted, batch=4)
        assert first + rest == expected, f"interrupted after {interrupted}"


def test_another_seed_is_another_order(corpus):
    assert run(text("files", corpus), Position.start(12), 1, 1) != run(
        text("files", corpus, seed=1), Position.start(12), 1, 1
    )


@pytest.mark.parametrize("kind", ["files", "hub"])
def test_an_epoch_holds_every_document_once(corpus, kind):
    """Follow each lane through its first epoch: every training document is met whole and once, held-out ones never."""
    source, mine, position = text(kind, corpus), share(), Position.start(12)
    loader = Loader(source.open(position, mine), source.tokenizer, mine, position)
    lanes = [[] for _ in range(12)]
    while not (loader.position.lanes[:, 0] > 0).all():
        before = loader.position.lanes[:, 0]
        for lane, batch in enumerate(next(loader)):
            if before[lane] == 0:
                lanes[lane].append(batch)
    loader.close()
    met = []
    for parts in lanes:
        ids, labels = (np.concatenate([getattr(p, key).numpy().ravel() for p in parts]) for key in ("ids", "labels"))
        inside = ids[:-1] != 256
        assert (labels[:-1][inside] == ids[1:][inside]).all()
        assert (labels[:-1][~inside] == IGNORED).all()
        met += [bytes(d[:-1].astype(np.uint8)).decode() for d in np.split(ids, np.flatnonzero(ids == 256) + 1)[:-1]]
    documents = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    training = set(documents) - set(source.held_out)
    assert len(training) == len(documents) - 16
    counts = Counter(met)
    assert set(counts) == training
    repeated = sum(counts.values()) - len(training)
    assert repeated <= 12 * 8, "beyond the sequence in which a lane's second epoch begins, nothing comes twice"


def test_packing_predicts_each_token_once_and_restarts_positions():
    documents = [np.append(np.arange(10, 10 + n), 256) for n in (5, 1, 30, 12, 3)]
    sequences = list(pack((Document(0, i, d) for i, d in enumerate(documents)), 16))
    ids, labels, positions = (
        np.concatenate([getattr(s, k) for s in sequences]) for k in ("ids", "labels", "positions")
    )
    total = sum(map(len, documents))
    assert (ids[:total] == np.concatenate(documents)).all() and (labels[total:] == IGNORED).all()
    expected = np.concatenate([np.append(d[1:], IGNORED) for d in documents])
    assert (labels[:total] == expected).all()
    starts = {0, *np.cumsum([len(d) for d in documents])[:-1], *range(0, len(ids), 16), total}
    assert set(np.flatnonzero(positions == 0)) == starts - {len(ids)}
    assert all(positions[i] == positions[i - 1] + 1 for i in range(1, len(ids)) if positions[i])

    batch = stack(sequences)
    assert batch.bounds.tolist() == [*sorted(starts - {len(ids)}), len(ids)]
    assert batch.longest == int(np.diff(batch.bounds.numpy()).max())


def test_packing_goes_on_from_any_place():
    documents = [Document(0, i, np.arange(100 * i, 100 * i + n)) for i, n in enumerate((5, 40, 7, 33, 20, 50))]
    whole = list(pack(iter(documents), 16))
    for i, sequence in enumerate(whole[:-1]):
        _, ordinal, offset = sequence.after
        rest = list(pack(iter(documents[ordinal:]), 16, offset))
        assert [r.ids.tolist() for r in rest] == [w.ids.tolist() for w in whole[i + 1 :]]
        assert [r.labels.tolist() for r in rest] == [w.labels.tolist() for w in whole[i + 1 :]]


def test_held_out_is_the_same_for_every_layout(corpus):
    source = text("files", corpus)
    whole = held_out_batches(source.held_out, source.tokenizer, share(), 3)
    rows = sorted(b.ids.numpy().tobytes() for step in whole for b in step)
    for degree in (2, 3):
        parts = [held_out_batches(source.held_out, source.tokenizer, share(r, degree), 3) for r in range(degree)]
        assert sorted(b.ids.numpy().tobytes() for part in parts for step in part for b in step) == rows
        assert {len(part) for part in parts} == {len(whole)}


def test_lanes_that_cannot_be_shared_out(corpus):
    source = text("files", corpus)
    with pytest.raises(DataError, match=r"12 lanes.*is 5"):
        Loader(source.open(Position.start(12), share()), source.tokenizer, share(0, 5), Position.start(12))


def test_an_error_of_the_source_reaches_the_loop(corpus):
    class Broken:
        def read(self, epoch, ordinal):
            raise OSError("disk gone")

    loader = Loader(Broken(), ByteTokenizer(), share(), Position.start(12))
    with pytest.raises(OSError, match="disk gone"):
        next(loader)


def test_a_source_that_runs_dry_is_an_error_not_a_hang():
    class Dry:
        def read(self, epoch, ordinal):
            return "text" if ordinal < 5 else None

    loader = Loader(Dry(), ByteTokenizer(), share(), Position.start(12))
    with pytest.raises(DataError, match="too few documents"):
        next(loader)


def test_bytes_tokenizer_round_trip():
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("naïve ☂ text")
    assert ids.max() < 256 and tokenizer.decode(ids.tolist()) == "naïve ☂ text"
    assert tokenize_document(tokenizer, "a").tolist() == [97, 256]


def test_tokenizer_json(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2, "<end>": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="no end-of-text token"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.vocab_size == 4 and tokenizer.end_id == 3
    assert tokenize_document(tokenizer, "a b c").tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("suffix", ["txt", "parquet", "json"])
def test_kinds_of_files(tmp_path, corpus, suffix):
    lines = [json.loads(line) for line in corpus.read_text().splitlines()]
    path = tmp_path / f"data.{suffix}"
    if suffix == "txt":
        path.write_text("\n".join(line["text"] for line in lines) * 10)
    elif suffix == "json":
        path.write_text(json.dumps(lines))
    else:
        import pandas

        pandas.DataFrame(lines).to_parquet(path)
    config = load_config(["data=files", f"data.path={tmp_path}/*.{suffix}"])
    source = load_text(config.data, vocab_size=257, num_lanes=4, seed=0)
    assert len(run(source, Position.start(4), 2, 2, batch=4)[0][0]) == 4
    assert source.held_out
