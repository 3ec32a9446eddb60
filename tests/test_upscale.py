"""Pictures made larger: any size and kind, tiles as the whole, alpha and grey kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sfumato.checkpoints.upscaler import Upscaler
from sfumato.errors import InputError, NumericalError
from sfumato.nn.esrgan import CompactConfig, CompactNet, RRDBConfig, RRDBNet
from sfumato.upscale import enlarge, upscaled


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
    for scale in (0.0, -1.0, 65.0, float("nan")):
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
