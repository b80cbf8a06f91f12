"""Greedy suppression on a GPU with two Triton kernels and without host reads.

The first kernel computes one bit for each pair of boxes, as torchvision's operator does. The second kernel processes the
boxes of a group by descending score, 32 at a time, and accumulates the bits of the boxes that it keeps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BITMASK_BYTES = 1 << 28  # pair bits in memory at a time
ROWS_PER_PROGRAM = 128
TILE_WORDS = 4096  # words of the bitmask that the second kernel reads at a time


@triton.jit
def _pack_overlaps(
    boxes,  # f32 [P, K, 4], best first
    areas,  # f32 [P, K]
    labels,  # i64 [P, K]
    bits,  # i32 [P, num_rows, num_words]: bit j of word w in row i: box i suppresses box 32 * w + j
    iou_threshold,
    first_row,
    num_rows,
    num_boxes,
    num_words,
    has_labels: tl.constexpr,
    block_rows: tl.constexpr,
):
    group = tl.program_id(2).to(tl.int64)
    word = tl.program_id(0)
    local_row = tl.program_id(1) * block_rows + tl.arange(0, block_rows)
    row = first_row + local_row
    column = word * 32 + tl.arange(0, 32)
    # words left of the diagonal describe boxes with higher scores; they stay undefined and are not read
    if word * 32 + 31 > first_row + tl.program_id(1) * block_rows:
        is_row = (local_row < num_rows) & (row < num_boxes)
        is_column = column < num_boxes
        row_box = boxes + (group * num_boxes + row) * 4
        column_box = boxes + (group * num_boxes + column) * 4
        left = tl.load(row_box, mask=is_row, other=0.0)
        top = tl.load(row_box + 1, mask=is_row, other=0.0)
        right = tl.load(row_box + 2, mask=is_row, other=0.0)
        bottom = tl.load(row_box + 3, mask=is_row, other=0.0)
        other_left = tl.load(column_box, mask=is_column, other=0.0)
        other_top = tl.load(column_box + 1, mask=is_column, other=0.0)
        other_right = tl.load(column_box + 2, mask=is_column, other=0.0)
        other_bottom = tl.load(column_box + 3, mask=is_column, other=0.0)
        area = tl.load(areas + group * num_boxes + row, mask=is_row, other=0.0)
        other_area = tl.load(areas + group * num_boxes + column, mask=is_column, other=0.0)
        width = tl.minimum(right[:, None], other_right[None, :]) - tl.maximum(left[:, None], other_left[None, :])
        height = tl.minimum(bottom[:, None], other_bottom[None, :]) - tl.maximum(top[:, None], other_top[None, :])
        intersection = tl.maximum(width, 0.0) * tl.maximum(height, 0.0)
        union = area[:, None] + other_area[None, :] - intersection
        # the same arithmetic as `box_iou`; a NaN area makes the comparison false
        overlaps = tl.div_rn(intersection, tl.maximum(union, 1.1754943508222875e-38)) > iou_threshold
        overlaps = overlaps & ((area == area)[:, None] & (other_area == other_area)[None, :])
        overlaps = overlaps & (column[None, :] > row[:, None]) & is_column[None, :]
        if has_labels:
            label = tl.load(labels + group * num_boxes + row, mask=is_row, other=-1)
            other_label = tl.load(labels + group * num_boxes + column, mask=is_column, other=-2)
            overlaps = overlaps & (label[:, None] == other_label[None, :])
        packed = tl.sum(overlaps.to(tl.int32) << tl.arange(0, 32)[None, :], axis=1)
        tl.store(bits + (group * num_rows + local_row) * num_words + word, packed, mask=is_row)


@triton.jit
def _bitwise_or(a, b):
    return a | b


@triton.jit
def _collect(
    bits,  # i32 [P, num_rows, num_words], see above
    removed,  # i32 [P, num_words], bits of the boxes that are suppressed or not valid; updated
    kept,  # i32 [P, num_words], bits of the boxes that survive; written for these rows
    first_row,
    num_rows,
    num_words,
    padded_words: tl.constexpr,
    tile_rows: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    bits += group * num_rows * num_words
    words = tl.arange(0, padded_words)
    is_word = words < num_words
    state = tl.load(removed + group * num_words + words, mask=is_word, other=-1)
    for block in range(first_row // 32, (first_row + num_rows + 31) // 32):
        block_state = tl.sum(tl.where(words == block, state, 0))
        block_kept = block_state * 0
        start = block * 32 - first_row
        for bit in range(32):
            # rows after the last box are marked as removed in the state
            own_bits = tl.load(bits + (start + bit) * num_words + block, mask=start + bit < num_rows, other=0)
            survives = ((block_state >> bit) & 1) == 0
            block_kept |= survives.to(tl.int32) << bit
            block_state |= tl.where(survives, own_bits, 0)
        tl.store(kept + group * num_words + block, block_kept)
        for tile in range(32 // tile_rows):
            tile_bits = tile * tile_rows + tl.arange(0, tile_rows)
            rows = start + tile_bits
            is_row = (((block_kept >> tile_bits) & 1) != 0) & (rows < num_rows)
            is_read = is_row[:, None] & (is_word & (words > block))[None, :]
            suppressed = tl.load(bits + rows[:, None] * num_words + words[None, :], mask=is_read, other=0)
            state |= tl.reduce(suppressed, 0, _bitwise_or)
    tl.store(removed + group * num_words + words, state, mask=is_word)


def greedy_mask(boxes: Tensor, valid: Tensor, iou_threshold: float, labels: Tensor | None) -> Tensor:
    """Mask [P, K] of the boxes that greedy suppression keeps in each group.

    The bitmask takes at most BITMASK_BYTES, or 32 rows of every group if these take more.

    Args:
        boxes: [P, K, 4], float32, by descending score; K up to `nms.MAX_TRITON_BOXES`: one program holds a bit for each of them.
        valid: [P, K].
        labels: [P, K]; if given, boxes suppress only boxes with the same label.
    """
    num_groups, num_boxes = valid.shape
    num_words = triton.cdiv(num_boxes, 32)
    boxes = boxes.float().contiguous()
    areas = ((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])).contiguous()
    labels = areas if labels is None else labels.contiguous()
    has_labels = labels is not areas
    bit = torch.arange(32, device=valid.device, dtype=torch.int32)
    absent = torch.nn.functional.pad(~valid, (0, num_words * 32 - num_boxes), value=True)
    removed = (absent.view(num_groups, num_words, 32).int() << bit).sum(dim=2).to(torch.int32)
    kept = torch.empty_like(removed)
    rows_at_once = max(1, BITMASK_BYTES // (128 * num_groups * num_words)) * 32
    rows_at_once = min(rows_at_once, num_words * 32)
    bits = torch.empty(num_groups * rows_at_once * num_words, dtype=torch.int32, device=valid.device)
    padded_words = triton.next_power_of_2(num_words)
    for first_row in range(0, num_boxes, rows_at_once):
        num_rows = min(rows_at_once, num_boxes - first_row)
        grid = (num_words, triton.cdiv(num_rows, ROWS_PER_PROGRAM), num_groups)
        _pack_overlaps[grid](
            boxes, areas, labels, bits, iou_threshold, first_row, num_rows, num_boxes, num_words,
            has_labels=has_labels, block_rows=ROWS_PER_PROGRAM, enable_fp_fusion=False,
        )  # fmt: skip
        _collect[(num_groups,)](
            bits, removed, kept, first_row, num_rows, num_words,
            padded_words=padded_words, tile_rows=max(1, min(32, TILE_WORDS // padded_words)),
        )  # fmt: skip
    return ((kept[..., None] >> bit) & 1).bool().flatten(1)[:, :num_boxes]
