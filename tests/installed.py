"""The pipeline on a tiny model, with the loram_ray of this environment; `make wheel` runs it.

    python tests/installed.py

It imports nothing of the tests and runs in a folder of its own, so it tries what is installed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
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


def main() -> None:
    """Run all stages and load what came out."""
    loram = Path(sys.executable).with_name("loram")
    with tempfile.TemporaryDirectory(prefix="loram-installed-") as name:
        folder = Path(name)
        write_base(folder / "base")
        texts = [{"text": f"Document {i}: the quick brown fox."} for i in range(64)]
        rows = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(40)]
        for file, lines in (("text.jsonl", texts), ("rows.jsonl", rows)):
            (folder / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "run.yaml").write_text(RUN)
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
