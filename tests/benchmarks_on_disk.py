"""Small benchmarks in lm-eval's format for the tests: task files with items of Python's documentation beside them."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics

import yaml


def sentences() -> list[str]:
    """About a thousand sentences of English."""
    words = " ".join(" ".join(text.split()) for text in topics.values())
    return [each.strip() for each in words.split(". ") if 40 < len(each) < 300]


def write_task(folder: Path, name: str, items: list[dict], **config) -> Path:
    """A task file and its items; `config` is lm-eval's."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    content = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}}}
    content |= {"test_split": "test", "metadata": {"version": 1.0}} | config
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return folder


def make_tasks(folder: Path, items: int = 24) -> list[str]:
    """One task of every kind that is scored by log-likelihoods; returns their names."""
    text = sentences()
    choice, last, whole, partial = [], [], [], []
    for at in range(items):
        context, *endings = text[5 * at : 5 * at + 5]
        choices = [" " + ending[: 10 + 7 * number] for number, ending in enumerate(endings)]
        choices[3] = choices[0][:4] + choices[3]  # which begins as another
        choice.append({"context": context[: 30 + 10 * at], "choices": choices, "answer": at % 4})
        last.append({"text": context[:90]})
        whole.append({"page": " ".join(text[5 * at : 5 * at + 3])})
        words = context.split()
        partial.append({"pair": [" ".join(words[:8]), " ".join([*words[:5], "never", *words[5:8]])], "answer": at % 2})
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    multiple = {"output_type": "multiple_choice", "metric_list": metrics, "doc_to_target": "answer"}
    write_task(folder, "on_choices", choice, **multiple, doc_to_text="{{context}}", doc_to_choice="choices")
    write_task(folder, "on_pairs", partial, **multiple, doc_to_text="", doc_to_choice="pair")  # as blimp
    write_task(
        folder,
        "on_last_words",
        last,
        output_type="loglikelihood",
        doc_to_text="{{text.split(' ')[:-1]|join(' ')}}",
        doc_to_target="{{' '+text.split(' ')[-1]}}",
        metric_list=[{"metric": "perplexity", "aggregation": "perplexity"}, {"metric": "acc", "aggregation": "mean"}],
    )
    write_task(
        folder,
        "on_whole_texts",
        whole,
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{page}}",
        metric_list=[{"metric": "bits_per_byte"}],
    )
    return ["on_choices", "on_pairs", "on_last_words", "on_whole_texts"]
