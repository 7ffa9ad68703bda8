"""The mathematics of PST as explicit loops in float64, to test the layers against.

Written from the equations alone and sharing nothing with the package: maps are numpy arrays, every token, head, query,
key and child has its own turn in a plain loop. Slow on purpose; a few hundred tokens are its limit.

Weights come as a flat dict of arrays under the package's state-dict names; `part(w, 'pst.')` is that of a submodule.
"""
import math

import numpy as np

EPS = 1e-5  # of every batch norm


def arrays(state_dict):
    """A state dict of tensors as float64 arrays."""
    return {name: tensor.double().numpy() for name, tensor in state_dict.items()}


def part(w, prefix):
    """The weights whose names start with prefix, under the rest of their names."""
    return {name[len(prefix):]: value for name, value in w.items() if name.startswith(prefix)}


def silu(x):
    return x / (1 + np.exp(-x))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def conv_norm(w, x, stride=1):
    """Convolution, then batch norm with its running statistics. x (B, C, H, W); depthwise if the weight says so."""
    weight = w['conv.weight']
    out_chs, in_chs, size, _ = weight.shape
    depthwise = in_chs == 1 and x.shape[1] > 1
    pad = size // 2
    B, _, H, W = x.shape
    padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    y = np.zeros((B, out_chs, (H - 1) // stride + 1, (W - 1) // stride + 1))
    for b in range(B):
        for i in range(y.shape[2]):
            for j in range(y.shape[3]):
                window = padded[b, :, i * stride:i * stride + size, j * stride:j * stride + size]
                for c in range(out_chs):
                    y[b, c, i, j] = np.sum(weight[c, 0] * window[c] if depthwise else weight[c] * window)
    for c in range(out_chs):
        deviation = math.sqrt(w['bn.running_var'][c] + EPS)
        y[:, c] = (y[:, c] - w['bn.running_mean'][c]) / deviation * w['bn.weight'][c] + w['bn.bias'][c]
    return y


def upsample(x, H, W):
    """Bilinear resize of x (B, C, h, w) with pixel centres at halves (align_corners=False), edges repeated."""
    B, C, h, w = x.shape
    y = np.zeros((B, C, H, W))
    for i in range(H):
        top = max((i + 0.5) * h / H - 0.5, 0.)
        i0 = int(top)
        i1, di = min(i0 + 1, h - 1), top - i0
        for j in range(W):
            left = max((j + 0.5) * w / W - 0.5, 0.)
            j0 = int(left)
            j1, dj = min(j0 + 1, w - 1), left - j0
            upper = (1 - dj) * x[:, :, i0, j0] + dj * x[:, :, i0, j1]
            lower = (1 - dj) * x[:, :, i1, j0] + dj * x[:, :, i1, j1]
            y[:, :, i, j] = (1 - di) * upper + di * lower
    return y


def softmax_average(logits, values):
    """sum_s softmax(logits)_s values_s, over lists."""
    highest = max(logits)
    weights = [math.exp(logit - highest) for logit in logits]
    return sum(weight * value for weight, value in zip(weights, values)) / sum(weights)


def children(token, fine_size, coarse_size):
    """Fine places (row, col) owned by the coarse token (row, col), those that exist."""
    ratio = 1 if fine_size == coarse_size else 2
    rows = [ratio * token[0] + di for di in range(ratio)]
    cols = [ratio * token[1] + dj for dj in range(ratio)]
    return [(row, col) for row in rows for col in cols if row < fine_size[0] and col < fine_size[1]]


def pooled(vectors, pool):
    """Means of vectors, a dict from places, over squares of pool x pool places, and the share of each that exists."""
    squares = {}
    for (i, j), vector in vectors.items():
        squares.setdefault((i // pool, j // pool), []).append(vector)
    return ({place: sum(square) / len(square) for place, square in squares.items()},
            {place: len(square) / pool ** 2 for place, square in squares.items()})


def head_attention(q, k, v, fine_k, fine_v, topk, fusion, gate, pool=1):
    """Attention of one head of one image.

    q, fine_k, fine_v: dicts from the places of the fine map to vectors of d; k, v: those of the coarse map.
    gate: weight (d, 2d) and bias (d,). Returns the attended vector of every fine place. With pool above 1 the means of
    squares of coarse tokens stand for these, each as heavy as its square is full.
    """
    d = len(next(iter(q.values())))
    fine_size = tuple(np.max(list(q), axis=0) + 1)
    coarse_size = tuple(np.max(list(k), axis=0) + 1)
    (k, share), (v, _) = pooled(k, pool), pooled(v, pool)

    def offspring(token):
        return [
            child
            for i in range(pool * token[0], pool * token[0] + pool)
            for j in range(pool * token[1], pool * token[1] + pool)
            if i < coarse_size[0] and j < coarse_size[1]
            for child in children((i, j), fine_size, coarse_size)]

    def logit(query, key):
        return float(np.dot(query, key)) / math.sqrt(d)

    def score(token):
        return sum(logit(query, k[token]) for query in q.values()) / len(q)

    chosen = sorted(k, key=score, reverse=True)[:topk] if topk else []
    out = {}
    for place, query in q.items():
        coarse = softmax_average(
            [logit(query, k[token]) + math.log(share[token]) for token in k], [v[token] for token in k])
        if not chosen:
            out[place] = coarse
            continue
        fine_logits, fine_values, shares = [], [], []
        for token in chosen:
            family = offspring(token)
            for child in family:
                fine_logits.append(logit(query, fine_k[child]))
                fine_values.append(fine_v[child])
                shares.append(share[token] / len(family))
        if fusion == 'gate':
            fine = softmax_average(fine_logits, fine_values)
            g = sigmoid(gate[0] @ np.concatenate([coarse, fine]) + gate[1])
            out[place] = g * fine + (1 - g) * coarse
        else:
            logits = [logit(query, k[token]) + math.log(share[token]) for token in k if token not in chosen]
            values = [v[token] for token in k if token not in chosen]
            logits += [fine_logit + math.log(part) for fine_logit, part in zip(fine_logits, shares)]
            out[place] = softmax_average(logits, values + fine_values)
    return out


def attention(w, x, u, heads, topk=0, fusion='gate', pool=1):
    """Pyramid sparse attention: x (B, C, H, W) over u (B, C, h, w)."""
    B, C, H, W = x.shape
    _, _, h, width = u.shape
    d = C // heads
    q = conv_norm(part(w, 'q.'), x)
    coarse_kv = conv_norm(part(w, 'kv.'), u)
    fine_kv = conv_norm(part(w, 'kv.'), x)
    fine_places = [(i, j) for i in range(H) for j in range(W)]
    coarse_places = [(i, j) for i in range(h) for j in range(width)]

    def vectors(x, b, first, places):
        return {(i, j): x[b, first:first + d, i, j] for i, j in places}

    out = np.zeros(x.shape)
    values = np.zeros(u.shape)
    for b in range(B):
        for head in range(heads):
            result = head_attention(
                vectors(q, b, head * d, fine_places),
                vectors(coarse_kv, b, 2 * d * head, coarse_places),
                vectors(coarse_kv, b, 2 * d * head + d, coarse_places),
                vectors(fine_kv, b, 2 * d * head, fine_places),
                vectors(fine_kv, b, 2 * d * head + d, fine_places),
                topk,
                fusion,
                (w['gate.weight'], w['gate.bias']),
                pool,
            )
            for (i, j), vector in result.items():
                out[b, head * d:(head + 1) * d, i, j] = vector
            values[b, head * d:(head + 1) * d] = coarse_kv[b, 2 * d * head + d:2 * d * (head + 1)]
    return conv_norm(part(w, 'proj.'), out + upsample(conv_norm(part(w, 'pe.'), values), H, W))


def block(w, x, u, heads, topk=0, fusion='gate', pool=1):
    """x + attention, then + MLP."""
    x = x + attention(part(w, 'attn.'), x, u, heads, topk, fusion, pool)
    hidden = silu(conv_norm(part(w, 'mlp.0.'), x))
    return x + conv_norm(part(w, 'mlp.1.'), hidden)


def pst(w, x, u, head_dim, topk=0, fusion='gate', pool=1):
    """The PST module: x (B, in, H, W) and u (B, upper, h, w) to (B, out, H, W)."""
    x = silu(conv_norm(part(w, 'conv_in.'), x))
    outs = [x]
    depth = 0
    while f'blocks.{depth}.attn.q.conv.weight' in w:
        if depth == 0:
            u = silu(conv_norm(part(w, 'conv_upper.'), u))
        x = block(part(w, f'blocks.{depth}.'), x, u, x.shape[1] // head_dim, topk, fusion, pool)
        outs.append(x)
        depth += 1
    return silu(conv_norm(part(w, 'conv_out.'), np.concatenate(outs, axis=1)))


def fusion_head(w, c4, c5, head_dim, topk=0, fusion='gate'):
    """All that follows the trunk: C4 and C5 to P, F and the logits."""
    p = pst(part(w, 'pst.'), c4, c5, head_dim, topk, fusion)
    stride = round(c4.shape[2] / c5.shape[2])
    down = silu(conv_norm(part(w, 'fuse_down.'), np.concatenate([p, c4], axis=1), stride))
    fused = silu(conv_norm(part(w, 'fuse_merge.'), np.concatenate([down, c5], axis=1)))
    pooled = silu(conv_norm(part(w, 'conv_head.'), fused)).mean(axis=(2, 3))
    return p, fused, pooled @ w['fc.weight'].T + w['fc.bias']


def nearest(x, H, W):
    """x (B, C, h, w) with every token repeated over the places that it owns in a map of H x W, 2h x 2w or one less."""
    y = np.zeros((*x.shape[:2], H, W))
    for i in range(H):
        for j in range(W):
            y[:, :, i, j] = x[:, :, i // 2, j // 2]
    return y


def pyramid(w, maps, head_dim, topk=0, fusion='gate', pools=None):
    """The PST pyramid over maps, the finest first: fused maps without extra levels."""
    last = len(maps) - 1
    outs = list(maps)
    if 'conv_top.conv.weight' in w:
        outs[last] = silu(conv_norm(part(w, 'conv_top.'), maps[last]))
    above = maps[last]
    for i in range(last - 1, -1, -1):
        x = np.concatenate([nearest(above, *maps[i].shape[2:]), maps[i]], axis=1)
        above = pst(
            part(w, f'top_down.{last - 1 - i}.'), x, maps[i + 1], head_dim, topk, fusion, pools[i] if pools else 1)
        outs[i] = above
    if 'down.0.conv.weight' in w:
        for i in range(1, last + 1):
            down = silu(conv_norm(part(w, f'down.{i - 1}.'), outs[i - 1], stride=2))
            outs[i] = silu(conv_norm(part(w, f'merge.{i - 1}.'), np.concatenate([down, outs[i]], axis=1)))
    return outs
