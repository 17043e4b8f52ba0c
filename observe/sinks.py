"""Where records go: console, metrics.jsonl, Weights & Biases, TensorBoard. Made on rank 0 only."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from shardwright.conf import ConfigError
from shardwright.observe.log import CONSOLE
from shardwright.observe.record import StepRecord

if TYPE_CHECKING:
    from shardwright.conf.schema import TrainConfig

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Something that takes records."""

    def step(self, record: StepRecord) -> None:
        """Take a logged step."""
        ...

    def evaluation(self, step: int, loss: float) -> None:
        """Take a held-out loss in nats per token."""
        ...

    def close(self) -> None:
        """Make everything durable."""
        ...


class ConsoleSink:
    """A log line per record, and on a terminal one progress line below."""

    def __init__(self, num_steps: int, step: int) -> None:
        self._num_steps = num_steps
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(20), TaskProgressColumn(), console=CONSOLE, transient=True
        )
        self._task = self._progress.add_task("starting", total=num_steps, completed=step)
        if sys.stderr.isatty():
            self._progress.start()

    def advance(self, step: int) -> None:
        """Move the bar; costs no reading of the device."""
        self._progress.update(self._task, completed=step)

    def step(self, record: StepRecord) -> None:
        """See `Sink`."""
        eta = timedelta(seconds=round(record.eta_seconds))
        short = (
            f"step {record.step}/{self._num_steps} | loss {record.loss:.4f} | "
            f"{record.tokens_per_second_per_gpu:,.0f} tok/s/GPU | ETA {eta} | {record.memory_gib:.2f} GiB"
        )
        wait = record.data_wait_seconds / record.step_seconds if record.step_seconds else 0.0
        mfu = f" | MFU {record.mfu_full:.1%} full {record.mfu_causal:.1%} causal" if record.mfu_full else ""
        skipped = f" | {record.skipped_steps} skipped" if record.skipped_steps else ""
        logger.info(
            f"{short} | norm {record.grad_norm:.3f} | lr {record.lr:.2e} | "
            f"{record.step_seconds:.3f} s/step, {wait:.1%} waiting for data{mfu}{skipped}"
        )
        self._progress.update(self._task, description=short, completed=record.step)

    def evaluation(self, step: int, loss: float) -> None:
        """See `Sink`."""
        logger.info(f"step {step}/{self._num_steps} | held-out loss {loss:.4f} nats per token")

    def close(self) -> None:
        """See `Sink`."""
        if self._progress.live.is_started:
            self._progress.stop()


class JsonlSink:
    """One JSON object per record; on resuming, what lies beyond the checkpoint is dropped: it happens again."""

    def __init__(self, path: Path, step: int) -> None:
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if _step_of(line) <= step]
        temporary = path.with_suffix(".part")
        temporary.write_text("".join(f"{line}\n" for line in kept), "utf-8")
        os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")

    def step(self, record: StepRecord) -> None:
        """See `Sink`."""
        self._write(asdict(record))

    def evaluation(self, step: int, loss: float) -> None:
        """See `Sink`."""
        self._write({"step": step, "eval_loss": loss})

    def close(self) -> None:
        """See `Sink`."""
        self._file.close()

    def _write(self, fields: dict[str, Any]) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()


class WandbSink:
    """Weights & Biases; a resumed run goes on under the same id."""

    def __init__(self, config: TrainConfig, plain_config: dict[str, Any], mode: str, run_id: str) -> None:
        import wandb

        self._run = wandb.init(
            project=config.observe.wandb_project,
            name=config.run.name,
            id=run_id,
            resume="allow",
            mode=mode,  # type: ignore[arg-type]
            dir=config.run.folder,
            config=plain_config,
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._run.define_metric("*", step_metric="step")

    def step(self, record: StepRecord) -> None:
        """See `Sink`."""
        self._run.log(asdict(record))

    def evaluation(self, step: int, loss: float) -> None:
        """See `Sink`."""
        self._run.log({"step": step, "eval_loss": loss})

    def close(self) -> None:
        """See `Sink`."""
        self._run.finish()


class TensorboardSink:
    """Scalars for TensorBoard."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def step(self, record: StepRecord) -> None:
        """See `Sink`."""
        for name, value in asdict(record).items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, record.step)

    def evaluation(self, step: int, loss: float) -> None:
        """See `Sink`."""
        self._writer.add_scalar("eval_loss", loss, step)

    def close(self) -> None:
        """See `Sink`."""
        self._writer.close()


def wandb_mode(asked: str) -> str | None:
    """Return the mode for wandb.init, or None to leave it out.

    Raises:
        ConfigError: it was asked for and is not installed, or online and not logged in.
    """
    if asked == "disabled":
        return None
    if importlib.util.find_spec("wandb") is None:
        if asked == "auto":
            logger.info("wandb is not installed: metrics go to metrics.jsonl alone; pip install 'shardwright[wandb]'")
            return None
        raise ConfigError(f"observe.wandb={asked} needs the wandb extra; run pip install 'shardwright[wandb]'")
    import wandb

    mode = os.environ.get("WANDB_MODE") if asked == "auto" else asked
    if mode in ("offline", "disabled"):
        return mode
    logged_in = wandb.login(prompt=False)
    if mode is None:
        return "online" if logged_in else "offline"
    if not logged_in:
        raise ConfigError("observe.wandb=online needs a login; run wandb login, set WANDB_API_KEY, or use offline")
    return mode


def check_tensorboard(asked: bool) -> None:
    """Raise ConfigError if TensorBoard was asked for and is not installed."""
    if asked and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("observe.tensorboard=true needs its extra; run pip install 'shardwright[tensorboard]'")


def make_sinks(
    config: TrainConfig, plain_config: dict[str, Any], *, step: int, wandb_id: str, mode: str | None
) -> Sinks:
    """Return the sinks of rank 0 for a run that goes on after `step`."""
    folder = Path(config.run.folder)
    sinks: list[Sink] = [ConsoleSink(config.train.num_steps, step), JsonlSink(folder / "metrics.jsonl", step)]
    if mode is not None:
        try:
            sinks.append(WandbSink(config, plain_config, mode, wandb_id))
        except Exception as error:  # whatever is wrong with it, training does not depend on it
            logger.warning(f"Weights & Biases cannot be started and is left out: {error}")
    if config.observe.tensorboard:
        sinks.append(TensorboardSink(folder / "tensorboard", step))
    return Sinks(sinks)


class Sinks:
    """All sinks of a run; a broken one is reported and dropped, and training goes on."""

    def __init__(self, sinks: list[Sink]) -> None:
        self._sinks = sinks

    def step(self, record: StepRecord) -> None:
        """Hand a record to every sink."""
        self._each(lambda sink: sink.step(record))

    def evaluation(self, step: int, loss: float) -> None:
        """Hand a held-out loss to every sink."""
        self._each(lambda sink: sink.evaluation(step, loss))

    def advance(self, step: int) -> None:
        """Move the console's bar."""
        for sink in self._sinks:
            if isinstance(sink, ConsoleSink):
                sink.advance(step)

    def close(self) -> None:
        """Close every sink."""
        self._each(lambda sink: sink.close())

    def _each(self, action: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                action(sink)
            except Exception as error:
                logger.warning(f"{type(sink).__name__} failed and is dropped: {error}")
                self._sinks.remove(sink)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut short by a crash
