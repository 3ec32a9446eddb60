"""Random weights in the exact shape of the released models, from a seed, in every layout they come in.

Writes into --work: FAMILY.safetensors and FAMILY-fp16.safetensors (LDM layout, streamed tensor by tensor),
FAMILY.ckpt (torch.save, with what Lightning leaves in such files) and FAMILY/ (diffusers' folder, which
diffusers' own single-file conversion makes from the safetensors file, so that our names are checked by it).

Run: python benchmarks/weights.py --work /tmp/released --families sd1 --formats safetensors ckpt folder
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import subprocess
import sys
import types
import zlib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from releases import FAMILIES, Family, folder_configs, shapes, tiny

FORMATS = ("safetensors", "fp16", "ckpt", "legacy", "folder")
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.int64: "I64"}
SPECIAL = ("<|startoftext|>", "<|endoftext|>")
WORD_END = "</w>"


def value(name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """A tensor drawn by its name alone: activations stay near unit size, no layer is zero as at a start."""
    if name.endswith("position_ids"):
        return torch.arange(shape[-1]).expand(shape).contiguous()
    if name.endswith("logit_scale"):
        return torch.tensor(math.log(100.0)).to(dtype)  # what CLIP's ends at
    generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
    drawn = torch.randn(shape, generator=generator)
    if "embedding" in name:
        drawn *= 0.02 if "token" in name else 0.01  # CLIP's own start
    elif len(shape) == 1:
        norm = name.endswith("weight")
        drawn = drawn.mul_(0.1 if norm else 0.02).add_(1.0 if norm else 0.0)
    else:
        drawn *= math.prod(shape[1:]) ** -0.5
    return drawn.to(dtype)


def tensors(family: Family, seed: int, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """The file's tensors one by one; `dtype` None is the release's."""
    for name, shape, own in shapes(family):
        wanted = own if dtype is None or not own.is_floating_point else dtype
        yield name, value(name, shape, wanted, seed)


def write_safetensors(path: Path, family: Family, seed: int, dtype: torch.dtype | None = None) -> None:
    """Header first, then each tensor as it is drawn: memory stays small whatever the model."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape, own in shapes(family):
        wanted = own if dtype is None or not own.is_floating_point else dtype
        size = math.prod(shape) * wanted.itemsize
        offsets = [offset, offset + size]
        header[name] = {"dtype": DTYPES[wanted], "shape": list(shape), "data_offsets": offsets}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in tensors(family, seed, dtype):
            file.write(tensor.numpy().tobytes())


def write_ckpt(path: Path, family: Family, seed: int, *, legacy: bool = False) -> None:
    """A Lightning checkpoint as CompVis' trainer left them: extras of foreign classes beside `state_dict`."""
    callback, attributes = lightning_classes()
    kept = callback()
    kept.best_model_score = torch.tensor(0.1)
    kept.dirpath = "logs/checkpoints"
    state = dict(tensors(family, seed))
    state |= {
        "betas": torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2,
        "model_ema.decay": torch.tensor(1.0),
    }
    state["alphas_cumprod"] = torch.cumprod(1 - state["betas"], 0)
    content = {
        "epoch": 3,
        "global_step": 840000,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": state,
        "callbacks": {callback: {"monitor": "val/loss", "best_model_score": torch.tensor(0.1), "self": kept}},
        "optimizer_states": [],
        "lr_schedulers": [{"base_lrs": [1e-4], "last_epoch": 840000}],
        "hyper_parameters": attributes(learning_rate=1e-4),
    }
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)


def lightning_classes() -> tuple[type[Any], type[Any]]:
    """Two classes under Lightning's names; readers of the file will not find the modules they name."""
    callback = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})
    attributes = type("AttributeDict", (dict,), {"__module__": "pytorch_lightning.utilities.parsing"})
    for kind in (callback, attributes):
        stub = types.ModuleType(kind.__module__)
        setattr(stub, kind.__name__, kind)
        parents = kind.__module__.split(".")[:-1]
        for depth in range(len(parents)):
            name = ".".join(parents[: depth + 1])
            sys.modules.setdefault(name, types.ModuleType(name))
        sys.modules[kind.__module__] = stub
    return callback, attributes


def write_tokenizer(folder: Path, pad: str) -> None:
    """CLIP's tokenizer in Hugging Face's files; the merges are OpenAI's, packed with the package."""
    packed = resources.files("sfumato").joinpath("assets", "clip_merges.txt.gz").read_bytes()
    merges = gzip.decompress(packed).decode().splitlines()
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(code) for code in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    words = letters + [letter + WORD_END for letter in letters]
    words += ["".join(merge.split(" ")) for merge in merges] + list(SPECIAL)
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: index for index, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    names = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "unk_token": SPECIAL[1], "pad_token": pad}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(names), encoding="utf-8")


def write_configs(folder: Path, family: Family) -> None:
    """Everything of a diffusers folder but the weights."""
    for path, config in folder_configs(family).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name, tower in zip(("tokenizer", "tokenizer_2"), family.towers.values(), strict=False):
        write_tokenizer(folder / name, tower.pad)


def write_folder(folder: Path, family: Family, single_file: Path) -> None:
    """Let diffusers convert the single file and save each component, in a process of its own each."""
    write_configs(folder, family)
    parts = ["unet", "vae", "text_encoder", *(["text_encoder_2"] if family.xl else [])]
    for part in parts:
        command = [
            sys.executable,
            __file__,
            "--convert",
            part,
            "--work",
            str(folder),
            "--file",
            str(single_file),
        ]
        subprocess.run(command, check=True)  # noqa: S603 - this file, our own arguments


def convert(part: str, folder: Path, single_file: Path) -> None:
    """One component of the single file, read and saved by diffusers and transformers alone."""
    import transformers
    from diffusers.loaders import single_file_utils
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    tensors: Any = single_file_utils.load_single_file_checkpoint(str(single_file))
    dtype = tensors["model.diffusion_model.out.2.bias"].dtype
    kinds: dict[str, Any] = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
    if part in kinds:
        model = kinds[part].from_single_file(
            str(single_file), config=str(folder), subfolder=part, torch_dtype=dtype, local_files_only=True
        )
    else:
        kind = "CLIPTextModelWithProjection" if part.endswith("2") else "CLIPTextModel"
        model = single_file_utils.create_diffusers_clip_model_from_ldm(
            getattr(transformers, kind),
            tensors,
            subfolder=part,
            config=str(folder),
            torch_dtype=dtype,
            local_files_only=True,
        )
    model.save_pretrained(folder / part)


def write(work: Path, family: Family, formats: list[str], seed: int) -> None:
    """The family in the formats asked for; what is there already stays."""
    work.mkdir(parents=True, exist_ok=True)
    single = work / f"{family.name}.safetensors"
    writers = {
        "safetensors": (single, lambda path: write_safetensors(path, family, seed)),
        "fp16": (
            work / f"{family.name}-fp16.safetensors",
            lambda path: write_safetensors(path, family, seed, torch.float16),
        ),
        "ckpt": (work / f"{family.name}.ckpt", lambda path: write_ckpt(path, family, seed)),
        "legacy": (
            work / f"{family.name}-legacy.ckpt",
            lambda path: write_ckpt(path, family, seed, legacy=True),
        ),
        "folder": (work / family.name, lambda path: write_folder(path, family, single)),
    }
    for name in formats:
        path, writer = writers[name]
        if not path.exists():
            writer(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=["sd1"])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["safetensors", "ckpt", "folder"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--convert", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.convert:
        convert(options.convert, options.work, options.file)
        return
    for name in options.families:
        family = tiny(FAMILIES[name]) if options.tiny else FAMILIES[name]
        write(options.work, family, options.formats, options.seed)


if __name__ == "__main__":
    main()
