"""The page and the pictures of the kernel benchmark; both again from raw figures: bench_kernels_page.py PAGE.json."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from statistics import geometric_mean
from typing import Any

Row = dict[str, Any]
OURS = ("gluon", "triton")  # kernels of this project; `reference`, `varlen` and `sdpa` are torch's
_NUMBERS = ("times its rate", "ms (20 % to 80 %)", "rate", "of the ceiling", "host us")
DIRECTIONS = ("forward", "backward", "both")


def write_page(page: Path, about: dict[str, Any], rows: list[Row], *, drawn: bool = False) -> None:
    """Write the page, the raw figures beside it, and if wanted a picture of every family, which the page then shows."""
    page.parent.mkdir(parents=True, exist_ok=True)
    page.with_suffix(".json").write_text(json.dumps({"about": about, "rows": rows}, indent=1))
    families = ((family, timed) for family, of in _families(rows) if (timed := _timed(of)))
    pictures = [draw(page, about, family, timed) for family, timed in families] if drawn else []
    page.write_text("\n".join(_lines(about, rows, page.with_suffix(".json").name, pictures)))


def _lines(about: dict[str, Any], rows: list[Row], raw: str, pictures: list[Path]) -> Iterator[str]:
    yield from (f"# Kernels on {about['device']}", "")
    yield from (f"- {key}: {f'{value:.0f}' if isinstance(value, float) else value}" for key, value in about.items())
    yield from ("", f"Raw figures: [{raw}]({raw}).", "")
    for picture in pictures:
        yield from (f"![{picture.stem}]({picture.name})", "")
    yield from ("## Ours beside the fastest other", "")
    yield from _table(("case", "direction", "ours", "other", "times its rate"), _comparisons(rows))
    yield from ("", "## All", "")
    head = ("case", "direction", "implementation", "ms (20 % to 80 %)", "rate", "of the ceiling", "host us")
    yield from _table(head, (_cells(row, about) for row in _timed(rows)))
    if refused := [row for row in rows if "refused" in row]:
        yield from ("", "## Could not run", "")
        yield from _table(("case", "implementation", "why"), ((r["case"], r["name"], r["refused"]) for r in refused))
    yield ""


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "|".join("--:" if name in _NUMBERS else "---" for name in head) + "|"
    for cells in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _cells(row: Row, about: dict[str, Any]) -> tuple[str, ...]:
    ms, unit = row["ms"], row["unit"]
    return (
        row["case"],
        row["direction"],
        row["name"] + (" (lossy)" if row["lossy"] else ""),
        f"{ms['median']:.3f} ({ms['low']:.3f} to {ms['high']:.3f})",
        f"{row['rate']:.0f} {unit.split()[-1]}",
        f"{row['rate'] / about[unit]:.0%}",
        f"{row['host_us']:.0f}",
    )


def _comparisons(rows: list[Row]) -> Iterator[tuple[str, ...]]:
    """Yield the fastest of ours and of the others in each case that has both, and the means of families."""
    for family, of_family in _families(rows):
        ratios: dict[str, list[float]] = {}
        timed = [row for row in _timed(of_family) if not row["lossy"]]
        for case, direction in dict.fromkeys(map(_place, timed)):
            ranked = sorted((row["rate"], row["name"]) for row in timed if _place(row) == (case, direction))
            ours = [pair for pair in ranked if pair[1] in OURS]
            others = [pair for pair in ranked if pair[1] not in OURS]
            if ours and others:
                ratio = ours[-1][0] / others[-1][0]
                ratios.setdefault(direction, []).append(ratio)
                yield case, direction, ours[-1][1], others[-1][1], f"{ratio:.2f}"
        for direction, values in ratios.items():
            yield f"**{family}**", direction, "", "", f"{geometric_mean(values):.2f} (least {min(values):.2f})"


def _place(row: Row) -> tuple[str, str]:
    return row["case"], row["direction"]


def _families(rows: Iterable[Row]) -> Iterator[tuple[str, list[Row]]]:
    listed = list(rows)
    for family in dict.fromkeys(row["family"] for row in listed):
        yield family, [row for row in listed if row["family"] == family]


def _timed(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if "refused" not in row]


def _pyplot() -> Any:
    import matplotlib  # figures that are drawn elsewhere do without

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw(page: Path, about: dict[str, Any], family: str, rows: list[Row]) -> Path:
    """Draw a family into PAGE-FAMILY.png: rates over the length of sequences, else parts of the ceiling as bars."""
    names = dict.fromkeys(row["name"] for row in rows)
    colours = {name: f"C{number % 10}" for number, name in enumerate(names)}
    kind = _lines_over_length if all(row["length"] for row in rows) else _bars
    figure = kind(about, rows, colours)
    figure.suptitle(f"{family}, {about['device']}")
    picture = page.with_name(f"{page.stem}-{family.replace(' ', '-')}.png")
    figure.savefig(picture, dpi=110)
    _pyplot().close(figure)
    return picture


def _directions(rows: list[Row]) -> list[str]:
    return [direction for direction in DIRECTIONS if any(row["direction"] == direction for row in rows)]


def _lines_over_length(about: dict[str, Any], rows: list[Row], colours: dict[str, str]) -> Any:
    directions, sizes = _directions(rows), sorted({row["sizes"]["head_dim"] for row in rows}, reverse=True)
    shape = {"nrows": len(sizes), "ncols": len(directions), "squeeze": False, "sharex": True, "sharey": True}
    figure, panels = _pyplot().subplots(**shape, figsize=(5 * len(directions), 3.6 * len(sizes)), layout="constrained")
    for size, line in zip(sizes, panels, strict=True):
        for direction, axes in zip(directions, line, strict=True):
            here = [row for row in rows if row["sizes"]["head_dim"] == size and row["direction"] == direction]
            for name, colour in colours.items():
                points = sorted((row["length"], row["rate"]) for row in here if row["name"] == name)
                width = 2.5 if name in OURS else 1.2
                axes.plot(*zip(*points, strict=True), "o-", label=name, color=colour, lw=width) if points else None
            axes.axhline(about[rows[0]["unit"]], color="grey", ls=":", lw=1)
            axes.set(title=f"{direction}, head size {size}", ylim=(0, None), xlabel="tokens", ylabel="TFLOP/s")
            axes.set_xscale("log", base=2)
            axes.set_xticks(lengths := sorted({row["length"] for row in rows}), [str(length) for length in lengths])
            axes.grid(alpha=0.3)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=9)
    return figure


def _bars(about: dict[str, Any], rows: list[Row], colours: dict[str, str]) -> Any:
    directions = _directions(rows)
    tallest = max(sum(row["direction"] == direction for row in rows) for direction in directions)
    size = (5.5 * len(directions), 1.5 + 0.24 * tallest)
    figure, panels = _pyplot().subplots(ncols=len(directions), squeeze=False, figsize=size, layout="constrained")
    for direction, axes in zip(directions, panels[0], strict=True):
        place, ticks = 0.0, {}
        for case, same in groupby((row for row in rows if row["direction"] == direction), key=lambda row: row["case"]):
            bars = [(row["name"], 100 * row["rate"] / about[row["unit"]]) for row in same]
            ticks[case] = place + (len(bars) - 1) / 2
            for name, share in bars:
                axes.barh(place, share, color=colours[name], height=0.9)
                axes.text(share, place, f" {name} {share:.0f}", va="center", fontsize=7)
                place += 1
            place += 0.7
        axes.axvline(100, color="grey", ls=":", lw=1)
        axes.set_yticks(list(ticks.values()), [case.replace(" ", "\n", 1) for case in ticks], fontsize=7)
        axes.margins(x=0.4, y=0.01)
        axes.invert_yaxis()
        axes.set(title=direction, xlabel=f"% of the ceiling ({rows[0]['unit'].split()[0]})")
    return figure


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Write the page and the pictures of the kernel benchmark again.")
    parser.add_argument("raw", type=Path, help="raw figures that bench_kernels.py wrote, PAGE.json")
    args = parser.parse_args()
    found = json.loads(args.raw.read_text())
    write_page(args.raw.with_suffix(".md"), found["about"], found["rows"], drawn=True)


if __name__ == "__main__":
    main()
