"""Work that a denoiser can leave out of some of its steps, and the waits that it can leave out of all.

What is left out depends on a step's number alone, so that a row does not notice its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ldm_ops.accelerate import Accelerate, denoiser
from ldm_ops.tiles import Sample


@dataclass
class Steps:
    """Where a denoiser stands in its batch.

    `number` counts its calls from 0; `is_fresh`: whether it runs whole at this one; `kept`: what its inner modules gave
    when it last did.
    """

    pipe: Any
    batch_size: int = 0
    number: int = -1
    age: int = 0
    is_fresh: bool = True
    rows_kept: int = 0
    kept: dict[int, Any] = field(default_factory=dict)

    def begin(self, batch_size: int) -> None:
        """Before a batch; `batch_size` without guidance's other half."""
        self.batch_size, self.number, self.age, self.rows_kept = batch_size, -1, 0, 0
        self.kept.clear()

    def next(self) -> None:
        self.number += 1

    def is_within(self, interval: tuple[float, float]) -> bool:
        """Whether this step lies in a half-open interval of shares of the steps, as diffusers' guiders count them."""
        # Only some pipelines say how many steps of the scheduler's they do; the others do all.
        total = getattr(self.pipe, "_num_timesteps", None) or len(self.pipe.scheduler.timesteps)
        return int(interval[0] * total) <= self.number < int(interval[1] * total)

    def look(self, rows: int, every: int) -> None:
        """Decide whether a call of `rows` rows runs whole, where one in `every` does."""
        self.age += 1
        self.is_fresh = rows != self.rows_kept or self.age >= every
        if self.is_fresh:
            self.age, self.rows_kept = 0, rows


def skip(pipe: Any, accelerate: Accelerate, device: str) -> Steps:
    """Let the pipeline's denoiser do as `accelerate` says; returns what has to be told of each batch.

    Guidance interval: Kynkäänniemi et al. 2024, arXiv:2404.07724. Outside it, the half of the batch without the prompt
    is not computed, and its place is taken by the other half, so that guidance of any scale changes nothing.

    Raises:
        ValueError: `deep_cache` without a U-Net that it knows.
    """
    steps = Steps(pipe)
    interval, every = accelerate.guidance_interval, accelerate.deep_cache
    model = denoiser(pipe)
    if every is not None:
        for i, part in enumerate(deep_parts(model)):
            _keep(part, i, steps)
    if interval is None and every is None and device == "cpu":
        return steps
    whole = model.forward

    def forward(*args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        import torch

        steps.next()
        rows = len(args[0] if args else kwargs["sample" if "sample" in kwargs else "hidden_states"])
        alone = interval is not None and rows == 2 * steps.batch_size and not steps.is_within(interval)
        if alone:
            args, kwargs = _second_half((args, kwargs), rows)
        if every is not None:
            steps.look(rows // 2 if alone else rows, every)
        args, kwargs = _upload((args, kwargs), device)
        made = whole(*args, return_dict=False, **kwargs)[0]
        if alone:
            made = torch.cat([made, made])
        return Sample(made) if return_dict else (made,)

    model.forward = forward
    return steps


def deep_parts(unet: Any) -> Iterator[Any]:
    """The modules of a U-Net that DeepCache (Ma et al. 2023, arXiv:2312.00858) leaves out, with its branch 0.

    What stays is the first layer down, and all but the first of the last layers up, whose skip connections it feeds.

    Raises:
        ValueError: no UNet2DConditionModel.
    """
    from diffusers import UNet2DConditionModel

    if not isinstance(unet, UNet2DConditionModel):
        raise ValueError(f"accelerate.deep_cache: {type(unet).__name__} is no UNet2DConditionModel; leave it out")
    first, last = unet.down_blocks[0], unet.up_blocks[-1]
    for name in ("resnets", "attentions"):
        yield from (getattr(first, name, None) or [])[1:]
        yield from (getattr(last, name, None) or [])[:1]
    yield from first.downsamplers or []
    yield from unet.down_blocks[1:]
    yield unet.mid_block
    yield from unet.up_blocks[:-1]


def _keep(module: Any, name: int, steps: Steps) -> None:
    whole = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if steps.is_fresh:
            steps.kept[name] = whole(*args, **kwargs)
        return steps.kept[name]

    module.forward = forward


def _second_half(value: Any, rows: int) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return value[rows // 2 :] if value.ndim and len(value) == rows else value
    if isinstance(value, dict):
        return {name: _second_half(one, rows) for name, one in value.items()}
    return type(value)(_second_half(one, rows) for one in value) if isinstance(value, (tuple, list)) else value


def _upload(value: Any, device: str) -> Any:
    """Timesteps, which schedulers keep in host memory, without a wait for what the device still has to do."""
    import torch

    if isinstance(value, torch.Tensor):
        if value.device.type != "cpu" or device == "cpu":
            return value
        return (value.pin_memory() if device.startswith("cuda") else value).to(device, non_blocking=True)
    if isinstance(value, dict):
        return {name: _upload(one, device) for name, one in value.items()}
    return type(value)(_upload(one, device) for one in value) if isinstance(value, (tuple, list)) else value
