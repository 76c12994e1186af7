"""Files of Stable Diffusion, very small: random weights under the names of the published checkpoints."""

from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dd_core.layouts import importing
from dd_core.layouts.clip import OPEN_CLIP, TRANSFORMERS
from dd_core.layouts.moves import outward
from dd_core.layouts.published import Published, published
from dd_core.nets.autoencoder import Autoencoder, AutoencoderNetSpec
from dd_core.nets.network import PlainSpec, build
from tests.unit.jobs.test_exchange import ldm_file

FIRST = AutoencoderNetSpec(width=32, channel_mult=(1, 2), blocks=1)
WIDTH, LAYERS, HEAD, LENGTH, VOCABULARY = 24, 2, 8, 77, 49408
SIDE = 8
"""Of latents."""
SOURCES = ("sd1", "sd1-inpaint", "sd2-base", "sd2", "sd2-inpaint")


def small(source: Published) -> Published:
    """The same networks, very small; how they compute, read and are asked stays as it is."""
    assert isinstance(source.net, PlainSpec)
    assert source.reader is not None
    heads = {"heads": 2} if source.net.unet.heads else {"head_width": 16}
    unet = source.net.unet.but(
        width=32, channel_mult=(1, 2), blocks_per_level=1, attention_at=(2,), text_width=WIDTH, **heads
    )
    return source._replace(
        net=source.net.but(unet=unet),
        process=source.process.but(image_size=SIDE),
        autoencoder=FIRST,
        reader=source.reader.but(
            embedding_width=WIDTH, text_width=WIDTH, text_layers=LAYERS, head_width=HEAD
        ),
    )


def known() -> dict[str, Published]:
    """All sources, those of Stable Diffusion very small."""
    found = published()
    return found | {name: small(found[name]) for name in SOURCES}


def awake(net: nn.Module) -> nn.Module:
    """Weights of which none is zero."""
    for weight in net.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    return net.eval()


def transformers_tower() -> dict[str, Tensor]:
    """The text tower of Stable Diffusion 1, by the names of transformers."""
    shapes = {
        "embeddings.token_embedding.weight": (VOCABULARY, WIDTH),
        "embeddings.position_embedding.weight": (LENGTH, WIDTH),
        "final_layer_norm.weight": (WIDTH,),
        "final_layer_norm.bias": (WIDTH,),
    }
    for number in range(LAYERS):
        layer = f"encoder.layers.{number}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {f"{layer}.self_attn.{name}.weight": (WIDTH, WIDTH)}
            shapes |= {f"{layer}.self_attn.{name}.bias": (WIDTH,)}
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}.{name}.weight": (WIDTH,), f"{layer}.{name}.bias": (WIDTH,)}
        shapes |= {f"{layer}.mlp.fc1.weight": (4 * WIDTH, WIDTH), f"{layer}.mlp.fc1.bias": (4 * WIDTH,)}
        shapes |= {f"{layer}.mlp.fc2.weight": (WIDTH, 4 * WIDTH), f"{layer}.mlp.fc2.bias": (WIDTH,)}
    return {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}


def open_clip_model() -> nn.Module:
    """The CLIP whose text tower is that of Stable Diffusion 2, by open_clip."""
    vision = open_clip.CLIPVisionCfg(layers=1, width=8, head_width=8, patch_size=8, image_size=8)
    text = open_clip.CLIPTextCfg(LENGTH, VOCABULARY, width=WIDTH, heads=WIDTH // HEAD, layers=LAYERS)
    return awake(open_clip.model.CLIP(WIDTH, vision, text))


def reader_of(source: str) -> dict[str, Tensor]:
    """The text tower as it lies in the file of a source, with what lies beside it."""
    if source.startswith("sd1"):
        found = {TRANSFORMERS + name: weight for name, weight in transformers_tower().items()}
        return found | {f"{TRANSFORMERS}embeddings.position_ids": torch.arange(LENGTH)[None]}
    tower = open_clip_model().state_dict()
    return {OPEN_CLIP + name: weight for name, weight in tower.items() if not name.startswith("visual.")}


def file_of(source: str, path: Path) -> dict[str, Tensor]:
    """Write the file of a source and return what is in it."""
    torch.manual_seed(0)
    about = known()[source]
    unet = awake(build(about.net))
    first = awake(Autoencoder(FIRST))
    assert isinstance(first, Autoencoder)
    state = ldm_file(outward(unet.state_dict(), importing.moves_of(unet, about.layout)), first)
    state |= reader_of(source) | {"betas": torch.ones(1000), "model_ema.decay": torch.tensor(0.9999)}
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(state, path)
    return state
