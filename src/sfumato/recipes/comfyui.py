"""ComfyUI's `prompt` graph: the sampler that leads to the picture, and what leads to that sampler.

A node is {"class_type", "inputs"}; an input is a value or a link [node, output]. Nodes are told by what their
inputs are called, so that those of extensions are read too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

from sfumato.recipes.recipe import Recipe, recipe

Node: TypeAlias = Mapping[str, Any]
Graph: TypeAlias = Mapping[str, Node]

MAX_NODES = 5_000
OUTPUTS = ("SaveImage", "PreviewImage", "SaveImageWebsocket")
VALUES = (
    "value",
    "seed",
    "noise_seed",
    "int",
    "float",
    "text",
    "string",
    "number",
    "Value",
    "Text",
    "String",
)
ONWARD = ("conditioning", "conditioning_1", "conditioning_to", "conditioning1", "cond", "CONDITIONING")
JOINED = {"ConditioningConcat": ("conditioning_to", "conditioning_from", " BREAK ")}
SAMPLER_VALUES = {  # theirs -> ours
    "seed": "seed",
    "noise_seed": "seed",
    "steps": "steps",
    "cfg": "guidance",
    "sampler_name": "sampler",
    "scheduler": "spacing",
}
SIGMA_OPTIONS = {"rho": "rho", "sigma_min": "sigma_min", "sigma_max": "sigma_max", "alpha": "alpha",
                 "beta": "beta", "coeff": "coefficient"}  # fmt: skip
SAMPLER_OPTIONS = ("eta", "s_noise", "r", "solver_type", "order", "rtol", "atol", "h_init", "pcoeff",
                   "icoeff", "dcoeff", "accept_safety", "s_churn", "s_tmin", "s_tmax", "gamma")  # fmt: skip
SCHEDULERS = {  # nodes that give noise levels -> the spacing
    "KarrasScheduler": "karras",
    "ExponentialScheduler": "exponential",
    "PolyexponentialScheduler": "polyexponential",
    "SDTurboScheduler": "turbo",
    "AlignYourStepsScheduler": "align_your_steps",
    "BetaSamplingScheduler": "beta",
    "GITSScheduler": "gits",
    "VPScheduler": "vp",
    "LaplaceScheduler": "laplace",
}
MODEL_METHODS: dict[str, Callable[[Node], dict[str, Any]]] = {  # nodes between checkpoint and sampler
    "RescaleCFG": lambda given: {"rescale": given.get("multiplier")},
    "PerturbedAttentionGuidance": lambda given: {"pag": given.get("scale")},
    "SelfAttentionGuidance": lambda given: {"sag": given.get("scale")},
    "PerpNeg": lambda given: {"perp_neg": given.get("neg_scale")},
    "FreeU_V2": lambda given: {"freeu": [given.get(name) for name in ("b1", "b2", "s1", "s2")]},
    "CLIPSetLastLayer": lambda given: {"clip_skip": _from_end(given.get("stop_at_clip_layer"))},
}


def from_comfyui(prompt: Mapping[str, Any]) -> Recipe:
    """The recipe of a graph read from JSON; never fails. Where nothing samples, it has no request."""
    graph = {str(key): node for key, node in list(prompt.items())[:MAX_NODES] if _is_node(node)}
    reader = _Reader(graph)
    samplers = [key for key in reader.upstream(reader.outputs()) if _samples(graph[key])]
    if not samplers:
        return recipe("ComfyUI", {}, ["no sampler leads to the picture"] if graph else [])
    first = samplers[-1]
    if len(samplers) > 1:
        others = ", ".join(str(graph[key]["class_type"])[:40] for key in samplers[:-1])
        reader.warnings.append(f"the first of {len(samplers)} samplings is taken; left out: {others}")
    reader.read(graph[first])
    reader.put("emphasis", "comfyui")
    return recipe("ComfyUI", reader.values, reader.warnings)


def _is_node(node: Any) -> bool:
    return isinstance(node, Mapping) and isinstance(node.get("inputs"), Mapping)


def _samples(node: Node) -> bool:
    """Whether a node is a sampler: it takes steps of a named sampler, or a sampler and its noise levels."""
    given = node["inputs"]
    named = "sampler_name" in given and "steps" in given and ("seed" in given or "noise_seed" in given)
    return named or {"sampler", "sigmas", "latent_image"} <= given.keys()


def _from_end(layer: Any) -> Any:
    return -layer if isinstance(layer, int) else None


class _Reader:
    """What is read off a graph: values by our names, and warnings."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.values: dict[str, Any] = {}
        self.warnings: list[str] = []

    def outputs(self) -> list[str]:
        """The nodes that save the picture; without one that is known, those whose results nobody takes."""
        found = [key for key, node in self.graph.items() if node.get("class_type") in OUTPUTS]
        taken = {key for node in self.graph.values() for key in self.links(node)}
        return found or [key for key in self.graph if key not in taken]

    def links(self, node: Node) -> Iterator[str]:
        """The nodes that a node takes its inputs from."""
        for value in node["inputs"].values():
            if (key := self.linked(value)) is not None:
                yield key

    def linked(self, value: Any) -> str | None:
        """The node that an input is linked to, None for a value of its own."""
        if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str | int):
            key = str(value[0])
            return key if key in self.graph else None
        return None

    def upstream(self, keys: list[str]) -> Iterator[str]:
        """Nodes, and all that lead to them, the nearest first, each once."""
        queue, seen = list(keys), set(keys)
        for key in queue:
            yield key
            for before in self.links(self.graph[key]):
                if before not in seen:
                    seen.add(before)
                    queue.append(before)

    def node(self, given: Node, name: str) -> Node | None:
        key = self.linked(given.get(name))
        return None if key is None else self.graph[key]

    def value(self, value: Any) -> Any:
        """A value, or that of the node it is linked to; None where that is none."""
        for _ in range(20):
            key = self.linked(value)
            if key is None:
                return None if isinstance(value, list | dict) else value
            inputs = self.graph[key]["inputs"]
            value = next((inputs[name] for name in VALUES if name in inputs), None)
        return None

    def put(self, name: str, value: Any) -> None:
        if value is not None:
            self.values.setdefault(name, value)

    def read(self, sampler: Node) -> None:
        """Everything from a sampler upwards."""
        given = sampler["inputs"]
        for theirs, ours in SAMPLER_VALUES.items():
            self.put(ours, self.value(given.get(theirs)))
        sources = [given]
        for name, read in (("noise", self.noise), ("sampler", self.sampler), ("sigmas", self.sigmas),
                           ("guider", self.guider)):  # fmt: skip
            if (node := self.node(given, name)) is not None:
                read(node)
                sources.append(node["inputs"])
        for role, ours in (
            ("positive", "prompt"),
            ("conditioning", "prompt"),
            ("negative", "negative_prompt"),
        ):
            for source in sources:
                if role in source:
                    self.put(ours, self.text(source[role], role, frozenset()))
        for source in sources:
            if (node := self.node(source, "model")) is not None:
                self.model(source["model"])
        self.latent(given.get("latent_image"))
        denoise = self.values.get("denoise", self.value(given.get("denoise")))
        if isinstance(denoise, int | float) and denoise < 1:
            self.values["denoise"] = denoise
        for name in ("start_at_step", "end_at_step"):
            self.put(name, self.value(given.get(name)))

    def noise(self, node: Node) -> None:
        self.put("seed", self.value(node["inputs"].get("noise_seed")))

    def guider(self, node: Node) -> None:
        self.put("guidance", self.value(node["inputs"].get("cfg")))
        if node.get("class_type") == "BasicGuider":
            self.put("guidance", 1)
        if node.get("class_type") == "PerpNegGuider":
            self.put("perp_neg", self.value(node["inputs"].get("neg_scale")))

    def sampler(self, node: Node) -> None:
        """KSamplerSelect, or a node for one sampler with its options, as SamplerDPMPP_2M_SDE."""
        given = node["inputs"]
        kind = str(node.get("class_type", "")).removeprefix("Sampler").replace("EulerAncestral", "euler_a")
        self.put("sampler", self.value(given.get("sampler_name")) or kind)
        options = {name: self.value(given.get(name)) for name in SAMPLER_OPTIONS}
        self.put("eta", options.pop("eta"))
        options = {name: value for name, value in options.items() if value is not None}
        if options:
            self.put("sampler_options", options)

    def sigmas(self, node: Node) -> None:
        """BasicScheduler, or a node for one spacing with its options, as KarrasScheduler."""
        for key in self.upstream([key for key, each in self.graph.items() if each is node]):
            scheduler = self.graph[key]
            given, kind = scheduler["inputs"], str(scheduler.get("class_type", ""))
            if "steps" not in given:
                continue
            self.put("steps", self.value(given["steps"]))
            self.put("spacing", self.value(given.get("scheduler")) or SCHEDULERS.get(kind, kind))
            self.put("denoise", self.value(given.get("denoise")))
            options = {ours: self.value(given.get(theirs)) for theirs, ours in SIGMA_OPTIONS.items()}
            options = {name: value for name, value in options.items() if value is not None}
            if options:
                self.put("spacing_options", options)
            return

    def text(self, value: Any, role: str, seen: frozenset[str]) -> str | None:
        """The text behind a condition, through nodes that change or join conditions."""
        key = self.linked(value)
        if key is None or key in seen:
            return value if isinstance(value, str) else None
        node, seen = self.graph[key], seen | {key}
        given, kind = node["inputs"], str(node.get("class_type", ""))
        if len(seen) > 100:
            return None
        for name in ("text", "text_g", "text_l", "prompt"):
            if isinstance(text := self.value(given.get(name)), str):
                if (clip := self.node(given, "clip")) is not None and role != "negative":
                    self.model(given["clip"], clip)
                return text
        if kind in JOINED:
            first, second, mark = JOINED[kind]
            texts = [self.text(given.get(name), role, seen) for name in (first, second)]
            return mark.join(text for text in texts if text is not None)
        if kind == "ConditioningZeroOut":
            self.put("zeros_for_empty", True if role == "negative" else None)
            return "" if role == "negative" else self.text(given.get("conditioning"), role, seen)
        if kind == "ConditioningCombine":
            self.warnings.append("of conditions that are combined, the first is taken")
        for name in (role, *ONWARD):
            if name in given:
                return self.text(given[name], role, seen)
        return None

    def model(self, link: Any, start: Node | None = None) -> None:
        """Checkpoint, LoRA and methods, from a sampler's model (or an encoder's text model) upwards."""
        key, seen = self.linked(link), set[str]()
        while key is not None and key not in seen:
            seen.add(key)
            node = self.graph[key]
            given, kind = node["inputs"], str(node.get("class_type", ""))
            if kind in MODEL_METHODS:
                for name, value in MODEL_METHODS[kind](given).items():
                    self.put(name, value)
            elif "lora_name" in given:
                self.lora(given)
            elif isinstance(name := self.value(given.get("ckpt_name", given.get("unet_name"))), str):
                self.put("model", name)
            elif start is None and "model" in given:
                self.warnings.append(f"{kind[:60]} changed the model; it is left out")
            key = self.linked(given.get("model" if start is None else "clip"))

    def lora(self, given: Node) -> None:
        """A LoRA is told of, not taken: which weights are loaded is for people to say."""
        weights = [self.value(given.get(name)) for name in ("strength_model", "strength_clip")]
        shown = ":".join(str(weight)[:20] for weight in weights if weight is not None)
        told = f"drawn with the LoRA <lora:{str(self.value(given['lora_name']))[:80]}:{shown or 1}>: " \
               "put its tag into the prompt to take it"  # fmt: skip
        if told not in self.warnings:
            self.warnings.append(told)

    def latent(self, link: Any) -> None:
        """The size, from the nearest node above that has one; a picture to start from is told of."""
        key = self.linked(link)
        for place in self.upstream([key] if key is not None else []):
            given = self.graph[place]["inputs"]
            if "pixels" in given:
                self.warnings.append("it was made from another picture, which is left out")
                return
            width, height = (self.value(given.get(side)) for side in ("width", "height"))
            if isinstance(width, int) and isinstance(height, int):
                self.values |= {"width": width, "height": height}
                count = self.value(given.get("batch_size"))
                if isinstance(count, int) and count > 1:
                    self.values["batch"] = count
                    self.warnings.append(f"it is one of a batch of {count}, of which the first is taken")
                return


def parse_graph(text: str) -> Mapping[str, Any] | None:
    """The graph of a text, None where it is none; ComfyUI writes NaN where JSON has null."""
    try:
        value = json.loads(text, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, Mapping) and any(_is_node(node) for node in value.values()) else None
