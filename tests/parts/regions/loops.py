"""Every operation of the family as loops over numbers, from its papers' definitions: slow, plain and independent."""

from __future__ import annotations

import math

import numpy as np


def c_round(x):
    return math.copysign(math.floor(abs(x) + 0.5), x)


def iou(a, b):
    w, h = max(min(a[2], b[2]) - max(a[0], b[0]), 0.0), max(min(a[3], b[3]) - max(a[1], b[1]), 0.0)
    areas = [max(c[2] - c[0], 0.0) * max(c[3] - c[1], 0.0) for c in (a, b)]
    union = sum(areas) - w * h
    return w * h / union if union else 0.0


def nms(boxes, scores, threshold, groups=None):
    keep = []
    for i in sorted(range(len(scores)), key=lambda i: -scores[i]):
        rivals = [j for j in keep if groups is None or groups[i] == groups[j]]
        if all(iou(boxes[i], boxes[j]) <= threshold for j in rivals):
            keep.append(i)
    return keep


def soft_nms(boxes, scores, factor, least):
    left, order, final = dict(enumerate(scores)), [], []
    while left:
        best = max(left, key=lambda i: left[i])
        value = left.pop(best)
        if value < least:
            break
        order.append(best)
        final.append(value)
        left = {i: s * factor(iou(boxes[best], boxes[i])) for i, s in left.items()}
    return order, final


def bilinear(image, y, x):
    """Zero outside."""
    total = 0.0
    for i in (math.floor(y), math.floor(y) + 1):
        for j in (math.floor(x), math.floor(x) + 1):
            if 0 <= i < image.shape[0] and 0 <= j < image.shape[1]:
                total += image[i, j] * (1 - abs(y - i)) * (1 - abs(x - j))
    return total


def clamped(image, y, x):
    """The border's pixel up to one pixel outside, zero beyond."""
    if not (-1 <= y <= image.shape[0] and -1 <= x <= image.shape[1]):
        return 0.0
    return bilinear(image, min(max(y, 0), image.shape[0] - 1), min(max(x, 0), image.shape[1] - 1))


def roi_align(maps, rois, bins, scale, ratio, aligned):
    out = np.zeros((len(rois), maps.shape[1], bins, bins))
    for r, (image, *corners) in enumerate(rois):
        x1, y1, x2, y2 = (value * scale - 0.5 * aligned for value in corners)
        w, h = (x2 - x1, y2 - y1) if aligned else (max(x2 - x1, 1), max(y2 - y1, 1))
        n_y, n_x = (ratio, ratio) if ratio > 0 else (math.ceil(h / bins), math.ceil(w / bins))
        for c, p, q in np.ndindex(out.shape[1:]):
            values = [
                clamped(
                    maps[int(image), c], y1 + (p + (i + 0.5) / n_y) * h / bins, x1 + (q + (j + 0.5) / n_x) * w / bins
                )
                for i in range(n_y)
                for j in range(n_x)
            ]
            out[r, c, p, q] = np.mean(values) if values else 0.0
    return out


def ps_roi_align(maps, rois, bins, scale, ratio, *, reduce, convention, offset=None, gamma=0.1):
    d = maps.shape[1] // bins**2
    out = np.zeros((len(rois), d, bins, bins))
    for r, (image, *corners) in enumerate(rois):
        x1, y1, x2, y2 = corners
        if convention == "rfcn":
            x1, y1, x2, y2 = c_round(x1), c_round(y1), c_round(x2) + 1, c_round(y2) + 1
        shift = 0.0 if convention == "thundernet" else 0.5
        x1, y1, x2, y2 = (value * scale - shift for value in (x1, y1, x2, y2))
        least = {"torchvision": -math.inf, "rfcn": 0.1, "thundernet": 1.0}[convention]
        w, h = max(x2 - x1, least), max(y2 - y1, least)
        for c, p, q in np.ndindex(d, bins, bins):
            image_map = maps[int(image), (c * bins + p) * bins + q]
            dx, dy = (0, 0) if offset is None else (gamma * w * offset[r, 0, p, q], gamma * h * offset[r, 1, p, q])
            values = []
            for i, j in np.ndindex(ratio, ratio):
                centre = 0.0 if convention == "rfcn" else 0.5
                y, x = y1 + dy + (p + (i + centre) / ratio) * h / bins, x1 + dx + (q + (j + centre) / ratio) * w / bins
                if convention != "rfcn" or (
                    -0.5 <= y <= image_map.shape[0] - 0.5 and -0.5 <= x <= image_map.shape[1] - 0.5
                ):
                    values.append(clamped(image_map, y, x))
            if values:
                out[r, c, p, q] = np.mean(values) if reduce == "mean" else np.max(values)
    return out


def _whole(start, size, bins, p, n):
    low, high = math.floor(p * size / bins + start), math.ceil((p + 1) * size / bins + start)
    return slice(min(max(low, 0), n), min(max(high, 0), n))


def roi_pool(maps, rois, bins, scale):
    out = np.zeros((len(rois), maps.shape[1], bins, bins))
    for r, (image, *corners) in enumerate(rois):
        x1, y1, x2, y2 = (c_round(value * scale) for value in corners)
        for c, p, q in np.ndindex(out.shape[1:]):
            rows = _whole(y1, max(y2 - y1 + 1, 1), bins, p, maps.shape[2])
            part = maps[int(image), c, rows, _whole(x1, max(x2 - x1 + 1, 1), bins, q, maps.shape[3])]
            out[r, c, p, q] = part.max() if part.size else 0.0
    return out


def ps_roi_pool(maps, rois, bins, scale, convention):
    d = maps.shape[1] // bins**2
    out = np.zeros((len(rois), d, bins, bins))
    for r, (image, *corners) in enumerate(rois):
        if convention == "torchvision":
            (x1, y1, x2, y2), least = (c_round(value * scale) for value in corners), 1.0
        else:
            x1, y1, x2, y2 = (c_round(value) for value in corners)
            (x1, y1, x2, y2), least = (value * scale for value in (x1, y1, x2 + 1, y2 + 1)), 0.1
        for c, p, q in np.ndindex(d, bins, bins):
            rows = _whole(y1, max(y2 - y1, least), bins, p, maps.shape[2])
            columns = _whole(x1, max(x2 - x1, least), bins, q, maps.shape[3])
            part = maps[int(image), (c * bins + p) * bins + q, rows, columns]
            out[r, c, p, q] = part.mean() if part.size else 0.0
    return out


def deform_conv2d(x, offset, weight, stride, padding, dilation, mask):
    (d, part, k_y, k_x), groups_of_taps = weight.shape, offset.shape[1] // (2 * weight.shape[2] * weight.shape[3])
    groups = x.shape[1] // part
    out = np.zeros((len(x), d, *offset.shape[2:]))
    for b, n, y0, x0 in np.ndindex(out.shape):
        for m, i, j in np.ndindex(part, k_y, k_x):
            c = n // (d // groups) * part + m
            tap = c // (x.shape[1] // groups_of_taps) * k_y * k_x + i * k_x + j
            y = y0 * stride - padding + i * dilation + offset[b, 2 * tap, y0, x0]
            column = x0 * stride - padding + j * dilation + offset[b, 2 * tap + 1, y0, x0]
            scale = 1.0 if mask is None else mask[b, tap, y0, x0]
            out[b, n, y0, x0] += weight[n, m, i, j] * scale * bilinear(x[b, c], y, column)
    return out
