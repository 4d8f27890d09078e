#!/usr/bin/env python3
"""Do torchattacks and foolbox find on a model through transformers what safemed finds, and nothing that `auto` misses?

    check_with_attackers.py MODEL_DIR --data ROOT --split FILE [--prompt phantom_cot] [--items 20] [--safemed PROGRAM]
    check_with_attackers.py MODEL_DIR --data ROOT --survivors RUN_DIR        # of `safemed attack --method auto --space model`

First form: FGSM and PGD (L-inf and L2, no random start) on the right completion's likelihood, at the model's resolution. FGSM's
image must equal safemed's PNG but for 0.2 % of the pixels; PGD's best loss must agree to 1e-3.
Second form: for every item that the run left right, torchattacks' PGD and APGD and foolbox's PGD with random starts; their images
are rounded to eight bits inside the ball, and transformers generates the answer. Found where `auto` found nothing: listed.
For checkpoints of one image patch grid, with the prompts `phantom` and `phantom_cot`. Needs torch, torchvision, transformers,
torchattacks, foolbox, safetensors and pillow. Exit status: 0 all as it should be, 5 something differs or was missed.
"""
import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import foolbox
import numpy
import torch
import torchattacks
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

EPSILON, STEP, STEPS = 8 / 255, 2 / 255, 10
L2_EPSILON = 1.0


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL_DIR")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", type=Path)
    parser.add_argument("--prompt", default="phantom_cot", choices=["phantom", "phantom_cot"])
    parser.add_argument("--items", type=int, default=20)
    parser.add_argument("--survivors", type=Path, metavar="RUN_DIR")
    parser.add_argument("--safemed", default="safemed")
    return parser.parse_args()


class Victim(torch.nn.Module):
    """Pixels [n, 3, h, w] in [0, 1] to two logits: the log-likelihood of a completion, and zero.

    The cross-entropy of the first rises as the completion gets less likely, and its gradient has the same direction: the steps of
    attacks that use signs or unit vectors are those of the log-likelihood itself.
    """

    def __init__(self, model, processor, prompt):
        super().__init__()
        self.model, self.processor, self.kind = model, processor, prompt
        self.item = None

    def text(self, record):
        options = "".join(f"\n{chr(65 + i)}) {option}" for i, option in enumerate(record["options"]))
        question = record["question"] + options + ("\nthink" if self.kind == "phantom_cot" else "\nanswer")
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def completion(self, record):
        answer = f"<answer> {record['answer']}</answer>"
        if self.kind == "phantom":
            return answer
        right = record["options"][ord(record["answer"]) - 65]
        return f"<think> scan {record['modality']}; finding {right} {record['answer']}</think>{answer}"

    def aim(self, record, image):
        self.inputs = self.processor(text=[self.text(record)], images=[image], return_tensors="pt")
        completion = self.completion(record) + self.processor.tokenizer.eos_token
        ids = self.processor.tokenizer(completion, return_tensors="pt", add_special_tokens=False)["input_ids"]
        self.target = ids[0]
        prompt = self.inputs["input_ids"]
        self.full = {**self.inputs, "input_ids": torch.cat([prompt, ids], 1),
                     "attention_mask": torch.ones(1, prompt.shape[1] + ids.shape[1], dtype=torch.long)}
        if "mm_token_type_ids" in self.inputs:
            kinds = self.inputs["mm_token_type_ids"]
            self.full["mm_token_type_ids"] = torch.cat([kinds, torch.zeros_like(ids)], 1)

    def patches(self, pixels):
        """As the image processor orders them, differentiable."""
        own = self.processor.image_processor
        mean = torch.tensor(own.image_mean).view(3, 1, 1)
        std = torch.tensor(own.image_std).view(3, 1, 1)
        x = (pixels - mean) / std
        size, merge, frames = own.patch_size, own.merge_size, own.temporal_patch_size
        rows, columns = x.shape[1] // size, x.shape[2] // size
        x = x.unsqueeze(0).repeat(frames, 1, 1, 1)
        x = x.reshape(frames, 3, rows // merge, merge, size, columns // merge, merge, size)
        return x.permute(2, 5, 3, 6, 1, 0, 4, 7).reshape(rows * columns, -1)

    def score(self, pixels):
        logits = self.model(**{**self.full, "pixel_values": self.patches(pixels)}).logits[0]
        predicting = logits[-len(self.target) - 1:-1].log_softmax(-1)
        return predicting.gather(1, self.target[:, None]).sum()

    def forward(self, images):
        scores = torch.stack([self.score(image) for image in images])
        return torch.stack([scores, torch.zeros_like(scores)], 1)

    @torch.no_grad()
    def answer(self, pixels):
        """What the model says by itself, greedily."""
        given = {**self.inputs, "pixel_values": self.patches(pixels)}
        ids = self.model.generate(**given, do_sample=False, max_new_tokens=64)[0, self.inputs["input_ids"].shape[1]:]
        text = self.processor.tokenizer.decode(ids, skip_special_tokens=True)
        found = re.findall(r"<answer>\s*([A-E])\s*</answer>", text)
        return found[-1] if found else "none"


def tensor(image):
    return torch.from_numpy(numpy.array(image.convert("RGB"))).permute(2, 0, 1).contiguous().float() / 255


def rounded(pixels, clean, epsilon):
    levels = int(255 * epsilon + 1e-6)
    low, high = (clean * 255).round() - levels, (clean * 255).round() + levels
    return ((pixels * 255).round().clamp(low, high).clamp(0, 255)) / 255


def records_of(directory):
    return [json.loads(line) for line in (directory / "records.jsonl").read_text().splitlines()]


def compare(options, victim):
    """The first form."""
    passed = True
    with tempfile.TemporaryDirectory() as parent:
        for name, norm, method, words in [
            ("FGSM, L-inf", "linf", "fgsm", []),
            ("PGD, L-inf", "linf", "pgd", ["--num-steps", STEPS, "--step-size", STEP]),
            ("PGD, L2", "l2", "pgd", ["--num-steps", STEPS, "--step-size", 0.2]),
        ]:
            out = Path(parent) / f"{norm}-{method}"
            epsilon = EPSILON if norm == "linf" else L2_EPSILON
            command = [options.safemed, "attack", "--model", options.model, "--omnimedvqa", options.data, "--prompt", options.prompt,
                       "--method", method, "--norm", norm, "--epsilon", epsilon, "--space", "model", "--limit", options.items,
                       "--max-new-tokens", 64, "--verdict-items", 0, "--no-images", "-q", "--out", out, *words,
                       "--set", "attack.random_start=false", "--set", "attack.early_stop=false"]
            command += ["--split", options.split] if options.split else []
            subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)
            losses, pixels = [], []
            for record in records_of(out):
                if not record["adversarial_image"]:
                    continue
                image = Image.open(options.data / record["image"]).convert("RGB")
                victim.aim(record, image)
                clean, label = tensor(image)[None], torch.tensor([0])
                attack = {
                    ("linf", "fgsm"): lambda steps: torchattacks.FGSM(victim, eps=EPSILON),
                    ("linf", "pgd"): lambda steps: torchattacks.PGD(victim, eps=EPSILON, alpha=STEP, steps=steps, random_start=False),
                    ("l2", "pgd"): lambda steps: torchattacks.PGDL2(victim, eps=L2_EPSILON, alpha=0.2, steps=steps, random_start=False),
                }[norm, method]
                if method == "fgsm":
                    found = attack(1)(clean, label)
                    ours = tensor(Image.open(out / record["adversarial_image"]))
                    pixels.append(float((rounded(found[0], clean[0], EPSILON) != ours).float().mean()))
                    best = float(-victim.score(found[0]).detach())
                else:
                    images = [attack(steps)(clean, label)[0] for steps in range(1, STEPS + 1)]
                    best = max(float(-victim.score(image).detach()) for image in images)
                    best = max(best, float(-victim.score(clean[0]).detach()))
                losses.append(abs(best - record["loss_adversarial"]) / max(1.0, abs(best)))
            good = max(losses) <= 1e-3 and max(pixels, default=0) <= 0.002
            passed &= good
            text = f"loss off by {max(losses):.2e} at most" + (f", pixels that differ {max(pixels):.2%}" if pixels else "")
            print(f"{'ok  ' if good else 'FAIL'} {name}: {len(losses)} items, {text}")
    return passed


def survivors(options, victim):
    """The second form."""
    records = [record for record in records_of(options.survivors) if record["robust_correct"]]
    epsilon = records[0]["epsilon"] if records else 0
    torch.manual_seed(0)
    missed = []
    for record in records:
        image = Image.open(options.data / record["image"]).convert("RGB")
        victim.aim(record, image)
        clean, label = tensor(image)[None], torch.tensor([0])
        pgd = foolbox.attacks.LinfPGD(steps=40, random_start=True)
        wrapped = foolbox.PyTorchModel(victim, bounds=(0, 1))
        attacks = {
            "torchattacks PGD-50": lambda: torchattacks.PGD(victim, eps=epsilon, alpha=epsilon / 10, steps=50)(clean, label),
            "torchattacks APGD-50": lambda: torchattacks.APGD(victim, eps=epsilon, steps=50, n_restarts=1, loss="ce")(clean, label),
            "foolbox LinfPGD-40": lambda: pgd.run(wrapped, clean, foolbox.criteria.Misclassification(label), epsilon=epsilon),
        }
        for name, attack in attacks.items():
            adversarial = rounded(attack()[0].detach(), clean[0], epsilon)
            if victim.answer(adversarial) != record["answer"]:
                missed.append((record["id"], name))
    for identity, name in missed:
        print(f"FAIL {identity}: {name} breaks it")
    items = len({identity for identity, _ in missed})
    print(f"{'ok  ' if not missed else 'FAIL'} of {len(records)} items that the run left right, {items} are broken by other tools")
    return not missed


def main():
    options = arguments()
    model = AutoModelForImageTextToText.from_pretrained(str(options.model), dtype=torch.float32, attn_implementation="eager").eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    victim = Victim(model, AutoProcessor.from_pretrained(str(options.model)), options.prompt).eval()
    passed = survivors(options, victim) if options.survivors else compare(options, victim)
    sys.exit(0 if passed else 5)


if __name__ == "__main__":
    main()
