"""safemed beside PyTorch on the same work, in one run: each round runs one process of every side after the other.

    cargo bench --no-run
    python scripts/bench/versus_torch.py --peer PEER_DIR --python VENV/bin/python --checkpoint DIR --data DIR

PEER_DIR holds `peer.py`, the PyTorch side, which prints one JSON line for each workload; `--python` is a Python that has
its requirements. `stock` is torch as pip installs it, `tuned` has MKL on AVX-512 and an allocator that keeps its memory,
`torch_bf16` is that in bfloat16, compiled where it helps; `ours_bf16` multiplies in bfloat16 and adds in float32.
Prints a Markdown table of medians over all rounds, ratios and peak resident memory; the raw lines go to `--out`.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# name: (our workload, the PyTorch program's words, its line)
WORK = {
    "loading, every weight read": ("load", ["load"], "load"),
    "prefill, all logits": ("forward", ["forward"], "forward"),
    "certification, batch 32": ("certify_b32", ["certify", "--batch", "32"], "certify_b32"),
    "PGD-10, batch 1": ("pgd_b1", ["pgd", "--batch", "1"], "pgd_b1"),
    "PGD-10, batch 4": ("pgd_b4", ["pgd", "--batch", "4"], "pgd_b4"),
    "greedy decode, batch 1": ("generate_b1", ["generate", "--batch", "1", "--engine", "loop"], "generate_b1_loop"),
    "greedy decode, batch 8": ("generate_b8", ["generate", "--batch", "8", "--engine", "loop"], "generate_b8_loop"),
    "LoRA SFT step, batch 4": ("sft_lora", ["sft_lora"], "sft_lora"),
    "GRPO rollout, 2 x 8 x 64 tokens": ("grpo_rollout", ["grpo", "--engine", "loop"], "grpo_rollout_loop"),
    "GRPO update": ("grpo_update", ["grpo", "--engine", "loop"], "grpo_update"),
    "GRPO attack, PGD-5": ("grpo_attack_pgd5", ["grpo", "--engine", "loop"], "grpo_attack_pgd5"),
    "start to first answer": ("startup", ["startup"], "startup"),
}
# Sums of rows, as a training step is.
STEPS = {
    "GRPO step": ["GRPO rollout, 2 x 8 x 64 tokens", "GRPO update"],
    "AT-GRPO step": ["GRPO attack, PGD-5", "GRPO rollout, 2 x 8 x 64 tokens", "GRPO update"],
}
STARTUP = "start to first answer"
COMPILED = ("forward", "certify", "pgd")
OURS = {"ours": [], "ours_bf16": ["--bf16"]}
SIDES = ["ours", "ours_bf16", "tuned", "stock", "torch_bf16"]
# What is divided by what.
RATIOS = [("ours", "tuned"), ("ours", "stock"), ("ours_bf16", "torch_bf16")]


def words_of(side, words):
    """What the PyTorch program is told: torch in bfloat16 is compiled where that was found to help."""
    if side == "stock":
        return ["--tune", "stock", "--vision", "hf"]
    if side == "torch_bf16":
        return ["--dtype", "bf16", *(["--compile"] if words[0] in COMPILED else [])]
    return []


def parse():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--peer", type=Path, required=True)
    ap.add_argument("--python", default=sys.executable)
    ap.add_argument("--checkpoint", required=True)
    ap.add_argument("--data", required=True)
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--repeats", type=int, default=3)
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--only", nargs="+", default=[], help="our names of workloads")
    ap.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES)
    ap.add_argument("--out", type=Path, default=Path("versus_torch.jsonl"))
    ap.add_argument("--only-table", action="store_true", help="measure nothing, print the medians of --out")
    return ap.parse_args()


def our_program(name, *words):
    """An executable, as cargo names it."""
    out = subprocess.run(["cargo", *words, "--message-format", "json"],
                         cwd=ROOT, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    for line in out.splitlines():
        message = json.loads(line)
        if message.get("executable") and message["target"]["name"] == name:
            return message["executable"]
    raise SystemExit(f"cargo built no `{name}`")


def start_up(a, program, side):
    """Seconds from the start of a process to its answer about one image, for each repeat."""
    questions = next(Path(a.data, "QA_information").rglob("*.json"))
    row = json.loads(questions.read_text())[0]
    options = [word for c in "ABCD" for word in ("--option", row[f"option_{c}"])]
    command = [program, "predict", "--model", a.checkpoint, "--image", str(Path(a.data, row["image_path"])),
               "--question", row["question"], *options, "--scoring", "likelihood", "--threads", str(a.threads), "--quiet",
               *(["--arithmetic", "bf16"] if side == "ours_bf16" else [])]
    seconds = []
    for _ in range(a.repeats + 1):
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - started)
    return {"workload": "startup", "all_s": seconds[1:], "median_s": statistics.median(seconds[1:]), "peak_rss_mb": 0}


def run(a, side, ours, work):
    common = ["--checkpoint", a.checkpoint, "--data", a.data, "--repeats", str(a.repeats), "--threads", str(a.threads)]
    name, words, _ = WORK[work]
    if side in OURS:
        if work == STARTUP:
            return {name: start_up(a, ours["safemed"], side)}
        command = [ours["workloads"], *common, "--only", name, *OURS[side]]
    else:
        command = [a.python, str(a.peer / "peer.py"), *words, *common, *words_of(side, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return {line["workload"]: line for line in map(json.loads, done.stdout.splitlines())}


def main():
    a = parse()
    chosen = {work: WORK[work] for work in WORK if not a.only or WORK[work][0] in a.only}
    if not a.only_table:
        measure(a, chosen)
    print_table(a, chosen)


def measure(a, chosen):
    ours = {"workloads": our_program("workloads", "bench", "--no-run", "--bench", "workloads"),
            "safemed": our_program("safemed", "build", "--release")}
    with a.out.open("a") as raw:
        for round_ in range(a.rounds):
            for side in a.sides:
                cache = {}
                for work, (name, words, line_name) in chosen.items():
                    key = (name,) if side in OURS else tuple(words)
                    if key not in cache:
                        cache[key] = run(a, side, ours, work)
                    line = cache[key][name if side in OURS else line_name]
                    raw.write(json.dumps({"round": round_, "side": side, "time": time.time(), **line}) + "\n")
                    raw.flush()
                    print(f"round {round_} {side} {work}: {line['median_s']:.4g} s", file=sys.stderr, flush=True)


def print_table(a, chosen):
    """Medians of every line in `--out`: what was interrupted, or measured in several goes, is not lost."""
    lines = [json.loads(line) for line in a.out.read_text().splitlines()]
    seconds, memory = {}, {}
    for work, (name, _, line_name) in chosen.items():
        for line in lines:
            side = line["side"]
            if line["workload"] != (name if side in OURS else line_name) or side not in a.sides:
                continue
            # The other side maps its weights and reads them later: its line says what reading them takes too.
            read = line.get("seconds_with_every_weight_read")
            seconds.setdefault((work, side), []).extend([read] if read else line["all_s"])
            memory.setdefault((work, side), []).append(line["peak_rss_mb"])
    rounds = 1 + max(line["round"] for line in lines)
    print(f"{a.threads} threads, {os.cpu_count()} cores, {cpu_name()}, {time.strftime('%Y-%m-%d')}, {rounds} rounds of {a.repeats}\n")
    ratios = [(above, below) for above, below in RATIOS if above in a.sides and below in a.sides]
    heads = [f"{s}, s" for s in a.sides] + [f"{above} / {below}" for above, below in ratios] + [f"{s}, MiB" for s in a.sides]
    print("| work | " + " | ".join(heads) + " |")
    print("|---" * (1 + len(heads)) + "|")
    median = {key: statistics.median(values) for key, values in seconds.items()}
    peak = {key: statistics.median(values) for key, values in memory.items()}
    for step, parts in STEPS.items():
        for side in a.sides:
            if all((part, side) in median for part in parts):
                median[step, side] = sum(median[part, side] for part in parts)
                peak[step, side] = max(peak[part, side] for part in parts)
    for work in [*chosen, *STEPS]:
        known = [side for side in a.sides if (work, side) in median]
        if not known:
            continue
        cells = [f"{median[work, s]:.4g}" if s in known else "-" for s in a.sides]
        cells += [f"{median[work, above] / median[work, below]:.2f}" if {above, below} <= {*known} else "-" for above, below in ratios]
        print(f"| {work} | " + " | ".join(cells + [f"{peak[work, s]:.0f}" if s in known else "-" for s in a.sides]) + " |")


def cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
