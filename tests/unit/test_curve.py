import json

import pytest

from shardwright.observe.curve import compare_losses, draw_loss_curve


def write(folder, losses):
    folder.mkdir()
    records = [{"step": i + 1, "tokens": 10 * (i + 1), "loss": loss} for i, loss in enumerate(losses)]
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in [*records, {"step": 2, "eval_loss": 3.0}]))
    return path


def test_two_runs_are_drawn_and_compared(tmp_path):
    metrics, other = write(tmp_path / "a", [4.0, 2.0, 1.0]), write(tmp_path / "b", [4.0, 2.5, 1.0])
    assert compare_losses(metrics, other, 1) == pytest.approx(0.2)
    assert compare_losses(metrics, other, 2) == pytest.approx(0.25 / 1.75)
    draw_loss_curve(metrics, tmp_path / "both.png", "a", other)
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("losses", [[4.0, 2.0], [4.0, 2.0, 1.0, 0.5]])
def test_runs_of_other_steps_are_not_compared(tmp_path, losses):
    with pytest.raises(ValueError, match="both must have the same, 1 at least"):
        compare_losses(write(tmp_path / "a", [4.0, 2.0, 1.0]), write(tmp_path / "b", losses), 1)


def test_too_short_runs_are_not_compared(tmp_path):
    with pytest.raises(ValueError, match="5 at least"):
        compare_losses(write(tmp_path / "a", [4.0]), write(tmp_path / "b", [4.0]), 5)
