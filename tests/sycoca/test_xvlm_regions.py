"""Boxes as cells of the patch grid, and as numbers."""

import numpy as np
import pytest
import torch

from sycoca.regions import areas, cells, from_corners, iou, places, to_corners, whole

SIDE, PATCH = 48, 8
GRID = (6, 6)


def pixel_boxes(count: int) -> torch.Tensor:
    """Corners in whole pixels, drawn from everything that fits."""
    draws = torch.randint(0, SIDE, (count, 4), generator=torch.Generator().manual_seed(0))
    low, high = draws[:, :2].minimum(draws[:, 2:]), draws[:, :2].maximum(draws[:, 2:]) + 1
    return torch.cat([low, high], dim=1)


def test_cells_are_the_patches_whose_pixels_a_box_holds():
    corners = pixel_boxes(300)
    rects = cells(from_corners(corners.float() / SIDE), GRID)
    place, valid = places(rects, GRID[1], 36)
    assert rects.dtype == torch.int32 and torch.equal(valid.sum(1), areas(rects))
    for (x0, y0, x1, y1), row, counts in zip(corners.tolist(), place, valid):
        pixels = torch.zeros(SIDE, SIDE, dtype=torch.bool)
        pixels[y0:y1, x0:x1] = True
        touched = pixels.view(6, PATCH, 6, PATCH).any(3).any(1).flatten().nonzero().squeeze(1)
        assert torch.equal(row[counts].sort().values, touched)
        assert torch.equal(row[counts], row[counts].sort().values), "row by row"


@pytest.mark.parametrize(
    ("corners", "rect"),
    [
        ((0, 0, 48, 48), (0, 0, 6, 6)),  # the whole image
        ((47, 47, 48, 48), (5, 5, 6, 6)),  # a pixel in the last corner
        ((8, 8, 16, 16), (1, 1, 2, 2)),  # exactly one patch
        ((7, 8, 17, 16), (0, 1, 3, 2)),  # a pixel more on either side
        ((48, 48, 48, 48), (5, 5, 6, 6)),  # nothing, at the far border: still one patch
        ((16, 16, 16, 16), (2, 2, 3, 3)),
    ],
)
def test_borders(corners, rect):
    box = from_corners(torch.tensor([corners], dtype=torch.float32) / SIDE)
    assert cells(box, GRID).tolist() == [list(rect)]
    assert cells(box.numpy(), GRID).tolist() == [list(rect)] and cells(box.numpy(), GRID).dtype == np.int32


def test_grids_need_not_be_square():
    assert cells(torch.tensor([[0.5, 0.5, 1.0, 1.0]]), (2, 5)).tolist() == whole(1, (2, 5)).tolist() == [[0, 0, 5, 2]]
    assert cells(torch.tensor([[0.9, 0.25, 0.2, 0.5]]), (2, 5)).tolist() == [[4, 0, 5, 1]]


def test_boxes_as_numbers():
    corners = pixel_boxes(50).float() / SIDE
    boxes = from_corners(corners)
    assert torch.allclose(to_corners(boxes), corners, atol=1e-6)
    assert torch.allclose(iou(boxes, boxes), torch.ones(50, dtype=torch.float64))
    halves = torch.tensor([[0.25, 0.5, 0.5, 1.0]]), torch.tensor([[0.5, 0.5, 1.0, 1.0]])
    assert iou(*halves).item() == pytest.approx(0.5)
    assert iou(torch.tensor([[0.1, 0.1, 0.1, 0.1]]), torch.tensor([[0.9, 0.9, 0.1, 0.1]])).item() == 0
    assert iou(torch.zeros(1, 4), torch.zeros(1, 4)).item() == 0
