"""Which nodes of a session run where, and which of them cost a copy between devices in each step.

ONNX Runtime gives a node to the CPU for two reasons. The CUDA provider has no kernel for it; or all
it computes is sizes: ``Shape`` and ``Size`` leave their result in host memory, kernels such as
``Reshape``, ``Expand`` and ``Slice`` want sizes there, and what is computed in between would only
be slower on the device. The second kind belongs on the CPU, and no setting moves it.

The rule that tells them apart: **a node on the CPU is harmless if no copy is made for it**. Where a
value made on one side is needed on the other, ONNX Runtime puts a node that copies it
(``MemcpyToHost``, ``MemcpyFromHost``) into the graph; and an input or an output of the graph, which
a session of ours keeps on the device, is copied when the graph starts or ends if it is on the CPU
that the graph reads or makes it. So a node on the CPU that meets neither reads nothing but
constants and sizes, and makes nothing but sizes. All others are findings, and so is a copy that
a kernel of the device itself asks for (the condition of an ``If``, the trip count of a ``Loop``):
the device then waits for the host in the middle of each step.

ONNX Runtime's own interface to this (``get_provider_graph_assignment_info``) exists in newer
versions only, and does not know of the copies; the log of placements is text on a file descriptor.
A session's graph in ONNX Runtime's format has all of it in 1.19.2 and in 1.31.1 alike.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sam_export.errors import RuntimeUnavailableError
from sam_export.runtime.ort_model_file import PlacedGraph, PlacedNode, read_placed_graph

CPU = "CPUExecutionProvider"
_TO_HOST, _FROM_HOST = "MemcpyToHost", "MemcpyFromHost"
_SHOWN = 12
_FORMAT = "session.save_model_format"


@dataclass(frozen=True)
class Finding:
    """A node that makes a step copy between the CPU and the device.

    Attributes:
        node: The node: on the CPU, or on the device if it wants a value in host memory.
        why: What is copied.
    """

    node: PlacedNode
    why: str

    def __str__(self) -> str:
        where = "on the CPU" if self.node.provider == CPU else "on the device"
        domain = f"{self.node.domain}." if self.node.domain else ""
        return f"{self.node.name} ({domain}{self.node.op}, {where}): {self.why}"


def recorded(options: Any, make: Callable[[], Any]) -> tuple[Any, PlacedGraph]:
    """A session, and its graph with the execution provider of every node.

    Costs the writing and reading of the graph without its state, about a tenth of the time that
    the session takes to load.

    Args:
        options: The ``SessionOptions`` that ``make`` uses; changed while the session is made.
        make: Makes the session.

    Raises:
        RuntimeUnavailableError: This version of ONNX Runtime writes another format.
    """
    with tempfile.TemporaryDirectory(prefix="sam_export-") as folder:
        path = Path(folder, "graph.ort")
        if not _has_format(options):
            options.add_session_config_entry(_FORMAT, "ORT")
        options.optimized_model_filepath = str(path)
        try:
            session = make()
        finally:
            options.optimized_model_filepath = ""
        try:
            return session, read_placed_graph(path.read_bytes())
        except (OSError, ValueError) as error:
            raise RuntimeUnavailableError(
                "This version of ONNX Runtime does not say where it runs the nodes of a graph "
                f"({error}), so sam_export cannot tell whether a step stays on the device. Use "
                "a version that it knows (1.19.2, 1.31.1)."
            ) from error


def _has_format(options: Any) -> bool:
    """Whether the entry is there; setting one twice prints a warning."""
    try:
        options.get_session_config_entry(_FORMAT)
    except Exception:  # onnxruntime's own, where there is none
        return False
    return True


def findings(graph: PlacedGraph, results_on_device: bool = True) -> list[Finding]:
    """Every node that makes a step copy between the CPU and the device, by the rule above.

    Args:
        graph: As the session runs it.
        results_on_device: Whether the graph's outputs are wanted on the device. Otherwise one that
            the CPU makes stays there, and is no copy.
    """
    return list(_findings(graph, results_on_device))


def _findings(graph: PlacedGraph, results_on_device: bool) -> Iterator[Finding]:
    copied_to_host = {n.outputs[0]: n.inputs[0] for n in graph.nodes if n.op == _TO_HOST}
    copied_from_host = {n.inputs[0]: n.outputs[0] for n in graph.nodes if n.op == _FROM_HOST}
    copies = set(copied_from_host.values())
    readers: dict[str, list[PlacedNode]] = {}
    for node in graph.nodes:
        for name in node.inputs:
            if name in copied_to_host or name in copies:
                readers.setdefault(name, []).append(node)
    for node in graph.nodes:
        if node.op in (_TO_HOST, _FROM_HOST):
            if node.op == _FROM_HOST and node.inputs[0] in graph.inputs:
                yield Finding(node, f"the graph's input {node.inputs[0]!r} is copied to the device")
            continue
        host_inputs = [name for name in node.inputs if name in copied_to_host]
        if host_inputs:
            what = ", ".join(repr(copied_to_host[name]) for name in host_inputs)
            yield Finding(
                node, f"{what.replace('_CUDAExecutionProvider', '')} is copied to the host"
            )
        if node.provider != CPU:
            continue
        for name in node.outputs:
            if name in copied_from_host:
                names = ", ".join(n.name for n in readers.get(copied_from_host[name], ()))
                yield Finding(node, f"its result is copied to the device for {names or 'a branch'}")
        fed = [name for name in node.inputs if name in graph.inputs]
        made = [name for name in node.outputs if name in graph.outputs]
        if fed:
            yield Finding(node, f"it reads the graph's input {', '.join(map(repr, fed))}")
        if made and results_on_device:
            yield Finding(node, f"it makes the graph's output {', '.join(map(repr, made))}")


def summary(graph: PlacedGraph, results_on_device: bool = True) -> dict[str, Any]:
    """How many nodes run on each provider, which on the CPU, how many copy, and the `findings`.

    JSON values.
    """
    copies = sum(node.op in (_TO_HOST, _FROM_HOST) for node in graph.nodes)
    providers = Counter(
        node.provider for node in graph.nodes if node.op not in (_TO_HOST, _FROM_HOST)
    )
    return {
        "nodes": dict(sorted(providers.items())),
        "cpu_nodes": [f"{node.name} ({node.op})" for node in graph.nodes if node.provider == CPU],
        "copies": copies,
        "findings": [str(finding) for finding in findings(graph, results_on_device)],
    }


def refuse_copies(
    graph: PlacedGraph,
    program: str,
    runtime: str,
    exported_for: str,
    results_on_device: bool = True,
) -> None:
    """Stops a session whose step would leave the device.

    Args:
        graph: The program as the session runs it.
        program: Its name.
        runtime: Name and version of the runtime, for the message.
        exported_for: The device that the artifact was exported for.
        results_on_device: As `findings` takes it.

    Raises:
        RuntimeUnavailableError: There are findings; the message names them.
    """
    found = findings(graph, results_on_device)
    if not found:
        return
    lines = [f"  {finding}" for finding in found[:_SHOWN]]
    if len(found) > _SHOWN:
        lines.append(f"  and {len(found) - _SHOWN} more")
    again = (
        "Export the step again with device='cuda', which avoids most of this; or accept"
        if exported_for != "cuda"
        else "Use another target or another form of the named modules; or accept"
    )
    raise RuntimeUnavailableError(
        f"{runtime} would leave the CUDA device in program {program!r} "
        f"({len(found)} {'place' if len(found) == 1 else 'places'}):\n"
        + "\n".join(lines)
        + f"\n{again} the copies: CudaOptions(allow_cpu_nodes=True)."
    )
