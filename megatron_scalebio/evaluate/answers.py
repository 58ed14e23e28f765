"""The model's answers to MT-Bench's questions, turn by turn, in FastChat's answer format."""

import zlib
from collections.abc import Callable
from typing import Any

from megatron_scalebio.errors import UserError
from megatron_scalebio.evaluate.hf_folder import HfModel
from megatron_scalebio.evaluate.questions import Question
from megatron_scalebio.evaluate.records_log import RecordsLog

# Zheng et al. 2023 sample where a category wants invention, and decode greedily where it does not.
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}


def answer_all(
    questions: list[Question],
    opened: HfModel,
    log: RecordsLog,
    *,
    name: str,
    model: str,
    max_new_tokens: int,
    seed: int,
    on_done: Callable[[Question], None] = lambda question: None,
) -> None:
    """Appends the answers that are not in the log yet.

    Args:
        name: of the model, for readers.
        model: what tells this model from others, as `hf_folder.fingerprint` does.

    Raises:
        UserError: the tokenizer has no chat template, or the log is of another model or seed.
    """
    if opened.tokenizer.chat_template is None:
        raise UserError(
            "--hf: the tokenizer has no chat template, without which there are no turns (evaluate "
            "a model that was trained on dialogues)"
        )
    made_with = {"model": model, "max_new_tokens": max_new_tokens, "seed": seed}
    for record in log.records:
        if any(record.get(name) != value for name, value in made_with.items()):
            raise UserError(
                f"{log.path}: holds answers of another model, or of other options (choose another "
                "--output, or give the model and options of then)"
            )
    done = {record["question_id"] for record in log.records}
    for question in questions:
        if question.id in done:
            continue
        turns = _answer(question, opened, max_new_tokens, seed)
        log.append(
            {
                "question_id": question.id,
                "model_id": name,
                "choices": [{"index": 0, "turns": turns}],
                "temperature": TEMPERATURES.get(question.category, 0.0),
                **made_with,
            }
        )
        on_done(question)


def _answer(question: Question, opened: HfModel, max_new_tokens: int, seed: int) -> list[str]:
    messages: list[dict[str, str]] = []
    turns = []
    for number, text in enumerate(question.turns):
        messages.append({"role": "user", "content": text})
        # A seed of its own for every turn, so that a resumed run samples the same.
        turn_seed = zlib.crc32(f"{seed}/{question.id}/{number}".encode())
        temperature = TEMPERATURES.get(question.category, 0.0)
        turns.append(_generate(messages, opened, max_new_tokens, temperature, turn_seed))
        messages.append({"role": "assistant", "content": turns[-1]})
    return turns


def _generate(
    messages: list[dict[str, str]],
    opened: HfModel,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> str:
    """One turn; empty where the dialogue leaves no room for it."""
    import torch

    inputs = opened.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(opened.model.device)
    length = inputs["input_ids"].shape[1]
    room = min(max_new_tokens, opened.max_length - length)
    if room < 1:
        return ""
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    torch.manual_seed(seed)
    with torch.inference_mode():
        output = opened.model.generate(
            **inputs,
            max_new_tokens=room,
            pad_token_id=opened.tokenizer.pad_token_id or opened.tokenizer.eos_token_id,
            **sampling,
        )
    return opened.tokenizer.decode(output[0, length:], skip_special_tokens=True).strip()
