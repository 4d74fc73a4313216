"""Log-probabilities and tokens of a GGUF file in llama.cpp."""

from __future__ import annotations

import contextlib
import http.client
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xllamacpp


@dataclass
class Runtime:
    """llama.cpp's server on loopback, in this process."""

    server: Any

    def log_probabilities(self, ids: Sequence[int], size: int, sampled: int) -> torch.Tensor:
        """Return the log-probability of each token after a prompt, float32 ``[size]``.

        Args:
            ids: Token ids of the prompt.
            size: Size of the vocabulary.
            sampled: Id of a token with text of its own; without such a token the response has no
                probabilities. A bias forces the server to sample it and does not change the
                probabilities.

        Raises:
            ValueError: llama.cpp refuses the prompt.
        """
        request = {
            "prompt": list(ids),
            "n_predict": 1,
            "n_probs": size,
            "temperature": 0.0,
            "cache_prompt": False,
            "logit_bias": [[sampled, 1000.0]],
        }
        answer = self.server.handle_completions(request)
        if "choices" not in answer:
            raise ValueError(answer)
        [token] = answer["choices"][0]["logprobs"]["content"]
        found = torch.full((size,), torch.nan)
        for other in token["top_logprobs"]:
            found[other["id"]] = other["logprob"]
        return found

    def tokens(self, text: str) -> list[int]:
        """Return the token ids of a text, with special tokens parsed and added as in the file."""
        request = {"content": text, "add_special": True, "parse_special": True}
        return list(self._post("/tokenize", request)["tokens"])

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        return str(self._post("/detokenize", {"tokens": list(ids)})["content"])

    def _post(self, path: str, request: dict[str, Any]) -> dict[str, Any]:
        address = self.server.listening_address.removeprefix("http://")
        with contextlib.closing(http.client.HTTPConnection(address, timeout=60)) as connection:
            connection.request("POST", path, json.dumps(request))
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
            return dict(json.loads(answer.read()))


@contextlib.contextmanager
def running(path: Path) -> Iterator[Runtime]:
    """Load a file; raises RuntimeError if llama.cpp does not.

    Keys and values are cached in float32, and attention is not fused. By default llama.cpp caches
    them in float16, which alone changes log-probabilities of the tests' models by 0.002 to 0.008.
    """
    settings = xllamacpp.CommonParams()
    settings.model.path = str(path)
    settings.n_ctx = 256
    settings.n_parallel = settings.n_threads_http = 1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.warmup = False
    settings.verbosity = 0
    runtime = Runtime(xllamacpp.Server(settings))
    try:
        yield runtime
    finally:
        runtime.server = None  # ends the server
