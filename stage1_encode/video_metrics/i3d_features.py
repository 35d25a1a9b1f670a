"""Features of an I3D network that the user provides, for the Frechet video distance (arXiv 1812.01717).

Shapes: F frames, X Y pixels, D features.
"""

from pathlib import Path

import numpy
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

INPUT_SIZE = 224


def load_i3d(path: str, device: torch.device) -> torch.jit.ScriptModule:
    """Load a TorchScript file such as `i3d_torchscript.pt` of StyleGAN-V; ValueError if it cannot be read."""
    if not Path(path).is_file():
        raise ValueError(f"i3d_model={path}: no such file; give i3d_torchscript.pt of StyleGAN-V")
    try:
        return torch.jit.load(path, map_location=device).eval()
    except RuntimeError as error:
        raise ValueError(
            f"i3d_model={path}: is not a TorchScript file; give i3d_torchscript.pt of StyleGAN-V"
        ) from error


@torch.no_grad()
def extract_i3d_features(net: torch.jit.ScriptModule, video: numpy.ndarray, device: torch.device) -> Tensor:
    """Return the features (D) of a video (F X Y 3) uint8, which is stretched to 224x224 and scaled to [-1, 1]."""
    frames = rearrange(torch.from_numpy(video).to(device).float(), "f x y c -> f c x y") / 127.5 - 1
    resized = functional.interpolate(frames, size=(INPUT_SIZE, INPUT_SIZE), mode="bilinear", antialias=True)
    # the file's own rescaling and resizing is switched off, because it does not antialias
    output = net(rearrange(resized, "f c x y -> 1 c f x y"), rescale=False, resize=False, return_features=True)
    return output[0].float().cpu()
