"""Our side of a comparison: one task in a fresh process, through the package's own interface."""

from __future__ import annotations

from typing import Any

from compare_side import GUIDANCE, PROMPTS, STEPS, Stopwatch, Task, latents, noise, run


def unet(task: Task, watch: Stopwatch) -> Any:
    """A guidance batch of two through the U-Net."""
    import torch

    import sfumato

    network = watch.load(lambda: sfumato.load(task.source, device="cpu").unet)
    x, context = latents(task, 2), noise((2, 77, task.context_dim), seed=2)
    return watch.repeat(lambda: network(x, torch.tensor([500, 500]), context))


def decode(task: Task, watch: Stopwatch) -> Any:
    """Latents to a picture."""
    import sfumato

    autoencoder = watch.load(lambda: sfumato.load(task.source, device="cpu").autoencoder)
    return watch.repeat(lambda: autoencoder.decode(latents(task, 1)))


def encode(task: Task, watch: Stopwatch) -> Any:
    """A picture to the mean of its latents."""
    import sfumato

    autoencoder = watch.load(lambda: sfumato.load(task.source, device="cpu").autoencoder)
    picture = noise((1, 3, task.pixels, task.pixels), seed=3).clamp(-1, 1)
    return watch.repeat(lambda: autoencoder.encode(picture).mode())


def text(task: Task, watch: Stopwatch) -> Any:
    """A prompt and the empty one, from strings to features."""
    import sfumato

    model = sfumato.load(task.source, device="cpu")
    watch.load(lambda: model.text_encoder)
    return watch.repeat(lambda: model.encode_prompt(PROMPTS).context)


def load(task: Task, watch: Stopwatch) -> Any:
    """Every part of the model; then the U-Net's answer on 8x8 latents, to see that it is the same one."""
    _import()
    network = watch.load(lambda: watch.once(lambda: _whole(task).unet))
    return _answer(network, task)


def opened(task: Task, watch: Stopwatch) -> Any:
    """What `sfumato.load` itself takes, before a part is used; then the same answer as `load`."""
    import sfumato

    _import()
    model = watch.load(lambda: watch.once(lambda: sfumato.load(task.source, device="cpu")))
    return _answer(model.unet, task)


def cold(task: Task, watch: Stopwatch) -> Any:
    """From nothing to the first latent: imports, loading, text, one step of guidance."""
    import sfumato

    model = sfumato.load(task.source, device="cpu")

    def step() -> Any:
        *_, last = sfumato.stream(model, _request(task, steps=1))
        return last.x / (1 + last.target**2) ** 0.5

    return watch.since_spawned(step)


def picture(task: Task, watch: Stopwatch) -> Any:
    """From a prompt to a picture in eight steps, the model being there."""
    import sfumato

    model = watch.load(lambda: _whole(task))
    samples = watch.once(lambda: sfumato.generate(model, _request(task, STEPS))).samples
    return (samples / 2 + 0.5).clamp(0, 1)


def _import() -> None:
    """What loading needs is imported before its clock starts."""
    import sfumato

    sfumato.load()  # the embedded model, which is small


def _whole(task: Task) -> Any:
    import sfumato

    model = sfumato.load(task.source, device="cpu")
    assert model.unet and model.autoencoder and model.text_encoder
    return model


def _answer(network: Any, task: Task) -> Any:
    import torch

    return network(noise((1, 4, 8, 8), 1), torch.tensor([500]), noise((1, 77, task.context_dim), 2))


def _request(task: Task, steps: int) -> Any:
    from sfumato import Request

    return Request(
        prompt=PROMPTS[0],
        steps=steps,
        sampler="ddim",
        guidance=GUIDANCE,
        seed=0,
        width=task.pixels,
        height=task.pixels,
        start_noise=latents(task, 1),
    )


if __name__ == "__main__":
    run({case.__name__: case for case in (unet, decode, encode, text, load, opened, cold, picture)})
