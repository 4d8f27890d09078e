"""Estimates against what then happens: `train --dry-run` and the training itself, `doctor --model` truncated and whole.

    python scripts/bench/estimates.py --checkpoints DIR DIR DIR --data DATA [--only sft_lora at_grpo doctor] [--probe-seconds 60 0]

DATA is in OmniMedVQA's layout. For every checkpoint and every budget of measuring (0: always on truncated models), prints the
ratios estimate / actual of seconds per step, of the whole run's seconds and of the peak of memory; the exit status is 1 when one
leaves 0.85 to 1.15. What the machine does beside this disturbs the times: run it alone, and look at the median of several steps.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# The prompt `plain` asks for a letter alone: what is trained has to be that.
RECIPES = {
    "sft_lora": ["train.recipe=sft", "train.target=instruct", "train.batch_size=4", "train.lora_rank=16"],
    # With a KL term every group goes through the update, whatever an untrained model is rewarded with.
    "at_grpo": [
        "train.recipe=at_grpo", "train.target=instruct", "train.batch_size=2", "train.grpo.group_size=4",
        "train.lora_rank=16", "train.grpo.kl_coef=0.01", "train.adversary.num_steps=3", "max_new_tokens=48",
    ],
}


def run(arguments, **more):
    done = subprocess.run(arguments, capture_output=True, text=True, **more)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, arguments))}\n{done.stderr}")
    return done.stdout


def train(program, checkpoint, data, recipe, out, steps, threads):
    settings = [f"train.num_steps={steps}", "train.schedule=constant", *RECIPES[recipe]]
    sets = [word for setting in settings for word in ("--set", setting)]
    return [program, "train", "--model", checkpoint, "--omnimedvqa", data, "--out", out, "--prompt", "plain",
            "--threads", str(threads), "--json", *sets]


def actual(arguments, out):
    started = time.monotonic()
    run(arguments)
    seconds = time.monotonic() - started
    lines = [json.loads(line) for line in (out / "timings.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["what"] == "step"]
    return {
        "step": statistics.median(line["seconds"] for line in steps[1:]),
        "total": seconds,
        "peak": max(line["peak_memory_bytes"] for line in steps),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--program", default="target/release/safemed")
    parser.add_argument("--checkpoints", nargs="+", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--only", nargs="+", default=[*RECIPES, "doctor"])
    parser.add_argument("--probe-seconds", nargs="+", default=["60", "0"])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--image", help="image for `doctor`")
    args = parser.parse_args()
    outside = 0
    print(f"{'checkpoint':<12}{'what':<18}{'measured':<11}{'quantity':<10}{'estimate':>12}{'actual':>12}{'ratio':>8}")

    def show(checkpoint, what, measured, quantity, estimate, real):
        nonlocal outside
        ratio = estimate / real
        outside += not 0.85 <= ratio <= 1.15
        unit = 1 << 20 if quantity == "MiB" else 1
        print(f"{Path(checkpoint).name:<12}{what:<18}{measured:<11}{quantity:<10}{estimate / unit:>12.4g}{real / unit:>12.4g}"
              f"{ratio:>8.3f}{'' if 0.85 <= ratio <= 1.15 else '  <--'}", flush=True)

    for checkpoint in args.checkpoints:
        for recipe in [name for name in RECIPES if name in args.only]:
            with tempfile.TemporaryDirectory() as scratch:
                out = Path(scratch) / "run"
                arguments = train(args.program, checkpoint, args.data, recipe, out, args.steps, args.threads)
                estimates = [json.loads(run([*arguments, "--dry-run", "--probe-seconds", seconds]))
                             for seconds in args.probe_seconds]
                real = actual(arguments, out)
            for estimate in estimates:
                measured = "whole" if estimate["is_measured_whole"] else "truncated"
                show(checkpoint, recipe, measured, "s/step", estimate["seconds_per_step"], real["step"])
                show(checkpoint, recipe, measured, "s", estimate["seconds_total"], real["total"])
                show(checkpoint, recipe, measured, "MiB", estimate["peak_memory_bytes"], real["peak"])
        if "doctor" in args.only:
            image = ["--image", args.image] if args.image else []
            doctor = [args.program, "doctor", "--json", "--model", checkpoint, "--threads", str(args.threads), *image]
            whole, truncated = (json.loads(run([*doctor, "--probe-seconds", seconds]))["estimate"]["works"]
                                for seconds in ("100000", "0"))
            for real, estimate in zip(whole, truncated):
                measured = "whole" if estimate["is_measured_whole"] else "truncated"
                show(checkpoint, estimate["work"], measured, "s", estimate["seconds"], real["seconds"])
                show(checkpoint, estimate["work"], measured, "MiB", estimate["peak_memory_bytes"],
                     real["peak_memory_bytes"])
    return 1 if outside else 0


if __name__ == "__main__":
    sys.exit(main())
