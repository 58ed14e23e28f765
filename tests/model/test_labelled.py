"""Logits of labelled positions alone: the losses and gradients of computing all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.harness import next_layout, run_distributed

pytestmark = pytest.mark.distributed
SEQ, VOCAB = 16, 61
TP2 = {"tensor_model_parallel_size": 2}
LAYOUTS = {
    "one": (1, {}), "tp2": (2, TP2),
    "tp2-sequence-parallel": (2, {**TP2, "sequence_parallel": True}),
}  # fmt: skip
MODEL = {
    "num_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "ffn_hidden_size": 48,
    "vocab_size": VOCAB, "make_vocab_size_divisible_by": 16, "final_logit_softcapping": 3.0,
}  # fmt: skip
CASES = [(layout, frozen) for layout in LAYOUTS for frozen in (False, True)]


def on_ranks(folder: str) -> None:
    from megatron_scalebio import runtime
    from megatron_scalebio.config_loader import load_config
    from megatron_scalebio.core.batch import MicroBatch, gpt_losses
    from megatron_scalebio.model.init import initialize_weights
    from megatron_scalebio.model.provider import build_model
    from megatron_scalebio.model.settings import transformer_config

    draw = torch.Generator().manual_seed(2)
    tokens_BS, labels_BS = torch.randint(0, VOCAB, (2, 3, SEQ), generator=draw)
    mask_BS = (torch.rand(3, SEQ, generator=draw) < 0.4).float()
    weight_BS = torch.rand(3, SEQ, generator=draw) * mask_BS
    batch = MicroBatch(
        tokens_BS, labels_BS, mask_BS, torch.arange(SEQ).expand(3, -1), torch.zeros(3).long()
    )
    for name, (ranks, parallel) in LAYOUTS.items():
        if ranks != torch.distributed.get_world_size():
            continue
        config = load_config(
            None, {"data": {"seq_length": SEQ}, "model": MODEL, "parallel": parallel}
        )
        runtime.start(config)
        [model] = build_model(config, transformer_config(config), VOCAB)
        initialize_weights([model], 1, 0.2, 1)
        head_rows: list[int] = []
        model.output_layer.register_forward_pre_hook(
            lambda layer, inputs, rows=head_rows: rows.append(inputs[0][..., 0].numel())
        )
        for frozen in (False, True):
            model.embedding.requires_grad_(not frozen)
            found = []
            for losses in (lambda m, b: m(**b.inputs(torch.device("cpu"))), gpt_losses):
                model.zero_grad()
                loss_BS = torch.where(mask_BS > 0, losses(model, batch), 0.0)
                (loss_BS * weight_BS).sum().backward()
                gradients = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
                found.append((loss_BS.detach(), gradients))
            rank = torch.distributed.get_rank()
            torch.save((found, head_rows[-1]), Path(folder) / f"{name}-{frozen}-{rank}.pt")
        # A part of a sequence that counts nowhere has a gradient, too: of zeros.
        nowhere = MicroBatch(tokens_BS, labels_BS, mask_BS * 0, batch.positions_BS, batch.group_B)
        (gpt_losses(model, nowhere) * 0).sum().backward()
        assert head_rows[-1] == 1
        next_layout()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labelled")
    for ranks in (1, 2):
        run_distributed(start, ranks, str(folder))
    return folder


def start(folder: str) -> None:
    torch.distributed.init_process_group("gloo")
    on_ranks(folder)


@pytest.mark.parametrize(("name", "frozen"), CASES)
def test_losses_and_gradients_are_those_of_all_logits(
    folder: Path, name: str, frozen: bool
) -> None:
    for rank in range(LAYOUTS[name][0]):
        path = folder / f"{name}-{frozen}-{rank}.pt"
        ((losses, gradients), (ours, our_gradients)), rows = torch.load(path, weights_only=True)
        assert rows == (losses > 0).sum() < losses.numel() / 2
        torch.testing.assert_close(ours, losses, rtol=1e-6, atol=0)
        assert our_gradients.keys() == gradients.keys()
        assert any("embedding" in key for key in gradients) != frozen
        for key, gradient in gradients.items():
            distance = (our_gradients[key] - gradient).norm() / gradient.norm()
            assert distance <= 1e-6, (key, float(distance))
