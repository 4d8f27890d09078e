"""safemed beside PyTorch on the same work, in one run: each round runs one process of every side after the other.

    cargo bench --no-run
    python scripts/bench/versus_torch.py --peer PEER_DIR --python VENV/bin/python --checkpoint DIR --data DIR
    python scripts/bench/versus_torch.py ... --memory          # the same lines, with peak memory beside the times

PEER_DIR holds `peer.py`, the PyTorch side, which prints one JSON line for each workload; `--python` is a Python that has
its requirements. `stock` is torch as pip installs it, `tuned` has MKL on AVX-512 and an allocator that keeps its memory,
`tuned_compile` is that compiled, `torch_bf16` is that in bfloat16, compiled where it helps; `ours_bf16` multiplies in
bfloat16 and adds in float32. Prints a Markdown table of medians over all rounds, ratios, rates and peak resident memory; the
raw lines go to `--out`.

Peak memory is not that of the timed runs, whose allocator keeps what was freed: with `--memory` each workload is run once more
in a process of its own, as far as `peer.py` has it alone, without that allocator; those raw lines say `"memory": true`.
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

sys.dont_write_bytecode = True  # no cache of the script beside in the repository
from compare import operations  # noqa: E402

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
# Where compiling can do anything, and where it was found to help in bfloat16.
COMPILABLE = ("forward", "certify", "pgd", "generate", "sft_lora", "grpo")
COMPILED_BF16 = ("forward", "certify", "pgd")
# The PyTorch program holds a model already when it loads another: what it then takes is no figure of loading one.
NO_MEMORY = ("load",)
# Its rollouts draw from a model that was never trained, and what the last of them draws is what it updates on: where that is an
# image placeholder the program ends. After another number of repeats it is something else.
ATTEMPTS = 3
OURS = {"ours": [], "ours_bf16": ["--bf16"]}
SIDES = ["ours", "ours_bf16", "tuned", "tuned_compile", "stock", "torch_bf16"]
# What is divided by the fastest of what, row by row.
RATIOS = [("ours", ["tuned", "tuned_compile"]), ("ours", ["stock"]), ("ours_bf16", ["torch_bf16"])]
CEILING = "matmul_ceiling"
CEILING_SIDE = 2048


def words_of(side, words, for_memory):
    """What the PyTorch program is told; none where a side has nothing to say about a workload."""
    if for_memory and (side == "tuned_compile" or words[0] in NO_MEMORY):
        return None
    if side == "stock":
        return ["--tune", "stock", "--vision", "hf"]
    if for_memory:
        return ["--tune", "mkl", *(["--dtype", "bf16"] if side == "torch_bf16" else [])]
    if side == "torch_bf16":
        return ["--dtype", "bf16", *(["--compile"] if words[0] in COMPILED_BF16 else [])]
    if side == "tuned_compile":
        return ["--compile"] if words[0] in COMPILABLE else None
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
    ap.add_argument("--memory", action="store_true", help="measure no times, but memory: every workload once, by itself")
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


def run_to_end(command):
    """Seconds that a process takes, and its peak resident memory in MiB."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    # macOS counts bytes, everything else kibibytes.
    return time.perf_counter() - started, usage.ru_maxrss // (1 << 20 if sys.platform == "darwin" else 1 << 10)


def start_up(a, program, side):
    """Seconds from the start of a process to its answer about one image, for each repeat."""
    questions = next(Path(a.data, "QA_information").rglob("*.json"))
    row = json.loads(questions.read_text())[0]
    options = [word for c in "ABCD" for word in ("--option", row[f"option_{c}"])]
    command = [program, "predict", "--model", a.checkpoint, "--image", str(Path(a.data, row["image_path"])),
               "--question", row["question"], *options, "--scoring", "likelihood", "--threads", str(a.threads), "--quiet",
               *(["--arithmetic", "bf16"] if side == "ours_bf16" else [])]
    runs = [run_to_end(command) for _ in range(repeats(a) + 1)][1:]
    seconds = [seconds for seconds, _ in runs]
    return {"workload": "startup", "all_s": seconds, "median_s": statistics.median(seconds), "peak_rss_mb": max(peak for _, peak in runs)}


def repeats(a):
    return 1 if a.memory else a.repeats


def run(a, side, ours, work):
    """Lines by workload; none where the side has nothing to say."""
    common = ["--checkpoint", a.checkpoint, "--data", a.data, "--threads", str(a.threads)]
    name, words, line_name = WORK[work]
    if side in OURS:
        if work == STARTUP:
            return {name: start_up(a, ours["safemed"], side)}
        command = [ours["workloads"], *common, "--only", name, *OURS[side]]
    else:
        own = words_of(side, words, a.memory)
        if own is None:
            return {}
        if work == STARTUP and a.memory:
            # Its own line would be about the process that starts the others.
            command = [a.python, str(a.peer / "peer.py"), "first_answer", *common, "--repeats", "1", *own]
            seconds, peak = run_to_end(command)
            return {line_name: {"workload": line_name, "all_s": [seconds], "median_s": seconds, "peak_rss_mb": peak}}
        command = [a.python, str(a.peer / "peer.py"), *words, *common, *own]
    for more in range(1 if side in OURS else ATTEMPTS):
        again = [*command, "--repeats", str(repeats(a) + more)]
        done = subprocess.run(again, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if not done.returncode:
            break
    else:
        raise SystemExit(f"{' '.join(again)} failed:\n{done.stderr[-2000:]}")
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
    ceiling = None if a.memory else our_program("operations", "bench", "--no-run", "--bench", "operations")
    with a.out.open("a") as raw:
        def write(round_, side, line):
            raw.write(json.dumps({"round": round_, "side": side, "memory": a.memory, "time": time.time(), **line}) + "\n")
            raw.flush()

        for round_ in range(1 if a.memory else a.rounds):
            for side in a.sides:
                cache = {}
                if side == "ours" and ceiling:
                    write(round_, side, {"workload": CEILING, "gflop_per_s": our_ceiling(a, ceiling)})
                for work, (name, words, line_name) in chosen.items():
                    key = (name,) if side in OURS else tuple(words)
                    if key not in cache:
                        cache[key] = run(a, side, ours, work)
                    line = cache[key].get(name if side in OURS else line_name)
                    if line:
                        write(round_, side, line)
                        found = f"{line['peak_rss_mb']} MiB" if a.memory else f"{line['median_s']:.4g} s"
                        print(f"round {round_} {side} {work}: {found}", file=sys.stderr, flush=True)


def our_ceiling(a, program):
    """GFLOP/s of the product of two large matrices, the most that any workload can come to."""
    found = operations(program, ["ceiling"], {**os.environ, "RAYON_NUM_THREADS": str(a.threads)})
    return 2 * CEILING_SIDE**3 / min(found.values()) / 1e9


class Figures:
    """Medians of every line in `--out`: what was interrupted, or measured in several goes, is not lost."""

    def __init__(self, a, chosen):
        lines = [json.loads(line) for line in a.out.read_text().splitlines()]
        seconds, memory = {}, {}
        # GFLOP of a unit as the PyTorch side counts them, and GFLOP/s of a large matrix product on either side.
        self.gflop, self.ceiling = {}, {}
        self.rounds = 1 + max((line["round"] for line in lines if not line.get("memory")), default=-1)
        for line in lines:
            if line["workload"] == CEILING:
                self.ceiling["ours"] = max(self.ceiling.get("ours", 0), line["gflop_per_s"])
            elif line["side"] == "tuned" and "matmul_peak_gflop_per_s" in line:
                self.ceiling["tuned"] = max(self.ceiling.get("tuned", 0), line["matmul_peak_gflop_per_s"])
        for work, (name, _, line_name) in chosen.items():
            for line in lines:
                side = line["side"]
                if line["workload"] != (name if side in OURS else line_name) or side not in a.sides:
                    continue
                if line.get("memory"):
                    memory.setdefault((work, side), []).append(line["peak_rss_mb"])
                    continue
                # The other side maps its weights and reads them later: its line says what reading them takes too.
                read = line.get("seconds_with_every_weight_read")
                seconds.setdefault((work, side), []).extend([read] if read else line["all_s"])
                if "gflop_per_unit" in line:
                    self.gflop[work] = line["gflop_per_unit"]
        self.median = {key: statistics.median(values) for key, values in seconds.items()}
        self.peak = {key: statistics.median(values) for key, values in memory.items()}
        for step, parts in STEPS.items():
            for side in a.sides:
                if all((part, side) in self.median for part in parts):
                    self.median[step, side] = sum(self.median[part, side] for part in parts)
                if all((part, side) in self.peak for part in parts):
                    self.peak[step, side] = max(self.peak[part, side] for part in parts)
            if all(part in self.gflop for part in parts):
                self.gflop[step] = sum(self.gflop[part] for part in parts)

    def fastest(self, work, sides):
        """The least median of these sides, of a step the sum over its parts of the least of each; none without any."""
        if work in STEPS:
            parts = [self.fastest(part, sides) for part in STEPS[work]]
            return None if None in parts else sum(parts)
        return min((self.median[work, side] for side in sides if (work, side) in self.median), default=None)

    def ratio(self, work, above, below):
        below = self.fastest(work, below)
        return self.median[work, above] / below if below and (work, above) in self.median else None

    def rates(self, work):
        """GFLOP of a unit, GFLOP/s that ours comes to, and the share of what a large matrix product comes to, in per cent."""
        gflop, ours, ceiling = self.gflop.get(work), self.median.get((work, "ours")), self.ceiling.get("ours")
        rate = gflop / ours if gflop and ours else None
        return gflop, rate, 100 * rate / ceiling if rate and ceiling else None


def print_table(a, chosen):
    figures = Figures(a, chosen)
    print(f"{a.threads} threads, {os.cpu_count()} cores, {cpu_name()}, {time.strftime('%Y-%m-%d')}, {figures.rounds} rounds of {a.repeats}\n")
    ratios = [(above, below) for above, below in RATIOS if above in a.sides and {*below} & {*a.sides}]
    measured = [side for side in a.sides if any(other == side for _, other in figures.peak)]
    heads = [f"{s}, s" for s in a.sides] + [f"{above} / {below[0]}" for above, below in ratios]
    heads += ["GFLOP", "ours, GFLOP/s", "ours, % of ceiling"] + [f"{s}, MiB" for s in measured]
    print("| work | " + " | ".join(heads) + " |")
    print("|---" * (1 + len(heads)) + "|")

    def cell(value, digits):
        return "-" if value is None else f"{value:{digits}}"

    for work in [*chosen, *STEPS]:
        if not any((work, side) in {**figures.median, **figures.peak} for side in a.sides):
            continue
        cells = [cell(figures.median.get((work, side)), ".4g") for side in a.sides]
        cells += [cell(figures.ratio(work, above, below), ".2f") for above, below in ratios]
        cells += [cell(value, digits) for value, digits in zip(figures.rates(work), (".4g", ".0f", ".0f"))]
        print(f"| {work} | " + " | ".join(cells + [cell(figures.peak.get((work, side)), ".0f") for side in measured]) + " |")
    print_legend(a, figures, measured)


def print_legend(a, figures, measured):
    known = [f"{side} {gflops:.0f} GFLOP/s" for side, gflops in figures.ceiling.items()]
    print(f"\nCeiling: a float32 product of two {CEILING_SIDE} x {CEILING_SIDE} matrices, {', '.join(known) or 'not measured'}.")
    print("GFLOP: of a unit when nothing is left out, as the PyTorch side counts it; where ours leaves work out, its rate is that much above what it multiplies.")
    if {"tuned", "tuned_compile"} <= {*a.sides}:
        print("ours / tuned: by the faster of `tuned` and `tuned_compile` in each row, of a step in each of its parts.")
    if measured:
        print("MiB: of separate short runs, one workload a process (but torch's rows of GRPO share one), torch without the allocator that keeps freed memory, ours with its own, which does.")
    else:
        print("MiB: not measured; `--memory` does.")


def cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
