"""The support matrix of docs/parallelism.md: `python tests/lib/support_matrix.py` writes it, a test compares it."""

import copy
import importlib.util
from functools import cache
from itertools import product

import yaml
from support import ROOT, TINY, spell_out

from shardwright.conf import ConfigError
from shardwright.conf.load import from_dict, load_config, to_dict

PAGE = ROOT / "docs" / "parallelism.md"
BEGIN, END = "<!-- matrix -->\n", "<!-- /matrix -->"

AXES = {
    "replicate": "replicate=2",
    "shard, ZeRO-3": "shard=2 zero=3",
    "shard, ZeRO-2": "shard=2 zero=2",
    "ring": "context=2",
    "ulysses": "context=2 mode=ulysses",
    "tensor": "tensor=2",
    "chunked": "tensor=2 overlap=chunked",
    "gpipe": "pipeline=2 schedule=gpipe",
    "1f1b": "pipeline=2 schedule=1f1b",
    "interleaved": "pipeline=2 schedule=interleaved_1f1b",
    "zb_h1": "pipeline=2 schedule=zb_h1",
    "zbv": "pipeline=2 schedule=zbv",
}
OPTIONS = {
    "full recompute": "recompute=full",
    "selective recompute": "recompute=selective",
    "tied embeddings": "tied=true",
    "parallel block": "parallel_block=true",
    "sliding window": "window=7",
    "several sequences per microbatch": "microbatch=2",
    "LAMB": "optim=lamb",
}


def settings(text):
    """Short settings, with what a degree above 1 implies."""
    found = dict(word.split("=", 1) for word in text.split())
    if "pipeline" in found:
        found = {"schedule": "1f1b", "zero": "2"} | found
    if "context" in found:
        found = {"mode": "ring"} | found
    if "shard" in found:
        found = {"zero": "3"} | found
    return found


def has(layout, feature):
    """Whether a layout has a feature, at any degree and any size."""
    have = settings(layout)
    return all(
        key in have
        and (
            have[key] == value or key in ("pipeline", "replicate", "shard", "context", "tensor", "window", "microbatch")
        )
        for key, value in settings(feature).items()
        if not (key == "zero" and "pipeline" in feature)
    )


def layouts():
    """The layouts of the equivalence suite."""
    path = ROOT / "tests" / "equivalence" / "test_every_layout.py"
    spec = importlib.util.spec_from_file_location("every_layout", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [name for part in module.NAMES.values() for names in part.values() for name in names]


@cache
def plain():
    """A config without parallelism, as plain containers."""
    return to_dict(load_config(TINY))


def refused(one, other):
    """Whether the config refuses two axes together."""
    raw = copy.deepcopy(plain())
    for setting in spell_out(f"{one} {other}"):
        path, _, value = setting.partition("=")
        raw["parallel"][path.removeprefix("parallel.")] = yaml.safe_load(value)
    try:
        from_dict(raw)
    except ConfigError:
        return True
    return False


def matrix():
    """The table as Markdown."""
    tested = layouts()
    lines = [f"| | {' | '.join(AXES)} |", f"|---|{'--:|' * len(AXES)}"]
    axis_of = {name: text.split("=")[0] for name, text in AXES.items()}
    rows = dict(AXES) | OPTIONS
    for row, column in product(rows, [None, *AXES]):
        if column is None:
            lines.append(f"| {row} |")
            continue
        count = sum(has(layout, rows[row]) and has(layout, AXES[column]) for layout in tested)
        same_axis = row != column and axis_of.get(row) == axis_of[column]
        impossible = row in AXES and not same_axis and refused(rows[row], AXES[column])
        cell = "" if same_axis else "x" if impossible else str(count)
        lines[-1] += f" {cell} |"
    return "\n".join(lines) + "\n"


def replace(page, table):
    """The page with the table in its place."""
    head, rest = page.split(BEGIN)
    return head + BEGIN + table + END + rest.split(END, 1)[1]


if __name__ == "__main__":
    PAGE.write_text(replace(PAGE.read_text("utf-8"), matrix()), "utf-8")
