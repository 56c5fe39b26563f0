"""One DINO step against the original code's: samples/s, peak memory, MFU, at the same batch, crops and precision.

The original is run from a checkout that is not part of this repository:

    git clone https://github.com/facebookresearch/dino ORIGINAL/dino
    git clone https://github.com/facebookresearch/xcit ORIGINAL/xcit
    python benchmarks/train_step.py --original ORIGINAL    # XCiT-M24/16 on a GPU, something small on a CPU
    python benchmarks/train_step.py --original ORIGINAL --model vit_small_patch16_224 --crops 2+8 --batch 64

Its step is that of ``main_dino.train_one_epoch``: its networks, head, loss, clipping, AdamW and EMA, both networks
wrapped for several ranks, BatchNorm synchronised where there is a GPU. Only the number of global crops, 2 in its code,
is free here. It is given views that are ready on the device; Bony's step makes its own from uint8 tiles, and is timed
with and without that. The original's student encodes the global crops too; with 1+5, where only the teacher needs that
one, ``same views`` leaves it out, as Bony does. Without a GPU the sizes are small, and the figures say no more than
that the script runs.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

# This file's folder stands first, where ``import tiling`` would find benchmarks/tiling.py.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.config import MethodConfig, ModelConfig, OptimConfig, PretrainConfig, TrainConfig, ViewsConfig
from pipeline.data.loader import Batch
from pipeline.flops import flops_per_sample, peak
from pipeline.methods import build_method
from pipeline.methods.protocol import Moment
from pipeline.runtime import Runtime, autocast, half_precision
from pipeline.trainer import Trainer

# Not XCiT nano: the original changes in place there what PyTorch needs for its gradient.
ORIGINAL_NAMES = {
    "xcit_medium_24_p16_224": "xcit_medium_24_p16", "xcit_small_12_p16_224": "xcit_small_12_p16",
    "xcit_tiny_12_p16_224": "xcit_tiny_12_p16",
    "vit_small_patch16_224": "vit_small", "vit_tiny_patch16_224": "vit_tiny",
}  # fmt: skip
WARM_UP = 3


@dataclass(frozen=True)
class Case:
    """What is compared."""

    model: str
    global_crops: int
    local_crops: int
    batch: int
    precision: str
    out_dim: int
    steps: int
    device: torch.device

    def config(self, compile_it: bool = False, recompute: bool = False) -> PretrainConfig:
        """The same for Bony."""
        return PretrainConfig(
            model=ModelConfig(self.model, drop_path=0.1),
            method=MethodConfig(out_dim=self.out_dim, freeze_last_layer_epochs=0.0),
            views=ViewsConfig(self.global_crops, self.local_crops, preset="original"),
            optim=OptimConfig(warmup_steps=10),
            train=TrainConfig(
                self.batch, accumulate=1, steps=10_000, precision=self.precision, compile=compile_it,
                recompute=recompute,
            ),
        )  # fmt: skip


Step = Callable[[int], None]


def bony(case: Case, ready: bool = False, compile_it: bool = False, recompute: bool = False) -> Step:
    """Bony's step on tiles that are on the device; ``ready`` gives it views as the original gets them."""
    config = case.config(compile_it, recompute)
    runtime = Runtime(0, 1, case.device)
    trainer = Trainer(config, runtime, build_method(config, runtime, None))  # type: ignore[arg-type]  # no store here
    ids = np.arange(case.batch)
    tiles = torch.randint(0, 256, (case.batch, 224, 224, 3), dtype=torch.uint8, device=case.device)
    batch = Batch(ids, np.zeros_like(ids), tiles)
    if ready:
        views = trainer.views(batch)
        trainer.views = lambda batch: views  # type: ignore[method-assign]

    def step(number: int) -> None:
        trainer.step(iter([batch]), Moment(number, 10_000, 1.0))
        if number % config.train.log_every == 0:
            trainer.require_finite()

    return step


class OriginalLoss(nn.Module):
    """The original's DINOLoss, whose 2 global crops are a number here."""

    def __init__(self, out_dim: int, global_crops: int, seen: list[int]) -> None:
        super().__init__()
        self.global_crops, self.seen = global_crops, seen
        self.register_buffer("center", torch.zeros(1, out_dim))

    def forward(self, student_output: torch.Tensor, teacher_output: torch.Tensor) -> torch.Tensor:
        """Loss of all crops' outputs, one after the other; moves the centre."""
        student = (student_output / 0.1).chunk(len(self.seen))
        teacher = functional.softmax((teacher_output - self.center) / 0.04, dim=-1).detach().chunk(self.global_crops)
        terms = [
            torch.sum(-q * functional.log_softmax(out, dim=-1), dim=-1).mean()
            for iq, q in enumerate(teacher)
            for view, out in zip(self.seen, student, strict=True)
            if view != iq
        ]
        with torch.no_grad():
            mean = torch.sum(teacher_output, dim=0, keepdim=True)
            dist.all_reduce(mean)
            self.center = self.center * 0.9 + mean / (len(teacher_output) * dist.get_world_size()) * 0.1
        return sum(terms) / len(terms)


def for_the_cpu(module: nn.Module) -> None:
    """Plain BatchNorm for the original's synchronised one, which PyTorch has for GPUs only."""
    for name, child in module.named_children():
        if isinstance(child, nn.SyncBatchNorm):
            setattr(module, name, nn.BatchNorm2d(child.num_features))
        else:
            for_the_cpu(child)


class Original:
    """The original's networks, and its step on views that are on the device.

    Args:
        case: What is compared.
        folder: With its ``dino/`` and ``xcit/``.
        same_views: Whether the student leaves out a global crop that is the teacher's only one.
    """

    def __init__(self, case: Case, folder: Path, same_views: bool) -> None:
        for name in ("xcit", "dino"):  # both have a utils.py: the last one comes first
            sys.path.insert(0, str(folder / name))
        import utils

        self.case, self.utils = case, utils
        self.student, self.teacher, self.bare = self._networks()
        sizes = [224] * case.global_crops + [96] * case.local_crops
        self.views = [torch.randn(case.batch, 3, size, size, device=case.device) for size in sizes]
        self.seen = list(range(1 if same_views and case.global_crops == 1 else 0, len(sizes)))
        self.loss_of = OriginalLoss(case.out_dim, case.global_crops, self.seen).to(case.device)
        self.optimizer = torch.optim.AdamW(utils.get_params_groups(self.student), lr=5e-4)
        self.half = half_precision(case.device, case.precision)
        self.scaler = torch.amp.GradScaler(case.device.type, enabled=self.half is torch.float16)

    def _networks(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """Student and teacher, wrapped, and the teacher bare, as main_dino.train_dino makes them."""
        import vision_transformer
        import xcit

        case, name = self.case, ORIGINAL_NAMES[self.case.model]
        build = vars(xcit if name.startswith("xcit") else vision_transformer)[name]
        made = []
        for drop_path in (0.1, 0.0):
            backbone = build(drop_path_rate=drop_path)
            head = vision_transformer.DINOHead(backbone.embed_dim, case.out_dim)
            made.append(self.utils.MultiCropWrapper(backbone, head).to(case.device))
        norms = self.utils.has_batchnorms(made[0])
        if norms and case.device.type == "cuda":
            made = [nn.SyncBatchNorm.convert_sync_batchnorm(network) for network in made]
        elif norms:
            for network in made:
                for_the_cpu(network)
        student, bare = made
        student = DistributedDataParallel(student)
        teacher = DistributedDataParallel(bare) if norms else bare
        bare.load_state_dict(student.module.state_dict())
        bare.requires_grad_(False)
        return student, teacher, bare

    def __call__(self, number: int) -> None:
        """One pass of the loop of main_dino.train_one_epoch."""
        with autocast(self.case.device, self.half):
            taught = self.teacher(self.views[: self.case.global_crops])
            loss = self.loss_of(self.student([self.views[n] for n in self.seen]), taught)
        if not np.isfinite(loss.item()):
            raise SystemExit("the original's loss is not finite")
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        self.utils.clip_gradients(self.student, 3.0)
        self.utils.cancel_gradients_last_layer(1, self.student, 1)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            for new, old in zip(self.student.module.parameters(), self.bare.parameters(), strict=True):
                old.data.mul_(0.996).add_((1 - 0.996) * new.detach().data)
        if self.case.device.type == "cuda":
            torch.cuda.synchronize()


def timed(build: Callable[[], Step], case: Case) -> dict[str, float]:
    """Build, warm up, time; everything is released afterwards."""
    on_gpu = case.device.type == "cuda"
    step = build()
    for number in range(WARM_UP):
        step(number)
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for number in range(WARM_UP, WARM_UP + case.steps):
        step(number)
    if on_gpu:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / case.steps
    memory = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else float("nan")
    del step
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    return {"samples_per_s": case.batch / seconds, "memory_gib": memory}


def contenders(case: Case, folder: Path | None, compiled: bool) -> dict[str, Callable[[], Step]]:
    """What is timed, by name."""
    found: dict[str, Callable[[], Step]] = {
        "Bony": lambda: bony(case),
        "Bony, views ready": lambda: bony(case, ready=True),
        "Bony, recompute": lambda: bony(case, recompute=True),
    }
    if compiled:
        found["Bony, compiled"] = lambda: bony(case, compile_it=True)
    if folder is not None:
        found["original"] = lambda: Original(case, folder, same_views=False)
        if case.global_crops == 1:
            found["original, same views"] = lambda: Original(case, folder, same_views=True)
    return found


def main() -> None:
    """Run it."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", type=Path, help="folder with the original's dino/ and xcit/; else only Bony's")
    parser.add_argument(
        "--model", choices=ORIGINAL_NAMES, default="xcit_medium_24_p16_224" if on_gpu else "xcit_tiny_12_p16_224"
    )
    parser.add_argument("--crops", default="1+5", help="global+local")
    parser.add_argument("--batch", type=int, default=100 if on_gpu else 4)
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16" if on_gpu else "fp32")
    parser.add_argument("--out-dim", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=30 if on_gpu else 3, help="timed ones, a round")
    parser.add_argument("--rounds", type=int, default=2, help="all contenders are timed so many times in turn")
    parser.add_argument("--compile", action="store_true", help="time Bony with torch.compile too")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # the original asks for names that timm and PyTorch call old
    device = torch.device("cuda" if on_gpu else "cpu")
    global_crops, local_crops = map(int, args.crops.split("+"))
    case = Case(args.model, global_crops, local_crops, args.batch, args.precision, args.out_dim, args.steps, device)
    with tempfile.TemporaryDirectory() as folder:  # the original's loss and wrappers ask for a process group
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", init_method=f"file://{folder}/group", rank=0, world_size=1
        )
        times: dict[str, list[dict[str, float]]] = {}
        for _ in range(args.rounds):
            for name, build in contenders(case, args.original, args.compile).items():
                times.setdefault(name, []).append(timed(build, case))
        dist.destroy_process_group()
    print(json.dumps(report(case, times)))


def report(case: Case, times: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Print a table; all figures, and ratios to the original."""
    flops = flops_per_sample(case.config(), None)  # type: ignore[arg-type]  # DINO asks nothing of a store
    limit = peak(case.device, case.precision)
    rates = {name: statistics.median(one["samples_per_s"] for one in rounds) for name, rounds in times.items()}
    print(f"{case.model}, {case.global_crops}+{case.local_crops}, batch {case.batch}, {case.precision}, {case.device}")
    figures = {}
    for name, rate in rates.items():
        memory = times[name][0]["memory_gib"]
        figures[name] = {
            "samples_per_s": round(rate, 2),
            "memory_gib": round(memory, 2) if memory == memory else None,
            "mfu": round(rate * flops / limit.flops, 4),
            "over_original": round(rate / rates["original"], 2) if "original" in rates else None,
        }
        print(f"  {name:24}" + "  ".join(f"{key} {value}" for key, value in figures[name].items()))
    said = {"model": case.model, "crops": f"{case.global_crops}+{case.local_crops}", "batch": case.batch}
    hardware = torch.cuda.get_device_name() if case.device.type == "cuda" else "CPU"
    return {
        "benchmark": "train_step", **said, "precision": case.precision, "hardware": hardware,
        "flops_per_sample": flops, "peak_flops": limit.flops, "peak_of": limit.of, "peak_is_measured": limit.measured,
        "figures": figures,
        "limit": {"samples_per_s_at_peak": round(limit.flops / flops, 1)},
    }  # fmt: skip


if __name__ == "__main__":
    main()
