#!/usr/bin/env python3
"""Does transformers compute the same numbers from a checkpoint that safemed saved?

    check_with_transformers.py MODEL_DIR --question TEXT [--image FILE]... [--adapter DIR] [--safemed PROGRAM] [--tolerance 1e-4]

Asks safemed (`safemed parity --dump`) and transformers the same question about the same pictures and compares prompt, tokens,
patches and the logits of every row, in float32 on the CPU; with `--adapter`, PEFT runs the adapter that safemed wrote.
Needs torch, torchvision, transformers, safetensors and pillow, and peft for adapters.
Exit status: 0 all equal, 5 something differs.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
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
    parser.add_argument("--question", required=True)
    parser.add_argument("--image", action="append", default=[])
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--safemed", default="safemed", help="the program; default: the one on PATH")
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


def ask_safemed(options):
    """What safemed makes of the question: the prompt and its tensors."""
    with tempfile.TemporaryDirectory() as parent:
        directory = Path(parent) / "dump"
        command = [options.safemed, "parity", "--dump", directory, "--model", options.model, "--question", options.question]
        for image in options.image:
            command += ["--image", image]
        if options.adapter:
            command += ["--adapter", options.adapter]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads((directory / "prompt.json").read_text()), load_file(str(directory / "numbers.safetensors"))


def with_adapter(model, directory, comparison):
    """PEFT's model; an adapter whose tensors PEFT does not know, or misses some of, fails."""
    from peft import PeftModel

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted = PeftModel.from_pretrained(model, str(directory))
    complaints = [str(w.message) for w in caught if "adapter" in str(w.message).lower() and "key" in str(w.message).lower()]
    for complaint in complaints:
        print(f"  {complaint}")
    comparison.add("adapter, complaints of PEFT", len(complaints), 0)
    with open(directory / "adapter_model.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    saved = len([name for name in header if name != "__metadata__"])
    comparison.same("adapter, tensors", saved, len([name for name, _ in adapted.named_parameters() if "lora_" in name]))
    return adapted.eval()


def main():
    options = arguments()
    comparison = Comparison()
    ours, numbers = ask_safemed(options)
    model, processor = load(options.model, comparison)
    if options.adapter:
        model = with_adapter(model, options.adapter, comparison)
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
