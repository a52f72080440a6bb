"""The methods of the scripted module, as TorchScript source."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial

from torch import fx

from sam_export.artifact.contract import (
    HYPER,
    STAGES,
    TRAINING,
    ProgramSpec,
    StepContract,
    TensorSpec,
    discarded_if_not_finite,
)
from sam_export.artifact.semantics import Semantics
from sam_export.lower.torchscript_calls import arguments_of, batch_checks, reported, signature
from sam_export.lower.torchscript_in_place import Plan, plan_in_place
from sam_export.lower.torchscript_random import METHODS, random_methods
from sam_export.lower.torchscript_source import (
    GraphWriter,
    Names,
    attribute,
    indented,
    needed_only_by,
)
from sam_export.lower.torchscript_stages import checked_stage
from sam_export.tracing.randomness import drawn_nodes, random_nodes

CONSTANTS = "constants"
"""Submodule that holds tensors which the graph itself carries."""

STEP_COUNT = "step_count"
"""Attribute that counts the steps, skipped ones included; one that raised is none."""

OUTPUTS = ("evaluate", "evaluate_average")
"""Programs that return what the model does."""

_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8")


READS_FINITE = 'device.type == "cpu"'
"""Where a step that skips what is not finite reads whether it is. On the CPU that costs nothing and
the update is made in place; an accelerator would wait for it in each step."""


def method_names(contract: StepContract) -> list[str]:
    """Every method that `module_source` defines."""
    programs = [program.name for program in contract.programs]
    plain = [f"{name}_unchecked" for name in programs]
    return ["forward", "set_hyper", "name_of_dtype", *METHODS, *programs, *plain]


def module_source(contract: StepContract, semantics: Semantics, graphs: dict[str, fx.Graph]) -> str:
    """The source of all methods.

    For each program ``P`` there are ``P_unchecked(*batch) -> List[Tensor]``, which runs the graph
    and changes the state, and ``P(*batch)``, which first checks the batch. For a stage of a staged
    step see `torchscript_stages`.

    Args:
        contract: Names, dtypes and shapes.
        semantics: What one step means.
        graphs: Program name to its functional graph.
    """
    parts = [_name_of_dtype(), _set_hyper(contract), _forward(contract)]
    if any(map(drawn_nodes, graphs.values())):
        parts.append(random_methods())
    for spec in contract.programs:
        parts.append(_unchecked(contract, semantics, spec, graphs[spec.name]))
        parts.append(
            checked_stage(contract, semantics, spec)
            if spec.name in STAGES
            else _checked(contract, semantics, spec)
        )
    return "\n".join("\n".join(part) + "\n" for part in parts)


def inference_source(contract: StepContract, semantics: Semantics, graph: fx.Graph) -> str:
    """The source of a module that holds parameters and buffers and evaluates: ``forward(*inputs)``.

    Args:
        contract: Names, dtypes and shapes.
        semantics: What one step means.
        graph: Of the program ``evaluate``, which draws no random numbers.
    """
    spec = contract.program("evaluate")
    _, arguments = arguments_of(contract, spec)
    checked = _checked(contract, semantics, spec)
    returns = checked[0].rpartition(" -> ")[2].removesuffix(":")
    forward = [
        signature("forward", list(arguments.values()), returns),
        f"    return self.evaluate({', '.join(arguments.values())})",
    ]
    parts = [_name_of_dtype(), _unchecked(contract, semantics, spec, graph), checked, forward]
    return "\n".join("\n".join(part) + "\n" for part in parts)


def _forward(contract: StepContract) -> list[str]:
    _, arguments = arguments_of(contract, contract.program("step"))
    call = f'self.step({", ".join(arguments.values())})["loss"]'
    return [signature("forward", list(arguments.values()), "Tensor"), f"    return {call}"]


def _unchecked(
    contract: StepContract,
    semantics: Semantics,
    spec: ProgramSpec,
    graph: fx.Graph,
) -> list[str]:
    names, arguments = arguments_of(contract, spec)
    held = [item for item in contract.inputs_of(spec) if item.name not in arguments]
    local = {item.name: names.make(item.name) for item in held}
    read = [f"{local[item.name]} = {attribute(item.name)}" for item in held]
    inputs = [{**arguments, **local}[name] for name in spec.inputs]
    placeholders = dict(zip(spec.inputs, graph.find_nodes(op="placeholder"), strict=True))
    (output_node,) = graph.find_nodes(op="output")
    leaving: list[fx.Node] = list(output_node.args[0])
    results = dict(zip((output.name for output in spec.outputs), leaving, strict=True))
    shown = [results[output.name] for output in reported(spec)]
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    discarded = discarded_if_not_finite(spec, semantics)
    always = {output: state for output, state in spec.feeds.items() if output not in discarded}
    guarded = {output: state for output, state in spec.feeds.items() if output in discarded}
    # Draws keep their place and number, whatever they are for: torch's generator counts them.
    kept = shown + random_nodes(graph) + [results[output] for output in always]
    later = needed_only_by(graph, kept) if guarded else set()
    first = [node for node in nodes if node not in later]
    last = [node for node in nodes if node in later]
    plan = plan_in_place(
        order=first + last,
        results=set(leaving),
        inputs=placeholders.values(),
        replaced={placeholders[name] for name in spec.feeds.values()},
        changing=later if guarded else set(nodes),
    )
    constant = f"{CONSTANTS}.{spec.name}."
    writer = GraphWriter(
        graph, inputs, names, lambda name: attribute(constant + name), plan.overwrites
    )
    # No tensor of the module asks for a gradient; so without those of the batch, autograd is off.
    detached = [f"{name} = {name}.detach().contiguous()" for name in arguments.values()]
    body = [
        *detached,
        *read,
        f"device = {attribute(contract.state[0].name)}.device",
        *writer.lines(first),
    ]
    # A result that later writes would change, because it may be the state itself, is copied first.
    values = []
    for node in shown:
        values.append(writer.expression(node))
        if plan.memory[node].op != "call_function":
            values[-1] = names.make(f"kept_{node.name}")
            body.append(f"{values[-1]} = {writer.expression(node)}.clone()")
    write = partial(
        _writes, results=results, placeholders=placeholders, plan=plan, writer=writer, names=names
    )
    counted = [f"self.{STEP_COUNT} += 1"] if spec.feeds else []
    if guarded:
        finite = writer.expression(results["finite"])
        select = _selected(guarded, finite, last, results, local, writer.functional(), names)
        update = writer.lines(last) + write(guarded)
        if semantics.on_nonfinite == "raise":  # a step that is refused is none
            body += [f"if bool({finite}):", *indented(update + counted)]
            counted = []
        else:
            body += [f"if {READS_FINITE}:", f"    if bool({finite}):"]
            body += [*indented(indented(update)), "else:", *indented(select)]
    body += write(always) + counted
    return [
        signature(f"{spec.name}_unchecked", list(arguments.values()), "List[Tensor]"),
        *indented(body),
        f"    return [{', '.join(values)}]",
    ]


def _selected(
    feeds: Mapping[str, str],
    finite: str,
    nodes: Sequence[fx.Node],
    results: Mapping[str, fx.Node],
    local: Mapping[str, str],
    writer: GraphWriter,
    names: Names,
) -> list[str]:
    """The update without a look at ``finite``: computed in any case, then selected."""
    lines, writes = writer.lines(nodes), []
    for output, target in feeds.items():
        chosen = names.make(f"chosen_{results[output].name}")
        value = writer.expression(results[output])
        lines.append(f"{chosen} = torch.where({finite}, {value}, {local[target]})")
        writes.append(f"{attribute(target)}.copy_({chosen})")
    return lines + writes


def _writes(
    feeds: Mapping[str, str],
    results: dict[str, fx.Node],
    placeholders: dict[str, fx.Node],
    plan: Plan,
    writer: GraphWriter,
    names: Names,
) -> list[str]:
    """New state over old; what shares memory with other state is copied before the first write."""
    copies, writes = [], []
    for output, target in feeds.items():
        node = results[output]
        if plan.whole.get(node) is placeholders[target]:
            continue  # it was made there
        value = writer.expression(node)
        if plan.memory[node].op != "call_function":
            kept = names.make(f"kept_{node.name}")
            copies.append(f"{kept} = {value}.clone()")
            value = kept
        writes.append(f"{attribute(target)}.copy_({value})")
    return copies + writes


def _checked(contract: StepContract, semantics: Semantics, spec: ProgramSpec) -> list[str]:
    _, arguments = arguments_of(contract, spec)
    body = batch_checks(contract, spec, arguments)
    call = f"self.{spec.name}_unchecked({', '.join(arguments.values())})"
    outputs = reported(spec)
    if spec.name in TRAINING:
        returns = "Dict[str, Tensor]"
        body += _by_number(contract, spec, call)
        if semantics.on_nonfinite == "raise":
            body += _refuse_nonfinite(outputs)
        body.append(_dict([output.name for output in outputs]))
    elif len(outputs) == 1 and (contract.output_tree == "tensor" or spec.name not in OUTPUTS):
        returns = "Tensor"
        body.append(f"return {call}[0]")
    else:
        returns = "Dict[str, Tensor]"
        body.append(f"results = {call}")
        body.append(_dict([output.name.removeprefix("output.") for output in outputs]))
    return [signature(spec.name, list(arguments.values()), returns), *indented(body)]


def _by_number(contract: StepContract, spec: ProgramSpec, call: str) -> list[str]:
    """The call of a program that trains: ``step`` of periodic SAM is mostly that of the base."""
    if spec.name != "step" or contract.every == 1:
        return [f"results = {call}"]
    base = call.replace("self.step_unchecked", "self.base_step_unchecked")
    return [
        f"if self.{STEP_COUNT} % {contract.every} == 0:",
        f"    results = {call}",
        "else:",
        f"    results = {base}",
    ]


def _dict(keys: Sequence[str]) -> str:
    items = ", ".join(f"{json.dumps(key)}: results[{index}]" for index, key in enumerate(keys))
    return f"return {{{items}}}"


def _refuse_nonfinite(outputs: Sequence[TensorSpec]) -> list[str]:
    place = {output.name: index for index, output in enumerate(outputs)}
    shown = ("loss", "perturbed_loss", "grad_norm", "perturbation_norm")
    values = ", ".join(f"float(results[{place[name]}])" for name in shown)
    text = (
        "the step is not finite (loss {}, perturbed loss {}, gradient norm {}, perturbation norm "
        "{}); nothing was changed. Look at the batch, or lower lr or rho."
    )
    return [
        f"if not bool(results[{place['finite']}]):",
        f"    raise ValueError({json.dumps(text)}.format({values}))",
    ]


def _name_of_dtype() -> list[str]:
    lines = ["def name_of_dtype(self, tensor: Tensor) -> str:"]
    for name in (*_DTYPES, "bool"):
        lines += [f"    if tensor.dtype == torch.{name}:", f'        return "{name}"']
    return [*lines, '    return "another dtype"']


def _set_hyper(contract: StepContract) -> list[str]:
    names = [spec.name for spec in contract.hyper]
    listed = ", ".join(names)
    count = len(contract.groups)
    lines = [
        "def set_hyper(self, name: str, value: Union[int, float, List[float]]) -> None:",
        "    values: List[float] = []",
        "    if isinstance(value, int):",
        f"        values = [float(value)] * {count}",
        "    elif isinstance(value, float):",
        f"        values = [value] * {count}",
        "    else:",
        "        values = value",
        f"    if len(values) != {count}:",
        f'        raise ValueError("{{}} takes one number or {count}, one per parameter group; '
        'got {}".format(name, len(values)))',
        "    for number in values:",
        "        if not math.isfinite(number) or (number < 0 and name in ['lr', 'rho']):",
        '            raise ValueError("{} cannot be {}".format(name, number))',
        "    new = torch.tensor(values, dtype=torch.float64)",
    ]
    for index, name in enumerate(names):
        lines += [
            f"    {'if' if index == 0 else 'elif'} name == {json.dumps(name)}:",
            f"        {attribute(HYPER + name)}.copy_(new)",
        ]
    text = f"there is no hyper-parameter {{}}; there are {listed}"
    return [*lines, "    else:", f"        raise ValueError({json.dumps(text)}.format(name))"]
