"""A workflow as ComfyUI's server takes it, from the graph that its front end opens.

The front end names each value of a node after the node's definition, in order. This does the same
with the definitions of a server (GET /object_info).
"""

from collections.abc import Iterator, Mapping
from typing import Any

from r0_jax.errors import InputError

_WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
_SIGMAS, _INSTEAD = "ManualSigmas", "BasicScheduler"

Prompt = dict[str, dict[str, Any]]


def convert(graph: Mapping[str, Any], known: Mapping[str, Any]) -> Prompt:
    """Return {number: class and inputs} of a graph's nodes; `known` are the server's definitions.

    Where the server has no ManualSigmas, BasicScheduler stands for it, as the graph's note says.
    Raise InputError where the server's definition of a node is not what the graph was made for.
    """
    links = {link[0]: [str(link[1]), link[2]] for link in graph["links"]}
    found: Prompt = {}
    for node in graph["nodes"]:
        if node["type"] == "Note":
            continue
        linked = {entry["name"]: links[entry["link"]] for entry in node["inputs"]}
        if node["type"] == _SIGMAS and _SIGMAS not in known:
            found[str(node["id"])] = _scheduler(graph, node, links)
        else:
            inputs = _inputs(node, linked, known)
            found[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return found


def replaced(graph: Mapping[str, Any], known: Mapping[str, Any]) -> bool:
    """Return whether the server lacks ManualSigmas, so that `convert` replaces it."""
    return _SIGMAS not in known and any(node["type"] == _SIGMAS for node in graph["nodes"])


def _inputs(
    node: Mapping[str, Any], linked: dict[str, list[Any]], known: Mapping[str, Any]
) -> dict[str, Any]:
    if node["type"] not in known:
        raise InputError(f"the server has no node {node['type']}")
    inputs: dict[str, Any] = {}
    values = list(node["widgets_values"])
    for name, kind, options, required in _declared(known[node["type"]]):
        if name in linked:
            inputs[name] = linked[name]
        elif kind in _WIDGETS and values:
            inputs[name] = values.pop(0)
            if options.get("control_after_generate"):  # a widget of the front end alone
                values.pop(0)
        elif required:
            raise InputError(
                f"the server's {node['type']} has an input {name} that the graph lacks"
            )
    if values or linked.keys() - inputs.keys():
        raise InputError(f"the server's {node['type']} has no input for all of {node}")
    return inputs


def _declared(info: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any], bool]]:
    """Yield name, type, options and whether it is required, of each input, in order."""
    for section in ("required", "optional"):
        for name, declared in info["input"].get(section, {}).items():
            kind = "COMBO" if isinstance(declared[0], list) else declared[0]
            yield name, kind, declared[1] if len(declared) > 1 else {}, section == "required"


def _scheduler(
    graph: Mapping[str, Any], sigmas: Mapping[str, Any], links: Mapping[int, list[Any]]
) -> dict[str, Any]:
    """Return the node that gives the same sigmas."""
    (sampler,) = (node for node in graph["nodes"] if node["type"] == "SamplerCustom")
    model = next(entry["link"] for entry in sampler["inputs"] if entry["name"] == "model")
    steps = sigmas["widgets_values"][0].count(",")
    inputs = {"model": links[model], "scheduler": "simple", "steps": steps, "denoise": 1.0}
    return {"class_type": _INSTEAD, "inputs": inputs}
