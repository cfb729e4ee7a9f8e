"""Schedulers by name: diffusers' class names, and the short names that people type.

Only samplers that draw their noise row by row from `generator` are here, because a row's picture must not depend on
its neighbours; that leaves out DPMSolverSDEScheduler (one Brownian tree per batch).
"""

from __future__ import annotations

import difflib
import functools
from typing import Any

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("DDPMScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "lms": ("LMSDiscreteScheduler", {}),
    "lms_karras": ("LMSDiscreteScheduler", {"use_karras_sigmas": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpm++_2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm++_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++_2m_sde_karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    "dpm++_2s": ("DPMSolverSinglestepScheduler", {}),
    "dpm++_2s_karras": ("DPMSolverSinglestepScheduler", {"use_karras_sigmas": True}),
    "deis": ("DEISMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
    "sasolver": ("SASolverScheduler", {}),
    "flow_euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "flow_heun": ("FlowMatchHeunDiscreteScheduler", {}),
}
"""Short name → (diffusers class, settings on top of the model's own)."""


PLAIN = frozenset(
    {
        "DDIMScheduler",
        "DDPMScheduler",
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "PNDMScheduler",
        "SASolverScheduler",
        "UniPCMultistepScheduler",
    }
)


def _plain(name: str) -> str:
    return name.lower().replace(" ", "_").replace("-", "_").replace("euler_ancestral", "euler_a")


def scheduler_name(name: str) -> str:
    """The short name that `name` means ("Euler a", "DPM++ 2M Karras", "DDIMScheduler").

    Raises:
        ValueError: unknown; the message names the nearest ones.
    """
    plain = _plain(name)
    if plain in SCHEDULERS:
        return plain
    # One name for one sampler, or rows that say DDIMScheduler and ddim could not share a batch.
    classes = {cls: short for short, (cls, _) in reversed(SCHEDULERS.items())}
    if name in classes:
        return classes[name]
    near = difflib.get_close_matches(plain, SCHEDULERS, n=3) or difflib.get_close_matches(name, classes, n=2)
    hint = f"did you mean {' or '.join(near)}?" if near else f"one of {', '.join(SCHEDULERS)}"
    raise ValueError(f"unknown scheduler {name!r}; {hint}")


def is_flow(name: str) -> bool:
    """Whether the scheduler is for flow-matching models (SD3, FLUX, …) and no others."""
    return SCHEDULERS.get(name, (name, {}))[0].startswith("FlowMatch")


def is_plain(name: str) -> bool:
    """Whether the sampler takes latents as they are (`scale_model_input` does nothing)."""
    return SCHEDULERS.get(name, (name, {}))[0] in PLAIN


def make_scheduler(name: str, model_config: dict[str, Any]) -> Any:
    """A fresh scheduler with the model's own noise schedule; it keeps state, so each batch gets its own."""
    import diffusers

    cls, settings = SCHEDULERS.get(name, (name, {}))
    return getattr(diffusers, cls).from_config(model_config, **settings)


def stay_on_host(scheduler: Any) -> None:
    """Keep its timesteps in host memory, wherever a pipeline would have them.

    Schedulers look numbers up by them, and each number that lies on a device is a wait for all that it has to do.
    """
    on_device = scheduler.set_timesteps

    # Pipelines look which parameters it takes.
    @functools.wraps(on_device)
    def set_timesteps(*args: Any, device: Any = None, **kwargs: Any) -> None:
        on_device(*args, device="cpu", **kwargs)

    scheduler.set_timesteps = set_timesteps
