"""What released files hold beside their networks: each such tensor is left out by a rule that has a name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

BUFFERS = (
    "betas|alphas_cumprod(?:_prev)?|sqrt_(?:one_minus_|recip_|recipm1_)?alphas_cumprod"
    "|log_one_minus_alphas_cumprod|posterior_(?:variance|log_variance_clipped|mean_coef[12])"
    "|lvlb_weights|cond_ids|(?:denoiser\\.)?(?:log_)?sigmas"
)
# Rule -> the names that it leaves out, whole. The first rule that matches is the one that is named.
RULES: Mapping[str, re.Pattern[str]] = {
    "ema": re.compile(r"model_ema\..+"),
    "schedule buffers": re.compile(rf"(?:model\.|low_scale_model\.)?(?:{BUFFERS})"),
    "latent scale": re.compile(r"scale_factor"),
    "prediction flags": re.compile(r"v_pred|ztsnr"),
    "position ids": re.compile(r"(?:.+\.)?position_ids"),
    "causal mask": re.compile(r"(?:.+\.)?attn_mask"),
    "logit scale": re.compile(r"(?:.+\.)?logit_scale"),
    "autoencoder loss": re.compile(r"(?:first_stage_model\.)?(?:loss|discriminator|perceptual_loss)\..+"),
    # LDM's inpainting encodes its condition by its own first stage, which it saved twice.
    "first stage of the condition": re.compile(
        r"cond_stage_model\.(?:(?:en|de)coder|(?:post_)?quant_conv|quantize|loss)\..+"
    ),
    "codebook usage": re.compile(r"(?:.+\.)?quantize\.(?:used|embedding\.(?:cluster_size|embed_avg))"),
    "word prediction": re.compile(r"(?:cond_stage_model\.transformer\.|transformer\.|bert/)?to_logits\..+"),
    "learned log-variance": re.compile(r"logvar"),
    "safety checker": re.compile(r"safety_checker[./].+"),
    "vision tower": re.compile(r"(?:.+\.)?(?:vision_model\.|visual_projection\.|visual\.).+"),
    "training state": re.compile(
        r"(?:optimizer_states|optimizer|lr_schedulers|callbacks|loops|hyper_parameters|hparams|grad_scaler"
        r"|amp_scaler|NativeMixedPrecisionPlugin|native_amp_scaling_state)(?:\..+)?"
        r"|epoch|global_step|iteration|pytorch-lightning_version|metrics\..+|.+\.num_batches_tracked"
    ),
}
# Rules that only the file as a whole tells; `detect` applies them.
UNUSED_LAYER = "unused last layer"  # SD 2 conditions on the layer before OpenCLIP's last
UNUSED_PROJECTION = "unused projection"  # of the pooled vector, where the model conditions on tokens alone
NOT_AVERAGED = "weights without EMA"  # what training had, where the averaged weights are asked for


def sort_out(names: Iterable[str]) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """(rule -> the names it leaves out, names that no rule knows), both in the order given."""
    ignored: dict[str, list[str]] = {}
    unknown: list[str] = []
    for name in names:
        rule = rule_of(name)
        if rule is None:
            unknown.append(name)
        else:
            ignored.setdefault(rule, []).append(name)
    return {rule: tuple(found) for rule, found in ignored.items()}, tuple(unknown)


def rule_of(name: str) -> str | None:
    """The rule that leaves a tensor out, None where none does."""
    return next((rule for rule, pattern in RULES.items() if pattern.fullmatch(name)), None)
