"""The layer-by-layer calibration: peak memory by depth, workers, seconds per layer.

python tests/benchmarks/calibration.py memory FOLDER METHOD LAYERS
python tests/benchmarks/calibration.py workers FOLDER METHOD WORKERS
python tests/benchmarks/calibration.py layer FOLDER

``memory`` walks in one process, so that its peak is all of it. ``workers`` is the whole stage on
SmolLM2-135M with Ray actors of one core each. ``layer`` times one Llama-2-7B-sized layer and scales
it by operation counts to LLaMA-3.1-70B.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from llama import Llama
from measure import peak_memory

import loram_ray as lr
from loram_ray.architectures import architecture_of
from loram_ray.artifacts.tensorfile import Checkpoint, CheckpointWriter, TensorSpec
from loram_ray.pruning.calibration import Calibration, save_tensors, share_out
from loram_ray.pruning.criteria import TaylorForm
from loram_ray.pruning.pool import InProcess
from loram_ray.pruning.sparse import Pattern
from loram_ray.pruning.worker import TOKENS_FILE, CalibrationSpec, CalibrationWorker
from loram_ray.runtime.progress import Reporter

LLAMA_7B = Llama(4096, 11008, heads=32, kv_heads=32, head_dim=128)
LLAMA_70B = Llama(8192, 28672, heads=64, kv_heads=8, head_dim=128)
WIDTH = Llama(1024, 2816, heads=16, kv_heads=4, head_dim=64)
VOCABULARY = WIDTH.vocabulary
SAMPLES, TOKENS = 8, 128
PRUNED_LAYERS_70B = 74


def write_base(directory: Path, layers: int, sizes: Llama) -> None:
    """A synthetic Llama in bf16, tensor by tensor."""
    sizes.start(directory, layers)
    shapes = sizes.shapes(layers)
    specs = {name: TensorSpec(shape, torch.bfloat16) for name, shape in shapes.items()}
    with CheckpointWriter(directory, specs) as writer:
        for name, spec in specs.items():
            tensor = torch.randn(spec.shape) * (0.02 if len(spec.shape) == 2 else 0) + (
                len(spec.shape) == 1
            )
            writer.write(name, tensor.to(torch.bfloat16))


def setup_of(folder: Path, samples: int, tokens: int, batch_size: int) -> CalibrationSpec:
    """What a worker needs, with random calibration tokens."""
    work = folder / "work"
    work.mkdir(exist_ok=True)
    ids = torch.randint(VOCABULARY, (samples, tokens), generator=torch.Generator().manual_seed(0))
    save_tensors(work / TOKENS_FILE, {"token_ids": ids})
    return CalibrationSpec(
        folder / "base", "llama", work, "fp32", batch_size, share_out(samples, 8)
    )


def memory(folder: Path, method: str, layers: int) -> dict[str, float]:
    """Peak memory of a whole walk in one process."""
    setup = setup_of(folder, SAMPLES, TOKENS, batch_size=2)
    with (
        Checkpoint(setup.base) as checkpoint,
        Reporter("prune", layers, "layer") as reporter,
    ):
        family = architecture_of("llama")
        config = json.loads((setup.base / "config.json").read_text())
        pool = InProcess(setup)
        before = peak_memory()
        pruned = (1, layers - 1)
        walk = Calibration(
            setup, pool, checkpoint, family, family.geometry(config), pruned, reporter
        )
        started = time.perf_counter()
        if method == "taylor":
            walk.score_taylor(TaylorForm.FIRST)
        elif method in ("flap", "activation"):
            walk.score_forward(method)
        else:
            walk.sparsify(method, dict.fromkeys(range(*pruned), 0.5), Pattern(), 0.01)
        seconds = time.perf_counter() - started
    return {
        "peak_bytes": peak_memory(),
        "before_bytes": before,
        "seconds_per_layer": seconds / layers,
    }


def workers(folder: Path, method: str, count: int) -> dict[str, float]:
    """Seconds of the whole stage on the real model, actors of one core each."""
    calibration = lr.CalibrationConfig(
        sources=[{"path": str(folder / "text.jsonl")}],
        samples=16,
        sequence_length=256,
        batch_size=2,
        workers=count,
        cpus_per_worker=1,
    )
    config = lr.PruneConfig(
        base=str(folder / "base"),
        output=folder / f"pruned-{method}-{count}",
        method=method,
        ratio=0.5,
        layers=(4, 28),
        calibration=calibration,
    )
    started = time.perf_counter()
    result = lr.prune(config, lr.RayConfig(num_cpus=4))
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "plan": result.manifest.details["plan"]}  # type: ignore[dict-item]


def layer(folder: Path) -> dict[str, float]:
    """Seconds of the parts of one 7B-sized layer, and their operations."""
    write_base(folder / "base", 1, LLAMA_7B)
    samples, tokens = 4, 512
    worker = CalibrationWorker(setup_of(folder, samples, tokens, batch_size=1))
    shapes, count = LLAMA_7B.linears(), samples * tokens
    found = {"tokens": count}

    def timed(name: str, operations: float, call: object, *arguments: object) -> object:
        started = time.perf_counter()
        result = call(*arguments)  # type: ignore[operator]
        found[f"{name}_seconds"] = time.perf_counter() - started
        found[f"{name}_operations"] = operations
        return result

    for share in range(4):
        worker.embed(share)
    forward = operations_of_forward(shapes, count)
    run = lambda *rest: [worker.forward(0, share, *rest) for share in range(4)]  # noqa: E731
    timed("forward", forward, run, None, None, False)
    statistics = timed(
        "forward_and_hessians",
        forward + operations_of_hessians(shapes, count),
        run,
        "sparsegpt",
        None,
        False,
    )
    module = "model.layers.0.mlp.down_proj"
    hessian = statistics[0][0][module]  # type: ignore[index]
    for other in statistics[1:]:  # type: ignore[index]
        hessian.merge(other[0][module])
    arguments = (module, "sparsegpt", hessian, 0.5, 0.01, Pattern())
    timed(
        "solve_down_proj",
        operations_of_solve(*shapes["mlp.down_proj"]),
        worker.sparsify,
        *arguments,
    )
    return found


def operations_of_forward(shapes: dict[str, tuple[int, int]], tokens: int) -> float:
    """Multiplications and additions of the linears."""
    return 2.0 * tokens * sum(out * into for out, into in shapes.values())


def operations_of_hessians(shapes: dict[str, tuple[int, int]], tokens: int) -> float:
    """Of ``sum x x^T``, once for each distinct input."""
    distinct = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    return 2.0 * tokens * sum(shapes[name][1] ** 2 for name in distinct)


def operations_of_solve(out: int, into: int) -> float:
    """Of a Cholesky factorisation, the pushed errors and the error's trace."""
    return into**3 / 3 + 2.0 * out * into**2


def main() -> None:
    kind, folder = sys.argv[1], Path(sys.argv[2])
    if kind == "write-the-base":
        write_base(folder / "base", int(sys.argv[3]), WIDTH)
        print("{}")
    elif kind == "memory":
        print(json.dumps(memory(folder, sys.argv[3], int(sys.argv[4]))))
    elif kind == "workers":
        print(json.dumps(workers(folder, sys.argv[3], int(sys.argv[4]))))
    else:
        print(json.dumps(layer(folder)))


if __name__ == "__main__":
    main()
