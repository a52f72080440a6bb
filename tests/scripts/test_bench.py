"""The benchmark's arithmetic on made-up numbers, and that its eager loop is SAM. No times."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts.bench import Child, ChildFailed, check_same_work, export_artifact, write_batches
from scripts.bench_cases import CASES, DEFAULT_CASES
from scripts.bench_contestants import CONTESTANTS, REFERENCE, base_loop, sam_loop
from scripts.bench_draws import PAIRS
from scripts.bench_records import (
    Record,
    Round,
    loss_disagreements,
    ratio,
    steps_per_round,
    wants_more,
)
from scripts.bench_table import markdown_page, markdown_table

ROOT = Path(__file__).parents[2]
MIB = 2**20


def record(name: str, step_ms: list[float], cpu_share: float = 1.0, **values: object) -> Record:
    rounds = [Round(10, 10 * ms / 1e3, cpu_share * 10 * ms / 1e3) for ms in step_ms]
    return Record(name, 1, rounds=rounds, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cpu_s", "threads", "counts"),
    [(0.95, 1, True), (0.9, 1, True), (0.89, 1, False), (1.7, 2, False), (1.85, 2, True)],
)
def test_a_round_counts_by_its_share_of_the_machine(
    cpu_s: float, threads: int, counts: bool
) -> None:
    assert Round(5, 1.0, cpu_s).counts(threads) is counts


def test_a_periodic_contestant_runs_a_periodic_step(tmp_path: Path) -> None:
    import sam_export as sx

    contestant = CONTESTANTS["torchscript-every-10"]
    assert contestant.target is not None
    path, _ = export_artifact(CASES["mlp"], contestant.target, tmp_path, "cpu", contestant.every)
    assert sx.load(path).contract.every == 10


def test_medians_are_taken_over_the_counted_rounds_only() -> None:
    made = record("onnx", [2.0, 3.0, 7.0])
    made.rounds += record("onnx", [100.0, 200.0], cpu_share=0.5).rounds
    assert made.step_ms == pytest.approx(3.0)
    assert made.spread_ms == pytest.approx((2.0, 7.0))
    assert (len(made.counted), len(made.rounds)) == (3, 5)


def test_a_contestant_without_a_counted_round_has_no_time() -> None:
    disturbed = record("onnx", [2.0, 3.0], cpu_share=0.5)
    assert disturbed.step_ms is None
    assert disturbed.spread_ms is None
    table = markdown_table([record(REFERENCE, [4.0], peak=MIB), disturbed], REFERENCE)
    assert "| onnx | – | – | – | 0/2 |" in table


def test_rounds_go_on_until_enough_count_or_too_many_were_run() -> None:
    calm, busy = record("onnx", [2.0] * 3), record(REFERENCE, [2.0] * 3, cpu_share=0.5)
    assert not wants_more([calm], rounds=3, max_rounds=12)
    assert wants_more([calm], rounds=4, max_rounds=12)
    assert wants_more([calm, busy], rounds=3, max_rounds=12)
    assert not wants_more([calm, busy], rounds=3, max_rounds=3)
    assert not wants_more([Record("onnx", 1, error="gone")], rounds=3, max_rounds=12)


def test_ratio_needs_both_sides() -> None:
    assert ratio(3.0, 4.0) == 0.75
    assert ratio(None, 4.0) is None
    assert ratio(3.0, None) is None
    assert ratio(3.0, 0) is None


@pytest.mark.parametrize(("step_s", "steps"), [(0.002, 250), (0.3, 2), (9.0, 1)])
def test_steps_of_a_round_fill_its_time(step_s: float, steps: int) -> None:
    assert steps_per_round(step_s, 0.5) == steps


def test_table_relates_times_and_memory_to_the_reference() -> None:
    eager = record(REFERENCE, [4.0, 4.0, 6.0], memory_before=100 * MIB, peak=200 * MIB)
    ours = record(
        "onnx", [3.0, 2.0, 5.0], memory_before=40 * MIB, peak=100 * MIB, memory_built=70 * MIB,
        export_s=12.34, build_s=0.5, start_s=1.5,
    )  # fmt: skip
    lines = markdown_table([ours, eager], REFERENCE).splitlines()
    assert lines[2] == (
        "| onnx | 3.000 | 2.000–5.000 | 0.75 | 3/3 "
        "| 100 | 0.50 | 60.0 | 0.60 | 70 | 12.3 | 0.5 | 1.5 |"
    )
    assert (
        "| eager-sam | 4.000 | 4.000–6.000 | 1.00 | 3/3 | 200 | 1.00 | 100.0 | 1.00 | 0 | – |"
        in lines[3]
    )
    assert len({line.count("|") for line in lines}) == 1


def test_table_without_the_reference_has_no_ratios() -> None:
    table = markdown_table([record("onnx", [3.0], peak=MIB)], REFERENCE)
    assert "| onnx | 3.000 | 3.000–3.000 | – | 1/1 | 1 | – |" in table


def test_a_contestant_that_failed_is_a_row_and_a_complaint() -> None:
    failed = Record("onnx", 1, error="LoweringError: no a|b\nhere")
    row = markdown_table([failed], REFERENCE).splitlines()[2]
    assert row.startswith(r"| onnx | failed: LoweringError: no a\|b here | – |")
    assert check_same_work([failed]) == ["onnx: LoweringError: no a|b\nhere"]


@pytest.mark.parametrize(
    ("name", "losses", "agrees"),
    [
        ("onnx", [2.3, 1.9], True),
        ("onnx", [2.3, 1.7], False),
        ("onnx", [float("nan"), 1.9], False),
        ("eager-base", [2.3, 1.7], True),
        ("eager-base", [2.2, 1.9], False),
    ],
)
def test_contestants_that_compute_other_losses_are_found(
    name: str, losses: list[float], agrees: bool
) -> None:
    reference = Record(REFERENCE, 1, losses=[2.3, 1.9])
    found = loss_disagreements([Record(name, 1, losses=losses)], reference, {REFERENCE, "onnx"})
    assert found == [] if agrees else name in found[0]


def test_page_says_machine_versions_and_legend() -> None:
    sections = [("mlp", "an MLP", [record(REFERENCE, [4.0], peak=MIB)])]
    page = markdown_page(sections, REFERENCE, 1, ["`eager-sam`: a loop"])
    for text in ("cores", f"torch {torch.__version__.split('+')[0]}", "## mlp", "a loop", "90%"):
        assert text in page


def test_sam_loop_is_sam() -> None:
    """Against the update written out with autograd, in float64."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3).double()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))
    rho, lr = 0.1, 0.5

    def gradients(weights: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        leaves = [weight.detach().requires_grad_() for weight in weights]
        loss = torch.nn.functional.cross_entropy(x @ leaves[0].T + leaves[1], y)
        return torch.autograd.grad(loss, leaves)

    before = [parameter.detach().clone() for parameter in model.parameters()]
    g = gradients(before)
    norm = torch.sqrt(sum((part**2).sum() for part in g))  # type: ignore[arg-type]
    g_adv = gradients([w + rho * part / norm for w, part in zip(before, g, strict=True)])
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    loss = sam_loop(model, model, optimizer, rho, torch.nn.CrossEntropyLoss())(x, y)
    with torch.no_grad():
        at_start = torch.nn.functional.cross_entropy(x @ before[0].T + before[1], y)
    torch.testing.assert_close(loss, at_start, rtol=1e-12, atol=0)
    for parameter, w, part in zip(model.parameters(), before, g_adv, strict=True):
        torch.testing.assert_close(parameter.detach(), w - lr * part, rtol=1e-11, atol=1e-13)


def test_base_loop_is_the_base_optimizer() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3).double()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))
    parameters = list(model.parameters())
    loss = torch.nn.functional.cross_entropy(model(x), y)
    expected = [
        (parameter - 0.5 * gradient).detach()
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(loss, parameters), strict=True
        )
    ]
    base_loop(model, model, torch.optim.SGD(parameters, lr=0.5), torch.nn.CrossEntropyLoss())(x, y)
    for parameter, value in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value, rtol=1e-12, atol=0)


def test_a_child_answers_and_reports(tmp_path: Path) -> None:
    case = CASES["mlp"]
    write_batches(case, tmp_path)
    with Child(CONTESTANTS[REFERENCE], case, tmp_path, None, 1, "cpu") as child:
        built = child.listen()
        assert built["memory_before"] > 0
        assert len(built["losses"]) == 2
        timed = child.ask("round", steps=3)
        assert timed["wall_s"] > 0
        assert timed["loss"] < built["losses"][0]
        assert child.ask("memory")["peak"] > 0


def test_a_child_that_dies_is_reported_with_its_last_words(tmp_path: Path) -> None:
    case = CASES["mlp"]
    with Child(CONTESTANTS[REFERENCE], case, tmp_path, None, 1, "cpu") as child:
        with pytest.raises(ChildFailed, match=r"FileNotFoundError.*batches\.npz"):
            child.listen()
        with pytest.raises(ChildFailed):
            child.ask("round", steps=1)


def test_the_contestants_table_imports_neither_torch_nor_sam_export() -> None:
    program = (
        "import sys, scripts.bench_child\n"
        "assert not {'torch', 'sklearn', 'onnx', 'onnxruntime'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_default_cases_exist() -> None:
    assert set(DEFAULT_CASES) <= set(CASES)


def test_cases_with_dropout_are_paired_with_the_same_without() -> None:
    assert set(PAIRS) == {name for name, case in CASES.items() if case.draws}
    for drawing, plain in PAIRS.items():
        assert not CASES[plain].draws
        shapes = [
            {name: tuple(p.shape) for name, p in CASES[case].model().named_parameters()}
            for case in (drawing, plain)
        ]
        assert shapes[0] == shapes[1]
