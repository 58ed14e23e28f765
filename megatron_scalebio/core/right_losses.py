"""What Megatron's configurations have to be, for the gradients of a step to be right."""

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.transformer.transformer_config import TransformerConfig

_BALANCES = ("aux_loss", "seq_aux_loss", "none")


def require_right_losses(config: TransformerConfig, ddp: DistributedDataParallelConfig) -> None:
    """Refuses a model of whose losses a step's gradients would not be right.

    Raises:
        ValueError: naming the option, and what to set it to.
    """
    balance = config.moe_router_load_balancing_type
    for wrong, why in (
        (
            not config.calculate_per_token_loss,
            "calculate_per_token_loss is False: Megatron would divide the objective, whose "
            "coefficients are those of the global batch, once more; set it to True",
        ),
        (
            config.num_moe_experts and balance not in _BALANCES,
            f"moe_router_load_balancing_type is {balance!r}, which would count validation passes, "
            f"too; use one of {_BALANCES}",
        ),
        (config.fp16, "fp16 is True: use bf16, whose losses need no scaling"),
        (
            config.fp8_param,
            "fp8_param is True: u shares w's storage, which weights kept in FP8 can't; set it to "
            "False",
        ),
        (
            config.mtp_num_layers,
            "mtp_num_layers is set, a loss that is scaled for a division by tokens that a step "
            "does not make; switch it off",
        ),
    ):
        if wrong:
            raise ValueError(f"the model's config: {why}")
    if ddp.check_for_nan_in_grad:
        raise ValueError(
            "ddp.check_for_nan_in_grad is True, which needs Megatron-LM's own loop; set it to "
            "False: a step whose gradients are not finite is left out anyway"
        )
