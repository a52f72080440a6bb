"""Data-parallel SAM with a staged artifact: each process sees its part of every batch.

Between the stages the processes average gradients, here with torch.distributed; any other way of
averaging arrays does as well, and then no torch is needed (a staged artifact for ONNX Runtime runs
without it).

    sam-export export models/mlp.py:recipe --target onnx --staged --out build/mlp
    torchrun --standalone --nproc-per-node 2 examples/data_parallel.py build/mlp data.npz \
        --batch 256 --out build/mlp.ckpt

``data.npz`` holds an array per tensor of the batch, under its name in the contract (``x``,
``target``); `sam-export inspect` lists the names.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import sam_export as sx


def averaged(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The mean over all processes, as one message."""
    arrays = {name: np.asarray(value) for name, value in tensors.items()}
    flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays.values()]))
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    ends = np.cumsum([array.size for array in arrays.values()])[:-1]
    parts = np.split(flat.numpy(), ends)
    return {
        name: part.reshape(array.shape)
        for (name, array), part in zip(arrays.items(), parts, strict=True)
    }


def train(session: sx.Session, batch: list[Any], own_perturbation: bool) -> float:
    """One step of all processes together; the mean loss."""
    part = dist.get_rank()  # of the batch: it draws other random numbers than the others
    ascent = session.ascent(*batch, part=part)
    gradients = ascent.gradients if own_perturbation else averaged(ascent.gradients)
    descent = session.descent(*batch, gradients=gradients, buffers=ascent.buffers, part=part)
    # Every process makes the same update, so the weights stay the same without being sent.
    session.update(averaged(descent.gradients), buffers=descent.buffers)
    return float(averaged({"loss": ascent.loss})["loss"])


def main() -> None:
    """Reads the arguments, trains, and saves from the first process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", help="folder of a step exported with --staged")
    parser.add_argument("data", help="npz with one array per tensor of the batch")
    parser.add_argument(
        "--batch", type=int, default=256, help="examples per step, of all processes"
    )
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument(
        "--own-perturbation",
        action="store_true",
        help="each process perturbs by its own gradient (m-sharpness); the first averaging is left "
        "out",
    )
    parser.add_argument("--out", help="checkpoint to write")
    args = parser.parse_args()

    dist.init_process_group("gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    if args.batch % count:
        parser.error(f"--batch {args.batch} does not divide among {count} processes")
    session = sx.load(args.artifact, threads=1)
    with np.load(args.data) as data:
        arrays = [data[spec.name] for spec in session.contract.batch]
    if not 0 < args.batch <= len(arrays[0]):
        parser.error(f"--batch {args.batch}: {args.data} holds {len(arrays[0])} examples")
    size = args.batch // count
    for epoch in range(args.epochs):
        losses = []
        for start in range(0, len(arrays[0]) - args.batch + 1, args.batch):
            mine = slice(start + rank * size, start + (rank + 1) * size)
            losses.append(train(session, [array[mine] for array in arrays], args.own_perturbation))
        if rank == 0:
            print(f"epoch {epoch + 1}: mean loss {np.mean(losses):.6f}")
    if args.out and rank == 0:
        session.save(args.out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
