"""What a run leaves for those who watch it."""

import importlib.util
import json

import pytest
import yaml
from support import command, fork, records, small, train
from wandb_log import read_run

from shardwright.conf import ConfigError
from shardwright.conf.load import from_dict, load_config, to_dict
from shardwright.observe import sinks

FIELDS = [
    "step",
    "tokens",
    "loss",
    "grad_norm",
    "lr",
    "tokens_per_second_per_gpu",
    "step_seconds",
    "data_wait_seconds",
    "memory_gib",
    "mfu_full",
    "mfu_causal",
]


def test_offline_wandb_holds_config_and_metrics_and_stays_one_run(corpus, tmp_path):
    overrides = small(corpus, tmp_path, "observe.wandb=offline", "checkpoint.every_steps=2", "evaluate.every_steps=2")
    first, second = ([*overrides, f"train.num_steps={n}"] for n in (4, 7))
    for line in (first, second):
        done = command(*line)
        assert done.returncode == 0, done.stderr
    runs = [read_run(path) for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))]
    assert len(runs) == 2 and len({run_id for run_id, _, _ in runs}) == 1
    logged = records(tmp_path)
    for (_, config, history), steps, line in zip(runs, ([1, 2, 3, 4], [5, 6, 7]), (first, second), strict=True):
        assert from_dict({k: v for k, v in config.items() if k != "_wandb"}) == load_config(line)
        rows = [row for row in history if "loss" in row]
        assert [row["step"] for row in rows] == steps
        for row in rows:
            assert {field: row[field] for field in FIELDS} == {field: logged[row["step"]][field] for field in FIELDS}
    assert [row["step"] for _, _, history in runs for row in history if "eval_loss" in row] == [2, 4, 6, 7]


def test_metrics_config_and_tensorboard(corpus, tmp_path):
    overrides = small(corpus, tmp_path, "train.num_steps=4", "observe.every_steps=2", "observe.tensorboard=true")
    fork(2, train, overrides)
    found = records(tmp_path)
    assert list(found) == [2, 4]
    for step, record in found.items():
        assert set(FIELDS) <= set(record)
        assert record["tokens"] == step * 12 * 64
        assert record["tokens_per_second_per_gpu"] * record["step_seconds"] * 2 == pytest.approx(12 * 64)
        assert 0 <= record["data_wait_seconds"] < record["step_seconds"]
    assert from_dict(yaml.safe_load((tmp_path / "config.yaml").read_text())) == load_config(overrides)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (step, pytest.approx(record["loss"])) for step, record in found.items()
    ]


def test_metrics_cut_short_by_a_crash_are_mended(corpus, tmp_path):
    overrides = small(corpus, tmp_path, "checkpoint.every_steps=2")
    fork(1, train, [*overrides, "train.num_steps=4"])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    fork(1, train, [*overrides, "train.num_steps=6"])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_a_broken_sink_does_not_stop_training(corpus, tmp_path):
    fork(1, with_broken_sink, small(corpus, tmp_path, "train.num_steps=3"))
    assert list(records(tmp_path)) == [1, 2, 3]


def with_broken_sink(overrides):
    def break_console(run, step, batches):
        def fail(record):
            raise OSError("terminal gone")

        if step == 0:
            run.sinks._sinks[0].step = fail

    train(overrides, break_console)


@pytest.mark.parametrize("asked", ["online", "offline"])
def test_a_missing_extra_is_named(monkeypatch, asked):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"observe.wandb={asked} needs the wandb extra; run pip install"):
        sinks.wandb_mode(asked)
    with pytest.raises(ConfigError, match=r"observe.tensorboard=true needs its extra; run pip install"):
        sinks.check_tensorboard(True)
    assert sinks.wandb_mode("auto") is None


def test_the_saved_config_holds_no_secret(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("HF_TOKEN", "hf_secret_token")
    fork(1, train, small(corpus, tmp_path, "train.num_steps=1"))
    for path in tmp_path.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert b"k" * 40 not in data and b"hf_secret_token" not in data, path
    assert to_dict(load_config())
