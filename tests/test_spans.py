"""Temporal spans: conversions, overlap, suppression."""

import pytest
import torch

from peft_read.spans import (
    centre_width_to_start_end,
    clips_to_seconds,
    generalized_temporal_iou,
    seconds_to_clips,
    start_end_to_centre_width,
    temporal_iou,
    temporal_nms,
)


def test_conversions_are_inverse():
    spans = torch.rand(4, 3, 2)
    torch.testing.assert_close(start_end_to_centre_width(centre_width_to_start_end(spans)), spans)
    assert centre_width_to_start_end(torch.tensor([0.5, 0.4])).tolist() == pytest.approx([0.3, 0.7])


def test_clips_and_seconds():
    assert clips_to_seconds(torch.tensor([[2, 4]]), 2.0).tolist() == [[4.0, 10.0]]
    seconds = torch.tensor([[4.0, 10.0], [14.0, 16.0], [0.0, 99.0], [5.0, 5.5], [40.0, 42.0]])
    assert seconds_to_clips(seconds, 2.0, 8).tolist() == [[2, 4], [7, 7], [0, 7], [2, 2], [7, 7]]


@pytest.mark.parametrize("span", [[0.0, torch.inf], [torch.inf, torch.inf], [torch.nan, 1.0], [-1.0, 1.0]])
def test_seconds_that_are_no_time_are_refused(span):
    with pytest.raises(ValueError, match="finite and not negative"):
        seconds_to_clips(torch.tensor([span]), 2.0, 8)


def test_windows_of_whole_clips_keep_them_at_any_length_of_a_clip():
    assert seconds_to_clips(torch.tensor([[0.6, 1.4]], dtype=torch.float64), 0.2, 10).tolist() == [[3, 6]]
    clips = torch.combinations(torch.arange(120), 2, with_replacement=True)
    for length in (0.04, 0.1, 0.2, 0.3, 1 / 3, 0.7, 1.1, 2.0, 2.133):
        for dtype in (torch.float32, torch.float64):
            seconds = torch.stack((clips[:, 0], clips[:, 1] + 1), dim=1).to(dtype) * length
            assert torch.equal(seconds_to_clips(seconds, length, 120), clips), (length, dtype)
    # with clips of 2 s, as in QVHighlights, the parts of a clip stay what they were
    parts = torch.combinations(torch.arange(0, 150, 0.25), 2)
    plain = (parts / 2).long()
    expected = torch.stack((plain[:, 0], torch.maximum(plain[:, 1] - 1, plain[:, 0])), dim=1)
    assert torch.equal(seconds_to_clips(parts, 2.0, 75), expected)


def test_overlap_by_hand():
    a = torch.tensor([[0.0, 4.0], [0.0, 1.0], [2.0, 2.0]])
    b = torch.tensor([[2.0, 6.0], [3.0, 5.0], [2.0, 2.0]])
    assert temporal_iou(a, b).tolist() == pytest.approx([2 / 6, 0.0, 0.0])
    assert generalized_temporal_iou(a, b).tolist() == pytest.approx([2 / 6, -2 / 5, 0.0])
    assert temporal_iou(a.unsqueeze(1), b).shape == (3, 3)


def test_empty_spans_have_finite_gradients():
    spans = torch.zeros(1, 2, requires_grad=True)
    generalized_temporal_iou(spans, torch.zeros(1, 2)).sum().backward()
    assert spans.grad.isfinite().all()


def test_suppression_by_hand():
    windows = [[0, 10, 0.5], [0, 9, 0.9], [20, 30, 0.7], [0, 5, 0.6]]
    assert temporal_nms(windows, 0.5) == [[0, 9, 0.9], [20, 30, 0.7]]
    # an overlap of exactly the threshold stays
    assert temporal_nms([[0, 10, 0.9], [0, 5, 0.5]], 0.5) == [[0, 10, 0.9], [0, 5, 0.5]]
    assert temporal_nms(windows, 0.5, max_after=1) == [[0, 9, 0.9]]
    assert temporal_nms(windows, 0.5, max_before=1) == [[0, 10, 0.5]]
    assert temporal_nms([], 0.5) == []
