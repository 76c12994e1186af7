"""The scheduler_config.json of diffusers: how a network was trained to be asked, both ways."""

from collections.abc import Mapping
from typing import Any

from dd_core.denoiser import SIGMA_DATA
from dd_core.layouts.moves import LayoutError
from dd_core.layouts.published import Process

SCHEDULES = {"linear": "linear", "sqrt_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def config_of(process: Process) -> dict[str, Any]:
    """The scheduler_config.json of a process.

    Raises:
        LayoutError: It has no betas.
    """
    if process.schedule == "karras":
        raise LayoutError(
            "a schedule of sigmas has no betas; diffusers keeps those of consistency models in code"
        )
    if process.rescaled_time:
        raise LayoutError("this network is told t * 1000 / T, and diffusers tells t; it cannot be exported")
    share = share_of(process.schedule, process.timesteps)
    return {
        "_class_name": "DDPMScheduler",
        "beta_schedule": SCHEDULES[process.schedule],
        "beta_start": share * process.beta_range[0],
        "beta_end": share * process.beta_range[1],
        "num_train_timesteps": process.timesteps,
        "prediction_type": PREDICTIONS[process.predicts],
        "variance_type": "learned_range" if process.learned_variance else "fixed_small",
        "clip_sample": process.learned_variance,
        "timestep_spacing": "linspace",
    }


def jumps_of(sigma_min: float, sigma_max: float) -> dict[str, Any]:
    """The scheduler_config.json of a consistency model that is the identity at its lowest level."""
    return {
        "_class_name": "CMStochasticIterativeScheduler",
        "num_train_timesteps": 40,
        "sigma_min": sigma_min,
        "sigma_max": sigma_max,
        "sigma_data": SIGMA_DATA,
        "clip_denoised": True,
    }


def process_of(config: Mapping[str, Any], *, image_size: int, learned_variance: bool) -> Process:
    """The process behind a scheduler_config.json.

    Raises:
        LayoutError: It is one that ours does not know; the field is named.
    """
    ours = {theirs: mine for mine, theirs in (SCHEDULES | PREDICTIONS).items()}
    for name, default in (("beta_schedule", "linear"), ("prediction_type", "epsilon")):
        if config.get(name, default) not in ours:
            raise LayoutError(f"scheduler_config.json: {name} is {config[name]!r}, unknown to ours")
    if config.get("trained_betas") is not None or config.get("rescale_betas_zero_snr"):
        raise LayoutError(
            "scheduler_config.json: trained_betas and rescale_betas_zero_snr are unknown to ours"
        )
    timesteps = config.get("num_train_timesteps", 1000)
    share = share_of(ours[config.get("beta_schedule", "linear")], timesteps)
    return Process.model_validate(
        {
            "schedule": ours[config.get("beta_schedule", "linear")],
            "beta_range": (config.get("beta_start", 1e-4) / share, config.get("beta_end", 0.02) / share),
            "timesteps": timesteps,
            "predicts": ours[config.get("prediction_type", "epsilon")],
            "learned_variance": learned_variance,
            "image_size": image_size,
        }
    )


def share_of(schedule: str, timesteps: int) -> float:
    """What the betas of 1000 timesteps are multiplied by: as in `schedules.ScheduleSpec`, linear ones."""
    return 1000 / timesteps if schedule == "linear" else 1.0
