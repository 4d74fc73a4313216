"""Small multiple-choice questions, programs with tests, and tasks of lm-eval."""

from __future__ import annotations

from pathlib import Path

from helpers import tiny

CHOICES = [
    {"question": "Which is a colour?", "choices": ["red", "seven"], "answer": 0},
    {"question": "Which is a number?", "choices": ["red", "seven", "of"], "answer": "seven"},
    {"question": "Which is long?", "choices": ["a", "an answer of many words", "b"], "answer": "1"},
    {"question": "A letter?", "choices": ["n", "oooo"], "answer": "B"},
    {
        "question": "With labels?",
        "choices": {"text": ["1", "two", "3 3"], "label": ["p", "q", "r"]},
        "answer": "r",
    },
    {"question": "A text first?", "choices": ["1", "0"], "answer": "1"},
]
RIGHT = [0, 1, 1, 1, 2, 0]

PROBLEMS = [
    {
        "task_id": f"tiny/{n}",
        "prompt": f"def f{n}(x):\n    return {n}\n#",  # the generated text is a comment
        "test": f"def check(f):\n    assert f(1) == {right}",
        "entry_point": f"f{n}",
    }
    for n, right in enumerate([0, 1, 9])
]

QUIZ = [
    {"question": f"What is {a} and {b}?", "choices": [str(a + b), str(a * b + 9), "many things"]}
    for a, b in ((1, 2), (3, 4), (5, 6), (2, 2), (7, 1), (0, 3))
]
TASKS = {
    "tiny_quiz": """
task: tiny_quiz
dataset_path: json
dataset_kwargs: {{data_files: {{test: {quiz}, train: {quiz}}}}}
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: 0
num_fewshot: 2
fewshot_config: {{sampler: first_n}}
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
""",
    "tiny_words": """
task: tiny_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {quiz}, train: {quiz}}}}}
test_split: test
fewshot_split: train
output_type: generate_until
doc_to_text: "Q: {{{{question}}}} A:"
doc_to_target: "{{{{choices[0]}}}}"
num_fewshot: 1
fewshot_config: {{sampler: first_n}}
generation_kwargs: {{until: ["e", "\\n"], max_gen_toks: 8, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
""",
    "tiny_text": """
task: tiny_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {text}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: word_perplexity}}
  - {{metric: bits_per_byte}}
""",
}


def write_tasks(folder: Path) -> Path:
    """Write the tasks of lm-eval with their data."""
    quiz = tiny.write_jsonl(folder / "quiz.jsonl", QUIZ)
    rows = [{"text": "The fox and the " + "very quick " * n + "dog."} for n in (1, 60, 3)]
    text = tiny.write_jsonl(folder / "text.jsonl", rows)
    for name, content in TASKS.items():
        (folder / f"{name}.yaml").write_text(content.format(quiz=quiz, text=text))
    return folder
