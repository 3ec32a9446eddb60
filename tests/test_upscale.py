"""Pictures made larger: any size and kind, tiles as the whole, alpha and grey kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sfumato.checkpoints.upscaler import Upscaler, load_upscaler, save_upscaler
from sfumato.errors import CheckpointError, InputError, NumericalError
from sfumato.nn.esrgan import CompactConfig, CompactNet, RRDBConfig, RRDBNet
from sfumato.upscale import EMBEDDED, ILLUSTRATIONS, LANCZOS, enlarge, find_upscaler, upscaled


def compact(scale: int = 2, channels: int = 3) -> Upscaler:
    torch.manual_seed(0)
    network = CompactNet(CompactConfig(channels, num_features=8, num_convs=2, scale=scale)).eval()
    with torch.no_grad():
        network.state_dict()["body.6.weight"].mul_(0.1)  # near the nearest pixels, as a trained one is
    return Upscaler(network, "compact", "compact", scale, 1, channels)


def unshuffled() -> Upscaler:
    torch.manual_seed(0)
    network = RRDBNet(RRDBConfig(num_features=4, num_blocks=1, num_growth=2, unshuffle=2)).eval()
    return Upscaler(network, "x2", "RRDB", 2, 2, 3)


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 4), dtype=np.uint8)
    image = Image.fromarray(values)
    return (image.convert("RGB") if mode == "P" else image).convert(mode)


@torch.no_grad()
@pytest.mark.parametrize("size", [(50, 41), (16, 16), (7, 90)])
def test_tiles_with_enough_context_are_the_whole(size: tuple[int, int]) -> None:
    upscaler, x = compact(), torch.rand(1, 3, *size)
    whole = upscaler.network(x)
    assert torch.allclose(upscaled(x, upscaler, tile=16, overlap=8), whole, atol=1e-5)
    assert torch.equal(upscaled(x, upscaler, tile=0), whole)


@torch.no_grad()
def test_sides_that_the_network_cannot_take_are_padded() -> None:
    upscaler, x = unshuffled(), torch.rand(1, 3, 21, 1)
    made = upscaled(x, upscaler, tile=8, overlap=4)
    assert made.shape == (1, 3, 42, 2)
    # The pad is a repeated pixel, at right and bottom alone.
    repeated = torch.nn.functional.pad(x, (0, 1, 0, 1), mode="replicate")
    assert torch.allclose(upscaled(x, upscaler, tile=0), upscaler.network(repeated)[..., :42, :2], atol=1e-6)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "1", "CMYK"])
@pytest.mark.parametrize("size", [(1, 1), (13, 30)])
def test_every_kind_of_picture(mode: str, size: tuple[int, int]) -> None:
    for upscaler in (compact(), compact(channels=1), unshuffled(), None):
        larger = enlarge(picture(*size, mode), upscaler, 2.0, tile=12, overlap=4)
        assert larger.size == (2 * size[0], 2 * size[1])
        assert larger.mode == {"1": "L", "P": "RGB", "CMYK": "RGB"}.get(mode, mode)


def test_scales_between_and_beyond_the_networks() -> None:
    image = picture(10, 6)
    for scale, size in ((None, (20, 12)), (1.5, (15, 9)), (3, (30, 18)), (4, (40, 24)), (0.1, (1, 1))):
        assert enlarge(image, compact(), scale).size == size
    assert enlarge(image, compact(1), 2).size == (20, 12)
    assert enlarge(image, None).size == (40, 24)


@pytest.mark.parametrize("to", [(37, 19), (10, 6), (11, 60), (3, 2)])
def test_a_size_is_filled_whatever_its_shape(to: tuple[int, int]) -> None:
    for upscaler in (compact(), None):
        assert enlarge(picture(10, 6), upscaler, to).size == to


def test_what_a_network_made_too_large_is_averaged() -> None:
    image, upscaler = picture(12, 8), compact(scale=4)
    large = enlarge(image, upscaler)
    apart = np.asarray(enlarge(image, upscaler, 2), np.int64) - np.asarray(large.reduce(2), np.int64)
    assert abs(apart).max() <= 1  # which round otherwise
    assert enlarge(image, upscaler, 1).tobytes() == image.tobytes()  # nothing to enlarge


def test_a_flat_picture_stays_near_what_it_was() -> None:
    network = CompactNet(CompactConfig(num_features=4, num_convs=1, scale=2)).eval()
    nn.init.zeros_(network.state_dict()["body.4.weight"])
    nn.init.zeros_(network.state_dict()["body.4.bias"])
    upscaler = Upscaler(network, "nearest", "compact", 2, 1, 3)
    image = picture(30, 20)
    assert enlarge(image, upscaler, tile=8, overlap=4).tobytes() == image.resize((60, 40), 0).tobytes()


def test_colours_under_transparency_do_not_bleed() -> None:
    """A red disc on black that nobody sees: its edge stays red, and alpha is resampled."""
    values = np.zeros((32, 32, 4), dtype=np.uint8)
    rows, columns = np.mgrid[:32, :32]
    values[(rows - 16) ** 2 + (columns - 16) ** 2 < 100] = (255, 0, 0, 255)
    larger = np.array(enlarge(Image.fromarray(values), None, 4))
    seen = larger[larger[..., 3] > 8]
    assert seen[:, 0].min() >= 250 and seen[:, 1:3].max() <= 5
    assert larger[0, 0, 3] == 0 and larger[64, 64, 3] == 255
    opaque = Image.fromarray(np.where(values[..., 3:] == 0, 255, values)).convert("RGBA")
    assert enlarge(opaque, None, 2).mode in ("RGB", "RGBA")


def test_progress_counts_rows_to_the_end() -> None:
    seen: list[tuple[int, int]] = []
    enlarge(picture(20, 50), compact(), tile=16, overlap=4, show=lambda done, of: seen.append((done, of)))
    assert len(seen) == 3 and seen[-1] == (100, 100) and seen == sorted(seen)


def test_what_cannot_be_enlarged_is_refused() -> None:
    for scale in (0.0, -1.0, 65.0, float("nan"), float("inf"), (0, 0), (8, 4000)):
        with pytest.raises(InputError, match="the scale is"):
            enlarge(picture(4, 4), None, scale)
    with pytest.raises(InputError, match="at most"):
        enlarge(Image.new("L", (3000, 3000)), None, 8)
    with pytest.raises(InputError, match="4 channels"):
        enlarge(picture(4, 4), compact(channels=4))
    broken = compact()
    with torch.no_grad():
        broken.network.state_dict()["body.6.bias"].fill_(float("inf"))
    with pytest.raises(NumericalError, match="left the finite"):
        enlarge(picture(4, 4), broken)


def test_upscalers_by_name_and_file(tmp_path: Path) -> None:
    image, path = picture(9, 7), tmp_path / "small.safetensors"
    network = compact()
    assert isinstance(network.network, CompactNet)
    save_upscaler(path, network.network, "small", "by nobody")
    assert find_upscaler(LANCZOS) is None
    found = find_upscaler(path)
    assert found is not None and (found.name, found.notices, found.scale) == ("small", "by nobody", 2)
    assert find_upscaler(str(path)) is found  # loaded once
    assert enlarge(image, path).tobytes() == enlarge(image, found).tobytes()
    assert enlarge(image, LANCZOS, 2).tobytes() == image.resize((18, 14), Image.Resampling.LANCZOS).tobytes()
    save_upscaler(path, compact(scale=3).network, "larger")
    assert enlarge(image, path).size == (27, 21)  # the file is another now


def test_names_of_nothing_are_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no upscaler 'illustration'") as caught:
        enlarge(picture(4, 4), "illustration")
    assert ILLUSTRATIONS in str(caught.value.hint)
    with pytest.raises(CheckpointError, match="cannot open"):
        find_upscaler(tmp_path / "absent.pth")
    with pytest.raises(CheckpointError):
        find_upscaler(tmp_path)


def test_weights_that_half_precision_cannot_hold_are_not_written(tmp_path: Path) -> None:
    network = compact().network
    with torch.no_grad():
        network.state_dict()["body.0.weight"].fill_(1e6)
    with pytest.raises(NumericalError, match=r"body\.0\.weight"):
        save_upscaler(tmp_path / "a.safetensors", network, "a")
    assert not (tmp_path / "a.safetensors").exists()


def drawing(side: int) -> Image.Image:
    """Discs and a bar on a plain ground, as smooth at every size as a drawing is that was rendered at it."""
    fine = side * 4
    rows, columns = (np.mgrid[:fine, :fine] + 0.5) / fine
    values = np.full((fine, fine, 3), (80.0, 150.0, 230.0))
    for x, y, radius, colour in ((0.4, 0.5, 0.27, (240, 90, 60)), (0.42, 0.46, 0.12, (255, 220, 90))):
        values[(columns - x) ** 2 + (rows - y) ** 2 < radius**2] = colour
    values[(abs(rows - columns * 0.7 - 0.2) < 0.03) & (columns > 0.6)] = (30, 30, 40)
    mean = values.reshape(side, 4, side, 4, 3).mean(axis=(1, 3))
    return Image.fromarray(mean.round().astype(np.uint8))


def square_error(given: Image.Image, wanted: Image.Image) -> float:
    return float(np.square(np.asarray(given, np.float64) - np.asarray(wanted, np.float64)).mean())


def test_our_network_draws_outlines_anew() -> None:
    small, large = drawing(64), drawing(256)
    ours, lanczos = enlarge(small), enlarge(small, LANCZOS)
    assert ours.size == large.size
    assert square_error(ours, large) < 0.75 * square_error(lanczos, large)
    # No rims: what lies beside an outline keeps its colour, where a sharp filter swings.
    low, high = np.asarray(large).min(axis=(0, 1)), np.asarray(large).max(axis=(0, 1))
    beyond = [
        np.maximum(low - np.asarray(image, np.int64), np.asarray(image, np.int64) - high).clip(0).max()
        for image in (ours, lanczos)
    ]
    assert beyond[0] < beyond[1]


def test_our_network_leaves_plain_grounds_alone() -> None:
    for colour in ((255, 255, 255), (0, 0, 0), (80, 150, 230)):
        apart = abs(np.asarray(enlarge(Image.new("RGB", (32, 32), colour)), np.int64) - colour)
        assert apart[16:-16, 16:-16].max() <= 2 and apart.max() <= 8  # at the picture's own edge it sees less


def test_our_network_sharpens_the_edge_of_transparency() -> None:
    cut = Image.new("RGBA", (48, 48), (200, 60, 60, 0))
    alpha = np.asarray(drawing(48).convert("L"))
    mask = Image.fromarray(np.where(alpha > 140, 255, 0).astype(np.uint8))
    cut.putalpha(mask)
    between = [
        int(((values > 16) & (values < 239)).sum())
        for values in (np.asarray(enlarge(cut, name).getchannel("A")) for name in (ILLUSTRATIONS, LANCZOS))
    ]
    assert between[0] < between[1]


def test_our_network_says_whose_work_is_in_it() -> None:
    ours = load_upscaler(EMBEDDED)
    assert (ours.name, ours.scale, ours.channels) == ("illustrations", 4, 3)
    assert all(word in ours.notices for word in ("Noto", "Twemoji", "Fluent"))
    assert EMBEDDED.stat().st_size < 1_500_000
