"""Where the nodes of a session run, and which of them copy: real records, and sessions here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnxruntime
import pytest

from sam_export.errors import RuntimeUnavailableError
from sam_export.runtime.ort_model_file import PlacedGraph, PlacedNode, read_placed_graph
from sam_export.runtime.placement import CPU, findings, recorded, refuse_copies, summary
from tests.runtime.placed_graph import placed_graph

CUDA = "CUDAExecutionProvider"
RECORDS = sorted((Path(__file__).parent / "placed").glob("*.ort"))


def record(path: Path) -> PlacedGraph:
    return read_placed_graph(path.read_bytes())


def test_there_are_records_of_both_runtimes() -> None:
    assert [path.stem for path in RECORDS] == ["1.19.2", "1.31.1"]


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_record_of_a_cuda_session(path: Path) -> None:
    """Sizes alone are no finding; each other node that left the device is one, with its reason."""
    graph = record(path)
    assert (graph.inputs, graph.outputs) == (("x", "scale"), ("chosen", "size_as_output"))
    on_cpu = [node.name for node in graph.nodes if node.provider == CPU]
    harmless = ["size", "count", "flat_shape", "float_size"]
    assert set(on_cpu) - set(harmless) == {
        "size_to_device",
        "input_on_cpu",
        "no_kernel",
        "size_as_output",
    }
    found = {(finding.node.name, finding.why) for finding in findings(graph)}
    assert found == {
        ("size_to_device", "its result is copied to the device for divided"),
        ("input_on_cpu", "its result is copied to the device for rows"),
        ("input_on_cpu", "it reads the graph's input 'scale'"),
        ("no_kernel", "'rows' is copied to the host"),
        ("no_kernel", "its result is copied to the device for total"),
        ("chosen", "'less', 'rows' is copied to the host"),
        ("then/result", "'rows' is copied to the host"),
        ("else/result", "'rows' is copied to the host"),
        ("size_as_output", "it makes the graph's output 'size_as_output'"),
    }
    kept = {finding.node.name for finding in findings(graph, results_on_device=False)}
    assert kept == {name for name, _ in found} - {"size_as_output"}
    assert summary(graph)["nodes"] == {CPU: 8, CUDA: 9}
    assert summary(graph)["copies"] == 5
    listed = summary(graph)["cpu_nodes"]
    assert len(listed) == 8
    assert {"input_on_cpu", "no_kernel"} <= {line.partition(" ")[0] for line in listed}


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_refusal_names_nodes_and_what_to_do(path: Path) -> None:
    with pytest.raises(RuntimeUnavailableError) as caught:
        refuse_copies(record(path), "step", "ONNX Runtime 9", "cpu")
    message = str(caught.value)
    assert "ONNX Runtime 9 would leave the CUDA device in program 'step' (9 places)" in message
    assert "no_kernel (Acosh, on the CPU): 'rows' is copied to the host" in message
    assert "Export the step again with device='cuda'" in message
    assert "CudaOptions(allow_cpu_nodes=True)" in message
    with pytest.raises(RuntimeUnavailableError, match="Use another target or another form"):
        refuse_copies(record(path), "step", "ONNX Runtime 9", "cuda")


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_without_the_nodes_that_leave_nothing_is_refused(path: Path) -> None:
    graph = record(path)
    sizes = ("shape", "size", "count", "flat_shape", "flat", "float_size")
    kept = replace(graph, nodes=tuple(n for n in graph.nodes if n.name in sizes))
    assert {node.provider for node in kept.nodes} == {CPU, CUDA}
    assert findings(kept) == []
    refuse_copies(kept, "step", "ONNX Runtime 9", "cpu")


def test_many_findings_are_cut() -> None:
    nodes = tuple(PlacedNode(f"n{i}", "Erf", "", CPU, ("x",), (f"y{i}",)) for i in range(30))
    with pytest.raises(RuntimeUnavailableError, match=r"30 places(?s:.*)n11 \((?s:.*)and 18 more"):
        refuse_copies(PlacedGraph(nodes, ("x",), ()), "step", "R", "cpu")


def test_an_input_that_is_copied_to_the_device() -> None:
    node = PlacedNode("Memcpy", "MemcpyFromHost", "", CUDA, ("x",), ("x_device",))
    (finding,) = findings(PlacedGraph((node,), ("x",), ()))
    assert finding.why == "the graph's input 'x' is copied to the device"


def test_a_session_here_lists_every_node() -> None:
    """On the CPU all nodes are the CPU's, those of branches too, and none is missing."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL

    def make() -> onnxruntime.InferenceSession:
        return onnxruntime.InferenceSession(placed_graph(), options, providers=[CPU])

    session, graph = recorded(options, make)
    assert session.get_providers() == [CPU]
    assert len(graph.nodes) == 17
    assert {node.provider for node in graph.nodes} == {CPU}
    assert {"then/result", "else/result", "no_kernel"} <= {node.name for node in graph.nodes}
    (acosh,) = (node for node in graph.nodes if node.op == "Acosh")
    assert (acosh.inputs, acosh.outputs, acosh.domain) == (("rows",), ("no_kernel",), "")
    assert options.optimized_model_filepath == ""
    recorded(options, make)  # the same options again


def test_a_runtime_that_writes_no_such_file() -> None:
    options = onnxruntime.SessionOptions()
    with pytest.raises(RuntimeUnavailableError, match="does not say where it runs the nodes"):
        recorded(options, object)


@pytest.mark.parametrize("size", [0, 8, 40, 300, 2000])
def test_damaged_record(size: int) -> None:
    with pytest.raises(ValueError, match="ONNX Runtime's format"):
        read_placed_graph(RECORDS[0].read_bytes()[:size])


def test_another_format() -> None:
    with pytest.raises(ValueError, match="not a model in ONNX Runtime's format"):
        read_placed_graph(placed_graph())
