"""Every row of the training tables: trainings from `configs/`, several seeds, each model clean, attacked and certified.

    cargo build --release
    safemed data phantom --out phantoms --train-items 20000
    python3 scripts/tables.py --data phantoms --configs phantom --out tables/phantom
    python3 scripts/tables.py --data ROOT --configs minimed --out tables/minimed
    python3 scripts/tables.py --data ROOT --configs minimed --out tables/minimed --split validation --rows ablations --measures eval pgd --seeds 0

ROOT is an OmniMedVQA root with `splits/train.json` and `splits/test.json`. One in ten images of the training split is held
out for choices (`validation.json`); the test split is only measured. `ablations` change one thing each of what a row's
configuration says. Every part is an ordinary safemed run below `--out`, resumed where it stopped; a part that is complete is
not done again. `--jobs` parts run side by side, one thread each. Prints Markdown: for each row the mean over seeds with the
half-width of a 95 % t interval over seeds, the seeds' values, the image-blind controls beside it, what its training took, and
the share of its groups whose rewards were all equal.
"""
import argparse
import hashlib
import json
import math
import statistics
import subprocess
import sys
import threading
import tomllib
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# name: (configuration, what it starts from, what differs from the configuration)
TRAININGS = {
    "captions": ("captions", None),
    "sft_cot": ("sft_cot", "captions"),
    "instruct_captions": ("instruct_captions", "sft_cot"),
    "sft_instruct": ("sft_instruct", "instruct_captions"),
    "at_sft": ("at_sft", "sft_cot"),
    "grpo": ("grpo", "sft_cot"),
    "at_grpo": ("at_grpo", "sft_cot"),
    # The best of its variants on the held-out images; of the real images alone.
    "at_grpo_kl": ("at_grpo_kl", "sft_cot"),
    # A second stage of either kind over the first, at a like cost.
    "at_sft_at_sft": ("at_sft", "at_sft"),
    "at_sft_at_grpo": ("at_grpo", "at_sft"),
}
ROWS = [name for name in TRAININGS if "captions" not in name]
# One thing each that is different in AT-GRPO, or in adversarial SFT.
ABLATIONS = {
    "at_grpo+resampled": ("at_grpo", "sft_cot", "train.grpo.max_resamples=3"),
    "at_grpo+group_16": ("at_grpo", "sft_cot", "train.grpo.group_size=16"),
    "at_grpo+two_updates": ("at_grpo", "sft_cot", "train.grpo.num_updates=2"),
    "at_grpo+attack_reward": ("at_grpo", "sft_cot", "train.adversary.objective=expected_reward"),
    "at_grpo+attack_letter": ("at_grpo", "sft_cot", "train.adversary.objective=answer"),
    "at_grpo+quarter_rate": ("at_grpo", "sft_cot", "train.learning_rate=2e-4"),
    "at_grpo+cooler": ("at_grpo", "sft_cot", "train.grpo.temperature=1.0"),
    "at_grpo+half_clean": ("at_grpo", "sft_cot", "train.adversary.clean_fraction=0.5"),
    "at_grpo+pgd_5": ("at_grpo", "sft_cot", "train.adversary.num_steps=5"),
    "at_grpo+steps_x3": ("at_grpo", "sft_cot", "train.num_steps=x3"),
    "at_sft+quarter_rate": ("at_sft", "sft_cot", "train.learning_rate=2.5e-4"),
    "at_sft+steps_x3": ("at_sft", "sft_cot", "train.num_steps=x3"),
    "at_grpo_kl+resampled": ("at_grpo_kl", "sft_cot", "train.grpo.max_resamples=3"),
    "at_grpo_kl+two_updates": ("at_grpo_kl", "sft_cot", "train.grpo.num_updates=2"),
    "at_sft_at_grpo_kl": ("at_grpo_kl", "at_sft"),
    "trades": ("at_sft", "sft_cot", "train.recipe=trades"),
}
EPSILON = "8/255"
SIGMA = "0.25"
MEASURES = ["eval", "pgd", "auto", "certify"]
RADII = (0.25, 0.5)
CONTROLS = ("blank_image", "shuffled_image", "option_prior")
# Two-sided 95 % points of Student's t by degrees of freedom.
T_POINTS = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def parse():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--safemed", type=Path, default=ROOT / "target/release/safemed")
    ap.add_argument("--data", type=Path, required=True)
    ap.add_argument("--configs", choices=["phantom", "minimed"], required=True)
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    ap.add_argument("--rows", nargs="+", choices=[*ROWS, *ABLATIONS, "ablations"], help="default: those that have a configuration")
    ap.add_argument("--measures", nargs="+", default=MEASURES, choices=MEASURES)
    ap.add_argument("--jobs", type=int, default=2)
    ap.add_argument("--attack-items", type=int, default=200, help="questions attacked, even over types")
    ap.add_argument("--certify-items", type=int, default=64)
    ap.add_argument("--split", default="test", help="the split that is measured")
    ap.add_argument("--only-tables", action="store_true", help="run nothing, print what is there")
    args = ap.parse_args()
    args.rows = args.rows or [row for row in ROWS if (ROOT / f"configs/{args.configs}_{TRAININGS[row][0]}.toml").exists()]
    args.rows = [name for row in args.rows for name in (["at_sft", "at_grpo", "at_grpo_kl", *ABLATIONS] if row == "ablations" else [row])]
    return args


def questions(root):
    """Every question by id, as the files under QA_information hold them."""
    found = {}
    for path in sorted((root / "QA_information").rglob("*.json")):
        for record in json.loads(path.read_text()):
            found[record["question_id"]] = record
    return found


def write_splits(args):
    """The training split without its held-out images, and subsets of the measured split for what is expensive."""
    splits = args.out / "splits"
    splits.mkdir(parents=True, exist_ok=True)
    known = questions(args.data)
    train = json.loads((args.data / "splits/train.json").read_text())

    def is_held_out(name):
        image = known[name]["image_path"]
        return int(hashlib.sha256(image.encode()).hexdigest(), 16) % 10 == 0

    held_out = [name for name in train if is_held_out(name)]
    write(splits / "train.json", [name for name in train if not is_held_out(name)])
    write(splits / "validation.json", held_out)
    own = args.data / f"splits/{args.split}.json"
    measured = held_out if args.split == "validation" else json.loads(own.read_text())
    write(splits / f"{args.split}.json", measured)
    for name, count in [("attack", args.attack_items), ("certify", args.certify_items)]:
        write(splits / f"{args.split}-{name}.json", even(measured, known, count))


def even(ids, known, count):
    """`count` ids, as many of each question type as there are, in an order that says nothing."""
    shuffled = sorted(ids, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    by_type = {}
    for name in shuffled:
        by_type.setdefault(known[name]["question_type"], []).append(name)
    chosen = []
    while len(chosen) < min(count, len(ids)):
        for names in by_type.values():
            if names and len(chosen) < count:
                chosen.append(names.pop(0))
    return sorted(chosen)


def write(path, ids):
    path.write_text(json.dumps(ids, indent=0) + "\n")


class Board:
    """Parts of one seed, each done once whatever asks for it."""

    def __init__(self, args, seed):
        self.args, self.seed = args, seed
        self.dir = args.out / f"seed{seed}"
        self.locks = {}
        self.guard = threading.Lock()

    def run(self, name, words):
        """Runs one safemed command with its output directory `name`, unless it is complete."""
        out = self.dir / name
        with self.guard:
            lock = self.locks.setdefault(name, threading.Lock())
        with lock:
            if (out / "summary.json").exists():
                return out
            if self.args.only_tables:
                raise FileNotFoundError(out)
            self.dir.mkdir(parents=True, exist_ok=True)
            command = [str(self.args.safemed), *words, "--out", str(out), "--resume", "--threads", "1", "--seed", str(self.seed)]
            command += ["--omnimedvqa", str(self.args.data), "--no-images", "-q"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                sys.exit(f"{' '.join(command)}\nexit {done.returncode}\n{done.stderr}")
            print(f"seed {self.seed}: {name}", file=sys.stderr, flush=True)
        return out

    def config(self, name):
        return str(ROOT / f"configs/{self.args.configs}_{name}.toml")

    def split(self, name):
        return str(self.args.out / f"splits/{name}.json")

    def model(self, name):
        """The directory of a trained model; what it starts from is trained first."""
        config, start, *different = {**TRAININGS, **ABLATIONS}[name]
        words = ["train", "--config", self.config(config), "--split", self.split("train")]
        for setting in different:
            if setting == "train.num_steps=x3":
                of_config = tomllib.loads(Path(self.config(config)).read_text())
                setting = f"train.num_steps={3 * of_config['train']['num_steps']}"
            words += ["--set", setting]
        if start:
            words += ["--model", str(self.model(start))]
        out = self.run(name, words)
        return out / json.loads((out / "summary.json").read_text())["checkpoint"]

    def measure(self, row, what):
        model = self.model(row)
        of = "sft_instruct" if row == "sft_instruct" else "sft_cot"
        asked = ["--config", self.config(of), "--model", str(model), "--batch-size", "32"]
        split = self.args.split
        suffix = "" if split == "test" else f"-{split}"
        words = {
            "eval": ["eval", "--split", self.split(split), "--train-split", self.split("train")],
            "pgd": ["attack", "--split", self.split(f"{split}-attack"), "--train-split", self.split("train"), "--epsilon", EPSILON],
            "auto": ["attack", "--method", "auto", "--split", self.split(f"{split}-attack"), "--train-split", self.split("train"), "--epsilon", EPSILON],
            "certify": ["certify", "--split", self.split(f"{split}-certify"), "--train-split", self.split("train"), "--sigma", SIGMA, "--n0", "32", "--n", "1000"],
        }[what]
        return self.run(f"{row}-{what}{suffix}", [words[0], *asked, *words[1:]])


def summary(path):
    return json.loads((path / "summary.json").read_text())


def interval(values):
    """Half of a 95 % t interval of the mean."""
    if len(values) < 2:
        return math.nan
    return T_POINTS[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))


def cell(values):
    if not values:
        return "-"
    mean = 100 * statistics.mean(values)
    each = ", ".join(f"{100 * value:.1f}" for value in values)
    return f"{mean:.1f} ± {100 * interval(values):.1f} ({each})" if len(values) > 1 else f"{mean:.1f}"


def certified_at(found, radius):
    return max((share for at, share in found["certified_accuracy"] if at >= radius - 1e-9), default=0.0)


def seconds_of(board, name):
    lines = [json.loads(line) for line in (board.dir / name / "timings.jsonl").read_text().splitlines()]
    steps = [line["seconds"] for line in lines if line["what"] == "step"]
    return sum(steps), len(steps)


def flat_groups(board, name):
    """The mean share of groups that taught nothing, for their rewards were all equal; none of a training without groups."""
    path = board.dir / name / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    metrics = map(json.loads, lines)
    shares = [line.get("frac_groups_zero_std", line.get("frac_reward_zero_std")) for line in metrics]
    return statistics.mean(shares) if shares and None not in shares else None


def tables(args, boards):
    def collect(row, what, read):
        values = []
        for board in boards:
            try:
                values.append(read(summary(board.measure(row, what))))
            except FileNotFoundError:
                pass
        return values

    print(f"\n{args.configs}, split `{args.split}`; {args.attack_items} questions attacked at {EPSILON}, {args.certify_items} certified; seeds {', '.join(map(str, args.seeds))}; percent, mean ± half of a 95 % t interval over seeds (each seed)\n")
    print("| row | clean | PGD-10 | auto | certified 0.25 | certified 0.5 | blank | shuffled | option prior | training, s a step x steps | flat groups |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for row in args.rows:
        control = {name: collect(row, "eval", lambda s, name=name: s["controls"][name]) for name in CONTROLS}
        costs = [seconds_of(board, row) for board in boards if (board.dir / row / "summary.json").exists()]
        cost = f"{statistics.mean(total / count for total, count in costs):.3f} x {costs[0][1]}" if costs else "-"
        cells = [
            cell(collect(row, "eval", lambda s: s["accuracy"])),
            cell(collect(row, "pgd", lambda s: s["robust_accuracy"])),
            cell(collect(row, "auto", lambda s: s["robust_accuracy"])),
            *(cell(collect(row, "certify", lambda s, radius=radius: certified_at(s, radius))) for radius in RADII),
            *(f"{100 * statistics.mean(values):.1f}" if values else "-" for values in control.values()),
        ]
        flat = [share for share in (flat_groups(board, row) for board in boards) if share is not None]
        print(f"| {row} | {' | '.join(cells)} | {cost} | {f'{100 * statistics.mean(flat):.0f} %' if flat else '-'} |")
    by_type(args, boards)


def by_type(args, boards):
    """By question type, of the questions that `auto` attacked: clean, the best blind control, under attack, and the share kept
    of what lies above that control. The clean accuracy of all questions of the split stands beside."""
    for row in args.rows:
        found = []
        for board in boards:
            try:
                found.append((summary(board.measure(row, "eval")), records(board.measure(row, "auto"))))
            except FileNotFoundError:
                pass
        if not found:
            continue
        print(f"\n{row}: by question type\n\n| type (attacked) | clean, all | clean | best blind control | `auto` | kept of what is above it |\n|---|---|---|---|---|---|")
        for kind in sorted(found[0][0]["by_question_type"]):
            columns = {"all": [], "clean": [], "blind": [], "robust": []}
            for evaluated, attacked in found:
                own = [record for record in attacked if record["question_type"] == kind]
                if not own:
                    continue
                clean = share(record["clean_correct"] for record in own)
                robust = share(record["robust_correct"] for record in own)
                blind = max(share(record["controls"][name] == record["answer"] for record in own) for name in CONTROLS)
                columns["all"].append(evaluated["by_question_type"][kind])
                columns["clean"].append(clean)
                columns["blind"].append(blind)
                columns["robust"].append(robust)
            clean, blind, robust = (sum(columns[name]) for name in ("clean", "blind", "robust"))
            # Of next to nothing a share says nothing.
            above = clean - blind > 0.05 * len(found)
            kept = f"{100 * (robust - blind) / (clean - blind):.0f}" if above else "-"
            print(f"| {kind} ({len(own)}) | {' | '.join(cell(values) for values in columns.values())} | {kept} |")


def records(run):
    return [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]


def share(truths):
    truths = list(truths)
    return sum(truths) / len(truths)


def main():
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    write_splits(args)
    boards = [Board(args, seed) for seed in args.seeds]
    if not args.only_tables:
        # Trainings first, the seeds side by side, so that no part waits for another's lock for long.
        work = [(board, row, what) for what in args.measures for row in args.rows for board in boards]
        with ThreadPoolExecutor(args.jobs) as pool:
            for future in as_completed([pool.submit(board.measure, row, what) for board, row, what in work]):
                future.result()
        args.only_tables = True
    tables(args, boards)


if __name__ == "__main__":
    main()
