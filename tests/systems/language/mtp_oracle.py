"""Multi-token prediction written out: one text at a time, positions counted from 1, every head and pair in a loop.

It reads the weights by name and shares no code with the modules, apart from torch's products.
"""

from __future__ import annotations

import torch


def rms(x, weight, eps=1e-5):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def turned(x, position, base=10000.0):
    """RoPE of one vector, the halves paired."""
    half = len(x) // 2
    angle = position * base ** (-torch.arange(half, dtype=x.dtype) / half)
    a, b = x[:half], x[half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()))


def block(x, weights, heads, kv_heads):
    """A pre-norm block with RoPE over the states x (n, width) of one text."""
    n, width = x.shape
    d = width // heads
    normed = rms(x, weights["input_layernorm.weight"])
    q, k, v = (normed @ weights[f"self_attn.{name}_proj.weight"].T for name in "qkv")
    out = torch.zeros_like(q)
    for h in range(heads):
        mine, theirs = slice(h * d, (h + 1) * d), h // (heads // kv_heads)
        other = slice(theirs * d, (theirs + 1) * d)
        for i in range(n):
            scores = torch.stack([turned(q[i, mine], i) @ turned(k[j, other], j) / d**0.5 for j in range(i + 1)])
            out[i, mine] = sum(p * v[j, other] for j, p in enumerate(scores.softmax(0)))
    x = x + out @ weights["self_attn.o_proj.weight"].T
    normed = rms(x, weights["post_attention_layernorm.weight"])
    gate, up = (normed @ weights[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    return x + (gate * gate.sigmoid() * up) @ weights["mlp.down_proj.weight"].T


def below(weights, prefix):
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


def decoder_states(model, ids):
    """The stream before each block and behind the last one."""
    weights, c = model.state_dict(), model.config
    stream = [weights["model.embed_tokens.weight"][ids]]
    for i in range(c.depth):
        stream.append(block(stream[-1], below(weights, f"model.layers.{i}."), c.heads, c.kv_heads))
    return stream


def sequential_logits(model, mtp, ids):
    """For each depth k = 0 .. D the logits of positions 1 .. T - k of one text t_1 .. t_T."""
    weights, c = model.state_dict(), model.config
    embedding, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    h = rms(decoder_states(model, ids)[-1], weights["model.norm.weight"])
    found = [h @ head.T]
    for k in range(1, mtp.depths + 1):
        m = below(mtp.state_dict(), f"layers.{k - 1}.")
        inputs = []
        for i in range(len(ids) - k):
            e, s = rms(embedding[ids[i + k]], m["enorm.weight"]), rms(h[i], m["hnorm.weight"])
            inputs.append(m["eh_proj.weight"] @ torch.cat((e, s)))
        if not inputs:
            break
        h = block(torch.stack(inputs), below(m, "block."), c.heads, c.kv_heads)
        found.append(rms(h, m["shared_head.norm.weight"]) @ head.T)
    return found


def parallel_logits(model, mtp, ids):
    """The same of parallel heads; all positions."""
    weights, c = model.state_dict(), model.config
    z = decoder_states(model, ids)[-2]
    blocks = [below(weights, f"model.layers.{c.depth - 1}.")]
    blocks += [below(mtp.state_dict(), f"layers.{k}.") for k in range(mtp.depths)]
    norm, head = weights["model.norm.weight"], weights["lm_head.weight"]
    return [rms(block(z, one, c.heads, c.kv_heads), norm) @ head.T for one in blocks]


ORACLES = {"sequential": sequential_logits, "parallel": parallel_logits}
