"""Training without adapters on the PyTorch side: the whole decoder trains, the vision tower is frozen.

    python torch_side.py PEER_DIR sft_lora|grpo [options of peer.py]

Runs `peer.py`'s own workloads with every decoder weight in place of the LoRA matrices.
"""
import os
import sys

peer_dir = sys.argv.pop(1)
sys.path.insert(0, peer_dir)
sys.argv[0] = os.path.abspath(__file__)


def option(name, default):
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default


if __name__ == "__main__":
    tune = option("--tune", "full")
    if os.environ.get("PEER_TUNE") != tune:
        # Preloads and allocator settings take effect at process start only, before torch is imported.
        source = open(os.path.join(peer_dir, "peer.py")).read().split("\nif __name__")[0]
        head = {"__file__": os.path.join(peer_dir, "peer.py"), "__name__": "head"}
        exec(compile(source, "peer.py", "exec"), head)
        env = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
        env |= head["tuned_environment"](tune, int(option("--threads", "2")))
        os.execve(sys.executable, [sys.executable, sys.argv[0], peer_dir, *sys.argv[1:]], env)

    import torch

    import peer

    class WholeDecoder(peer.Bench):
        def lora(self):
            self.adapter = list(self.model.model.language_model.parameters())
            for parameter in self.adapter:
                parameter.requires_grad_(True)
            self.optimizer = torch.optim.AdamW(self.adapter, lr=1e-5, fused=True)

    args = peer.parse()
    torch.manual_seed(args.seed)
    bench = WholeDecoder(args)
    bench.lora()
    getattr(bench, args.workload)()
