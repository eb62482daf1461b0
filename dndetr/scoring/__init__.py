"""From model outputs to detections, and how good those are."""
