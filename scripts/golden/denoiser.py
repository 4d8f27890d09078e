#!/usr/bin/env python3
"""Writes tests/golden/denoiser.json: a small denoiser in PyTorch, its output on an image and the gradient of the pixels.

    denoiser.py [--out tests/golden/denoiser.json]

Weights and pixels are sines of their index, so that the test makes the same ones. Needs torch.
"""
import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F

WIDTH, DEPTH, HEIGHT, IMAGE_WIDTH = 5, 3, 6, 8


def sines(shape, step, scale):
    count = math.prod(shape)
    values = [scale * math.sin(step * (i + 1)) for i in range(count)]
    return torch.tensor(values, dtype=torch.float64).reshape(shape)


def denoise(pixels):
    hidden = F.pixel_unshuffle(pixels, 2)
    for index in range(DEPTH):
        channels = 12 if index == 0 else WIDTH
        out = 12 if index + 1 == DEPTH else WIDTH
        weight = sines((out, channels, 3, 3), 0.7 + index, 0.3)
        bias = sines((out,), 1.1 + index, 0.1)
        hidden = F.conv2d(hidden, weight, bias, padding=1)
        if index + 1 < DEPTH:
            hidden = F.silu(hidden)
    return pixels - F.pixel_shuffle(hidden, 2)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "tests/golden/denoiser.json")
    options = parser.parse_args()
    pixels = (0.5 + sines((2, 3, HEIGHT, IMAGE_WIDTH), 0.37, 0.5)).requires_grad_()
    clean = denoise(pixels)
    (clean * sines(clean.shape, 0.9, 1.0)).sum().backward()
    rounded = {name: [round(value, 9) for value in tensor.flatten().tolist()]
               for name, tensor in [("denoised", clean.detach()), ("pixel_gradient", pixels.grad)]}
    head = {"width": WIDTH, "depth": DEPTH, "shape": list(pixels.shape)}
    options.out.write_text(json.dumps({**head, **rounded}) + "\n")


if __name__ == "__main__":
    main()
