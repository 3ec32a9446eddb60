"""Harmless checkpoints in the layouts that people really have: what programs write around weights, tiny.

`benign(folder)` writes them and yields what each should give. The classes of programs that are not installed
here are stood in for by empty ones of the same names, so that the pickles mention what the real ones do.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import enum
import pathlib
import pickle
import struct
import sys
import types
import typing
import uuid
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import safetensors.torch
import torch
from torch import Tensor, nn

LDM = {  # a few names and shapes of every part; the real files have a thousand
    "model.diffusion_model.input_blocks.0.0.weight": (4, 4, 3, 3),
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (4, 8),
    "model.diffusion_model.out.2.bias": (4,),
    "first_stage_model.encoder.mid.attn_1.q.weight": (4, 4, 1, 1),
    "first_stage_model.post_quant_conv.bias": (4,),
    "betas": (10,),
    "alphas_cumprod": (10,),
}
SD1 = {**LDM, "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (12, 8)}
SD2 = {
    **LDM,
    "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight": (24, 8),
    "cond_stage_model.model.logit_scale": (),
}
SDXL = {
    **LDM,
    "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": (8,),
    "conditioner.embedders.1.model.text_projection": (8, 8),
    "model.diffusion_model.label_emb.0.0.weight": (4, 6),
}


@dataclass(frozen=True)
class Benign:
    """A file, the tensors it holds by their dotted names, and classes that are to be named in its notes."""

    name: str
    path: Path
    tensors: Mapping[str, Tensor]
    classes: tuple[str, ...] = ()


def weights(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(len(shapes))
    made = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    if "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight" in made:
        made["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(7).expand(
            (1, -1)
        )
    return made


STAGES = "pytorch_lightning.trainer.states.RunningStage"
STAGE = enum.Enum("RunningStage", {"TRAINING": "train"}, module="pytorch_lightning.trainer.states")  # called


MADE: dict[str, type] = {}  # the same class each time: a pickle is read while others are written


@contextmanager
def classes(*names: str) -> Iterator[dict[str, type]]:
    """Importable classes of these dotted names, for as long as it takes to write or read a pickle."""
    before = dict(sys.modules)
    made: dict[str, type] = {}
    for dotted in names:
        module, _, name = dotted.rpartition(".")
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            level = ".".join(parts[:end])
            if level not in sys.modules:
                sys.modules[level] = types.ModuleType(level)
        if dotted not in MADE:
            MADE[dotted] = STAGE if dotted == STAGES else type(name, (), {"__module__": module})
        made[name] = MADE[dotted]
        setattr(sys.modules[module], name, made[name])
    try:
        yield made
    finally:
        for name in set(sys.modules) - set(before):
            del sys.modules[name]


def filled(cls: type, **state: object) -> object:
    made = cls()
    made.__dict__.update(state)
    return made


CHECKPOINT = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
OMEGACONF = tuple(f"omegaconf.{name}" for name in (
    "dictconfig.DictConfig", "listconfig.ListConfig", "nodes.AnyNode", "base.ContainerMetadata",
    "base.Metadata",
))  # fmt: skip
STANDING_IN = (
    CHECKPOINT, *OMEGACONF, "ldm.lr_scheduler.LambdaLinearScheduler", "mytrainer.callbacks.Preview",
    "pytorch_lightning.utilities.parsing.AttributeDict", "library.train_util.Settings",
    "pytorch_lightning.trainer.states.RunningStage",
)  # fmt: skip


def lightning(state: dict[str, Any], known: Mapping[str, type]) -> dict[str, Any]:
    """What Lightning 1.4 puts around a state dict."""
    return {
        "epoch": 6, "global_step": 470000, "pytorch-lightning_version": "1.4.2", "state_dict": state,
        "callbacks": {known["ModelCheckpoint"]: {
            "monitor": "val/loss", "best_model_score": torch.tensor(0.14), "best_model_path": "a/b.ckpt",
            "dirpath": pathlib.PurePosixPath("logs/run"), "best_k_models": {"a/b.ckpt": torch.tensor(0.14)},
        }},
        "optimizer_states": [
            {"state": {0: {"step": 3, "exp_avg": torch.ones(2)}}, "param_groups": [{"betas": (0.9, 0.999)}]}],
        "lr_schedulers": [
            {"base_lrs": [1e-4], "lr_lambdas": [filled(known["LambdaLinearScheduler"], f_max=[1.0])]}],
    }  # fmt: skip


def settings(known: Mapping[str, type]) -> object:
    """A DictConfig as OmegaConf 2.1 pickles it: nodes that know their parents."""
    about = filled(known["ContainerMetadata"], ref_type=typing.Any, object_type=dict, optional=True, key=None,
                   flags={}, key_type=typing.Any, element_type=typing.Any)  # fmt: skip
    root = filled(known["DictConfig"], _metadata=about, _parent=None)
    leaf = filled(known["Metadata"], ref_type=typing.Any, object_type=None, optional=True, key="base_lr")
    node = filled(known["AnyNode"], _metadata=leaf, _parent=root, _val=1e-4)
    root.__dict__["_content"] = {
        "base_lr": node,
        "list": filled(known["ListConfig"], _content=[node], _parent=root),
    }
    return root


class Tower(nn.Module):
    """Something with a state dict that has `_metadata`, and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.register_buffer("steps", torch.tensor(5))


def prefixed(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _states() -> Iterator[tuple[str, object, Mapping[str, Tensor]]]:
    """(name, what is saved, the tensors in it), for everything that needs no class that is not here."""
    sd1 = weights(SD1)
    for kind in (torch.float32, torch.float16, torch.bfloat16):
        half = {name: each if each.dtype == torch.int64 else each.to(kind) for name, each in sd1.items()}
        yield f"SD 1 in {kind}", {"state_dict": half, "global_step": 470000}, half
        yield f"SD 1 pruned in {kind}", half, half
    yield "SD 2", {"state_dict": weights(SD2)}, weights(SD2)
    yield "SDXL", weights(SDXL), weights(SDXL)
    ema = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): each
        for name, each in weights(LDM).items()
    }
    ema |= {
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(7, dtype=torch.int32),
    }
    yield "EMA alone", {"state_dict": ema}, ema
    yield "EMA beside the weights", {"state_dict": {**sd1, **ema}}, {**sd1, **ema}
    block = "lora_unet_down_blocks_0_attentions_0_proj_in"
    lora = {f"{block}.lora_down.weight": torch.randn(2, 4), f"{block}.lora_up.weight": torch.randn(4, 2)}
    lora[f"{block}.alpha"] = torch.tensor(2.0)
    yield "a kohya LoRA", lora, lora
    peft = {f"base_model.model.q_proj.lora_{side}.weight": torch.randn(2, 2) for side in "AB"}
    yield "a PEFT LoRA", peft, peft
    inverted = torch.randn(1, 8)
    a1111 = {"string_to_token": {"*": 265}, "string_to_param": {"*": inverted}, "name": "style", "step": 500,
             "sd_checkpoint": "a1b2", "sd_checkpoint_name": "v1-5"}  # fmt: skip
    yield "a textual inversion of AUTOMATIC1111", a1111, {"string_to_param.*": inverted}
    old = {
        "string_to_token": {"*": torch.tensor(265)},
        "string_to_param": nn.ParameterDict({"*": nn.Parameter(inverted)}),
    }
    yield (
        "a textual inversion of its authors",
        old,
        {"string_to_token.*": torch.tensor(265), "string_to_param.*": inverted},
    )
    yield "a textual inversion of diffusers", {"<cat-toy>": inverted}, {"<cat-toy>": inverted}
    tower = Tower()
    optimizer = torch.optim.AdamW(tower.parameters())
    tower.first(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    own = {f"model.{name}": each for name, each in tower.state_dict().items()}
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    saved = {
        "state_dict": tower.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr": scheduler.state_dict(),
    }
    yield "an optimizer's state beside", saved, tower.state_dict()
    yield "a model under its own key", {"model": tower.state_dict(), "epoch": 3}, own
    yield "a state dict with metadata", tower.state_dict(), tower.state_dict()
    scalars = {
        "state_dict": lora,
        "epoch": numpy.int64(3),
        "loss": numpy.float64(0.5),
        "best": numpy.float32(0.25),
    }
    yield "numpy scalars", scalars, lora
    random = {"state_dict": lora, "numpy": numpy.random.get_state(), "array": numpy.arange(6.0).reshape(2, 3),
              "generator": numpy.random.default_rng(1), "torch": torch.get_rng_state()}  # fmt: skip
    yield "states of random generators", random, lora
    base = torch.randn(4, 6)
    views = {"all": base, "row": base[1], "column": base[:, 2], "transposed": base.T, "part": base[1:3, ::2]}
    yield "views of one storage", views, views
    permuted = {
        "conv": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        "t": torch.randn(3, 2).T,
    }
    yield "tensors that are not contiguous", permuted, permuted
    parameters = {
        "w": nn.Parameter(torch.randn(2)),
        "fixed": nn.Parameter(torch.ones(2), requires_grad=False),
    }
    yield "parameters", parameters, {name: each.detach() for name, each in parameters.items()}
    marked = nn.Parameter(torch.randn(2))
    marked.origin = "here"  # type: ignore[attr-defined]  # a parameter with a state of its own
    yield "a parameter with attributes", {"w": marked}, {"w": marked.detach()}
    shapes = {
        "state_dict": lora,
        "shape": torch.Size([1, 2]),
        "dtype": torch.float16,
        "device": torch.device("cpu"),
    }
    yield "sizes, dtypes and devices", shapes, lora
    kinds = {str(kind).split(".")[1]: torch.arange(4).to(kind) for kind in (
        torch.float64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
        torch.complex64, torch.uint16, torch.float8_e4m3fn, torch.float8_e5m2,
    )}  # fmt: skip
    yield "every number format", kinds, kinds
    yield (
        "empty and scalar tensors",
        {"e": torch.empty(0, 4), "s": torch.tensor(1.5)},
        {"e": torch.empty(0, 4), "s": torch.tensor(1.5)},
    )
    plain: dict[Any, Any] = {
        "state_dict": lora, "namespace": argparse.Namespace(lr=1e-4, nested=argparse.Namespace(a=1)),
        "when": datetime.datetime(2022, 8, 22), "zone": datetime.UTC, "took": datetime.timedelta(1),
        "id": uuid.UUID(int=1), "price": decimal.Decimal("1.5"), "where": pathlib.PurePosixPath("a/b"),
        "counts": collections.Counter("aab"), "queue": collections.deque([1]),
        "default": collections.defaultdict(list, a=[1]), "set": {1, 2}, "frozen": frozenset({1}),
        "bytes": b"\x00\xff", "array": bytearray(b"ab"), "complex": 1j, "slice": slice(1, 2),
        "range": range(3), "big": 2**70, "minus": -(2**40), "inf": float("inf"),
        "types": [int, dict, typing.Any], "unicode": "Größe ✓ 🎨", ("a", 1): "a tuple for a key",
        7: "a number for a key", None: None, "simple": types.SimpleNamespace(a=1),
    }  # fmt: skip
    yield "values of the standard library", plain, lora
    circle: list[Any] = [1]
    circle.append({"self": circle, "pair": (circle,)})
    yield "objects that contain themselves", {"state_dict": lora, "circle": circle}, lora
    yield "an ordered state dict", OrderedDict(lora), lora
    yield "a default state dict", {"state_dict": collections.defaultdict(int, lora)}, lora


def _with_classes(
    known: Mapping[str, type],
) -> Iterator[tuple[str, object, Mapping[str, Tensor], tuple[str, ...]]]:
    sd1 = weights(SD1)
    yield (
        "Lightning's extras",
        lightning(sd1, known),
        sd1,
        (CHECKPOINT, "ldm.lr_scheduler.LambdaLinearScheduler"),
    )
    omega = {
        "state_dict": sd1,
        "hyper_parameters": {"unet_config": settings(known), "base_lr": 1e-4, "parameterization": "v"},
    }
    yield "OmegaConf's settings", omega, sd1, OMEGACONF
    hparams = {"state_dict": sd1, "hyper_parameters": filled(known["AttributeDict"], lr=1.0)}
    yield "Lightning's hyperparameters", hparams, sd1, ("pytorch_lightning.utilities.parsing.AttributeDict",)
    mine = {"state_dict": sd1, "callbacks": [filled(known["Preview"], every=10, sample=torch.ones(2))]}
    yield "a callback of one's own", mine, sd1, ("mytrainer.callbacks.Preview",)
    yield "Lightning's enumerations", {"state_dict": sd1, "stage": STAGE["TRAINING"]}, sd1, (STAGES,)
    kohya = {"state_dict": sd1, "args": filled(known["Settings"], train_batch_size=1)}
    yield "kohya's settings", kohya, sd1, ("library.train_util.Settings",)


def _by_hand(folder: Path) -> Iterator[Benign]:
    """Files that no torch of today writes."""
    value = torch.tensor([1.0, 2.0, 3.0, 4.0])
    floats = value.numpy().tobytes()

    def text(word: str) -> bytes:
        return b"U" + bytes([len(word)]) + word.encode()

    def storage(view: bytes) -> bytes:
        return (
            b"("
            + text("storage")
            + b"ctorch\nFloatStorage\n"
            + text("123")
            + text("cpu")
            + b"K\4"
            + view
            + b"tQ"
        )

    def tensor(
        view: bytes,
        count: int,
        rebuild: str = "_rebuild_tensor_v2",
        tail: bytes = b"\x89ccollections\nOrderedDict\n)R",
    ) -> bytes:
        shape = b"K" + bytes([count]) + b"\x85" + b"K\1\x85"
        return b"ctorch._utils\n" + rebuild.encode() + b"\n(" + storage(view) + b"K\0" + shape + tail + b"tR"

    def legacy(body: bytes) -> bytes:
        head = b"".join(
            pickle.dumps(each, 2) for each in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
        )
        return head + b"\x80\2" + body + b"." + pickle.dumps(["123"], 2) + struct.pack("<q", 4) + floats

    files = {
        "written by Python 2": (
            legacy(b"ccollections\nOrderedDict\n](](" + text("w") + tensor(b"N", 4) + b"ee\x85R"), value),
        "with views of storages": (
            legacy(b"}" + text("w") + tensor(b"(" + text("456") + b"K\1K\2t", 2) + b"s"), value[1:3]),
        "of torch 0.1": (legacy(b"}" + text("w") + tensor(b"N", 4, "_rebuild_tensor", b"") + b"s"), value),
    }  # fmt: skip
    for name, (content, wanted) in files.items():
        path = folder / f"{name.replace(' ', '-')}.pt"
        path.write_bytes(content)
        yield Benign(f"legacy, {name}", path, {"w": wanted})
    lora = {"a.lora_down.weight": torch.randn(2, 4), "a.alpha": torch.tensor(4.0)}
    again = folder / "packed-again.ckpt"
    torch.save(lora, folder / "once.ckpt")
    with (
        zipfile.ZipFile(folder / "once.ckpt") as read,
        zipfile.ZipFile(again, "w", zipfile.ZIP_STORED) as write,
    ):
        write.mkdir("once")
        for member in read.infolist():
            write.writestr(member.filename, read.read(member))
    yield Benign("zip, packed again without compression", again, lora)
    unchecked = folder / "unchecked.ckpt"
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(lora, unchecked)
    finally:
        torch.serialization.set_crc32_options(before)
    yield Benign("zip, without checksums", unchecked, lora)
    unaligned = folder / "unaligned.safetensors"
    raw = safetensors.torch.save(lora)
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].rstrip(b" ")
    odd = header + b" " * (1 + len(header) % 2)
    unaligned.write_bytes(len(odd).to_bytes(8, "little") + odd + raw[8 + length :])
    yield Benign("safetensors, not aligned", unaligned, lora)


def benign(folder: Path) -> Iterator[Benign]:
    """Write every file below `folder` and yield it."""
    for name, saved, tensors in _states():
        yield _save(folder, name, saved, tensors)
    sd1 = weights(SD1)
    with classes(*STANDING_IN) as known:
        for name, saved, tensors, mentioned in _with_classes(known):
            yield _save(folder, name, saved, tensors, mentioned)
            yield _save(folder, name, saved, tensors, mentioned, legacy=True)
        around = lightning(sd1, known)
        for protocol in (2, 3, 4, 5):
            for legacy in (False, True):
                yield _save(
                    folder,
                    f"protocol {protocol}",
                    around,
                    sd1,
                    (CHECKPOINT,),
                    legacy=legacy,
                    protocol=protocol,
                )
    for name, saved, tensors in _states():
        if name.startswith(
            (
                "SD 1 in torch.float32",
                "SD 1 pruned in torch.float16",
                "views",
                "an ordered",
                "values",
                "numpy",
            )
        ):
            yield _save(folder, name, saved, tensors, legacy=True)
    yield from _by_hand(folder)
    kohya = {"ss_tag_frequency": '{"a": {"größe, [x]": 1}}'}
    for name, tensors, metadata in (
        ("SD 1", weights(SD1, torch.float16), {}),
        ("SDXL", weights(SDXL), {"modelspec.architecture": "stable-diffusion-xl-v1-base"}),
        ("a kohya LoRA", weights({"lora_unet_x.lora_up.weight": (4, 2)}), kohya),
    ):
        path = folder / f"{name}.safetensors"
        contiguous = {key: each.contiguous() for key, each in tensors.items()}
        safetensors.torch.save_file(contiguous, path, metadata or None)
        yield Benign(f"safetensors, {name}", path, contiguous)


def _save(
    folder: Path, name: str, saved: object, tensors: Mapping[str, Tensor], mentioned: tuple[str, ...] = (),
    *, legacy: bool = False, protocol: int = 2,
) -> Benign:  # fmt: skip
    kind = "legacy" if legacy else "zip"
    path = folder / f"{kind}, {name}.ckpt".replace(" ", "-").replace("'", "")
    torch.save(saved, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    return Benign(f"{kind}, {name}", path, dict(tensors), mentioned)


def flattened(top: Any) -> dict[str, Tensor]:
    """The tensors of what `torch.load` gives, by dotted names: another way to the same names."""
    found: dict[str, Tensor] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, Tensor):
            found[prefix] = value.detach()
        elif isinstance(value, (dict, nn.ParameterDict)):
            for key, each in value.items():
                if isinstance(key, str):
                    walk(f"{prefix}.{key}" if prefix else key, each)

    walk("", top["state_dict"] if isinstance(top.get("state_dict"), dict) else top)
    return found
