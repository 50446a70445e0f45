"""Run by test_ranks.py under torchrun: losses and gradients of the first ranks' share of 12 clips,
and of every combination of losses for several steps."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conftest import TINY  # noqa: E402

import tgmae  # noqa: E402
import train  # noqa: E402


def main(out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    config = tgmae.Config(**TINY)
    video = torch.randn(12, 3, 4, 32, 32).double()
    mask = tgmae.topk_mask(torch.rand(12, *config.grid), 0.6)
    text = torch.randn(12, 16).double()
    groups = torch.arange(12) // 2
    model = tgmae.TGMAE(config).double()
    mine = slice(rank * 12 // world, (rank + 1) * 12 // world)

    results = {}
    for vt in (False, True):
        net = model
        model.zero_grad()
        model.predictor.requires_grad_(vt)
        if world > 1:
            net = DistributedDataParallel(model)
        result = net(video[mine], mask[mine], text[mine] if vt else None, groups=groups[mine])
        (result["mae"] + result.get("vt", 0)).backward()
        mae = result["mae"].detach().clone()
        dist.all_reduce(mae)
        results[f"mae {vt}"] = mae / world
        if vt:
            results["vt"] = result["vt"].detach()
            results["running"] = model.predictor[1].running_var.clone()
        results |= {
            f"{name} {vt}": p.grad.clone()
            for name, p in model.named_parameters()
            if p.grad is not None
        }
    if rank == 0:
        torch.save(results, out)

    # mae, vt, text: MAE alone, MAE with VT watched, VT alone, both
    for mae, vt, has_text in (
        (True, False, False),
        (True, False, True),
        (False, True, True),
        (True, True, True),
    ):
        args = train.parse_args(["--vt" if vt else "--no-vt", "--mae" if mae else "--no-mae"])
        torch.manual_seed(0)
        model = tgmae.TGMAE(config).double()
        train.freeze_unused(model, args, has_text)
        optimizer = train.make_optimizer(model, args)
        net = DistributedDataParallel(model) if world > 1 else model
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        losses = []
        for _ in range(4):
            result = net(
                video[mine], mask[mine], text[mine] if has_text else None, mae=mae, watch=not vt
            )
            loss = sum(result[name] for name in ("mae", "vt") if name in result)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0], (mae, vt, has_text, losses)
    # Others may hold the gradient that gather is given: it must stay as it is.
    x, other = torch.ones(2, 3, requires_grad=True), torch.zeros(2 * world, 3, requires_grad=True)
    ((tgmae.gather(x) + other) ** 2).sum().backward()
    assert torch.equal(other.grad, torch.full_like(other, 2)) and torch.equal(
        x.grad, torch.full_like(x, 2 * world)
    )


if __name__ == "__main__":
    main(sys.argv[1])
    # When the models that used it are gone: torch 2.11 sometimes hung otherwise.
    dist.destroy_process_group()
