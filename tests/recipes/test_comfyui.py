"""ComfyUI's graphs, made by hand from what its nodes are documented to hold."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sfumato.recipes import Recipe, from_texts
from sfumato.request import Request


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}


def basic(**changes: Any) -> dict[str, Any]:
    """The default graph; a change replaces a node, None removes it."""
    graph = {
        "3": node("KSampler", seed=156680208700286, steps=20, cfg=8, sampler_name="euler", scheduler="normal",
                  denoise=1, model=["4", 0], positive=["6", 0], negative=["7", 0], latent_image=["5", 0]),
        "4": node("CheckpointLoaderSimple", ckpt_name="v1-5-pruned-emaonly.safetensors"),
        "5": node("EmptyLatentImage", width=512, height=768, batch_size=1),
        "6": node("CLIPTextEncode", text="a (fox:1.2) in snow", clip=["4", 1]),
        "7": node("CLIPTextEncode", text="text, watermark", clip=["4", 1]),
        "8": node("VAEDecode", samples=["3", 0], vae=["4", 2]),
        "9": node("SaveImage", filename_prefix="ComfyUI", images=["8", 0]),
    }  # fmt: skip
    graph |= {name.removeprefix("n"): change for name, change in changes.items()}
    return {name: each for name, each in graph.items() if each is not None}


def read(graph: Any) -> Recipe:
    return from_texts({"prompt": json.dumps(graph), "workflow": "{}"})


EXPECTED: dict[str, Any] = {
    "prompt": "a (fox:1.2) in snow", "negative_prompt": "text, watermark", "seed": 156680208700286,
    "steps": 20, "guidance": 8, "sampler": "euler", "spacing": "normal", "width": 512, "height": 768,
    "emphasis": "comfyui",
}  # fmt: skip


def check(found: Recipe, **changes: Any) -> None:
    values = EXPECTED | changes
    assert found.request == Request(**{name: value for name, value in values.items() if value is not None})


def test_the_default_graph() -> None:
    found = read(basic())
    check(found)
    assert (found.tool, found.ignored, found.warnings) == ("ComfyUI", [], [])
    assert found.values["model"] == "v1-5-pruned-emaonly.safetensors"


def test_only_what_leads_to_the_picture_counts() -> None:
    other = node("KSampler", seed=1, steps=1, cfg=1, sampler_name="lms", scheduler="karras", model=["4", 0])
    check(read({"1": other, **basic()}))
    preview = basic(n9=node("PreviewImage", images=["8", 0]))
    check(read(preview))
    check(read(basic(n9=node("SomeSaver", pictures=["8", 0]))))


def test_values_and_texts_from_other_nodes() -> None:
    graph = basic(
        n10=node("PrimitiveInt", value=7), n11=node("StringConstant", string="a cat"),
        n12=node("Reroute", value=["11", 0]),
    )  # fmt: skip
    graph["3"]["inputs"] |= {"seed": ["10", 0], "steps": ["10", 0]}
    graph["6"]["inputs"]["text"] = ["12", 0]
    check(read(graph), seed=7, steps=7, prompt="a cat")


def test_loras_are_told_and_not_taken() -> None:
    graph = basic(
        n10=node("LoraLoader", lora_name="ink.safetensors", strength_model=0.8, strength_clip=0.5,
                 model=["4", 0], clip=["4", 1]),
    )  # fmt: skip
    graph["3"]["inputs"]["model"] = ["10", 0]
    graph["6"]["inputs"]["clip"] = ["10", 1]
    found = read(graph)
    check(found)
    assert found.warnings == [
        "drawn with the LoRA <lora:ink.safetensors:0.8:0.5>: put its tag into the prompt to take it"
    ]
    assert found.values["model"] == "v1-5-pruned-emaonly.safetensors"


def test_methods_between_checkpoint_and_sampler() -> None:
    graph = basic(
        n10=node("FreeU_V2", b1=1.3, b2=1.4, s1=0.9, s2=0.2, model=["4", 0]),
        n11=node("RescaleCFG", multiplier=0.7, model=["10", 0]),
        n12=node("PerturbedAttentionGuidance", scale=3.0, model=["11", 0]),
        n13=node("ModelSamplingDiscrete", sampling="v_prediction", zsnr=True, model=["12", 0]),
        n14=node("CLIPSetLastLayer", stop_at_clip_layer=-2, clip=["4", 1]),
    )
    graph["3"]["inputs"]["model"] = ["13", 0]
    graph["6"]["inputs"]["clip"] = ["14", 0]
    found = read(graph)
    check(found, freeu=(1.3, 1.4, 0.9, 0.2), rescale=0.7, pag=3, clip_skip=2)
    assert found.warnings == ["ModelSamplingDiscrete changed the model; it is left out"]


def test_conditions_through_other_nodes() -> None:
    graph = basic(
        n10=node("CLIPTextEncode", text="at night", clip=["4", 1]),
        n11=node("ConditioningConcat", conditioning_to=["6", 0], conditioning_from=["10", 0]),
        n12=node("ConditioningZeroOut", conditioning=["7", 0]),
        n13=node("ControlNetApplyAdvanced", positive=["11", 0], negative=["12", 0], strength=1),
    )
    graph["3"]["inputs"] |= {"positive": ["13", 0], "negative": ["13", 1]}
    check(read(graph), prompt="a (fox:1.2) in snow BREAK at night", negative_prompt="", zeros_for_empty=True)
    graph["13"] = node("ConditioningCombine", conditioning_1=["6", 0], conditioning_2=["10", 0])
    graph["3"]["inputs"] |= {"positive": ["13", 0], "negative": ["7", 0]}
    found = read(graph)
    check(found)
    assert found.warnings == ["of conditions that are combined, the first is taken"]
    graph["6"] = node("CLIPTextEncodeSDXL", text_g="a bear", text_l="a bear", width=1024, clip=["4", 1])
    check(read(graph), prompt="a bear")


def test_the_advanced_sampler_and_a_second_pass() -> None:
    first = node("KSamplerAdvanced", noise_seed=5, steps=25, cfg=6, sampler_name="dpmpp_2m",
                 scheduler="karras", add_noise="enable", start_at_step=0, end_at_step=20,
                 model=["4", 0], positive=["6", 0], negative=["7", 0], latent_image=["5", 0])  # fmt: skip
    graph = basic(n2=first, n10=node("LatentUpscale", samples=["2", 0], width=1024, height=1024))
    graph["3"]["inputs"]["latent_image"] = ["10", 0]
    found = read(graph)
    check(found, seed=5, steps=25, guidance=6, sampler="dpmpp_2m", spacing="karras")
    assert found.warnings == ["the first of 2 samplings is taken; left out: KSampler"]
    assert found.ignored == ["start_at_step", "end_at_step"]


@pytest.mark.parametrize(
    ("sampler", "sigmas", "expected"),
    [
        (node("KSamplerSelect", sampler_name="dpmpp_2m_sde_gpu"),
         node("BasicScheduler", scheduler="exponential", steps=12, denoise=1.0, model=["4", 0]),
         {"sampler": "dpmpp_2m_sde", "spacing": "exponential", "steps": 12}),
        (node("SamplerEulerAncestral", eta=0.5, s_noise=1.1),
         node("KarrasScheduler", steps=9, sigma_max=14.6, sigma_min=0.03, rho=5.0),
         {"sampler": "euler_a", "eta": 0.5, "sampler_options": {"s_noise": 1.1}, "spacing": "karras",
          "steps": 9, "spacing_options": {"rho": 5.0, "sigma_min": 0.03, "sigma_max": 14.6}}),
        (node("SamplerDPMPP_SDE", eta=1.0, s_noise=1.0, r=0.4, noise_device="cpu"),
         node("SplitSigmas", step=3, sigmas=["40", 0]),
         {"sampler": "dpmpp_sde", "eta": 1.0, "sampler_options": {"s_noise": 1.0, "r": 0.4},
          "spacing": "align_your_steps", "steps": 10}),
    ],
)  # fmt: skip
def test_custom_samplers(sampler: Any, sigmas: Any, expected: dict[str, Any]) -> None:
    graph = basic(
        n3=node("SamplerCustomAdvanced", noise=["20", 0], guider=["21", 0], sampler=["22", 0],
                sigmas=["23", 0], latent_image=["5", 0]),
        n20=node("RandomNoise", noise_seed=99),
        n21=node("CFGGuider", model=["4", 0], positive=["6", 0], negative=["7", 0], cfg=4.5),
        n22=sampler, n23=sigmas,
        n40=node("AlignYourStepsScheduler", model_type="SD1", steps=10, denoise=1.0),
    )  # fmt: skip
    check(read(graph), seed=99, guidance=4.5, **expected)
    graph["21"] = node("BasicGuider", model=["4", 0], conditioning=["6", 0])
    check(read(graph), seed=99, guidance=1, negative_prompt=None, **expected)
    old = node("SamplerCustom", add_noise=True, noise_seed=99, cfg=4.5, model=["4", 0], positive=["6", 0],
               negative=["7", 0], sampler=["22", 0], sigmas=["23", 0], latent_image=["5", 0])  # fmt: skip
    check(read(graph | {"3": old}), seed=99, guidance=4.5, **expected)


def test_pictures_to_start_from_and_batches_are_told() -> None:
    graph = basic(n5=node("VAEEncode", pixels=["30", 0], vae=["4", 2]), n30=node("LoadImage", image="a.png"))
    graph["3"]["inputs"]["denoise"] = 0.6
    found = read(graph)
    check(found, width=None, height=None)
    assert found.ignored == ["denoise"] and "made from another picture" in found.warnings[0]
    found = read(basic(n5=node("EmptyLatentImage", width=512, height=768, batch_size=4)))
    check(found)
    assert found.warnings == ["it is one of a batch of 4, of which the first is taken"]


def test_graphs_that_make_no_sense() -> None:
    nothing = read(basic(n3=None))
    assert nothing.request is None and nothing.warnings == ["no sampler leads to the picture"]
    circle = basic(n6=node("ConditioningSetArea", conditioning=["7", 0]),
                   n7=node("ConditioningSetArea", conditioning=["6", 0]),
                   n4=node("LoraLoader", lora_name="x", model=["4", 0]),
                   n5=node("LatentUpscale", samples=["5", 0]))  # fmt: skip
    circle["3"]["inputs"] |= {"seed": ["3", 0], "steps": [["3"], 0], "cfg": {"a": 1}, "scheduler": "own"}
    found = read(circle)
    assert found.request == Request(sampler="euler", emphasis="comfyui")
    assert "there is no spacing 'own'" in found.warnings
    chain = {str(i): node("Reroute", value=[str(i + 1), 0]) for i in range(100, 6000)}
    check(read({**basic(), **chain}))


def test_exif_of_webp_and_texts_with_nan() -> None:
    text = json.dumps(basic()).replace('"cfg": 8', '"cfg": NaN')
    found = from_texts({"Make": f"workflow:{{}}\0prompt:{text}", "Model": f"prompt:{text}"})
    check(found, guidance=None)
