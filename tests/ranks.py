"""Run by test_ranks.py under torchrun: losses and gradients of each rank's share of 12 clips, and
several steps of every combination of losses."""

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
    video, text = torch.randn(12, 3, 4, 32, 32).double(), torch.randn(12, 16).double()
    mask = tgmae.topk_mask(torch.rand(12, *config.grid), 0.6)
    groups = torch.arange(12) // 2
    model = tgmae.TGMAE(config).double()
    mine = slice(rank * 12 // world, (rank + 1) * 12 // world)

    def shared(model):
        return DistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model

    results = {}
    for vt in (False, True):
        model.zero_grad()
        model.predictor.requires_grad_(vt)
        net, its_text = shared(model), text[mine] if vt else None
        result = net(video[mine], mask[mine], its_text, groups=groups[mine])
        (result["mae"] + result.get("vt", 0)).backward()
        mae = result["mae"].detach().clone()
        dist.all_reduce(mae)
        results[f"mae {vt}"] = mae / world
        if vt:
            results["vt"] = result["vt"].detach()
            results["running"] = model.predictor[1].running_var.clone()
            theirs = tgmae.gather(results["running"])  # no process is told them by another
            assert torch.equal(theirs, results["running"].repeat(world))
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results |= {f"{name} {vt}": grad.clone() for name, grad in grads.items()}
    if rank == 0:
        torch.save(results, out)

    # MAE alone, MAE with VT watched, VT alone, both, the predictor alone
    for flags, has_text in (
        ("--mae --no-vt", False), ("--mae --no-vt", True), ("--no-mae --vt", True),
        ("--mae --vt", True), ("--no-mae --no-vt", True),
    ):  # fmt: skip
        args = train.parse_args(flags.split())
        torch.manual_seed(0)
        model = tgmae.TGMAE(config).double()
        train.freeze_unused(model, args, has_text)
        optimizer, net, losses = train.make_optimizer(model, args), shared(model), []
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        its_text = text[mine] if has_text else None
        for _ in range(4):
            result = net(video[mine], mask[mine], its_text, mae=args.mae, watch=not args.vt)
            loss = sum(result[name] for name in ("mae", "vt") if name in result)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0], (flags, has_text, losses)
    # Others may hold the gradient that gather is given: it must stay as it is.
    x, other = torch.ones(2, 3, requires_grad=True), torch.zeros(2 * world, 3, requires_grad=True)
    ((tgmae.gather(x) + other) ** 2).sum().backward()
    assert torch.equal(other.grad, torch.full_like(other, 2))
    assert torch.equal(x.grad, torch.full_like(x, 2 * world))


if __name__ == "__main__":
    main(sys.argv[1])
    # When the models that used it are gone: torch 2.11 sometimes hung otherwise.
    dist.destroy_process_group()
