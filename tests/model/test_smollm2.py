"""The real SmolLM2-135M-Instruct: logits, greedy answers and perplexity equal transformers'."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.distributed.harness import run_distributed
from tests.markov import write_source
from tests.smollm2 import smollm2_folder

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

PROMPTS = (
    "What is the capital of France?", "Name three primary colors.", "Count from one to ten.",
    "Write a haiku about rain.", "What does a compiler do?", "Translate 'good night' to Spanish.",
    "Why is the sky blue?", "Give me a recipe for pancakes.", "Who wrote Hamlet?",
    "Explain what a black hole is to a child.",
)  # fmt: skip
NEW_TOKENS = 24


def ask_transformers(model_folder: Path, folder: Path) -> None:
    """Greedy answers, logits along them, and the loss on them as a held-out set."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    rows, masks, logits, losses = [], [], [], []
    for prompt in PROMPTS:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        asked = tokenizer(text, return_tensors="pt").input_ids
        answer = model.generate(
            asked, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0]
        mask = torch.zeros(len(answer))
        mask[asked.shape[1] :] = 1
        with torch.no_grad():
            along = model(answer[None]).logits[0]
        token_losses = torch.nn.functional.cross_entropy(along[:-1], answer[1:], reduction="none")
        rows.append(answer)
        masks.append(mask)
        logits.append(along)
        losses += token_losses[mask[1:] > 0].tolist()
    write_source(
        folder, "answers", [r.numpy() for r in rows], [m.numpy() for m in masks], len(tokenizer)
    )
    torch.save({"rows": rows, "masks": masks, "logits": logits}, folder / "transformers.pt")
    (folder / "loss.json").write_text(json.dumps(sum(losses) / len(losses)))


def ask_megatron(model_folder: str, folder_name: str) -> None:
    from megatron_scalebio.checkpoint import saver
    from megatron_scalebio.cli import main
    from megatron_scalebio.config_loader import load_config
    from megatron_scalebio.engine.start import pretrained_checkpoint
    from megatron_scalebio.engine.state import RunState

    folder = Path(folder_name)
    test = f"answers={folder / 'answers'}"
    words = ["--hf", model_folder, "--test", test, "--seq-length", "256", "--output", str(folder)]
    assert main(["evaluate", *words, "--micro-batch-size", "2"]) == 0
    config = load_config(str(write_yaml(folder, model_folder)))
    state = RunState(config, "evaluate", folder / "cache")
    imported = pretrained_checkpoint(state, folder)
    assert imported is not None
    saver.load_pretrained(state.training.w, imported, state.data.vocab_size)
    [model] = state.training.w
    model.eval()
    held = torch.load(folder / "transformers.pt", weights_only=True)
    worst, departed = 0.0, []
    for number, (row, mask, want) in enumerate(
        zip(held["rows"], held["masks"], held["logits"], strict=True)
    ):
        with torch.no_grad():
            got = model(row[None], torch.arange(len(row))[None], None)[0, :, : want.shape[-1]]
        difference = (got - want).abs().max()
        assert difference.isfinite()
        worst = max(worst, float(difference))
        # Greedy answers are the same if the best next token is, at every place along one of them.
        chosen = got[:-1].argmax(-1)[mask[1:] > 0]
        if not torch.equal(chosen, row[1:][mask[1:] > 0]):
            departed.append(PROMPTS[number])
    (folder / "megatron.json").write_text(json.dumps({"worst": worst, "departed": departed}))


def write_yaml(folder: Path, model_folder: str) -> Path:
    path = folder / "config.yaml"
    entry = {"name": "answers", "path": str(folder / "answers")}
    content = {"model": {"hf": model_folder}, "data": {"seq_length": 256, "test": [entry]}}
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model_folder = smollm2_folder(tmp_path_factory.getbasetemp())
    folder = tmp_path_factory.mktemp("smollm2")
    ask_transformers(model_folder, folder)
    run_distributed(ask_megatron, 1, str(model_folder), str(folder))
    return folder


def test_logits_are_those_of_transformers(answers: Path) -> None:
    assert json.loads((answers / "megatron.json").read_text())["worst"] <= 1e-4


def test_greedy_answers_are_those_of_transformers(answers: Path) -> None:
    assert json.loads((answers / "megatron.json").read_text())["departed"] == []


def test_perplexity_is_that_of_transformers(answers: Path) -> None:
    want = json.loads((answers / "loss.json").read_text())
    [got] = json.loads((answers / "evaluation.json").read_text())["held_out"]["sets"]
    assert got["token_mean"] == pytest.approx(want, rel=2e-5)
