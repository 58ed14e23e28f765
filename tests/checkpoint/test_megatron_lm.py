"""Megatron-LM reads a run's checkpoint into the same model.

Its own parser takes the arguments from the checkpoint, its own builder makes the model and its
`load_checkpoint(strict=True)` fills it. Logits are compared with our own model's, loaded from the
same checkpoint. What Megatron-LM does not read from a checkpoint is in the last column of MODELS;
docs/megatron_lm.md tells users the same.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands import command, note, noted, write_config
from tests.distributed.harness import run_distributed
from tests.markov import VOCAB, write_problem

pytestmark = pytest.mark.distributed
LENGTH = 24

# The model, and the flags that Megatron-LM has to be given beside `--use-checkpoint-args`.
MODELS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "gated, no width given": (
        {
            "ffn_hidden_size": None, "hidden_size": 40, "hidden_dropout": 0.25,
            "attention_dropout": 0.125,
        },
        [],
    ),
    "query groups": (
        {
            "num_query_groups": 2, "untie_embeddings_and_output_weights": True,
            "add_qkv_bias": True, "kv_channels": 12, "rotary_base": 37, "rotary_percent": 0.5,
        },
        [],
    ),
    "gpt": (
        {
            "normalization": "LayerNorm", "position_embedding_type": "learned_absolute",
            "max_position_embeddings": 40, "swiglu": False, "add_bias_linear": True,
            "ffn_hidden_size": None,
        },
        ["--no-bias-gelu-fusion"],
    ),
    "gpt2": (
        {
            "swiglu": False, "activation": "gelu_tanh", "add_bias_linear": True,
            "norm_epsilon": 1e-2,
        },
        ["--norm-epsilon", "1e-2"],
    ),
    "window": (
        {"window_size": [5, 0], "window_attn_skip_freq": 2, "qk_layernorm": True},
        ["--window-size", "5,0", "--window-attn-skip-freq", "2", "--qk-layernorm"],
    ),
    "rope of neighbours": ({"rotary_interleaved": True}, []),
    "llama 3.1": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}, "rotary_base": 500_000},
        ["--use-rope-scaling"],
    ),
    "linear": (
        {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
        ["--rotary-seq-len-interpolation-factor", "3"],
    ),
    "yarn": (
        {
            "rope_scaling": {
                "rope_type": "yarn", "factor": 6.0, "original_max_position_embeddings": 8,
                "beta_fast": 20.0, "beta_slow": 2.0,
            },
        },
        [
            "--rotary-scaling-factor", "6", "--yarn-original-max-position-embeddings", "8",
            "--yarn-beta-fast", "20", "--yarn-beta-slow", "2",
        ],
    ),
}  # fmt: skip

# Of Megatron-LM's own machine and batches, and a tokenizer, as these data have none.
SURROUNDINGS = [
    "--micro-batch-size", "1", "--finetune", "--distributed-backend", "gloo",
    "--use-cpu-initialization", "--transformer-impl", "local",
    "--no-persist-layer-norm", "--no-masked-softmax-fusion", "--no-gradient-accumulation-fusion",
    "--no-bias-dropout-fusion", "--no-rope-fusion",
    "--no-use-tokenizer-model-from-checkpoint-args", "--tokenizer-type", "NullTokenizer",
    "--vocab-size", str(VOCAB),
]  # fmt: skip


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("read by Megatron-LM")
    sources, validation = write_problem(
        folder / "data", [0.6, 0.4], 0, length=17, examples=20, validation=20
    )
    for name, (model, _) in MODELS.items():
        write_config(
            folder / f"{name}.yaml", sources, validation, optimizer={"lr": 3e-2},
            train={"train_iters": 2, "output": str(folder / name)},
            model={**model, "init_method_std": 0.1},  # such that attention is not all alike
        )  # fmt: skip
    run_distributed(run_and_read, 1, str(folder))
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_megatron_lm_computes_the_same_logits(read: Path, name: str) -> None:
    code, said = noted(read / "noted", name)
    assert code == 0, said
    ours, theirs, dropouts, vocab_size = torch.load(read / f"{name}.pt")
    assert ours.std() > 0.3
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    model = MODELS[name][0]
    assert dropouts == [model.get("hidden_dropout", 0.0), model.get("attention_dropout", 0.0)]
    assert vocab_size == VOCAB  # not padded to Megatron's own multiple


def run_and_read(folder_name: str) -> None:
    folder = Path(folder_name)
    torch.compiler.set_stance("force_eager")  # Megatron's fusions, which take long to compile
    for name in MODELS:
        note(folder / "noted", name, command("reweight", "--config", folder / f"{name}.yaml"))
    for name, (_, flags) in MODELS.items():
        checkpoints = folder / name / "checkpoints"
        theirs = megatron_lm(checkpoints, flags)
        dropouts = [theirs.config.hidden_dropout, theirs.config.attention_dropout]
        ours = our_own(folder / f"{name}.yaml", checkpoints)
        result = (logits(ours), logits(theirs), dropouts, theirs.vocab_size)
        torch.save(result, folder / f"{name}.pt")


def megatron_lm(load: Path, flags: list[str]) -> Any:
    from megatron.core import rerun_state_machine
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import arguments, global_vars, initialize
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.models.gpt import GPTModelBuilder

    from megatron_scalebio.compat.megatron_lm import adapt

    adapt()
    global_vars.unset_global_variables()  # of the model before
    rerun_state_machine.destroy_rerun_state_machine()
    sys.argv = ["pretrain_gpt.py", "--use-checkpoint-args", "--load", str(load)]
    sys.argv += [*SURROUNDINGS, *flags]
    args = arguments.parse_and_validate_args()
    initialize.initialize_megatron(allow_no_cuda=True)
    config = gpt_config_from_args(args)
    config.finalize()
    model = GPTModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
    load_checkpoint([model], None, None, strict=True)
    return model


def our_own(config_path: Path, load: Path) -> Any:
    from megatron_scalebio.checkpoint.saver import load_pretrained
    from megatron_scalebio.config_loader import load_config
    from megatron_scalebio.model.provider import build_model
    from megatron_scalebio.model.settings import transformer_config

    config = load_config(str(config_path))
    chunks = build_model(config, transformer_config(config), VOCAB)
    load_pretrained(chunks, load, VOCAB)
    return chunks[0]


def logits(model: Any) -> torch.Tensor:
    tokens_BS = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    positions_BS = torch.arange(LENGTH).expand(2, -1)
    with torch.no_grad():
        return model.eval()(tokens_BS, positions_BS, None)[..., :VOCAB]
