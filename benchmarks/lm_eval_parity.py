"""Does a model that went through Megatron's checkpoint answer GSM8K as the one it came from?

The Hugging Face folder is imported, exported and given to `evaluate --tasks gsm8k`; transformers
takes the same prompts with the original folder. Compared, problem by problem: the greedy answers,
and the log-likelihood of the right answer, lm-eval's of the exported model against a plain sum of
transformers' log-softmax.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import ROOT, table, write_json

STOPS = ("Question:", "</s>", "<|im_end|>")  # of tasks/gsm8k.yaml


def evaluate_export(hf: Path, problems: Path, limit: int, tokens: int, scratch: Path) -> Path:
    """Imports, exports and evaluates; the exported folder."""
    start = [sys.executable, "-m", "megatron_scalebio"]
    exported = scratch / "exported"
    convert = [*start, "convert"]
    evaluate = [*start, "evaluate", "--hf", exported, "--tasks", "gsm8k", "--limit", limit]
    evaluate += ["--data", f"gsm8k={problems}", "--max-new-tokens", tokens]
    for words in (
        [*convert, "import", "--hf", hf, "--save", scratch / "megatron"],
        [*convert, "export", "--load", scratch / "megatron", "--hf-reference", hf,
         "--save", exported],
        [*evaluate, "--output", scratch / "run"],
    ):  # fmt: skip
        subprocess.run([str(word) for word in words], check=True, cwd=ROOT)
    return exported


def read_samples(run: Path) -> list[dict[str, Any]]:
    """A sample of each problem, whichever filter it is of."""
    lines = (run / "samples_gsm8k.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    return list({sample["doc_id"]: sample for sample in samples}.values())


def transformers_answers(hf: Path, samples: list[dict[str, Any]], tokens: int) -> list[Any]:
    """(greedy answer up to a stop word, log-likelihood of the target) by the original model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hf)
    model = AutoModelForCausalLM.from_pretrained(hf, dtype="auto").eval()
    answers = []
    for sample in samples:
        prompt = tokenizer(sample["prompt"], add_special_tokens=False, return_tensors="pt")
        length = prompt.input_ids.shape[1]
        with torch.no_grad():
            written = model.generate(
                **prompt, do_sample=False, max_new_tokens=tokens,
                stop_strings=list(STOPS), tokenizer=tokenizer,
            )[0, length:]  # fmt: skip
            text = tokenizer.decode(written, skip_special_tokens=True)
            for stop in STOPS:
                text = text.split(stop)[0]
            whole = tokenizer(
                sample["prompt"] + sample["target"], add_special_tokens=False, return_tensors="pt"
            ).input_ids
            log_probs = model(whole).logits[0, length - 1 : -1].float().log_softmax(-1)
        likelihood = float(log_probs.gather(1, whole[0, length:, None]).sum())
        answers.append((text, likelihood))
    return answers


def lm_eval_likelihoods(exported: Path, samples: list[dict[str, Any]]) -> list[float]:
    """lm-eval's own log-likelihoods of the targets by the exported model."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from megatron_scalebio.evaluate.hf_folder import open_folder

    opened = open_folder(exported)
    lm = HFLM(pretrained=opened.model, tokenizer=opened.tokenizer, backend="causal",
              max_length=opened.max_length, batch_size=1)  # fmt: skip
    requests = [
        Instance("loglikelihood", doc={}, arguments=(each["prompt"], each["target"]), idx=0)
        for each in samples
    ]
    return [likelihood for likelihood, _ in lm.loglikelihood(requests, disable_tqdm=True)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hf", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--data", type=Path, required=True, help="JSONL of GSM8K")
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    hf, problems = args.hf.resolve(), args.data.resolve()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        exported = evaluate_export(hf, problems, args.limit, args.max_new_tokens, scratch)
        samples = read_samples(scratch / "run")
        ours = lm_eval_likelihoods(exported, samples)
        theirs = transformers_answers(hf, samples, args.max_new_tokens)
    same = [s["response"] == text for s, (text, _) in zip(samples, theirs, strict=True)]
    apart = [abs(a - b) for a, (_, b) in zip(ours, theirs, strict=True)]
    smallest, largest = min(ours), max(ours)
    rows = [
        ["greedy answers that are equal", f"{sum(same)} of {len(same)}"],
        ["log-likelihoods, from and to", f"{smallest:.2f}, {largest:.2f}"],
        ["largest difference of one", f"{max(apart):.2e}"],
    ]
    print(table(["GSM8K: lm-eval, exported | transformers, original", ""], rows))
    content = {"equal": same, "lm_eval": ours, "transformers": [value for _, value in theirs]}
    write_json(args.json, content)
    return 0 if all(same) else 1


if __name__ == "__main__":
    sys.exit(main())
