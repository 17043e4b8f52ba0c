"""The kernel benchmark on a machine without a GPU: what runs is measured, what cannot run says why."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from shardwright.kernels import attention
from shardwright.kernels.op import Op
from shardwright.kernels.triton.config import Choice, Config
from shardwright.scripts import bench_kernels, bench_kernels_page, bench_kernels_peers
from shardwright.scripts.bench_kernels_cases import Case, cases
from shardwright.scripts.bench_kernels_peers import Mask
from shardwright.scripts.bench_kernels_tables import Tables
from shardwright.scripts.bench_kernels_timing import Stopwatch, Timing

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where Triton interprets
EXPECTED = (
    "needs a CUDA device",
    "fused on CUDA only",
    "not installed: No module named",
    "RuntimeError: No viable backend",
)


def bench(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", *map(str, arguments), "--device", "cpu"])
    bench_kernels.main()


def test_all_kinds_of_cases_run_and_are_drawn(tmp_path, monkeypatch, capsys):
    page = tmp_path / "new" / "page.md"
    only = "norm|rope|glu|embedding|^cross|vocabulary|linear 256|d128 8 x 32|window|documents|groups"
    bench(monkeypatch, page, "--calls", 1, "--seconds", 0.01, "--only", only)
    found = json.loads(page.with_suffix(".json").read_text())
    assert len(capsys.readouterr().out.splitlines()) == len(found["rows"])
    refused = [row["refused"] for row in found["rows"] if "refused" in row]
    assert refused and all(reason.startswith(EXPECTED) for reason in refused), refused
    timed = {(row["case"], row["direction"]): row for row in found["rows"] if "ms" in row}
    for case in {row["case"] for row in found["rows"]}:
        directions = {direction for label, direction in timed if label == case}
        assert "forward" in directions and len(directions) == 2, case
    text = page.read_text()
    for family in dict.fromkeys(row["family"] for row in found["rows"]):
        picture = f"page-{family.replace(' ', '-')}.png"
        assert (page.parent / picture).read_bytes().startswith(b"\x89PNG") and f"({picture})" in text
    page.unlink()
    monkeypatch.setattr(sys, "argv", ["bench_kernels_page.py", str(page.with_suffix(".json"))])
    bench_kernels_page.main()
    assert page.read_text() == text


def test_only_that_matches_nothing_is_refused(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        bench(monkeypatch, tmp_path / "page.md", "--only", "nothing like it")
    assert "--only nothing like it matches no case" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench(monkeypatch, tmp_path / "page.md", "--only", "rms_norm", "--implementations", "fa9")
    assert "--implementations fa9 matches none of compiled, liger" in capsys.readouterr().err


@pytest.mark.slow
def test_cases_are_run_ahead_in_other_processes(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(bench_kernels, "run", lambda chosen, args, device: ran.extend(chosen))
    bench(monkeypatch, tmp_path / "page.md", "--only", "swiglu|rms_norm", "--processes", 2)
    assert len(ran) == 3


def fails(error, *, after=0):
    """A product that raises after so many calls."""
    calls = []

    def function(x):
        calls.append(1)
        if len(calls) > after:
            raise error
        return 2 * x

    return function


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        raise ValueError("no | backward\nand more")


def absent():
    import no_such_package  # noqa: F401


def double(**peers):
    return Case(
        label="double 3",
        op=Op(name="double", reference=lambda x: 2 * x),
        inputs=lambda device: [torch.ones(3, device=device, requires_grad=True)],
        work={"forward": 12, "backward": 12},
        peers=peers,
    )


def test_one_that_raises_is_a_row_and_the_others_are_measured():
    case = double(
        absent=absent,
        silent=lambda: fails(AssertionError()),
        late=lambda: fails(RuntimeError("out of memory\n at all"), after=3),
        one_way=lambda: NoBackward.apply,
    )
    rows = list(bench_kernels.measure(case, "", Stopwatch(CPU, 4), None))
    why = {row["name"]: row["refused"] for row in rows if "refused" in row}
    assert why == {
        "absent": "not installed: No module named 'no_such_package'",
        "silent": "AssertionError",
        "late": "RuntimeError: out of memory",
        "one_way": "ValueError: no | backward",
    }
    timed = {(row["name"], row["direction"]) for row in rows if "ms" in row}
    both = {("reference", "forward"), ("reference", "backward")}
    assert timed == both | {("late", "backward"), ("one_way", "forward")}


def test_only_implementations_that_match_are_measured():
    case = double(absent=absent, other=lambda: lambda x: x + x)
    assert {row["name"] for row in bench_kernels.measure(case, "^oth", Stopwatch(CPU, 1), None)} == {"other"}


def test_every_implementation_has_inputs_of_its_own():
    seen = {}

    def spoil(x):
        seen["spoiler"] = x.detach().clone()
        x.detach().zero_()
        return 2 * x

    def look(x):
        seen.setdefault("after", x.detach().clone())
        return 2 * x

    case = replace(double(spoiler=lambda: spoil, after=lambda: look), inputs=lambda device: [torch.randn(3)])
    list(bench_kernels.measure(replace(case, work={"forward": 12}), "", Stopwatch(CPU, 1), None))
    assert seen["after"].any()


ATTENTION = [case for case in cases(small=True) if case.label.startswith("attention") and "d64" not in case.label]


@pytest.mark.parametrize("case", ATTENTION, ids=lambda case: case.label)
def test_what_other_packages_compute_is_what_we_compute(case, monkeypatch):
    monkeypatch.setattr(bench_kernels_peers, "compiled", lambda function: function)
    torch.manual_seed(0)
    inputs = [
        x.detach().float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in case.inputs(CPU)
    ]
    if case.op.name == "attention":
        wanted = next(c for c in case.op.candidates if c.name == "sdpa").function(*inputs)
    else:
        weights = torch.einsum("bthd,bshd->bhts", *inputs[:2]) * inputs[0].shape[-1] ** -0.5
        wanted = torch.einsum("bhts,bshd->bthd", weights.softmax(-1), inputs[2])
    compared = [name for name in ("fa2", "flex") if name in case.peers]
    for name in compared:
        torch.testing.assert_close(case.peers[name]()(*inputs), wanted, msg=lambda text, name=name: f"{name}: {text}")
    assert compared


OWN = ("layer_norm", "residual_rms_norm", "residual_layer_norm", "geglu", "cross_entropy")


@pytest.mark.parametrize("case", [c for c in cases(small=True) if c.op.name in OWN], ids=lambda case: case.op.name)
def test_kernels_that_models_do_not_choose_are_called_as_their_reference(case):
    torch.manual_seed(0)
    inputs = [x.detach().float() if isinstance(x, torch.Tensor) and x.requires_grad else x for x in case.inputs(DEVICE)]
    (candidate,) = case.op.candidates
    torch.testing.assert_close(candidate.function(*inputs), case.op.reference(*inputs), atol=1e-4, rtol=1e-4)


def test_full_attention_is_that_of_the_kernel():
    case = next(case for case in ATTENTION if case.label == "attention full d128 8 x 32")
    assert [candidate.name for candidate in case.op.candidates] == ["gluon", "triton"]
    torch.manual_seed(0)
    q, k, v, *rest = case.inputs(DEVICE)
    q, k, v = (x.detach().half() for x in (q, k, v))
    out = case.op.candidates[1].function(q, k, v, *rest)
    torch.testing.assert_close(out, case.peers["fa2"]()(q, k, v), atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("mask", [Mask(), Mask(causal=False), Mask(window=5), Mask(documents=3)], ids=str)
def test_flash_attention_4_is_told_of_the_mask(mask, monkeypatch):
    """A stand-in with the calls of flash-attn-4 4.0: windows count the tokens before, and (out, lse) comes back."""
    q, k, v = torch.randn(3, 2, 12, 1, 8).unbind()
    told = {}

    def dense(q, k, v, **options):
        told.update(options)
        return q + k + v, None

    def varlen(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
        told.update(options, ends=(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), max_seqlen_q, max_seqlen_k))
        assert q.dim() == 3
        return q + k + v, None

    interface = SimpleNamespace(flash_attn_func=dense, flash_attn_varlen_func=varlen)
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", interface)
    bounds = torch.arange(0, 25, 12 // mask.documents, dtype=torch.int32)
    out = bench_kernels_peers.fa4(mask)(q, k, v, None, bounds, 12 // mask.documents)
    assert torch.equal(out, q + k + v)
    ends = (bounds.tolist(), bounds.tolist(), 4, 4)
    expected = {"causal": mask.causal, "window_size": (None if mask.window is None else 4, None)}
    assert told == expected | ({"ends": ends} if mask.documents == 3 else {})


def test_counted_work_is_that_of_the_mask():
    for case in ATTENTION:
        _, _, _, positions, _, length = case.inputs(CPU)
        window = int(case.label.partition("window=")[2] or 0) or None
        seen = attention.attention_mask(positions, window).sum().item()
        if "full" in case.label:
            seen = positions.numel() * length
        heads = 2048 // 8 // 128
        assert case.work["forward"] == 4 * seen * heads * 128, case.label


def test_listed_blocks_are_those_that_others_see_and_that_are_counted(monkeypatch):
    monkeypatch.setattr(bench_kernels_peers, "compiled", lambda function: function)
    case = next(case for case in cases(small=True) if case.family == "attention block-sparse")
    torch.manual_seed(0)
    inputs = [x.detach().float() if getattr(x, "requires_grad", False) else x for x in case.inputs(CPU)]
    torch.testing.assert_close(case.peers["flex"]()(*inputs), case.op.reference(*inputs))
    tokens, heads, lists = inputs[-2], inputs[0].shape[2], inputs[-1]
    seen = lists.mask().repeat_interleave(128, 1).repeat_interleave(128, 2)
    assert seen.shape == (heads, tokens, tokens)
    assert case.work["forward"] == 4 * 128 * seen.tril().sum().item()


def row(case, name, rate, *, op="attention", direction="forward", lossy=False, peer=False):
    ms = {"median": 100 / rate, "low": 1, "high": 2}
    timing = {"direction": direction, "ms": ms, "host_us": 3.0, "unit": "copy GB/s", "rate": rate}
    place = {"family": "some", "length": None, "sizes": {}, "op": op, "lossy": lossy, "peer": peer}
    return {"case": case, "name": name, **timing, **place}


def test_page_compares_ours_with_the_fastest_other_and_escapes_errors(tmp_path):
    rows = [
        *(row("a", name, rate) for name, rate in (("triton", 40.0), ("gluon", 60.0), ("cudnn", 50.0), ("fa4", 30.0))),
        row("a", "fp8", 99.0, lossy=True),
        *(row("b", name, rate) for name, rate in (("triton", 30.0), ("cudnn", 40.0))),
        row("c", "cudnn", 40.0),
        {
            "case": "c",
            "name": "flex",
            "refused": "a | b",
            "family": "some",
            "length": None,
            "sizes": {},
            "lossy": False,
        },
    ]
    page = tmp_path / "page.md"
    bench_kernels_page.write_page(page, {"device": "some", "copy GB/s": 100.0}, rows)
    lines = page.read_text().splitlines()
    compared = lines[lines.index("## Ours beside the fastest other") + 4 : lines.index("## All") - 1]
    assert compared == [
        "| a | forward | gluon | cudnn | 1.20 |",
        "| b | forward | triton | cudnn | 0.75 |",
        "| **some** | forward |  |  | 0.95 (least 0.75) |",
    ]
    assert "| c | flex | a \\| b |" in lines
    assert "| a | forward | fp8 (lossy) | 1.010 (1.000 to 2.000) | 99 GB/s | 99% | 3 |" in lines


def test_tables_leave_out_configurations_that_cannot_run_and_ops_that_are_not_chosen():
    tables = Tables(None)
    configs = [Config(blocks={"BLOCK": block}) for block in (1, 2)]
    choice = Choice("kernel", "any", configs, configs[0])

    def function():
        if choice.config is configs[0]:
            raise RuntimeError("out of resources")

    tables.tune([choice], function, Stopwatch(CPU, 1))
    assert choice.config is configs[1]
    tables.rank([row("a", "gluon", 2.0), row("a", "sdpa", 1.0), row("b", "torch", 1.0, op="layer_norm")])
    assert tables._table["order"] == {"attention": ["gluon", "sdpa"]}
    tables.rank([row("a", "varlen", 1.0), row("a", "sdpa", 2.0)])
    assert tables._table["order"] == {"attention": ["sdpa", "varlen", "gluon"]}


def test_timing_has_the_median_of_all_calls():
    timing = Stopwatch(CPU, 5).time({"fast": lambda: None, "slow": lambda: torch.ones(10**6).sum()})
    assert isinstance(timing["slow"], Timing) and timing["fast"].median < timing["slow"].median
    assert timing["slow"].low <= timing["slow"].median <= timing["slow"].high
