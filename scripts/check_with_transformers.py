#!/usr/bin/env python3
"""Does transformers compute the same numbers from a checkpoint that safemed saved?

    check_with_transformers.py MODEL_DIR DUMP_DIR [--tolerance 1e-4]

DUMP_DIR is written by safemed (`recipes::parity::dump`): prompt.json with the conversation, its pictures and tokens;
numbers.safetensors with the logits of every row and the pictures' patches. MODEL_DIR is the checkpoint they came from.
Everything is computed in float32 on the CPU. Needs torch, torchvision, transformers, safetensors and pillow.
Exit status: 0 all equal, 5 something differs.
"""
import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL_DIR")
    parser.add_argument("dump", type=Path, metavar="DUMP_DIR")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of logits, relative where they exceed one")
    return parser.parse_args()


class Comparison:
    """Prints one line per quantity and remembers whether all were within their tolerance."""

    def __init__(self):
        self.passed = True

    def add(self, name, difference, tolerance):
        # Not `>`: a difference that is no number does not pass.
        good = difference <= tolerance
        self.passed &= good
        print(f"{'ok  ' if good else 'FAIL'} {name}: {difference:.3g} (at most {tolerance:g})")

    def same(self, name, found, wanted):
        self.add(name, float(found != wanted), 0.0)


def scaled(found, wanted):
    """Largest difference, relative to the largest wanted magnitude where that exceeds one."""
    if found.shape != wanted.shape:
        return float("inf")
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1.0))


def load(directory, comparison):
    """Model and processor; a checkpoint that leaves weights out or brings unknown ones fails."""
    model, info = AutoModelForImageTextToText.from_pretrained(
        str(directory), dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = info.get(kind) or []
        if keys:
            print(f"  {kind}: {sorted(map(str, keys))}")
        comparison.add(f"weights, {kind}", len(keys), 0)
    return model.eval(), AutoProcessor.from_pretrained(str(directory))


def main():
    options = arguments()
    comparison = Comparison()
    model, processor = load(options.model, comparison)
    ours = json.loads((options.dump / "prompt.json").read_text())
    numbers = load_file(str(options.dump / "numbers.safetensors"))
    pictures = [Image.open(path) for path in ours["images"]]
    text = processor.apply_chat_template(ours["messages"], tokenize=False, add_generation_prompt=True)
    comparison.same("rendered prompt", ours["prompt"], text)
    inputs = processor(text=[text], images=pictures or None, return_tensors="pt")
    comparison.same("tokens", ours["input_ids"], inputs["input_ids"][0].tolist())
    if pictures:
        comparison.same("image grids", ours["image_grid_thw"], inputs["image_grid_thw"].tolist())
        comparison.add("pixel values", scaled(numbers["pixel_values"], inputs["pixel_values"]), 1e-5)
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    comparison.add("logits", scaled(numbers["logits"], logits), options.tolerance)
    # Saved generation settings must be ones that transformers accepts; the weights' names were checked above.
    generated = model.generate(**inputs, do_sample=False, temperature=None, top_p=None, top_k=None,
                               repetition_penalty=1.0, max_new_tokens=1)
    comparison.same("first greedy token", int(numbers["logits"][-1].argmax()), int(generated[0, -1]))
    return 0 if comparison.passed else 5


if __name__ == "__main__":
    sys.exit(main())
