"""Trackers: what mirrors metrics.jsonl in TensorBoard, Weights & Biases or Trackio.

The registry is milepost/runtime/trackers.py.
"""
