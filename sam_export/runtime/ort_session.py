"""Opens ONNX Runtime sessions for the programs of an artifact, and checks what came up."""

from __future__ import annotations

import functools
import re
from types import ModuleType
from typing import Any

from sam_export.artifact.contract import BY_EXAMPLES, TensorSpec
from sam_export.artifact.folder import Artifact
from sam_export.errors import ArtifactError, RuntimeUnavailableError, SamExportError
from sam_export.runtime import onnx_protobuf as pb
from sam_export.runtime.cuda_options import CudaOptions
from sam_export.runtime.detect import parse_device, require_provider
from sam_export.runtime.placement import recorded, refuse_copies, summary

_TYPES = {
    "float16": "tensor(float16)",
    "float32": "tensor(float)",
    "float64": "tensor(double)",
    "int8": "tensor(int8)",
    "int16": "tensor(int16)",
    "int32": "tensor(int32)",
    "int64": "tensor(int64)",
    "uint8": "tensor(uint8)",
    "bool": "tensor(bool)",
}

_NO_KERNEL = re.compile(
    r"Could not find an implementation for (?P<op>\w+)\((?P<since>\d+)\) node with name "
    r"'(?P<node>[^']*)'"
)

_NO_CUDA_GRAPH = "cannot use the graph capture feature|cannot use the CUDA Graph feature"
"""In the message of a session that was to record a CUDA graph and cannot (1.19.2, 1.31.1)."""

FLOAT32_FUSIONS = ("MatmulTransposeFusion", "MatMulScaleFusion", "QuickGeluFusion")
"""Optimizers of ONNX Runtime that fuse float64 nodes into operators that are right in float32 only.

The first one takes MatMul and Transpose, into an operator that 1.19.2 does not have in float64; the
second one a scalar factor, which becomes a float32 number in 1.31.1; the third ``x * sigmoid(x)``.
"""


class OrtSessions:
    """The sessions of an artifact's programs on one device; each is opened when first asked for.

    On a CUDA device each session is asked where its nodes run, see `runtime.placement`. On the CPU,
    where several programs train (stages, periodic SAM), they take memory from one arena: each would
    else keep the activations of its pass for itself, though no two programs run at once.

    Args:
        ort: The ``onnxruntime`` module.
        artifact: Whose programs.
        device: ``cpu``, ``cuda`` or ``cuda:<index>``.
        threads: Threads of one operator; None leaves the choice to ONNX Runtime.
        cuda: Options for a CUDA device.

    Raises:
        RuntimeUnavailableError: This ONNX Runtime has not the provider that the device needs.
    """

    def __init__(
        self,
        ort: ModuleType,
        artifact: Artifact,
        device: str,
        threads: int | None,
        cuda: CudaOptions,
    ) -> None:
        self._ort = ort
        self._artifact = artifact
        self._providers = require_provider(device)
        self.provider = self._providers[0]
        self.kind, self.index = parse_device(device)
        self._threads = threads
        self._cuda = cuda
        passes = [spec for spec in artifact.contract.programs if spec.name in BY_EXAMPLES]
        self._shared = self.kind == "cpu" and len(passes) > 1
        if self._shared:
            _register_arena(ort)
        self._sessions: dict[str, Any] = {}
        self._placed: dict[str, dict[str, Any]] = {}

    def open(self, program: str, words: tuple[TensorSpec, ...]) -> Any:
        """The session of a program.

        Args:
            program: Its name.
            words: The inputs of random numbers that it has.

        Raises:
            RuntimeUnavailableError: The provider did not come up or lacks a kernel, the step would
                leave the device, or it cannot be recorded as a CUDA graph.
            ArtifactError: The graph cannot be loaded, or is not that of the contract.
        """
        if program not in self._sessions:
            session = self._made(program)
            session.disable_fallback()
            if session.get_providers()[0] != self.provider:
                raise RuntimeUnavailableError(
                    f"ONNX Runtime would run {program!r} on {session.get_providers()[0]} instead "
                    f"of {self.provider}; it could not start that provider. `sam-export targets` "
                    "says what is missing."
                )
            self._check(program, session, words)
            self._sessions[program] = session
        return self._sessions[program]

    def facts(self) -> dict[str, Any]:
        """What the step's session says of its settings; on a CUDA device also where nodes run."""
        session = self._sessions["step"]
        options = session.get_session_options()
        facts: dict[str, Any] = {
            "providers": session.get_providers(),
            "provider_options": {
                name: dict(values) for name, values in session.get_provider_options().items()
            },
            "graph_optimization_level": options.graph_optimization_level.name,
            "disabled_optimizers": self._disabled_optimizers(),
            "intra_op_num_threads": options.intra_op_num_threads,
            "inter_op_num_threads": options.inter_op_num_threads,
            "execution_mode": options.execution_mode.name,
        }
        if self.kind == "cuda":
            facts["cuda"] = self._cuda.to_dict()
            facts["placement"] = dict(self._placed)
        return facts

    def _made(self, program: str) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        # Threads that spin between steps slow down everything else on the machine.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if self._shared:
            options.add_session_config_entry("session.use_env_allocators", "1")
        if self._threads is not None:
            options.intra_op_num_threads = self._threads

        def make() -> Any:
            try:
                return self._ort.InferenceSession(
                    str(self._artifact.file(program)),
                    options,
                    providers=self._provider_options(program),
                    disabled_optimizers=self._disabled_optimizers(),
                )
            except Exception as error:  # onnxruntime's own, which derive from nothing narrower
                raise self._refused(program, error) from error

        if self.kind == "cpu":
            return make()
        session, graph = recorded(options, make)
        self._placed[program] = summary(graph)
        if not self._cuda.allow_cpu_nodes:
            built_for = str(self._artifact.details.get("device", "cpu"))
            runtime = f"ONNX Runtime {self._ort.__version__}"
            refuse_copies(graph, program, runtime, built_for)
        return session

    def _refused(self, program: str, error: Exception) -> SamExportError:
        """Why ONNX Runtime does not take a graph: it lacks a kernel, or the file is not right."""
        if re.search(_NO_CUDA_GRAPH, str(error)):
            return RuntimeUnavailableError(
                f"ONNX Runtime {self._ort.__version__} cannot record program {program!r} as a CUDA "
                f"graph: {error}. A graph without branches and loops, all of whose nodes run on "
                "the device, can be: export with device='cuda' and without symbolic recurrences, "
                "or load without CudaOptions(cuda_graph=True)."
            )
        missing = _NO_KERNEL.search(str(error))
        if missing is None:
            return ArtifactError(
                f"ONNX Runtime {self._ort.__version__} cannot load program {program!r} from "
                f"{self._artifact.file(program)}: {error}"
            )
        used = {spec.dtype for spec in self._artifact.contract.state}
        dtypes = ", ".join(sorted(dtype for dtype in used if dtype.startswith("float")))
        return RuntimeUnavailableError(
            f"ONNX Runtime {self._ort.__version__} has no {self.provider} kernel for the node "
            f"{missing['node']!r} of program {program!r}, {missing['op']} (since opset "
            f"{missing['since']}), in the dtype that it has there; the state is {dtypes}. "
            f"{self._bfloat16(program) or 'Export the model in float32, or use another target.'}"
        )

    def _bfloat16(self, program: str) -> str:
        """What to do where a program computes in bfloat16; empty where it does not."""
        graph = pb.field_of(self._artifact.file(program).read_bytes(), pb.MODEL_GRAPH)
        cast = graph and pb.first_cast_to(graph.message, pb.BFLOAT16)
        if cast is None:
            return ""
        who = "The model or its optimizer"
        if self._artifact.contract.optimizer == "Muon":
            who = "torch's Muon, whatever the dtype of the model,"
        return (
            f"{who} computes in bfloat16 from the node {cast!r} on, and this provider has hardly "
            "any kernels for that. Export the step to a torch target ('torch-compile', "
            "'torchscript', 'aot-inductor'), or use an optimizer that does not."
        )

    def _disabled_optimizers(self) -> list[str]:
        double = any(spec.dtype == "float64" for spec in self._artifact.contract.state)
        return list(FLOAT32_FUSIONS) if double else []

    def _provider_options(self, program: str) -> list[Any]:
        if self.kind == "cpu":
            return list(self._providers)
        options = self._cuda.provider_options(self.index)
        if program != "step":
            options["enable_cuda_graph"] = "0"
        return [(self.provider, options), *self._providers[1:]]

    def _check(self, program: str, session: Any, words: tuple[TensorSpec, ...]) -> None:
        contract = self._artifact.contract
        spec = contract.program(program)
        for kind, found, expected in (
            ("input", session.get_inputs(), [*contract.inputs_of(spec), *words]),
            ("output", session.get_outputs(), spec.outputs),
        ):
            names = [item.name for item in found]
            if names != [item.name for item in expected]:
                different = sorted(set(names) ^ {item.name for item in expected}) or names
                raise ArtifactError(
                    f"The {kind}s of {self._artifact.file(program)} are not those of the contract: "
                    f"{', '.join(different[:5])}. Export the step again."
                )
            for item, wanted in zip(found, expected, strict=True):
                _check_tensor(program, kind, item, wanted)


@functools.cache
def _register_arena(ort: ModuleType) -> None:
    """Makes the arena of this process that sessions may share; it is never given back."""
    cpu = ort.OrtMemoryInfo(
        "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
    )
    try:
        ort.create_and_register_allocator(cpu, None)
    except RuntimeError as error:
        if "already been registered" not in str(error):
            raise
        # By other code in this process (1.19.2; later ones replace it): that one does as well.


def _check_tensor(program: str, kind: str, found: Any, wanted: TensorSpec) -> None:
    same_shape = len(found.shape) == len(wanted.shape) and all(
        a == b or isinstance(b, str) for a, b in zip(found.shape, wanted.shape, strict=True)
    )
    if found.type != _TYPES[wanted.dtype] or not same_shape:
        raise ArtifactError(
            f"The {kind} {wanted.name!r} of program {program!r} is {found.type}{found.shape}; the "
            f"contract says {wanted.description}. Export the step again."
        )
