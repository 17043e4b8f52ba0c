"""Bad command lines: status 2, one message of value, rule and remedy, no traceback, no process left."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from support import command, fork, small, train

from shardwright.conf.load import load_config
from shardwright.kernels import Kernels
from shardwright.parallel import Mesh, PlanError
from shardwright.parallel.apply import lay_out
from shardwright.scripts.train import main
from shardwright.trainer.build import make_plain_model


@pytest.fixture(scope="module")
def lines(tmp_path_factory, corpus):
    """Name -> (overrides, words that the message must hold)."""
    folder = tmp_path_factory.mktemp("refusals")
    (folder / "empty.jsonl").write_text("")
    (folder / "broken.jsonl").write_text('{"text": "fine"}\n{"text": not json\n')
    (folder / "one.jsonl").write_text(json.dumps({"text": "one"}) + "\n")
    (folder / "few.jsonl").write_text("".join(json.dumps({"text": f"{i}"}) + "\n" for i in range(8)))
    (folder / "words.csv").write_text("a,b\n")
    (folder / "file").write_text("not a folder")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    old = folder / "old"
    fork(1, train, small(corpus, old, "train.num_steps=2", "checkpoint.every_steps=1"))
    (folder / "damaged").mkdir()
    (folder / "damaged" / "manifest.safetensors").write_text('{"format": 1, "tensors": {')
    files = ["data=files", f"run.folder={folder}/run", f"data.path={corpus}"]
    return {
        "unknown key": (["optim.learning_rate=3"], ["optim.learning_rate", "peak_lr"]),
        "unknown top-level key": (["+stages=3"], ["stages", "train"]),
        "misspelt key": (["train.num_step=3"], ["train.num_step", "did you mean train.num_steps?"]),
        "unknown option of a group": (["model=llama9"], ["model=llama9", "llama_tiny"]),
        "unknown experiment": (["+experiment=x"], ["experiment=x", "demo"]),
        "wrong type": (["train.num_steps=many"], ["train.num_steps=many", "must be an integer"]),
        "fraction of a step": (["train.num_steps=1.5"], ["train.num_steps=1.5", "integer"]),
        "negative number": (["train.num_steps=-1"], ["train.num_steps=-1", "greater than 0"]),
        "no such choice": (["train.precision=fp8"], ["train.precision=fp8", "'bf16'"]),
        "key of another choice": (["schedule=cosine", "schedule.decay_fraction=1"], ["schedule.decay_fraction"]),
        "syntax": (["train.num_steps=[1"], ["does not compose", "--help"]),
        "dropped key": (["~train.seed"], ["train.seed", "required"]),
        "heads": (["model.num_heads=8", "model.num_kv_heads=8", "parallel.tensor=3"], ["does not divide", "1, 2, 4 or 8"]),
        "grouped heads": (["model.num_kv_heads=3"], ["model.num_kv_heads=3", "num_heads=8", "1, 2, 4 or 8"]),
        "microbatch": (["train.microbatch_sequences=5"], ["does not divide", "global_batch_sequences=24"]),
        "pipeline alone": (["parallel.pipeline=2"], ["pipeline=2", "1 processes", "multiple of 2"]),
        "world size": (["parallel.shard=4"], ["parallel: shard=4", "1 processes", "--nproc-per-node 4"]),
        "no GPU": (["train.device=cuda"], ["train.device=cuda", "train.device=cpu"]),
        "kernel that cannot run": (["kernels.attention=varlen", *files], ["kernels.attention=varlen", "CUDA", "auto"]),
        "unknown kernel": (["kernels.rope=fast", *files], ["kernels.rope=fast", "reference"]),
        "path not set": (["data=files"], ["data.path", "data.path=VALUE"]),
        "missing file": ([*files, f"data.path={folder}/none.jsonl"], ["none.jsonl", "matches no file"]),
        "kind of file": ([*files, f"data.path={folder}/words.csv"], [".csv", ".jsonl"]),
        "empty dataset": ([*files, f"data.path={folder}/empty.jsonl"], ["empty.jsonl|0 documents"]),
        "one document": ([*files, f"data.path={folder}/one.jsonl"], ["1 documents", "at least 2"]),
        "too few documents": ([*files, f"data.path={folder}/few.jsonl"], ["7 documents", "global_batch_sequences=24"]),
        "broken file": ([*files, f"data.path={folder}/broken.jsonl"], ["broken.jsonl", "repair"]),
        "no such column": ([*files, "data.text_field=body"], ["data.text_field=body", "it has text"]),
        "vocabulary": ([*files, "model.vocab_size=200"], ["model.vocab_size=200", "257"]),
        "no tokenizer": ([*files, f"data.tokenizer={folder}"], ["no tokenizer.json", "bytes"]),
        "broken tokenizer": ([*files, f"data.tokenizer={folder}/tokenizer"], ["tokenizer.json", "cannot be read"]),
        "no checkpoint": ([*files, f"checkpoint.resume={folder}/nowhere"], ["nowhere", "manifest.safetensors is missing"]),
        "run as checkpoint": ([*files, f"checkpoint.resume={old}/checkpoints"], ["complete: checkpoint.resume=", "step_00000002"]),
        "cut manifest": ([*files, f"checkpoint.resume={folder}/damaged"], ["manifest.safetensors is damaged"]),
        "fresh in an old folder": (small(corpus, old, "checkpoint.resume=none"), ["checkpoint.resume=none", "step_00000002"]),
        "hydra's folder": (["hydra.run.dir=elsewhere"], ["hydra.run.dir=elsewhere", "run.folder"]),
        "back in its own folder": (
            small(corpus, old, f"checkpoint.resume={old}/checkpoints/step_00000001"),
            ["own folder", "step_00000002", "run.name"],
        ),
        "another model": (
            small(corpus, folder / "other", f"checkpoint.resume={old}/checkpoints/step_00000001", "model.hidden_size=96"),
            ["model.embedding.weight", "[272, 48]", "[272, 96]"],
        ),
        "unwritable folder": ([*files, f"run.folder={folder}/file/run"], ["file/run", "cannot be written"]),
        "hub name": (["data=hub", "data.name=no/such-dataset", f"run.folder={folder}/run"], ["data.name=no/such-dataset"]),
        "hub tokenizer": ([*files, "data.tokenizer=no/such"], ["data.tokenizer=no/such", "no tokenizer.json"]),
        "wandb not logged in": ([*files, "observe.wandb=online"], ["observe.wandb=online", "wandb login"]),
    }  # fmt: skip


NAMES = """unknown key, unknown top-level key, misspelt key, unknown option of a group, unknown experiment, wrong type,
fraction of a step, negative number, no such choice, key of another choice, syntax, dropped key, heads, grouped heads,
microbatch, pipeline alone, world size, no GPU, kernel that cannot run, unknown kernel, path not set, missing file,
kind of file, empty dataset, one document, too few documents, broken file, no such column, vocabulary, no tokenizer,
broken tokenizer, no checkpoint, run as checkpoint, cut manifest, fresh in an old folder, hydra's folder,
back in its own folder, another model,
unwritable folder, hub name, hub tokenizer, wandb not logged in""".replace("\n", " ").split(", ")


def check(text, words):
    assert "Traceback" not in text, text
    for word in words:
        assert any(alternative in text for alternative in word.split("|")), f"{word!r} not in: {text}"


TYPED = ["unknown key", "syntax", "no GPU", "missing file", "no checkpoint", "another model", "unwritable folder"]
TYPED += ["hub name", "hub tokenizer", "wandb not logged in"]  # of these the environment decides


@pytest.fixture(scope="module")
def finished(lines, tmp_path_factory):
    """Name -> the finished process: some as a user starts them, two at a time, the others forked, which is quicker."""
    home = tmp_path_factory.mktemp("home")
    offline = {"HF_ENDPOINT": "https://hub.invalid", "WANDB_API_KEY": "", "HOME": str(home), "CUDA_VISIBLE_DEVICES": ""}
    with ThreadPoolExecutor(2) as pool:
        waiting = {name: pool.submit(command, *lines[name][0], env=offline, timeout=60) for name in TYPED}
        done = {name: future.result() for name, future in waiting.items()}
    for name in NAMES:
        if name not in done:
            error = home / "stderr"
            [(status, has_group)] = fork(1, typed, lines[name][0], 1, error)
            assert not has_group, name
            done[name] = SimpleNamespace(returncode=status, stderr=error.read_text())
    return done


@pytest.mark.parametrize("name", NAMES)
def test_refused(lines, finished, name):
    words, done = lines[name][1], finished[name]
    assert done.returncode == 2, done.stderr
    check(done.stderr, words)
    messages = [line for line in done.stderr.splitlines() if "Error: " in line]
    assert len(messages) == 1, done.stderr


def test_all_lines_are_tried(lines):
    assert sorted(lines) == sorted(NAMES)


@pytest.mark.parametrize(
    "name", ["unknown key", *(pytest.param(name, marks=pytest.mark.slow) for name in ("world size", "no checkpoint"))]
)
def test_refused_once_under_torchrun(lines, name):
    overrides, words = lines[name]
    done = command(*overrides, processes=2)
    ours, _, theirs = done.stderr.partition("torch/distributed/elastic")  # whose own report follows ours
    check(ours, [word.replace("1 processes", "2 processes") for word in words])
    assert ours.count("Error: ") == 1, done.stderr
    assert "exitcode: 2" in theirs or "exitcode  : 2" in theirs, done.stderr
    left = subprocess.run(["pgrep", "-f", overrides[-1]], capture_output=True, text=True)
    assert not left.stdout.strip(), f"processes left: {left.stdout}"


TABLE = ["parallel.pipeline=2", "parallel.shard=1", "train.global_batch_sequences=1"]
TABLES = {
    "stuck": "stages: [0, 1]\nranks:\n  - 0B0 0F0\n  - 1F0 1B0\n",
    "short": "stages: [0, 1]\nranks:\n  - 0F0 0B0\n  - 1F0 1B0\n",
    "three": "stages: [0, 1, 2]\nranks:\n  - 0F0 0B0\n  - 1F0 1B0\n  - 2F0 2B0\n",
    "prose": "first forward, then backward\n",
}

# Name -> (overrides, words that the message must hold), and the number of processes where it is not 1.
LAYOUTS = {
    "tensor and vocabulary": (
        ["parallel.tensor=2", "model.vocab_size=259", "model.tied_embeddings=false"],
        ["parallel.tensor=2", "embedding.weight", "divide 259"],
        2,
    ),
    "tensor and features": (["parallel.tensor=4", "model.intermediate_size=42"], ["feed_forward", "divide 42"], 4),
    "tensor beyond kv heads": (
        ["model.num_heads=12", "model.num_kv_heads=4", "parallel.tensor=6"],
        ["parallel.tensor=6", "num_kv_heads=4", "use 1, 2, 4 or 12"],
    ),
    "ring length": (["parallel.context=3"], ["sequence_length=256", "context=3", "ring", "multiple of 6", "use 258"]),
    "ring and tensor length": (
        ["parallel.context=2", "parallel.tensor=8", "train.sequence_length=24"],
        ["sequence_length=24", "tensor=8", "multiple of 16", "use 32"],
    ),
    "ulysses heads": (
        ["parallel.context=8", "parallel.tensor=2", "parallel.context_mode=ulysses", "model.num_heads=8"],
        ["parallel.context=8", "4 query heads", "1, 2 or 4", "context_mode=ring"],
    ),
    "unknown schedule": (
        ["parallel.pipeline=2", "parallel.pipeline_schedule=zb_v"],
        ["pipeline_schedule=zb_v", "unknown", "zbv", ".yaml"],
    ),
    "chunks of zbv": (
        ["parallel.pipeline=2", "parallel.pipeline_schedule=zbv", "parallel.pipeline_chunks=3"],
        ["pipeline_chunks=3", "zbv needs 2", "auto"],
    ),
    "chunks of 1f1b": (["parallel.pipeline=2", "parallel.pipeline_chunks=2"], ["pipeline_chunks=2", "1f1b needs 1"]),
    "chunks of interleaved": (
        ["parallel.pipeline=2", "parallel.pipeline_schedule=interleaved_1f1b", "parallel.pipeline_chunks=1"],
        ["pipeline_chunks=1", "needs 2 or more"],
    ),
    "schedule without pipeline": (
        ["parallel.pipeline_schedule=zbv"],
        ["pipeline_schedule=zbv", "no effect", "pipeline=1"],
    ),
    "chunks without pipeline": (["parallel.pipeline_chunks=1"], ["pipeline_chunks=1", "no effect", "pipeline=1"]),
    "mode without context": (["parallel.context_mode=ulysses"], ["context_mode=ulysses", "no effect", "context=1"]),
    "overlap without tensor": (
        ["parallel.tensor_overlap=chunked"],
        ["tensor_overlap=chunked", "no effect", "tensor=1"],
    ),
    "fp8 and tensor": (
        ["parallel.tensor=2", "kernels.linear=fp8_rowwise"],
        ["kernels.linear=fp8_rowwise", "tensor=2", "auto"],
    ),
    "fp8 attention in a ring": (
        ["parallel.context=2", "kernels.attention=fp8"],
        ["kernels.attention=fp8", "context=2", "ulysses"],
    ),
    "fp8 without a GPU": (["kernels.linear=fp8_blockwise"], ["kernels.linear=fp8_blockwise", "CUDA", "auto"]),
    "zero 3 and pipeline": (["parallel.pipeline=2", "parallel.zero=3"], ["zero=3", "pipeline=2", "use zero=2"]),
    "zero 1": (["parallel.zero=1"], ["parallel.zero=1", "2"]),
    "deeper than the model": (
        ["parallel.pipeline=4", "parallel.pipeline_schedule=zbv", "model.num_layers=6"],
        ["pipeline=4 x 2 chunks", "num_layers=6", "every stage needs a layer"],
    ),
    "no table": ([*TABLE, "parallel.pipeline_schedule={folder}/none.yaml"], ["none.yaml", "cannot be read"], 2),
    "table of prose": (
        [*TABLE, "parallel.pipeline_schedule={folder}/prose.yaml"],
        ["prose.yaml", "stages and ranks"],
        2,
    ),
    "table that waits for ever": (
        [*TABLE, "parallel.pipeline_schedule={folder}/stuck.yaml"],
        ["stuck.yaml", "rank 0 waits at 0B0|deadlock"],
        2,
    ),
    "table of other ranks": (
        [*TABLE, "parallel.pipeline_schedule={folder}/three.yaml"],
        ["three.yaml", "3 ranks", "2 are asked"],
        2,
    ),
    "table of other microbatches": (
        [*TABLE, "train.global_batch_sequences=4", "parallel.pipeline_schedule={folder}/short.yaml"],
        ["short.yaml", "1 microbatches", "4 are asked"],
        2,
    ),
    "chunks of a table": (
        [*TABLE, "parallel.pipeline_schedule={folder}/short.yaml", "parallel.pipeline_chunks=1"],
        ["pipeline_chunks=1", "no effect with a table"],
    ),
}


def typed(line, num_processes, error):
    """Be one of several processes of this command line; return its status, and whether it got as far as a group."""
    os.environ["WORLD_SIZE"], sys.argv = str(num_processes), ["train.py", *line]
    with error.open("w") as sys.stderr:
        try:
            main()
        except SystemExit as end:
            return end.code, dist.is_initialized()
    return 0, dist.is_initialized()


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_refused_before_any_group_starts(tmp_path, name):
    for table, text in TABLES.items():
        (tmp_path / f"{table}.yaml").write_text(text)
    line, words, *processes = LAYOUTS[name]
    error = tmp_path / "stderr"
    line = [f"run.folder={tmp_path}/run", *(word.replace("{folder}", str(tmp_path)) for word in line)]
    assert fork(1, typed, line, *(processes or [1]), error) == [(2, False)]
    text = error.read_text()
    check(text, words)
    assert text.count("Error: ") == 1 and not (tmp_path / "run").exists(), text


@pytest.mark.parametrize("schedule", ["zb_h1", "{folder}/split.yaml"])
def test_a_schedule_that_defers_weights_refuses_fp8(tmp_path, schedule):
    (tmp_path / "split.yaml").write_text("stages: [0, 1]\nranks:\n  - 0F0 0I0 0W0\n  - 1F0 1I0 1W0\n")
    schedule = schedule.replace("{folder}", str(tmp_path))
    line = [*TABLE, f"parallel.pipeline_schedule={schedule}", "train.microbatch_sequences=1"]
    config = load_config([*line, "kernels.linear=fp8_rowwise"])
    mesh = Mesh.of(config.parallel, num_processes=2, rank=0)
    with pytest.raises(PlanError, match=rf"fp8_rowwise .*{schedule} .*kernels.linear=auto, or 1f1b"):
        lay_out(*make_plain_model(config, Kernels()), mesh, config)
    plain = load_config(line)
    assert lay_out(*make_plain_model(plain, Kernels()), mesh, plain).schedule.splits_backward
