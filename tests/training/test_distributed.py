"""Two processes that train as one do what one does; states go from any number of processes to any other."""

from __future__ import annotations

import copy
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn

from sfumato.checkpoints.files import read_tensors
from sfumato.errors import InputError, ResourceError
from sfumato.nn.clip import CLIPTextConfig, CLIPTextEncoder
from sfumato.training import distributed as module
from sfumato.training import sharding
from sfumato.training.distributed import ALONE, Processes, check_batch, joined
from sfumato.training.settings_loop import OptimizerConfig
from sfumato.training.sharding import rows
from sfumato.training.state import INDEX, latest_state

SOURCE = Path(__file__).parents[2] / "src"
RECIPE = """
task = "diffusion"
out = "replaced"
seed = 3
device = "cpu"
[data]
path = "{pictures}"
size = 8
workers = 0
[optimizer]
learning_rate = 2e-3
warmup_images = 8
decay = "constant"
eps = 1.0
[loop]
images = 32
batch = 8
ema_images = [16, 4]
log_images = 8
save_images = 16
preview_images = 16
precision = "float32"
[unet]
in_channels = 3
out_channels = 3
model_channels = 8
num_res_blocks = 1
channel_mult = [1, 2]
attention_resolutions = [2]
num_heads = 2
use_spatial_transformer = true
num_groups = 4
"""  # eps: else Adam makes whole steps of gradients that are rounding errors


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


@pytest.fixture(scope="module")
def two(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes did all that `one_of_two` does."""
    root = tmp_path_factory.mktemp("two")
    (root / "recipe.toml").write_text(RECIPE.format(pictures=pictures))
    command = [
        sys.executable,
        str(Path(__file__).with_name("one_of_two.py")),
        str(root),
        str(root / "recipe.toml"),
    ]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    started = [
        subprocess.Popen(
            command,
            env={**os.environ, **world, "PYTHONPATH": str(SOURCE), "RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    ends = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(ends)
    return root


def distance(root: Path, one: str, other: str) -> list[float]:
    """Of the first steps' gradients of two runs, for every optimizer, relative to their norm."""
    a, b = (read_tensors(root / f"{name}.safetensors")[0] for name in (one, other))
    assert a.keys() == b.keys() and a
    return [float((a[name] - b[name]).norm() / b[name].norm()) for name in a]


@pytest.mark.parametrize("name", ["pair", "unet"])
def test_gradients_of_two_processes_are_those_of_the_whole_batch(two: Path, name: str) -> None:
    assert max(distance(two, f"{name}-two", f"{name}-one")) < 1e-6


def test_gradients_of_sharded_weights_are_those_of_whole_ones(two: Path) -> None:
    assert max(distance(two, "unet-sharded", "unet-one")) < 1e-6
    assert max(distance(two, "sharded", "one")) < 1e-6


def last_state(run: Path) -> dict[str, Tensor]:
    index = json.loads((sorted((run / "states").iterdir())[-1] / INDEX).read_text())
    state, _ = latest_state(run / "states", index["fingerprint"])
    assert state is not None and state.seen == 32
    return dict(state.tensors)


@pytest.mark.parametrize(
    "ways", [("pair-two", "pair-one"), ("two", "one"), ("sharded", "one"), ("unet-two", "unet-one")]
)
def test_two_processes_end_where_one_does(two: Path, ways: tuple[str, str]) -> None:
    if ways[0] == "unet-two":
        a, b = (read_tensors(next((two / way / "states").glob("*/tensors*")))[0] for way in ways)
        a = {name: a[name] for name in a}
        assert a.keys() < b.keys()
    else:
        a, b = (last_state(two / way) for way in ways)
        assert a.keys() == b.keys() and any(name.startswith("ema-4.") for name in a)
        assert any(name.startswith("optimizer.") and name.endswith("exp_avg_sq") for name in a)
    for name, value in a.items():
        if not name.endswith("mean"):  # a buffer of what the first process saw
            assert torch.allclose(value, b[name], rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("way", ["halved-then-one", "one-then-sharded"])
def test_states_are_read_by_any_number_of_processes(two: Path, way: str) -> None:
    a, b = last_state(two / way), last_state(two / "one")
    assert a.keys() == b.keys()
    for name, value in a.items():
        if not name.endswith("mean"):
            assert torch.allclose(value, b[name], rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize(
    "ways", [("halved", "sharded"), ("half-ddp", "two"), ("asked", "two"), ("retried", "two")]
)
def test_as_many_processes_go_on_bit_by_bit(two: Path, ways: tuple[str, str]) -> None:
    a, b = (last_state(two / way) for way in ways)
    assert a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())
    for file in (
        "model.safetensors",
        "states/000000000032/state.json",
    ):  # which has the digests of the tensors
        files = [(two / way / file).read_bytes() for way in ways]
        assert files[0] == files[1]


def test_each_process_writes_its_rows_and_the_index_tells_of_them(two: Path) -> None:
    folder = two / "sharded" / "states" / "000000000032"
    index = json.loads((folder / INDEX).read_text())
    names = ["tensors-00000-of-00002.safetensors", "tensors-00001-of-00002.safetensors"]
    assert list(index["files"]) == names and "sha256" not in index
    assert index["sharded"]["module.net.blocks.0.0.weight"] == {"shape": [3, 3, 3, 3], "begins": [0, 2]}
    first, second = (read_tensors(folder / name)[0] for name in names)
    weight = "module.net.blocks.0.0.weight"
    assert (first[weight].shape[0], second[weight].shape[0]) == (2, 1)
    assert "module.net.out.weight" in first and "module.net.out.weight" not in second  # one row in all
    assert len({"module.net.scale", "module.net.mean"} & (first.keys() ^ second.keys())) == 2  # one writes it
    replicated = two / "two" / "states" / "000000000032"
    sizes = [(replicated / name).stat().st_size for name in names]
    assert max(sizes) < 1.5 * min(sizes)


def test_only_the_first_process_writes_metrics_and_pictures(two: Path) -> None:
    lines = [json.loads(line) for line in (two / "two" / "metrics.jsonl").read_text().splitlines()]
    one = [json.loads(line) for line in (two / "one" / "metrics.jsonl").read_text().splitlines()]
    assert [line["seen"] for line in lines] == [8, 16, 16, 24, 32, 32]
    assert [line.get("loss") for line in lines] == pytest.approx([line.get("loss") for line in one], abs=2e-6)
    assert (two / "two" / "model-ema-4.safetensors").exists()


def said(two: Path) -> list[dict[str, str]]:
    return [json.loads((two / f"said-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize(
    ("what", "first", "second"),
    [
        ("uneven", "InputError: loop.batch is 7, which 2 processes", "InputError: loop.batch is 7"),
        ("needs whole weights", "InputError: optimizer.name is 'adam8bit'", "InputError: optimizer.name"),
        ("two optimizers", "InputError: loop.parallel = \"fsdp\" shards", "InputError: loop.parallel"),
        ("one fails", "ResourceError: process 1: the disk of the second", "ResourceError: the disk of the"),
        ("one fails first", "ResourceError: process 1: the disk", "ResourceError: the disk"),
        ("first fails", "InputError: cannot read the recipe", "ResourceError: process 0: cannot read the"),
        ("never", "ResourceError: process 1: cannot write", "ResourceError: cannot write"),
        ("not finite", "NumericalError: the loss of another process", "NumericalError: the net loss is nan"),
        ("asked", "SystemExit: 143", "SystemExit: 143"),
        ("write again", "", ""),
    ],
)  # fmt: skip
def test_what_one_process_meets_both_are_told(two: Path, what: str, first: str, second: str) -> None:
    heard = [each[what] for each in said(two)]
    assert heard[0].startswith(first) and heard[1].startswith(second)
    assert bool(heard[0]) == bool(first)


def test_a_stop_of_one_process_saves_within_a_step(two: Path) -> None:
    assert said(two)[0]["states"] == "000000000016 000000000024"
    assert "bytes needed" in said(two)[1]["never"]
    assert not any((two / "gave-up" / "states").glob("*"))


def test_rows_are_dealt_out_as_torch_does() -> None:
    for size in (1, 2, 3, 7, 8, 9):
        for world in (1, 2, 3, 8):
            chunks = torch.arange(size).chunk(world)
            dealt = [rows(size, rank, world) for rank in range(world)]
            assert [end - begin for begin, end in dealt][: len(chunks)] == [len(chunk) for chunk in chunks]
            assert dealt[-1][1] == size and all(begin == end for begin, end in dealt[len(chunks) :])


@pytest.mark.parametrize("index", [-1, -2])
def test_a_sharded_text_encoder_gives_what_is_read_of_it_afterwards(index: int) -> None:
    """The norm of an inner layer is called when the encoder's own call has ended; unused layers stay so."""
    config = CLIPTextConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1,
        max_position_embeddings=4, eos_token_id=19,
    )  # fmt: skip
    torch.manual_seed(0)
    whole = CLIPTextEncoder(config)
    sharded = copy.deepcopy(whole)
    tokens = torch.tensor([[1, 5, 19, 19]])
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        sharding.shard({"text": sharded}, torch.device("cpu"), 1, OptimizerConfig())
        assert all(sharding.is_sharded(parameter) for parameter in sharded.parameters())
        for network in (whole, sharded):
            network.hidden_state(network(tokens), index, normed=True).square().sum().backward()
        for (name, a), b in zip(whole.named_parameters(), sharded.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None), name
            if a.grad is not None and b.grad is not None:
                assert torch.allclose(a.grad, sharding.whole(b.grad), atol=1e-6), name
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize(
    "held", [nn.ModuleDict({"a": nn.Linear(2, 2)}), nn.ParameterDict({"a": torch.ones(2)})]
)
def test_small_weights_beside_a_network_are_not_sharded(held: nn.Module) -> None:
    """As LoRA's changes and a word's vectors are."""
    with pytest.raises(InputError, match="small weights beside a network") as raised:
        sharding.shard({"lora": held}, torch.device("cpu"), 2, OptimizerConfig())
    assert 'loop.parallel = "ddp"' in raised.value.hint


def test_alone_nothing_is_exchanged() -> None:
    parameter = nn.Parameter(torch.ones(2))
    ALONE.average([parameter])
    ALONE.copy_first([parameter])
    assert parameter.grad is None and ALONE.gathered({"a": (1,)}) == [{"a": (1,)}]
    assert ALONE.largest([1, 0]) == [1, 0] and ALONE.first_does(lambda: 3) == 3 == ALONE.in_turn(lambda: 3)
    assert not sharding.is_sharded(parameter) and sharding.whole(parameter) is parameter


def test_devices_and_batches_that_processes_cannot_share(monkeypatch: pytest.MonkeyPatch) -> None:
    with joined("cpu") as (processes, device):
        assert processes == Processes(0, 1) and device.type == "cpu"
    check_batch(8, 4)
    with pytest.raises(InputError, match=r"loop\.batch is 6, which 4 processes cannot share evenly"):
        check_batch(6, 4)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"device is 'cpu:0', and 2 processes train together"):
        joined("cpu:0").__enter__()


def test_losing_the_others_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(module, "_own_store", lambda *_: None)
    monkeypatch.setattr(module, "rendezvous", lambda *_, **__: iter([(None, 1, 2)]))
    with pytest.raises(ResourceError, match=r"process 1 lost the others: .*closed by peer"), joined("cpu"):
        raise RuntimeError("[gloo/pair.cc:553] Connection closed by peer [127.0.0.1]:4495.\nmore")
    with pytest.raises(RuntimeError, match="a bug"), joined("cpu"):
        raise RuntimeError("a bug")


@pytest.mark.slow
def test_torchrun_starts_again_where_a_killed_process_left(pictures: Path, tmp_path: Path) -> None:
    """Elastic restart: one of two is killed, torchrun starts both again, and the end is no other."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(pictures=pictures).replace("images = 32", "images = 96"))

    def start(out: str) -> subprocess.Popen[str]:
        words = ["--standalone", "--nproc_per_node", "2", "--max-restarts", "1"]
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            *words,
            "-m",
            "sfumato.cli",
            "train",
            str(recipe),
        ]
        return subprocess.Popen(
            [*command, f"--out={tmp_path / out}"],
            env={**os.environ, "PYTHONPATH": str(SOURCE)}, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    undisturbed = start("whole")
    assert undisturbed.communicate()[1] and undisturbed.returncode == 0
    started = start("killed")
    lock, state = tmp_path / "killed" / "lock", tmp_path / "killed" / "states" / "000000000016"
    while not state.exists():
        assert started.poll() is None
        time.sleep(0.005)
    os.kill(int(lock.read_text()), signal.SIGKILL)  # the first process
    told = started.communicate()[1]
    assert started.returncode == 0, told
    whole, killed = (tmp_path / out / "model.safetensors" for out in ("whole", "killed"))
    assert whole.read_bytes() == killed.read_bytes()
