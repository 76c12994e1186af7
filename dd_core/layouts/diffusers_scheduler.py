"""The scheduler_config.json of diffusers: the diffusion process of a network, both ways."""

from collections.abc import Mapping
from typing import Any

from dd_core.denoiser import SIGMA_DATA
from dd_core.layouts.moves import LayoutError
from dd_core.layouts.published import Process
from dd_core.schedules import LogNormalSpec

SCHEDULES = {"linear": "linear", "sqrt_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
JUMPS = "CMStochasticIterativeScheduler"
DDPM, SMALLER = ("linear", 1e-4, 0.02), ("linear", 0.00085, 0.012)
UNSAID = {
    "DDIMInverseScheduler": DDPM,
    "DDIMParallelScheduler": DDPM,
    "DDIMScheduler": DDPM,
    "DDPMParallelScheduler": DDPM,
    "DDPMScheduler": DDPM,
    "DEISMultistepScheduler": DDPM,
    "DPMSolverMultistepInverseScheduler": DDPM,
    "DPMSolverMultistepScheduler": DDPM,
    "DPMSolverSinglestepScheduler": DDPM,
    "EulerAncestralDiscreteScheduler": DDPM,
    "EulerDiscreteScheduler": DDPM,
    "HeunDiscreteScheduler": SMALLER,
    "KDPM2AncestralDiscreteScheduler": SMALLER,
    "KDPM2DiscreteScheduler": SMALLER,
    "LMSDiscreteScheduler": DDPM,
    "PNDMScheduler": DDPM,
    "RePaintScheduler": DDPM,
    "SASolverScheduler": DDPM,
    "UnCLIPScheduler": ("squaredcos_cap_v2", 1e-4, 0.02),
    "UniPCMultistepScheduler": DDPM,
}
"""Schedulers whose process has betas -> their defaults: schedule, first beta, last beta."""
CLIPS = (
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "RePaintScheduler",
    "UnCLIPScheduler",
)
"""Schedulers that clip their estimate to -1 .. 1 unless told otherwise."""
PLUS_ONE = {
    "_class_name": "DDIMScheduler",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "set_alpha_to_one": False,
}
"""Latent diffusion's steps, our spacing ldm_plus_one; the last step leads to the level of timestep 0."""
REFUSED = {
    "trained_betas": (None,),
    "rescale_betas_zero_snr": (None, False),
    "use_flow_sigmas": (None, False),
    "timestep_type": (None, "discrete"),
    "variance_type": (
        None,
        "fixed_small",
        "fixed_small_log",
        "fixed_large",
        "fixed_large_log",
        "learned_range",
    ),
}
"""Fields with the only values that ours supports."""


def config_of(process: Process) -> dict[str, Any]:
    """The scheduler_config.json of a process.

    Raises:
        LayoutError: It has no betas, or the network is told rescaled timesteps.
    """
    if process.schedule == "karras":
        raise LayoutError(
            "a schedule of sigmas has no betas; diffusers keeps those of consistency models in code"
        )
    if process.rescaled_time:
        raise LayoutError("this network is told t * 1000 / T, and diffusers tells t; it cannot be exported")
    share = share_of(process.schedule, process.timesteps)
    walked = (
        PLUS_ONE
        if process.last == "first"
        else {"_class_name": "DDPMScheduler", "timestep_spacing": "linspace"}
    )
    return walked | {
        "beta_schedule": SCHEDULES[process.schedule],
        "beta_start": share * process.beta_range[0],
        "beta_end": share * process.beta_range[1],
        "num_train_timesteps": process.timesteps,
        "prediction_type": PREDICTIONS[process.predicts],
        "variance_type": "learned_range" if process.learned_variance else "fixed_small",
        "clip_sample": process.learned_variance,
    }


def jumps_of(sigma_min: float, sigma_max: float) -> dict[str, Any]:
    """The scheduler_config.json of a consistency model that is the identity at its lowest level."""
    return {
        "_class_name": JUMPS,
        "num_train_timesteps": 40,
        "sigma_min": sigma_min,
        "sigma_max": sigma_max,
        "sigma_data": SIGMA_DATA,
        "clip_denoised": True,
    }


def process_of(config: Mapping[str, Any], *, image_size: int) -> Process:
    """The process that a scheduler_config.json describes.

    Raises:
        LayoutError: It is one that ours does not know; the class or the field is named.
    """
    kind = config.get("_class_name")
    if kind == JUMPS:
        return process_of_jumps(config, image_size=image_size)
    if kind not in UNSAID:
        raise LayoutError(
            f"scheduler_config.json: _class_name is {kind!r}, ours knows the process of {JUMPS}, "
            f"{', '.join(UNSAID)}; put the scheduler there that the network was trained with"
        )
    usual, first, last = UNSAID[kind]
    schedule, predicts = config.get("beta_schedule", usual), config.get("prediction_type", "epsilon")
    ours = {theirs: mine for mine, theirs in (SCHEDULES | PREDICTIONS).items()}
    for name, value in (("beta_schedule", schedule), ("prediction_type", predicts)):
        if value not in ours:
            raise LayoutError(f"scheduler_config.json: {name} is {value!r}, unknown to ours")
    refuse_others(config, REFUSED)
    timesteps = config.get("num_train_timesteps", 1000)
    share = share_of(ours[schedule], timesteps)
    return Process.model_validate(
        {
            "schedule": ours[schedule],
            "beta_range": (config.get("beta_start", first) / share, config.get("beta_end", last) / share),
            "timesteps": timesteps,
            "predicts": ours[predicts],
            "learned_variance": config.get("variance_type") == "learned_range",
            "last": "clean" if config.get("set_alpha_to_one", kind != "PNDMScheduler") else "first",
            "image_size": image_size,
        }
    )


def clips(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler clips its estimates of pixels to -1 .. 1.

    Raises:
        LayoutError: It clips in a way that ours does not know; the field is named.
    """
    kind = config.get("_class_name")
    refuse_others(config, {"thresholding": (None, False)})
    if kind == JUMPS:
        return bool(config.get("clip_denoised", True))
    if not config.get("clip_sample", kind in CLIPS):
        return False
    refuse_others(config, {"clip_sample_range": (None, 1.0)})
    return True


def refuse_others(config: Mapping[str, Any], known: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises LayoutError for a field with another value than ours supports."""
    for name, values in known.items():
        if config.get(name) not in values:
            raise LayoutError(f"scheduler_config.json: {name} is {config[name]!r}, unknown to ours")


def process_of_jumps(config: Mapping[str, Any], *, image_size: int) -> Process:
    """The process of a consistency model, whose levels and scaling are the published ones.

    Raises:
        LayoutError: The config has other values; the field is named.
    """
    levels = LogNormalSpec()
    published = jumps_of(levels.sigma_min, levels.sigma_max)
    for name in ("sigma_min", "sigma_max", "sigma_data"):
        if (value := config.get(name, published[name])) != published[name]:
            raise LayoutError(
                f"scheduler_config.json: {name} is {value!r}, ours knows consistency models of "
                f"{published[name]} only"
            )
    return Process(schedule="karras", predicts="consistency", image_size=image_size)


def share_of(schedule: str, timesteps: int) -> float:
    """Factor of the betas for 1000 timesteps: 1 unless linear, as in `schedules.ScheduleSpec`."""
    return 1000 / timesteps if schedule == "linear" else 1.0
