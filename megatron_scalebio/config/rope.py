"""How rope is stretched beyond the length that a model was first trained on.

Types and options carry transformers' names and mean what they mean there.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal

from megatron_scalebio.config.checks import require_positive
from megatron_scalebio.errors import UserError

# Options of each type, besides `factor`.
_OPTIONS = {
    "linear": set[str](),
    "dynamic": set[str](),
    "llama3": {"low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
        "truncate", "mscale", "mscale_all_dim",
    },
    "longrope": {
        "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor",
    },
}  # fmt: skip


@dataclass
class RopeScaling:
    """How rope's frequencies are stretched; `model.rope` has the formulas.

    Attributes:
        factor: how many times longer sequences become.
        original_max_position_embeddings: in tokens, before the stretch.
        low_freq_factor, high_freq_factor: llama3.
        attention_factor: of cos and sin; None: what the type derives from `factor`.
        beta_fast, beta_slow: turns within the original length of the channels that keep their
            frequency, and of those that take 1/factor of it (yarn).
        truncate: round the bounds between these channels outwards (yarn).
        mscale, mscale_all_dim: shape the derived attention factor, where both are set (yarn).
        short_factor, long_factor: what each frequency is divided by, in runs whose `seq_length`
            is up to, or above, the original length (longrope).
    """

    rope_type: Literal["llama3", "linear", "yarn", "longrope", "dynamic"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float | None = None
    mscale_all_dim: float | None = None
    short_factor: list[float] | None = None
    long_factor: list[float] | None = None

    def __post_init__(self) -> None:
        require_positive(
            self, "factor", "low_freq_factor", "high_freq_factor",
            "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
        )  # fmt: skip
        require_positive(self, "mscale", "mscale_all_dim", or_zero=True)
        if self.original_max_position_embeddings < 2:
            raise UserError(
                f"original_max_position_embeddings: {self.original_max_position_embeddings!r} is "
                "below 2 (give the length of the first training)"
            )
        if self.beta_fast < self.beta_slow:
            raise UserError(
                f"beta_fast: {self.beta_fast!r} is below beta_slow {self.beta_slow} (swap them)"
            )
        self._refuse_foreign()
        if self.rope_type == "longrope":
            self._check_factors("short_factor")
            self._check_factors("long_factor")

    def _refuse_foreign(self) -> None:
        """Refuses an option that another type has, rather than to ignore it."""
        every, mine = set[str]().union(*_OPTIONS.values()), _OPTIONS[self.rope_type]
        for spec in fields(self):
            # The original length has a default that resolved configurations spell out.
            foreign = spec.name in every - mine - {"original_max_position_embeddings"}
            if foreign and getattr(self, spec.name) != spec.default:
                raise UserError(
                    f"{spec.name}: {getattr(self, spec.name)!r} is not used by {self.rope_type} "
                    "scaling (remove it, or choose another rope_type)"
                )

    def _check_factors(self, name: str) -> None:
        values: list[float] | None = getattr(self, name)
        if not values or not all(math.isfinite(value) and value > 0 for value in values):
            raise UserError(
                f"{name}: {values!r} is not a list of numbers above 0 (give one a frequency)"
            )

    def check_model(self, rotary_base: int, turned: int) -> None:
        """Checks what the model and its scaling decide together.

        Args:
            turned: channels of a head that rope turns.
        """
        for name in ("short_factor", "long_factor"):
            values: list[float] | None = getattr(self, name)
            if values and len(values) != turned // 2:
                raise UserError(
                    f"rope_scaling.{name}: {values!r} has {len(values)} numbers for {turned // 2} "
                    f"frequencies (give {turned // 2})"
                )
        if self.rope_type == "yarn" and rotary_base < 2:
            raise UserError(f"rotary_base: {rotary_base!r} is too low for yarn (use 10000)")

    @property
    def longest(self) -> int:
        """The length that the scaling stretches to, in tokens; 0 where it does not say."""
        known = "original_max_position_embeddings" in _OPTIONS[self.rope_type]
        return int(self.factor * self.original_max_position_embeddings) if known else 0

    @property
    def scale_of_cos_and_sin(self) -> float:
        """What rope's cos and sin are multiplied by; the scores of attention by its square."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.factor <= 1:
            return 1.0
        if self.rope_type == "longrope":
            original = math.log(self.original_max_position_embeddings)
            return math.sqrt(1 + math.log(self.factor) / original)
        if self.rope_type == "yarn":
            strength = 0.1 * math.log(self.factor)
            if self.mscale and self.mscale_all_dim:
                return (strength * self.mscale + 1) / (strength * self.mscale_all_dim + 1)
            return strength + 1
        return 1.0
