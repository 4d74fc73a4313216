"""Plain texts begin and end as the model's own tokenizer begins and ends them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from helpers import tiny, tokenizers_of
from helpers.scored import evaluation, naive_nll
from loram_ray.alignment.batches import to_device
from loram_ray.artifacts.manifest import hash_file
from loram_ray.config import CalibrationConfig, EvaluateConfig, TrainConfig
from loram_ray.corpus.conversations import Document
from loram_ray.corpus.examples import tokenise_row
from loram_ray.corpus.isolation import document_positions, openings
from loram_ray.corpus.pack import PackedFile, pack, tokenise
from loram_ray.evaluation.traits import settings_of_reading
from loram_ray.losses import IGNORED
from loram_ray.models.tokenizer import Frame, frame_of, ids_to_continue, load_tokenizer
from loram_ray.pruning.text import calibration_sequences
from loram_ray.stages.train import settings_of_rows

TEXTS = [row["text"] for row in tiny.texts(9)]


def whole(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """What the tokenizer itself makes of a text, with the end-of-text token that closes it."""
    ids: list[int] = tokenizer(text)["input_ids"]
    end = tokenizer.eos_token_id
    return ids if end in ids[1:] else [*ids, end]


def one_by_one(
    documents: list[list[int]], opening: list[int], length: int
) -> tuple[list[list[int]], list[list[bool]]]:
    """Sequences made token by token, and which of their tokens are no opening's."""
    rows: list[list[int]] = []
    own: list[list[bool]] = []

    def put(token: int, is_own: bool) -> None:
        rows[-1].append(token)
        own[-1].append(is_own)

    def begin() -> None:
        rows.append([])
        own.append([])

    for document in documents:
        if not rows or len(rows[-1]) == length:
            begin()
        for token in opening[: length - len(rows[-1])]:
            put(token, False)
        for token in document[len(opening) :]:
            if len(rows[-1]) == length:
                begin()
                for again in opening:
                    put(again, False)
            put(token, True)
    return rows, own


@pytest.mark.parametrize("kind", tokenizers_of.FRAMED)
def test_a_document_is_what_the_tokenizer_itself_makes_of_it_and_ends_once(kind: str) -> None:
    tokenizer = tokenizers_of.FRAMED[kind]()
    assert list(tokenise(tokenizer, TEXTS)) == [whole(tokenizer, text) for text in TEXTS]


@pytest.mark.parametrize("kind", tokenizers_of.FRAMED)
def test_a_text_to_be_continued_is_begun_and_not_ended(kind: str) -> None:
    tokenizer = tokenizers_of.FRAMED[kind]()
    plain = tokenizer("def f():", add_special_tokens=False)["input_ids"]
    begun = tokenizer("def f():")["input_ids"]
    found = ids_to_continue(tokenizer, "def f():")
    assert found[-len(plain) :] == plain and found == begun[: len(found)]
    assert found[: -len(plain)] == begun[: begun.index(plain[0])]


def test_a_text_that_holds_its_opening_is_not_opened_twice() -> None:
    tokenizer = tokenizers_of.framed("<bos>")
    [found] = tokenise(tokenizer, ["<bos>abc"])
    assert found == whole(tokenizer, "abc")
    assert ids_to_continue(tokenizer, "<bos>abc") == tokenizer("abc")["input_ids"]


@pytest.mark.parametrize("length", [5, 8, 33, 4000])
@pytest.mark.parametrize("opening", [[], [7], [7, 8], [0]])
def test_every_sequence_begins_with_the_opening(
    opening: list[int], length: int, tmp_path: Path
) -> None:
    generator = np.random.default_rng(0)
    documents = [
        [*opening, *generator.integers(10, 99, size).tolist(), 0]
        for size in (1, 30, 2, 2, 3, 64, 1, 31, 5)
    ]
    rows, own = one_by_one(documents, opening, length)
    sequences, lengths = pack(documents, length, -1, opening)
    assert [row[:n].tolist() for row, n in zip(sequences, lengths, strict=True)] == rows
    frame = Frame(tuple(opening), (0,))
    for row, is_own in zip(rows, own, strict=True):
        assert (~openings(torch.tensor([row]), frame)[0]).tolist() == is_own


@pytest.mark.parametrize("kind", ["bos", "two", "eos in front"])
def test_a_packed_file_is_the_documents_packed_at_once(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loram_ray.corpus.pack.DOCUMENTS_AT_ONCE", 2)
    tokenizer = tokenizers_of.FRAMED[kind]()
    file = PackedFile(tmp_path / "x.parquet", tokenizer, 16, 2, 0)
    for text in TEXTS:
        file.add(text)
    file.close()
    table = pq.read_table(tmp_path / "x.parquet")
    frame = frame_of(tokenizer)
    rows, _ = one_by_one([whole(tokenizer, text) for text in TEXTS], list(frame.opening), 16)
    found = zip(table["input_ids"].to_pylist(), table["length"].to_pylist(), strict=True)
    assert [ids[:length] for ids, length in found] == rows


@pytest.mark.parametrize("kind", tokenizers_of.FRAMED)
def test_isolated_documents_begin_at_their_openings(kind: str) -> None:
    tokenizer = tokenizers_of.FRAMED[kind]()
    frame = frame_of(tokenizer)
    documents = [whole(tokenizer, text) for text in ("ab", "c", "def gh", "i")]
    ids = [token for document in documents for token in document]
    expected = [place for document in documents for place in range(len(document))]
    for cut in range(1, len(ids) + 1):
        found = document_positions(torch.tensor([ids[:cut]]), frame)[0].tolist()
        assert found == expected[:cut], cut


def test_what_opens_a_document_carries_no_label_in_alignment() -> None:
    batch: dict[str, Any] = {
        "input_ids": np.array([[7, 5, 6, 0, 7, 8, 0, 0]], dtype=np.int32),
        "length": np.array([7], dtype=np.int32),
        "row_id": np.array([3]),
    }
    expected = [[IGNORED, 5, 6, 0, IGNORED, 8, 0, IGNORED]]
    for isolated in (False, True):
        found = to_device(batch, torch.device("cpu"), Frame((7,), (0,)), isolated)
        assert found.labels.tolist() == expected


@pytest.mark.parametrize("kind", tokenizers_of.FRAMED)
def test_every_piece_of_a_learnt_text_begins_with_the_opening(kind: str) -> None:
    tokenizer = tokenizers_of.FRAMED[kind]()
    opening = list(frame_of(tokenizer).opening)
    text = "The quick brown fox jumps over the lazy dog."
    examples = tokenise_row(tokenizer, Document("file:1", text), 16)
    assert isinstance(examples, list) and len(examples) > 2
    rows, own = one_by_one([whole(tokenizer, text)], opening, 16)
    assert [example.input_ids for example in examples] == rows
    for example, is_own in zip(examples, own, strict=True):
        is_own[0] = False
        assert [label != IGNORED for label in example.labels] == is_own


def test_calibration_sequences_begin_with_the_opening(tmp_path: Path) -> None:
    tokenizer = tokenizers_of.framed("<bos>")
    tokenizer.save_pretrained(tmp_path / "base")
    paths = [tiny.write_jsonl(tmp_path / f"{n}.jsonl", tiny.texts(7)) for n in range(3)]
    config = CalibrationConfig(
        sources=[{"path": str(path)} for path in paths], samples=1000, sequence_length=32
    )
    found = calibration_sequences(config, tmp_path / "base", seed=0)
    frame = frame_of(tokenizer)
    documents = [whole(tokenizer, row["text"]) for row in tiny.texts(7)]
    own = sum(len(document) - 1 for document in documents) * 3
    assert (found[:, 0] == frame.opening[0]).all()
    assert own - 32 < int((~openings(found, frame)).sum()) <= own


def base_with(tokenizer: PreTrainedTokenizerFast, directory: Path) -> Path:
    """The tiny base with another tokenizer, whose new tokens have rows in the embedding."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny.llama_config(layers=2))
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("kind", ["bos", "two", "eos in front", "eos behind alone"])
def test_perplexity_of_text_is_that_of_every_token_after_the_openings(
    kind: str, tmp_path: Path
) -> None:
    tokenizer = tokenizers_of.FRAMED[kind]()
    base = base_with(tokenizer, tmp_path / "base")
    path = tiny.write_jsonl(tmp_path / "t.jsonl", tiny.texts(4))
    text = {"sources": [{"path": str(path)}], "sequence_length": 32}
    found = evaluation(base, tmp_path, text=text)
    documents = [whole(tokenizer, row["text"]) for row in tiny.texts(4)]
    opening = list(frame_of(tokenizer).opening)
    model = LlamaForCausalLM.from_pretrained(base).eval()
    nll, tokens = 0.0, 0
    for row, own in zip(*one_by_one(documents, opening, 32), strict=True):
        own[0] = False
        for place, is_own in enumerate(own):
            if is_own:
                nll += naive_nll(model, row[: place + 1], place)
                tokens += 1
    assert found["text_tokens"] == tokens
    if opening:
        assert tokens == sum(len(document) - len(opening) for document in documents)
    assert found["text_perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-5)


def test_identities_change_for_tokenizers_that_add_tokens_and_for_no_others() -> None:
    assert frame_of(tiny.tokenizer()).settings == {}
    assert frame_of(tokenizers_of.FRAMED["eos behind alone"]()).settings == {}
    settings = [
        frame_of(make()).settings
        for kind, make in tokenizers_of.FRAMED.items()
        if kind != "eos behind alone"
    ]
    assert all(settings)


def test_a_conversation_begins_as_its_template_says(tmp_path: Path) -> None:
    """Its BOS neither doubled, nor added where the template, by which it is served, has none."""
    from loram_ray.corpus.conversations import Conversation

    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for template in (tiny.CHAT_TEMPLATE, "{{ bos_token }}" + tiny.CHAT_TEMPLATE):
        tokenizer = tokenizers_of.framed("<bos>")
        tokenizer.chat_template = template
        [example] = tokenise_row(tokenizer, Conversation("file:1", messages), 512)  # type: ignore[misc]
        expected = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        assert example.input_ids == expected


def test_a_saved_tokenizer_begins_texts_as_it_did(tmp_path: Path) -> None:
    tokenizers_of.framed("<bos>").save_pretrained(tmp_path)
    assert frame_of(load_tokenizer(tmp_path)) == frame_of(tokenizers_of.framed("<bos>"))


def test_identities_of_trainings_change_with_what_is_read_otherwise(tmp_path: Path) -> None:
    """Of plain questions they do not, whatever the tokenizer: such outputs stay valid."""
    plain = [{"prompt": "a", "completion": "b", "id": 3, "label": 1, "tools": None, "images": []}]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    spaced = [{"prompt": "a", "completion": " b"}]
    weighed = [{"messages": [messages[0], {**messages[1], "weight": 1}]}]
    for rows, bad, bos, expected in (
        (plain, 0.5, True, {}),
        ([{"messages": messages}], 0.5, True, {}),
        (tiny.texts(2), 0.5, False, {}),
        (tiny.texts(2), 0.0, True, {"opening": [259], "closing": [0]}),
        ([*plain, {**plain[0], "system": "s"}], 0.0, True, {"rows": ["columns"]}),
        (weighed, 0.0, False, {"rows": ["columns"]}),
        ([{**plain[0], "rejected": "c"}], 0.5, False, {"rows": ["columns"]}),
        (spaced, 0.0, False, {}),  # refused before: there is no such output
        (spaced, 0.5, False, {"rows": ["spaces"]}),
    ):
        model = tmp_path / f"model-{bos}"
        (tokenizers_of.framed("<bos>") if bos else tiny.tokenizer()).save_pretrained(model)
        data = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
        config = TrainConfig(
            model=model, data=str(data), output=tmp_path / "out", max_bad_share=bad
        )
        found = settings_of_rows(config, {"data": hash_file(data)})
        assert found == expected, rows


def test_identities_of_evaluations_change_with_what_is_scored_otherwise(tmp_path: Path) -> None:
    data = str(tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.questions(2)))
    text = {"sources": [{"path": str(tiny.write_jsonl(tmp_path / "t.jsonl", tiny.texts(2)))}]}

    def found(tokenizer: PreTrainedTokenizerFast, **settings: Any) -> dict[str, Any]:
        config = EvaluateConfig.model_validate(
            {"model": "m", "output": tmp_path / "out", **settings}
        )
        return settings_of_reading(config, tmp_path, tokenizer)

    everything = {"data": data, "text": text, "exact_match": True}
    bos = tokenizers_of.framed("<bos>")
    assert found(tiny.tokenizer(), **everything) == {}
    assert found(bos, data=data, exact_match=True) == {}
    assert found(bos, text=text) == {"opening": [259], "closing": [0]}
    code = [{"kind": "code", "data": data}]
    assert found(tiny.tokenizer(), benchmarks=code)["programs"] == "tested from another process"
    llama2 = tokenizers_of.llama2()
    llama2.chat_template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    assert found(llama2, data=data) == {}
    assert found(llama2, data=data, exact_match=True) == {
        "answers": ["no padding token", "decoded with the prompt"]
    }
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 77]}')
    assert found(tiny.tokenizer(), **everything) == {"answers": ["ended by 77"]}
