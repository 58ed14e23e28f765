"""OLMo 2 and 3: norms after attention and MLP alone, and of queries and keys over all heads."""

from functools import partial
from typing import Any

from megatron_scalebio.families.base import Family, HfConfig, layered_rope
from megatron_scalebio.families.llama import COMMON, POST_NORMS, silu_fields

_TENSORS = (
    *(row for row in COMMON if not row.megatron.endswith("layer_norm_weight")),
    *POST_NORMS,
)


def _olmo2(config: HfConfig, **common: Any) -> dict[str, Any]:
    config.require("attention_bias", False)
    return {
        **silu_fields(config, **common),
        "pre_norms": False,
        "post_norms": True,
        "qk_layernorm": True,
        "qk_layernorm_whole": True,
    }


FAMILIES = (
    Family(("Olmo2ForCausalLM",), _olmo2, _TENSORS),
    Family(("Olmo3ForCausalLM",), partial(_olmo2, positions=layered_rope), _TENSORS),
)
