"""The command and the pipeline on a tiny model, as installed; `make wheel` runs it.

    python tests/installed.py [DIST]

It imports nothing of the tests and runs in a folder of its own, so it tries what is installed. With
the directory of an sdist and a wheel, it checks their contents as well.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path

RUN = """\
base: base
output: run
prune: {ratio: 0.5, layers: [1, 3]}
align:
  corpus: {sources: [{path: text.jsonl}], sequence_length: 32}
  steps: 2
  batch_size: 2
  micro_batch_size: 2
  precision: fp32
train:
  data: rows.jsonl
  steps: 4
  batch_size: 4
  precision: fp32
  optimiser: {learning_rate: 0.01, warmup_steps: 0}
recover: {}
merge: {}
evaluate: {data: rows.jsonl, precision: fp32}
quantize: {}
"""


def write_base(directory: Path) -> None:
    """A random Llama and a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<eos>",
        pad_token="<eos>",
        chat_template="{% for m in messages %}{{ m['content'] }}\n{% endfor %}",
    )
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(directory)


def check_contents(dist: Path) -> None:
    """Check that the distributions hold the package and its data, and nothing else."""
    [wheel], [sdist] = dist.glob("*.whl"), dist.glob("*.tar.gz")
    info = f"loram_ray-{version('loram-ray')}.dist-info"
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"loram_ray", info}
    assert {"loram_ray/py.typed", "loram_ray/reporting/page.html.j2"} <= set(names)
    assert f"{info}/licenses/LICENSE" in names
    with tarfile.open(sdist) as archive:
        members = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "loram_ray/py.typed"} <= members
    tops = {name.split("/")[0] for name in members if name}
    assert tops <= SDIST, tops - SDIST
    assert sdist.stat().st_size < 2**20, sdist.stat().st_size


SDIST = {"CHANGELOG.md", "LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "constraints.txt"}
SDIST |= {"loram_ray", "loram_ray.egg-info", "pyproject.toml", "setup.cfg"}
"""What the sdist may hold at its top."""


def check_command(loram: Path, folder: Path) -> None:
    """Run what a new user runs first: version, help, completion, a run file and its plan."""

    def output(*arguments: str) -> str:
        done = subprocess.run(
            [loram, *arguments], cwd=folder, check=True, stdout=subprocess.PIPE, text=True
        )
        return done.stdout

    assert output("--version") == f"loram {version('loram-ray')}\n"
    commands = ("init", "plan", "run", "prune", "align", "train", "recover", "merge", "evaluate")
    text = output("--help")
    for command in commands:
        assert command in text and f"Example: loram {command}" in output(command, "--help")
    bash = f"{loram} --show-completion; exit $?"
    shown = subprocess.run(["bash", "-c", bash], check=True, stdout=subprocess.PIPE, text=True)
    assert "_LORAM_COMPLETE=complete_bash" in shown.stdout
    words = ("--base", "meta-llama/Llama-3.1-8B", "--data", "rows.jsonl")
    output("init", *words, "--output", "llama.yaml")
    planned = json.loads(output("plan", "--config", "llama.yaml", "--json"))
    assert planned["base"]["parameters"] == 8_030_261_248, planned


def main() -> None:
    """Check the distributions and the command, run all stages and load what they wrote."""
    for dist in sys.argv[1:]:
        check_contents(Path(dist))
    loram = Path(sys.executable).with_name("loram")
    with tempfile.TemporaryDirectory(prefix="loram-installed-") as name:
        folder = Path(name)
        write_base(folder / "base")
        texts = [{"text": f"Document {i}: the quick brown fox."} for i in range(64)]
        rows = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(40)]
        for file, lines in (("text.jsonl", texts), ("rows.jsonl", rows)):
            (folder / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "run.yaml").write_text(RUN)
        check_command(loram, folder)
        for command in ("run", "quantize"):
            subprocess.run([loram, command, "--config", "run.yaml"], cwd=folder, check=True)

        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        import loram_ray

        assert "site-packages" in loram_ray.__file__, loram_ray.__file__
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        PeftModel.from_pretrained(base, folder / "run" / "adapter")
        AutoModelForCausalLM.from_pretrained(folder / "run" / "quantized")
    print(f"loram_ray works on Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
