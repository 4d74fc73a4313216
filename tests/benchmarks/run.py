"""Run the benchmarks and write RESULTS.md beside this file.

    make bench
    python tests/benchmarks/run.py [recovery] [correction] [pruning] [alignment] [calibration]
                                   [sparse] [trainer] [finetuning] [together] [evaluation]
                                   [batching] [scheduling] [submitting] [thousand]
                                   [partitions] [targets] [standstill] [corpus]

evaluation and corpus want lm-eval: PYTHONPATH=.venv/lm-eval. PEER and TRL in the environment name
the Python of environments that have the peers of sparse and finetuning. gpu.py, which needs a GPU,
is a command of its own.

Each measurement runs in a process of its own. Times are medians of rounds in which ours and the
peer take turns; ratios are medians of the rounds' ratios.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from measure import commit, in_fresh_process, machine
from render import CORRECTED, DEPTHS, as_markdown

HERE = Path(__file__).parent
SAVED = HERE / "results.json"
STREAMED = ("flap", "activation", "taylor", "wanda", "sparsegpt")


def recovery(folder: Path) -> dict[str, object]:
    return in_fresh_process(HERE / "recovery.py", str(folder))


def correction(folder: Path) -> dict[str, object]:
    script = HERE / "correction.py"
    found: dict[str, dict[str, object]] = {}
    for kind in ("whole", "nf4"):
        for layers in CORRECTED:
            inner = folder / f"{kind}-{layers}"
            inner.mkdir()
            in_fresh_process(script, "write", str(inner), str(layers), kind)
            found.setdefault(kind, {})[str(layers)] = in_fresh_process(
                script, "recover", str(inner)
            )
            shutil.rmtree(inner)
    return found


def pruning(folder: Path) -> dict[str, object]:
    found = {}
    for layers in (8, 32):
        inner = folder / str(layers)
        inner.mkdir()
        in_fresh_process(HERE / "pruning.py", str(inner), str(layers), "write-the-base")
        found[str(layers)] = in_fresh_process(HERE / "pruning.py", str(inner), str(layers))
    return found


def alignment(folder: Path) -> dict[str, object]:
    from inputs import write_inputs

    inputs = write_inputs(folder, quick=False, ratio=0.35)
    arguments = (str(inputs.pruned), str(inputs.text), str(folder))
    return {
        name: in_fresh_process(HERE / "alignment.py", *arguments, kind, cpus)["tokens_per_second"]
        for name, kind, cpus in (
            ("two workers, one core each", "2", "1"),
            ("one worker, one core", "1", "1"),
            ("one worker, two cores", "1", "2"),
            ("no Ray, one process, two cores", "without-ray", "2"),
        )
    }


def calibration(folder: Path) -> dict[str, object]:
    from loram_ray import demo

    script = HERE / "calibration.py"
    memory: dict[str, dict[str, object]] = {}
    for layers in DEPTHS:
        inner = folder / str(layers)
        inner.mkdir()
        in_fresh_process(script, "write-the-base", str(inner), str(layers))
        for method in STREAMED:
            found = in_fresh_process(script, "memory", str(inner), method, str(layers))
            memory.setdefault(method, {})[str(layers)] = found
            shutil.rmtree(inner / "work")
    real = folder / "real"
    real.mkdir()
    demo.write_base(real / "base")
    demo.write_text(real / "text.jsonl")
    workers = {
        method: {
            str(count): in_fresh_process(script, "workers", str(real), method, str(count))
            for count in (1, 2)
        }
        for method in ("flap",)
    }
    layer = folder / "layer"
    layer.mkdir()
    return {
        "memory": memory,
        "workers": workers,
        "layer": in_fresh_process(script, "layer", str(layer)),
    }


def sparse(folder: Path) -> dict[str, object]:
    peer = ["--peer", os.environ["PEER"]] if "PEER" in os.environ else []
    return in_fresh_process(HERE / "sparse.py", str(folder), *peer)


def finetuning(folder: Path) -> dict[str, object]:
    trl = ["--trl", os.environ["TRL"]] if "TRL" in os.environ else []
    return in_fresh_process(HERE / "finetuning.py", str(folder), *trl)


def together(folder: Path) -> dict[str, object]:
    line = (HERE / "together.py", str(folder), "--batch", "1")
    return {
        "fp32": in_fresh_process(*line),
        "nf4": in_fresh_process(*line, "--quantized"),
    }


def scheduling(folder: Path) -> dict[str, object]:
    script, recorded = HERE / "scheduling.py", folder / "durations.json"
    batch = json.loads(SAVED.read_text())["batching"]["found"]["durations"]
    recorded.write_text(json.dumps([{"seconds": seconds} for seconds in batch]))
    return {
        "drawn": in_fresh_process(script),
        "recorded": in_fresh_process(script, "--durations", str(recorded)),
    }


def alone(name: str) -> Callable[[Path], dict[str, object]]:
    """A benchmark that makes its own inputs."""
    return lambda folder: in_fresh_process(HERE / f"{name}.py", str(folder))


BENCHMARKS = {
    "recovery": recovery,
    "correction": correction,
    "pruning": pruning,
    "alignment": alignment,
    "calibration": calibration,
    "sparse": sparse,
    "finetuning": finetuning,
    "together": together,
    "scheduling": scheduling,
    **{
        name: alone(name)
        for name in ("corpus", "trainer", "evaluation", "partitions", "targets", "standstill")
    },
    **{name: alone(name) for name in ("batching", "submitting", "thousand")},
}


def main() -> None:
    chosen = sys.argv[1:] or list(BENCHMARKS)
    results = json.loads(SAVED.read_text()) if SAVED.exists() else {}
    for name in chosen:
        with tempfile.TemporaryDirectory(prefix="loram-bench-") as folder:
            print(f"{name} ...", file=sys.stderr, flush=True)
            results[name] = {
                "commit": commit(),
                "date": datetime.date.today().isoformat(),
                "machine": machine(),
                "found": BENCHMARKS[name](Path(folder)),
            }
        SAVED.write_text(json.dumps(results, indent=1) + "\n")
    (HERE / "RESULTS.md").write_text(as_markdown(results))
    print(HERE / "RESULTS.md")


if __name__ == "__main__":
    main()
