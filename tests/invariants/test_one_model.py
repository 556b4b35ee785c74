"""What a run leaves behind is the model that it trained."""

import torch
from runs import set_up, tiny
from transformers import AutoModelForCausalLM

from overnight.model.export import export
from overnight.model.generate import Writer
from overnight.model.gpt2 import published
from overnight.training.train import train_step


def test_a_greedy_sample_while_training_is_the_one_of_the_reloaded_export(in_process, tmp_path):
    run = set_up(tiny(in_process, "--name", "sampled"))
    for _ in range(10):
        train_step(run)
        run.iteration += 1
    how = {"tokens": 24, "temperature": 0.0, "top_k": 0, "seed": 0}
    writer = Writer(published(run.model, run.recipe.model), run.tokenizer)
    while_training = [writer.after(prompt, **how) for prompt in ("The", "If a")]
    ids = torch.arange(64)[None]
    export(published(run.model, run.recipe.model), run.tokenizer, tmp_path / "model", ids)
    assert [Writer.load(str(tmp_path / "model")).after(prompt, **how) for prompt in ("The", "If a")] == while_training
    assert len(set("".join(while_training))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval().to(run.device.torch)
    ids = ids.to(run.device.torch)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, published(run.model, run.recipe.model)(ids).logits)
