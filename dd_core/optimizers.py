"""Which algorithm steps which weights: AdamW or RAdam for all, or Muon for hidden ones, AdamW for others."""

from torch import nn, optim

from dd_core.muon import Muon
from dd_core.stage import OptimizerSpec, Stage


def optimizers_of(stage: Stage, phase: str, spec: OptimizerSpec) -> dict[str, optim.Optimizer]:
    """The algorithms that together step the parameters of a phase, each parameter by one of them.

    Muon replaces the update of a matrix by the nearest orthogonal one and learns more from each image;
    it takes a tenth to a fifth of a step's time.  RAdam is AdamW whose first steps are held back until their
    scale is known.

    Source: Loshchilov & Hutter 2019 (arXiv:1711.05101, AdamW); Liu et al. 2020 (arXiv:1908.03265, RAdam, with
    AdamW's decoupled weight decay).
    """
    players = list(stage.players(phase))
    if spec.algorithm == "radam":
        rectified = optim.RAdam(
            players,
            lr=spec.learning_rate,
            betas=spec.betas,
            weight_decay=spec.weight_decay,
            decoupled_weight_decay=True,
        )
        return {"radam": rectified}
    hidden = hidden_weights(stage, spec.algorithm)
    matrices = [p for p in players if p in hidden]
    rest = [p for p in players if p not in hidden]
    found: dict[str, optim.Optimizer] = {}
    if matrices:
        found["muon"] = Muon(matrices, spec.learning_rate, weight_decay=spec.weight_decay)
    if rest:
        found["adamw"] = optim.AdamW(
            rest, lr=spec.learning_rate, betas=spec.betas, weight_decay=spec.weight_decay, fused=True
        )
    return found


def hidden_weights(stage: nn.Module, algorithm: str) -> set[nn.Parameter]:
    """The weights that Muon steps: matrices in blocks, and what the algorithm adds to them.

    Blocks are those of transformers, and those of UNets: down, middle and up.  Their input, output, embedding
    and modulation layers stay with AdamW.  muon_unet adds the kernels of a UNet; muon_named the layers in
    `HIDDEN` of a network without blocks, or of one that begins with vectors instead of pixels or words.
    """
    if not algorithm.startswith("muon"):
        return set()
    kernels = ("down.", "up.", "middle") if algorithm == "muon_unet" else ()
    found = {
        parameter
        for name, parameter in stage.named_parameters()
        if (
            parameter.ndim == 2
            and ("blocks." in name or "middle." in name)
            and "modulation" not in name
            and ".level." not in name
        )
        or (parameter.ndim == 4 and any(place in name for place in kernels))
    }
    if algorithm == "muon_named":
        for network in stage.modules():
            layers = map(network.get_submodule, getattr(network, "HIDDEN", ()))
            found |= {layer.get_parameter("weight") for layer in layers}
    return found
