"""Names of samplers and spacings: every tool's are understood, ours come back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.diffusion.names import implied, resolve, resolve_spacing, spacing_title, title
from sfumato.diffusion.samplers import SAMPLERS
from sfumato.diffusion.spacing import SPACINGS
from sfumato.errors import InputError

# AUTOMATIC1111's list up to 1.8, where a name was sampler and schedule, with its aliases.
COMBINED = {
    "DPM++ 2M Karras": ("dpmpp_2m", "karras"),
    "DPM++ SDE Karras": ("dpmpp_sde", "karras"),
    "DPM++ 2M SDE Exponential": ("dpmpp_2m_sde", "exponential"),
    "DPM++ 2M SDE Karras": ("dpmpp_2m_sde", "karras"),
    "DPM++ 2M SDE Heun Karras": ("dpmpp_2m_sde_heun", "karras"),
    "DPM++ 2M SDE Heun Exponential": ("dpmpp_2m_sde_heun", "exponential"),
    "DPM++ 2M SDE Heun": ("dpmpp_2m_sde_heun", None),
    "DPM++ 3M SDE": ("dpmpp_3m_sde", None),
    "DPM++ 3M SDE Karras": ("dpmpp_3m_sde", "karras"),
    "DPM++ 3M SDE Exponential": ("dpmpp_3m_sde", "exponential"),
    "DPM++ 2S a Karras": ("dpmpp_2s_a", "karras"),
    "LMS Karras": ("lms", "karras"),
    "DPM2 Karras": ("dpm2", "karras"),
    "DPM2 a Karras": ("dpm2_a", "karras"),
    "DPM fast": ("dpm_fast", None),
    "DPM adaptive": ("dpm_adaptive", None),
    "Euler a": ("euler_a", None),
    "Heun": ("heun", None),
    "DDIM CFG++": ("ddim_cfg_pp", None),
    "PLMS": ("plms", None),
    "UniPC": ("unipc", None),
    "Restart": ("restart", None),
    "LCM": ("lcm", None),
    "k_euler_a": ("euler_a", None),
    "k_euler_ancestral": ("euler_a", None),
    "K_EULER": ("euler", None),
    "k_lms_ka": ("lms", "karras"),
    "k_dpm_2_a_ka": ("dpm2_a", "karras"),
    "k_dpm_fast": ("dpm_fast", None),
    "k_dpm_ad": ("dpm_adaptive", None),
    "k_dpmpp_2s_a_ka": ("dpmpp_2s_a", "karras"),
    "k_dpmpp_2m_ka": ("dpmpp_2m", "karras"),
    "k_dpmpp_2m_sde_exp": ("dpmpp_2m_sde", "exponential"),
    "k_dpmpp_sde_ka": ("dpmpp_sde", "karras"),
    "k dpm++ 2m": ("dpmpp_2m", None),
}
COMFYUI = {
    "euler_ancestral": "euler_a",
    "euler_cfg_pp": "euler_cfg_pp",
    "euler_ancestral_cfg_pp": "euler_a_cfg_pp",
    "dpm_2": "dpm2",
    "dpm_2_ancestral": "dpm2_a",
    "dpmpp_2s_ancestral": "dpmpp_2s_a",
    "dpmpp_sde_gpu": "dpmpp_sde",
    "dpmpp_2m_cfg_pp": "dpmpp_2m_cfg_pp",
    "dpmpp_2m_sde_gpu": "dpmpp_2m_sde",
    "dpmpp_2m_sde_heun_gpu": "dpmpp_2m_sde_heun",
    "dpmpp_3m_sde_gpu": "dpmpp_3m_sde",
    "uni_pc": "unipc",
    "uni_pc_bh2": "unipc",
    "ddim": "ddim",
    "ipndm_v": "ipndm_v",
}
INVOKEAI = {
    "euler_k": ("euler", "karras"),
    "heun_k": ("heun", "karras"),
    "lms_k": ("lms", "karras"),
    "deis_k": ("deis", "karras"),
    "kdpm_2": ("dpm2", None),
    "kdpm_2_k": ("dpm2", "karras"),
    "kdpm_2_a": ("dpm2_a", None),
    "kdpm_2_a_k": ("dpm2_a", "karras"),
    "dpmpp_2s_k": ("dpmpp_2s_a", "karras"),
    "dpmpp_2m_k": ("dpmpp_2m", "karras"),
    "dpmpp_2m_sde_k": ("dpmpp_2m_sde", "karras"),
    "dpmpp_sde_k": ("dpmpp_sde", "karras"),
    "unipc_k": ("unipc", "karras"),
    "pndm": ("plms", None),
    "tcd": ("tcd", None),
}
DIFFUSERS = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "PNDMScheduler": "plms",
    "LMSDiscreteScheduler": "lms",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_a",
    "HeunDiscreteScheduler": "heun",
    "KDPM2DiscreteScheduler": "dpm2",
    "KDPM2AncestralDiscreteScheduler": "dpm2_a",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "DPMSolverSinglestepScheduler": "dpmpp_2s_a",
    "DPMSolverSDEScheduler": "dpmpp_sde",
    "DEISMultistepScheduler": "deis",
    "UniPCMultistepScheduler": "unipc",
    "IPNDMScheduler": "ipndm",
    "LCMScheduler": "lcm",
    "TCDScheduler": "tcd",
}
CPP = {"dpm++2m": ("dpmpp_2m", None), "dpm++2s_a": ("dpmpp_2s_a", None), "dpm2": ("dpm2", None),
       "dpm++2m_sde_bt": ("dpmpp_2m_sde", None), "ddim_trailing": ("ddim", "trailing")}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "expected"),
    [*COMBINED.items(), *INVOKEAI.items(), *CPP.items(),
     *((name, (key, None)) for name, key in {**COMFYUI, **DIFFUSERS}.items())],
)  # fmt: skip
def test_the_names_of_other_tools(name: str, expected: tuple[str, str | None]) -> None:
    assert resolve(name) == expected
    assert resolve(f"  {name.upper()} ") == resolve(name.replace("_", " ").lower()) == expected


def test_our_names_come_back_and_no_two_are_the_same() -> None:
    for sampler in SAMPLERS:
        assert resolve(sampler) == resolve(f"sample_{sampler}") == resolve(title(sampler)) == (sampler, None)
        assert title(sampler, "auto") == title(sampler) == SAMPLERS[sampler].title
        for spacing in SPACINGS:
            assert resolve(title(sampler, spacing)) == resolve(f"{sampler}_{spacing}") == (sampler, spacing)
    assert title("dpmpp_2m", "karras") == "DPM++ 2M Karras"
    assert resolve("Euler a Automatic") == ("euler_a", None)


def test_options_that_a_name_says() -> None:
    assert implied("uni_pc_bh2") == implied("unipc_bh2 Karras") == {"variant": "bh2"}
    assert implied("DPMSolverSinglestepScheduler") == {"eta": 0.0}
    assert implied("DPM++ 2M Karras") == {}
    for name in ("unipc_bh1", "dpmpp_2s"):
        assert set(implied(name)) <= set(SAMPLERS[resolve(name)[0]].options)


@pytest.mark.parametrize(
    ("name", "key"),
    [("Automatic", "auto"), ("auto", "auto"), ("Uniform", "uniform"), ("linspace", "uniform"),
     ("SGM Uniform", "sgm_uniform"), ("sgm_uniform", "sgm_uniform"), ("KL Optimal", "kl_optimal"),
     ("Align Your Steps", "align_your_steps"), ("ays", "align_your_steps"),
     ("Align Your Steps 32", "align_your_steps"),
     ("Align Your Steps GITS", "gits"), ("DDIM", "ddim_uniform"),
     ("ddim_uniform", "ddim_uniform"),
     ("SD Turbo", "turbo"), ("discrete", "uniform"), ("POLYEXPONENTIAL", "polyexponential")],
)  # fmt: skip
def test_names_of_spacings(name: str, key: str) -> None:
    assert resolve_spacing(name) == key


def test_spacings_come_back() -> None:
    for key in ("auto", *SPACINGS):
        assert resolve_spacing(key) == resolve_spacing(spacing_title(key)) == key


@pytest.mark.parametrize(
    ("name", "words"),
    [("DPM++ 2M Karas", "'DPM\\+\\+ 2M Karras'"), ("eulerr", "'euler'"), ("karras", "no sampler"),
     ("", "sfumato samplers"), ("dpmpp_3m", "no sampler"), ("x" * 10_000, "sfumato samplers")],
)  # fmt: skip
def test_unknown(name: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        resolve(name)
    assert len(str(caught.value)) < 200
    with pytest.raises(InputError):
        implied(name)


def test_unknown_spacing() -> None:
    with pytest.raises(InputError, match="Did you mean 'karras'"):
        resolve_spacing("karas")
    for call in (lambda: title("eulr"), lambda: title("euler", "karas"), lambda: spacing_title("karas")):
        with pytest.raises(InputError, match="Did you mean"):
            call()


@settings(deadline=None, max_examples=50)  # a busy machine is not a failure
@given(st.text(max_size=30))
def test_any_text_is_a_name_or_an_input_error(name: str) -> None:
    try:
        sampler, spacing = resolve(name)
    except InputError:
        return
    assert sampler in SAMPLERS and (spacing is None or spacing in SPACINGS)
