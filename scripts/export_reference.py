#!/usr/bin/env python3
"""Reference numbers of your own checkpoint, computed by transformers, for `safemed parity`.

    export_reference.py --model DIR_OR_HUB_ID --image FILE [--image FILE] --question TEXT [--answer TEXT] --out DIR
    safemed parity DIR

One question about the pictures is asked, and once more without them. Written are prompt, tokens, positions, resized pictures and
patches, vision tower, hidden states, logits, log-probabilities and greedy tokens; with `--answer` also its loss and the gradient on
the first picture's pixels, with `--weight-gradients` those on all weights (which needs several times the weights' memory).
Everything is computed in float32 on the CPU with eager attention. Needs torch, torchvision, transformers, safetensors and pillow.
"""
import argparse
import json
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR_OR_HUB_ID")
    parser.add_argument("--image", action="append", default=[], type=Path)
    parser.add_argument("--question", required=True)
    parser.add_argument("--answer", help="the completion that loss and gradients are about")
    parser.add_argument("--weight-gradients", action="store_true")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--name", help="what the checkpoint is called in the report; default: the model's last part")
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args()
    if options.answer and not options.image:
        parser.error("--answer needs a picture: its gradient is the point")
    return options


def directory_of(model):
    """Where the checkpoint's files lie."""
    if Path(model).is_dir():
        return Path(model).resolve()
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model))


class Reference:
    def __init__(self, options):
        self.options = options
        self.dir = directory_of(options.model)
        self.name = options.name or Path(options.model.rstrip("/")).name
        self.processor = AutoProcessor.from_pretrained(str(self.dir))
        self.model = AutoModelForImageTextToText.from_pretrained(
            str(self.dir), dtype=torch.float32, attn_implementation="eager").eval().requires_grad_(False)
        self.tensors, self.cases, self.conversations = {}, {}, {}

    def pictures(self):
        opened = [Image.open(path) for path in self.options.image]
        return [ImageOps.exif_transpose(picture).convert("RGB") for picture in opened]

    def resized(self, picture):
        """The picture at the model's resolution, `[3, height, width]` in 8 bits, as the processor resizes it before it rescales."""
        raw = self.processor.image_processor(images=[picture], do_rescale=False, do_normalize=False, return_tensors="pt")
        patches, (_, rows, columns) = raw["pixel_values"], raw["image_grid_thw"][0].tolist()
        settings = self.processor.image_processor
        size, merge, frames = settings.patch_size, settings.merge_size, settings.temporal_patch_size
        # Undo the order of patches: merge blocks row by row, in each its patches, in each channel, frame, pixels.
        grid = patches.reshape(rows // merge, columns // merge, merge, merge, 3, frames, size, size)[..., 0, :, :]
        picture = grid.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, rows * size, columns * size)
        return picture.round().clamp(0, 255).to(torch.uint8)

    def ask(self, name, has_pictures):
        content = [{"type": "image"} for _ in self.options.image if has_pictures]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": self.options.question}]}]
        pictures = self.pictures() if has_pictures else []
        text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = self.processor(text=[text], images=pictures or None, return_tensors="pt", return_mm_token_type_ids=True)
        row = {"images": [f"{self.name}-{i}.png" for i in range(len(pictures))], "prompt": text,
               "input_ids": inputs["input_ids"][0].tolist()}
        for i, picture in enumerate(pictures):
            picture.save(self.options.out / "images" / row["images"][i])
            self.tensors[f"{name}.resized_u8.{i}"] = self.resized(picture)
        if pictures:
            row["image_grid_thw"] = inputs["image_grid_thw"].tolist()
            self.tensors[f"{name}.pixel_values"] = inputs["pixel_values"].float()
            places, delta = self.model.model.get_rope_index(
                inputs["input_ids"], mm_token_type_ids=inputs["mm_token_type_ids"],
                image_grid_thw=inputs["image_grid_thw"], attention_mask=inputs["attention_mask"])
            row |= {"position_ids": places[:, 0].tolist(), "rope_delta": int(delta[0])}
        else:
            inputs.pop("mm_token_type_ids", None)
        with torch.no_grad():
            logits = self.traced(name, inputs, bool(pictures))[0].float()
        self.keep_logits(name, row, logits, inputs["input_ids"][0])
        row["greedy"] = [self.greedy(inputs)]
        self.cases[name] = row
        self.conversations[name] = messages
        return inputs

    def traced(self, name, inputs, has_pictures):
        """Logits, with the hidden states between blocks kept by hooks."""
        kept, hooks = {}, []

        def before(module, key):
            hook = lambda _, args, named: kept.__setitem__(key, args[0] if args else named["hidden_states"])
            hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))

        decoder, tower = self.model.model.language_model, self.model.model.visual
        for i, layer in enumerate(decoder.layers):
            before(layer, f"text.hidden.{i}")
        before(decoder.norm, "text.hidden.last")
        hooks.append(decoder.norm.register_forward_hook(lambda _, args, out: kept.__setitem__("text.hidden.final", out)))
        if has_pictures:
            for i, block in enumerate(tower.blocks):
                before(block, f"vision.hidden.{i}")
            seen = tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
            kept["vision.hidden.last"], kept["vision.merged"] = seen.last_hidden_state, seen.pooler_output
            for i, deep in enumerate(getattr(seen, "deepstack_features", None) or []):
                kept[f"vision.deepstack.{i}"] = deep
        logits = self.model(**inputs).logits
        for hook in hooks:
            hook.remove()
        for key, value in kept.items():
            self.tensors[f"{name}.{key}"] = (value[0] if value.ndim == 3 else value).float()
        return logits

    def keep_logits(self, name, row, logits, ids):
        """Logits at a few places, their normaliser and the log-probability of the next token everywhere."""
        count, vocab = logits.shape
        wanted = max(1, 70_000 // vocab)
        places = sorted({*range(0, count, max(1, count // wanted)), *range(max(0, count - 6), count)})
        self.tensors[f"{name}.logits"] = logits[places].clone()
        self.tensors[f"{name}.logsumexp"] = logits.logsumexp(-1)
        self.tensors[f"{name}.next_logprob"] = logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        row[f"{name}.positions"] = places
        row[f"{name}.argmax"] = logits.argmax(-1).tolist()

    def greedy(self, inputs):
        out = self.model.generate(**inputs, do_sample=False, temperature=None, top_p=None, top_k=None, repetition_penalty=1.0,
                                  max_new_tokens=self.options.new_tokens, return_dict_in_generate=True, output_scores=True)
        new = out.sequences[:, inputs["input_ids"].shape[1]:]
        best = torch.stack(out.scores).topk(2, dim=-1).values
        self.model.model.rope_deltas = None
        return {"repetition_penalty": 1.0, "ids": new.tolist(), "min_margin": float((best[..., 0] - best[..., 1]).min())}

    def train(self, name, inputs):
        """Loss of the answer with its closing token, and its gradients; the picture enters as pixels in [0, 1]."""
        settings = self.processor.image_processor
        prompt = inputs["input_ids"][0].tolist()
        answer = self.processor.tokenizer(self.options.answer + "<|im_end|>", add_special_tokens=False)["input_ids"]
        ids = torch.tensor([prompt + answer])
        labels = ids.clone()
        labels[:, :len(prompt)] = -100
        mean = torch.tensor(settings.image_mean).view(3, 1, 1)
        deviation = torch.tensor(settings.image_std).view(3, 1, 1)
        size, merge, frames = settings.patch_size, settings.merge_size, settings.temporal_patch_size
        first, patches = None, []
        for i in range(len(self.options.image)):
            picture = (self.tensors[f"{name}.resized_u8.{i}"].float() / 255).requires_grad_(True)
            first = picture if first is None else first
            normal = (picture - mean) / deviation
            rows, columns = normal.shape[1] // size, normal.shape[2] // size
            blocks = normal.reshape(3, rows // merge, merge, size, columns // merge, merge, size)
            ordered = blocks.permute(1, 4, 2, 5, 0, 3, 6).reshape(rows * columns, 3, 1, size, size)
            patches.append(ordered.expand(-1, -1, frames, -1, -1).reshape(rows * columns, -1))
        if self.options.weight_gradients:
            self.model.requires_grad_(True)
        kinds = torch.zeros_like(ids)
        kinds[:, :len(prompt)] = inputs["mm_token_type_ids"]
        out = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds, labels=labels,
                         pixel_values=torch.cat(patches), image_grid_thw=inputs["image_grid_thw"])
        out.loss.backward()
        scores = out.logits[0, len(prompt) - 1:-1].float().log_softmax(-1).detach()
        self.tensors["train.completion_logprobs"] = scores.gather(1, ids[0, len(prompt):, None])[:, 0]
        self.tensors["train.grad_image01"] = first.grad
        row = {"input_ids": ids[0].tolist(), "labels": labels[0].tolist(), "loss": out.loss.item()}
        if self.options.weight_gradients:
            named = dict(self.model.named_parameters())
            row["grad_norms"] = {key: float(value.grad.norm()) for key, value in named.items() if value.grad is not None}
            row["params_without_grad"] = [key for key, value in named.items() if value.grad is None]
        return row

    def write(self, expected):
        out = self.options.out
        link = out / "checkpoints" / self.name
        if link.is_symlink():
            link.unlink()
        try:
            link.symlink_to(self.dir, target_is_directory=True)
        except OSError:
            shutil.copytree(self.dir, link, dirs_exist_ok=True)
        tensors = {key: value.detach().contiguous().clone() for key, value in self.tensors.items()}
        save_file(tensors, str(out / "expected" / f"{self.name}.safetensors"))
        (out / "expected" / f"{self.name}.json").write_text(json.dumps(expected, indent=1))


def main():
    options = arguments()
    for part in ("images", "expected", "checkpoints"):
        (options.out / part).mkdir(parents=True, exist_ok=True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    reference = Reference(options)
    asked = reference.ask("question", True) if options.image else None
    reference.ask("text_only", False)
    expected = {"checkpoint": reference.name, "compute_dtype": "float32", "cases": reference.cases}
    if options.answer:
        expected["train"] = reference.train("question", asked)
    reference.write(expected)
    print(f"written: {options.out}; compare with: safemed parity {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
