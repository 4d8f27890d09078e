"""Two commits beside each other: every operation and every workload, interleaved, and what became slower.

    python scripts/bench/compare.py BASE [HEAD] [--rounds 3] [--only WORD ...] [--tolerance 0.05]

Checks both out beside the repository's own tree (in `--work`, which keeps the builds), builds `benches/operations` and
`benches/workloads` of each, and runs them alternately, so that a slow minute of the machine meets both. HEAD is the present commit
unless given. Prints each median of BASE and HEAD with their ratio, the slower ones last. Exit status: 0, or 5 when one is slower by more
than `--tolerance`.
"""
import argparse
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SECONDS = {"s": 1.0, "ms": 1e-3, "µs": 1e-6, "ns": 1e-9}


def parse():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("base")
    ap.add_argument("head", nargs="?", default="HEAD")
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--only", nargs="+", default=[], help="operations and workloads whose name has one of these words")
    ap.add_argument("--tolerance", type=float, default=0.05)
    ap.add_argument("--work", type=Path, default=ROOT / "target" / "compare")
    return ap.parse_args()


def git(*words, cwd=ROOT):
    done = subprocess.run(["git", *words], cwd=cwd, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()


def build(commit, work):
    """The benchmark programs of a commit, by name."""
    tree = work / commit
    if not tree.exists():
        git("clone", "--quiet", "--shared", "--no-checkout", str(ROOT), str(tree))
        git("checkout", "--quiet", commit, cwd=tree)
    words = ["cargo", "bench", "--benches", "--no-run", "--locked", "--message-format", "json"]
    out = subprocess.run(words, cwd=tree, check=True, stdout=subprocess.PIPE, text=True).stdout
    programs = {}
    for message in map(json.loads, out.splitlines()):
        if message.get("executable") and "bench" in message["target"]["kind"]:
            programs[message["target"]["name"]] = message["executable"]
    return programs


def workloads(program, only):
    words = ["--only", *only] if only else []
    done = subprocess.run([program, *words], stdout=subprocess.PIPE, check=True, text=True)
    return {line["workload"]: line["median_s"] for line in map(json.loads, done.stdout.splitlines())}


def operations(program, only, env=None):
    """Medians out of divan's table: a line of a benchmark has its name, and columns of times between bars."""
    done = subprocess.run([program, "--bench", *only], stdout=subprocess.PIPE, check=True, text=True, env=env)
    found, parents = {}, {}
    for line in done.stdout.splitlines():
        head = re.match(r"([│ ]*)[├╰]─ (.*)", line)
        if not head:
            continue
        depth, rest = len(head[1]), head[2]
        columns = [part.strip() for part in rest.split("│")]
        name = re.split(r"\s{2,}", columns[0])[0]
        parents = {d: n for d, n in parents.items() if d < depth}
        parents[depth] = name
        time = re.fullmatch(r"([\d.]+) (s|ms|µs|ns)", columns[2]) if len(columns) > 2 else None
        if time:
            found["/".join(parents[d] for d in sorted(parents))] = float(time[1]) * SECONDS[time[2]]
    return found


def main():
    a = parse()
    commits = [git("rev-parse", "--short", "--verify", f"{name}^{{commit}}") for name in (a.base, a.head)]
    programs = [build(commit, a.work) for commit in commits]
    times = [{}, {}]
    for _ in range(a.rounds):
        for side, own in enumerate(programs):
            for name, run in (("operations", operations), ("workloads", workloads)):
                if name in own:
                    for key, seconds in run(own[name], a.only).items():
                        times[side].setdefault(key, []).append(seconds)
    rows = []
    for key in times[1]:
        if key in times[0]:
            base, head = (statistics.median(side[key]) for side in times)
            rows.append((head / base, key, base, head))
    print(f"| | {commits[0]}, s | {commits[1]}, s | ratio |\n|---|---|---|---|")
    for ratio, key, base, head in sorted(rows):
        print(f"| {key} | {base:.4g} | {head:.4g} | {ratio:.2f} |")
    slower = [key for ratio, key, _, _ in rows if ratio > 1 + a.tolerance]
    for key in slower:
        print(f"slower: {key}", file=sys.stderr)
    sys.exit(5 if slower else 0)


if __name__ == "__main__":
    main()
