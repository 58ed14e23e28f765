"""The bilevel step written naively from its definition: a plain Llama, one example at a time.

Nothing here is shared with the package but the weights (by their Megatron names) and the examples.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

Weights = dict[str, torch.Tensor]


class Routers:
    """What the routers of one micro-batch saw, by layer: logits, and the load of each expert."""

    def __init__(self) -> None:
        self.logits: dict[int, list[torch.Tensor]] = {}
        self.loads: dict[int, torch.Tensor] = {}

    def saw(self, layer: int, logits: torch.Tensor, chosen: torch.Tensor) -> None:
        self.logits.setdefault(layer, []).append(logits)
        load = torch.bincount(chosen.flatten(), minlength=logits.shape[1])
        self.loads[layer] = self.loads.get(layer, 0) + load

    def losses(self, shape: dict) -> torch.Tensor:
        """Balance: c · E Σ f_i P_i (Fedus et al. 2021), of sigmoid scores; and the z-loss."""
        total = torch.zeros((), dtype=torch.float64)
        for parts in self.logits.values():
            logits = torch.cat(parts)
            share = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
            best = share.topk(shape["topk"], dim=-1).indices
            experts = logits.shape[1]
            f = torch.bincount(best.flatten(), minlength=experts) / best.numel()
            total = total + shape["aux"] * experts * (f * share.mean(0)).sum()
            total = total + shape["z"] * logits.logsumexp(-1).square().mean()
        return total


def example_loss(
    weights: Weights, shape: dict, tokens: torch.Tensor, targets: torch.Tensor,
    routers: Routers | None = None,
) -> torch.Tensor:  # fmt: skip
    """Summed cross-entropy of an unpadded example's target tokens."""
    logits = _logits(weights, shape, tokens[:-1], routers)
    losses = F.cross_entropy(logits, tokens[1:], reduction="none")
    return losses[targets[1:] > 0].sum()


def _logits(
    weights: Weights, shape: dict, tokens: torch.Tensor, routers: Routers | None
) -> torch.Tensor:
    x = weights["embedding.word_embeddings.weight"][tokens]
    for layer in range(shape["layers"]):
        block = {k: v[layer] for k, v in weights.items() if k.startswith("decoder.layers.")}
        get = {k.removeprefix("decoder.layers."): v for k, v in block.items()}.get
        h = _rms(x, get("self_attention.linear_qkv.layer_norm_weight"))
        x = x + _attention(h, get, shape)
        if "topk" in shape:
            h = _rms(x, get("pre_mlp_layernorm.weight"))
            x = x + _experts(h, get, shape, (layer, tokens.data_ptr()), routers)
            continue
        h = _rms(x, get("mlp.linear_fc1.layer_norm_weight"))
        gate, up = _linear(h, get, "mlp.linear_fc1").chunk(2, dim=-1)
        x = x + _linear(F.silu(gate) * up, get, "mlp.linear_fc2")
    x = _rms(x, weights["decoder.final_layernorm.weight"])
    head = weights.get("output_layer.weight", weights["embedding.word_embeddings.weight"])
    return x @ head[: shape["vocab"]].T


def _mlp(x: torch.Tensor, fc1: torch.Tensor, fc2: torch.Tensor) -> torch.Tensor:
    gate, up = (x @ fc1.T).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ fc2.T


def _experts(
    h: torch.Tensor, get, shape: dict, place: tuple[int, int], routers: Routers | None
) -> torch.Tensor:
    """Each token through its best experts, by sigmoid scores and a bias, and the shared one.

    Args:
        place: the layer, and where the example lies in memory.
    """
    logits = h @ get("mlp.router.weight").T
    scores = logits.sigmoid()
    chosen = (scores + get("mlp.router.expert_bias")).topk(shape["topk"], dim=-1).indices
    if "choices" in shape:  # the first model to see an example decides
        chosen = shape["choices"].setdefault(place, chosen)
    if routers is not None:
        routers.saw(place[0], logits, chosen)
    names = ("mlp.experts.experts.linear_fc1.weight", "mlp.experts.experts.linear_fc2.weight")
    fc1_E, fc2_E = map(get, names)
    rows = []
    for t in range(len(h)):
        if shape["on_input"]:  # by the score of the one chosen
            [e] = chosen[t].tolist()
            rows.append(_mlp(scores[t, e] * h[t], fc1_E[e], fc2_E[e]))
            continue
        share = scores[t, chosen[t]] / scores[t, chosen[t]].sum()
        parts = [_mlp(h[t], fc1_E[e], fc2_E[e]) for e in chosen[t].tolist()]
        rows.append(sum(s * part for s, part in zip(share, parts, strict=True)))
    shared = (get(f"mlp.shared_experts.linear_fc{n}.weight") for n in (1, 2))
    return torch.stack(rows) + _mlp(h, *shared)


def router_losses(
    weights: Weights, shape: dict, train: dict[int, list]
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """Mean over the training micro-batches, and each layer's load.

    They are neighbours by length, or `rows` of places in the global batch.
    """
    examples = sorted((pair for pairs in train.values() for pair in pairs), key=lambda p: p[2])
    examples.sort(key=lambda pair: len(pair[0]))
    size = shape["micro_batch"]
    batches = [examples[at : at + size] for at in range(0, len(examples), size)]
    if "rows" in shape:
        batches = [[x for x in examples if x[2] in row] for row in shape["rows"]]
    total, loads = torch.zeros((), dtype=torch.float64), {}
    for batch in batches:
        routers = Routers()
        for tokens, targets, _ in batch:
            example_loss(weights, shape, tokens, targets, routers)
        total = total + routers.losses(shape) / len(batches)
        loads = {n: loads.get(n, 0) + load for n, load in routers.loads.items()}
    return total, loads


def _linear(x: torch.Tensor, get, name: str) -> torch.Tensor:
    return F.linear(x, get(f"{name}.weight"), get(f"{name}.bias"))


def _rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


def _attention(h: torch.Tensor, get, shape: dict) -> torch.Tensor:
    length, heads, groups = len(h), shape["heads"], shape["groups"]
    size = h.shape[1] // heads
    # Megatron keeps the query heads of a group beside its key and value.
    qkv = _linear(h, get, "self_attention.linear_qkv").view(
        length, groups, heads // groups + 2, size
    )
    q = qkv[:, :, :-2].reshape(length, heads, size)
    k = qkv[:, :, -2].repeat_interleave(heads // groups, dim=1)
    v = qkv[:, :, -1].repeat_interleave(heads // groups, dim=1)
    frequency = 10000.0 ** (-torch.arange(0, size, 2).float() / size)
    angle = torch.outer(torch.arange(length).float(), frequency).repeat(1, 2)[:, None]

    def turn(y):
        rotated = torch.cat((-y[..., size // 2 :], y[..., : size // 2]), dim=-1)
        return y * angle.cos() + rotated * angle.sin()

    scores = torch.einsum("qhd,khd->hqk", turn(q), turn(k)) / math.sqrt(size)
    past = torch.ones(length, length).tril().bool()
    context = torch.einsum("hqk,khd->qhd", scores.masked_fill(~past, -math.inf).softmax(-1), v)
    return _linear(context.reshape(length, -1), get, "self_attention.linear_proj")


def mean_losses(weights: Weights, shape: dict, groups: dict[int, list], mean: str) -> dict:
    """ℓ_i of each group of (tokens, targets) examples."""
    result = {}
    for i, examples in groups.items():
        sums = [example_loss(weights, shape, t, m) for t, m, *_ in examples]
        counts = [(m[1:] > 0).sum() for _, m, *_ in examples]
        if mean == "token":
            result[i] = sum(sums) / sum(counts)
        else:
            result[i] = sum(s / c for s, c in zip(sums, counts, strict=True)) / len(sums)
    return result


def bilevel_gradients(
    w: Weights, u: Weights, logits: torch.Tensor, train: dict, valid: dict, shares: list[float],
    alpha: float, shape: dict, mean: str, inclusion: tuple[list, list] | None = None,
) -> tuple[Weights, Weights, torch.Tensor, dict]:  # fmt: skip
    """Gradients in w, u (each divided by its loss coefficients) and λ by autograd of the objective.

    F = L1(w) + α (L2(λ, w) − L2(λ, u)); u ascends F, so its descent gradient is −∂F/∂u. Where
    `inclusion` gives the probabilities (of sources, of validation sets) of being in a batch, those
    that are there weigh 1 / inclusion, so that F has the right expectation (Horvitz-Thompson).
    Where shape has `replays`, u's tokens go to the experts that w chose.
    """
    of_sources, of_sets = inclusion or ([1.0] * len(logits), [1.0] * len(shares))
    shape = shape | ({"choices": {}} if shape.get("replays") else {})
    w = {k: v.detach().clone().requires_grad_() for k, v in w.items()}
    u = {k: v.detach().clone().requires_grad_() for k, v in u.items()}
    logits = logits.clone().requires_grad_()
    p = torch.softmax(logits, 0)
    loss_w, loss_u = (mean_losses(x, shape, train, mean) for x in (w, u))
    validation = mean_losses(w, shape, valid, mean)
    upper = sum(shares[v] / of_sets[v] * loss for v, loss in validation.items())
    lower = sum(p[i] / of_sources[i] * (loss_w[i] - loss_u[i]) for i in loss_w)
    if "topk" in shape:
        lower = lower + router_losses(w, shape, train)[0] - router_losses(u, shape, train)[0]
    (upper + alpha * lower).backward()
    grads_w = {k: v.grad / (1 + alpha) for k, v in w.items() if v.grad is not None}
    grads_u = {k: -v.grad / alpha for k, v in u.items() if v.grad is not None}
    losses = {
        "w": [loss_w[i].item() for i in sorted(loss_w)],
        "u": [loss_u[i].item() for i in sorted(loss_u)],
        "validation": [validation[v].item() for v in sorted(validation)],
    }
    return grads_w, grads_u, logits.grad, losses
